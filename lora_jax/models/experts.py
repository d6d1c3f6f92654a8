"""Mixtures of experts: each token goes through the few MLPs that a router chooses.

No expert has a capacity, and no token is dropped: a token's row is repeated for each of
its experts, the rows are sorted by expert, and one product multiplies each row by its
expert's kernel (`lora_jax.ops.grouped`). The sums of a token's rows, weighted by the
router, are the MLP's output. On a mesh each shard of the batch sorts its own rows, and
with an axis ``expert`` each device has the rows of its own experts.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lora_jax.array_types import AnyFloat
from lora_jax.models.activations import ACTIVATIONS, gate
from lora_jax.models.expert_config import ExpertConfig
from lora_jax.models.linear import apply_linear
from lora_jax.names import (
    BIAS,
    EXPERT,
    EXPERTS,
    FSDP,
    KERNEL,
    LAYERS,
    PARAMS,
    ROUTED,
    ROUTER,
    TENSOR,
)
from lora_jax.nn.layer_rules import register_layer
from lora_jax.ops.experts import expert_product, of_rows
from lora_jax.parallel.activation_sharding import (
    current_mesh,
    num_row_shards,
    target_platform,
)
from lora_jax.parallel.rules import is_match
from lora_jax.parallel.sequence import fold, sequence_shards, unfold
from lora_jax.tree.paths import flatten

Hidden = Float[Array, "b t d"]


class Stacks(NamedTuple):
    """The experts' matrices of scanned layers, stacked over the steps of the scan.

    A slice for one step would be copied before every product.

    Attributes:
      kernels: ``[l, e, i, o]`` each, by path.
      step: the current step of the scan.
    """

    kernels: dict[str, Array]
    step: Any = None

    def of(self, path: tuple[str, ...]) -> tuple[Array, Any] | None:
        """Returns where a layer's kernel is: its stack and the step; None elsewhere."""
        stack = self.kernels.get("/".join((*path, KERNEL)))
        return None if stack is None else (stack, self.step)


def find_stacks(model: nn.Module) -> Stacks | None:
    """Returns a decoder's scanned matrices, None if they are to be sliced.

    That is on a CPU, which copies nothing; where ``fsdp`` splits the matrices, as each
    step's are then collected from all devices, which copies them anyway; and where
    ``tensor`` does, as XLA splits those products and can't split a TPU's kernel.
    """
    mesh = current_mesh()
    if mesh is None:
        is_split = jax.device_count() > 1  # perhaps, by a user's own mesh
    else:
        is_split = mesh.shape[FSDP] * mesh.shape.get(TENSOR, 1) > 1
    if is_split or target_platform() == "cpu":
        return None
    layers = flatten(model.variables.get(PARAMS, {}).get(LAYERS, {}))
    kernels = {
        "/".join((*model.path, LAYERS, path)): leaf
        for path, leaf in layers.items()
        if is_match(f"{EXPERTS}/[^/]*/{KERNEL}", path)
    }
    return Stacks(kernels) if kernels else None


class Router(nn.Dense):
    """The scores of all experts for each token.

    Like the head, ``"all-linear"`` leaves it out; a target may name it.
    """


class Opening(nn.Dense):
    """The score that weighs the shared expert.

    Like the router, ``"all-linear"`` leaves it out; a target may name it.
    """


class ExpertDense(nn.Module):
    """A linear layer for each expert, of rows sorted by expert.

    Attributes:
      features: outputs ``o``.
      use_bias: whether each expert has a bias.
      dtype: dtype of the computation.
      num_experts: ``e``.

    Variables: ``kernel`` ``[e, i, o]``, ``bias`` ``[e, o]``.
    """

    features: int
    num_experts: int
    use_bias: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: AnyFloat, sizes: Int[Array, "*p _"], stacks: Stacks | None = None
    ) -> AnyFloat:
        """Returns ``[*p, m, o]`` for rows ``[*p, m, i]``; see `lora_experts`.

        Args:
          x: rows sorted by expert.
          sizes: rows of each expert.
          stacks: where the kernel is read if it is there, None in its own array.
        """
        init = nn.initializers.lecun_normal(batch_axis=0)
        shape = (self.num_experts, x.shape[-1], self.features)
        kernel = self.param(KERNEL, init, shape)
        stack = stacks and stacks.of(self.path)
        x = x.astype(self.dtype)
        y: Any = expert_product(0.0, None, x, kernel, sizes, None, stack)
        if self.use_bias:
            bias = self.param(BIAS, nn.initializers.zeros, shape[::2])
            y = y + of_rows(bias.astype(y.dtype), sizes, x.shape[-2])
        return y


