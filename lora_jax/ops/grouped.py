"""Matrix products in which every row has the matrix of its group.

The rows ``[m, i]`` are sorted by group, and ``sizes`` ``[e]`` says how many each group
has: ``y[j] = x[j] W[group of j]``. Rows beyond the last group give zero. Each
platform's implementation is in `lora_jax.ops.grouped_lowerings`.

The matrices of all layers may be one stack, from which a product reads those of its own
layer: a slice would be copied first, in a mixture of many experts gigabytes a block.

On a mesh rows are ``[s, c, m, i]`` and sizes ``[s, c, e / c]``: each of ``s`` shards of
the batch sorts its own rows, once for each of ``c`` shards of the groups. Every device
then multiplies the rows that it holds by the matrices that it holds, which are a stack
if all are. If ``c`` is 1, every row must have a group: nothing then masks the others,
which XLA:TPU would do in another pass over the result.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lora_jax.names import BATCH_AXES, EXPERT, TENSOR, TOKEN_AXES
from lora_jax.ops.grouped_lowerings import (
    dot_in_batches,
    dot_in_blocks,
    dot_on_tpu,
    outer_in_batches,
    outer_in_blocks,
    ragged_dot,
    ragged_outer,
)
from lora_jax.ops.product import varying_axes

Matrices = Float[Array, "e i o"]
Sizes = Int[Array, "*p _"]  # of all groups, or of the shards of groups


def grouped_dot(
    x: Float[Array, "*p m _"],
    matrices: Float[Array, "*l e _ _"],
    sizes: Sizes,
    *,
    layer: Int[Array, ""] | int | None = None,
    is_transposed: bool = False,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*p m _"]:
    """Computes ``x[j] W[group of j]`` for every row.

    Args:
      x: rows ``[m, i]``, sorted by group.
      matrices: ``W`` ``[e, i, o]``, of any floating dtype; of several layers
        ``[l, e, i, o]``.
      sizes: rows of each group ``[e]``.
      layer: the number of the layer whose matrices are meant, if there are several.
      is_transposed: multiplies by ``Wᵀ``; ``x`` is then ``[m, o]``.
      precision: as in `jax.lax.dot_general`.

    Returns:
      ``[m, o]`` (``[m, i]`` if transposed), in the dtype of ``x``.
    """
    is_whole = x.ndim == 4 and sizes.shape[1] == 1
    layers = () if layer is None else (jnp.asarray(layer, jnp.int32),)

    def product(*arrays):
        options: Any = {"is_transposed": is_transposed, "precision": precision}
        return grouped_dot_p.bind(
            *_varying_alike(*arrays), is_whole=is_whole, **options
        )

    if x.ndim == 2:
        return product(x, matrices, sizes, *layers)
    if (shards := _shards(sizes)) is not None:
        rows, groups = shards
        whole = [PartitionSpec() for _ in layers]

        def own(x, matrices, sizes, *layers):
            return product(x[0, 0], matrices, sizes[0, 0], *layers)[None, None]

        inputs = (rows, PartitionSpec(*(None for _ in layers), *groups), rows, *whole)
        return _on_shards(own, inputs, rows)(x, matrices, sizes, *layers)
    if layers and jax.sharding.get_abstract_mesh().size > 1:
        matrices, layers = matrices[layers[0]], ()  # XLA partitions no kernel
    parts = jnp.split(matrices, sizes.shape[1], axis=-3)
    made = [
        [product(*each, *layers) for each in zip(x[i], parts, sizes[i], strict=True)]
        for i in range(len(x))
    ]
    return jnp.stack([jnp.stack(row) for row in made])


def grouped_outer(
    x: Float[Array, "*p m i"],
    y: Float[Array, "*p m o"],
    sizes: Sizes,
    dtype: DTypeLike,
    precision: jax.lax.PrecisionLike = None,
) -> Matrices:
    """Computes ``Σ xᵀ y`` over the rows of each group: the gradient of ``W``.

    Args:
      x: rows ``[m, i]``, sorted by group.
      y: rows ``[m, o]``.
      sizes: rows of each group ``[e]``.
      dtype: of the result and the sums.
      precision: as in `jax.lax.dot_general`.

    Returns:
      ``[e, i, o]``.
    """

    def product(x, y, sizes):
        arrays = _varying_alike(x, y, sizes)
        options: Any = {"dtype": jnp.dtype(dtype), "precision": precision}
        return grouped_outer_p.bind(*arrays, **options)

    if x.ndim == 2:
        return product(x, y, sizes)
    if (shards := _shards(sizes)) is not None:
        rows, groups = shards

        def own(x, y, sizes):
            made = product(x[0, 0], y[0, 0], sizes[0, 0])
            return jax.lax.psum(made, _token_axes())

        return _on_shards(own, (rows, rows, rows), groups)(x, y, sizes)
    made = [
        functools.reduce(
            jnp.add, (product(x[i, j], y[i, j], sizes[i, j]) for i in range(len(x)))
        )
        for j in range(x.shape[1])
    ]
    return jnp.concatenate(made)


def _shards(sizes: Array) -> tuple[PartitionSpec, PartitionSpec] | None:
    """Returns how the mesh shards rows and groups, None if it is not the mesh of both.

    Args:
      sizes: ``[s, c, e / c]``.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not set(BATCH_AXES) <= set(mesh.shape) or mesh.size == 1:
        return None
    axes, groups = _token_axes(), mesh.shape.get(EXPERT, 1)
    if sizes.shape[:2] != (math.prod(mesh.shape[a] for a in axes), groups):
        return None
    expert = EXPERT if EXPERT in mesh.shape else None
    return PartitionSpec(axes, expert), PartitionSpec(expert)


