"""`--model` and `--adapter`: what the words of `encode` and `merge` stand for."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from lora_jax.array_types import PyTree
from lora_jax.cli.console import UserError
from lora_jax.cli.runfolder import ADAPTER, open_run
from lora_jax.io.adapter import CONFIG, Adapter, load_adapter
from lora_jax.models.load import HEAD, LoadedModel, load_model
from lora_jax.names import FROZEN, PARAMS, TRAINABLE
from lora_jax.nn.adapt import Adapted, adapt
from lora_jax.tree.fingerprint import fingerprint


class Pretrained(NamedTuple):
    """A model, perhaps with an adapter on it.

    Attributes:
      loaded: the base.
      module: what to call: the base's module, or that with adapters.
      variables: for ``module.apply``.
      adapter: as it was loaded, or None.
      has_head: whether there is a head to take logits from.
    """

    loaded: LoadedModel
    module: Any
    variables: dict[str, PyTree]
    adapter: Adapter | None
    has_head: bool


def find_adapter(path: str | Path) -> Path:
    """Returns the adapter folder that a path means: itself, or that of a run folder.

    Args:
      path: an adapter folder or a run folder, told apart by their contents.

    Returns:
      The folder with ``adapter_config.json``.

    Raises:
      UserError: if it is neither, or another tool's adapter.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"no adapter at {folder}: there is no such folder.")
    if (folder / "config.yaml").is_file():
        folder = open_run(folder)[0] / ADAPTER
    file = folder / CONFIG
    if not file.is_file():
        raise UserError(
            f"{folder} is neither a run folder nor an adapter folder: it has no "
            f"{CONFIG}."
        )
    if "peft_type" in _json(file):
        raise UserError(
            f"{folder} is a PEFT adapter; supported are run folders and adapter "
            "folders of lora_jax."
        )
    return folder


def load(model: str | None, adapter: str | None) -> Pretrained:
    """Loads a model and puts an adapter on it.

    Args:
      model: folder, package or hub id; None takes that which the adapter names.
      adapter: run or adapter folder, or None.

    Returns:
      The model.

    Raises:
      UserError: if neither says which model.
      ValueError: if the adapter is damaged, or was not made on this base.
    """
    if adapter is None:
        if model is None:
            raise UserError("--model is missing: which model is to be used?")
        loaded = load_model(model)
        has_head = HEAD in loaded.params
        return Pretrained(
            loaded, loaded.module, {PARAMS: loaded.params}, None, has_head
        )
    folder = find_adapter(adapter)
    found = load_adapter(folder)
    model = model or found.extra.get("model")
    if model is None:
        raise UserError(
            f"{folder} does not say which model it was trained on: add --model."
        )
    head = found.variables.get(PARAMS, {}).get(HEAD)
    loaded = load_model(
        model,
        num_labels=None if head is None else head["kernel"].shape[-1],
        pooling=found.extra.get("pooling"),
    )
    adapted: Adapted = adapt(loaded.module, found.config, deterministic=True)
    fresh = adapted.attach(loaded.params, jax.random.key(0))
    expected: Mapping[str, Any] = {name: fresh.get(name, {}) for name in TRAINABLE}
    found = load_adapter(
        folder, expected=expected, fingerprint=fingerprint(fresh[FROZEN])
    )
    variables = {FROZEN: fresh[FROZEN], **found.variables}
    return Pretrained(loaded, adapted, variables, found, HEAD in loaded.params)


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} must be JSON; it can't be read: {error}.") from error
    return value if isinstance(value, dict) else {}
