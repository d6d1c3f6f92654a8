"""The weighted next-token loss, a chunk of tokens at a time; see `causal_lm`."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array

from lora_jax.ops.token_rows import add_logits
from lora_jax.train.losses import pick


class Options(NamedTuple):
    """The static arguments of `causal_lm`.

    Attributes:
      chunk: tokens at once.
      softcap: bound on the logits, or None.
      tokens: those whose columns have deltas.
    """

    chunk: int
    softcap: float | None
    tokens: tuple[int, ...]


class _Chunk(NamedTuple):
    """A chunk's loss, and the gradients of its weighted sum (None if not needed)."""

    nll: Array  # [b, c]
    d_hidden: Array | None = None  # [b, c, d]
    d_kernel: Array | None = None  # [d, v] float32
    d_deltas: Array | None = None  # [n, d] float32


def _chunk(
    options: Options,
    hidden: Array,
    kernel: Array,
    labels: Array,
    weights: Array,
    deltas: Array | None,
    wrt_hidden: bool = False,
    wrt_kernel: bool = False,
    wrt_deltas: bool = False,
) -> _Chunk:
    """Computes one chunk: ``hidden [b, c, d]``, ``labels, weights [b, c]``."""
    kernel, softcap = kernel.astype(hidden.dtype), options.softcap
    logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
    columns = np.asarray(options.tokens, np.int32)
    if deltas is not None:
        deltas = deltas.astype(hidden.dtype)
        logits = add_logits(logits, hidden, deltas, options.tokens)
    slope: Array | float = 1.0
    if softcap is not None:
        bounded = jnp.tanh(logits / softcap)
        logits, slope = softcap * bounded, 1 - bounded * bounded
    top = jnp.max(logits, axis=-1, keepdims=True)
    exps = jnp.exp(logits - top)
    total = jnp.sum(exps, axis=-1, keepdims=True)
    nll = (jnp.log(total) + top)[..., 0] - pick(logits, labels)
    if not (wrt_hidden or wrt_kernel or wrt_deltas):
        return _Chunk(nll)
    w = weights[..., None]
    is_label = labels[..., None] == jnp.arange(logits.shape[-1])
    d_logits = (exps * (w / total) - jnp.where(is_label, w, 0.0)) * slope
    d_logits = d_logits.astype(hidden.dtype)
    d_hidden = d_kernel = d_deltas = None
    if wrt_hidden:
        d_hidden = jnp.einsum("bcv,dv->bcd", d_logits, kernel)
        if deltas is not None:
            d_hidden += jnp.einsum("bcn,nd->bcd", d_logits[..., columns], deltas)
    if wrt_kernel:
        d_kernel = jnp.einsum(
            "bcd,bcv->dv", hidden, d_logits, preferred_element_type=jnp.float32
        )
    if wrt_deltas:
        own, wide = d_logits[..., columns], jnp.float32
        d_deltas = jnp.einsum("bcn,bcd->nd", own, hidden, preferred_element_type=wide)
    return _Chunk(nll, d_hidden, d_kernel, d_deltas)


