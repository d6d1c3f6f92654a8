"""Checks the settings that only a mixture of experts has against the model."""

from typing import Any

from lora_jax.finetune.errors import UserError
from lora_jax.finetune.settings import RunSettings
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
