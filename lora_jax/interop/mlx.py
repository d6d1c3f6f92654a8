"""mlx-lm adapter folders: ``adapter_config.json`` and ``adapters.safetensors``.

mlx-lm stores ``lora_a`` ``[in, r]`` and ``lora_b`` ``[r, out]``, like Flax, one rank
and one ``scale`` (the factor before ``A B`` itself) for all modules, and DoRA's
magnitudes as ``m``. A module that the config names but the file lacks isn't adapted.
"""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.files.json_file import read_json
from lora_jax.files.safetensors import open_tensors
from lora_jax.interop.external import (
    ADAPTER_CONFIG,
    ExternalAdapter,
    ExternalFactors,
    most_common,
    read_floats,
    report,
    write_folder,
)
from lora_jax.interop.peft_config import (
    Field,
    is_positive,
    is_rank,
    is_share,
    read_fields,
)

TENSORS = "adapters.safetensors"
TYPES = ("lora", "dora")
_LEAVES = ("lora_a", "lora_b", "m")
_FIELDS: dict[str, Field] = {
    "fine_tune_type": (lambda kind: kind in TYPES, f"one of {TYPES}", "lora"),
    "lora_parameters": (lambda value: isinstance(value, dict), "an object", None),
}
_PARAMETERS: dict[str, Field] = {
    "rank": (is_rank, "an integer of at least 1", None),
    "scale": (is_positive, "a number above 0", None),
    "dropout": (is_share, "in [0, 1]", 0.0),
}


def read_mlx(directory: str | os.PathLike[str]) -> ExternalAdapter:
    """Reads an mlx-lm adapter folder; module names are without ``model.``.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if a file is damaged, the config is not for LoRA or DoRA, or tensors
        are unexpected, missing, wrongly shaped or not finite; one error lists all.
    """
    folder = Path(directory)
    settings = read_json(folder / ADAPTER_CONFIG)
    kind, rank, scale, dropout = _parameters(settings, folder)
    if not (folder / TENSORS).is_file():
        raise FileNotFoundError(f"{folder} must contain {TENSORS}; it doesn't.")
    reader = open_tensors(folder / TENSORS)
    faults = [
        f"unexpected: {name} doesn't end with one of {_LEAVES}"
        for name in reader.shapes
        if name.rpartition(".")[2] not in _LEAVES
    ]
    arrays, bad = read_floats(reader, {name: name for name in reader.shapes})
    faults += bad
    modules = {}
    needed = _LEAVES if kind == "dora" else _LEAVES[:2]
    for name in dict.fromkeys(n.rpartition(".")[0] for n in reader.shapes):
        lacking = [leaf for leaf in needed if f"{name}.{leaf}" not in reader.shapes]
        faults += [f"missing: {name}.{leaf}" for leaf in lacking]
        a, b, m = (arrays.get(f"{name}.{leaf}") for leaf in _LEAVES)
        if a is None or b is None:
            continue
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != rank or b.shape[0] != rank:
            faults.append(
                f"shape: lora_a, lora_b of {name} must be [in, {rank}], [{rank}, out]; "
                f"got {list(a.shape)}, {list(b.shape)}"
            )
            continue
        modules[name.removeprefix("model.")] = ExternalFactors(
            a.T, b.T, scale, scale * rank, m, is_embedding=None
        )
    if not modules and not faults:
        faults.append("it holds no adapters")
    if faults:
        raise report(str(folder / TENSORS), faults)
    return ExternalAdapter(
        modules=modules,
        config=settings,
        dropout_rate=dropout,
        is_tied_once=True,
        origin=str(folder),
    )


def write_mlx(
    directory: str | os.PathLike[str], adapter: ExternalAdapter, *, num_layers: int
) -> Path:
    """Writes a folder that mlx-lm loads, replacing an adapter that is there.

    Ranks are padded to the largest; a scaling other than the most common one is folded
    into B, rounded once.

    Args:
      directory: created if absent.
      adapter: its modules under mlx-lm's names, ``model.layers.0.self_attn.q_proj``.
      num_layers: number of layers in the model.

    Raises:
      ValueError: if anything was trained in full, an embedding has a magnitude, or a
        module is a convolution, which mlx-lm's format can't store.
      OSError: if the folder can't be written.
    """
    modules = adapter.modules
    faults = [f"{name} is trained in full" for name in adapter.full]
    faults += [f"rows of tokens of {name} are trained" for name in adapter.tokens]
    faults += [
        f"the bias of {name} is trained"
        for name, f in modules.items()
        if f.bias is not None
    ]
    faults += [
        f"{name} is a convolution" for name, f in modules.items() if f.a.ndim > 2
    ]
    faults += [
        f"{name} is an embedding with DoRA, for which mlx-lm has a magnitude per row, "
        "not per column"
        for name, f in modules.items()
        if f.is_embedding and f.magnitude is not None
    ]
    if faults:
        raise ValueError(f"mlx-lm's format can't hold this: {'; '.join(faults)}.")
    rank = max(factors.rank for factors in modules.values())
    scale = most_common(factors.scaling for factors in modules.values())
    tensors: dict[str, np.ndarray] = {}
    keys, first = set(), num_layers
    for name, factors in modules.items():
        more, ratio = (0, rank - factors.rank), np.float32(factors.scaling / scale)
        tensors[f"{name}.lora_a"] = np.pad(factors.a, (more, (0, 0))).T
        tensors[f"{name}.lora_b"] = np.pad(factors.b * ratio, ((0, 0), more)).T
        if factors.magnitude is not None:
            tensors[f"{name}.m"] = factors.magnitude
        layer = re.fullmatch(r"model\.(?:layers|h)\.(\d+)\.(.+)", name)
        keys.add(layer[2] if layer else name)
        first = min(first, int(layer[1])) if layer else first
    config = {
        "fine_tune_type": "dora" if adapter.dora else "lora",
        "num_layers": num_layers - first,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": adapter.dropout_rate,
            "keys": sorted(keys),
        },
    }
    return write_folder(directory, TENSORS, tensors, config, kind="mlx")


def _parameters(
    settings: dict[str, Any], folder: Path
) -> tuple[str, int, float, float]:
    """Returns the type, rank, scale and dropout from a config."""
    top, faults = read_fields(settings, _FIELDS)
    given = top["lora_parameters"] if isinstance(top["lora_parameters"], dict) else {}
    values, wrong = read_fields(given, _PARAMETERS)
    if faults := faults + wrong:
        raise ValueError(
            f"{folder / ADAPTER_CONFIG} has {len(faults)} faults: {'; '.join(faults)}."
        )
    numbers = float(values["scale"]), float(values["dropout"])
    return top["fine_tune_type"], values["rank"], *numbers
