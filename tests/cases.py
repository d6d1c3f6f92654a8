"""The pure functions as cases of `tests.laws`."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.ops import (
    DENSE,
    Contraction,
    init_adapter,
    lora_attend,
    lora_conv,
    lora_dense,
    lora_einsum,
    lora_embed,
    lora_experts,
    merge_kernel,
)
from lora_jax.ops.grouped import grouped_dot
from tests import reference
from tests.laws import RANK, Arrays, Case, normal


def arrays_of(
    key: jax.Array, x, kernel, contraction: Contraction = DENSE, one_hot: bool = False
) -> Arrays:
    """Draws x and W0, the same for every key, and a fresh adapter, from the key.

    ``x`` is a shape, or ``("ids", shape)`` for row numbers of the kernel.
    """
    a, b = init_adapter(key, kernel, RANK, contraction=contraction, one_hot=one_hot)
    if x[0] == "ids":
        inputs = jnp.arange(math.prod(x[1])).reshape(x[1]) * 7 % kernel[0]
    else:
        inputs = normal(x, seed=2)
    return Arrays(inputs, normal(kernel, seed=3), a, b)


def merge_with(contraction: Contraction):
    def merge(kernel, a, b, scaling):
        return merge_kernel(kernel, a, b, scaling=scaling, contraction=contraction)

    return merge


def dense_case() -> Case:
    def apply(x, kernel, a, b, scaling, **dropout):
        return lora_dense(x, kernel, a, b, scaling=scaling, **dropout)

    return Case(
        name="dense",
        init=functools.partial(arrays_of, x=(2, 5, 10), kernel=(10, 8)),
        apply=apply,
        base=jnp.matmul,
        merge=merge_with(DENSE),
        reference=reference.dense,
        matrices=lambda kernel: kernel[None],
        fan_in=10,
        trainable=54,
    )


def einsum_case(
    name, equation, x, kernel, factors, contraction, matrices, fan_in, trainable
) -> Case:
    def apply(x, kernel, a, b, scaling, **dropout):
        return lora_einsum(equation, x, kernel, a, b, scaling=scaling, **dropout)

    return Case(
        name=name,
        init=functools.partial(arrays_of, x=x, kernel=kernel, contraction=contraction),
        apply=apply,
        base=functools.partial(jnp.einsum, equation),
        merge=merge_with(contraction),
        reference=functools.partial(reference.einsum, equation, factors),
        matrices=matrices,
        fan_in=fan_in,
        trainable=trainable,
    )


def embed_case() -> Case:
    def apply(ids, table, a, b, scaling):
        return lora_embed(ids, table, a, b, scaling=scaling)

    return Case(
        name="embed",
        init=functools.partial(
            arrays_of, x=("ids", (4, 6)), kernel=(11, 5), one_hot=True
        ),
        apply=apply,
        base=lambda ids, table: nn.Embed(11, 5).apply(
            {"params": {"embedding": table}}, ids
        ),
        merge=merge_with(DENSE),
        reference=reference.embed,
        matrices=lambda table: table[None],
        fan_in=5,
        trainable=3 * (11 + 5),
        dropout=False,
        zero="lora_a",
    )


def attend_case() -> Case:
    def apply(x, table, a, b, scaling):
        return lora_attend(x, table, a, b, scaling=scaling)

    def base(x, table):
        bound = nn.Embed(11, 5).bind({"params": {"embedding": table}})
        return bound.attend(x)

    return embed_case()._replace(
        name="attend",
        init=functools.partial(arrays_of, x=(4, 6, 5), kernel=(11, 5), one_hot=True),
        apply=apply,
        base=base,
        reference=reference.attend,
    )


def sorted_experts_case() -> Case:
    """Rows sorted by expert, as many experts as ranks; 2 rows belong to none."""
    sizes = jnp.array([4, 1, 5])
    contraction = roles((0,), (1,), (2,))

    def apply(x, kernel, a, b, scaling, **dropout):
        return lora_experts(x, kernel, a, b, sizes, scaling=scaling, **dropout)

    def base(x, kernel):  # compared with JAX's own in test_grouped.py
        return grouped_dot(x, kernel, sizes)

    return Case(
        name="sorted_experts",
        init=functools.partial(
            arrays_of, x=(12, 7), kernel=(3, 7, 5), contraction=contraction
        ),
        apply=apply,
        base=base,
        merge=merge_with(contraction),
        reference=functools.partial(reference.experts, sizes=(4, 1, 5)),
        matrices=lambda w: w,
        fan_in=7,
        trainable=3 * 3 * (7 + 5),
    )


def conv_case(
    name, x, kernel, fan_in, trainable, *, strides, padding, dilation=None, groups=1
) -> Case:
    spatial = len(kernel) - 2
    dilation = dilation or (1,) * spatial
    contraction = Contraction(
        (), tuple(range(spatial + 1)), (spatial + 1,), groups=groups
    )
    letters = "xyz"[:spatial]
    factors = f"{letters}ir,ro->{letters}io"
    if groups > 1:
        factors = f"g{letters}ir,gro->{letters}igo"

    def apply(x, kernel, a, b, scaling, **dropout):
        return lora_conv(
            *(x, kernel, a, b),
            scaling=scaling,
            strides=strides,
            padding=padding,
            kernel_dilation=dilation,
            groups=groups,
            **dropout,
        )

    def base(x, kernel):
        conv = nn.Conv(
            kernel.shape[-1],
            kernel.shape[:-2],
            strides=strides,
            padding=padding,
            kernel_dilation=dilation,
            feature_group_count=groups,
            use_bias=False,
        )
        return conv.apply({"params": {"kernel": kernel}}, x)

    def oracle(x, kernel, a, b, scaling):
        merged = reference.merge(kernel, a, b, scaling, factors)
        return reference.conv(
            *(x, merged),
            strides=strides,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )

    return Case(
        name=name,
        init=functools.partial(arrays_of, x=x, kernel=kernel, contraction=contraction),
        apply=apply,
        base=base,
        merge=merge_with(contraction),
        reference=oracle,
        matrices=lambda w: np.stack(
            np.split(w.reshape(-1, w.shape[-1]), groups, axis=1)
        ),
        fan_in=fan_in,
        trainable=trainable,
    )


def roles(*axes: tuple[int, ...]) -> Contraction:
    return Contraction(*axes)


# Three heads, three experts: as many as ranks, which must confuse nothing.
OP_CASES = (
    dense_case(),
    einsum_case(
        "leading_dims",
        *("...i,io->...o", (2, 2, 3, 7), (7, 9), "ir,ro->io", DENSE),
        matrices=lambda w: w[None],
        fan_in=7,
        trainable=3 * (7 + 9),
    ),
    einsum_case(
        "transposed_kernel",
        *("bti,oi->bto", (2, 4, 7), (9, 7), "ir,ro->oi", roles((), (1,), (0,))),
        matrices=lambda w: w.T[None],
        fan_in=7,
        trainable=3 * (7 + 9),
    ),
    einsum_case(
        "heads_in",
        *("btd,dnh->btnh", (2, 4, 10), (10, 3, 5), "dr,rnh->dnh"),
        roles((), (0,), (1, 2)),
        matrices=lambda w: w.reshape(1, 10, 15),
        fan_in=10,
        trainable=3 * (10 + 15),
    ),
    einsum_case(
        "heads_out",
        *("btnh,nhd->btd", (2, 4, 3, 5), (3, 5, 10), "nhr,rd->nhd"),
        roles((), (0, 1), (2,)),
        matrices=lambda w: w.reshape(1, 15, 10),
        fan_in=15,
        trainable=3 * (15 + 10),
    ),
    einsum_case(
        "experts",
        *("ebi,eio->ebo", (3, 4, 7), (3, 7, 5), "eir,ero->eio"),
        roles((0,), (1,), (2,)),
        matrices=lambda w: w,
        fan_in=7,
        trainable=3 * 3 * (7 + 5),
    ),
    einsum_case(
        "experts_between",
        *("bei,oei->boe", (4, 3, 7), (5, 3, 7), "eir,ero->oei"),
        roles((1,), (2,), (0,)),
        matrices=lambda w: w.transpose(1, 2, 0),
        fan_in=7,
        trainable=3 * 3 * (7 + 5),
    ),
    sorted_experts_case(),
    embed_case(),
    attend_case(),
    conv_case(
        *("conv_1d", (2, 9, 4), (3, 4, 7), 12, 3 * (12 + 7)),
        strides=(2,),
        padding="VALID",
    ),
    conv_case(
        *("conv_2d", (2, 8, 7, 4), (3, 2, 4, 6), 24, 3 * (24 + 6)),
        strides=(2, 1),
        padding="SAME",
        dilation=(1, 2),
    ),
    conv_case(
        *("conv_2d_groups", (2, 6, 5, 4), (3, 3, 2, 10), 18, 2 * 3 * (18 + 5)),
        strides=(1, 1),
        padding=((1, 0), (2, 1)),
        groups=2,
    ),
    conv_case(
        *("conv_3d", (1, 4, 5, 4, 3), (2, 3, 2, 3, 5), 36, 3 * (36 + 5)),
        strides=(1, 2, 1),
        padding="SAME",
    ),
)