def _split(array: Array, size: int) -> Array:
    """Splits ``[b, t, ...]`` into ``[n, b, size, ...]``, zero-padded along ``t``."""
    b, t = array.shape[:2]
    count = -(-t // size)
    rest = [(0, 0)] * (array.ndim - 2)
    array = jnp.pad(array, [(0, 0), (0, count * size - t), *rest])
    return array.reshape(b, count, size, *array.shape[2:]).swapaxes(0, 1)


def _join(chunks: Array, t: int) -> Array:
    """Undoes `_split`."""
    n, b, size, *rest = chunks.shape
    return chunks.swapaxes(0, 1).reshape(b, n * size, *rest)[:, :t]


def _scan_chunks(
    options: Options,
    hidden: Array,
    kernel: Array,
    labels: Array,
    weights: Array,
    deltas: Array | None,
    skips: bool = True,
    **wrt: bool,
) -> tuple[Array, _Chunk]:
    """Runs `_chunk` along ``t``; returns the loss and the results for all tokens.

    Tokens with weight are sorted to the front of each row, so that chunks of only
    prompt and padding tokens, which contribute zero, are skipped.
    """
    b, t = labels.shape
    # Chunks of equal size, with little padding.
    size = -(-t // -(-b * t // options.chunk))
    make = functools.partial(_chunk, options, **wrt)

    def weighted(nll: Array, w: Array) -> Array:
        return jnp.sum(jnp.where(w != 0, w * nll, 0.0))

    if size == t:  # one chunk: nothing to sort or to skip
        found = make(hidden, kernel, labels, weights, deltas)
        return weighted(found.nll, weights), found
    order = jnp.argsort(weights == 0, axis=1, stable=True)  # [b, t]

    def sort(array: Array, by: Array) -> Array:
        by = by.reshape(*by.shape, *[1] * (array.ndim - 2))
        return jnp.take_along_axis(array, by, axis=1, mode="promise_in_bounds")

    def body(carry, xs):
        total, sums = carry
        h, y, w = xs

        def skip(*args):
            made = jax.eval_shape(make, *args)
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), made)

        counts = jnp.any(w != 0) if skips else True
        found = jax.lax.cond(counts, make, skip, h, kernel, y, w, deltas)
        sums = jax.tree.map(jnp.add, sums, (found.d_kernel, found.d_deltas))
        total += weighted(found.nll, w)
        return (total, sums), found._replace(d_kernel=None, d_deltas=None)

    xs = tuple(_split(sort(array, order), size) for array in (hidden, labels, weights))
    summed = {"wrt_kernel": kernel, "wrt_deltas": deltas}
    sums = tuple(
        jnp.zeros(jnp.shape(array), jnp.float32) if wrt.get(name) else None
        for name, array in summed.items()
    )
    (total, sums), found = jax.lax.scan(body, (jnp.float32(0), sums), xs)
    back = jnp.argsort(order, axis=1)
    found = jax.tree.map(lambda array: sort(_join(array, t), back), found)
    return total, found._replace(d_kernel=sums[0], d_deltas=sums[1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunked_nll(
    options: Options,
    hidden: Array,
    kernel: Array,
    labels: Array,
    weights: Array,
    deltas: Array | None,
) -> Array:
    """Sums the weighted loss over all tokens, ``options.chunk`` at a time.

    Args:
      options: what is static.
      hidden: ``[b, t, d]``.
      kernel: the head's ``[d, v]``.
      labels: ``[b, t]``.
      weights: ``[b, t]``.
      deltas: ``[n, d]``, added to the head's columns of ``options.tokens``, or None.
    """
    return _scan_chunks(options, hidden, kernel, labels, weights, deltas)[0]


def _chunked_nll_fwd(
    options: Options,
    hidden: CustomVJPPrimal,
    kernel: CustomVJPPrimal,
    labels: CustomVJPPrimal,
    weights: CustomVJPPrimal,
    deltas: CustomVJPPrimal | None,
):
    """Computes the loss and its gradients, chunk by chunk.

    ``perturbed`` tells which arguments are differentiated: a frozen head costs nothing.
    """
    arrays = (hidden.value, kernel.value, labels.value, weights.value)
    own = None if deltas is None else deltas.value
    wrt = {"wrt_hidden": hidden.perturbed, "wrt_kernel": kernel.perturbed}
    wrt["wrt_deltas"] = deltas is not None and deltas.perturbed
    skips = not weights.perturbed  # a weight's gradient is its token's loss, never 0
    total, found = _scan_chunks(options, *arrays, own, skips, **wrt)
    d_kernel = found.d_kernel
    if d_kernel is not None:
        d_kernel = d_kernel.astype(kernel.value.dtype)
    nll = found.nll if weights.perturbed else None
    return total, (found.d_hidden, d_kernel, nll, found.d_deltas)


def _chunked_nll_bwd(options, residuals, g: Array | SymbolicZero):
    del options
    if isinstance(g, SymbolicZero):
        return None, None, None, None, None
    d_hidden, d_kernel, nll, d_deltas = residuals

    def scale(x: Array | None) -> Array | None:
        return None if x is None else (g * x).astype(x.dtype)

    return scale(d_hidden), scale(d_kernel), None, scale(nll), scale(d_deltas)


chunked_nll.defvjp(_chunked_nll_fwd, _chunked_nll_bwd, symbolic_zeros=True)
