"""`DecoderConfig`: a decoder's sizes and constants, and how families differ.

One frozen dataclass describes Llama as well as Gemma or GPT-2; a family only fills it
in. Nothing here depends on a model's name.
"""

import dataclasses
import math
from typing import Any, Literal

import numpy as np

from lora_jax.models.activations import ACTIVATIONS
from lora_jax.models.expert_config import ExpertConfig
from lora_jax.models.mixer_config import MixerConfig, Sizes

KINDS = ("default", "linear", "llama3", "yarn", "longrope", "proportional")


@dataclasses.dataclass(frozen=True)
class Rope:
    """One table of rotary frequencies.

    Attributes:
      theta: base of the frequencies ``theta^(-2j / rotary_dim)``.
      rotary_dim: dimensions of a head that are rotated; even.
      kind: how the frequencies are scaled for longer contexts, one of `KINDS`.
      factor: how far the context was stretched.
      original_max_positions: the context length before that.
      low_freq_factor: llama3: wavelengths above ``original / low`` are fully stretched.
      high_freq_factor: llama3: those below ``original / high`` are not stretched.
      beta_fast: yarn: frequencies with more rotations than this in the original context
        are not stretched.
      beta_slow: yarn: those with fewer rotations than this are fully stretched.
      truncate: yarn: whether both limits are rounded to whole dimensions.
      attention_factor: yarn, longrope: factor of cosines and sines.
      divisors: longrope: divisor of each frequency in sequences of up to
        ``original_max_positions`` tokens.
      long_divisors: longrope: the same in longer ones.
      turned: proportional: how many pairs turn, the fastest; the others stand still.

    References:
      linear: https://arxiv.org/abs/2306.15595; yarn: https://arxiv.org/abs/2309.00071,
      section 3; longrope: https://arxiv.org/abs/2402.13753.
    """

    theta: float
    rotary_dim: int
    kind: Literal["default", "linear", "llama3", "yarn", "longrope", "proportional"] = (
        "default"
    )
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    divisors: tuple[float, ...] = ()
    long_divisors: tuple[float, ...] = ()
    turned: int = 0

    def frequencies(self, *, is_long: bool = False) -> np.ndarray:
        """Returns radians per token, ``[rotary_dim / 2]`` float32.

        ``is_long`` is for longrope: whether the sequence exceeds its original context.
        """
        exponents = np.arange(0, self.rotary_dim, 2) / self.rotary_dim
        plain = self.theta**-exponents
        if self.kind == "linear":
            plain = plain / self.factor
        elif self.kind == "llama3":
            plain = self._llama3(plain)
        elif self.kind == "yarn":
            plain = self._yarn(plain)
        elif self.kind == "proportional":
            plain = np.where(np.arange(len(plain)) < self.turned, plain, 0)
            plain = plain / self.factor
        elif self.kind == "longrope":
            plain = plain / np.asarray(self.long_divisors if is_long else self.divisors)
        return plain.astype(np.float32)

    def _llama3(self, plain: np.ndarray) -> np.ndarray:
        turns = self.original_max_positions * plain / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)  # 1: high frequencies
        return kept * plain + (1 - kept) * plain / self.factor

    def _yarn(self, plain: np.ndarray) -> np.ndarray:
        def dimension(turns: float) -> float:
            """The (fractional) pair with so many turns in the original context."""
            wavelength = self.original_max_positions / (turns * 2 * math.pi)
            return self.rotary_dim * math.log(wavelength) / (2 * math.log(self.theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.rotary_dim - 1)
        ramp = (np.arange(len(plain)) - low) / max(high - low, 0.001)
        kept = 1 - np.clip(ramp, 0, 1)
        return kept * plain + (1 - kept) * plain / self.factor


@dataclasses.dataclass(frozen=True)
class DecoderConfig(Sizes):
    """Sizes, constants and variants of a decoder.

    Attributes:
      vocab_size: rows of the embedding, ``v``.
      hidden_size: width of the model, ``d``.
      num_layers: number of blocks, ``l``.
      num_heads: query heads, ``n``.
      num_kv_heads: key and value heads, ``k``; divides ``n``.
      head_dim: width of a head, ``h``; need not be ``d / n``.
      mlp_size: width inside the MLP, ``f``.
      max_positions: the longest sequence.
      activation: Hugging Face's name of the MLP's activation.
      is_gated: whether the MLP is ``(act(x W_gate) * x W_up) W_down``.
      norm: RMSNorm (``"rms"``) or LayerNorm (``"layer"``).
      norm_eps: epsilon of the norms.
      norm_offset: added to a stored RMSNorm scale (Gemma: 1).
      has_norm_bias: whether a LayerNorm has a bias.
      norm_placement: norms before the sublayers, after them, or both.
      is_parallel: whether attention and MLP read the same normed input; there is one
        norm per block, before them.
      residual_scale: factor of each sublayer's output before it is added.
      qk_norm: norm of queries and keys: per head, over the whole projection, or none.
      has_qkv_bias: bias of query, key and value.
      has_output_bias: bias of the attention's output.
      has_mlp_bias: bias of the MLP.
      is_qkv_fused: whether query, key and value are one kernel, ``qkv``.
      is_gate_up_fused: whether gate and up are one kernel, ``gate_up``.
      ropes: the tables of rotary frequencies.
      layer_ropes: the table that each layer uses; None for no rotation (NoPE).
      layer_windows: sliding window of each layer; None for all (earlier) tokens.
      is_causal: whether tokens see earlier ones only; else a window is on both sides.
      rotates_pairs: whether neighbouring dimensions of a head are rotated together, not
        one of each half.
      query_growth: ``(beta, n)`` multiplies the queries at position ``p`` by ``1 + beta
        log(1 + floor(p / n))``; None for 1.
      has_learned_positions: whether there is a learned position embedding.
      key_source: number of the layer whose keys and values are used; None for own ones.
      is_key_source: whether a later layer uses this one's.
      value_is_key: whether values are the keys before their norm.
      has_value_norm: whether each head's values are normalised, without a scale.
      per_layer_size: width of what each layer reads of the tokens directly, or None.
      per_layer_vocab: rows of that embedding.
      has_layer_scale: whether a block's output is multiplied by a stored number.
      layer_changes: of each layer, the fields in which it differs and their values;
        empty where all layers are alike.
      attention_scale: scale of the scores; None for ``1 / √h``.
      divides_by_layer: whether scores are divided by the layer's number, from 1.
      attention_softcap: bound of the scores, or None.
      final_softcap: bound of the logits, or None.
      embed_scale: factor of the embedding's output.
      logit_scale: factor of the last hidden states, and so of the logits.
      is_tied: whether the head is the embedding.
      has_head: whether there is a head at all; an embedding model may have none.
      experts: the mixture of experts in place of MLPs, or None.
      qkv_clip: bound of queries, keys and values before they are rotated, or None.
      has_sinks: whether each head's softmax has one more score, a parameter.
      has_output_gate: whether attention's output is multiplied by the sigmoid of a gate
        that is projected beside the queries.
      mixer: what mixes the tokens instead of attention, or None.

    Raises:
      ValueError: if a size or constant is out of range; lists all of them.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_size: int
    max_positions: int
    activation: str = "silu"
    is_gated: bool = True
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    has_norm_bias: bool = True
    norm_placement: Literal["pre", "post", "both"] = "pre"
    is_parallel: bool = False
    residual_scale: float = 1.0
    qk_norm: Literal["head", "projection"] | None = None
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    has_mlp_bias: bool = False
    is_qkv_fused: bool = False
    is_gate_up_fused: bool = False
    ropes: tuple[Rope, ...] = ()
    layer_ropes: tuple[int | None, ...] = ()
    layer_windows: tuple[int | None, ...] = ()
    is_causal: bool = True
    rotates_pairs: bool = False
    query_growth: tuple[float, int] | None = None
    has_learned_positions: bool = False
    key_source: int | None = None
    is_key_source: bool = False
    value_is_key: bool = False
    has_value_norm: bool = False
    per_layer_size: int | None = None
    per_layer_vocab: int = 1
    has_layer_scale: bool = False
    layer_changes: tuple[tuple[tuple[str, Any], ...], ...] = ()
    attention_scale: float | None = None
    divides_by_layer: bool = False
    attention_softcap: float | None = None
    final_softcap: float | None = None
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    is_tied: bool = False
    has_head: bool = True
    experts: ExpertConfig | None = None
    qkv_clip: float | None = None
    has_sinks: bool = False
    has_output_gate: bool = False
    mixer: MixerConfig | None = None

    @property
    def predicts(self) -> bool:
        """Whether it predicts tokens: causal, and with a head."""
        return self.is_causal and self.has_head

    @property
    def scan_period(self) -> int | None:
        """How many layers repeat, so that they can be scanned; None if none do.

        1 where all layers have the same parameters. Hybrids repeat a few.
        """
        if self.experts is not None and self.experts.dense_layers:
            return None
        if not self.layer_changes:
            return 1
        changes, count = self.layer_changes, self.num_layers
        if any("key_source" in dict(change) for change in changes):
            return None
        periods = (p for p in range(1, count) if count % p == 0)
        return next((p for p in periods if changes[p:] == changes[:-p]), None)

    @property
    def has_mlp(self) -> bool:
        """Whether any layer has a plain MLP."""
        experts = self.experts
        return experts is None or experts.is_beside_mlp or bool(experts.dense_layers)

    @property
    def original_positions(self) -> int | None:
        """The longest context with longrope's short factors; None without longrope."""
        return next(
            (r.original_max_positions for r in self.ropes if r.kind == "longrope"), None
        )

    def of_layer(self, layer: int) -> "DecoderConfig":
        """What layer number ``layer`` is made with."""
        if not self.layer_changes:
            return self
        return dataclasses.replace(self, **dict(self.layer_changes[layer]))

    def _faults(self) -> list[str]:
        faults = []
        nothing = (None,) * self.num_layers
        for name in ("layer_ropes", "layer_windows"):
            object.__setattr__(self, name, getattr(self, name) or nothing)
        for name in ("layer_ropes", "layer_windows", "layer_changes"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value))
            if len(value) != self.num_layers and value:
                faults.append(
                    f"{name} must have one entry for each of the {self.num_layers} "
                    f"layers; got {len(value)}"
                )
        if self.num_heads % self.num_kv_heads:
            faults.append(
                f"num_kv_heads must divide num_heads = {self.num_heads}; "
                f"got {self.num_kv_heads}"
            )
        if self.activation not in ACTIVATIONS:
            faults.append(
                f"activation must be one of {sorted(ACTIVATIONS)}; "
                f"got {self.activation!r}"
            )
        faults += [
            f"a window must be at least 1 token; got {window!r}"
            for window in {w for w in self.layer_windows if w is not None}
            if type(window) is not int or window < 1
        ]
        optional = ("attention_scale", "attention_softcap", "final_softcap", "qkv_clip")
        for name in ("norm_eps", *optional, "residual_scale", "logit_scale"):
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and 0 < value < math.inf
            if value is not None and not is_number:
                faults.append(f"{name} must be above 0; got {value!r}")
        faults += [fault for rope in self.ropes for fault in self._rope_faults(rope)]
        return faults

    def _rope_faults(self, rope: Rope) -> list[str]:
        faults = []
        if rope.kind not in KINDS:
            faults.append(f"rope type must be one of {KINDS}; got {rope.kind!r}")
        dim = rope.rotary_dim
        changes = [dict(change) for change in self.layer_changes]
        most = max([self.head_dim, *(c.get("head_dim", 0) for c in changes)])
        if type(dim) is not int or dim % 2 or not 2 <= dim <= most:
            faults.append(
                f"rotary_dim must be even and at most head_dim = {most}; got {dim!r}"
            )
        elif rope.kind == "longrope":
            faults += [
                f"longrope needs {dim // 2} factors; got {len(factors)}"
                for factors in (rope.divisors, rope.long_divisors)
                if len(factors) != dim // 2
            ]
        if not (isinstance(rope.theta, (int, float)) and rope.theta > 1):
            faults.append(f"rope theta must be above 1; got {rope.theta!r}")
        if not (isinstance(rope.factor, (int, float)) and rope.factor > 0):
            faults.append(f"rope factor must be above 0; got {rope.factor!r}")
        if rope.kind in ("llama3", "yarn") and rope.original_max_positions < 1:
            faults.append(f"rope type {rope.kind!r} needs the original context length")
        return faults


def check_split(config: DecoderConfig) -> None:
    """Raises unless rows can be split over the mesh axis ``sequence``.

    Args:
      config: of the decoder.

    Raises:
      ValueError: naming the layers that keep a state, or attention that is not causal.
    """
    faults = [] if config.is_causal else ["its attention sees later tokens"]
    mixers = [config.of_layer(i).mixer for i in range(config.num_layers)]
    if with_state := [i for i, mixer in enumerate(mixers) if mixer is not None]:
        kinds = {type(mixers[i]).__name__.removesuffix("Config") for i in with_state}
        faults.append(
            f"layers {', '.join(map(str, with_state))} ({', '.join(sorted(kinds))}) "
            "carry a state from token to token"
        )
    if faults:
        raise ValueError(
            "the mesh axis sequence must be 1: rows can be split only where causal "
            f"attention alone mixes tokens; of this model {' and '.join(faults)}."
        )