register_layer(Router, "...i,io->...o", kind=ROUTER)
register_layer(Opening, "...i,io->...o", kind=ROUTER)
register_layer(ExpertDense, "mi,eio->mo")


class Experts(nn.Module):
    """The MLPs of all experts."""

    config: ExpertConfig
    features: int
    activation: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: AnyFloat, sizes: Int[Array, "*p _"], stacks: Stacks | None = None
    ) -> AnyFloat:
        """Returns ``[*p, m, d]`` for rows ``[*p, m, d]`` sorted by expert."""
        cfg = self.config
        options: Any = (cfg.num_experts, cfg.has_bias, self.dtype)
        gate_up = ExpertDense(2 * cfg.size, *options, name="gate_up")
        both = apply_linear(gate_up, x, sizes, stacks)
        if cfg.gate == "clamped":
            x = _clamped_gate(both, cfg)
        else:
            x = gate(ACTIVATIONS[self.activation], *jnp.split(both, 2, axis=-1))
        down = ExpertDense(self.features, *options, name="down")
        return apply_linear(down, x, sizes, stacks)


class SharedExpert(nn.Module):
    """Computes ``sigmoid(x W_opening) * (act(x W_gate) * x W_up) W_down``.

    Attributes:
      size: width inside it.
      activation: Hugging Face's name of its activation.
      dtype: dtype of the computation.
    """

    size: int
    activation: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Hidden) -> Hidden:
        """Returns ``[b, t, d]`` for ``[b, t, d]``."""

        def dense(name: str, x: Array, width: int) -> Array:
            layer = nn.Dense(width, use_bias=False, dtype=self.dtype, name=name)
            return apply_linear(layer, x)

        opening = Opening(1, use_bias=False, dtype=self.dtype, name="opening")
        both = (dense(name, x, self.size) for name in ("gate", "up"))
        inner = gate(ACTIVATIONS[self.activation], *both)
        return nn.sigmoid(opening(x)) * dense("down", inner, x.shape[-1])


class Mixture(nn.Module):
    """A mixture of experts in place of an MLP, or beside one.

    Variables: those of ``router`` and ``experts``; beside an MLP also ``router_scale``
    ``[d]`` and ``expert_scale`` ``[e]``.
    """

    config: ExpertConfig
    activation: str
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Hidden, read: Hidden | None = None, stacks: Stacks | None = None
    ) -> Hidden:
        """Returns ``[b, t, d]`` for ``[b, t, d]``.

        Args:
          x: what the experts read.
          read: what the router reads, ``x`` if None.
          stacks: where the experts' matrices are read, their own arrays if None.
        """
        cfg, (b, t, d) = self.config, x.shape
        read, ones = x if read is None else read, nn.initializers.ones
        if cfg.is_beside_mlp:
            scale = self.param("router_scale", ones, (d,)) * d**-0.5
            read = read * scale.astype(read.dtype)
        options = {"use_bias": cfg.has_router_bias, "dtype": self.dtype}
        scores = Router(cfg.num_experts, name=ROUTER, **options)(read)
        weights, chosen = route(fold(scores), cfg)
        if cfg.is_beside_mlp:
            scale = self.param("expert_scale", ones, (cfg.num_experts,))
            weights = weights * scale.astype(weights.dtype)[chosen]
        self.sow(ROUTED, "scores", scores)
        self.sow(ROUTED, "chosen", unfold(chosen, b))
        order = sort_rows(chosen.reshape(b * t, -1), cfg.num_experts)
        rows = order.gather(fold(x).reshape(b * t, d))
        experts = Experts(cfg, d, self.activation, self.dtype, name=EXPERTS)
        y = experts(rows, order.sizes, stacks)
        y = order.combine(y, weights.reshape(b * t, -1))
        y = unfold(y.reshape(*chosen.shape[:2], d), b)
        if cfg.shared_size is not None:
            options = (cfg.shared_size, self.activation, self.dtype)
            y = y + SharedExpert(*options, name="shared")(x)
        return y


def route(
    scores: Float[Array, "b t e"], config: ExpertConfig
) -> tuple[Float[Array, "b t k"], Int[Array, "b t k"]]:
    """Chooses each token's experts and their weights.

    The weights are the softmax of the scores, among all experts or, normalised, among
    those chosen; in float32, rounded to the dtype of the scores.

    Args:
      scores: the router's outputs ``[b, t, e]``.
      config: of the experts.

    Returns:
      Weights and numbers of the chosen experts, ``[b, t, k]`` each.
    """
    wide = scores.astype(jnp.float32)
    best, chosen = jax.lax.top_k(wide, config.num_chosen)
    if config.is_normalized:
        weights = jax.nn.softmax(best, axis=-1)
    else:
        weights = jnp.exp(best - jax.nn.logsumexp(wide, axis=-1, keepdims=True))
    return weights.astype(scores.dtype), chosen


