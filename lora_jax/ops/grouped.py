"""Matrix products in which every row has the matrix of its group.

The rows ``[m, i]`` are sorted by group, and ``sizes`` ``[e]`` says how many each group
has: ``y[j] = x[j] W[group of j]``. Rows beyond the last group give zero. On GPU and TPU
that is `jax.lax.ragged_dot`. On a CPU JAX computes every row with every matrix; here a
loop takes a block of one group's rows at a time, in a small part of the time.

On a mesh rows are ``[s, c, m, i]`` and sizes ``[s, c, e / c]``: each of ``s`` shards of
the batch sorts its own rows, once for each of ``c`` shards of the groups. Every device
then multiplies the rows that it holds by the matrices that it holds. If ``c`` is 1,
every row must have a group: nothing then masks the others, which XLA:TPU would do in
another pass over the result.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lora_jax.names import BATCH_AXES, EXPERT, TOKEN_AXES
from lora_jax.ops.product import varying_axes

_MIN_BLOCK, _MAX_BLOCK = 8, 128  # rows that a CPU multiplies at once
_NO_BATCH = ((), ())

Matrices = Float[Array, "e i o"]
Sizes = Int[Array, "*p _"]  # of all groups, or of the shards of groups


def grouped_dot(
    x: Float[Array, "*p m _"],
    matrices: Float[Array, "e _ _"],
    sizes: Sizes,
    *,
    is_transposed: bool = False,
    precision: jax.lax.PrecisionLike = None,
) -> Float[Array, "*p m _"]:
    """Computes ``x[j] W[group of j]`` for every row.

    Args:
      x: rows ``[m, i]``, sorted by group.
      matrices: ``W`` ``[e, i, o]``, of any floating dtype.
      sizes: rows of each group ``[e]``.
      is_transposed: multiplies by ``Wᵀ``; ``x`` is then ``[m, o]``.
      precision: as in `jax.lax.dot_general`.

    Returns:
      ``[m, o]`` (``[m, i]`` if transposed), in the dtype of ``x``.
    """

    is_whole = x.ndim == 4 and sizes.shape[1] == 1

    def product(x, matrices, sizes):
        arrays = _varying_alike(x, matrices, sizes)
        options: Any = {"is_transposed": is_transposed, "precision": precision}
        return grouped_dot_p.bind(*arrays, is_whole=is_whole, **options)

    if x.ndim == 2:
        return product(x, matrices, sizes)
    if (shards := _shards(sizes)) is not None:
        rows, groups = shards

        def own(x, matrices, sizes):
            return product(x[0, 0], matrices, sizes[0, 0])[None, None]

        return _on_shards(own, (rows, groups, rows), rows)(x, matrices, sizes)
    parts = jnp.split(matrices, sizes.shape[1])
    made = [
        [product(*each) for each in zip(x[i], parts, sizes[i], strict=True)]
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
    """Runs a function on each device's rows and groups; other axes are XLA's."""
    return jax.shard_map(
        function,
        in_specs=inputs,
        out_specs=output,
        axis_names={*TOKEN_AXES, EXPERT} & set(jax.sharding.get_abstract_mesh().shape),
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


def _ragged_dot(x, matrices, sizes, *, is_transposed, is_whole, precision):
    numbers = jax.lax.RaggedDotDimensionNumbers(
        (((1,), (2 if is_transposed else 1,)), _NO_BATCH), (0,), (0,)
    )
    matrices = matrices.astype(x.dtype)
    y = jax.lax.ragged_dot_general(
        x, matrices, sizes, numbers, precision, preferred_element_type=x.dtype
    )
    if is_whole:
        return y
    is_inside = jnp.arange(len(x)) < jnp.sum(sizes)  # beyond, it may be anything
    return jnp.where(is_inside[:, None], y, 0)


def _ragged_outer(x, y, sizes, *, dtype, precision):
    numbers = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), _NO_BATCH), (0,), ())
    y = y.astype(x.dtype)
    return jax.lax.ragged_dot_general(
        x, y, sizes, numbers, precision, preferred_element_type=dtype
    )


class _Blocks(NamedTuple):
    """Blocks of consecutive rows, each of one group.

    Attributes:
      count: how many of the ``n`` blocks have rows; they come first.
      group: of each block ``[n]``.
      start: its first row ``[n]``.
      stop: the row after its last ``[n]``.
      place: of each row among the rows of all blocks ``[m]``; -1 beyond the groups.
    """

    count: Array
    group: Array
    start: Array
    stop: Array
    place: Array


def _cut(sizes: Array, rows: int) -> tuple[_Blocks, int]:
    """Returns the blocks, and how many rows each may have."""
    groups = len(sizes)
    per_group = -(-rows // groups)
    size = min(max(_MIN_BLOCK, 1 << (per_group - 1).bit_length()), _MAX_BLOCK)
    number = rows // size + min(groups, rows)  # at most one a group is not full
    ends = jnp.cumsum(sizes)
    blocks = -(-sizes // size)
    last = jnp.cumsum(blocks)
    index = jnp.arange(number)
    group = _place_among(last, index)
    start = (ends - sizes)[group] + (index - (last - blocks)[group]) * size
    stop = jnp.where(index < last[-1], jnp.minimum(start + size, ends[group]), 0)
    row = jnp.arange(rows)
    own = _place_among(ends, row)
    place = (last - blocks)[own] * size + row - (ends - sizes)[own]
    place = jnp.where(row < ends[-1], place, -1)
    start = jnp.where(index < last[-1], start, 0)
    return _Blocks(last[-1], group, start, stop, place), size


def _place_among(ends: Array, index: Array) -> Array:
    """Returns in which of consecutive ranges each index is; beyond, the last."""
    before = jnp.sum(index[:, None] >= ends, axis=1)
    return jnp.minimum(before, len(ends) - 1)


def _dot_in_blocks(x, matrices, sizes, *, is_transposed, is_whole, precision):
    del is_whole
    outputs = matrices.shape[1 if is_transposed else 2]
    if not x.size:
        return jnp.zeros((len(x), outputs), x.dtype)
    blocks, size = _cut(sizes, len(x))
    padded = jnp.pad(x, [(0, size), (0, 0)])
    contracted = ((1,), (1 if is_transposed else 0,))

    def multiply(group, start):
        own = jax.lax.dynamic_index_in_dim(matrices, group, keepdims=False)
        rows = jax.lax.dynamic_slice_in_dim(padded, start, size)
        return jax.lax.dot_general(
            rows, own.astype(x.dtype), (contracted, _NO_BATCH), precision=precision
        )

    def body(_, block):
        group, start, stop = block
        zero = jnp.zeros((size, outputs), x.dtype)
        return None, jax.lax.cond(stop > start, multiply, lambda *_: zero, group, start)

    _, found = jax.lax.scan(body, None, blocks[1:4])
    y = found.reshape(-1, outputs)[jnp.maximum(blocks.place, 0)]
    return jnp.where(blocks.place[:, None] >= 0, y, 0)


def _outer_in_blocks(x, y, sizes, *, dtype, precision):
    total = jnp.zeros((len(sizes), x.shape[1], y.shape[1]), dtype)
    if not x.size:
        return total
    blocks, size = _cut(sizes, len(x))
    x, y = (jnp.pad(rows, [(0, size), (0, 0)]) for rows in (x, y.astype(x.dtype)))

    def body(index, total):
        start, stop = blocks.start[index], blocks.stop[index]
        left, right = (
            jax.lax.dynamic_slice_in_dim(rows, start, size) for rows in (x, y)
        )
        left = jnp.where((start + jnp.arange(size) < stop)[:, None], left, 0)
        product = jax.lax.dot_general(
            left.astype(dtype),
            right.astype(dtype),
            (((0,), (0,)), _NO_BATCH),
            precision=precision,
        )
        return total.at[blocks.group[index]].add(product)

    return jax.lax.fori_loop(0, blocks.count, body, total)


# --- The two products as primitives: each is the other's derivative, and however a
# device computes them, a trace (and its FLOPs) shows one equation.

grouped_dot_p, grouped_outer_p = Primitive("grouped_dot"), Primitive("grouped_outer")


@grouped_dot_p.def_abstract_eval
def _dot_shape(x, matrices, sizes, *, is_transposed, is_whole, precision):
    del sizes, is_whole, precision
    return x.update(shape=(x.shape[0], matrices.shape[1 if is_transposed else 2]))


@grouped_outer_p.def_abstract_eval
def _outer_shape(x, y, sizes, *, dtype, precision):
    del precision
    return x.update(shape=(sizes.shape[0], x.shape[1], y.shape[1]), dtype=dtype)


def _transposed_dot(ct, x, matrices, sizes, *, is_transposed, is_whole, precision):
    del is_whole
    options = {"precision": precision}
    if ad.is_undefined_primal(x):
        turned = not is_transposed
        dx = grouped_dot(ct, matrices, sizes, is_transposed=turned, **options)
        return dx, None, None
    pair = (ct, x) if is_transposed else (x, ct)
    return None, grouped_outer(*pair, sizes, matrices.aval.dtype, **options), None


def _transposed_outer(ct, x, y, sizes, *, dtype, precision):
    del dtype
    options = {"precision": precision}
    if ad.is_undefined_primal(x):
        dx = grouped_dot(y, ct, sizes, is_transposed=True, **options)
        return dx.astype(x.aval.dtype), None, None
    return None, grouped_dot(x, ct, sizes, **options).astype(y.aval.dtype), None


def _define(primitive: Primitive, cpu: Callable, default: Callable, transpose: Any):
    """Registers how a product, linear in its first two arrays, is computed."""

    @functools.cache
    def compiled(**options):
        return jax.jit(functools.partial(primitive.bind, **options))

    def jvp(primals, tangents, **options):
        *pair, sizes = primals
        changes = []
        for i, tangent in enumerate(tangents[:2]):
            if type(tangent) is not ad.Zero:
                moved = [tangent if i == j else array for j, array in enumerate(pair)]
                changes.append(primitive.bind(*moved, sizes, **options))
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
    for function, platform in ((default, None), (cpu, "cpu")):
        rule = mlir.lower_fun(function, multiple_results=False)
        mlir.register_lowering(primitive, rule, platform=platform)


_define(grouped_dot_p, _dot_in_blocks, _ragged_dot, _transposed_dot)
_define(grouped_outer_p, _outer_in_blocks, _ragged_outer, _transposed_outer)
