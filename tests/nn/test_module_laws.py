"""The twins of Linen's layers under every law that the pure functions obey."""

import functools

import flax.linen as nn
import jax
import pytest

from lora_jax import (
    LoRAConfig,
    LoRAConv,
    LoRADense,
    LoRADenseGeneral,
    LoRAEinsum,
    LoRAEmbed,
)
from tests import laws
from tests.cases import OP_CASES
from tests.laws import ALPHA, RANK, SCALING, Arrays, Case, trials

BY_NAME = {case.name: case for case in OP_CASES}


def module_case(
    name: str, like: str, twin, linen, *args, weight="kernel", method=None, **kwargs
) -> Case:
    """Describes a twin by the pure function it should equal, `Case` ``like``.

    The scaling comes from the config. Where a law traces it, or sets it to 0, B is
    multiplied instead.
    """
    function = BY_NAME[like]
    plain = linen(*args, **kwargs)

    def twin_of(alpha: float = ALPHA, **options):
        config = LoRAConfig(rank=RANK, alpha=alpha, targets=".*", **options)
        return twin(*args, **kwargs, lora=config)

    @jax.jit
    def init(key):
        x = function.init(key).x
        variables = twin_of().init(key, x, method=method)
        return Arrays(x, variables["frozen"][weight], **variables["lora"])

    def apply(x, kernel, a, b, scaling, dropout_rate=0.0, dropout_key=None):
        alpha = ALPHA
        if isinstance(scaling, float) and scaling > 0:
            alpha = scaling * RANK
        else:
            b = b * (scaling / SCALING)
        variables = {"frozen": {weight: kernel}, "lora": {"lora_a": a, "lora_b": b}}
        layer = twin_of(alpha, dropout_rate=dropout_rate)
        if function.dropout:
            layer = layer.clone(deterministic=False)
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        return layer.apply(variables, x, rngs=rngs, method=method)

    def base(x, kernel):
        return plain.apply({"params": {weight: kernel}}, x, method=method)

    return function._replace(name=name, init=init, apply=apply, base=base)


dense = functools.partial(module_case, twin=LoRADense, linen=nn.Dense, use_bias=False)
general = functools.partial(
    module_case, twin=LoRADenseGeneral, linen=nn.DenseGeneral, use_bias=False
)
einsum = functools.partial(
    module_case, twin=LoRAEinsum, linen=nn.Einsum, use_bias=False
)
embed = functools.partial(
    *(module_case, "embed"), twin=LoRAEmbed, linen=nn.Embed, weight="embedding"
)
conv = functools.partial(module_case, twin=LoRAConv, linen=nn.Conv, use_bias=False)

MODULE_CASES = (
    dense("dense", "dense", features=8),
    general("heads_in", "heads_in", features=(3, 5)),
    general("heads_out", "heads_out", features=10, axis=(-2, -1)),
    general("batch_dims", "experts", features=5, batch_dims=(0,)),
    einsum(
        *("experts_between", "experts_between"),
        shape=(5, 3, 7),
        einsum_str="bei,oei->boe",
    ),
    embed("embed", num_embeddings=11, features=5),
    module_case(
        *("attend", "attend", LoRAEmbed, nn.Embed, 11, 5),
        weight="embedding",
        method="attend",
    ),
    conv(
        *("conv_2d", "conv_2d"),
        features=6,
        kernel_size=(3, 2),
        strides=(2, 1),
        kernel_dilation=(1, 2),
    ),
    conv(
        *("conv_groups", "conv_2d_groups"),
        features=10,
        kernel_size=(3, 3),
        padding=((1, 0), (2, 1)),
        feature_group_count=2,
    ),
)


# A module adds variables to a pure function, and what derivatives are made of is held
# there; here are the laws that variables could break.
OF_FUNCTIONS = (
    laws.check_gradients,
    laws.check_second_derivatives,
    laws.check_dropout_keeps_no_mask,
)


@pytest.mark.parametrize(
    ("law", "case"),
    [t for t in trials(MODULE_CASES) if t.values[0] not in OF_FUNCTIONS],
)
def test_law(law, case, key):
    law(case, key)


DENSE = MODULE_CASES[0]


def _with_other_alpha(x, kernel, a, b, scaling):
    return DENSE.apply(x, kernel, a, b, RANK / ALPHA)


def _differentiating_the_base(x, kernel, a, b, scaling):
    return DENSE.base(x, DENSE.merge(kernel, a, b, scaling))


@pytest.mark.parametrize(
    ("law", "apply"),
    [
        (laws.check_contraction, _with_other_alpha),
        (laws.check_linear_in_scaling, _with_other_alpha),
        (laws.check_no_base_gradient, _differentiating_the_base),
    ],
)
def test_a_broken_module_breaks_its_law(law, apply, key):
    with pytest.raises(AssertionError):
        law(DENSE._replace(apply=apply), key)


def test_an_adapter_is_no_constant_and_no_copy_of_the_base():
    """Law 11: W0 comes in as an argument; no constant of its size is compiled in."""
    layer = LoRADense(64, lora=LoRAConfig(rank=2))
    x = jax.numpy.ones((3, 32))
    variables = layer.init(jax.random.key(0), x)
    jaxpr = jax.make_jaxpr(layer.apply)(variables, x)
    assert not [c for c in jaxpr.consts if c.size > 1]
