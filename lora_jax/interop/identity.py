"""Identifies a base and an adapter, and detects an adapter that is already merged.

`save_model` records merged adapters in ``config.json``. Applying an adapter twice
doubles its effect, which no shape or name reveals.
"""

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.files.adapter import TENSORS as OWN_TENSORS
from lora_jax.files.adapter import sha256
from lora_jax.interop.mlx import TENSORS as MLX_TENSORS
from lora_jax.interop.peft import TENSORS as PEFT_TENSORS
from lora_jax.models.load import OURS
from lora_jax.models.save import MERGED

HUB_ID = r"[\w-][\w.-]*(/[\w.-]+)?"  # the first models of the hub have no owner
FILES = (OWN_TENSORS, PEFT_TENSORS, MLX_TENSORS)


def base_name(*candidates: Any) -> str | None:
    """Names a base in a way that is valid on every machine.

    Args:
      *candidates: hub ids and local folder paths, best first.

    Returns:
      The first hub id among them, as given or from a path inside the hub's cache; else
      the last component of the first path; None without candidates.

    Example:
      >>> base_name("/data/llama", "meta-llama/Llama-3.1-8B")
      'meta-llama/Llama-3.1-8B'
      >>> base_name("/cache/models--org--name/snapshots/0a1b", None)
      'org/name'
      >>> base_name("/data/llama")
      'llama'
    """
    texts = [os.fspath(c) for c in candidates if isinstance(c, (str, Path)) and c]
    for text in texts:
        cached = re.search(r"models--([\w.-]+?)--([\w.-]+)/snapshots/[^/]+/?$", text)
        if cached:
            return f"{cached[1]}/{cached[2]}"
        if re.fullmatch(HUB_ID, text) and not Path(text).exists():
            return text
    return Path(texts[0]).resolve().name or None if texts else None


def describe_adapter(folder: Path, base: str | None, fingerprint: str) -> dict:
    """Describes a merged adapter and its base, for the new model's ``config.json``."""
    return {
        "adapter": folder.resolve().name,
        "sha256": _digest(folder),
        "base": base,
        "base_fingerprint": fingerprint,
    }


def check_not_merged(
    settings: Mapping[str, Any], model: Path, folder: Path, config: Mapping[str, Any]
) -> None:
    """Raises a ValueError if the same adapter is already merged into a model.

    Warns if the adapter names the merged model's base, not the merged model.

    Args:
      settings: the model's ``config.json``.
      model: its folder, for errors.
      folder: the adapter's folder.
      config: the adapter's config.
    """
    kept = settings.get(OURS)
    records = kept.get(MERGED) if isinstance(kept, dict) else None
    if not isinstance(records, list) or not records:
        return
    records = [record for record in records if isinstance(record, dict)]
    digest, named = _digest(folder), config.get("base_model_name_or_path")
    for record in records:
        base = record.get("base")
        if digest is not None and record.get("sha256") == digest:
            raise ValueError(
                f"the adapter in {folder} must be attached to its base, {base} "
                f"({record.get('base_fingerprint')}); it is merged into {model} "
                "already and would act twice. Omit the adapter, or load it with its "
                "base."
            )
        if isinstance(named, str) and base and base_name(named) == base:
            warnings.warn(
                f"the adapter in {folder} was made for {base}; {model} is {base} with "
                f"the adapter {record.get('adapter')!r} merged into it.",
                stacklevel=4,
            )


def _digest(folder: Path) -> str | None:
    """Returns the SHA-256 of the adapter's tensor file, or None without one."""
    files = (folder / name for name in FILES)
    return next((sha256(file) for file in files if file.is_file()), None)
