"""Loads several adapters, of any tool, onto one base."""

import os
from collections.abc import Mapping
from typing import Any

from lora_jax.interop.common_base import common_base
from lora_jax.interop.pretrained import load_each
from lora_jax.models.loaded import LoadedModel
from lora_jax.names import LORA, PARAMS
from lora_jax.nn.bank import AdapterBank, Member


def load_bank(
    path: str | os.PathLike[str] | None,
    adapters: Mapping[str, str | os.PathLike[str]],
    *,
    capacity: int | Mapping[int, int] | None = None,
    **options: Any,
) -> tuple[LoadedModel, AdapterBank]:
    """Loads a base once, with several adapters.

    Weights that adapters train in full, such as the head of each customer, may differ
    in value, not in shape.

    Args:
      path: the base, see `load_model`; None for the one that the adapters name.
      adapters: folders by name: runs, adapters of ours, of PEFT or of mlx-lm.
      capacity: see `AdapterBank`.
      **options: of `load_model`, for the base.

    Returns:
      The base without adapters, and the bank. Its ``new`` lists the weights that every
      adapter brings and the base lacks (a head).

    Raises:
      ValueError: if no adapter is given; adapters are of different bases, or pool
        differently; weights that they train in full differ in shape; or one lacks a
        head that others have and the base lacks. Lists all of a kind.
    """
    if not adapters:
        raise ValueError("adapters must name at least one folder; got none.")
    members: dict[str, Member] = {}
    loaded = load_each(path, adapters, scan_layers=False, **options)
    for name, one in loaded.items():
        module: Any = one.module
        trained = one.variables.get(PARAMS, {})
        members[name] = one.variables[LORA], module.targets(one.params), trained
    base = common_base(loaded, path, **options)
    bank = AdapterBank(
        base.module,
        base.params,
        members,
        *base.inputs,
        capacity=capacity,
        absent=base.new,
    )
    return base, bank
