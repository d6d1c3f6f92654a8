"""The modules a composer writes with, and what holds for each kind of layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

import lora_jax.nnx as lnnx
from lora_jax import LoRAConfig
from tests.nnx.models import train_a_little
from tests.reference import assert_close

CONFIG = LoRAConfig(rank=2, alpha=6)
X = jnp.asarray(np.random.default_rng(1).standard_normal((2, 5, 6)), jnp.float32)
IDS = jnp.array([[0, 3, 3], [6, 1, 0]])
LAYERS = {
    "linear": (lnnx.LoRALinear, nnx.Linear, (6, 5), X),
    "general": (lnnx.LoRALinearGeneral, nnx.LinearGeneral, (6, (2, 3)), X),
    "einsum": (lnnx.LoRAEinsum, nnx.Einsum, ("tbi,bio->tbo", (5, 6, 4), (5, 4)), X),
    "embed": (lnnx.LoRAEmbed, nnx.Embed, (7, 4), IDS),
    "conv": (lnnx.LoRAConv, nnx.Conv, (6, 4, (3,)), X),
}


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_starts_as_its_base_and_merges_into_it(kind, dora):
    cls, base, args, x = LAYERS[kind]
    config = LoRAConfig(rank=2, alpha=6, dora=dora)
    layer = cls(*args, lora=config, rngs=nnx.Rngs(0))
    plain = base(*args, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(layer(x), plain(x))
    trained = train_a_little(layer)
    merged = lnnx.merge(trained)
    assert type(merged) is base
    assert np.abs(trained(x) - layer(x)).max() > 1e-2
    assert_close(merged(x), trained(x))
    assert hasattr(layer, "magnitude") == dora
    if kind == "embed":
        query = jnp.ones((2, 4))
        np.testing.assert_array_equal(layer.attend(query), plain.attend(query))
        assert_close(merged.attend(query), trained.attend(query))


def test_a_layer_looks_itself_up_by_its_path():
    config = LoRAConfig(rank=2, targets=["up"], rank_pattern={"mlp/up": 3})

    def make(path):
        return lnnx.LoRALinear(6, 5, lora=config, path=path, rngs=nnx.Rngs(0))

    assert make("").lora_a.shape == (6, 2)
    assert make("mlp/up").lora_a.shape == (6, 3)
    plain = make("mlp/down")
    assert plain.lora is None
    assert not hasattr(plain, "lora_a")
    np.testing.assert_array_equal(plain(X), make("")(X))
    with pytest.raises(TypeError, match="config must be a LoRAConfig; got int"):
        lnnx.LoRALinear(6, 5, lora=3, rngs=nnx.Rngs(0))  # pyright: ignore[reportArgumentType] - on purpose


def test_attention_adapts_its_projections(tmp_path):
    config = LoRAConfig(rank=2, alpha=6, targets=["query", "out"], dropout_rate=0.5)

    def make():
        kinds = {"decode": False, "rngs": nnx.Rngs(0)}
        return lnnx.LoRAAttention(2, 6, lora=config, **kinds)

    layer = make()
    plain = nnx.MultiHeadAttention(2, 6, decode=False, rngs=nnx.Rngs(0))
    paths = [(t.path, t.leaf_shapes) for t in lnnx.lora_targets(layer)]
    assert paths == [
        ("out", {"lora_a": (2, 3, 2), "lora_b": (2, 6)}),
        ("query", {"lora_a": (6, 2), "lora_b": (2, 2, 3)}),
    ]
    np.testing.assert_array_equal(layer(X), plain(X))
    trained = train_a_little(layer)
    assert np.abs(trained(X) - trained(X)).max() > 0
    trained.eval()
    assert_close(lnnx.merge(trained)(X), trained(X))
    lnnx.save_adapter(tmp_path, trained)
    loaded = lnnx.load_adapter(tmp_path, make())
    loaded.eval()
    np.testing.assert_array_equal(loaded(X), trained(X))
    other = lnnx.LoRAAttention(2, 6, lora=CONFIG, decode=False, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="must have one config"):
        lnnx.load_adapter(tmp_path, other)


def test_projections_of_one_input_share_a_product_and_a_mask():
    kinds = {"lora": LoRAConfig(rank=2, alpha=6, dora=True), "decode": False}
    layer = lnnx.LoRAAttention(2, 6, rngs=nnx.Rngs(0), **kinds)
    layer = train_a_little(layer)
    graphdef, state = nnx.split(layer)

    @jax.jit
    def together(state, *inputs):
        return nnx.merge(graphdef, state, copy=True)(*inputs)

    @jax.jit
    def apart(state, *inputs):
        copy = nnx.merge(graphdef, state, copy=True)
        return nnx.MultiHeadAttention.__call__(copy, *inputs)

    def products(run, inputs):
        return str(run.trace(state, *inputs).jaxpr).count("dot_general[")

    for fewer, inputs in ((2, (X,)), (1, (X, X + 1)), (0, (X, X + 1, X + 2))):
        assert products(together, inputs) == products(apart, inputs) - fewer
        assert_close(together(state, *inputs), apart(state, *inputs))
    assert_close(lnnx.merge(layer)(X), layer(X))


def test_one_mask_drops_the_input_of_all_projections():
    targets = ["query", "key", "value"]
    config = LoRAConfig(rank=2, alpha=6, targets=targets, dropout_rate=0.5)
    layer = lnnx.LoRAAttention(2, 6, lora=config, decode=False, rngs=nnx.Rngs(0))
    layer = train_a_little(layer)
    for name in targets[1:]:
        for leaf in ("kernel", "lora_a", "lora_b"):
            source = getattr(layer.query, leaf)[...]
            getattr(getattr(layer, name), leaf).set_value(source)
    seen = []
    layer.attention_fn = lambda *heads, **_: seen.extend(heads) or heads[2]
    layer(X)
    np.testing.assert_array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[0], seen[2])
    layer.query.lora_rngs()
    layer(X)
    assert np.abs(seen[0] - seen[3]).max() > 0


def test_layers_made_by_vmap_have_an_adapter_each():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def make(rngs):
        return lnnx.LoRALinear(6, 6, lora=CONFIG, rngs=rngs)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    @nnx.remat
    def run(x, layer):
        return nnx.gelu(layer(x))

    stack = make(nnx.Rngs(0))
    assert stack.lora_a.shape == (3, 6, 2)
    assert np.abs(stack.lora_a[0] - stack.lora_a[1]).max() > 0.1
    trained = train_a_little(stack)
    assert_close(run(X, lnnx.merge(trained)), run(X, trained))


def test_an_adapter_is_placed_and_named_as_its_kernel():
    auto = (AxisType.Auto,) * 2
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=auto)
    sharded = {"kernel_metadata": {"out_sharding": ("data", "model"), "mesh": mesh}}
    with jax.set_mesh(mesh):
        layer = nnx.Linear(6, 4, rngs=nnx.Rngs(0), **sharded)
    config = LoRAConfig(rank=2, targets=".*", dora=True)
    adapted = lnnx.adapt(layer, config, rngs=nnx.Rngs(1))
    names = {"lora_a": ("data", None), "lora_b": (None, "model")}
    for name, axes in {**names, "magnitude": ("model",)}.items():
        leaf = getattr(adapted, name)
        assert leaf.get_metadata()["out_sharding"] == axes
        assert leaf[...].sharding.spec == PartitionSpec(*axes)
    with jax.set_mesh(mesh):
        np.testing.assert_array_equal(adapted(X), layer(X))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_a_mesh_of_explicit_axes_computes_and_differentiates_alike(dora):
    config = LoRAConfig(rank=2, alpha=6, targets=".*", dora=dora)
    plain = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    wanted = train_a_little(lnnx.adapt(plain, config, rngs=nnx.Rngs(1)))
    explicit = (AxisType.Explicit,) * 2
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=explicit)
    place = PartitionSpec(None, None, "model")
    with jax.set_mesh(mesh):
        names = {"kernel": ("data", "model"), "bias": ("model",)}
        metadata = {f"{n}_metadata": {"out_sharding": s} for n, s in names.items()}
        layer = nnx.Linear(6, 4, rngs=nnx.Rngs(0), **metadata)
        got = lnnx.adapt(layer, config, rngs=nnx.Rngs(1))
        for name, leaf in nnx.to_flat_state(nnx.state(wanted, lnnx.Trained)):
            own = getattr(got, name[0])
            own.set_value(jax.device_put(leaf[...], own[...].sharding))

        def gradient(model, **options):
            def loss(model):
                return jnp.sum(jnp.square(model(X, **options)))

            return nnx.grad(loss, argnums=nnx.DiffState(0, lnnx.Trained))(model)

        grads = nnx.jit(lambda model: gradient(model, out_sharding=place))(got)
        y = got(X, out_sharding=place)
        assert jax.typeof(y).sharding.spec == place
        merged = lnnx.merge(got)
        kernel = PartitionSpec(*names["kernel"])
        assert jax.typeof(merged.kernel[...]).sharding.spec == kernel
    assert_close(y, wanted(X))
    assert_close(merged.kernel[...], lnnx.merge(wanted).kernel[...])
    expected = nnx.to_pure_dict(gradient(wanted))
    jax.tree.map(assert_close, nnx.to_pure_dict(grads), expected)


def test_a_call_by_keyword_or_another_equation_is_adapted():
    layer = train_a_little(
        lnnx.LoRAEinsum("bti,io->bto", (6, 4), lora=CONFIG, rngs=nnx.Rngs(0))
    )
    y = layer(inputs=X)
    np.testing.assert_array_equal(layer(X, einsum_str="...i,io->...o"), y)
