"""Loading the model of `--model` and `--adapter`."""

import sys
from typing import Any

from lora_jax.files.adapter import CONFIG, FORMAT
from lora_jax.files.json_file import read_json
from lora_jax.finetune.errors import UserError
from lora_jax.interop.adapter_folder import find_adapter
from lora_jax.interop.pretrained import load_model
from lora_jax.models.load import LoadedModel


def load(model: str | None, adapter: str | None, **options: Any) -> LoadedModel:
    """Loads a model with an adapter.

    Args:
      model: folder, package or hub id; None for the one that the adapter names.
      adapter: run folder, adapter folder of ours or of another tool, or None.
      **options: options of `load_model`; ``scan_layers=True`` has no effect on an
        adapter of ours, which is loaded as it was trained.

    Raises:
      UserError: if neither is given.
      ValueError: if the adapter names no base, is damaged, or was trained on another.
    """
    if adapter is None and model is None:
        raise UserError("--model is missing: which model is to be used?")
    if options.get("scan_layers") and adapter is not None:
        settings = read_json(find_adapter(adapter) / CONFIG)
        if settings.get("format") == FORMAT:
            options["scan_layers"] = None
    loaded = load_model(model, adapter, **options)
    if loaded.family.is_multimodal and loaded.unused:
        print(f"({loaded.unused_text()})", file=sys.stderr)
    return loaded


def load_decoder(
    model: str | None, adapter: str | None, *, scan_layers: bool | None = None
) -> LoadedModel:
    """Like `load`, but an encoder is a `UserError`.

    Scanned layers compile faster but copy each block's weights when they run.
    """
    loaded = load(model, adapter, scan_layers=scan_layers)
    check_decoder(loaded)
    return loaded


def check_decoder(loaded: LoadedModel) -> None:
    """Raises a `UserError` for an encoder."""
    if loaded.family.head:
        raise UserError(
            f"{loaded.path} must be a decoder; it is an encoder, which predicts no "
            "tokens. `lora-jax encode` computes its embeddings."
        )
    if not getattr(loaded.config, "predicts", True):
        raise UserError(
            f"{loaded.path} must predict tokens; it makes embeddings only (it has no "
            "head, or tokens see later ones). `lora-jax encode` computes them."
        )
