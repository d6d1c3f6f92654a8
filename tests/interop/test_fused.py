"""Adapters of split projections on a fused base, and the reverse: the same update."""

import numpy as np
import pytest

from lora_jax.interop.external import ExternalAdapter, ExternalFactors
from lora_jax.interop.fused import fuse_factors, split_factors
from lora_jax.interop.peft import write_peft
from lora_jax.interop.pretrained import load_model
from tests.models.golden import GOLDEN

LAYER = "model.layers.1"


def factors(out, inputs, *, rank=2, alpha=3.0, rslora=False, seed=0):
    rng = np.random.default_rng(seed)
    a, b = (
        rng.standard_normal(s).astype(np.float32) for s in ((rank, inputs), (out, rank))
    )
    return ExternalFactors(a, b, alpha / (rank**0.5 if rslora else rank), alpha)


def delta(part):
    return part.scaling * (part.b @ part.a)


def put(tmp_path, family, modules, *, rslora=False):
    targets = sorted({name.rpartition(".")[2] for name in modules})
    adapter = ExternalAdapter(modules, {}, {}, {}, rslora=rslora)
    write_peft(tmp_path / "a", adapter, {"target_modules": targets})
    model = load_model(GOLDEN / family, adapter=tmp_path / "a")
    layer = model.module.merge(model.variables)["layer_1"]
    base = load_model(GOLDEN / family).params["layer_1"]
    return model, lambda *path: np.asarray(at(layer, path) - at(base, path)).T


def at(tree, path):
    for name in path:
        tree = tree[name]
    return tree["kernel"]


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
def test_split_adapters_on_a_fused_base(rslora, tmp_path):
    modules = {
        f"{LAYER}.self_attn.q_proj": factors(24, 24, rslora=rslora),
        f"{LAYER}.self_attn.v_proj": factors(12, 24, rank=1, rslora=rslora, seed=1),
        f"{LAYER}.mlp.gate_proj": factors(28, 24, alpha=5.0, rslora=rslora, seed=2),
        f"{LAYER}.mlp.up_proj": factors(28, 24, alpha=5.0, rslora=rslora, seed=3),
    }
    for name in modules:  # the other layer silent, for the targets name it too
        other = name.replace("layers.1", "layers.0")
        modules = {**modules, other: modules[name]._replace(b=0 * modules[name].b)}
    model, change = put(tmp_path, "phi3", modules, rslora=rslora)
    ranks = {row.path: row.rank for row in model.module.targets()}
    assert ranks["layer_1/attention/qkv"] == 3
    assert ranks["layer_1/mlp/gate_up"] == 4
    q, v, gate, up = (delta(modules[name]) for name in list(modules)[:4])
    wanted = np.concatenate([q, np.zeros((12, 24)), v])
    np.testing.assert_allclose(change("attention", "qkv"), wanted, atol=2e-6)
    np.testing.assert_allclose(
        change("mlp", "gate_up"), np.concatenate([gate, up]), atol=4e-6
    )


def test_a_fused_adapter_on_a_split_base(tmp_path):
    modules = {
        f"model.layers.{i}.{name}": factors(out, 20, seed=i)
        for i in range(2)
        for name, out in (("self_attn.qkv_proj", 48), ("mlp.gate_up_proj", 56))
    }
    model, change = put(tmp_path, "llama", modules)
    assert {row.rank for row in model.module.targets()} == {2}
    qkv = delta(modules[f"{LAYER}.self_attn.qkv_proj"])
    for name, rows in (("query", (0, 24)), ("key", (24, 36)), ("value", (36, 48))):
        wanted = qkv[slice(*rows)]
        np.testing.assert_allclose(change("attention", name), wanted, atol=2e-6)
    gate_up = delta(modules[f"{LAYER}.mlp.gate_up_proj"])
    np.testing.assert_allclose(change("mlp", "up"), gate_up[28:], atol=2e-6)


def test_splitting_what_was_fused_gives_the_same_updates_and_magnitudes():
    sizes = (4, 2)
    parts = [factors(size, 3, seed=size) for size in sizes]
    parts = [p._replace(magnitude=np.arange(len(p.b), dtype=np.float32)) for p in parts]
    again = split_factors(fuse_factors(parts, sizes, rslora=False), sizes)
    for part, other in zip(parts, again, strict=True):
        np.testing.assert_allclose(delta(part), delta(other), rtol=1e-6)
        np.testing.assert_array_equal(part.magnitude, other.magnitude)


def test_what_can_not_be_fused_is_an_error():
    part = factors(4, 3)._replace(magnitude=np.ones(4, np.float32))
    with pytest.raises(ValueError, match="with DoRA every part must have an adapter"):
        fuse_factors([part, None], (4, 2), rslora=False)
    with pytest.raises(ValueError, match=r"B must be \[5, r\]; got \[4, 2\]"):
        fuse_factors([factors(4, 3)], (5,), rslora=False)
    with pytest.raises(
        ValueError, match=r"B must be \[5, r\] to be split into \[3, 2\]"
    ):
        split_factors(factors(4, 3), (3, 2))


def test_a_wrong_size_is_named_with_its_module(tmp_path):
    modules = {
        f"model.layers.{i}.self_attn.q_proj": factors(23, 24, seed=i) for i in range(2)
    }
    with pytest.raises(
        ValueError, match=r"layer_0/attention/qkv: .* \[24, r\]; got \[23"
    ):
        put(tmp_path, "phi3", modules)
