"""Embeddings of an encoder: of tokens, or of image patches."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lora_jax.models.encoder_block import make_norm
from lora_jax.models.encoder_config import EncoderConfig, ImageEncoderConfig
from lora_jax.parallel.activation_sharding import shard_rows
from lora_jax.parallel.mesh import promote_table

TokenIds = Int[Array, "b t"]
Pixels = Float[Array, "b c y x"]
Hidden = Float[Array, "b t d"]


def check_tokens(max_positions: int, input_ids: Any, **others: Any) -> None:
    """Raises unless the arrays are a batch ``[b, t]`` of tokens that fits a model.

    Args:
      max_positions: the model's longest row.
      input_ids: token ids.
      **others: arrays of the same shape, or None.

    Raises:
      ValueError: if the shapes differ or the rows are too long.
      TypeError: if ``input_ids`` are not integers.
    """
    if not jnp.issubdtype(input_ids.dtype, jnp.integer):
        raise TypeError(
            f"input_ids must be integers [b, t]; got dtype {input_ids.dtype}. "
            "Token ids come from a tokenizer; `astype(int32)` if these are ids."
        )
    arrays = {"input_ids": input_ids, **others}
    shapes = {name: x.shape for name, x in arrays.items() if x is not None}
    shape = input_ids.shape
    if len(shape) != 2 or set(shapes.values()) != {shape}:
        raise ValueError(
            f"{', '.join(arrays)} must share one shape [b, t]; got "
            f"{', '.join(f'{name} {found}' for name, found in shapes.items())}. A "
            "single sequence needs a batch dimension: `ids[None]`."
        )
    if shape[1] > max_positions:
        raise ValueError(
            f"input_ids must have at most max_positions = {max_positions} tokens a "
            f"row; got shape {shape}. Truncate when tokenising, or pack shorter rows."
        )


class Embeddings(nn.Module):
    """Sums word, position and token type embeddings and normalises the sum.

    Where the embeddings are narrower than the model, a dense layer follows the norm.
    """

    config: EncoderConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, input_ids: TokenIds, token_type_ids: TokenIds | None = None
    ) -> Hidden:
        """Returns ``[b, t, d]`` for ids ``[b, t]``; without types all are type 0."""
        cfg = self.config
        width = cfg.embedding_size or cfg.hidden_size
        # No dtype here: it would cast the whole table, not just the rows looked up.
        word = nn.Embed(cfg.vocab_size, width, promote_dtype=promote_table, name="word")
        x = shard_rows(word(input_ids))
        if cfg.has_positions:
            positions = jnp.arange(input_ids.shape[1])
            if cfg.padding_id is not None:
                positions = token_positions(input_ids, cfg.padding_id)
            x = x + nn.Embed(cfg.position_rows, width, name="position")(positions)
        if cfg.num_token_types is not None:
            if token_type_ids is None:
                token_type_ids = jnp.zeros((1, 1), jnp.int32)
            table = nn.Embed(cfg.num_token_types, width, name="token_type")
            x = x + table(token_type_ids)
        elif token_type_ids is not None:
            raise ValueError(
                "token_type_ids must not be given: this model has no token types."
            )
        x = x.astype(self.dtype)
        if cfg.has_embedding_norm:
            x = make_norm(cfg, self.dtype, "norm")(x)
        if cfg.embedding_size is None:
            return x
        return nn.Dense(cfg.hidden_size, dtype=self.dtype, name="projection")(x)


def token_positions(input_ids: TokenIds, padding_id: int) -> TokenIds:
    """Returns RoBERTa's positions: ``padding_id`` plus the count of non-padding tokens.

    Padding itself is at position ``padding_id``.

    Example:
      >>> token_positions(jnp.array([[0, 7, 1, 2, 1]]), 1).tolist()
      [[2, 3, 1, 4, 1]]
    """
    is_token = (input_ids != padding_id).astype(jnp.int32)
    return jnp.cumsum(is_token, axis=1) * is_token + padding_id


class PatchEmbeddings(nn.Module):
    """Embeds patches row by row, prepends the class token, and adds positions."""

    config: ImageEncoderConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, pixels: Pixels) -> Hidden:
        """Returns ``[b, (1 +) patches, d]`` for images ``[b, c, y, x]``."""
        cfg, width = self.config, self.config.hidden_size
        grid = cfg.grid(*pixels.shape[2:])
        trained = cfg.grid(cfg.image_height, cfg.image_width)
        patch = (cfg.patch_height, cfg.patch_width)
        convolve = nn.Conv(
            *(width, patch, patch),
            padding="VALID",
            use_bias=cfg.has_patch_bias,
            dtype=self.dtype,
            name="patch",
        )
        normal = nn.initializers.normal(0.02)
        first: Any = None
        if cfg.has_class_token:
            shape = (width,) if cfg.is_flat else (1, 1, width)
            first = self.param("cls", normal, shape)
        count = cfg.has_class_token + trained[0] * trained[1]
        if cfg.is_flat:
            table = nn.Embed(count, width, name="position")
            positions = table(jnp.arange(count))[None]
        else:
            positions = self.param("position", normal, (1, count, width))
        if grid != trained:
            positions = resize_positions(positions, trained, grid)

        x = convolve(pixels.transpose(0, 2, 3, 1))  # [b, *grid, d]
        x = x.reshape(len(pixels), -1, width)
        if first is not None:
            first = jnp.broadcast_to(first.astype(self.dtype), (len(pixels), 1, width))
            x = jnp.concatenate([first, x], axis=1)
        x = x + positions.astype(self.dtype)
        return make_norm(cfg, self.dtype, "norm")(x) if cfg.has_embedding_norm else x


def resize_positions(
    table: Float[Array, "1 s d"], grid: tuple[int, int], wanted: tuple[int, int]
) -> Float[Array, "1 t d"]:
    """Resizes a table of patch positions bicubically, in float32.

    Args:
      table: ``[1, 1 + rows * columns, d]``; the first position is the class token's.
      grid: rows and columns of the table.
      wanted: rows and columns of the result.
    """
    rows, columns = map(cubic_matrix, grid, wanted)
    patches = table[0, 1:].astype(jnp.float32).reshape(*grid, -1)
    resized = jnp.einsum("yi,xj,ijd->yxd", rows, columns, patches, precision="highest")
    resized = resized.reshape(1, -1, table.shape[-1]).astype(table.dtype)
    return jnp.concatenate([table[:, :1], resized], axis=1)


def cubic_matrix(size: int, wanted: int) -> np.ndarray:
    """Returns bicubic interpolation from ``size`` to ``wanted`` samples as a matrix.

    As in PyTorch's ``interpolate(mode="bicubic", align_corners=False)``: samples are
    centres of cells, Keys' kernel has ``a = -0.75``, edges repeat, and downsampling
    doesn't smooth (unlike `jax.image.resize`). The matrix is ``[wanted, size]``, in
    float32; its rows sum to 1.

    Example:
      >>> cubic_matrix(2, 1).tolist()
      [[0.5, 0.5]]
    """
    a = -0.75
    centres = (np.arange(wanted) + 0.5) * size / wanted - 0.5
    matrix = np.zeros((wanted, size))
    for tap in range(-1, 3):
        sample = np.floor(centres) + tap
        t = np.abs(centres - sample)
        near = (a + 2) * t**3 - (a + 3) * t**2 + 1
        far = a * (t**3 - 5 * t**2 + 8 * t - 4)
        column = np.clip(sample, 0, size - 1).astype(int)
        np.add.at(matrix, (np.arange(wanted), column), np.where(t <= 1, near, far))
    return matrix.astype(np.float32)
