"""Layers that transform their kernel: adapted, but never merged incorrectly."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import LoRAConfig, adapt, find_targets, register_layer
from lora_jax.nn import layer_rules
from tests.nn.tools import key, normal, tuned
from tests.reference import assert_close

X = normal((2, 6))
IMAGE = normal((1, 6, 6, 3))
EVERYTHING = LoRAConfig(rank=2, alpha=6, targets=".*")


class StdConv(nn.Conv):
    """As in BiT's ResNet-v2: the kernel is standardised before use."""

    def param(self, name, *args, **kwargs):
        value = super().param(name, *args, **kwargs)
        if name == "kernel":
            value = (value - value.mean((0, 1, 2))) / (value.std((0, 1, 2)) + 1e-5)
        return value


def rounding_dot(x, kernel, *args, **kwargs):
    return jax.lax.dot_general(x, jnp.round(4 * kernel) / 4, *args, **kwargs)


class TiedByHand(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(7, 6, name="embed")
        return nn.gelu(embed(ids)) @ embed.embedding.T


class Doubling(nn.Module):
    """Another module's parameters are changed on their way in."""

    @nn.compact
    def __call__(self, x):
        def double(tree):
            return jax.tree.map(lambda leaf: 2 * leaf, tree)

        dense = nn.map_variables(
            nn.Dense, "params", double, init=self.is_initializing(), mutable=False
        )
        return dense(5, name="dense")(x)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(layer_rules, "_RULES", dict(layer_rules._RULES))


def ready(model, config, *inputs):
    adapted = adapt(model, config, *inputs)
    params = model.init(key(0), *inputs)["params"]
    return adapted, tuned(adapted.attach(params, key(1)))


@pytest.mark.parametrize(
    ("model", "x"),
    [(StdConv(4, (3, 3)), IMAGE), (nn.Dense(5, dot_general=rounding_dot), X)],
    ids=["standardised", "rounding"],
)
def test_a_transformed_kernel_is_adapted_but_never_merged(model, x):
    adapted, variables = ready(model, EVERYTHING, x)
    (target,) = adapted.targets()
    assert not target.is_plain
    effect = adapted.apply(variables, x) - model.apply(
        {"params": variables["frozen"]}, x
    )
    plain = nn.Conv(4, (3, 3)) if x is IMAGE else nn.Dense(5)
    linen, _ = ready(plain, EVERYTHING, x)
    on_plain = linen.apply(variables, x) - plain.apply(
        {"params": variables["frozen"]}, x
    )
    assert_close(effect, on_plain)  # the update is that of any convolution
    with pytest.raises(ValueError, match=r"can't be merged: their modules transform"):
        adapted.merge(variables)
    with pytest.raises(ValueError, match=r"dora=True needs the kernel that"):
        adapt(model, LoRAConfig(targets=".*", dora=True), x).targets()


def test_a_subclass_that_only_wraps_the_call_can_be_merged():
    class Scaled(nn.Dense):
        @nn.compact
        def __call__(self, x):
            return 2 * super().__call__(x)

    adapted, variables = ready(Scaled(5), EVERYTHING, X)
    assert adapted.targets()[0].is_plain
    merged = adapted.merge(variables)
    assert_close(Scaled(5).apply({"params": merged}, X), adapted.apply(variables, X))


@pytest.mark.parametrize("wrapper", [nn.WeightNorm, nn.SpectralNorm])
def test_a_layer_whose_parameters_are_rewritten_is_rejected(wrapper):
    class Normalised(nn.Module):
        @nn.compact
        def __call__(self, x):
            flags = {"update_stats": False} if wrapper is nn.SpectralNorm else {}
            return nn.Dense(3)(wrapper(nn.Dense(5, name="inner"))(x, **flags))

    message = rf"'inner/kernel', .* nn.{wrapper.__name__} rewrites its parameters"
    with pytest.raises(ValueError, match=message):
        find_targets(Normalised(), LoRAConfig(rank=2), X)
    rest = LoRAConfig(rank=2, exclude=["inner"])
    assert [row.path for row in find_targets(Normalised(), rest, X)] == ["Dense_0"]


@pytest.mark.parametrize(
    ("model", "x", "targets"),
    [(TiedByHand(), jnp.array([[1, 4, 2]]), ["embed"]), (Doubling(), X, ["dense"])],
    ids=["read directly", "map_variables"],
)
def test_a_merge_that_would_change_the_output_is_rejected(model, x, targets):
    adapted, variables = ready(model, LoRAConfig(rank=2, targets=targets), x)
    variables = {
        **variables,
        "lora": jax.tree.map(lambda a: a + 0.3, variables["lora"]),
    }
    with pytest.raises(ValueError, match=r"merged model differs from the adapted one"):
        adapted.merge(variables)
    merged = adapted.merge(variables, check=False)
    off = model.apply({"params": merged}, x) - adapted.apply(variables, x)
    assert np.abs(off).max() > 0.1


def test_an_example_that_does_not_run_gives_a_warning():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            noise = jax.random.normal(self.make_rng("noise"), x.shape)
            return nn.Dense(3)(x + noise)

    adapted, variables = ready(Noisy(), LoRAConfig(rank=2), X)
    with pytest.warns(UserWarning, match=r"(?s)could not be compared .*noise"):
        adapted.merge(variables)


class Square(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(), (6, 6))
        return x @ w.T


class Pooling(nn.Module):
    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.normal(), (6, 5))
        return (x @ w)[:, None]  # an output that an update would broadcast to


