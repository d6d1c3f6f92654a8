"""Files: the Linen side's folders, PEFT's, and the trees of qwix and gemma.peft."""

import dataclasses
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

import lora_jax
import lora_jax.nnx as lnnx
from lora_jax import LoRAConfig
from lora_jax.tree.paths import unflatten
from tests.nnx.models import Projections, build, train_a_little
from tests.reference import assert_close

CONFIG = LoRAConfig(rank=2, alpha=6, rank_pattern={"up": 3}, train=["head"], dora=True)
GOLDEN = Path(__file__).parent.parent / "golden"
X = jnp.asarray(np.random.default_rng(1).standard_normal((3, 6)), jnp.float32)


class Mlp(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up = nnx.Linear(6, 8, rngs=rngs)
        self.down = nnx.Linear(8, 5, rngs=rngs)
        self.head = nnx.Linear(5, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(self.down(nnx.gelu(self.up(x))))


class LinenMlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(5, name="down")(nn.gelu(nn.Dense(8, name="up")(x)))
        return nn.Dense(4, name="head")(x)


def test_the_folder_is_the_linen_sides_byte_for_byte(tmp_path):
    base = Mlp()
    model = lnnx.adapt(base, CONFIG, rngs=nnx.Rngs(1))
    lnnx.save_adapter(tmp_path / "nnx", model, extra={"note": 1})
    linen = lora_jax.adapt(LinenMlp(), CONFIG, X)
    params = nnx.to_pure_dict(nnx.state(base))
    variables = linen.attach(params, jax.random.key(1))
    mark = lora_jax.fingerprint(variables["frozen"])
    lora_jax.save_adapter(
        tmp_path / "linen", variables, CONFIG, mark, extra={"note": 1}
    )
    for file in ("adapter.safetensors", "adapter_config.json"):
        files = [tmp_path / api / file for api in ("nnx", "linen")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_a_loaded_adapter_computes_as_the_saved_one(tmp_path):
    base = Mlp()
    model = train_a_little(lnnx.adapt(base, CONFIG, rngs=nnx.Rngs(1)))
    lnnx.save_adapter(tmp_path, model)
    loaded = lnnx.load_adapter(tmp_path, base)
    np.testing.assert_array_equal(loaded(X), model(X))
    assert loaded.up.kernel is base.up.kernel
    assert loaded.head.kernel is not base.head.kernel
    other = Mlp()
    other.up.bias.set_value(other.up.bias[...] + 1)
    with pytest.raises(ValueError, match="was trained on the base"):
        lnnx.load_adapter(tmp_path, other)
    with pytest.raises(ValueError, match="must have adapters of one LoRAConfig; it h"):
        lnnx.save_adapter(tmp_path, base)


def test_adapter_dropout_is_off_in_a_loaded_model_without_a_seed(tmp_path):
    base, config = Mlp(), LoRAConfig(rank=2, dropout_rate=0.5)
    lnnx.save_adapter(
        tmp_path, train_a_little(lnnx.adapt(base, config, rngs=nnx.Rngs(1)))
    )
    loaded = lnnx.load_adapter(tmp_path, base)
    np.testing.assert_array_equal(loaded(X), loaded(X))
    loaded.train()
    with pytest.raises(ValueError, match=r"dropout_rate=0.5 .*rngs=nnx.Rngs\(seed\)"):
        loaded(X)
    loaded = lnnx.load_adapter(tmp_path, base, rngs=nnx.Rngs(2))
    assert np.abs(loaded(X) - loaded(X)).max() > 0


NAMES = {
    r"embedder": "model.embed_tokens",
    r"layers/(\d+)/attn/q_einsum": r"model.layers.\1.self_attn.q_proj",
    r"layers/(\d+)/attn/kv_einsum": [
        r"model.layers.\1.self_attn.k_proj",
        r"model.layers.\1.self_attn.v_proj",
    ],
    r"layers/(\d+)/attn/attn_vec_einsum": r"model.layers.\1.self_attn.o_proj",
    r"layers/(\d+)/(\w+_proj)": r"model.layers.\1.mlp.\2",
}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_peft_folder_in_and_out_is_the_same(tmp_path, dora):
    base = build("gemma")
    config = LoRAConfig(
        rank=2,
        alpha=6,
        targets=["embedder", "q_einsum", "kv_einsum", "attn_vec_einsum", "up_proj"],
        rank_pattern={"layers/1/.*": 3},
        alpha_pattern={"q_einsum": 5},
        dora=dora,
        rslora=True,
    )
    model = train_a_little(lnnx.adapt(base, config, rngs=nnx.Rngs(1)))
    one, two = tmp_path / "one", tmp_path / "two"
    lnnx.export_adapter(one, model, NAMES, base_model="google/gemma")
    loaded = lnnx.load_peft(one, base, NAMES)
    lnnx.export_adapter(two, loaded, NAMES, base_model="google/gemma")
    tensors = [load_file(f / "adapter_model.safetensors") for f in (one, two)]
    assert tensors[0].keys() == tensors[1].keys()
    for name, tensor in tensors[0].items():
        np.testing.assert_array_equal(tensors[1][name], tensor)
    settings = [json.loads((f / "adapter_config.json").read_text()) for f in (one, two)]
    assert settings[0] == settings[1]
    layer = "base_model.model.model.layers.1.self_attn"
    if not dora:
        a, b = (tensors[0][f"{layer}.v_proj.lora_{n}.weight"] for n in "AB")
        kernels = [m.layers[1].attn.kv_einsum.w[1] for m in (lnnx.merge(model), base)]
        delta = np.moveaxis((6 / 3**0.5 * b @ a).reshape(1, 4, 6), 1, 2)  # [k, d, h]
        np.testing.assert_allclose(kernels[0] - kernels[1], delta, atol=1e-5)
    assert tensors[0][f"{layer}.q_proj.lora_B.weight"].shape == (12, 3)
    assert tensors[0][f"{layer}.v_proj.lora_A.weight"].shape == (3, 6)
    ids = jnp.arange(5)[None]
    assert_close(nnx.jit(lambda m: m(ids))(loaded), nnx.jit(lambda m: m(ids))(model))


def test_stacked_layers_have_a_name_each(tmp_path):
    base = build("scanned")
    names = {r"blocks/(\w+)": r"layers.{}.\1"}
    model = lnnx.adapt(base, LoRAConfig(rank=2, alpha=6), rngs=nnx.Rngs(1))
    model = train_a_little(model)
    lnnx.export_adapter(tmp_path, model, names)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 3
    wanted = model.blocks.up.lora_b[1].T
    name = "base_model.model.layers.1.up.lora_B.weight"
    np.testing.assert_array_equal(tensors[name], wanted)
    loaded = lnnx.load_peft(tmp_path, base, names)
    np.testing.assert_array_equal(loaded.blocks.down.lora_a, model.blocks.down.lora_a)
    with pytest.raises(ValueError, match=r"blocks/down, a stack of layers, needs {}"):
        lnnx.export_adapter(tmp_path, model)


def both_ways(folder, base, model, names):
    """The tensors and the config of an export, after a load that changed nothing."""
    lnnx.export_adapter(folder / "one", model, names)
    loaded = lnnx.load_peft(folder / "one", base, names)
    lnnx.export_adapter(folder / "two", loaded, names)
    files = ("adapter_model.safetensors", "adapter_config.json")
    for file in files:
        one, two = ((folder / name / file).read_bytes() for name in ("one", "two"))
        assert one == two
    got, wanted = (nnx.state(each, lnnx.Trained) for each in (loaded, model))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    tensors, config = (folder / "one" / file for file in files)
    cut = len("base_model.model.")
    named = {name[cut:]: tensor for name, tensor in load_file(tensors).items()}
    return named, json.loads(config.read_text())


def test_modules_trained_in_full_are_saved_whole(tmp_path):
    base = build("vit")
    train, targets = ["patches", "out", "norm"], ["query"]
    config = LoRAConfig(rank=2, alpha=6, targets=targets, train=train)
    model = train_a_little(lnnx.adapt(base, config, rngs=nnx.Rngs(1)))
    tensors, settings = both_ways(tmp_path, base, model, None)
    assert settings["modules_to_save"] == ["attention.out", "norm", "patches"]
    patches, out = model.patches, model.attention.out
    moved = np.moveaxis(patches.kernel[...], (-1, -2), (0, 1))
    np.testing.assert_array_equal(tensors["patches.weight"], moved)
    np.testing.assert_array_equal(tensors["patches.bias"], patches.bias[...])
    kernel = out.kernel.reshape(6, 6).T
    np.testing.assert_array_equal(tensors["attention.out.weight"], kernel)
    assert {"norm.weight", "norm.bias"} <= tensors.keys()


def test_trained_biases_and_layers_of_a_stack_are_saved(tmp_path):
    base = build("scanned")
    names = {r"blocks/(\w+)": r"layers.{}.\1"}
    fields = {"targets": ["up"], "bias": "lora_only", "train": ["down"]}
    config = LoRAConfig(rank=2, alpha=6, **fields)
    model = train_a_little(lnnx.adapt(base, config, rngs=nnx.Rngs(1)))
    tensors, settings = both_ways(tmp_path, base, model, names)
    assert settings["bias"] == "lora_only"
    assert settings["modules_to_save"] == [f"layers.{i}.down" for i in range(3)]
    down = model.blocks.down.kernel[1].T
    np.testing.assert_array_equal(tensors["layers.1.down.weight"], down)
    bias = tensors["layers.2.up.base_layer.bias"]
    np.testing.assert_array_equal(bias, model.blocks.up.bias[2])


def test_experts_are_parameters_for_peft(tmp_path):
    base = build("mixture")
    names = {"up": "mlp.experts.gate_up_proj", "down": "mlp.experts.down_proj"}
    config = LoRAConfig(rank=2, alpha=6, targets=["up", "down"])
    model = train_a_little(lnnx.adapt(base, config, rngs=nnx.Rngs(1)))
    tensors, settings = both_ways(tmp_path, base, model, names)
    assert settings["target_parameters"] == sorted(names.values())
    assert settings["target_modules"] == []
    a = tensors["mlp.experts.base_layer.lora_A.weight"]  # expert by expert
    np.testing.assert_array_equal(a[2:4], model.up.lora_a[1].T)
    b = tensors["mlp.experts.lora_B.weight"]  # rank by rank
    np.testing.assert_array_equal(b[:, 1::3].T, model.down.lora_b[1])
    dora = lnnx.adapt(base, dataclasses.replace(config, dora=True), rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match=r"down has DoRA of experts.*up has DoRA"):
        lnnx.export_adapter(tmp_path, dora, names)
    with pytest.raises(ValueError, match=r"of up, .*end in experts.gate_up_proj or"):
        lnnx.export_adapter(tmp_path, model)


def test_what_does_not_fit_is_told_at_once(tmp_path):
    config = LoRAConfig(train=["head", "up/bias"], rank=2)
    model = lnnx.adapt(Mlp(), config, rngs=nnx.Rngs(1))
    with pytest.raises(
        ValueError,
        match=r"pattern for 'down'.*head/bias is trained, .*up/bias is trained beside",
    ):
        lnnx.export_adapter(tmp_path, model, {"up": "up"})
    grouped = lnnx.adapt(
        build("batchnorm"), LoRAConfig(targets=["conv"], rank=1), rngs=nnx.Rngs(1)
    )
    with pytest.raises(ValueError, match="conv, a grouped convolution, has no form in"):
        lnnx.export_adapter(tmp_path, grouped)
    model = lnnx.adapt(Mlp(), LoRAConfig(rank=2), rngs=nnx.Rngs(1))
    lnnx.export_adapter(tmp_path, model)
    with pytest.raises(
        ValueError, match=r"3 faults(.|\n)*: up is not (.|\n)*mean: mlp.up\?"
    ):
        lnnx.load_peft(tmp_path, Mlp(), {"down": "mlp.up", "up": "u", "head": "d"})


def draw(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def test_adapters_of_qwix_and_tunix_are_read():
    base, x = Projections(), X.reshape(1, 3, 6)
    tree = {
        "q_einsum": {"w_lora_a": draw(6, 2), "w_lora_b": draw(2, 3, 2)},
        # A linear layer's axes are flattened; one B is every expert's.
        "out": {"kernel_lora_a": draw(6, 2), "kernel_lora_b": draw(2, 5)},
        "each": {"w_lora_a": draw(2, 4, 3), "w_lora_b": draw(3, 3)},
    }
    model = lnnx.load_factors(tree, base, alpha=6)
    q, out, each = tree["q_einsum"], tree["out"], tree["each"]
    y = jnp.einsum("BTD,NDH->BTNH", x, base.q_einsum.w[...])
    y += 3 * jnp.einsum("BTD,Dr,rNH->BTNH", x, q["w_lora_a"], q["w_lora_b"])
    flat = y.reshape(1, 3, 6)
    y = base.out(y) + 3 * flat @ out["kernel_lora_a"] @ out["kernel_lora_b"]
    y = base.experts(y)
    update = jnp.einsum("BTEH,EHr,rD->BTED", y, each["w_lora_a"], each["w_lora_b"])
    assert_close(model(x), base.each(y) + 2 * update)
    merged = lnnx.merge(model)
    assert_close(merged(x), model(x))


@pytest.mark.parametrize(("tool", "alpha"), [("qwix_nnx", 6), ("gemma_peft", None)])
def test_what_another_tool_trained_computes_alike_and_goes_to_peft(
    tmp_path, tool, alpha
):
    """Made by tests/golden/make_*.py, with the versions in the files' metadata."""
    found = load_file(GOLDEN / f"{tool}.safetensors")
    trees = {name: {} for name in ("base", "lora")}
    for path, array in found.items():
        tree, _, leaf = path.partition("/")
        if tree == "base" and not leaf.startswith("out/"):
            leaf = leaf.replace("kernel", "w")  # of gemma's einsums
        if leaf:
            trees[tree][leaf] = jnp.asarray(array)
    base = Projections()
    graphdef, state = nnx.split(base)
    nnx.replace_by_pure_dict(state, unflatten(trees["base"]))
    base = nnx.merge(graphdef, state)
    model = lnnx.load_factors(unflatten(trees["lora"]), base, alpha=alpha)
    assert_close(model(jnp.asarray(found["x"])), found["y"])
    names = {"each": "mlp.experts.down_proj", r"(\w+)": r"attn.\1"}
    both_ways(tmp_path, base, model, names)


def test_trees_of_gemma_peft_are_read_and_exported(tmp_path):
    tree = {
        "q_einsum": {"lora": {"a": draw(6, 2), "b": draw(2, 3, 2)}},
        "out": {"lora": {"a": draw(3, 2, 4), "b": draw(4, 5)}},
    }
    model = lnnx.load_factors(tree, Projections())
    scalings = {t.path: t.scaling for t in lnnx.lora_targets(model)}
    assert scalings == {"q_einsum": 1, "out": 1}
    lnnx.export_adapter(tmp_path, model, {"q_einsum": "q_proj", "out": "o_proj"})
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    np.testing.assert_array_equal(
        tensors["base_model.model.o_proj.lora_A.weight"],
        tree["out"]["lora"]["a"].reshape(6, 4).T,
    )
    wrong = {"q_einsm": tree["out"], "x": 1, "q_einsum": tree["out"]}
    with pytest.raises(ValueError, match=r"3 faults(.|\n)*q_einsm(.|\n)*must be \(6"):
        lnnx.load_factors(wrong, Projections())
