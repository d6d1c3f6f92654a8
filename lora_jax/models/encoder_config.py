"""Sizes, constants and variants of text and image encoders."""

import dataclasses
from typing import Literal

from lora_jax.models.activations import ACTIVATIONS

# Activation of the dense layer between the first token and the classifier.
POOLERS = (None, "relu", "tanh")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """The fields that text and image encoders share.

    Attributes:
      hidden_size: width of the model, ``d``.
      num_layers: number of blocks, ``l``.
      num_heads: attention heads, ``n``; divides ``hidden_size``.
      mlp_size: width inside the MLP, ``f``.
      activation: one of `ACTIVATIONS`, by its Hugging Face name.
      norm_eps: LayerNorm's epsilon.
      norm_placement: norms of the sublayers' inputs ("pre", and a last one after the
        blocks) or of the sums ("post").
      has_qkv_bias: bias of query, key and value.
      has_layer_scale: whether each sublayer's output has a factor per channel.
      is_gated: whether the MLP is ``(act(x W_gate) * x W_up) W_down``, with gate and up
        in one kernel.
      pooler_activation: activation of the "pooler" pooling; None without a pooler.

    Raises:
      ValueError: if a size or constant is out of range; lists all of them.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    activation: str = "gelu"
    norm_eps: float = 1e-12
    norm_placement: Literal["pre", "post"] = "post"
    has_qkv_bias: bool = True
    has_layer_scale: bool = False
    is_gated: bool = False
    pooler_activation: Literal["relu", "tanh"] | None = None

    def __post_init__(self):
        if faults := self._faults():
            raise ValueError(f"{type(self).__name__}: " + "; ".join(faults) + ".")

    def _faults(self) -> list[str]:
        sizes = [f.name for f in dataclasses.fields(self) if f.type is int]
        faults = [
            f"{name} must be a positive integer; got {getattr(self, name)!r}"
            for name in sizes
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1
        ]
        if not faults and self.hidden_size % self.num_heads:
            faults.append(
                f"num_heads must divide hidden_size = {self.hidden_size}; "
                f"got {self.num_heads}"
            )
        for name, allowed in (
            ("activation", sorted(ACTIVATIONS)),
            ("norm_placement", ["post", "pre"]),
            ("pooler_activation", list(POOLERS)),
        ):
            if (value := getattr(self, name)) not in allowed:
                faults.append(f"{name} must be one of {allowed}; got {value!r}")
        if not isinstance(self.norm_eps, (int, float)) or not self.norm_eps > 0:
            faults.append(f"norm_eps must be above 0; got {self.norm_eps!r}")
        return faults


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(BlockConfig):
    """A text encoder; see `BlockConfig`.

    Attributes:
      vocab_size: rows of the word embedding, ``v``.
      max_positions: the longest sequence.
      num_token_types: rows of the token type embedding; None for models without one.
      padding_id: for RoBERTa, which numbers non-padding tokens from ``padding_id + 1``;
        None: positions are ``0 ... t-1``.
    """

    vocab_size: int
    max_positions: int = 512
    num_token_types: int | None = 2
    padding_id: int | None = None
    pooler_activation: Literal["relu", "tanh"] | None = "tanh"

    def _faults(self) -> list[str]:
        faults = super()._faults()
        if self.num_token_types is not None and self.num_token_types < 1:
            faults.append(
                f"num_token_types must be at least 1, or None; "
                f"got {self.num_token_types}"
            )
        if self.padding_id is not None and self.padding_id < 0:
            faults.append(f"padding_id must not be negative; got {self.padding_id}")
        return faults

    @property
    def position_rows(self) -> int:
        """Rows of the position embedding."""
        skipped = 0 if self.padding_id is None else self.padding_id + 1
        return self.max_positions + skipped


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageEncoderConfig(BlockConfig):
    """An image encoder, patch by patch; see `BlockConfig`.

    Attributes:
      image_height: in pixels, of the images that the position table is for.
      image_width: the same.
      patch_height: in pixels.
      patch_width: the same.
      num_channels: channels of an image, ``c``.
      is_resizable: whether images may have other sizes: the position table is resized
        to their number of patches.
    """

    image_height: int
    image_width: int
    patch_height: int
    patch_width: int
    num_channels: int = 3
    is_resizable: bool = False
    norm_placement: Literal["pre", "post"] = "pre"

    def _faults(self) -> list[str]:
        faults = super()._faults()
        if not faults and 0 in self.grid(self.image_height, self.image_width):
            faults.append(
                f"image_height, image_width must be at least patch_height, "
                f"patch_width = {self.patch_height}, {self.patch_width}; "
                f"got {self.image_height}, {self.image_width}"
            )
        return faults

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns the number of patches in a column and in a row of an image."""
        return height // self.patch_height, width // self.patch_width
