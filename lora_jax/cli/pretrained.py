"""`--model` and `--adapter`: what they stand for."""

import sys
from pathlib import Path
from typing import Any

from lora_jax.files.adapter import CONFIG, FORMAT, read_adapter_config
from lora_jax.files.json_file import read_json
from lora_jax.finetune.errors import UserError
from lora_jax.interop.external import ExternalAdapter
from lora_jax.interop.pretrained import find_adapter, load_model, read_external
from lora_jax.models.load import LoadedModel


def load(model: str | None, adapter: str | None, **options: Any) -> LoadedModel:
    """Loads a model and puts an adapter on it.

    Args:
      model: folder, package or hub id; None takes that which the adapter names.
      adapter: run folder, adapter folder of ours or of another tool, or None.
      **options: as for `load_model`; an adapter of ours that is asked to be scanned is
        put on what it was trained on.

    Returns:
      The model.

    Raises:
      UserError: if neither says which model (an adapter of another tool never does).
      ValueError: if the adapter is damaged, or was not made on this base.
    """
    loaded = _load(model, adapter, options)
    if loaded.family.is_tower and loaded.unused:
        print(f"({loaded.unused_text()})", file=sys.stderr)
    return loaded


def _load(
    model: str | None, adapter: str | None, options: dict[str, Any]
) -> LoadedModel:
    if adapter is None:
        if model is None:
            raise UserError("--model is missing: which model is to be used?")
        return load_model(model, **options)
    folder = find_adapter(adapter)
    external = read_external(folder)
    if external is None and options.get("scan_layers"):
        options["scan_layers"] = None  # as it was trained
    return load_model(base_of(folder, model, external), folder, **options)


def load_decoder(
    model: str | None, adapter: str | None, *, scan_layers: bool | None = None
) -> LoadedModel:
    """As `load`; an encoder is an error.

    Args:
      model: see `load`.
      adapter: see `load`.
      scan_layers: whether the blocks are one loop, which compiles faster but makes a
        copy of each block's weights when it comes to it.

    Returns:
      The model.
    """
    loaded = load(model, adapter, scan_layers=scan_layers)
    if loaded.family.head:
        raise UserError(
            f"{loaded.path} must be a decoder; it is an encoder, which predicts no "
            "tokens. `lora-jax encode` gives its embeddings."
        )
    return loaded


def base_of(folder: Path, model: str | None, external: ExternalAdapter | None) -> str:
    """Returns the model that was asked for, or that an adapter was trained on.

    Args:
      folder: of the adapter.
      model: what was asked for.
      external: the adapter, if it is another tool's.

    Returns:
      Folder, package or hub id.

    Raises:
      UserError: if neither says which.
    """
    if model is not None:
        return model
    if external is not None:
        raise UserError(
            f"{folder} is an adapter of another tool, and the base that it may name is "
            "not looked for: add --model."
        )
    model = read_adapter_config(folder)["extra"].get("model")
    if model is None:
        raise UserError(
            f"{folder} does not say which model it was trained on: add --model."
        )
    return model


def adapter_extra(adapter: str | None) -> dict[str, Any]:
    """Returns what was kept beside an adapter of ours; nothing of another tool's."""
    if adapter is None:
        return {}
    meta = read_json(find_adapter(adapter) / CONFIG)
    return meta["extra"] if meta.get("format") == FORMAT else {}
