"""Settings of a run, from a YAML file or nested dictionary and overrides.

A run is configured by six small dataclasses. The values of ``section.key=value``
overrides are YAML too. Types are strict: ``"8"`` is not a rank, and ``true`` is not a
number. All errors are reported together, and those about unknown keys suggest the
nearest known one.
"""

import copy
import dataclasses
import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import pydantic
import yaml

from lora_jax.config import LoRAConfig
from lora_jax.config_errors import PEFT_NAMES
from lora_jax.finetune.sections import (
    DataSettings,
    MeshSettings,
    ModelSettings,
    OutputSettings,
    TrainSettings,
)
from lora_jax.finetune.yaml_file import parse_yaml

CONFIG = "config.yaml"  # the settings' file in a run folder


def _lora(value: Any) -> LoRAConfig:
    if isinstance(value, LoRAConfig):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"must be a mapping; got {value!r}")
    try:
        return LoRAConfig.from_dict(value)
    except TypeError as error:
        raise ValueError(str(error)) from error


DEFAULT_LORA = _lora({})


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """All settings of a run.

    Attributes:
      model: the base.
      data: the examples.
      output: the run folder.
      lora: the adapters; see `LoRAConfig`. For an encoder, ``train`` defaults to the
        new head, ``["classifier"]``.
      train: the training.
      mesh: the devices.
    """

    model: ModelSettings
    data: DataSettings
    output: OutputSettings
    lora: Annotated[LoRAConfig, pydantic.PlainValidator(_lora)] = DEFAULT_LORA
    train: TrainSettings = dataclasses.field(default_factory=TrainSettings)
    mesh: MeshSettings = dataclasses.field(default_factory=MeshSettings)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values, by section."""
        return {**dataclasses.asdict(self), "lora": self.lora.to_dict()}

    def to_yaml(self) -> str:
        """Returns the settings as YAML that `load_settings` reads back unchanged."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


SECTIONS: dict[str, type] = get_type_hints(RunSettings)
ADAPTER = pydantic.TypeAdapter(RunSettings)

Config = str | os.PathLike[str] | Mapping[str, Any] | RunSettings


def load_settings(config: Config, overrides: Sequence[str] = ()) -> RunSettings:
    """Reads a run's settings and ``section.key=value`` overrides.

    Paths in the settings are relative to the working directory and made absolute,
    except for a ``model.path`` that does not exist, such as a hub id.

    Args:
      config: a YAML file; a run folder with a ``config.yaml`` (``output.dir`` is then
        that folder, even if it was moved); a nested dictionary, whose ``lora`` may be a
        `LoRAConfig`; or settings.
      overrides: each ``section.key=value``, the value in YAML.

    Returns:
      The settings.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: listing all errors: invalid YAML, unknown sections and keys with the
        nearest known one, values of the wrong type or out of range.
    """
    name, tree = _read(config)
    if not isinstance(tree, dict):
        raise ValueError(
            f"{name} must contain sections ({', '.join(SECTIONS)}); got {_short(tree)}."
        )
    faults = _unknown_keys(tree)
    for override in overrides:
        faults += _apply(tree, override)
    faults += _invalid(tree, {fault.split(":", 1)[0] for fault in faults})
    if faults:
        raise ValueError(
            f"{name}: {len(faults)} fault{'s' * (len(faults) > 1)} in the settings\n"
            + "\n".join(f"  {fault}" for fault in faults)
        )
    return _absolute(ADAPTER.validate_json(_to_json(tree), strict=True))


def differences(old: RunSettings, new: RunSettings) -> list[str]:
    """Returns a line like ``"train.epochs: 1 -> 2"`` for each setting that differs."""
    before, after = old.to_dict(), new.to_dict()
    return [
        f"{section}.{key}: {before[section][key]!r} -> {value!r}"
        for section, values in after.items()
        for key, value in values.items()
        if before[section][key] != value
    ]


def _read(config: Config) -> tuple[str, Any]:
    """Returns a config's name for error messages and its tree, which may be mutated."""
    if isinstance(config, RunSettings):
        return "config", config.to_dict()
    if isinstance(config, Mapping):
        lora = config.get("lora")
        own = {"lora": lora.to_dict()} if isinstance(lora, LoRAConfig) else {}
        return "config", copy.deepcopy({**config, **own})
    folder = Path(config)
    is_run = folder.is_dir()
    file = folder / CONFIG if is_run else folder
    if not file.is_file():
        raise FileNotFoundError(
            f"no config file at {file}{_nearby(file)}. A config is a YAML file."
        )
    tree = parse_yaml(file.read_bytes(), str(file))
    if is_run and isinstance(tree, dict) and isinstance(tree.get("output"), dict):
        tree["output"]["dir"] = str(folder)
    return str(file), tree


