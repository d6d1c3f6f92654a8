"""The base that several adapters share, with its own weights."""

import os
from collections.abc import Mapping
from typing import Any

from lora_jax.models.load import load_base
from lora_jax.models.loaded import LoadedModel
from lora_jax.names import HEAD, PARAMS
from lora_jax.tree.fingerprint import fingerprint
from lora_jax.tree.paths import flatten, unflatten
from lora_jax.tree.token_rows import full_of


def common_base(
    loaded: Mapping[str, LoadedModel],
    path: str | os.PathLike[str] | None = None,
    *,
    head: str | None = None,
    **options: Any,
) -> LoadedModel:
    """Returns the base of adapters, also where they train its weights in full.

    Args:
      loaded: the base with each adapter, from `load_model`.
      path: the base, see `load_model`; None for the one that the adapters name.
      head: the adapter whose head the model is to have; None for that of all.
      **options: of `load_model`, with which they were loaded.

    Returns:
      The base without adapters. Its ``new`` lists the weights that adapters train and
      it has not (a head): only their shapes are known.

    Raises:
      ValueError: listing the adapters that need another model than the first, or
        naming the fingerprints of bases that differ.
    """
    weights = {name: flatten(one.params) for name, one in loaded.items()}
    full = {path for one in loaded.values() for path in _trained(one)}
    first = head or max(loaded, key=lambda name: len(full & weights[name].keys()))
    base = loaded[first]
    module: Any = base.module
    own_pooling = _pooling(base)
    faults = [
        f"{name} needs another model than {first}"
        for name, one in loaded.items()
        if one.config != base.config or (head is None and _pooling(one) != own_pooling)
    ]
    marks = {
        name: fingerprint(unflatten({p: own[p] for p in own if p not in full}))
        for name, own in weights.items()
    }
    if not faults and len(set(marks.values())) > 1:
        faults.append(f"they are of different bases: {marks}")
    if faults:
        raise ValueError(f"adapters can't share one base: {'; '.join(faults)}.")
    params, new = dict(weights[first]), ()
    if full:
        kept: dict[str, Any] = {
            "num_labels": getattr(module.model, "num_labels", None),
            "pooling": None if base.sentence else own_pooling,
            "param_dtype": (base.extra or {}).get("param_dtype"),
            "own_head": any(HEAD in place.split("/") for place in full),
            "scan_layers": getattr(module.model, "scan_layers", None),
        }
        own = load_base(path or base.path, **{**kept, **options})
        new = tuple(p for p in own.new if p in full)
        found = flatten(own.params)
        params = {p: found[p] if p in full else leaf for p, leaf in params.items()}
    return base._replace(
        module=module.model,
        variables={PARAMS: unflatten(params)},
        extra=None,
        new=new,
    )


def _trained(loaded: LoadedModel) -> dict[str, Any]:
    return flatten(full_of(loaded.variables))


def _pooling(loaded: LoadedModel) -> str | None:
    module: Any = loaded.module
    return getattr(module.model, "pooling", None)
