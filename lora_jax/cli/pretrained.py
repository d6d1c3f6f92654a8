"""`--model` and `--adapter`: what the words of the commands stand for."""

from typing import Any, NamedTuple

from lora_jax.array_types import PyTree
from lora_jax.files.adapter import read_adapter_config
from lora_jax.finetune.errors import UserError
from lora_jax.interop.pretrained import find_adapter, load_model, read_external
from lora_jax.models.loaded import LoadedModel


class Pretrained(NamedTuple):
    """A model, perhaps with an adapter on it.

    Attributes:
      loaded: the model, with the adapter if there is one.
      extra: what the adapter's saver kept beside it; None without an adapter.
    """

    loaded: LoadedModel
    extra: dict[str, Any] | None

    @property
    def has_head(self) -> bool:
        """Whether there is a classification head to take logits from."""
        return self.loaded.has_head

    @property
    def variables(self) -> dict[str, PyTree]:
        """What ``loaded.module.apply`` takes."""
        return self.loaded.variables


def load_decoder(
    model: str | None, adapter: str | None, *, scan_layers: bool | None = None
) -> Pretrained:
    """As `load`; an encoder is an error.

    Args:
      model: see `load`.
      adapter: see `load`.
      scan_layers: whether the blocks are one loop, which compiles faster but makes a
        copy of each block's weights when it comes to it. None and True: an adapter of
        ours is put on what it was trained on.

    Returns:
      The model.
    """
    found = load(model, adapter, scan_layers=scan_layers)
    if found.loaded.family.head:
        raise UserError(
            f"{found.loaded.path} must be a decoder; it is an encoder, which predicts "
            "no tokens. `lora-jax encode` gives its embeddings."
        )
    return found


def load(model: str | None, adapter: str | None, **options: Any) -> Pretrained:
    """Loads a model and puts an adapter on it.

    Args:
      model: folder, package or hub id; None takes that which the adapter names.
      adapter: run folder, adapter folder of ours or of another tool, or None.
      **options: as for `load_model`.

    Returns:
      The model.

    Raises:
      UserError: if neither says which model (an adapter of another tool never does).
      ValueError: if the adapter is damaged, or was not made on this base.
    """
    if adapter is None:
        if model is None:
            raise UserError("--model is missing: which model is to be used?")
        return Pretrained(load_model(model, **options), None)
    folder = find_adapter(adapter)
    if (foreign := read_external(folder)) is not None:
        if model is None:
            raise UserError(
                f"{folder} is an adapter of another tool, and the base that it may "
                "name is not looked for: add --model."
            )
        return Pretrained(load_model(model, foreign, **options), {})
    if options.get("scan_layers"):
        options["scan_layers"] = None  # as it was trained
    extra = read_adapter_config(folder)["extra"]
    model = model or extra.get("model")
    if model is None:
        raise UserError(
            f"{folder} does not say which model it was trained on: add --model."
        )
    return Pretrained(load_model(model, folder, **options), extra)
