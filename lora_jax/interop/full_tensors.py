"""Full tensors in another tool's adapter: parameters trained in full, base copies.

The functions share their arguments: ``leaves`` are the `layer_slices` of ``flat``, the
model's flattened parameters; ``values`` collects the parameters trained in full by
path, as `place_full` returns them. All report problems as a list of lines.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.interop.external import ExternalAdapter, ExternalFactors
from lora_jax.interop.naming import Names
from lora_jax.models.family import Shape
from lora_jax.models.source import Source
from lora_jax.models.stacking import LayerSlice, layer_slices
from lora_jax.names import (
    BIAS,
    EMBED,
    EMBEDDING,
    HEAD,
    KERNEL,
    LM_HEAD,
    WORD_EMBEDDING,
)

ROUNDING = 1e-2  # relative; admits a base rounded to bfloat16 or 8 bits
EMBED_LEAF, HEAD_LEAF = f"{EMBED}/{EMBEDDING}", f"{HEAD}/{KERNEL}"


def place_full(
    tensors: Mapping[str, np.ndarray],
    names: Names,
    leaves: Mapping[str, LayerSlice],
    flat: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str]]:
    """Returns parameters trained in full by path, in Flax's layout, and problems."""
    parts: dict[str, dict[int | None, np.ndarray]] = {}
    faults, tensors, paths = [], dict(tensors), names.tensors()
    if HEAD_LEAF not in leaves:
        faults += _drop_tied(tensors, paths)
    for name, array in tensors.items():
        single = paths.get(name)
        if single is None:
            faults.append(f"unexpected: {name} is not a parameter of this model")
            continue
        part = leaves[single]
        value = names.family.from_file(single, array)
        if value.shape != part.shape:
            faults.append(
                f"shape: {name} must be {list(part.shape)} in Flax's layout; got "
                f"{list(value.shape)}{resized(single, value.shape, part.shape)}"
            )
            continue
        parts.setdefault(part.path, {})[part.index] = value
    for path, values in parts.items():
        lacking = len(flat[path]) - len(values) if None not in values else 0
        if lacking:
            faults.append(
                f"missing: {lacking} of {len(flat[path])} layers of {path}, which is "
                "one stacked array; load the model with scan_layers=False"
            )
    return {} if faults else {p: _joined(v) for p, v in parts.items()}, faults


def resized(path: str, found: Shape, wanted: Shape) -> str:
    """Explains a shape that differs because the vocabulary was resized."""
    module = path.removesuffix(f"/{EMBEDDING}").removesuffix(f"/{KERNEL}")
    differ = [(a, b) for a, b in zip(found, wanted, strict=False) if a != b]
    is_table = module in (EMBED, HEAD) or module == WORD_EMBEDDING
    if not is_table or len(found) != len(wanted) or len(differ) != 1:
        return ""
    [(theirs, ours)] = differ
    return (
        f": the adapter was made on a vocabulary of {theirs} tokens, resized from the "
        f"{ours} of this base; load the base whose table was resized, or give the new "
        "tokens (`load_model(..., add_tokens=[...])`)"
    )


