import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax.config import LoRAConfig
from lora_jax.interop.pretrained import load_model
from lora_jax.models.load import param_shapes
from lora_jax.models.source import open_source
from lora_jax.nn.adapt import adapt
from lora_jax.parallel.mesh import make_mesh
from lora_jax.parallel.rules import (
    adapter_shardings,
    check_patterns,
    fit_spec,
    make_sharding,
    partitioned_rules,
    resolve_shardings,
    shard_variables,
)
from lora_jax.tree.paths import flatten
from tests.models.golden import GOLDEN

MODELS = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
P = PartitionSpec


class Eight:
    """The sizes of a mesh of 2 x 1 x 4 devices: the suite has one."""

    shape = {"data": 2, "fsdp": 1, "tensor": 4}  # noqa: RUF012 - never changed


WHOLE = ("patch", "classifier", "router", "beta", "decay")  # few outputs


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_of_every_family_has_a_rule(name):
    source = open_source(GOLDEN / name)
    module = source.family.module(source.family.read_config(source.settings))
    shapes = param_shapes(source.family, module)
    found = resolve_shardings(shapes, make_sharding(make_mesh()))
    for path, shape in shapes.items():
        spec, leaf = found[path].spec, path.split("/")
        assert len(spec) == len(shape)
        if leaf[-1] == "kernel" and leaf[-2] not in WHOLE and 1 not in shape[1:]:
            assert {"fsdp", "tensor"} == set(spec[-2:]), leaf


def test_the_layer_axis_of_a_scan_is_never_sharded():
    sharding = make_sharding(make_mesh(), [("down/kernel", P("data"))])
    assert sharding("layers/mlp/down/kernel", (2, 3, 4)).spec == P(None, "data", None)
    assert sharding("layer_0/mlp/down/kernel", (3, 4)).spec == P("data", None)


def test_user_rules_take_precedence():
    sharding = make_sharding(make_mesh(), [("mlp/up/kernel", P(None, "fsdp"))])
    assert sharding("layer_0/mlp/up/kernel", (3, 4)).spec == P(None, "fsdp")
    assert sharding("layer_0/mlp/gate/kernel", (3, 4)).spec == P("fsdp", "tensor")
    # A pattern is whole parts of a path: "up" is not the end of "gate_up".
    assert sharding("mlp/gate_up/kernel", (3, 4)).spec == P("fsdp", "tensor")


def test_every_weight_that_cannot_be_sharded_is_listed():
    sharding = make_sharding(make_mesh(), [("b", P("data", None))])
    assert sharding("layers/b", (2, 3)).spec == P("data", None)  # names every axis
    shapes = {"a/scale": (3,), "x/b": (3,), "norm/scale": (3,), "c": (2, 2)}
    with pytest.raises(ValueError, match="3 of 4 weights can't be sharded") as error:
        resolve_shardings(shapes, sharding)
    message = str(error.value)
    assert "a/scale (3,): no rule matches it; add ('scale', PartitionSpec())" in message
    assert f"x/b (3,): its rule {P('data', None)} has 1 more axes" in message
    assert "uneven='replicate'" in message
    assert "norm/scale" not in message


def test_indivisible_axes_suggest_valid_sizes():
    entries = ("tensor", ("data", "tensor"))
    with pytest.raises(ValueError, match="axis 0, 6, must be div") as error:
        fit_spec("w", (6, 12), entries, Eight(), "error")  # pyright: ignore[reportArgumentType] - sizes alone
    assert str(error.value) == (
        "w (6, 12): axis 0, 6, must be divisible by tensor = 4; 3 or 6 would work; "
        "axis 1, 12, must be divisible by data x tensor = 8; 6 or 12 would work"
    )
    spec = fit_spec("w", (6, 16), entries, Eight(), "replicate")  # pyright: ignore[reportArgumentType] - sizes alone
    assert spec == P(None, ("data", "tensor"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"uneven": "pad"}, "uneven must be 'error' or 'replicate'; got 'pad'"),
        (
            {"rules": [("up/kernel", P("model"))]},
            r"axes of the mesh, data, fsdp, tensor; got 'up/kernel' names 'model'\.",
        ),
    ],
    ids=["uneven", "axis"],
)
def test_bad_arguments_are_rejected(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_sharding(make_mesh(), **arguments)


def test_a_pattern_without_a_match_names_the_nearest():
    with pytest.raises(
        ValueError,
        match=r"'mpl/up/kernel' matches 0 of 2 weights\. Did you mean: mlp/up",
    ):
        check_patterns([("mpl/up/kernel", P())], ["mlp/up/kernel", "norm/scale"])
    check_patterns([("up/kernel", P())], ["mlp/up/kernel"])


def test_a_model_is_loaded_into_shards_with_matching_adapters():
    sharding = make_sharding(make_mesh(), [("norm/scale", P("data"))])
    lora = LoRAConfig(rank=2, alpha=3, targets=["query", "down"])
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="'norm/scale' matches 0 of"):
        load_model(GOLDEN / "llama", lora=lora, key=key, sharding=sharding)
    sharding = make_sharding(make_mesh(), [("final_norm/scale", P("data"))])
    loaded = load_model(GOLDEN / "llama", lora=lora, key=key, sharding=sharding)
    specs = {p: leaf.sharding.spec for p, leaf in flatten(loaded.variables).items()}
    layer = "layer_0/attention/query"
    assert specs["frozen/final_norm/scale"] == P("data")
    assert specs[f"frozen/{layer}/kernel"] == P("fsdp", "tensor")
    assert specs[f"lora/{layer}/lora_a"] == P("fsdp", None)
    assert specs[f"lora/{layer}/lora_b"] == P(None, "tensor")
    assert specs["lora/layer_0/mlp/down/lora_a"] == P("tensor", None)


