"""Loads several adapters, of any tool, onto one base."""

import os
from collections.abc import Mapping
from typing import Any

from lora_jax.interop.pretrained import load_model
from lora_jax.models.loaded import LoadedModel
from lora_jax.names import LORA, PARAMS
from lora_jax.nn.bank import AdapterBank, Member
from lora_jax.tree.fingerprint import fingerprint
from lora_jax.tree.paths import flatten


def load_bank(
    path: str | os.PathLike[str] | None,
    adapters: Mapping[str, str | os.PathLike[str]],
    *,
    capacity: int | Mapping[int, int] | None = None,
    **options: Any,
) -> tuple[LoadedModel, AdapterBank]:
    """Loads a base once, with several adapters.

    Args:
      path: the base, see `load_model`; None for the one that the adapters name.
      adapters: folders by name: runs, adapters of ours, of PEFT or of mlx-lm.
      capacity: see `AdapterBank`.
      **options: of `load_model`, for the base.

    Returns:
      The base without adapters, and the bank.

    Raises:
      ValueError: if no adapter is given, adapters are of different bases, or some also
        train weights in full, which can't differ within one base; lists all of these.
    """
    if not adapters:
        raise ValueError("adapters must name at least one folder; got none.")
    members: dict[str, Member] = {}
    faults, marks, base = [], {}, None
    for name, folder in adapters.items():
        one = load_model(path, folder, scan_layers=False, **options)
        module: Any = one.module
        params = one.params
        members[name] = one.variables[LORA], module.targets(params)
        marks[name] = fingerprint(params)
        if trained := sorted(flatten(one.variables.get(PARAMS, {}))):
            faults.append(f"{name} also trains {', '.join(trained)} in full")
        if base is None:
            bare = {PARAMS: params}
            base = one._replace(module=module.model, variables=bare, extra=None)
    if not faults and len(set(marks.values())) > 1:
        faults.append(f"they are of different bases: {marks}")
    if faults or base is None:
        raise ValueError(f"adapters can't share one base: {'; '.join(faults)}.")
    bank = AdapterBank(
        base.module, base.params, members, *base.inputs, capacity=capacity
    )
    return base, bank