def _token_axes() -> tuple[str, ...]:
    """Returns the axes of the mesh that tokens are split over."""
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(axis for axis in TOKEN_AXES if axis in mesh.shape)


def _on_shards(function: Callable[..., Array], inputs, output) -> Callable[..., Array]:
    """Runs a function on each device's rows and groups; XLA splits the columns."""
    mesh = jax.sharding.get_abstract_mesh().shape
    return jax.shard_map(
        function,
        in_specs=inputs,
        out_specs=output,
        axis_names=set(mesh) - ({TENSOR} if mesh.get(TENSOR, 1) > 1 else set()),
        check_vma=False,
    )


def _varying_alike(*arrays: Array) -> list[Array]:
    """Makes arrays vary over the same axes inside a user's `jax.shard_map`."""
    axes = [varying_axes(array) for array in arrays]
    everywhere = frozenset().union(*axes)
    return [
        jax.lax.pcast(a, tuple(everywhere - own), to="varying")
        if everywhere - own
        else a
        for a, own in zip(arrays, axes, strict=True)
    ]


# --- The two products as primitives: each is the other's derivative, and however a
# device computes them, a trace (and its FLOPs) shows one equation.

grouped_dot_p, grouped_outer_p = Primitive("grouped_dot"), Primitive("grouped_outer")


@grouped_dot_p.def_abstract_eval
def _dot_shape(x, matrices, sizes, layer=None, *, is_transposed, is_whole, precision):
    del sizes, layer, is_whole, precision
    return x.update(shape=(x.shape[0], matrices.shape[-2 if is_transposed else -1]))


@grouped_outer_p.def_abstract_eval
def _outer_shape(x, y, sizes, *, dtype, precision):
    del precision
    return x.update(shape=(sizes.shape[0], x.shape[1], y.shape[1]), dtype=dtype)


def _transposed_dot(
    ct, x, matrices, sizes, *layers, is_transposed, is_whole, precision
):
    options = {"precision": precision}
    others = [None] * (1 + len(layers))
    if ad.is_undefined_primal(x):
        options |= {"is_transposed": not is_transposed, "is_whole": is_whole}
        dx = grouped_dot_p.bind(ct, matrices, sizes, *layers, **options)
        return dx, None, *others
    pair = (ct, x) if is_transposed else (x, ct)
    shape, dtype = matrices.aval.shape, matrices.aval.dtype
    d_matrices = grouped_outer(*pair, sizes, dtype, **options)
    for layer in layers:
        d_matrices = jnp.zeros(shape, dtype).at[layer].set(d_matrices)
    return None, d_matrices, *others


def _transposed_outer(ct, x, y, sizes, *, dtype, precision):
    del dtype
    options = {"precision": precision}
    if ad.is_undefined_primal(x):
        dx = grouped_dot(y, ct, sizes, is_transposed=True, **options)
        return dx.astype(x.aval.dtype), None, None
    return None, grouped_dot(x, ct, sizes, **options).astype(y.aval.dtype), None


def _define(
    primitive: Primitive, transpose: Any, lowerings: Mapping[str | None, Callable]
):
    """Registers how a product, linear in its first two arrays, is computed."""

    @functools.cache
    def compiled(**options):
        return jax.jit(functools.partial(primitive.bind, **options))

    def jvp(primals, tangents, **options):
        pair, others = primals[:2], primals[2:]
        changes = []
        for i, tangent in enumerate(tangents[:2]):
            if type(tangent) is not ad.Zero:
                moved = [tangent if i == j else array for j, array in enumerate(pair)]
                changes.append(primitive.bind(*moved, *others, **options))
        return primitive.bind(*primals, **options), functools.reduce(jnp.add, changes)

    def batch(arrays, axes, **options):
        moved = [
            None if axis is None else jnp.moveaxis(array, axis, 0)
            for array, axis in zip(arrays, axes, strict=True)
        ]

        def one(batched):
            pairs = zip(batched, arrays, strict=True)
            own = [whole if part is None else part for part, whole in pairs]
            return primitive.bind(*own, **options)

        return jax.lax.map(one, moved), 0

    primitive.def_impl(lambda *arrays, **options: compiled(**options)(*arrays))
    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = batch
    for platform, function in lowerings.items():
        rule = mlir.lower_fun(function, multiple_results=False)
        mlir.register_lowering(primitive, rule, platform=platform)


_define(
    grouped_dot_p,
    _transposed_dot,
    {None: ragged_dot, "cpu": dot_in_blocks, "gpu": dot_in_batches, "tpu": dot_on_tpu},
)
_define(
    grouped_outer_p,
    _transposed_outer,
    {None: ragged_outer, "cpu": outer_in_blocks, "gpu": outer_in_batches},
)
