"""LoRAAttention: multi-head attention with LoRA on any of its projections."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype, Initializer, PrecisionLike

from lora_jax.array_types import AnyFloat, PRNGKey
from lora_jax.attention.dot_product import Implementation, attention, check_attention
from lora_jax.config import LoRAConfig
from lora_jax.names import BIAS, KERNEL
from lora_jax.nn.apply import base_weight, dropout_key
from lora_jax.nn.base import FrozenLayer, LoRALayer, check_config
from lora_jax.nn.lora_layers import LoRADenseGeneral
from lora_jax.ops.einsum import lora_einsum
from lora_jax.ops.factors import Factors
from lora_jax.ops.product import check_floating
from lora_jax.ops.shared import shared_hidden

CACHE = "cache"


class _Projected(NamedTuple):
    """The base output of a projection, and the weights its adapter needs."""

    y: AnyFloat  # [*b, t, n, h]
    kernel: AnyFloat  # [d, n, h]
    bias: AnyFloat | None  # [n, h]
    factors: Factors | None
    scaling: float


class _Projection(LoRALayer, nn.DenseGeneral):
    """A `LoRADenseGeneral` whose adapter is applied by the caller.

    Layers with the same input can thus share one product ``x @ [A1 | A2 | ...]``.
    """

    @nn.compact
    def __call__(self, inputs: jax.Array) -> _Projected:
        y, factors = super().__call__(inputs), self._factors(inputs)
        kernel, bias = (base_weight(self, name) for name in (KERNEL, BIAS))
        scaling = self.lora.scaling_for(self._lora_path())
        return _Projected(y, kernel, bias, factors, scaling)


class _FrozenLayerNorm(FrozenLayer, nn.LayerNorm):
    pass


class LoRAAttention(nn.Module):
    """Multi-head dot-product attention with LoRA on any of its projections.

    Computes ``softmax(q kᵀ / √h) v`` for each head, with
    ``q = x Wq + scaling * (x Aq) Bq`` and likewise k, v and the output projection.

    A drop-in replacement for `flax.linen.MultiHeadDotProductAttention`: the same
    arguments and KV cache, and its parameters load into ``frozen`` unchanged.
    Projections with the same input share one product ``x @ [Aq | Ak | Av]`` and one
    adapter dropout mask: all three in self-attention, key and value in cross-attention.

    The softmax is in float32. `jax.nn.dot_product_attention` computes it (on cuDNN
    without storing the attention weights), except with attention dropout,
    ``sow_weights`` or a ``precision``, where `flax.linen.dot_product_attention` does.

    Attributes:
      num_heads: number of query heads ``n``.
      num_kv_heads: number of key and value heads ``k``, a divisor of ``n``; default
        ``n``. Query head ``j`` attends to key head ``j // (n / k)``.
      qkv_features: ``n * h``; default: the features of the input.
      out_features: features of the output; default: those of the input.
      use_bias: whether the projections have a bias.
      is_causal: whether position ``t`` attends to positions ``0 ... t`` only.
      dropout_rate: dropout rate of the attention weights; for the adapters see
        ``lora``.
      broadcast_dropout: whether all heads and rows share one attention dropout mask.
      deterministic: disables both dropouts; may be given at the call instead, and must
        be given in one place if either rate is above 0.
      normalize_qk: whether query and key get a layer norm (``query_ln``, ``key_ln``).
      decode: whether to use a KV cache: `init` on a whole sequence allocates it, then
        each call appends its positions (one or more) and attends to all so far.
      dtype: computation dtype; default: promoted from inputs and parameters.
      param_dtype: dtype of the parameters.
      precision: as in `jax.lax.dot_general`.
      kernel_init: initialiser of the kernels.
      out_kernel_init: initialiser of the output kernel; default ``kernel_init``.
      bias_init: initialiser of the biases.
      out_bias_init: initialiser of the output bias; default ``bias_init``.
      implementation: ``"xla"`` or ``"cudnn"``; default: see
        `lora_jax.attention.dot_product.choose_implementation`.
      lora: adapter config; the projections are ``query``, ``key``, ``value``, ``out``.

    Variables: ``frozen`` (``{query,key,value}/{kernel,bias}`` ``[d, n, h]`` and
    ``[n, h]``, ``out/{kernel,bias}`` ``[n, h, d]`` and ``[d]``), ``lora``
    (``query/lora_a`` ``[d, r]``, ``query/lora_b`` ``[r, n, h]`` and so on,
    ``out/lora_a`` ``[n, h, r]``, ``out/lora_b`` ``[r, d]``), ``cache`` with ``decode``
    (``cached_key``, ``cached_value`` ``[*b, s, k, h]``, ``cache_index``).

    Example:
      >>> config = LoRAConfig(rank=2, targets=["query", "value"])
      >>> layer = LoRAAttention(num_heads=4, num_kv_heads=2, lora=config)
      >>> x = jnp.ones((1, 5, 16))
      >>> variables = layer.init(jax.random.key(0), x)
      >>> layer.apply(variables, x).shape, sorted(variables["lora"])
      ((1, 5, 16), ['query', 'value'])

    References:
      Hu et al., https://arxiv.org/abs/2106.09685, section 4.2; grouped queries:
      Ainslie et al., https://arxiv.org/abs/2305.13245.
    """

    num_heads: int
    num_kv_heads: int | None = None
    qkv_features: int | None = None
    out_features: int | None = None
    use_bias: bool = True
    is_causal: bool = False
    dropout_rate: float = 0.0
    broadcast_dropout: bool = True
    deterministic: bool | None = None
    normalize_qk: bool = False
    decode: bool = False
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    precision: PrecisionLike = None
    kernel_init: Initializer = nn.linear.default_kernel_init
    out_kernel_init: Initializer | None = None
    bias_init: Initializer = nn.initializers.zeros_init()
    out_bias_init: Initializer | None = None
    implementation: Implementation = None
    lora: LoRAConfig = LoRAConfig()

    def __post_init__(self) -> None:
        """Raises unless ``lora`` is a config."""
        check_config(self.lora)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        inputs_q: AnyFloat,
        inputs_k: AnyFloat | None = None,
        inputs_v: AnyFloat | None = None,
        *,
        bias: AnyFloat | None = None,
        mask: jax.Array | None = None,
        deterministic: bool | None = None,
        dropout_rng: PRNGKey | None = None,
        sow_weights: bool = False,
    ) -> AnyFloat:
        """Attends from ``inputs_q`` to ``inputs_k`` and ``inputs_v``.

        Args:
          inputs_q: ``[*b, t, d]``.
          inputs_k: ``[*b, s, d]``; default ``inputs_q`` (self-attention).
          inputs_v: ``[*b, s, d]``; default ``inputs_k``.
          bias: added to the logits, broadcastable to ``[*b, n, t, s]``.
          mask: true where a query may attend, broadcastable to ``[*b, n, t, s]``; in
            `decode`, ``s`` is the length of the cache.
          deterministic: disables both dropouts.
          dropout_rng: key for attention dropout; default: the ``dropout`` stream.
          sow_weights: whether to sow the attention weights into ``intermediates``.

        Returns:
          ``[*b, t, out_features]``.

        Raises:
          ValueError: if sizes, masks or the cache are incompatible, or dropout is used
            without ``deterministic``.
          TypeError: if an input is not floating.
        """
        if inputs_k is None and inputs_v is not None:
            raise ValueError(
                "inputs_k must be given if inputs_v is; got None. To use one array for "
                "both, pass it as inputs_k."
            )
        inputs_k = inputs_q if inputs_k is None else inputs_k
        inputs_v = inputs_k if inputs_v is None else inputs_v
        check_floating(inputs_q=inputs_q, inputs_k=inputs_k, inputs_v=inputs_v)
        if not 0.0 <= self.dropout_rate < 1.0:
            raise ValueError(
                f"dropout_rate must be in [0, 1); got {self.dropout_rate}."
            )
        if self.dropout_rate > 0.0 or self.lora.dropout_rate > 0.0:
            deterministic = nn.merge_param(
                "deterministic", self.deterministic, deterministic
            )
        else:
            deterministic = True
        drops = self.dropout_rate > 0.0 and not deterministic
        if drops and dropout_rng is None:
            dropout_rng = dropout_key(self, f"dropout_rate={self.dropout_rate}")

        query, key, value = self._project(
            {"query": inputs_q, "key": inputs_k, "value": inputs_v}, deterministic
        )
        if self.normalize_qk:
            norm = functools.partial(
                _FrozenLayerNorm,
                use_bias=False,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                lora=self.lora,
            )
            query, key = norm(name="query_ln")(query), norm(name="key_ln")(key)
        bias, mask = (None if a is None else jnp.asarray(a) for a in (bias, mask))
        seen, is_causal = None, self.is_causal
        if self.decode:
            key, value, seen = self._cached(query, key, value)
            is_causal = is_causal and seen is None
        check_attention(query, key, value, bias=bias, mask=mask, is_causal=is_causal)
        mask = _both(mask, seen)

        if drops or sow_weights or self.precision is not None:
            if is_causal:
                t = query.shape[-3]
                mask = _both(mask, jnp.tri(t, dtype=bool).reshape(*_ones(query), t, t))
            groups = query.shape[-2] // key.shape[-2]
            y = nn.dot_product_attention(
                query,
                jnp.repeat(key, groups, axis=-2),  # [*b, s, n, h]
                jnp.repeat(value, groups, axis=-2),
                bias=bias,
                mask=mask,
                dropout_rng=dropout_rng,
                dropout_rate=self.dropout_rate,
                broadcast_dropout=self.broadcast_dropout,
                deterministic=not drops,
                precision=self.precision,
                force_fp32_for_softmax=True,
                module=self if sow_weights else None,
            ).astype(query.dtype)
        else:
            y = attention(
                query,
                key,
                value,
                bias=bias,
                mask=mask,
                is_causal=is_causal,
                implementation=self.implementation,
            )
        return LoRADenseGeneral(
            self.out_features or inputs_q.shape[-1],
            axis=(-2, -1),
            kernel_init=self.out_kernel_init or self.kernel_init,
            bias_init=self.out_bias_init or self.bias_init,
            name="out",
            **self._shared_fields(),
        )(y, deterministic)

    def _shared_fields(self) -> dict[str, Any]:
        return {
            "use_bias": self.use_bias,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "precision": self.precision,
            "lora": self.lora,
        }

    def _project(
        self, inputs: dict[str, AnyFloat], deterministic: bool
    ) -> list[AnyFloat]:
        """Returns query, key and value heads ``[*b, t, n, h]``, updates included."""
        features = self.qkv_features or inputs["query"].shape[-1]
        n = self.num_heads
        k = n if self.num_kv_heads is None else self.num_kv_heads
        faults = [
            f"{name} must be at least 1; got {size}."
            for name, size in (("num_heads", n), ("num_kv_heads", k))
            if size < 1
        ]
        if not faults and features % n:
            faults.append(
                f"qkv_features must be a multiple of num_heads = {n}; got {features}."
            )
        if not faults and n % k:
            faults.append(
                f"num_heads must be a multiple of num_kv_heads = {k}; got {n}."
            )
        if faults:
            raise ValueError(" ".join(faults))
        projected = {
            name: _Projection(
                (n if name == "query" else k, features // n),
                kernel_init=self.kernel_init,
                bias_init=self.bias_init,
                name=name,
                **self._shared_fields(),
            )(x)
            for name, x in inputs.items()
        }
        heads = {name: part.y for name, part in projected.items()}
        for x in {id(x): x for x in inputs.values()}.values():
            adapted = {
                name: (part, part.factors)
                for name, part in projected.items()
                if inputs[name] is x and part.factors is not None
            }
            if not adapted:
                continue
            x = x.astype(heads[next(iter(adapted))].dtype)
            options: dict[str, Any] = {"precision": self.precision}
            if not deterministic and (rate := self.lora.dropout_rate):
                key = dropout_key(self, f"lora.dropout_rate={rate}")
                options |= {"dropout_rate": rate, "dropout_key": key}
            all_a = [factors.lora_a for _, factors in adapted.values()]
            hidden = shared_hidden(x, all_a, **options)
            for (name, (part, factors)), h in zip(adapted.items(), hidden, strict=True):
                heads[name] = lora_einsum(
                    "...d,dnh->...nh",
                    x,
                    part.kernel,
                    factors.lora_a,
                    factors.lora_b,
                    scaling=part.scaling,
                    bias=part.bias,
                    magnitude=factors.magnitude,
                    base_output=part.y,
                    hidden=h,
                    precision=self.precision,
                )
        return list(heads.values())

    def _cached(
        self, query: AnyFloat, key: AnyFloat, value: AnyFloat
    ) -> tuple[AnyFloat, AnyFloat, jax.Array | None]:
        """Appends to the KV cache; returns all keys and values, and the mask."""
        is_initialized = self.has_variable(CACHE, "cached_key")
        cached_key = self.variable(CACHE, "cached_key", jnp.zeros_like, key)
        cached_value = self.variable(CACHE, "cached_value", jnp.zeros_like, value)
        index = self.variable(CACHE, "cache_index", jnp.zeros, (), jnp.int32)
        if not is_initialized:
            return key, value, None
        *batch, s, k, h = cached_key.value.shape
        t = query.shape[-3]
        if key.shape != (*batch, t, k, h) or t > s:
            raise ValueError(
                f"decode takes at most {s} new positions t, the size of its cache: "
                f"queries and keys [*b, t, heads, h] with *b = {batch}; got "
                f"{query.shape} and {key.shape}."
            )

        def append(cache: nn.Variable, new: AnyFloat) -> AnyFloat:
            at = (*[0] * len(batch), index.value, 0, 0)
            cache.value = jax.lax.dynamic_update_slice(
                cache.value, new.astype(cache.value.dtype), at
            )
            return cache.value

        key, value = append(cached_key, key), append(cached_value, value)
        position = index.value + jnp.arange(t)[:, None]  # [t, 1]
        index.value = index.value + t
        seen = jnp.arange(s) <= position  # [t, s]
        return key, value, seen.reshape(*_ones(query), t, s)


def _ones(query: AnyFloat) -> tuple[int, ...]:
    """Returns size 1 for each batch and head axis of a broadcast mask."""
    return (1,) * (query.ndim - 2)


def _both(mask: jax.Array | None, other: jax.Array | None) -> jax.Array | None:
    if mask is None or other is None:
        return other if mask is None else mask
    return jnp.logical_and(mask, other)