@pytest.mark.parametrize(
    ("layer", "right"), [(Square, "...i,oi->...o"), (Pooling, None)]
)
def test_a_registered_equation_must_reproduce_the_layer(layer, right, registry):
    register_layer(layer, "...i,io->...o", weight="w")
    message = "its registered equation does not reproduce its output"
    with pytest.raises(ValueError, match=message):
        find_targets(layer(), EVERYTHING, X)
    if right is not None:
        register_layer(layer, right, weight="w")
        (target,) = find_targets(layer(), EVERYTHING, X)
        assert target.is_plain


def test_a_head_applied_to_its_own_variables_is_not_adapted():
    class Tied(nn.Module):
        def setup(self):
            self.embed = nn.Embed(7, 6)
            self.head = nn.Dense(7, use_bias=False)

        def __call__(self, ids):
            x = self.embed(ids)
            return self.head.apply({"params": {"kernel": self.embed.embedding.T}}, x)

    ids = jnp.array([[1, 4, 2]])
    adapted, variables = ready(Tied(), LoRAConfig(rank=2, targets=["embed"]), ids)
    assert [row.path for row in adapted.targets()] == ["embed"]
    base = Tied().apply({"params": variables["frozen"]}, ids)
    assert np.abs(adapted.apply(variables, ids) - base).max() > 1e-3


def test_all_linear_warns_about_unsupported_layers():
    class Cell(nn.Module):
        @nn.compact
        def __call__(self, x):
            cell = nn.OptimizedLSTMCell(4, name="lstm")
            carry = cell.initialize_carry(jax.random.key(0), x.shape)
            _, y = cell(carry, x)
            experts = self.param("experts", nn.initializers.normal(), (3, 4, 5))
            return nn.Dense(2, name="out")(jnp.einsum("bi,eio->bo", y, experts))

    with pytest.warns(UserWarning, match=r"does not adapt .*") as told:
        rows = find_targets(Cell(), LoRAConfig(rank=2), X)
    text = str(told[0].message)
    assert "experts (Cell)" in text
    assert "lstm/ii/kernel (DenseParams, and 7 more like it)" in text
    assert "experts (Cell): 9 weights, 220 parameters, of layer types that" in text
    assert "Register them with `register_layer`" in text
    assert [row.path for row in rows][-1] == "out"
    config = LoRAConfig(rank=2)
    assert adapt(Cell(), config, X).frozen_notes() == [text]
    kept = LoRAConfig(rank=2, exclude=[r"experts", *(f"lstm/{g}" for g in _GATES)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_targets(Cell(), kept, X)


_GATES = [f"{side}{gate}" for side in "ih" for gate in "ifgo"]
