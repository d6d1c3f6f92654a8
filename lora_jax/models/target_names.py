"""Accepts Hugging Face's module names, as used in PEFT's configs, in a `LoRAConfig`."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.config import LoRAConfig
from lora_jax.models.family import Family
from lora_jax.names import BIAS, EMBED, EXPERTS, KERNEL, ROUTER, WORD_EMBEDDING

_PLAIN = re.compile(r"[\w-]+(\.[\w-]+)*")
_OF_EXPERTS = re.compile(rf"/({EXPERTS}/|{ROUTER}$)")
_OF_MLP = re.compile(r"/mlp/(gate|up|down|gate_up)$")


def translate_names(
    config: LoRAConfig, family: Family, model: Any = None
) -> LoRAConfig:
    """Replaces Hugging Face's names for a family's modules by paths in this library.

    A name counts as theirs if it ends one of their module names and no path here:
    ``k_proj`` is ``attention/key``, ``layers.3.mlp.up_proj`` is ``layer_3/mlp/up``, and
    BERT's ``output.dense`` is both ``attention/output`` and ``mlp/down``. In a mixture
    of experts ``down_proj`` is that of all experts, and of the layers with a plain MLP
    if there are any.

    Args:
      config: lists of names, and patterns that are plain names, may use either's names;
        regular expressions stay as they are. A list of ``tokens`` is that of the
        embedding.
      family: the model's.
      model: the model's own config, which tells what it has of the family's modules;
        None for all of them.

    Returns:
      The config; unknown names stay, and raise where they are used.
    """
    modules = _modules(family, model)

    def of_list(names: Any) -> Any:
        if isinstance(names, str):
            return names
        paths = (p for name in names for p in _translate(name, family, modules))
        return tuple(dict.fromkeys(paths))

    def of_patterns(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for pattern, value in pairs:
            for path in _translate(pattern, family, modules):
                found.setdefault(path, value)
        return found

    tokens = config.tokens_by_layer
    if "" in tokens:  # a list: of the embedding, and of a head that is tied to it
        tokens = {WORD_EMBEDDING if family.head else EMBED: tokens[""]}
    return dataclasses.replace(
        config,
        tokens=of_patterns([*tokens.items()]),
        **{name: of_list(getattr(config, name)) for name in _LISTS},
        **{name: of_patterns(getattr(config, name)) for name in _PATTERNS},
    )


_LISTS = ("targets", "exclude", "train")
_PATTERNS = ("rank_pattern", "alpha_pattern")


def _modules(family: Family, model: Any) -> dict[str, str]:
    """Returns those of a family's modules that a model of this config has."""
    experts = getattr(model, "experts", None)
    has_mlp = experts is None or model.has_mlp

    def is_there(path: str) -> bool:
        if _OF_EXPERTS.search(path):
            return experts is not None
        return has_mlp or not _OF_MLP.search(path)

    found = family.modules.items()
    return {p: n for p, n in found if model is None or is_there(p)}


def _translate(name: str, family: Family, modules: Mapping[str, str]) -> list[str]:
    """Returns the paths, or their ends, for a name; itself if it isn't theirs."""
    if not _PLAIN.fullmatch(name) or any(
        f"/{family.whole_path(path)}".endswith(f"/{name}") for path in modules
    ):
        return [name]
    given, paths = name, []
    name = name.removesuffix(".weight")  # as in PEFT's target_parameters
    for path, bare in modules.items():
        if path.rpartition("/")[2] in (KERNEL, BIAS):
            continue  # of a module that is there too
        for theirs in (bare, family.renamed(bare)):
            for prefix in ("", family.prefix, *family.prefixes):
                number = _match_end(prefix + theirs, name)
                if number is not None:
                    whole = family.whole_path(path)
                    inside = whole.rpartition("layer_{i}/")[2]
                    paths.append(whole.replace("{i}", number) if number else inside)
    return list(dict.fromkeys(paths)) or [given]


def _match_end(template: str, name: str) -> str | None:
    """Returns the layer number in a name that matches the end of a template.

    Empty if the name has no number; None if it doesn't match.
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
