"""What is exported is what was imported, bit for bit, and what other loaders take."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import LoRAConfig
from lora_jax.interop.attach import attach_adapter
from lora_jax.interop.export import export_adapter
from lora_jax.interop.loralib import read_loralib
from lora_jax.interop.peft import read_peft
from lora_jax.interop.pretrained import load_model
from lora_jax.tree.arithmetic import fit_adapter
from tests.interop.peft_cases import (
    CASES,
    adapter_of,
    assert_peft,
    logits_of,
)
from tests.models.golden import GOLDEN

FILE = "adapter_model.safetensors"


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(
        jax.tree.map(np.array_equal, a, b)
    )


def exported(folder, model, **options):
    config = model.module.config
    return export_adapter(folder, model.variables, config, model, **options)


def settings(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def fresh(family, **options):
    """A model with adapters whose B is not zero."""
    config = LoRAConfig(**{"rank": 2, "alpha": 3, **options})
    model = load_model(GOLDEN / family, lora=config, key=jax.random.key(0))
    lora = jax.tree.map(
        lambda x: np.asarray(x) + np.float32(0.1), model.variables["lora"]
    )
    return model._replace(variables={**model.variables, "lora": lora})


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_import_and_export_are_inverse(family, kind, tmp_path):
    model = load_model(GOLDEN / family, adapter=adapter_of(family, kind))
    exported(tmp_path / "out", model)
    written = load_file(tmp_path / "out" / FILE)
    original = load_file(adapter_of(family, kind) / FILE)
    original = {
        n: t for n, t in original.items() if not n.endswith(".base_layer.weight")
    }
    assert written.keys() == original.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    if kind not in ("plain", "dora"):  # their configs have no more to say
        again = load_model(GOLDEN / family, adapter=tmp_path / "out")
        assert again.module.config == model.module.config
        assert same(again.variables, model.variables)


def test_a_scanned_model_exports_its_layers_one_by_one(tmp_path):
    model = load_model(
        GOLDEN / "phi3", adapter=adapter_of("phi3", "dora"), scan_layers=True
    )
    exported(tmp_path / "out", model)
    written = load_file(tmp_path / "out" / FILE)
    for name, tensor in load_file(adapter_of("phi3", "dora") / FILE).items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    # From the path alone, with nothing of the base in memory.
    trained = {"lora": model.variables["lora"]}
    source = GOLDEN / "phi3"
    export_adapter(tmp_path / "b", trained, model.module.config, source)
    assert (tmp_path / "b" / FILE).read_bytes() == (
        tmp_path / "out" / FILE
    ).read_bytes()


def test_the_config_is_what_peft_needs(tmp_path):
    model = load_model(GOLDEN / "llama", adapter=adapter_of("llama", "rslora"))
    config = settings(exported(tmp_path / "out", model, base_model="me/base"))
    layer = "model.layers.1."
    assert config["target_modules"] == [
        f"{layer}mlp.down_proj",
        f"{layer}self_attn.q_proj",
        f"{layer}self_attn.v_proj",
    ]
    assert config["use_rslora"] is True
    assert config["base_model_name_or_path"] == "me/base"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["init_lora_weights"] is True
    assert config["modules_to_save"] is None


def test_modules_adapted_in_all_layers_are_named_by_their_last_word(tmp_path):
    model = fresh("llama", targets=["query", "mlp/down"])
    config = settings(exported(tmp_path / "out", model))
    assert config["target_modules"] == ["down_proj", "q_proj"]
    bert = load_model(GOLDEN / "bert", adapter=adapter_of("bert", "rslora"))
    names = settings(exported(tmp_path / "bert", bert))["target_modules"]
    assert "dense" not in names  # the pooler's too, which has no adapter


def test_a_tied_embedding_is_exported_twice_and_comes_back_once(tmp_path):
    model = fresh("qwen2", targets=["embed"])
    exported(tmp_path / "out", model)
    modules = read_peft(tmp_path / "out").modules
    assert set(modules) == {"lm_head", "model.embed_tokens"}
    np.testing.assert_array_equal(
        modules["lm_head"].a, modules["model.embed_tokens"].b.T
    )
    again = load_model(GOLDEN / "qwen2", adapter=tmp_path / "out")
    assert same(again.variables["lora"], model.variables["lora"])
    exported(tmp_path / "mlx", model, format="mlx")
    assert set(load_file(tmp_path / "mlx" / "adapters.safetensors")) == {
        "model.embed_tokens.lora_a",
        "model.embed_tokens.lora_b",
    }
    again = load_model(GOLDEN / "qwen2", adapter=tmp_path / "mlx")
    assert same(again.variables["lora"], model.variables["lora"])


def test_one_adapter_of_a_tied_embedding_is_an_error(tmp_path):
    exported(tmp_path / "out", fresh("qwen2", targets=["embed"]))
    tensors = load_file(tmp_path / "out" / FILE)
    kept = {n: t for n, t in tensors.items() if "lm_head" not in n}
    save_file(kept, tmp_path / "out" / FILE)
    with pytest.raises(ValueError, match="missing: factors of lm_head, which target"):
        load_model(GOLDEN / "qwen2", adapter=tmp_path / "out")
    # On a model in memory, whose head is its embedding, it can't be put.
    one = read_peft(GOLDEN / "peft_options" / "head")
    with pytest.raises(ValueError, match=r"\(tied\), so .* must both .* got one"):
        attach_adapter(load_model(GOLDEN / "qwen2"), one)
    model = fresh("qwen2", targets=["embed"], dora=True)
    with pytest.raises(ValueError, match="no other tool scales both sides alike"):
        exported(tmp_path / "out", model)


def test_biases_of_adapted_layers_come_back(tmp_path):
    model = fresh("qwen2", targets=["query", "value"], bias="lora_only")
    exported(tmp_path / "out", model)
    name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias"
    assert name in load_file(tmp_path / "out" / FILE)
    again = load_model(GOLDEN / "qwen2", adapter=tmp_path / "out")
    assert again.module.config.bias == "lora_only"
    assert same(again.variables, model.variables)


def test_a_trained_part_of_a_module_is_exported_with_the_rest(tmp_path):
    model = fresh("bert", targets=["query"], train=["classifier/kernel"])
    exported(tmp_path / "out", model)
    assert settings(tmp_path / "out")["modules_to_save"] == ["classifier"]
    names = load_file(tmp_path / "out" / FILE)
    assert "base_model.model.classifier.bias" in names
    trained = {k: model.variables[k] for k in ("lora", "params")}
    with pytest.raises(ValueError, match=r"classifier/bias must be in variables"):
        export_adapter(tmp_path / "b", trained, model.module.config, GOLDEN / "bert")


def test_a_head_on_another_pooling_is_refused_or_left_out(tmp_path):
    config = LoRAConfig(rank=2, targets=["query"], train=["classifier"])
    model = load_model(
        GOLDEN / "bert",
        lora=config,
        pooling="mean",
        num_labels=3,
        key=jax.random.key(0),
    )
    with pytest.raises(ValueError, match=r"on 'pooler' pooling .* trained on 'mean'"):
        exported(tmp_path / "out", model)
    exported(tmp_path / "out", model, skip_head=True)
    assert settings(tmp_path / "out")["modules_to_save"] is None
    assert not any("classifier" in name for name in load_file(tmp_path / "out" / FILE))


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_a_portable_adapter_has_one_rank_and_a_factor_of_one(family, tmp_path):
    model = load_model(GOLDEN / family, adapter=adapter_of(family, "rslora"))
    folder = exported(tmp_path / "out", model, portable=True)
    config, found = settings(folder), read_peft(folder)
    assert config["r"] == config["lora_alpha"] == 4
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["use_rslora"] is False
    assert isinstance(config["target_modules"], list)
    assert {f.rank for f in found.modules.values()} == {4}
    assert {f.scaling for f in found.modules.values()} == {1.0}
    if family == "llama":  # q and v were there
        key = found.modules["model.layers.1.self_attn.k_proj"]
        assert key.a.shape == (4, 20)
        assert not key.b.any()
    again = load_model(GOLDEN / family, adapter=folder)
    logits = logits_of(again.module, again.variables, family)
    assert_peft(logits, family, "rslora")


def test_what_some_loader_refuses_can_not_be_portable(tmp_path):
    cases = {
        ("llama", "dora"): "DoRA's magnitudes",
        ("llama", "embed"): "model.embed_tokens is not a linear layer of a block",
        ("llama", "saved"): "lm_head.weight is trained in full",
        ("vit", "conv"): "projection is not a linear layer",
    }
    for (family, kind), message in cases.items():
        model = load_model(GOLDEN / family, adapter=adapter_of(family, kind))
        with pytest.raises(ValueError, match=message):
            exported(tmp_path / "out", model, portable=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", "plain"), ("gpt2", "dora"), ("gemma2", "rslora")]
)
def test_mlx_lm_folders_come_back(family, kind, tmp_path):
    model = load_model(GOLDEN / family, adapter=adapter_of(family, kind))
    folder = exported(tmp_path / "out", model, format="mlx")
    config = settings(folder)
    assert config["fine_tune_type"] == ("dora" if kind == "dora" else "lora")
    assert config["num_layers"] == (1 if kind == "rslora" else 2)
    again = load_model(GOLDEN / family, adapter=folder)
    if kind == "rslora":
        rows, wanted = again.module.targets(), model.module.targets()
        fitted = fit_adapter(model.variables["lora"], wanted, rows)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6),
            again.variables["lora"],
            fitted,
        )
    else:
        assert same(again.variables, model.variables)
        assert again.module.config.scaling_for("") == pytest.approx(
            model.module.config.scaling_for("")
        )


def test_an_adapter_of_a_bare_loralib_state_dict(tmp_path):
    rng = np.random.default_rng(0)
    r, n = 2, 2
    a = rng.standard_normal((n * r, 20)).astype(np.float32)
    b = rng.standard_normal((n * 20, r)).astype(np.float32)
    name = "transformer.h.1.attn.c_attn"
    np.savez(tmp_path / "s.npz", **{f"{name}.lora_A": a, f"{name}.lora_B": b})
    found = read_loralib(
        tmp_path / "s.npz", alpha=6, enabled={"c_attn": (True, False, True)}
    )
    model = load_model(GOLDEN / "gpt2", adapter=found)
    base = load_model(GOLDEN / "gpt2").params["layer_1"]["attention"]["qkv"]["kernel"]
    merged = model.module.merge(model.variables)["layer_1"]["attention"]["qkv"]
    delta = np.asarray(merged["kernel"] - base)
    np.testing.assert_allclose(delta[:, :20], 3 * (b[:20] @ a[:2]).T, atol=1e-5)
    np.testing.assert_allclose(delta[:, 20:40], 0, atol=1e-6)
    np.testing.assert_allclose(delta[:, 40:], 3 * (b[20:] @ a[2:]).T, atol=1e-5)


def test_loralib_files_that_can_not_be_read_are_errors(tmp_path):
    (tmp_path / "s.pt").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"Pickled state dicts \(.bin, .pt"):
        read_loralib(tmp_path / "s.pt", alpha=1)
    (tmp_path / "s.npz").write_bytes(b"PK no")
    with pytest.raises(ValueError, match="can't be read as npz"):
        read_loralib(tmp_path / "s.npz", alpha=1)
    tensors = {"m.lora_A": np.ones((4, 3)), "m.lora_B": np.ones((6, 2))}
    np.savez(tmp_path / "t.npz", **tensors)
    with pytest.raises(ValueError, match=r"must be \[1 r, in\], \[out, r\]"):
        read_loralib(tmp_path / "t.npz", alpha=1)
