"""`find_targets`: the layers that a config adapts."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from lora_jax.config import LoRAConfig
from lora_jax.nn.adapt import adapt
from lora_jax.tree.targets import Target


def find_targets(
    model: nn.Module,
    config: LoRAConfig,
    *example_args: Any,
    params: Mapping[str, Any] | None = None,
    **example_kwargs: Any,
) -> list[Target]:
    """Returns the layers that ``config`` adapts in ``model``.

    Args:
      model: any Linen module.
      config: the adapter config.
      *example_args: example inputs, as in `adapt`.
      params: the model's parameter tree, arrays or shapes; not needed if example inputs
        are given.
      **example_kwargs: example keyword arguments.

    Returns:
      One `Target` per layer: path, kind, kernel shape, rank, alpha, scaling, trainable.

    Raises:
      ValueError: listing every pattern without a match and every target that can't be
        adapted.
    """
    return adapt(model, config, *example_args, **example_kwargs).targets(params)
