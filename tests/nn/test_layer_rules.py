"""The registry: what makes a layer one that LoRA can adapt."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import LoRAConfig, LoRADense, adapt, find_targets, register_layer
from lora_jax.nn import layer_rules
from lora_jax.nn.apply import call_inputs
from lora_jax.nn.layer_rules import rule_of
from tests.nn.tools import key, normal, tuned
from tests.reference import assert_close

X = normal((3, 4, 8))
CONFIG = LoRAConfig(rank=3, alpha=7.0)


class Transposed(nn.Module):
    """A user's own layer, with its kernel the other way round."""

    features: int

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        weight = self.param("weight", init, (self.features, x.shape[-1]))
        return x @ weight.T


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(layer_rules, "_RULES", dict(layer_rules._RULES))


@pytest.mark.parametrize(
    "equation", ["...i,oi->...o", lambda module, x: "bti,oi->bto"], ids=["str", "call"]
)
def test_a_registered_layer_is_adapted_and_merged(equation, registry):
    model = Transposed(6)
    assert rule_of(model) is None
    register_layer(Transposed, equation, weight="weight")
    adapted = adapt(model, LoRAConfig(rank=3, alpha=7.0, targets=".*"), X)
    params = jax.jit(model.init)(key(0), X)["params"]
    variables = tuned(adapted.attach(params, key(1)))
    assert variables["lora"]["lora_a"].shape == (8, 3)
    merged = adapted.merge(variables)
    assert merged["weight"].shape == (6, 8)
    assert_close(adapted.apply(variables, X), model.apply({"params": merged}, X))


class FoldedHeads(nn.Module):
    """T5X's DenseGeneral: the tree has one matrix, whatever the axes are."""

    features: tuple[int, ...]
    contracted: int = 1

    @nn.compact
    def __call__(self, x):
        inputs = x.shape[x.ndim - self.contracted :]
        shape = (math.prod(inputs), math.prod(self.features))
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        kernel = kernel.reshape(*inputs, *self.features)
        return jnp.tensordot(x, kernel, self.contracted)


@pytest.mark.parametrize(
    ("model", "x"),
    [(FoldedHeads((2, 3)), X), (FoldedHeads((5,), 2), normal((3, 2, 4)))],
    ids=["to heads", "from heads"],
)
def test_a_kernel_with_folded_axes_can_be_registered(model, x, registry):
    register_layer(FoldedHeads, "...i,io->...o")
    adapted = adapt(model, LoRAConfig(rank=2, alpha=7.0, targets=".*"), x)
    variables = tuned(adapted.attach(model.init(key(0), x)["params"], key(1)))
    y, merged = adapted.apply(variables, x), adapted.merge(variables)
    assert_close(y, model.apply({"params": merged}, x))
    assert np.abs(y - model.apply({"params": variables["frozen"]}, x)).max() > 0.1


def test_a_subclass_is_its_base_class():
    class Wide(nn.Dense):
        pass

    (target,) = find_targets(Wide(6), None, LoRAConfig(rank=3, targets=".*"), X)
    assert (target.kind, target.kernel_shape, target.trainable) == ("dense", (8, 6), 42)


def test_kinds():
    kinds = {
        nn.Dense(2): "dense",
        nn.DenseGeneral(2): "dense",
        nn.Einsum((2, 2), "...i,io->...o"): "einsum",
        nn.Embed(3, 2): "embed",
        nn.Conv(2, (3,)): "conv",
        LoRADense(2): "dense",
    }
    for module, kind in kinds.items():
        layer = rule_of(module)
        assert layer is not None
        assert layer.kind == kind
    assert rule_of(nn.LayerNorm()) is None
    assert rule_of(nn.Conv(2, (3,), mask=jnp.ones((3, 8, 2)))) is None


def test_only_a_module_class_can_be_registered():
    for thing in (nn.Dense(2), int, "Dense"):
        with pytest.raises(TypeError, match="module_type must be a Linen module class"):
            register_layer(thing, "...i,io->...o")


def test_arguments_are_bound_in_order_however_passed():
    def method(x, equation=None, flag=1): ...

    assert call_inputs(method, (X,), {"flag": 2, "equation": "e"}) == (X, "e", 2)
    assert call_inputs(method, (), {"x": 1}) == (1,)
