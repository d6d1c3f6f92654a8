"""How each platform computes `lora_jax.ops.grouped`'s products.

A CPU takes a block of one group's rows at a time. A GPU takes many such blocks at once:
there JAX has no kernel of its own, and XLA would multiply every row by every matrix. On
a TPU `jax.lax.ragged_dot` is a kernel, but one that needs its matrices in an array of
their own; megablox, JAX's other kernel, reads those of one layer from the stack of all.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

_MIN_BLOCK, _MAX_BLOCK = 8, 128  # rows that are multiplied at once
_BATCH_BYTES = 2**28  # of the matrices that a GPU copies for a batch of blocks
_MIN_TILE, _MAX_TILE = 128, 512  # rows of a TPU's tiles
_DEEP_TILE, _TILE_BYTES = 2048, 3 * 2**20  # of its part of a matrix
_NO_BATCH = ((), ())


def ragged_dot(
    x, matrices, sizes, layer=None, *, is_transposed, is_whole, precision
) -> Array:
    """`grouped_dot` by `jax.lax.ragged_dot`."""
    numbers = jax.lax.RaggedDotDimensionNumbers(
        (((1,), (2 if is_transposed else 1,)), _NO_BATCH), (0,), (0,)
    )
    if layer is not None:
        matrices = jax.lax.dynamic_index_in_dim(matrices, layer, keepdims=False)
    matrices = matrices.astype(x.dtype)
    y = jax.lax.ragged_dot_general(
        x, matrices, sizes, numbers, precision, preferred_element_type=x.dtype
    )
    return y if is_whole else _masked(y, sizes)


def ragged_outer(x, y, sizes, *, dtype, precision) -> Array:
    """`grouped_outer` by `jax.lax.ragged_dot_general`."""
    numbers = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), _NO_BATCH), (0,), ())
    y = y.astype(x.dtype)
    return jax.lax.ragged_dot_general(
        x, y, sizes, numbers, precision, preferred_element_type=dtype
    )


def dot_on_tpu(
    x, matrices, sizes, layer=None, *, is_transposed, is_whole, precision
) -> Array:
    """`grouped_dot`, by `megablox` if a stack is read that needs no cast."""
    options: Any = {"is_transposed": is_transposed, "is_whole": is_whole}
    is_known = x.dtype == matrices.dtype and x.dtype.name in ("float32", "bfloat16")
    if layer is None or precision is not None or not is_known or not x.size:
        return ragged_dot(x, matrices, sizes, layer, precision=precision, **options)
    return megablox(x, matrices, sizes, layer, **options)


def megablox(
    x, matrices, sizes, layer, *, is_transposed, is_whole, interpret=False
) -> Array:
    """`grouped_dot` by a kernel that reads the matrices of a layer in their stack.

    Its offset is meant for a shard of the groups, and is the first of them: it reads
    matrix ``group - offset``.
    """
    # It imports Pallas, which is only needed on a TPU.
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    _, groups, inputs, outputs = matrices.shape
    contracted, columns = (outputs, inputs) if is_transposed else (inputs, outputs)
    rows = len(x)
    half = 1 << (rows // groups).bit_length() >> 2  # of a group's rows, at least
    tile = min(max(half, _MIN_TILE), _MAX_TILE)
    deep = min(contracted, _DEEP_TILE)
    wide = _TILE_BYTES // (deep * matrices.dtype.itemsize) // 128 * 128
    y = gmm(
        jnp.pad(x, [(0, -rows % tile), (0, 0)]),
        matrices.reshape(-1, inputs, outputs),
        sizes.astype(jnp.int32),
        x.dtype,
        (tile, deep, min(columns, wide)),
        group_offset=-groups * jnp.asarray(layer, jnp.int32),
        transpose_rhs=is_transposed,
        interpret=interpret,
    )[:rows]
    return y if is_whole else _masked(y, sizes)


def _masked(y: Array, sizes: Array) -> Array:
    """Zeroes the rows beyond the groups, which may be anything."""
    return jnp.where((jnp.arange(len(y)) < jnp.sum(sizes))[:, None], y, 0)


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


def dot_in_blocks(
    x, matrices, sizes, layer=None, *, is_transposed, is_whole, precision
) -> Array:
    """`grouped_dot` on a CPU: a block at a time."""
    del is_whole
    outputs = matrices.shape[-2 if is_transposed else -1]
    if not x.size:
        return jnp.zeros((len(x), outputs), x.dtype)
    blocks, size = _cut(sizes, len(x))
    multiply = _block_product(x, matrices, layer, size, is_transposed, precision)

    def body(_, block):
        group, start, stop = block
        zero = jnp.zeros((size, outputs), x.dtype)
        return None, jax.lax.cond(stop > start, multiply, lambda *_: zero, group, start)

    _, found = jax.lax.scan(body, None, blocks[1:4])
    return _placed(found, blocks)


def dot_in_batches(
    x, matrices, sizes, layer=None, *, is_transposed, is_whole, precision
) -> Array:
    """`grouped_dot` on a GPU: as many blocks at once as their matrices have room."""
    del is_whole
    outputs = matrices.shape[-2 if is_transposed else -1]
    if not x.size:
        return jnp.zeros((len(x), outputs), x.dtype)
    blocks, size = _cut(sizes, len(x))
    multiply = _block_product(x, matrices, layer, size, is_transposed, precision)
    batch = _batch_of(blocks, math.prod(matrices.shape[-2:]) * x.dtype.itemsize)
    pairs = blocks.group, blocks.start
    found = jax.lax.map(lambda pair: multiply(*pair), pairs, batch_size=batch)
    return _placed(found, blocks)


def outer_in_blocks(x, y, sizes, *, dtype, precision) -> Array:
    """`grouped_outer` on a CPU: a block at a time."""
    total = jnp.zeros((len(sizes), x.shape[1], y.shape[1]), dtype)
    if not x.size:
        return total
    blocks, size = _cut(sizes, len(x))
    multiply = _block_outer(x, y, size, dtype, precision, is_cast=True)

    def body(index, total):
        product = multiply(blocks.start[index], blocks.stop[index])
        return total.at[blocks.group[index]].add(product)

    return jax.lax.fori_loop(0, blocks.count, body, total)


def outer_in_batches(x, y, sizes, *, dtype, precision) -> Array:
    """`grouped_outer` on a GPU: as many blocks at once as their products have room."""
    total = jnp.zeros((len(sizes), x.shape[1], y.shape[1]), dtype)
    if not x.size:
        return total
    blocks, size = _cut(sizes, len(x))
    multiply = jax.vmap(_block_outer(x, y, size, dtype, precision, is_cast=False))
    batch = _batch_of(blocks, total[0].size * total.dtype.itemsize)

    def body(total, part):
        group, start, stop = part
        return total.at[group].add(multiply(start, stop)), None

    parts = [
        jnp.pad(array, (0, -len(array) % batch)).reshape(-1, batch)
        for array in blocks[1:4]
    ]  # a block of padding has no rows
    return jax.lax.scan(body, total, parts)[0]


def _batch_of(blocks: _Blocks, size: int) -> int:
    """Returns how many blocks are computed at once if each needs ``size`` bytes."""
    return min(max(_BATCH_BYTES // size, 1), len(blocks.group))


def _block_product(x, matrices, layer, size, is_transposed, precision):
    """Returns the product of a block's rows, by its group and first row."""
    padded = jnp.pad(x, [(0, size), (0, 0)])
    contracted = ((1,), (1 if is_transposed else 0,))
    first = 0
    if layer is not None:
        first = layer * matrices.shape[1]
        matrices = matrices.reshape(-1, *matrices.shape[2:])

    def multiply(group, start):
        own = jax.lax.dynamic_index_in_dim(matrices, first + group, keepdims=False)
        rows = jax.lax.dynamic_slice_in_dim(padded, start, size)
        return jax.lax.dot_general(
            rows, own.astype(x.dtype), (contracted, _NO_BATCH), precision=precision
        )

    return multiply


def _placed(found: Array, blocks: _Blocks) -> Array:
    """Returns the rows of all blocks ``[n, size, o]`` in their places ``[m, o]``."""
    y = found.reshape(-1, found.shape[-1])[jnp.maximum(blocks.place, 0)]
    return jnp.where(blocks.place[:, None] >= 0, y, 0)


def _block_outer(x, y, size, dtype, precision, *, is_cast):
    """Returns the outer product of a block, by its first row and the row after it.

    XLA:CPU can't multiply bfloat16 to float32: there the rows are cast before.
    """
    x, y = (jnp.pad(rows, [(0, size), (0, 0)]) for rows in (x, y.astype(x.dtype)))

    def multiply(start, stop):
        left, right = (
            jax.lax.dynamic_slice_in_dim(rows, start, size) for rows in (x, y)
        )
        left = jnp.where((start + jnp.arange(size) < stop)[:, None], left, 0)
        if is_cast:
            left, right = left.astype(dtype), right.astype(dtype)
        return jax.lax.dot_general(
            left,
            right,
            (((0,), (0,)), _NO_BATCH),
            precision=precision,
            preferred_element_type=dtype,
        )

    return multiply