class RowOrder(NamedTuple):
    """Where the rows of tokens are when sorted by expert, ``k`` rows per token.

    The ``n`` tokens are in ``s`` shards and the experts in ``c``; without a mesh both
    are 1. A shard of experts has room for all rows of its tokens.

    Attributes:
      sizes: rows of each expert ``[s, c, e / c]``.
      source: the row ``token * k + choice`` at each place ``[s, c, m]``.
      place: the place of each row ``[s, c, m]``.
      is_own: whether the row's expert is in this shard of experts ``[s, c, m]``.
    """

    sizes: Array
    source: Array
    place: Array
    is_own: Array

    def gather(self, x: Float[Array, "n d"]) -> Float[Array, "s c m d"]:
        """Returns each token's row at its places."""
        s, c, m = self.source.shape
        choices = m * s // len(x)
        rows = jnp.repeat(x, choices, axis=0).reshape(s, 1, m, -1)
        rows = jnp.broadcast_to(rows, (s, c, *rows.shape[2:]))
        return _take(rows, self.source)

    def combine(
        self, y: Float[Array, "s c m d"], weights: Float[Array, "n k"]
    ) -> Float[Array, "n d"]:
        """Returns the weighted sum of each token's rows."""
        s, c, m = self.source.shape
        n, k = weights.shape
        rows = _take(y, self.place)
        own = jnp.where(self.is_own, weights.reshape(s, 1, m), 0)
        rows = (rows * own[..., None].astype(y.dtype)).reshape(s, c, n // s, k, -1)
        return jnp.sum(rows, axis=(1, 3)).reshape(n, -1)


def sort_rows(chosen: Int[Array, "n k"], num_experts: int) -> RowOrder:
    """Sorts the rows of tokens by their expert.

    Args:
      chosen: each token's experts ``[n, k]``.
      num_experts: ``e``.

    Returns:
      The order, within each shard of the batch if a mesh is in use.

    Example:
      >>> order = sort_rows(jnp.array([[1], [0], [1]]), num_experts=2)
      >>> order.sizes.tolist(), order.source.tolist()
      ([[[1, 2]]], [[[1, 0, 2]]])
    """
    s, c = _num_shards(len(chosen), num_experts)
    expert = chosen.reshape(s, -1)
    m, own = expert.shape[1], num_experts // c
    source = jnp.argsort(expert, axis=1, stable=True)
    place = jnp.argsort(source, axis=1)
    counts = jnp.sum(expert[..., None] == jnp.arange(num_experts), axis=1)  # [s, e]
    sizes = counts.reshape(s, c, own)
    first = jnp.cumsum(counts, axis=1).reshape(s, c, own)[..., -1] - sizes.sum(axis=-1)
    shifted = (jnp.arange(m) + first[..., None]) % m  # a shard's own rows come first
    return RowOrder(
        sizes,
        jnp.take_along_axis(source[:, None], shifted, axis=2),
        (place[:, None] - first[..., None]) % m,
        expert[:, None] // own == jnp.arange(c)[:, None],
    )


def _num_shards(tokens: int, num_experts: int) -> tuple[int, int]:
    """Returns the shards of the batch and of the experts on the mesh in use."""
    mesh, shards = current_mesh(), num_row_shards() * sequence_shards()
    if mesh is None or tokens % shards:
        return 1, 1
    groups = mesh.shape.get(EXPERT, 1)
    return shards, 1 if num_experts % groups else groups


def _take(rows: Float[Array, "s c m d"], index: Int[Array, "s c m"]) -> AnyFloat:
    """Takes rows by permutations, so that no two gradients add up in one place."""

    def one(rows: Array, index: Array) -> Array:
        return rows.at[index].get(unique_indices=True, mode="promise_in_bounds")

    return jax.vmap(jax.vmap(one))(rows, index)


def _clamped_gate(both: AnyFloat, config: ExpertConfig) -> AnyFloat:
    """Computes gpt-oss's gate; see `ExpertConfig`."""

    @jax.checkpoint
    def compute(both: Array) -> Array:
        pairs = both.reshape(*both.shape[:-1], -1, 2)
        x = jnp.minimum(pairs[..., 0], config.gate_limit)
        up = jnp.clip(pairs[..., 1], -config.gate_limit, config.gate_limit)
        return (up + 1) * (x * jax.nn.sigmoid(config.gate_alpha * x))

    return compute(both)
