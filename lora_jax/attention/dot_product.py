"""Dot-product attention: kernel selection and input validation."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive

from lora_jax.array_types import AnyFloat
from lora_jax.ops.product import check_floating
from lora_jax.parallel.activation_sharding import target_platform

Implementation = Literal["xla", "cudnn"] | None


def attention(
    query: AnyFloat,
    key: AnyFloat,
    value: AnyFloat,
    *,
    bias: AnyFloat | None = None,
    mask: jax.Array | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    implementation: Implementation = None,
) -> AnyFloat:
    """Computes ``softmax(scale * query keyᵀ + bias) value`` for each head.

    `jax.nn.dot_product_attention` with any number of batch dimensions. Query head ``j``
    attends to key head ``j // (n / k)``. The softmax is in float32. A query whose keys
    are all masked gets the mean of all values.

    Args:
      query: ``[*b, t, n, h]``.
      key: ``[*b, s, k, h]``, where ``k`` divides ``n``.
      value: ``[*b, s, k, h]``.
      bias: added to the logits, broadcastable to ``[*b, n, t, s]``.
      mask: true where a query may attend, broadcastable to ``[*b, n, t, s]`` with all
        its axes; a padding mask ``[b, s]`` is passed as ``mask[:, None, None, :]``.
      is_causal: whether query ``t`` attends to keys ``0 ... t`` only.
      scale: factor of the scores; ``1 / √h`` if None.
      implementation: ``"xla"``, ``"cudnn"``, or None for `choose_implementation`.

    Returns:
      ``[*b, t, n, h]``, in the dtype of ``query``.

    Raises:
      ValueError: listing every array of the wrong shape, or an unknown implementation.
      TypeError: if an array is not floating.

    References:
      Vaswani et al., https://arxiv.org/abs/1706.03762, section 3.2; grouped queries:
      Ainslie et al., https://arxiv.org/abs/2305.13245, section 2.2.
    """
    check_attention(query, key, value, bias=bias, mask=mask, is_causal=is_causal)
    if implementation not in ("xla", "cudnn", None):
        raise ValueError(
            f"implementation must be 'xla', 'cudnn' or None; got {implementation!r}."
        )
    batch, (t, _, _), s = query.shape[:-3], query.shape[-3:], key.shape[-3]
    rows = math.prod(batch)
    implementation = implementation or choose_implementation(
        query, key, bias=bias, mask=mask
    )

    def flat(array):  # flattens batch dimensions, keeping 1 if broadcast
        if array is None:
            return None
        last = array.shape[-3:]
        if implementation == "cudnn":  # can't broadcast over t and s
            last = (last[0], t, s)
        lead = (1,) * len(batch) if set(array.shape[:-3]) <= {1} else batch
        return jnp.broadcast_to(array, (*lead, *last)).reshape(math.prod(lead), *last)

    y = jax.nn.dot_product_attention(
        query.reshape(rows, *query.shape[-3:]),
        key.reshape(rows, *key.shape[-3:]),
        value.reshape(rows, *value.shape[-3:]),
        bias=flat(bias),
        mask=None if mask is None else flat(mask.astype(bool)),
        is_causal=is_causal,
        scale=scale,
        implementation=implementation,
    )
    return y.reshape(query.shape)


def choose_implementation(
    query: AnyFloat,
    key: AnyFloat,
    *,
    bias: AnyFloat | None = None,
    mask: jax.Array | None = None,
) -> Literal["xla", "cudnn"]:
    """Returns the attention implementation for the target platform and these arrays.

    cuDNN's fused kernel if it supports them: an NVIDIA GPU (Ampere or later), bfloat16
    or float16, a head dimension that is a multiple of 8 up to 128 (256 on Hopper or
    later), no bias, and even lengths if there is a mask. Otherwise XLA.
    """
    t, s, h = query.shape[-3], key.shape[-3], query.shape[-1]
    fits = (
        query.dtype in (jnp.bfloat16, jnp.float16)
        and h % 8 == 0
        and bias is None
        and (mask is None or (t % 2 == 0 and s % 2 == 0))
    )
    return "cudnn" if fits and h <= _widest_fused_head() else "xla"


def _widest_fused_head() -> int:
    """Returns cuDNN's largest supported head dimension; 0 if cuDNN is unavailable."""
    if target_platform() != "gpu" or jax.default_backend() != "gpu":
        return 0
    device = jax.devices()[0]
    if "cuda" not in device.client.platform_version.lower():
        return 0
    capability = float(getattr(device, "compute_capability", "0"))
    return 256 if capability >= 9.0 else 128 if capability >= 8.0 else 0


def is_fused_attention(primitive: Primitive, *_: Any, **__: Any) -> bool:
    """A rematerialisation policy that saves the output of cuDNN's fused attention.

    Unlike the other attention kernels, it has no checkpoint name.
    """
    return primitive.name.startswith("dot_product_attention_fwd")


def check_attention(
    query: AnyFloat,
    key: AnyFloat,
    value: AnyFloat,
    *,
    bias: AnyFloat | None = None,
    mask: jax.Array | None = None,
    is_causal: bool = False,
) -> None:
    """Raises unless the arguments of `attention` have compatible shapes.

    Raises:
      ValueError: listing every array of the wrong shape.
      TypeError: if an array is not floating.
    """
    check_floating(query=query, key=key, value=value, bias=bias)
    if not query.ndim == key.ndim == value.ndim >= 3:
        raise ValueError(
            "query, key, value must be [*b, t, n, h], [*b, s, k, h], [*b, s, k, h]; "
            f"got {query.shape}, {key.shape}, {value.shape}."
        )
    *batch, t, n, h = query.shape
    *_, s, k, _ = key.shape
    faults = []
    if key.shape != (*batch, s, k, h) or value.shape != key.shape:
        faults.append(
            f"key, value must be [*b, s, k, h] with *b = {batch}, h = {h} for a query "
            f"of shape {query.shape}; got {key.shape}, {value.shape}."
        )
    if n % k:
        faults.append(f"the {k} key and value heads must divide the {n} query heads.")
    if is_causal and t != s:
        faults.append(
            f"is_causal requires equal query and key lengths; got {t} and {s}. Pass a "
            "mask instead."
        )
    logits = (*batch, n, t, s)
    for name, array in (("bias", bias), ("mask", mask)):
        if array is not None and not (
            array.ndim == len(logits)
            and all(a in (1, b) for a, b in zip(array.shape, logits, strict=True))
        ):
            faults.append(
                f"{name} must be broadcastable to [*b, n, t, s] = {list(logits)}, with "
                f"all {len(logits)} axes; got {array.shape}."
                + _padding_hint(name, array.shape, (*batch, s))
            )
    if faults:
        raise ValueError(" ".join(faults))


def _padding_hint(
    name: str, shape: tuple[int, ...], padding_shape: tuple[int, ...]
) -> str:
    if shape != padding_shape:
        return ""
    return f" For padding pass {name}[..., None, None, :]."
