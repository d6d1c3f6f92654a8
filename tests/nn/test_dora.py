"""DoRA in modules: LoRA layers against NumPy, `adapt` on external models."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax import LoRAAttention, LoRAConfig, LoRADense, LoRAEmbed, adapt, count
from lora_jax.tree.paths import flatten
from tests import reference
from tests.nn.external_models import MODELS, External, assert_same_tree, trained
from tests.nn.test_module_laws import MODULE_CASES
from tests.nn.tools import initialised, key, normal

ALPHA, RANK = 7.0, 3
CASES: dict[str, External] = {case.name: case for case in MODELS}
FOREIGN = ("scanned_axis_1", "encoder_decoder", "odds")
foreign = pytest.mark.parametrize("name", FOREIGN)


def config(**fields) -> LoRAConfig:
    fields = {"rank": RANK, "alpha": ALPHA, "targets": ".*", "dora": True, **fields}
    return LoRAConfig(**fields)


def adapted_of(name: str, **fields):
    case = CASES[name]
    return adapt(case.model, case.config(dora=True, **fields), *case.args)


@functools.cache
def attached(name: str):
    return adapted_of(name).attach(CASES[name].variables()["params"], key(1))


# --- LoRA layers

LORA_LAYERS = {  # LoRA layer, arguments, input shape, einsum of A and B, input axes
    "dense": ("Dense", (8,), {}, (2, 5, 10), "ir,ro->io", (0,)),
    "heads_in": ("DenseGeneral", ((3, 5),), {}, (2, 4, 10), "dr,rnh->dnh", (0,)),
    "heads_out": (
        *("DenseGeneral", (10,), {"axis": (-2, -1)}, (2, 4, 3, 5)),
        *("nhr,rd->nhd", (0, 1)),
    ),
    "batch_dims": (
        *("DenseGeneral", (5,), {"batch_dims": (0,)}, (3, 4, 7)),
        *("eir,ero->eio", (1,)),
    ),
    "einsum": (
        *("Einsum", ((5, 3, 7), "bei,oei->boe"), {}, (4, 3, 7)),
        *("eir,ero->oei", (2,)),
    ),
    "conv": ("Conv", (6, (3, 2)), {}, (2, 6, 5, 4), "xyir,ro->xyio", (0, 1, 2)),
    "groups": (
        *("Conv", (10, (3,)), {"feature_group_count": 2}, (2, 6, 4)),
        *("gxir,gro->xigo", (0, 1)),
    ),
}


@pytest.mark.parametrize("name", LORA_LAYERS)
def test_a_lora_layer_equals_its_layer_with_the_merged_kernel(name):
    kind, args, kwargs, shape, factors, inputs = LORA_LAYERS[name]
    layer = getattr(lora_jax, f"LoRA{kind}")(*args, **kwargs, lora=config())
    linen = getattr(nn, kind)(*args, **kwargs)
    x = normal(shape)
    made = initialised(layer, shape)
    apply, base = jax.jit(layer.apply), jax.jit(linen.apply)
    # Close, not equal: kernel and norms were computed in one program, fused.
    reference.assert_close(apply(made, x), base({"params": made["frozen"]}, x))
    variables = trained(made)
    frozen, (a, b, m) = made["frozen"], variables["lora"].values()
    m = m.T if name == "einsum" else m  # [e, o] to the kernel's order
    merged = reference.dora_merge(
        frozen["kernel"], a, b, m, ALPHA / RANK, factors, inputs
    )
    bias = 3 * normal(frozen["bias"].shape)
    got = apply({**variables, "frozen": {**frozen, "bias": bias}}, x)
    plain = {"kernel": jnp.asarray(merged, "float32"), "bias": bias}
    reference.assert_close(got, base({"params": plain}, x))


@pytest.mark.parametrize("method", ["__call__", "attend"])
def test_an_embedding_scales_columns_for_lookups_and_for_a_tied_head(method):
    layer = LoRAEmbed(11, 5, lora=config())
    variables = trained(initialised_embed := layer.init(key(0), jnp.arange(3)))
    x = normal((4, 5)) if method == "attend" else jnp.array([3, 0, 10])
    table, (a, b, m) = variables["frozen"]["embedding"], variables["lora"].values()
    assert m.shape == (5,)
    merged = reference.dora_merge(table, a, b, m, ALPHA / RANK)
    wanted = np.asarray(x) @ merged.T if method == "attend" else merged[np.asarray(x)]
    reference.assert_close(layer.apply(variables, x, method=method), wanted)
    base = nn.Embed(11, 5)
    plain = {"params": initialised_embed["frozen"]}
    got = jax.jit(functools.partial(layer.apply, method=method))(initialised_embed, x)
    wanted = jax.jit(functools.partial(base.apply, method=method))(plain, x)
    np.testing.assert_array_equal(got, wanted)


def test_attention_scales_each_projection():
    fields = {"num_heads": 4, "qkv_features": 8}
    layer = LoRAAttention(**fields, lora=config(targets=["query", "value", "out"]))
    base = nn.MultiHeadDotProductAttention(**fields)
    x = normal((2, 5, 8))
    made = initialised(layer, x.shape)
    assert made["lora"]["query"]["magnitude"].shape == (4, 2)
    variables = trained(made)
    frozen = variables["frozen"]
    variables["frozen"] = jax.tree.map(lambda w: w + 0.1 * normal(w.shape), frozen)
    foreign = adapt(base, config(targets=["query", "value", "out"]), x)
    wanted = foreign.apply(variables, x)
    reference.assert_close(jax.jit(layer.apply)(variables, x), wanted)
    merged = {"params": foreign.merge(variables)}
    reference.assert_close(base.apply(merged, x), wanted)


def test_a_lora_layer_works_under_scan_and_remat():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + LoRADense(6, lora=config(), name="up")(x), None

    def stack(block):
        scan = nn.scan(
            block,
            variable_axes={"frozen": 0, "lora": 0},
            split_rngs={"params": True},
            length=RANK,
        )
        return scan()

    x = normal((2, 6))
    made = stack(Block).init(key(0), x, None)
    lora = made["lora"]["up"]
    assert lora["magnitude"].shape == (RANK, 6)
    wanted = np.linalg.norm(made["frozen"]["up"]["kernel"], axis=1)
    reference.assert_close(lora["magnitude"], wanted)
    variables = trained(made)

    def gradient(block):
        def loss(lora):
            y, _ = stack(block).apply({**variables, "lora": lora}, x, None)
            return jnp.sum(y**2)

        return jax.jit(jax.grad(loss))(variables["lora"])

    got, wanted = gradient(nn.remat(Block)), gradient(Block)
    jax.tree.map(reference.assert_close, got, wanted)
    assert all(np.any(leaf) for leaf in jax.tree.leaves(got))


def test_plain_lora_compiles_to_a_program_without_dora():
    """Its jaxpr has nothing of DoRA: no norm, no barrier, no checkpoint."""
    for case in MODULE_CASES:
        arrays = case.init(key(0))
        text = str(jax.make_jaxpr(lambda a, c=case: c.apply(*a, ALPHA / RANK))(arrays))
        assert not [word for word in ("sqrt", "remat", "barrier") if word in text]


@pytest.mark.parametrize("dora", [True, False])
def test_a_lora_layer_rejects_an_adapter_of_the_other_kind(dora):
    x = normal((2, 6))
    layer, other = (LoRADense(4, lora=config(dora=d)) for d in (dora, not dora))
    variables = other.init(key(0), x)
    message = "must have 'magnitude'; got none" if dora else "config has dora=False"
    with pytest.raises(ValueError, match=message):
        layer.apply(variables, x)


def test_a_lora_layer_rejects_a_magnitude_of_the_wrong_shape():
    x, layer = normal((2, 6)), LoRADense(4, lora=config())
    variables = layer.init(key(0), x)
    variables["lora"]["magnitude"] = jnp.ones(6)
    with pytest.raises(ValueError, match=r"magnitude must be \(4,\); got \(6,\)"):
        layer.apply(variables, x)


# --- adapt


@foreign
def test_an_external_model_is_unchanged_at_init_and_merges_exactly(name):
    case, adapted, start = CASES[name], adapted_of(name), attached(name)
    params = case.variables()["params"]
    run, base = jax.jit(adapted.apply), jax.jit(case.model.apply)
    np.testing.assert_array_equal(
        run(start, *case.args), base({"params": params}, *case.args)
    )
    moved = trained(start)
    got = run(moved, *case.args)
    assert not np.allclose(got, base({"params": params}, *case.args), atol=1e-2)
    merged = adapted.merge(moved)
    reference.assert_close(base({"params": merged}, *case.args), got)
    back = adapted.unmerge(merged, moved)
    assert_same_tree(back, adapted.detach(start))
    assert all(0 < row.relative < 1e-5 for row in adapted.merge_errors(moved))


@foreign
def test_the_table_of_targets_has_the_shapes_of_the_tree(name):
    case, adapted = CASES[name], adapted_of(name)
    flat = {path: leaf.shape for path, leaf in flatten(attached(name)["lora"]).items()}
    wanted = {
        f"{row.path}/{leaf}": shape
        for row in adapted.targets()
        for leaf, shape in row.leaf_shapes.items()
    }
    assert flat == wanted
    assert count(attached(name)["lora"]) == sum(
        row.trainable for row in adapted.targets()
    )
    made = jax.eval_shape(lambda k: adapted.init(k, *case.args), key(0))
    assert {p: leaf.shape for p, leaf in flatten(made["lora"]).items()} == wanted


def test_a_bfloat16_base_is_preserved_and_unchanged_at_init():
    case, adapted = CASES["scanned_axis_1"], adapted_of("scanned_axis_1")
    half = jax.tree.map(lambda w: w.astype("bfloat16"), case.variables()["params"])
    variables = adapted.attach(half, key(1))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["lora"])} == {
        jnp.dtype("float32")
    }
    got = jax.jit(adapted.apply)(variables, *case.args)
    wanted = jax.jit(case.model.apply)({"params": half}, *case.args)
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(got, wanted)


def test_training_moves_a_b_and_m_and_leaves_the_base_bit_identical():
    case, adapted = CASES["scanned_axis_1"], adapted_of("scanned_axis_1")
    start = attached("scanned_axis_1")
    kept = jax.tree.map(np.array, start["frozen"])
    tx = optax.adam(1e-2)

    def loss(lora, frozen):
        y = adapted.apply({"frozen": frozen, "lora": lora}, *case.args)
        return jnp.square(y - 1).mean()

    @jax.jit
    def step(lora, state, frozen):
        value, grads = jax.value_and_grad(loss)(lora, frozen)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(lora, updates), state, value

    lora, state = start["lora"], tx.init(start["lora"])
    values = []
    for _ in range(4):
        lora, state, value = step(lora, state, start["frozen"])
        values.append(float(value))
    assert values == sorted(values, reverse=True)
    assert step._cache_size() == 1
    for path, leaf in flatten(lora).items():
        assert not np.array_equal(leaf, flatten(start["lora"])[path]), path
    assert_same_tree(start["frozen"], kept)


def test_adapt_rejects_an_unexpected_or_missing_magnitude():
    case = CASES["boxed"]
    start = attached("boxed")
    plain = adapt(case.model, case.config(), *case.args)
    message = r"must have 'up/magnitude' if and only if .* got dora=False"
    with pytest.raises(ValueError, match=message):
        plain.apply(start, *case.args)
    with pytest.raises(ValueError, match=r"if and only if .* got dora=True"):
        adapted_of("boxed").apply(
            plain.attach(case.variables()["params"], key(1)), *case.args
        )
    with pytest.raises(ValueError, match="up/magnitude has no target"):
        plain.merge(start)