def test_a_models_own_partitioning_is_used():
    ones = nn.initializers.ones
    init = nn.with_partitioning(ones, (None, "fsdp", "data"))
    module = nn.Sequential([nn.DenseGeneral((2, 4), kernel_init=init), nn.LayerNorm()])
    boxed = module.init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    adapted = adapt(module, LoRAConfig(rank=1, targets=".*0"), jnp.ones((1, 3)))
    variables = adapted.attach(boxed, jax.random.key(1))
    sharding = make_sharding(make_mesh(), partitioned_rules(boxed))
    placed = shard_variables(variables, sharding, adapted.targets(boxed))
    assert {
        path: leaf.sharding.spec
        for path, leaf in flatten(placed).items()
        if "bias" not in path
    } == {
        "frozen/layers_0/kernel": P(None, "fsdp", "data"),
        "frozen/layers_1/scale": P(None),
        "lora/layers_0/lora_a": P(None, None),
        "lora/layers_0/lora_b": P(None, "fsdp", "data"),
    }


class Layers(nn.Module):
    @nn.compact
    def __call__(self, ids, image):
        x = nn.Embed(6, 4, name="embed")(ids)
        x = nn.DenseGeneral((2, 3), name="heads")(x)
        x = nn.DenseGeneral(5, axis=(-2, -1), name="back")(x)
        return x, nn.Conv(4, (3, 3), feature_group_count=2, name="conv")(image)


def test_adapter_shardings_follow_axis_roles():
    inputs = (jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 4, 4, 2)))
    module = Layers()
    params = module.init(jax.random.key(0), *inputs)["params"]
    lora = LoRAConfig(rank=2, alpha=4, targets=".*", dora=True)
    adapted = adapt(module, lora, *inputs)
    variables = adapted.attach(params, jax.random.key(1))
    specs = {
        "embed/embedding": P("tensor", "fsdp"),
        "heads/kernel": P("fsdp", "tensor", None),
        "back/kernel": P("tensor", "data", "fsdp"),
        "conv/kernel": P(None, "data", "fsdp", "tensor"),
    }
    mesh = make_mesh()
    base = {path: NamedSharding(mesh, spec) for path, spec in specs.items()}
    targets = adapted.targets(params)
    found = adapter_shardings(base, targets)
    assert {path: sharding.spec for path, sharding in found.items()} == {
        "embed/lora_a": P("tensor", None),
        "embed/lora_b": P(None, "fsdp"),
        "embed/magnitude": P("fsdp"),
        "heads/lora_a": P("fsdp", None),
        "heads/lora_b": P(None, "tensor", None),
        "heads/magnitude": P("tensor", None),
        "back/lora_a": P("tensor", "data", None),
        "back/lora_b": P(None, "fsdp"),
        "back/magnitude": P("fsdp"),
        "conv/lora_a": P(None, None, "data", "fsdp", None),
        "conv/lora_b": P(None, None, None),
        "conv/magnitude": P(None),
    }
    rules = [*specs.items(), ("(heads|back|conv)/bias", P())]
    placed = shard_variables(variables, make_sharding(mesh, rules), targets)
    assert jax.tree.structure(placed) == jax.tree.structure(variables)
    for name, leaf in jax.tree_util.tree_leaves_with_path(placed):
        assert len(leaf.sharding.spec) <= leaf.ndim, name
    np.testing.assert_array_equal(
        placed["lora"]["heads"]["lora_a"], variables["lora"]["heads"]["lora_a"]
    )
    with pytest.raises(
        ValueError, match="targets must include every adapter; back/lora_a"
    ):
        shard_variables(variables, make_sharding(mesh, rules), targets[:1])
