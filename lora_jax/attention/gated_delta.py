"""The gated delta rule: linear attention whose state forgets and corrects itself.

A head's state is a matrix that maps keys to values. Each token fades it, reads what it
holds for the token's key, and writes a part of the difference to the token's value. In
chunks of tokens the writes are the solution of one triangular system, so that all but a
short scan over the chunks are products of matrices; memory is linear in the length.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lora_jax.array_types import AnyFloat

CHUNK = 64  # tokens per chunk, as in transformers
PRECISION = "highest"  # the state sums over the whole row
State = Float[Array, "b n h u"]


def gated_delta_rule(
    query: Float[Array, "b t k h"],
    key: Float[Array, "b t k h"],
    value: Float[Array, "b t n u"],
    log_decay: Float[Array, "b t n"],
    beta: Float[Array, "b t n"],
    *,
    state: State | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "b t n u"], State]:
    """Reads and corrects a fading state, token by token.

    Computes ``o_t = S_tᵀ q_t`` with, for each head, from ``S_0``::

        S_t = a_t S_{t-1} + β_t k_t (v_t - a_t S_{t-1}ᵀ k_t)ᵀ       a_t = exp(g_t)

    In a chunk that starts from ``S``, with ``G`` the running sum of ``g`` in it, the
    rows of ``W`` are the differences that its tokens write::

        (I + A) W = β (V - e^G K S)     A_ij = β_i k_i·k_j e^(G_i - G_j)   for j < i
        O = e^G Q S + P W               P_ij = q_i·k_j e^(G_i - G_j)       for j <= i
        S' = e^(G_last) S + (e^(G_last - G) K)ᵀ W

    Args:
      query: ``q`` ``[b, t, k, h]``, scaled.
      key: ``k`` ``[b, t, k, h]``, of length one or less.
      value: ``v`` ``[b, t, n, u]``; head ``j`` has the queries and keys of head
        ``j // (n / k)``.
      log_decay: ``g`` ``[b, t, n]``, at most 0.
      beta: ``β`` ``[b, t, n]``, 0 for a token that changes nothing.
      state: ``S_0`` ``[b, n, h, u]``; zeros if None.
      segment_ids: ``[b, t]``, the example each token of a packed row belongs to; a new
        one starts from a state of zeros.
      chunk: tokens per chunk. It doesn't change the result.

    Returns:
      ``o`` ``[b, t, n, u]`` and the state after the last token, both in float32 (or in
      float64 if the inputs are).

    References:
      Yang et al., https://arxiv.org/abs/2412.06464, sections 3.1 and 3.3. Their state
      is the transpose of ours.
    """
    dtype = jnp.promote_types(query.dtype, jnp.float32)
    b, t, n, _ = value.shape
    size = min(chunk, t)
    count = -(-t // size)

    def split(x: Array, mode: str = "constant") -> Array:
        """Returns ``[count, b, n, size, ...]`` for ``[b, t, n, ...]``, padded."""
        room = [(0, 0), (0, count * size - t), *[(0, 0)] * (x.ndim - 2)]
        x = jnp.pad(x, room, mode=mode).reshape(b, count, size, *x.shape[2:])
        return x.transpose(1, 0, 3, 2, *range(4, x.ndim))

    def product(subscripts: str, x: Array, y: Array) -> Array:
        return jnp.einsum(subscripts, x, y, precision=PRECISION)

    groups = n // key.shape[2]
    q, k = (split(jnp.repeat(x.astype(dtype), groups, axis=2)) for x in (query, key))
    v, g, beta = (split(x.astype(dtype)) for x in (value, log_decay, beta))
    total = jnp.cumsum(g, axis=-1)  # [c, b, n, s]
    is_seen = jnp.tril(jnp.ones((size, size), bool))
    of_state, at_end = jnp.exp(total), jnp.exp(total[..., -1:] - total)
    if segment_ids is not None:
        numbers = split(_numbered(segment_ids)[..., None], "edge")  # [c, b, 1, s]
        last = numbers[..., -1:]
        before = jnp.concatenate([jnp.zeros_like(last[:1]), last[:-1]])
        is_seen = is_seen & (numbers[..., :, None] == numbers[..., None, :])
        of_state = jnp.where(numbers == before, of_state, 0)
        at_end = jnp.where(numbers == last, at_end, 0)
    difference = total[..., :, None] - total[..., None, :]
    faded = jnp.exp(jnp.where(is_seen, difference, -jnp.inf))  # [c, b, n, s, s]

    writes, reads = beta[..., None] * v, (beta * of_state)[..., None] * k
    if size > 1:
        system = beta[..., None] * product("...ih,...jh->...ij", k, k) * faded
        inverse = _inverse(jnp.tril(system, -1))
        both = jnp.concatenate([writes, reads], axis=-1)
        both = product("...ij,...jh->...ih", inverse, both)
        writes, reads = jnp.split(both, [v.shape[-1]], axis=-1)
    scores = product("...ih,...jh->...ij", q, k) * faded
    if state is None:
        state = jnp.zeros((b, n, k.shape[-1], v.shape[-1]), dtype)

    def step(state: Array, inputs: tuple[Array, ...]) -> tuple[Array, Array]:
        q, k, scores, writes, reads, kept = inputs
        writes = writes - product("bnsh,bnhu->bnsu", reads, state)
        out = product("bnsh,bnhu->bnsu", q, state)
        out = out + product("bnst,bntu->bnsu", scores, writes)
        added = product("bnsh,bnsu->bnhu", k, writes)
        return kept[..., None, None] * state + added, out

    q, k = of_state[..., None] * q, at_end[..., None] * k
    inputs = (q, k, scores, writes, reads, of_state[..., -1])
    state, out = jax.lax.scan(step, state.astype(dtype), inputs)
    out = out.transpose(1, 0, 3, 2, 4).reshape(b, count * size, n, -1)
    return out[:, :t], state


def causal_conv(
    x: Float[Array, "b t c"],
    kernel: Float[Array, "j c"],
    *,
    past: Float[Array, "b p c"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
) -> Float[Array, "b t c"]:
    """Convolves each channel with the tokens before.

    Computes ``y_t = Σ_j kernel_j x_(t - size + 1 + j)``, with the last ``j`` for the
    token itself.

    Args:
      x: ``[b, t, c]``.
      kernel: ``[j, c]``.
      past: the ``j - 1`` tokens before the first ``[b, j - 1, c]``; zeros if None.
      segment_ids: ``[b, t]``; tokens of other examples count as zeros.

    Returns:
      ``[b, t, c]``, in the dtype of ``x``.

    Example:
      >>> x = jnp.array([[[1.0], [2.0], [3.0]]])
      >>> causal_conv(x, jnp.array([[10.0], [1.0]]))[0, :, 0].tolist()
      [1.0, 12.0, 23.0]
    """
    t, size = x.shape[1], len(kernel)
    padded = with_past(x, past, size)
    numbers = None if segment_ids is None else _numbered(segment_ids)
    total = jnp.zeros_like(x, jnp.promote_types(x.dtype, jnp.float32))
    for j in range(size):
        shifted: AnyFloat = padded[:, j : j + t]
        if numbers is not None and j < size - 1:
            room = [(0, 0), (size - 1 - j, 0)]
            earlier = jnp.pad(numbers, room, constant_values=-1)[:, :t]
            shifted = jnp.where((earlier == numbers)[..., None], shifted, 0)
        total = total + shifted.astype(total.dtype) * kernel[j].astype(total.dtype)
    return total.astype(x.dtype)


@jax.checkpoint
def _inverse(below: Float[Array, "*batch s s"]) -> Float[Array, "*batch s s"]:
    """Returns ``(I + A)⁻¹`` for a strictly lower triangular ``A``.

    Block by block, as substitution is::

        [[X, 0], [C, Y]]⁻¹ = [[X⁻¹, 0], [-Y⁻¹ C X⁻¹, Y⁻¹]]

    from blocks of one number, whose inverses are 1, to the whole: all products of
    matrices. Not LAPACK's solver: on a CPU, training steps that called it at times
    never ended.
    """
    place = jnp.arange(below.shape[-1])
    inverse = jnp.broadcast_to(jnp.eye(len(place), dtype=below.dtype), below.shape)
    size = 1
    while size < len(place):
        block, pair = place // size, place // (2 * size)
        is_corner = (pair[:, None] == pair) & (block[:, None] > block)  # C of each pair
        corners = jnp.where(is_corner, below, 0)
        corners = jnp.matmul(corners, inverse, precision=PRECISION)
        inverse = inverse - jnp.matmul(inverse, corners, precision=PRECISION)
        size *= 2
    return inverse


def with_past(
    x: Float[Array, "b t c"], past: Float[Array, "b p c"] | None, size: int
) -> Float[Array, "b s c"]:
    """Returns a row after the ``size - 1`` tokens before it; zeros if None."""
    if past is None:
        return jnp.pad(x, [(0, 0), (size - 1, 0), (0, 0)])
    return jnp.concatenate([past.astype(x.dtype), x], axis=1)


def _numbered(segment_ids: Int[Array, "b t"]) -> Int[Array, "b t"]:
    """Numbers the examples of each row from 0, in their order."""
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.cumsum(jnp.pad(changed, [(0, 0), (1, 0)]), axis=1)
