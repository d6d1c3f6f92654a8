"""What mixes the tokens in a layer of a hybrid, where it isn't attention."""

import dataclasses

from lora_jax.attention.gated_delta import CHUNK


class Sizes:
    """Base of configs: checks that all integers are positive, then `_faults`."""

    def __post_init__(self):
        fields = dataclasses.fields(self)  # pyright: ignore[reportArgumentType]
        faults = [
            f"{field.name} must be a positive integer; got {value!r}"
            for field in fields
            if field.type is int
            and (type(value := getattr(self, field.name)) is not int or value < 1)
        ]
        if not faults:
            faults += self._faults()
        if faults:
            raise ValueError(f"{type(self).__name__}: {'; '.join(faults)}.")

    def _faults(self) -> list[str]:
        return []


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig(Sizes):
    """Sizes of a Gated DeltaNet, as in Qwen3.5.

    Attributes:
      num_heads: heads of values, ``n``.
      num_key_heads: heads of queries and keys; divides ``n``.
      key_dim: width of a key head, ``h``.
      value_dim: width of a value head, ``u``.
      conv_size: tokens that the convolution sees.

    Raises:
      ValueError: if a size is out of range; every fault is named.
    """

    num_heads: int
    num_key_heads: int
    key_dim: int
    value_dim: int
    conv_size: int

    def _faults(self) -> list[str]:
        if self.num_heads % self.num_key_heads:
            return [
                f"num_key_heads must divide num_heads = {self.num_heads}; got "
                f"{self.num_key_heads}"
            ]
        return []

    @property
    def conv_channels(self) -> int:
        """Channels that are convolved: queries, keys and values."""
        keys, values = (
            self.num_key_heads * self.key_dim,
            self.num_heads * self.value_dim,
        )
        return 2 * keys + values

    def token_flops(self, tokens: int) -> float:
        """FLOPs per token of the matrix products of `gated_delta_rule`.

        Args:
          tokens: of a row.

        Returns:
          ``2 n (C (3h + 2u) + 3 h u + 2 C² ⌈log2 C⌉)`` with chunks of ``C`` tokens;
          the last is the system's inverse.
        """
        c, h, u = min(CHUNK, tokens), self.key_dim, self.value_dim
        inverse = 2 * c * c * (c - 1).bit_length()
        return 2 * self.num_heads * (c * (3 * h + 2 * u) + 3 * h * u + inverse)


@dataclasses.dataclass(frozen=True)
class ShortConvConfig(Sizes):
    """Sizes of a gated short convolution, as in LFM2.

    Attributes:
      conv_size: tokens that it sees.
      has_bias: whether it and its linear layers have biases.

    Raises:
      ValueError: if a size is out of range.
    """

    conv_size: int
    has_bias: bool = False

    def token_flops(self, tokens: int) -> float:
        """FLOPs per token of matrix products without a kernel: none."""
        del tokens
        return 0.0


MixerConfig = DeltaNetConfig | ShortConvConfig
