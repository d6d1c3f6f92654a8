"""Bases and adapters are known by name and by bits, also after a merge."""

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import LoRAConfig
from lora_jax.cli.main import main
from lora_jax.files.adapter import save_adapter
from lora_jax.interop.export import export_adapter
from lora_jax.interop.identity import base_name
from lora_jax.interop.peft import read_peft
from lora_jax.interop.pretrained import load_model
from lora_jax.tree.fingerprint import fingerprint
from tests.models.golden import GOLDEN

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
RSLORA = GOLDEN / "llama" / "peft_rslora"


def base_folder(target):
    target.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / "llama" / name, target)
    return target


def settings(folder, name=CONFIG):
    return json.loads((folder / name).read_text())


def named(adapter, name):
    config = settings(adapter) | {"base_model_name_or_path": name}
    (adapter / CONFIG).write_text(json.dumps(config))
    return adapter


def plain_adapter(target):
    return named(shutil.copytree(GOLDEN / "llama" / "peft_plain", target), "org/more")


def run(*arguments):
    return main([str(a) for a in arguments])


@pytest.mark.parametrize(
    ("candidates", "name"),
    [
        (("/data/llama", "org/llama"), "org/llama"),
        (("/c/models--org--a-b/snapshots/0a1b",), "org/a-b"),
        (("/c/models--gpt2/snapshots/0a1b",), "0a1b"),
        (("gpt2",), "gpt2"),
        (("/data/llama/",), "llama"),
        ((None, ""), None),
    ],
)
def test_a_base_is_named_as_on_every_machine(candidates, name):
    assert base_name(*candidates) == name


def test_a_merged_model_refuses_the_adapter_that_it_holds(tmp_path):
    base = base_folder(tmp_path / "llama")
    adapter = named(shutil.copytree(RSLORA, tmp_path / "mine"), "org/llama")
    out = tmp_path / "out"
    assert run("merge", "--model", base, "--adapter", adapter, "--out", out) == 0
    (record,) = settings(out, "config.json")["lora_jax"]["merged"]
    assert record["adapter"] == "mine"
    assert record["base"] == "llama"
    mark = fingerprint(load_model(base, adapter).variables["frozen"])
    assert record["base_fingerprint"] == mark
    with pytest.raises(ValueError, match=rf"its base, llama \({mark}\); it is merged"):
        load_model(out, adapter)
    load_model(out, plain_adapter(tmp_path / "plain"))  # another one, of another base
    other = named(shutil.copytree(RSLORA, tmp_path / "other"), "/data/llama")
    tensors = {n: 2 * t for n, t in load_file(other / FILE).items()}
    save_file(tensors, other / FILE)
    with pytest.warns(UserWarning, match=r"made for llama; .* adapter 'mine' merged"):
        load_model(out, other)


def test_a_second_merge_keeps_the_record_of_the_first(tmp_path):
    base, out = base_folder(tmp_path / "llama"), tmp_path / "out"
    plain = plain_adapter(tmp_path / "plain")
    assert run("merge", "--model", base, "--adapter", RSLORA, "--out", out) == 0
    more = tmp_path / "more"
    assert run("merge", "--model", out, "--adapter", plain, "--out", more) == 0
    records = settings(more, "config.json")["lora_jax"]["merged"]
    assert [r["adapter"] for r in records] == ["peft_rslora", "plain"]
    for adapter in (RSLORA, plain):
        with pytest.raises(ValueError, match="merged into"):
            load_model(more, adapter)


def test_merging_what_was_trained_in_bfloat16_starts_from_the_bits_on_disk(tmp_path):
    base = base_folder(tmp_path / "llama")
    config = LoRAConfig(rank=2, alpha=3, targets=["query"])
    model = load_model(base, lora=config, key=jax.random.key(0), param_dtype="bfloat16")
    lora = jax.tree.map(lambda x: x + 0.1, model.variables["lora"])
    mark = fingerprint(model.variables["frozen"])
    extra = {"model": str(base), "param_dtype": "bfloat16"}
    save_adapter(tmp_path / "adapter", {"lora": lora}, config, mark, extra=extra)
    out = tmp_path / "out"
    assert run("merge", "--adapter", tmp_path / "adapter", "--out", out) == 0
    before, after = (load_file(f / "model.safetensors") for f in (base, out))
    for name, tensor in before.items():
        if "q_proj" not in name:
            assert after[name].tobytes() == tensor.tobytes(), name
            continue
        pair = lora[f"layer_{name.split('.')[2]}"]["attention"]["query"]
        a, b = (np.asarray(pair[k], np.float64) for k in ("lora_a", "lora_b"))
        wanted = tensor + 1.5 * (a @ b).T
        np.testing.assert_allclose(after[name], wanted, rtol=1e-5, atol=1e-6)


def test_an_export_names_no_path_of_this_machine(tmp_path):
    base = base_folder(tmp_path / "llama")
    model = load_model(base, RSLORA)
    for source in (model, str(base)):
        variables, config = model.variables, model.module.config
        out = export_adapter(tmp_path / "out", variables, config, source)
        assert settings(out)["base_model_name_or_path"] == "llama"
        out = export_adapter(
            tmp_path / "out", variables, config, source, base_model=str(base)
        )
        assert str(tmp_path) not in (out / CONFIG).read_text()
    written = settings(base, "config.json") | {"_name_or_path": "org/llama"}
    (base / "config.json").write_text(json.dumps(written))
    out = export_adapter(tmp_path / "out", variables, config, model)
    assert settings(out)["base_model_name_or_path"] == "org/llama"


@pytest.mark.parametrize("portable", [False, True])
def test_a_peft_adapter_is_exported_without_its_base(portable, tmp_path):
    adapter = named(
        shutil.copytree(GOLDEN / "llama" / "peft_plain", tmp_path / "a"), "org/llama"
    )
    out = tmp_path / "out"
    flags = ["--portable"] * portable
    assert run("export", "--adapter", adapter, "--out", out, *flags) == 0
    found, wanted = read_peft(out), read_peft(adapter)
    assert settings(out)["base_model_name_or_path"] == "org/llama"
    assert found.modules.keys() == wanted.modules.keys()
    for name, factors in wanted.modules.items():
        own = found.modules[name]
        assert own.scaling == (1.0 if portable else factors.scaling)
        np.testing.assert_allclose(
            own.scaling * own.b @ own.a,
            factors.scaling * factors.b @ factors.a,
            rtol=1e-5,
            atol=1e-6,
        )


def test_shapes_that_only_the_base_has_need_it(tmp_path, capsys):
    adapter = named(shutil.copytree(RSLORA, tmp_path / "a"), "org/llama")
    out = tmp_path / "out"
    flags = ["--adapter", adapter, "--out", out, "--portable"]
    assert run("export", *flags) != 0
    assert "no adapter of k_proj" in " ".join(capsys.readouterr().err.split())
    named(adapter, str(GOLDEN / "llama"))  # a folder here: it is read
    assert run("export", *flags) == 0
    assert "model.layers.1.self_attn.k_proj" in read_peft(out).modules
    assert settings(out)["base_model_name_or_path"] == "llama"
