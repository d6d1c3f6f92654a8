"""Causal attention on TPU with JAX's splash attention kernel.

`jax.experimental.pallas.ops.tpu.splash_attention` computes the scores block by block in
on-chip memory and skips masked blocks. The compiler can't partition a Pallas kernel, so
on a mesh it runs under `jax.shard_map`, split by rows and heads.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from lora_jax.names import ATTENDED, BATCH_AXES, TENSOR
from lora_jax.parallel.activation_sharding import (
    current_mesh,
    num_row_shards,
    target_platform,
)

LANES = 128  # block sizes are multiples of this
BLOCKS = (512, 256, 128)  # block sizes in tokens; the first that divides a row is used


def can_splash(query: Float[Array, "b t n h"], key: Float[Array, "b s k h"]) -> bool:
    """Returns whether the splash kernel supports these arrays on the target devices.

    It needs a TPU and rows of at least one block; with several devices also a mesh that
    divides the rows and the heads.
    """
    if target_platform() != "tpu" or query.shape[1] < LANES:
        return False
    mesh = current_mesh()
    if mesh is None:
        return jax.device_count() == 1
    return (
        query.shape[0] % num_row_shards() == 0
        and key.shape[2] % mesh.shape[TENSOR] == 0
    )


def splash_attention(
    query: Float[Array, "b t n h"],
    key: Float[Array, "b t k h"],
    value: Float[Array, "b t k h"],
    *,
    scale: float,
    softcap: float | None = None,
    windows: tuple[int | None, ...] = (None,),
    window_index: Int[Array, ""] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    is_interpreted: bool = False,
) -> Float[Array, "b t n h"]:
    """Computes causal attention; see `lora_jax.attention.causal.causal_attention`.

    Args:
      query: ``[b, t, n, h]``.
      key: ``[b, t, k, h]``.
      value: ``[b, t, k, h]``.
      scale: factor of the scores.
      softcap: bound on the scores, or None.
      windows: the possible window sizes; each compiles its own kernel.
      window_index: traced index into ``windows``; may be None if there is only one.
      segment_ids: ``[b, t]``, the example each token belongs to, or None.
      is_interpreted: whether to interpret the kernel as plain JAX, on any device.

    Returns:
      ``[b, t, n, h]``, in the dtype of ``query``.
    """
    branches = [
        functools.partial(_attend, scale, softcap, window, is_interpreted)
        for window in windows
    ]

    def attend(window_index, *arrays):
        if len(branches) == 1:
            return branches[0](*arrays)
        return jax.lax.switch(window_index, branches, *arrays)

    mesh = current_mesh()
    if mesh is not None and math.prod(mesh.shape.values()) > 1:
        heads = PartitionSpec(BATCH_AXES, None, TENSOR)
        rows, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
        attend = jax.shard_map(
            attend,
            in_specs=(whole, heads, heads, heads, rows),
            out_specs=heads,
            check_vma=False,  # unsupported for Pallas kernels
        )
    return attend(window_index, query, key, value, segment_ids)


def _attend(
    scale: float,
    softcap: float | None,
    window: int | None,
    is_interpreted: bool,
    query: Array,
    key: Array,
    value: Array,
    segment_ids: Array | None,
) -> Array:
    """Runs the kernel on one device's rows and heads."""
    from jax.experimental.pallas.ops.tpu import (  # slow to import
        splash_attention as splash,
    )

    t, n = query.shape[1:3]
    rest = -t % LANES  # padding at the end, masked for all other tokens
    size = t + rest
    if window is None or window >= t:
        mask = splash.CausalMask((size, size))
    else:
        mask = splash.LocalMask((size, size), (window - 1, 0), offset=0)
    block = next(block for block in BLOCKS if size % block == 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * n),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=ATTENDED,
        interpret=is_interpreted,
    )

    def heads_first(x):
        return jnp.pad(x.swapaxes(1, 2), [(0, 0), (0, 0), (0, rest), (0, 0)])

    ids = None
    if segment_ids is not None:
        ids = jnp.pad(segment_ids, [(0, 0), (0, rest)], constant_values=-1)
        ids = splash.SegmentIds(ids, ids)
    query = query * jnp.asarray(scale, query.dtype)
    out: Any = jax.vmap(kernel)(*map(heads_first, (query, key, value)), ids)
    return out[:, :, :t].swapaxes(1, 2)
