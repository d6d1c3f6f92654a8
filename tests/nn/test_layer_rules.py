"""The registry: what makes a layer one that LoRA can adapt."""

import flax.linen as nn
import jax
import jax.numpy as jnp
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


def test_a_subclass_is_its_base_class():
    class Wide(nn.Dense):
        pass

    (target,) = find_targets(Wide(6), LoRAConfig(rank=3, targets=".*"), X)
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
