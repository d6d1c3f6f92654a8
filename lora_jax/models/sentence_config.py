"""Folders of sentence-transformers: how embeddings are made of hidden states.

Beside a transformer's own files such a folder has ``modules.json``, a list of modules
that are applied one after the other: the transformer, a pooling, maybe dense layers and
a normalisation, each with its settings in a subfolder.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.files.json_file import parse_json, read_json, read_text
from lora_jax.models.fields import MAX_SIZE, Fields
from lora_jax.models.pooling import SENTENCE_POOLINGS

MODULES = "modules.json"
PROMPTS = "config_sentence_transformers.json"
INPUTS = "sentence_bert_config.json"
TOKENIZER = "tokenizer_config.json"
CONFIG = "config.json"  # of a module, in its folder
NORMALIZE = "normalize"
MAX_MODULES = 20
FLAGS = {  # before version 6 of sentence-transformers
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
ACTIVATIONS = {  # the last part of a PyTorch class, and our name
    "Identity": None,
    "GELU": "gelu",
    "ReLU": "relu",
    "SiLU": "silu",
    "Tanh": "tanh",
}


@dataclasses.dataclass(frozen=True)
class DenseStep:
    """A dense layer after the pooling.

    Attributes:
      folder: its folder in the model's.
      width: its outputs.
      has_bias: whether it has a bias.
      activation: applied to them, or None.
    """

    folder: str
    width: int
    has_bias: bool = True
    activation: str | None = "tanh"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentenceConfig:
    """How a model's hidden states become an embedding, and its texts token ids.

    Attributes:
      poolings: each of `SENTENCE_POOLINGS`; their results are concatenated.
      steps: applied to that: dense layers, and ``"normalize"`` to length 1.
      max_length: the longest text in tokens, or None.
      is_lower_case: whether texts are put in lower case first.
      prompts: pairs of a name and the text to put before an input.
      default_prompt: name of the prompt that is used if none is given, or None.
    """

    poolings: tuple[str, ...] = ("mean",)
    steps: tuple[DenseStep | str, ...] = ()
    max_length: int | None = None
    is_lower_case: bool = False
    prompts: tuple[tuple[str, str], ...] = ()
    default_prompt: str | None = None

    @property
    def denses(self) -> tuple[DenseStep, ...]:
        """The dense layers, in their order."""
        return tuple(step for step in self.steps if isinstance(step, DenseStep))

    def prompt(self, name: str | None) -> str:
        """Returns the text to put before a text.

        Args:
          name: of the prompt; None for the default one.

        Raises:
          ValueError: if there is no such prompt.
        """
        known, name = dict(self.prompts), name or self.default_prompt
        if name is not None and name not in known:
            raise ValueError(
                f"prompt must be one of the model's, {sorted(known)}; got {name!r}."
            )
        return known[name] if name else ""


def read_sentence(folder: Path) -> SentenceConfig | None:
    """Reads what a folder of sentence-transformers says of embeddings.

    Args:
      folder: a model folder.

    Returns:
      The config; None if the folder has no ``modules.json``, or no pooling in it (a
      model that scores pairs, say).

    Raises:
      ValueError: listing everything that is wrong or not supported.
      FileNotFoundError: if a module's config is missing.
    """
    if not (folder / MODULES).is_file():
        return None
    fields = Fields({}, "folder of sentence-transformers")
    modules = _modules(folder, fields)
    if not fields.faults and "Pooling" not in [kind for kind, _ in modules]:
        return None
    poolings: tuple[str, ...] = ()
    steps: list[DenseStep | str] = []
    for number, (kind, path) in enumerate(modules):
        is_pooled = bool(poolings)
        if kind == "Transformer" and number == 0:
            continue
        if kind == "Pooling" and not is_pooled:
            poolings = _poolings(fields.nested(read_json(folder / path / CONFIG)))
        elif kind == "Dense" and is_pooled:
            settings = fields.nested(read_json(folder / path / CONFIG))
            steps.append(_dense(path, settings))
        elif kind == "Normalize" and is_pooled:
            steps.append(NORMALIZE)
        elif kind != "Dropout":  # which does nothing here
            fields.faults.append(
                f"module {number} must be a Transformer, then one Pooling, then any of "
                f"Dense, Normalize and Dropout; got {kind}"
            )
    options = _text_options(folder, fields)
    if fields.faults:
        faults = "; ".join(dict.fromkeys(fields.faults))
        raise ValueError(
            f"{folder / MODULES} doesn't describe embeddings that are computed here: "
            f"{faults}."
        )
    return SentenceConfig(poolings=poolings, steps=tuple(steps), **options)


def _modules(folder: Path, fields: Fields) -> list[tuple[str, str]]:
    """Returns the kind of each module, a class name, and its folder."""
    try:
        listed = parse_json(read_text(folder / MODULES))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / MODULES} must be JSON: {error}.") from error
    if not isinstance(listed, list) or not 0 < len(listed) <= MAX_MODULES:
        fields.faults.append(f"it must be a list of 1 to {MAX_MODULES} modules")
        return []
    found = []
    for each in listed:
        each = each if isinstance(each, dict) else {}
        kind, path = each.get("type"), each.get("path", "")
        is_inside = isinstance(path, str) and Path(path).name == path and path != ".."
        if not isinstance(kind, str) or not is_inside:
            fields.faults.append(
                f"a module must have a type, and a path in the folder; got {each}"[:200]
            )
            continue
        found.append((kind.rpartition(".")[2], path))
    return found


def _poolings(settings: Fields) -> tuple[str, ...]:
    config = settings.config
    if config.get("include_prompt") is False:
        settings.faults.append("include_prompt must be true: all tokens are pooled")
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in FLAGS.items() if config.get(key) is True]
        unknown = sorted(
            key
            for key, value in config.items()
            if key.startswith("pooling_mode_") and value is True and key not in FLAGS
        )
        modes = [*modes, *unknown] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if (
        not isinstance(modes, list)
        or not modes
        or any(mode not in SENTENCE_POOLINGS for mode in modes)
    ):
        settings.faults.append(
            f"pooling_mode must be of {SENTENCE_POOLINGS}; got {modes!r}"[:300]
        )
        return ("mean",)
    return tuple(modes)


def _dense(path: str, settings: Fields) -> DenseStep:
    width = settings.integer("out_features")
    if width < 1:
        settings.faults.append(f"out_features must be at least 1; got {width}")
    full = settings.text("activation_function", "Tanh")
    name = full.rpartition(".")[2]
    if name not in ACTIVATIONS:
        settings.faults.append(
            f"activation_function must be one of {sorted(ACTIVATIONS)}; got {full!r}"
        )
    settings.only("use_residual", False)
    for key in ("module_input_name", "module_output_name"):
        settings.only(key, "sentence_embedding")
    return DenseStep(path, width, settings.flag("bias", True), ACTIVATIONS.get(name))


def _text_options(folder: Path, fields: Fields) -> dict[str, Any]:
    """Reads how texts become tokens; both files may be absent."""

    def read(name: str) -> Fields:
        is_there = (folder / name).is_file()
        return fields.nested(read_json(folder / name) if is_there else {})

    inputs, texts = read(INPUTS), read(PROMPTS)
    longest = inputs.integer("max_seq_length", None)
    if longest is None:  # where sentence-transformers 6 keeps it; may be 1e30
        limit = read(TOKENIZER).config.get("model_max_length")
        longest = limit if type(limit) is int and limit <= MAX_SIZE else None
    if longest is not None and longest < 1:
        fields.faults.append(f"max_seq_length must be at least 1; got {longest}")
    prompts: Mapping[str, Any] = texts.mapping("prompts") or {}
    if wrong := [name for name, text in prompts.items() if not isinstance(text, str)]:
        fields.faults.append(f"prompts must be strings; {wrong[:8]} are not")
    default = texts.text("default_prompt_name", None)
    if default is not None and default not in prompts:
        fields.faults.append(
            f"default_prompt_name must be one of {sorted(prompts)}; got {default!r}"
        )
    return {
        "max_length": longest,
        "is_lower_case": inputs.flag("do_lower_case"),
        "prompts": tuple(prompts.items()),
        "default_prompt": default,
    }
