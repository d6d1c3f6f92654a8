"""Checking settings against the kind of model, data and devices of a run."""

from typing import Any

import jax

from lora_jax.finetune.errors import UserError
from lora_jax.finetune.sections import TrainSettings
from lora_jax.finetune.settings import RunSettings
from lora_jax.models.decoder_config import check_split
from lora_jax.names import OWNER
from lora_jax.parallel.mesh import nearest_divisor


def check_experts(config: Any, settings: RunSettings, *, axis: int) -> None:
    """Raises if the settings don't fit the model's experts, or it has none.

    Args:
      config: the model's config.
      settings: settings of the run.
      axis: size of the mesh axis ``expert``.

    Raises:
      UserError: with all faults.
    """
    experts, faults = getattr(config, "experts", None), []
    coefficient = settings.train.router_aux_loss_coef
    if experts is None and coefficient:
        faults.append(f"train.router_aux_loss_coef must be 0; got {coefficient:g}.")
    if experts is None and axis > 1:
        faults.append(f"mesh.expert must be 1; got {axis}.")
    if faults:
        raise UserError(f"The model has no experts: {' '.join(faults)}")
    count = 1 if experts is None else experts.num_experts
    if count % axis and settings.mesh.uneven == "error":
        raise UserError(
            f"mesh.expert must divide the model's {count} experts; got {axis}. Use "
            f"{nearest_divisor(count, axis)}, or mesh.uneven=replicate for all experts "
            "on every device."
        )


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


def check_no_pairs(settings: RunSettings) -> None:
    """Raises a `UserError` for a setting of embeddings."""
    data, default = settings.data, TrainSettings.temperature
    if (
        settings.train.temperature != default
        or data.query_prompt
        or data.document_prompt
    ):
        raise UserError(
            "train.temperature, data.query_prompt and data.document_prompt are for "
            "pairs of texts: the first line of data.train must have an 'anchor' and a "
            "'positive'. Remove them, or change the data."
        )


def check_mixed(settings: RunSettings) -> None:
    """Raises a `UserError` for what a run whose examples name their adapter can't use.

    Its adapters' rows may be anywhere in a batch, so a process must see all of them.
    """
    mesh, count = settings.mesh, jax.process_count()
    if (mesh.expert, mesh.sequence, count) != (1, 1, 1):
        raise UserError(
            f"a run whose examples name their {OWNER} takes one process, and "
            f"mesh.expert and mesh.sequence must be 1; got {count}, {mesh.expert} and "
            f"{mesh.sequence}."
        )
