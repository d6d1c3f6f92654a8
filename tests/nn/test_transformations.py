"""Modules under scan, remat, vmap, jit, gradients and eight devices."""

import functools
import os
import subprocess
import sys
import textwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import LoRAAttention, LoRAConfig, LoRADense, LoRAEinsum
from tests.nn.tools import (
    initialised,
    key,
    merged_attention,
    normal,
    shapes,
    tuned,
    variables_of,
)
from tests.reference import assert_close

CONFIG = LoRAConfig(rank=3, alpha=7.0)
ALL = LoRAConfig(rank=3, alpha=7.0, targets=".*")
DROPPING = LoRAConfig(rank=3, alpha=7.0, targets=".*", dropout_rate=0.5)
X = normal((3, 4, 8))
TOKENS = normal((2, 5, 12))
PROJECTIONS = ("query", "key", "value", "out")


def stack(remat, config=ALL):
    """Three layers (as many as ranks), each with an expert axis of three."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, deterministic):
            einsum = nn.remat(LoRAEinsum) if remat else LoRAEinsum
            y = einsum(
                *((3, 8, 8), "ebi,eio->ebo"),
                deterministic=deterministic,
                lora=config,
                name="experts",
            )(x)
            return x + jnp.tanh(y), None

    return nn.scan(
        Layer,
        variable_axes={"frozen": 0, "lora": 0, "params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=3,
    )()


def test_scan_and_remat_with_as_many_layers_as_ranks_and_experts():
    variables = jax.jit(stack(True, DROPPING).init, static_argnums=2)(key(0), X, True)
    adapter = variables["lora"]["experts"]
    assert shapes(adapter) == {"lora_a": (3, 3, 8, 3), "lora_b": (3, 3, 3, 8)}
    a = np.asarray(adapter["lora_a"]).reshape(9, -1)
    assert len(np.unique(a)) == a.size  # each layer and expert draws its own
    assert np.abs(a).max() <= 8**-0.5
    np.testing.assert_allclose(a.std(1) * 8**0.5, 3**-0.5, rtol=0.35)
    variables = tuned(variables)

    def gradients(remat):
        def loss(lora):
            model = stack(remat, DROPPING)
            y, _ = model.apply(
                {**variables, "lora": lora}, X, False, rngs={"dropout": key(1)}
            )
            return jnp.sum(y**2)

        return jax.jit(jax.value_and_grad(loss))(variables["lora"])

    jax.tree.map(assert_close, gradients(True), gradients(False))


def test_scanned_layers_are_the_loop_over_them():
    variables = tuned(jax.jit(stack(False).init, static_argnums=2)(key(0), X, True))
    got, _ = jax.jit(stack(False).apply, static_argnums=2)(variables, X, True)
    layer = LoRAEinsum((3, 8, 8), "ebi,eio->ebo", lora=ALL)
    apply = jax.jit(layer.apply)
    x = X
    for i in range(3):
        one = {c: slice_of(tree["experts"], i) for c, tree in variables.items()}
        x = x + jnp.tanh(apply(one, x))
    assert_close(got, x)
    assert apply._cache_size() == 1


def slice_of(tree, i):
    return jax.tree.map(lambda leaf: leaf[i], tree)


def test_vmapped_layers_have_adapters_of_their_own():
    vmapped = nn.vmap(
        LoRADense,
        variable_axes={"frozen": 0, "lora": 0},
        split_rngs={"params": True},
        axis_size=3,
    )(6, lora=ALL)
    x = normal((3, 2, 8))
    variables = tuned(jax.jit(vmapped.init)(key(0), x))
    assert shapes(variables["lora"]) == {"lora_a": (3, 8, 3), "lora_b": (3, 3, 6)}
    apply = jax.jit(LoRADense(6, lora=ALL).apply)
    loop = [apply(slice_of(variables, i), x[i]) for i in range(3)]
    assert_close(jax.jit(vmapped.apply)(variables, x), jnp.stack(loop))


def test_bfloat16_bases_keep_float32_adapters():
    layer = LoRADense(6, param_dtype=jnp.bfloat16, lora=ALL)
    x = X.astype(jnp.bfloat16)
    variables = jax.jit(layer.init)(key(0), x)
    dtypes = jax.tree.map(lambda leaf: str(leaf.dtype), variables)
    assert dtypes == {
        "frozen": {"kernel": "bfloat16", "bias": "bfloat16"},
        "lora": {"lora_a": "float32", "lora_b": "float32"},
    }
    assert layer.apply(variables, x).dtype == jnp.bfloat16
    assert layer.apply(variables, X).dtype == jnp.float32  # as nn.Dense promotes


def test_partitioning_metadata_passes_through():
    boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
    layer = LoRADense(6, kernel_init=boxed, lora=ALL)
    variables = jax.jit(layer.init)(key(0), X)
    assert variables["frozen"]["kernel"].names == (None, "model")
    plain = nn.meta.unbox(variables)
    assert np.array_equal(layer.apply(variables, X), layer.apply(plain, X))


SHARDED = """
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import NamedSharding, PartitionSpec as P
    from lora_jax import LoRAAttention, LoRAConfig, LoRADense
    import flax.linen as nn

    class Model(nn.Module):
        lora = LoRAConfig(rank=2, alpha=3.0)

        @nn.compact
        def __call__(self, x):
            y = x + LoRAAttention(4, is_causal=True, lora=self.lora, name="attn")(x)
            return LoRADense(16, lora=self.lora, name="up")(y)

    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 6, 16)), jnp.float32)
    variables = jax.jit(Model().init)(jax.random.key(0), x)
    variables["lora"] = jax.tree.map(lambda w: w + 0.1, variables["lora"])
    wanted = np.asarray(jax.jit(Model().apply)(variables, x))
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=auto)

    def put(tree, rule):
        return jax.tree_util.tree_map_with_path(
            lambda path, w: jax.device_put(w, NamedSharding(mesh, rule(path, w))), tree
        )

    def tensor_parallel(path, w):
        out = [k.key for k in path][-2:] == ["up", "kernel"]
        heads = path[-1].key in ("kernel", "lora_b") and w.ndim == 3
        return P(None, "model") if out or heads else P()

    assert jax.device_count() == 8
    for rule in (lambda path, w: P(), tensor_parallel):
        y = jax.jit(Model().apply)(put(variables, rule), put(x, lambda *_: P("data")))
        assert len(y.sharding.device_set) == 8
        np.testing.assert_allclose(np.asarray(y), wanted, rtol=0, atol=1e-5)
    print("equal")
