"""Adapter folders: the adapter's leaves and what is trained, without the base.

``adapter.safetensors`` holds the leaves by path
(``"lora/encoder/layer_0/attention/query/lora_a"``, ``"params/classifier/kernel"``);
``adapter_config.json`` records the `LoRAConfig` and the base they were trained with.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax.array_types import PyTree
from lora_jax.config import LoRAConfig
from lora_jax.files.arrays import count_not_finite, host_leaves
from lora_jax.files.atomic import new_folder, write_text
from lora_jax.files.json_file import parse_json, read_json
from lora_jax.files.safetensors import open_tensors, write_tensors
from lora_jax.names import EMBEDDING, FIXED, KERNEL, LORA, LORA_A, LORA_B, SAVED
from lora_jax.parallel.processes import is_first, wait_for_all
from lora_jax.tree.paths import leaves_by_path, unflatten

TENSORS = "adapter.safetensors"
CONFIG = "adapter_config.json"
CHECKSUM = "config_sha256"
MATRICES = (KERNEL, EMBEDDING, LORA_A, LORA_B)
FORMAT = "lora_jax"
VERSION = 2  # version 1 has no config checksum


class Adapter(NamedTuple):
    """A loaded adapter.

    Attributes:
      variables: ``{"lora": ..., "params": ..., "fixed": ...}``, nested dictionaries of
        jax arrays.
      config: the config it was trained with.
      fingerprint: the fingerprint of the base it was trained on.
      extra: the JSON values passed to `save_adapter`.
    """

    variables: dict[str, PyTree]
    config: LoRAConfig
    fingerprint: str
    extra: dict[str, Any]


def save_adapter(
    directory: str | os.PathLike[str],
    variables: Mapping[str, PyTree],
    config: LoRAConfig,
    fingerprint: str,
    *,
    extra: Mapping[str, Any] | None = None,
) -> int:
    """Saves the adapter and what is trained in full, and nothing else.

    In a multi-process job every process must call this; the first one writes. An
    existing adapter stays until both new files are written, which are then renamed one
    right after the other. Only a crash between the two renames leaves files that don't
    match, and `load_adapter` rejects those.

    Args:
      directory: created if absent; an adapter there is replaced. Must be visible to all
        processes.
      variables: contains ``lora`` and optionally ``params`` and ``fixed``; other
        collections are ignored.
      config: the adapter's config.
      fingerprint: the fingerprint of the frozen base.
      extra: additional JSON values to store (labels, the name of the base).

    Returns:
      The size of ``adapter.safetensors`` in bytes: 4 per trained float32 number, plus
      the header.

    Raises:
      ValueError: if ``lora`` has no leaves, or if leaves contain NaN or infinity; lists
        all of them.
      OSError: if the folder can't be written; an existing adapter is left intact.
    """
    directory = Path(directory)
    tensors = leaves_by_path({k: variables[k] for k in SAVED if k in variables})
    if not any(path.startswith(f"{LORA}/") for path in tensors):
        raise ValueError(
            f"variables must have leaves in {LORA!r} to save; got {len(tensors)} leaves"
            f" in {sorted(variables)}."
        )
    arrays = host_leaves(tensors, copy=False)
    if faults := _not_finite(arrays):
        raise ValueError(f"an adapter must be finite to be saved; {'; '.join(faults)}.")
    meta = {
        "format": FORMAT,
        "version": VERSION,
        "lora": config.to_dict(),
        "base": fingerprint,
        "trainable": sum(
            array.size for path, array in arrays.items() if path.split("/")[0] != FIXED
        ),
        "extra": dict(extra or {}),
    }
    if is_first():
        _write(directory, arrays, meta)
    wait_for_all("save_adapter")
    return (directory / TENSORS).stat().st_size


def _write(
    directory: Path, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]
) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"an adapter can't be saved to {directory}: {error}. Choose a folder that "
            "exists or can be created."
        ) from error
    with new_folder(directory) as new:
        write_tensors(new / TENSORS, arrays, metadata={"format": FORMAT})
        whole = {**meta, "sha256": sha256(new / TENSORS)}
        whole[CHECKSUM] = _digest(parse_json(json.dumps(whole)))
        write_text(new / CONFIG, json.dumps(whole, indent=2) + "\n")


def load_adapter(
    directory: str | os.PathLike[str],
    *,
    expected: Mapping[str, PyTree] | None = None,
    fingerprint: str | None = None,
) -> Adapter:
    """Loads a complete adapter, or raises.

    Args:
      directory: a folder written by `save_adapter`.
      expected: variables to check against, arrays or ``jax.ShapeDtypeStruct``; their
        ``lora``, ``params`` and ``fixed`` must have the same paths, shapes and dtypes.
      fingerprint: the fingerprint of the base it will be applied to.

    Returns:
      The adapter.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if a file is damaged or in another format; if the base differs (gives
        both fingerprints); if tensors are missing, unexpected, of the wrong shape or
        dtype, or not finite (lists all of them).
    """
    directory = Path(directory)
    meta = read_adapter_config(directory)
    if sha256(directory / TENSORS) != meta["sha256"]:
        raise ValueError(
            f"{directory / TENSORS} must be the file that {CONFIG} was written with; "
            "its SHA-256 differs. It was damaged or changed: copy the folder again."
        )
    if fingerprint is not None and fingerprint != meta["base"]:
        raise ValueError(
            f"the adapter in {directory} was trained on the base {meta['base']}; this "
            f"base is {fingerprint}. Load the base it was trained on, in its dtype."
        )
    reader = open_tensors(directory / TENSORS)
    arrays = {path: reader[path] for path in reader.shapes}
    faults = _misplaced(arrays)
    if expected is not None:
        wanted = {k: expected.get(k, {}) for k in SAVED}
        faults += _compare(arrays, leaves_by_path(wanted))
    faults += _not_finite(arrays)
    if faults:
        raise ValueError(
            f"{directory / TENSORS} has {len(faults)} faults: {'; '.join(faults)}. "
            "Nothing was loaded."
        )
    return Adapter(
        variables=unflatten({path: jnp.array(a) for path, a in arrays.items()}),
        config=LoRAConfig.from_dict(meta["lora"]),
        fingerprint=meta["base"],
        extra=meta["extra"],
    )


def read_adapter_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads an adapter folder's ``adapter_config.json``, without its tensors.

    Args:
      directory: a folder written by `save_adapter`.

    Returns:
      The JSON: ``format``, ``version``, ``lora`` (a `LoRAConfig`'s fields), ``base``
      (a fingerprint), ``trainable``, ``sha256`` (of the tensors' file), ``extra``, and
      ``config_sha256`` (of all the others).

    Raises:
      FileNotFoundError: listing the missing files.
      ValueError: if it isn't JSON, has another format or version, lacks a key, has a
        value of the wrong type, or doesn't match its checksum.
    """
    directory = Path(directory)
    missing = [name for name in (TENSORS, CONFIG) if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{directory} must be an adapter folder with {TENSORS} and {CONFIG}; it has"
            f" no {' and no '.join(missing)}."
        )
    file = directory / CONFIG
    meta = read_json(file)
    if meta.get("format") != FORMAT:
        raise ValueError(
            f"{file} must have format {FORMAT!r}; got {meta.get('format')!r}. It was "
            "written by another tool."
        )
    if meta.get("version") not in (1, VERSION):
        raise ValueError(
            f"{file} must have version 1 or {VERSION}; got {meta.get('version')!r}. "
            "Install the lora_jax version that wrote it."
        )
    keys = ["lora", "base", "trainable", "sha256", "extra"]
    keys += [CHECKSUM] * (meta["version"] > 1)
    if absent := [key for key in keys if key not in meta]:
        raise ValueError(f"{file} must have the keys {keys}; it lacks {absent}.")
    for key, kind in (("base", str), ("sha256", str), ("trainable", int)):
        if not isinstance(meta[key], kind):
            raise ValueError(
                f"{file}: {key} must be {kind.__name__}; got {meta[key]!r}."
            )
    if wrong := [key for key in ("lora", "extra") if not isinstance(meta[key], dict)]:
        raise ValueError(f"{file}: {', '.join(wrong)} must be JSON objects.")
    try:
        LoRAConfig.from_dict(meta["lora"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: invalid LoRA config: {error}") from error
    if meta["version"] > 1 and meta[CHECKSUM] != _digest(meta):
        raise ValueError(
            f"{file} must be unchanged; its checksum differs. Copy the folder again, "
            "or write other values with `save_adapter`."
        )
    return meta


def _misplaced(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """Describes the tensors whose name or shape can't be an adapter's."""
    faults = []
    for path, array in arrays.items():
        parts = path.split("/")
        parents = {"/".join(parts[:i]) for i in range(1, len(parts))}
        if parts[0] not in SAVED or len(parts) < 2 or "" in parts:
            faults.append(f"{path} is outside lora, params and fixed")
        elif inside := sorted(parents & arrays.keys()):
            faults.append(f"{path} is inside the tensor {inside[0]}")
        elif parts[-1] in MATRICES and array.ndim < 2:
            faults.append(f"{path} has shape {array.shape}, expected 2 axes or more")
    return faults


def _digest(meta: Mapping[str, Any]) -> str:
    """Returns the checksum of a config's values, independent of formatting."""
    values = {key: value for key, value in meta.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _compare(
    arrays: Mapping[str, np.ndarray], expected: Mapping[str, Any]
) -> list[str]:
    """Describes missing and unexpected tensors, and wrong shapes and dtypes."""
    faults = [f"{path} is missing" for path in expected if path not in arrays]
    for path, array in arrays.items():
        if path not in expected:
            faults.append(f"{path} is unexpected")
            continue
        want = expected[path]
        if array.shape != want.shape:
            faults.append(f"{path} has shape {array.shape}, expected {want.shape}")
        if array.dtype != want.dtype:
            faults.append(f"{path} has dtype {array.dtype}, expected {want.dtype}")
    return faults


def _not_finite(arrays: Mapping[str, np.ndarray]) -> list[str]:
    return [
        f"{path} has {count} of {array.size} values NaN or infinite"
        for path, array in arrays.items()
        if (count := count_not_finite(array))
    ]


def sha256(file: Path) -> str:
    """Returns a file's SHA-256."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
