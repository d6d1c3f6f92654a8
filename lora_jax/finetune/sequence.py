"""Checking that a run can split its rows over the mesh axis ``sequence``."""

from typing import Any

from lora_jax.finetune.errors import UserError
from lora_jax.models.decoder_config import check_split


def check_sequence(kind: str, config: Any, size: int) -> None:
    """Raises if the rows of a model can't be split.

    Args:
      kind: the kind of its family.
      config: its config.
      size: of the mesh axis ``sequence``.

    Raises:
      UserError: if the model is no causal decoder, or has layers that keep a state.
    """
    if size == 1:
        return
    if kind != "decoder":
        raise UserError(
            f"mesh.sequence must be 1 for an {kind}; got {size}. Only the rows of a "
            "decoder can be split. Use data or fsdp."
        )
    try:
        check_split(config)
    except ValueError as error:
        raise UserError(f"mesh.sequence is {size}: {error}") from error
