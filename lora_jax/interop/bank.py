"""Loads several adapters, of any tool, onto one base."""

import os
from collections.abc import Collection, Mapping
from typing import Any

from lora_jax.interop.pretrained import load_model
from lora_jax.models.load import load_base
from lora_jax.models.loaded import LoadedModel
from lora_jax.names import HEAD, LORA, PARAMS
from lora_jax.nn.bank import AdapterBank, Member
from lora_jax.tree.fingerprint import fingerprint
from lora_jax.tree.paths import flatten, unflatten


def load_bank(
    path: str | os.PathLike[str] | None,
    adapters: Mapping[str, str | os.PathLike[str]],
    *,
    capacity: int | Mapping[int, int] | None = None,
    **options: Any,
) -> tuple[LoadedModel, AdapterBank]:
    """Loads a base, with several adapters.

    Weights that adapters train in full, such as the head of each customer, may differ
    in value, not in shape.

    Args:
      path: the base, see `load_model`; None for the one that the adapters name.
      adapters: folders by name: runs, adapters of ours, of PEFT or of mlx-lm.
      capacity: see `AdapterBank`.
      **options: of `load_model`, for the base.

    Returns:
      The base without adapters, and the bank. Its ``new`` lists the weights that every
      adapter brings and the base has not (a head).

    Raises:
      ValueError: if no adapter is given; adapters are of different bases, or pool
        differently; weights that they train in full differ in shape; or one lacks a
        head that others have and the base has not. Lists all of a kind.
    """
    if not adapters:
        raise ValueError("adapters must name at least one folder; got none.")
    members: dict[str, Member] = {}
    loaded: dict[str, LoadedModel] = {}
    for name, folder in adapters.items():
        one = load_model(path, folder, scan_layers=False, **options)
        module: Any = one.module
        trained = one.variables.get(PARAMS, {})
        members[name] = one.variables[LORA], module.targets(one.params), trained
        bare = {PARAMS: one.params}
        loaded[name] = one._replace(module=module.model, variables=bare)
    full = {path for one in members.values() for path in flatten(one[2])}
    weights = {name: flatten(one.params) for name, one in loaded.items()}
    first = max(loaded, key=lambda name: len(full & weights[name].keys()))
    base = loaded[first]
    faults = [
        f"{name} and {first} need different models"
        for name, one in loaded.items()
        if (one.config, _pooling(one)) != (base.config, _pooling(base))
    ]
    marks = {
        name: fingerprint(unflatten({p: own[p] for p in own if p not in full}))
        for name, own in weights.items()
    }
    if not faults and len(set(marks.values())) > 1:
        faults.append(f"they are of different bases: {marks}")
    if faults:
        raise ValueError(f"adapters can't share one base: {'; '.join(faults)}.")
    new: tuple[str, ...] = ()
    if full:
        own = _own_weights(base, path, full, options)
        new = tuple(p for p in own.new if p in full)
        found = flatten(own.params)
        params = {
            p: found[p] if p in full else leaf for p, leaf in weights[first].items()
        }
        base = base._replace(variables={PARAMS: unflatten(params)})
    bank = AdapterBank(
        base.module, base.params, members, *base.inputs, capacity=capacity, absent=new
    )
    return base._replace(extra=None, new=new), bank


def _pooling(loaded: LoadedModel) -> str | None:
    return getattr(loaded.module, "pooling", None)


def _own_weights(
    loaded: LoadedModel,
    path: str | os.PathLike[str] | None,
    full: Collection[str],
    options: Mapping[str, Any],
) -> LoadedModel:
    """Loads the base of an adapter again, for the weights that adapters train."""
    kept: dict[str, Any] = {
        "num_labels": getattr(loaded.module, "num_labels", None),
        "pooling": None if loaded.sentence else _pooling(loaded),
        "param_dtype": (loaded.extra or {}).get("param_dtype"),
        "own_head": any(HEAD in place.split("/") for place in full),
    }
    return load_base(path or loaded.path, **{**kept, **options})
