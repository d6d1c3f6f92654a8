"""`EncoderDecoderConfig`: sizes, constants and variants of an encoder–decoder."""

import dataclasses
import math

from lora_jax.models.activations import ACTIVATIONS


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderDecoderConfig:
    """An encoder–decoder with relative positions (T5).

    Attributes:
      vocab_size: rows of the embedding that encoder and decoder share, ``v``.
      hidden_size: width of the model, ``d``.
      num_layers: blocks of the encoder.
      num_decoder_layers: blocks of the decoder; 0 for an encoder alone, which has no
        head either.
      num_heads: attention heads, ``n``.
      head_dim: width of a head, ``h``.
      mlp_size: width inside the MLP, ``f``.
      activation: one of `ACTIVATIONS`, by its Hugging Face name.
      is_gated: whether the MLP is ``(act(x W_gate) * x W_up) W_down``.
      norm_eps: epsilon of the norms.
      num_buckets: rows of a table of relative position biases.
      max_distance: the least distance that has the last bucket.
      has_layer_biases: whether every block has such a table; else the first of each
        stack has the one that all use.
      is_tied: whether the head is the embedding.
      logit_scale: factor of the decoder's last hidden states.
      start_id: the token that a decoder starts from.
      max_positions: the longest row; relative positions set no bound.

    Raises:
      ValueError: if a size or constant is out of range; lists all of them.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    head_dim: int
    mlp_size: int
    activation: str = "relu"
    is_gated: bool = False
    norm_eps: float = 1e-6
    num_buckets: int = 32
    max_distance: int = 128
    has_layer_biases: bool = False
    is_tied: bool = True
    logit_scale: float = 1.0
    start_id: int = 0
    max_positions: int = 2**24

    def __post_init__(self):
        sizes = [f.name for f in dataclasses.fields(self) if f.type is int]
        least = {"num_decoder_layers": 0, "start_id": 0, "num_buckets": 4}
        faults = [
            f"{name} must be an integer of at least {least.get(name, 1)}; got {value!r}"
            for name in sizes
            if type(value := getattr(self, name)) is not int
            or value < least.get(name, 1)
        ]
        if not faults and self.num_buckets % 2:
            faults.append(f"num_buckets must be even; got {self.num_buckets}")
        if not faults and self.max_distance <= self.num_buckets // 2:
            faults.append(
                f"max_distance must be above num_buckets / 2 = {self.num_buckets // 2};"
                f" got {self.max_distance}"
            )
        if not faults and self.start_id >= self.vocab_size:
            faults.append(
                f"start_id must be below vocab_size = {self.vocab_size}; "
                f"got {self.start_id}"
            )
        if self.activation not in ACTIVATIONS:
            faults.append(
                f"activation must be one of {sorted(ACTIVATIONS)}; "
                f"got {self.activation!r}"
            )
        for name in ("norm_eps", "logit_scale"):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and 0 < value < math.inf):
                faults.append(f"{name} must be above 0; got {value!r}")
        if faults:
            raise ValueError("EncoderDecoderConfig: " + "; ".join(faults) + ".")

    @property
    def predicts(self) -> bool:
        """Whether it predicts tokens; an encoder alone doesn't."""
        return self.num_decoder_layers > 0
