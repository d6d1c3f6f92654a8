"""Tracing models: stacked axes, inferred inputs, kinds of examples."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import LoRAConfig, adapt, find_targets, register_layer
from lora_jax.nn import layer_rules, trace
from lora_jax.nn.trace import Example, shapes_of, trace_model
from tests.nn.external_models import MODELS
from tests.nn.external_modules import ViT, ViTBlock
from tests.nn.tools import normal


class Blend(nn.Module):
    @nn.compact
    def __call__(self, x, other):
        return nn.Dense(3)(x + other)


CASES = {case.name: case for case in MODELS}
X = np.ones((3, 2), np.float32)


def site_of(name: str, path: str):
    case = CASES[name]
    example = Example.of(*case.args, **case.kwargs)
    sites = trace_model(case.model, None, example).sites
    return next(site for site in sites if site.path == path)


@pytest.mark.parametrize(
    ("name", "path", "shape", "batch", "inputs", "outputs", "scanned"),
    [
        ("scanned", "layers/attn/query", (4, 16, 4, 4), (0,), (1,), (2, 3), (0,)),
        ("scanned", "layers/attn/out", (4, 4, 4, 16), (0,), (1, 2), (3,), (0,)),
        ("scanned_axis_1", "layers/attn/out", (4, 4, 4, 16), (1,), (0, 2), (3,), (1,)),
        ("nested_scan", "outer/inner/heads", (3, 2, 6, 2, 3), (0, 1), (2,), (3, 4),
         (0, 1)),
        ("broadcast_scan", "block/heads", (6, 2, 3), (), (0,), (1, 2), ()),
        ("vmapped_experts", "experts/up", (3, 6, 12), (0,), (1,), (2,), (0,)),
        ("einsum_moe", "up", (3, 6, 10), (0,), (1,), (2,), ()),
        ("odds", "general", (4, 6, 2, 4), (), (0, 1), (2, 3), ()),
    ],
)  # fmt: skip
def test_axis_roles_are_found(name, path, shape, batch, inputs, outputs, scanned):
    site = site_of(name, path)
    assert site.kernel_shape == shape
    assert site.contraction[:3] == (batch, inputs, outputs)
    assert site.scanned_a == site.scanned_b == scanned


def test_an_example_is_shapes_and_plain_values():
    example = Example.of(np.ones((2, 3)), mode="fast", scale=0.5, mask=None)
    assert [type(leaf) for leaf in example.leaves].count(jax.ShapeDtypeStruct) == 1
    assert {"fast", 0.5} <= set(example.leaves[1:])


def test_shapes_are_accepted_as_examples_and_params():
    case = CASES["vit"]
    image = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    init = jax.eval_shape(case.model.init, jax.random.key(0), image)
    by_example = find_targets(case.model, case.config(), image)
    by_params = find_targets(case.model, case.config(), image, params=init["params"])
    assert by_params == by_example


def test_unset_flags_of_an_example_default_to_inference():
    rows = find_targets(ViTBlock(), LoRAConfig(rank=2), normal((1, 5, 16)))
    assert len(rows) == 6


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (ViT(), [(1, 20, 20, 3)]),  # an image's size is in no kernel
        (nn.MultiHeadDotProductAttention(2), [(1, 5, 6)]),
        (Blend(), [(1, 4), (1, 4)]),  # two inputs
    ],
    ids=["image", "told", "two"],
)
def test_example_inputs_are_required_if_they_cannot_be_inferred(model, inputs):
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in inputs]
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    config = LoRAConfig(rank=2)
    wanted = find_targets(model, config, *inputs, params=params)
    if isinstance(model, nn.MultiHeadDotProductAttention):
        assert find_targets(model, config, params=params) == wanted
        return
    message = rf"{type(model).__name__} needs example inputs .* Pass them after"
    with pytest.raises(ValueError, match=message):
        find_targets(model, config, params=params)


def test_the_error_of_an_inferred_input_is_in_the_message():
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x, *, weights):
            return nn.Dense(3)(x * weights["scale"])

    params = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    with pytest.raises(ValueError, match=r"Odd needs .* float32\[1, 8, 2\]: TypeError"):
        adapt(Odd(), LoRAConfig(rank=2)).targets(params)
    x = {"weights": {"scale": jnp.ones(2)}}
    rows = adapt(Odd(), LoRAConfig(rank=2), jnp.ones((1, 2)), **x).targets(params)
    assert [row.path for row in rows] == ["Dense_0"]


def test_an_error_of_the_model_itself_is_not_swallowed():
    class Broken(nn.Module):
        @nn.compact
        def __call__(self, x):
            nn.Dense(3)(x)
            raise RuntimeError("not yet written")

    params = {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    with pytest.raises(RuntimeError, match="not yet written"):
        adapt(Broken(), LoRAConfig(rank=2)).targets(params)


def test_params_are_required_without_an_example():
    with pytest.raises(ValueError, match="Dense needs example inputs"):
        adapt(nn.Dense(3), LoRAConfig(rank=2)).targets()


def test_another_method_may_be_traced():
    case = CASES["encoder_decoder"]
    adapted = adapt(case.model, case.config(), case.args[0], example_method="encode")
    paths = [row.path for row in adapted.targets()]
    assert paths == ["shared", "encoder_0", "encoder_1"]
    with pytest.raises(ValueError, match=r"cross_attn/key/bias is not in the model.*"):
        adapted.targets(case.variables()["params"])


def test_shapes_of_accepts_arrays_numbers_boxes_and_tuples():
    boxed = nn.Partitioned(jnp.ones((2, 3)), ("a", "b"))
    tree = {"a": boxed, "b": {"c": 1.0, "d": (jnp.ones(2), np.ones((3, 1)))}}
    assert shapes_of(tree) == {"a": (2, 3), "b/c": (), "b/d": ((2,), (3, 1))}


def test_tracing_allocates_no_memory():
    class Huge(nn.Module):
        @nn.compact
        def __call__(self, ids):
            x = nn.Embed(128_256, 16_384, name="embed")(ids)
            return nn.Dense(53_248, use_bias=False, name="up")(x)

    ids = jax.ShapeDtypeStruct((64, 8192), jnp.int32)
    (row,) = find_targets(Huge(), LoRAConfig(rank=16), ids)
    assert row.trainable == 16 * (16_384 + 53_248)


def test_equal_models_are_traced_once(monkeypatch):
    looks = []
    look = trace._trace_uncached
    monkeypatch.setattr(
        trace, "_trace_uncached", lambda *known: looks.append(1) or look(*known)
    )
    config = LoRAConfig(targets=".*")
    first = find_targets(nn.Dense(4321), config, X)
    assert find_targets(nn.Dense(4321), config, X) == first
    assert len(looks) == 1
    find_targets(nn.Dense(4322), config, X)
    find_targets(nn.Dense(4321), config, np.ones((3, 4), np.float32))
    assert len(looks) == 3


def test_a_layer_registered_later_is_found(monkeypatch):
    monkeypatch.setattr(layer_rules, "_RULES", dict(layer_rules._RULES))
    config = LoRAConfig(targets=".*")
    with pytest.raises(ValueError, match="weights"):
        find_targets(Plain(4), config, X)
    register_layer(Plain, "...i,io->...o", weight="weights")
    (target,) = find_targets(Plain(4), config, X)
    assert target.kernel_shape == (2, 4)


def test_an_unhashable_model_is_traced_each_time():
    table = np.ones((2, 2), np.float32)
    for model in (Scaled(4, table), Scaled(4, table)):
        (target,) = find_targets(model, LoRAConfig(targets=".*"), X)
        assert target.kernel_shape == (2, 4)


class Plain(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x):
        shape = (x.shape[-1], self.features)
        return x @ self.param("weights", nn.initializers.ones, shape)


class Scaled(nn.Module):
    features: int
    table: np.ndarray

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.features)(x @ self.table)
