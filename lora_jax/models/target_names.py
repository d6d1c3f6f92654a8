"""Hugging Face's module names in a `LoRAConfig`, as PEFT's configs have them."""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from lora_jax.config import LoRAConfig
from lora_jax.models.family import Family

_PLAIN = re.compile(r"[\w-]+(\.[\w-]+)*")


def own_names(config: LoRAConfig, family: Family) -> LoRAConfig:
    """Replaces Hugging Face's names of a family's modules by the paths here.

    A name is one of theirs if no path here ends with it and a module's name there does:
    ``k_proj`` is ``attention/key``, ``layers.3.mlp.up_proj`` is ``layer_3/mlp/up``, and
    BERT's ``output.dense`` is both ``attention/output`` and ``mlp/down``.

    Args:
      config: its lists of names, and patterns that are plain names, may have either's;
        regular expressions stay as they are.
      family: of the model.

    Returns:
      The config; names that are neither's stay, and are an error where they are used.
    """

    def of_list(names: Any) -> Any:
        if isinstance(names, str):
            return names
        return tuple(dict.fromkeys(p for name in names for p in _own(name, family)))

    def of_patterns(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for pattern, value in pairs:
            for path in _own(pattern, family):
                found.setdefault(path, value)
        return found

    return dataclasses.replace(
        config,
        **{name: of_list(getattr(config, name)) for name in _LISTS},
        **{name: of_patterns(getattr(config, name)) for name in _PATTERNS},
    )


_LISTS = ("targets", "exclude", "train")
_PATTERNS = ("rank_pattern", "alpha_pattern")


def _own(name: str, family: Family) -> list[str]:
    """Returns the paths, or their ends, for one name; itself if it isn't theirs."""
    if not _PLAIN.fullmatch(name) or any(
        f"/{path}".endswith(f"/{name}") for path in family.modules
    ):
        return [name]
    paths = []
    for path, bare in family.modules.items():
        for theirs in (bare, family.renamed(bare)):
            for prefix in ("", family.prefix, *family.prefixes):
                number = _match_end(prefix + theirs, name)
                if number is not None:
                    inside = path.rpartition("layer_{i}/")[2]
                    paths.append(path.replace("{i}", number) if number else inside)
    return list(dict.fromkeys(paths)) or [name]


def _match_end(template: str, name: str) -> str | None:
    """Returns the layer's number that a name has where it is the end of a template.

    Empty if the name has none; None if it isn't the end.
    """
    wanted, given = template.split("."), name.split(".")
    number = ""
    if len(given) > len(wanted):
        return None
    for own, word in zip(wanted[-len(given) :], given, strict=True):
        if own == "{i}" and word.isdecimal():
            number = word
        elif own != word:
            return None
    return number