def _apply(tree: dict[str, Any], override: str) -> list[str]:
    """Applies an override to ``tree``; returns its faults."""
    name, equals, text = override.partition("=")
    section, dot, key = name.partition(".")
    if not equals or not dot:
        return [f"{override!r}: overrides must be section.key=value, like lora.rank=4"]
    if section not in SECTIONS:
        return [f"{name}: no section {section!r}. {_suggest(section, list(SECTIONS))}"]
    if key not in (fields := _fields(section)):
        return [f"{name}: unknown key. {_suggest(key, fields, section)}"]
    hint = get_type_hints(SECTIONS[section]).get(key)
    is_text = hint is str or (section != "lora" and hint == str | None)
    try:
        value = text if is_text and text != "null" else parse_yaml(text, name)
    except ValueError as error:
        return [str(error).replace("\n", " ")]
    if not isinstance(tree.get(section), dict):
        tree[section] = {}
    tree[section][key] = value
    return []


def _suggest(name: str, known: Sequence[str], section: str = "") -> str:
    """Returns a sentence with the closest of ``known``, or all of them."""
    if section == "lora" and name in PEFT_NAMES:
        return f"PEFT's {name} is {PEFT_NAMES[name]} here."
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"Did you mean {close[0]!r}?" if close else f"Known: {', '.join(known)}."


def _fields(section: str) -> list[str]:
    return [field.name for field in dataclasses.fields(SECTIONS[section])]


def _unknown_keys(tree: dict[str, Any]) -> list[str]:
    faults = []
    for section, values in list(tree.items()):
        if section not in SECTIONS:
            faults.append(
                f"{section}: no such section. {_suggest(str(section), list(SECTIONS))}"
            )
            del tree[section]
        elif values is None:
            del tree[section]
        elif isinstance(values, dict):
            known = _fields(section)
            for key in [key for key in values if key not in known]:
                hint = _suggest(str(key), known, section)
                faults.append(f"{section}.{key}: unknown key. {hint}")
                del values[key]
    return faults


def _invalid(tree: dict[str, Any], reported: set[str]) -> list[str]:
    """Returns the faults of values: types, ranges, and conflicts between fields."""
    try:
        settings = ADAPTER.validate_json(_to_json(tree), strict=True)
    except pydantic.ValidationError as error:
        faults = []
        for fault in error.errors(include_url=False):
            parts = [str(part) for part in fault["loc"] if part != "constrained"]
            where = ".".join(".".join(parts).split(".")[:2])
            message = fault["msg"].removeprefix("Value error, ").rstrip(".")
            message = message.replace("Input should be", "must be", 1)
            if fault["type"] == "missing":
                message = "missing, and it has no default"
            elif where != "lora":
                message = f"{message}; got {_short(fault['input'])}"
            line = f"{where}: {message}"
            if where not in reported and line not in faults:
                faults.append(line)
        return faults
    return _conflicts(settings)


def _conflicts(settings: RunSettings) -> list[str]:
    faults = []
    train = settings.train
    mesh = {axis: getattr(settings.mesh, axis) for axis in ("data", "fsdp", "tensor")}
    if min(mesh.values()) < -1 or 0 in mesh.values() or [*mesh.values()].count(-1) > 1:
        faults.append(
            "mesh: data, fsdp and tensor must be at least 1, or one of them -1 for the "
            f"remaining devices; got {mesh}"
        )
    for pattern in settings.mesh.rules:
        try:
            re.compile(pattern)
        except re.error as error:
            faults.append(
                f"mesh.rules: {pattern!r} is not a regular expression: {error}; keys "
                "match the end of a weight's path, like mlp/up/kernel"
            )
    if train.batch_size % train.accumulate:
        faults.append(
            f"train: batch_size must be a multiple of accumulate = {train.accumulate}; "
            f"got {train.batch_size}"
        )
    return faults


def _to_json(tree: Any) -> str:
    return json.dumps(_printable(tree), default=str)


def _printable(value: Any) -> Any:
    """Replaces integers that are too long to print by a description."""
    if isinstance(value, Mapping):
        return {key: _printable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_printable(item) for item in value]
    is_long = isinstance(value, int) and value.bit_length() > 64
    return f"an integer of {value.bit_length()} bits" if is_long else value


def _absolute(settings: RunSettings) -> RunSettings:
    data = {
        name: str(Path(value).expanduser().resolve())
        for name in ("train", "validation", "test")
        if (value := getattr(settings.data, name)) is not None
    }
    base = Path(settings.model.path).expanduser()
    model = {"path": str(base.resolve())} if base.exists() else {}
    output = {"dir": str(Path(settings.output.dir).expanduser().resolve())}
    return dataclasses.replace(
        settings,
        data=dataclasses.replace(settings.data, **data),
        model=dataclasses.replace(settings.model, **model),
        output=dataclasses.replace(settings.output, **output),
    )


def _nearby(file: Path) -> str:
    if not file.parent.is_dir():
        return f" (there is no folder {file.parent} either)"
    names = [p.name for p in file.parent.iterdir() if p.suffix in (".yaml", ".yml")]
    close = difflib.get_close_matches(file.name, sorted(names), n=1)
    return f" (did you mean {file.parent / close[0]}?)" if close else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
