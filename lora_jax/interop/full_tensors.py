"""Whole tensors in another tool's adapter: parameters trained in full, base copies."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.interop.naming import EMBED, HEAD, Names
from lora_jax.models.load import SCANNED, unscanned
from lora_jax.names import EMBEDDING, KERNEL

ROUNDING = 1e-2  # relative: a base in bfloat16, or from 8 bits, is still that base
TIED = f"{HEAD}/{KERNEL}"

Single = tuple[str, int | None]  # a leaf of the tree, and a layer of it if scanned


def single_leaves(flat: Mapping[str, Any]) -> dict[str, Single]:
    """Returns the leaf that holds each parameter, by its path where nothing is scanned.

    Args:
      flat: the model's parameters by path.

    Returns:
      The leaf's path, and the number of the layer where it stacks them.
    """
    leaves: dict[str, Single] = {}
    for path, array in flat.items():
        leaf = tuple(path.split("/"))
        for i, single in enumerate(unscanned(leaf, array.shape)):
            leaves["/".join(single)] = path, i if leaf[0] == SCANNED else None
    return leaves


def place_full(
    tensors: Mapping[str, np.ndarray],
    names: Names,
    leaves: Mapping[str, Single],
    flat: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:
    """Returns the values of parameters trained in full by the leaf's path, and faults.

    Args:
      tensors: by Hugging Face name.
      names: of the model's parameters.
      leaves: from `single_leaves`.
      flat: the model's parameters.

    Returns:
      Arrays as Flax has them; and a line for each tensor that is no parameter of the
      model or has another shape, and for each layer that a stack lacks.
    """
    parts: dict[str, dict[int | None, np.ndarray]] = {}
    faults, tensors, paths = [], dict(tensors), names.tensors()
    if TIED not in leaves:
        faults += _drop_tied(tensors, paths)
    for name, array in tensors.items():
        single = paths.get(name)
        if single is None:
            faults.append(f"unexpected: {name} is no parameter of this model")
            continue
        path, index = leaves[single]
        own = flat[path].shape if index is None else flat[path].shape[1:]
        value = names.family.from_file(path.rpartition("/")[2], array)
        if value.shape != own:
            faults.append(
                f"shape: {name} must be of {list(own)} as Flax has it; got "
                f"{list(value.shape)}"
            )
            continue
        parts.setdefault(path, {})[index] = value
    for path, values in parts.items():
        lacking = len(flat[path]) - len(values) if None not in values else 0
        if lacking:
            faults.append(
                f"missing: {lacking} of {len(flat[path])} layers of {path}, which are "
                "one array here; load the model with scan_layers=False"
            )
    return {} if faults else {p: _joined(v) for p, v in parts.items()}, faults


def check_base(
    tensors: Mapping[str, np.ndarray],
    names: Names,
    leaves: Mapping[str, Single],
    flat: Mapping[str, Any],
) -> list[str]:
    """Says which copies of base weights are of another base.

    Args:
      tensors: copies that a tool put into its adapter, by Hugging Face name.
      names: as for `place_full`.
      leaves: as for `place_full`.
      flat: as for `place_full`.

    Returns:
      A line for each copy that is no parameter of the model, or differs by more than
      rounding.
    """
    faults, paths = [], names.tensors()
    for name, array in tensors.items():
        single = paths.get(name)
        if single is None:
            if name.rpartition(".")[0].endswith("lm_head"):
                continue  # tied here: the copy of the embedding is looked at
            faults.append(f"unexpected: {name} is no parameter of this model")
            continue
        path, index = leaves[single]
        own = np.asarray(flat[path] if index is None else flat[path][index], np.float32)
        copy = names.family.from_file(path.rpartition("/")[2], array)
        if copy.shape != own.shape:
            faults.append(
                f"shape: the base's {name} is {list(copy.shape)} in the adapter and "
                f"{list(own.shape)} here: it was made on another base, or one whose "
                "vocabulary was resized"
            )
            continue
        error = float(np.linalg.norm(copy - own) / max(np.linalg.norm(own), 1e-30))
        if error > ROUNDING:
            faults.append(
                f"another base: {name} in the adapter differs from this base's by "
                f"{error:.1%} of its norm"
            )
    return faults


def _drop_tied(tensors: dict[str, np.ndarray], names: Mapping[str, str]) -> list[str]:
    """Takes the head out where the embedding is the head, if they are the same."""
    embed = next((n for n in tensors if names.get(n) == f"{EMBED}/{EMBEDDING}"), None)
    head = tensors.pop("lm_head.weight", None)
    if head is None and (embed is None or f"{EMBED}/{EMBEDDING}" not in names.values()):
        return []
    if embed is None or head is None or not np.array_equal(tensors[embed], head):
        return [
            "unexpected: the head of this model is its embedding (tied), so "
            "embed_tokens.weight and lm_head.weight must both be there and equal"
        ]
    return []


def _joined(values: Mapping[int | None, np.ndarray]) -> Any:
    if None in values:
        return jnp.asarray(values[None])
    return jnp.stack([values[i] for i in range(len(values))])
