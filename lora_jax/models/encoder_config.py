"""Sizes, constants and variants of text and image encoders."""

import dataclasses
from typing import Literal

from lora_jax.models.activations import ACTIVATIONS
from lora_jax.models.decoder_config import Rope
from lora_jax.models.disentangled import Disentangled

# Activation of the dense layer between the pooled vector and the classifier.
POOLERS = (None, "gelu", "relu", "tanh")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvConfig:
    """A convolution of the embeddings, added to the first block's output and normed.

    Attributes:
      size: tokens that it sees; odd.
      groups: of channels; divides ``hidden_size``.
      activation: of its output, one of `POOLERS`.
    """

    size: int = 3
    groups: int = 1
    activation: str = "tanh"


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
      has_output_bias: bias of the attention's output projection.
      has_mlp_bias: biases of the MLP.
      has_norm_bias: biases of all norms.
      has_first_norm: whether the first sublayer has a norm.
      has_final_norm: whether a norm follows the last block, if norms are "pre".
      is_causal: whether tokens see earlier ones only.
      is_qkv_fused: whether query, key and value are one kernel, in that order.
      layer_ropes: each layer's rotary frequencies; empty for none.
      layer_windows: how many keys a query sees on either side, its own included, in
        each layer; None for all; empty if no layer has a window.
      num_buckets: rows of the table of relative position biases, one column a head,
        shared by all layers; None for models without one.
      disentangled: scores of distances from a table shared by all layers, or None.
      conv: a convolution beside the first block, or None.
      has_layer_scale: whether each sublayer's output has a factor per channel.
      is_gated: whether the MLP is ``(act(x W_gate) * x W_up) W_down``, with gate and up
        in one kernel.
      pooler_activation: activation of the "pooler" pooling; None without a pooler.
      pooler_input: what that pooling reads, the first token ("cls") or the mean.
      has_pooler_bias: bias of its dense layer.
      has_pooler_norm: whether a norm follows its activation.

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
    has_output_bias: bool = True
    has_mlp_bias: bool = True
    has_norm_bias: bool = True
    has_first_norm: bool = True
    has_final_norm: bool = True
    is_causal: bool = False
    is_qkv_fused: bool = False
    layer_ropes: tuple[Rope, ...] = ()
    layer_windows: tuple[int | None, ...] = ()
    num_buckets: int | None = None
    disentangled: Disentangled | None = None
    conv: ConvConfig | None = None
    has_layer_scale: bool = False
    is_gated: bool = False
    pooler_activation: Literal["gelu", "relu", "tanh"] | None = None
    pooler_input: Literal["cls", "mean"] = "cls"
    has_pooler_bias: bool = True
    has_pooler_norm: bool = False

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
            ("pooler_input", ["cls", "mean"]),
        ):
            if (value := getattr(self, name)) not in allowed:
                faults.append(f"{name} must be one of {allowed}; got {value!r}")
        if not isinstance(self.norm_eps, (int, float)) or not self.norm_eps > 0:
            faults.append(f"norm_eps must be above 0; got {self.norm_eps!r}")
        faults += [
            f"{name} must have num_layers = {self.num_layers} entries, or none; "
            f"got {len(getattr(self, name))}"
            for name in ("layer_ropes", "layer_windows")
            if len(getattr(self, name)) not in (0, self.num_layers)
        ]
        windows = [w for w in self.layer_windows if w is not None and w < 1]
        faults += [
            f"layer_windows must be at least 1, or None; got {w}" for w in windows
        ]
        return faults


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig(BlockConfig):
    """A text encoder; see `BlockConfig`.

    Attributes:
      vocab_size: rows of the word embedding, ``v``.
      embedding_size: width of the embeddings, which a dense layer brings to
        ``hidden_size``; None: they have that width.
      max_positions: the longest sequence.
      has_positions: whether there is a table of positions.
      has_embedding_norm: whether a norm follows the embeddings.
      num_token_types: rows of the token type embedding; None for models without one.
      padding_id: for RoBERTa, which numbers non-padding tokens from ``padding_id + 1``;
        None: positions are ``0 ... t-1``.
    """

    vocab_size: int
    embedding_size: int | None = None
    max_positions: int = 512
    has_positions: bool = True
    has_embedding_norm: bool = True
    num_token_types: int | None = 2
    padding_id: int | None = None
    pooler_activation: Literal["gelu", "relu", "tanh"] | None = "tanh"

    def _faults(self) -> list[str]:
        faults = super()._faults()
        faults += [
            f"{name} must be at least 1, or None; got {getattr(self, name)}"
            for name in ("num_token_types", "embedding_size")
            if getattr(self, name) is not None and getattr(self, name) < 1
        ]
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
      has_class_token: whether a token of its own comes before the patches'.
      has_patch_bias: whether the patches' projection has a bias.
      has_embedding_norm: whether a norm follows the embeddings.
      is_flat: whether class token and positions have no batch axis; the latter are an
        embedding.
    """

    image_height: int
    image_width: int
    patch_height: int
    patch_width: int
    num_channels: int = 3
    is_resizable: bool = False
    has_class_token: bool = True
    has_patch_bias: bool = True
    has_embedding_norm: bool = False
    is_flat: bool = False
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
