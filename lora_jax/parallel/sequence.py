"""Rows of tokens split over the mesh axis ``sequence`` (context parallelism).

Of ``s`` devices each has ``t / s`` tokens of its rows: labels, activations and logits
are split alike, and all but attention concerns one token alone. Attention passes keys
and values around (`lora_jax.attention.ring`).

Outside of a model, a row is in its order. Inside, its tokens are dealt: of ``2 s``
parts of a row, device ``i`` gets parts ``i`` and ``2 s - 1 - i``. With neighbouring
parts the last device would have to look at every token before it and the first at next
to none; dealt, all have as much to do. A model deals token ids, which are small, and
collects the last hidden states, once a step.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int, Shaped

from lora_jax.names import BATCH_AXES, SEQUENCE, TOKEN_AXES
from lora_jax.parallel.activation_sharding import current_mesh, num_row_shards

Tokens = Shaped[Array, "b t ..."]


def sequence_shards() -> int:
    """Returns the number of devices that the tokens of a row are split over."""
    mesh = current_mesh()
    return 1 if mesh is None else mesh.shape.get(SEQUENCE, 1)


def check_length(tokens: int, sizes: Mapping[str, int]) -> None:
    """Raises unless a row can be split over a mesh.

    Args:
      tokens: tokens per row.
      sizes: sizes of the mesh's axes.

    Raises:
      ValueError: if it can't; says which lengths can.

    Example:
      >>> check_length(16, {"data": 1, "sequence": 4})
    """
    shards = sizes.get(SEQUENCE, 1)
    unit = 2 * shards
    if shards == 1 or (tokens and tokens % unit == 0):
        return
    low = tokens // unit * unit
    raise ValueError(
        f"the tokens of a row must be divisible by 2 x sequence = 2 x {shards} = {unit}"
        f" on this mesh; got {tokens}. Take {f'{low} or ' if low else ''}{low + unit}."
    )


def token_order(tokens: int) -> Int[Array, " t"] | None:
    """Returns the place in its row of each dealt token, None if rows aren't split.

    Args:
      tokens: tokens per row.

    Returns:
      The places ``[t]``, or None.

    Raises:
      ValueError: if the tokens are not divisible over the mesh; see `check_length`.
    """
    if sequence_shards() == 1:
        return None
    mesh = current_mesh()
    check_length(tokens, {} if mesh is None else mesh.shape)
    return deal(jnp.arange(tokens)[None])[0]


def deal(x: Tokens) -> Tokens:
    """Moves tokens ``[b, t, ...]`` from the order of their row to their parts."""
    size = sequence_shards()

    def move(x: Array) -> Array:
        first, second = jnp.split(x, 2, axis=1)  # parts 2 i and 2 i + 1
        even = jax.lax.ppermute(first, SEQUENCE, _routes(size, 0))
        odd = jax.lax.ppermute(second, SEQUENCE, _routes(size, 1))
        return jnp.concatenate(_swapped(even, odd), axis=1)

    return _on_shards(move)(x)


def collect(x: Tokens) -> Tokens:
    """Undoes `deal`."""
    size = sequence_shards()

    def move(x: Array) -> Array:
        even, odd = _swapped(*jnp.split(x, 2, axis=1))
        back = [[(end, start) for start, end in _routes(size, j)] for j in (0, 1)]
        first = jax.lax.ppermute(even, SEQUENCE, back[0])
        second = jax.lax.ppermute(odd, SEQUENCE, back[1])
        return jnp.concatenate([first, second], axis=1)

    return _on_shards(move)(x)


def fold(x: Tokens) -> Tokens:
    """Makes a row of each device's part: ``[b s, t / s, ...]`` for ``[b, t, ...]``.

    Nothing is moved. On a mesh without ``sequence`` it returns ``x``.
    """
    size, groups = sequence_shards(), num_row_shards()
    if size == 1 or x.shape[0] % groups or x.shape[1] % size:
        return x
    b, t, *rest = x.shape
    x = x.reshape(groups, b // groups, size, t // size, *rest).swapaxes(1, 2)
    x = x.reshape(b * size, t // size, *rest)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(TOKEN_AXES))


def unfold(x: Tokens, rows: int) -> Tokens:
    """Undoes `fold`, for ``rows`` rows."""
    size, groups = len(x) // rows, num_row_shards()
    if size == 1:
        return x
    _, part, *rest = x.shape
    x = x.reshape(groups, size, rows // groups, part, *rest).swapaxes(1, 2)
    x = x.reshape(rows, size * part, *rest)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES, SEQUENCE))


def _routes(size: int, parity: int) -> list[tuple[int, int]]:
    """Returns (from, to) of even or odd parts: part ``2 i + parity`` is on ``i``."""
    parts = [2 * i + parity for i in range(size)]
    return [(part // 2, min(part, 2 * size - 1 - part)) for part in parts]


def _swapped(x: Array, y: Array) -> tuple[Array, Array]:
    """Returns both in this order on even devices, where the lower part is even."""
    is_even = jax.lax.axis_index(SEQUENCE) % 2 == 0
    return jnp.where(is_even, x, y), jnp.where(is_even, y, x)


def _on_shards(move):
    """Runs a function on each device's tokens; the other axes are XLA's."""
    parts = PartitionSpec(None, SEQUENCE)
    return jax.shard_map(
        move, in_specs=parts, out_specs=parts, axis_names={SEQUENCE}, check_vma=False
    )