def check_base(
    tensors: Mapping[str, np.ndarray],
    names: Names,
    leaves: Mapping[str, LayerSlice],
    flat: Mapping[str, Any],
) -> list[str]:
    """Finds copies of base weights that differ from this base by more than rounding."""
    faults, paths = [], names.tensors()
    for name, array in tensors.items():
        single = paths.get(name)
        if single is None:
            if name.rpartition(".")[0].endswith(LM_HEAD):
                continue  # tied: the copy of the embedding is compared instead
            faults.append(f"unexpected: {name} is not a parameter of this model")
            continue
        part = leaves[single]
        own = np.asarray(part.of(flat[part.path]), np.float32)
        copy = names.family.from_file(single, array)
        if copy.shape != own.shape:
            faults.append(
                f"shape: the base's {name} is {list(copy.shape)} in the adapter and "
                f"{list(own.shape)} here: it was trained on another base, or one whose "
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


def place_tokens(
    adapter: ExternalAdapter,
    names: Names,
    leaves: Mapping[str, LayerSlice],
    values: Mapping[str, Any],
) -> tuple[dict[str, tuple[list[int], Any]], list[str]]:
    """Returns tokens and their rows by the path of their layer, and problems."""
    found, faults, paths = {}, [], names.modules()
    tables = {EMBED: EMBED_LEAF, HEAD: HEAD_LEAF}
    for name, (ids, rows) in adapter.tokens.items():
        leaf = tables.get(paths.get(name, ""), "")
        if paths.get(name) == HEAD and HEAD_LEAF not in leaves:
            continue  # tied; `needs_own_head` has compared it with the embedding's
        if leaf not in leaves or leaf in values or name in adapter.modules:
            faults.append(
                f"unexpected: trained tokens of {name}, which must be the model's "
                "embedding or head, with no other adapter"
            )
            continue
        table = names.family.file_shape(leaf, leaves[leaf].shape)
        if table[1:] != rows.shape[1:] or max(ids, default=0) >= table[0]:
            faults.append(
                f"shape: trained tokens of {name} must be rows of {list(table)};"
                f" got {list(rows.shape)} for tokens up to {max(ids, default=0)}"
            )
            continue
        found[paths[name]] = ids, jnp.asarray(rows)
    return found, faults


def place_biases(
    placed: Mapping[str, ExternalFactors],
    leaves: Mapping[str, LayerSlice],
    flat: Mapping[str, Any],
    values: dict[str, Any],
) -> list[str]:
    """Adds biases of updates to those of their layers: ``b + scaling * lora_bias``."""
    faults = []
    for path, factors in placed.items():
        if factors.bias is None:
            continue
        part = leaves.get(f"{path}/{BIAS}")
        if part is None and not factors.bias.any():
            continue
        if part is None or part.shape != factors.bias.shape:
            faults.append(
                f"unexpected: lora_bias of {path}, a layer without a bias to add it to;"
                " retrain with lora_bias=False"
            )
            continue
        whole = np.array(values.get(part.path, flat[part.path]), np.float32)
        part.of(whole)[...] += np.float32(factors.scaling) * factors.bias
        values[part.path] = jnp.asarray(whole)
    return faults


def update_biases(
    trained: Mapping[str, Any],
    names: Names,
    source: Source,
    adapted: Mapping[str, ExternalFactors],
) -> dict[str, np.ndarray]:
    """Returns the biases of updates, ``(b - b0) / scaling``; undoes `place_biases`.

    Args:
      trained: parameters trained in full, by path.
      names: the model's names.
      source: the base, to read ``b0`` from.
      adapted: the factors by Hugging Face name.

    Returns:
      Biases by Hugging Face name, for adapted modules whose bias is trained.
    """
    spelled, biases = names.spelling().tensors, {}
    for leaf, part in layer_slices(trained).items():
        module = spelled[leaf].rpartition(".")[0]
        if leaf.rpartition("/")[2] != BIAS or module not in adapted:
            continue
        kept = source.tensors[source.names[names.family.tensor_name(leaf)]]
        before = np.asarray(names.family.from_file(leaf, kept), np.float32)
        after = np.asarray(part.of(trained[part.path]), np.float32)
        scaling = np.float32(adapted[module].scaling)
        biases[module] = (after - before) / scaling
    return biases


def _drop_tied(tensors: dict[str, np.ndarray], names: Mapping[str, str]) -> list[str]:
    """Drops a tied head's copy of the embedding; returns a problem if they differ."""
    embed = next((name for name in tensors if names.get(name) == EMBED_LEAF), None)
    head = tensors.pop(f"{LM_HEAD}.weight", None)
    if head is None and (embed is None or EMBED_LEAF not in names.values()):
        return []
    if embed is None or head is None or not np.array_equal(tensors[embed], head):
        return [
            "unexpected: the head of this model is its embedding (tied), so "
            f"embed_tokens.weight and {LM_HEAD}.weight must both be present and equal; "
            "load the base and the adapter together, which unties the head"
        ]
    return []


def _joined(values: Mapping[int | None, np.ndarray]) -> Any:
    if None in values:
        return jnp.asarray(values[None])
    return jnp.stack([values[i] for i in range(len(values))])