"""


EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"


def test_eight_devices_compute_what_one_does():
    """Law 19: replicated and tensor-parallel weights, the batch over four devices."""
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SHARDED)],
        env={
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {EIGHT_DEVICES}",
            "PATH": "/usr/bin:/bin",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.stdout == "equal\n", run.stderr


# --- LoRAAttention


def test_attention_gradients_are_those_of_the_merged_attention():
    layer = LoRAAttention(6, num_kv_heads=2, is_causal=True, lora=CONFIG)
    plain = LoRAAttention(
        6, num_kv_heads=2, is_causal=True, lora=LoRAConfig(targets=["none"])
    )
    variables = variables_of(layer, TOKENS)

    def ours(lora):
        return jnp.sum(layer.apply({**variables, "lora": lora}, TOKENS) ** 2)

    def through_merge(lora):
        params = merged_attention({**variables, "lora": lora})
        return jnp.sum(plain.apply({"frozen": params}, TOKENS) ** 2)

    got = jax.jit(jax.grad(ours))(variables["lora"])
    jax.tree.map(assert_close, got, jax.jit(jax.grad(through_merge))(variables["lora"]))
    fresh = {**variables, "lora": initialised(layer, TOKENS.shape)["lora"]}
    first = jax.jit(jax.grad(ours))(fresh["lora"])
    assert all(not first[name]["lora_a"].any() for name in PROJECTIONS)
    assert all(first[name]["lora_b"].all() for name in PROJECTIONS)


class AttentionBlock(nn.Module):
    remat: bool = False
    config: LoRAConfig = CONFIG

    @nn.compact
    def __call__(self, x, deterministic):
        attention = nn.remat(LoRAAttention) if self.remat else LoRAAttention
        layer = attention(3, deterministic=deterministic, lora=self.config, name="attn")
        return x + layer(x), None


def attention_stack(remat: bool, config: LoRAConfig = CONFIG):
    """Three layers of three heads with rank 3: nothing may be told by its size."""
    scanned = nn.scan(
        AttentionBlock,
        variable_axes={"frozen": 0, "lora": 0, "params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=nn.broadcast,
        length=3,
    )
    return scanned(remat, config)


def test_scanned_attention_and_remat():
    variables = jax.jit(attention_stack(remat=True).init, static_argnums=2)(
        key(0), TOKENS, None
    )
    adapters = variables["lora"]["attn"]
    assert shapes(adapters["query"]) == {"lora_a": (3, 12, 3), "lora_b": (3, 3, 3, 4)}
    assert shapes(adapters["out"]) == {"lora_a": (3, 3, 4, 3), "lora_b": (3, 3, 12)}
    for name in PROJECTIONS:
        a = np.asarray(adapters[name]["lora_a"]).reshape(3, -1)
        assert len(np.unique(a)) == a.size  # every layer draws its own
        np.testing.assert_allclose(a.std(1) * 12**0.5, 3**-0.5, rtol=0.25)
    variables = tuned(variables)

    def loss(lora, remat):
        y, _ = attention_stack(remat).apply({**variables, "lora": lora}, TOKENS, None)
        return jnp.sum(y**2), y

    gradients = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    got, y = gradients(variables["lora"], True)
    wanted, same = gradients(variables["lora"], False)
    assert_close(y, same)
    jax.tree.map(assert_close, got, wanted)
    one = jax.jit(LoRAAttention(3, lora=CONFIG).apply)
    loop = TOKENS
    for i in range(3):
        layer = {name: slice_of(tree["attn"], i) for name, tree in variables.items()}
        loop = loop + one(layer, loop)
    assert_close(y, loop)


def test_attention_adapters_drop_the_same_under_remat_and_scan():
    config = LoRAConfig(rank=3, alpha=7.0, dropout_rate=0.5)
    variables = tuned(
        jax.jit(attention_stack(False, config).init, static_argnums=2)(
            key(0), TOKENS, True
        )
    )

    @functools.partial(jax.jit, static_argnums=1)
    def gradients(lora, remat):
        def loss(lora):
            y, _ = attention_stack(remat, config).apply(
                {**variables, "lora": lora}, TOKENS, False, rngs={"dropout": key(5)}
            )
            return jnp.sum(y**2)

        return jax.value_and_grad(loss)(lora)

    jax.tree.map(
        assert_close,
        gradients(variables["lora"], True),
        gradients(variables["lora"], False),
    )


def test_vmapped_adapters_are_a_loop_and_one_shape_compiles_once():
    layer = LoRAAttention(6, num_kv_heads=2, lora=CONFIG)
    adapters = [variables_of(layer, TOKENS)["lora"]]
    adapters.append(jax.tree.map(lambda w: 2 * w, adapters[0]))
    frozen = initialised(layer, TOKENS.shape)["frozen"]

    @jax.jit
    def apply(lora, x):
        return layer.apply({"frozen": frozen, "lora": lora}, x)

    loop = jnp.stack([apply(lora, TOKENS) for lora in adapters])
    assert apply._cache_size() == 1
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    assert_close(jax.vmap(apply, (0, None))(stacked, TOKENS), loop)


def test_vmapped_attention_has_adapters_of_its_own():
    vmapped = nn.vmap(
        LoRAAttention,
        variable_axes={"frozen": 0, "lora": 0},
        split_rngs={"params": True},
        axis_size=2,
    )(3, lora=CONFIG)
    variables = jax.jit(vmapped.init)(key(0), TOKENS)
    a = variables["lora"]["query"]["lora_a"]
    assert a.shape == (2, 12, 3)
    assert not np.allclose(a[0], a[1])
