"""PEFT's ``adapter_config.json``, interpreted as PEFT does.

Every key is read here, known to have no effect on the adapter's output, unsupported
unless neutral (an error names it), or unknown (kept and reported).
"""

import re
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Any, NamedTuple

from lora_jax.config import ALL_LINEAR, LEAST, MAX_RANK, MOST
from lora_jax.files.optional import load_optional
from lora_jax.interop.external import ADAPTER_CONFIG
from lora_jax.interop.vera import KIND as VERA
from lora_jax.interop.vera import as_lora_config

Check = Callable[[Any], bool]
Field = tuple[Check, str, Any]  # a key's validity check, its description, its default
PEFT_VERSION = "0.21.2"  # the version whose format this is

# Initialisations that leave the base unchanged; the others decompose it on loading.
SILENT_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
NO_EFFECT = {
    *("task_type", "base_model_name_or_path", "inference_mode", "peft_version"),
    *("revision", "auto_mapping", "megatron_core", "qalora_group_size"),
    # Configs of initialisations, then of the backward pass and the runtime.
    *("corda_config", "eva_config", "loftq_config", "lora_ga_config"),
    *("velora_config", "runtime_config"),
}
NEUTRAL = {  # anything but one of these values changes the maths
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "megatron_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (None, False),
    "use_qalora": (False, None),
}
WHY = {
    "alora_invocation_tokens": " (activated LoRA, whose adapter acts only from those "
    "tokens on)",
}


class PeftConfig(NamedTuple):
    """A PEFT config: its keys by PEFT's names, and PEFT's own matching of modules.

    Attributes:
      r: rank of modules that no pattern matches.
      lora_alpha: alpha of modules that no pattern matches.
      target_modules: names or name endings, or one regular expression for the full
        name.
      exclude_modules: the same for modules never adapted; wins over the targets.
      layers_to_transform: indices of the layers to adapt, or None for all.
      layers_pattern: names that a layer's index follows; empty for any name.
      rank_pattern: ranks by a regular expression for the end of a name.
      alpha_pattern: alphas by the same.
      target_parameters: parameters adapted by themselves (of experts), or the ends of
        names.
      modules_to_save: modules trained in full.
      trainable_token_indices: ids of the tokens whose rows are trained, by the end of a
        module's name; the empty name stands for the input embedding.
      ensure_weight_tying: whether changes to a tied embedding apply to the head as
        well.
      lora_bias: whether updates have a bias.
      use_rslora: scale by ``alpha / sqrt(rank)``.
      use_dora: whether modules have magnitudes.
      fan_in_fan_out: says how the base stores weights; without effect here.
      lora_dropout: dropout of the adapters' inputs.
      bias: biases trained in full.
      is_vera: whether the file holds VeRA's vectors, and the rest is of the LoRA
        adapter with the same update.
      settings: the file's content; of VeRA as that of LoRA.
      unknown: unrecognised keys.
    """

    r: int
    lora_alpha: float
    target_modules: str | list[str]
    exclude_modules: str | list[str]
    layers_to_transform: list[int] | None
    layers_pattern: list[str]
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_parameters: list[str]
    modules_to_save: list[str]
    trainable_token_indices: dict[str, list[int]]
    ensure_weight_tying: bool
    lora_bias: bool
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    lora_dropout: float
    bias: str
    is_vera: bool
    settings: dict[str, Any]
    unknown: tuple[str, ...]

    def rank_for(self, name: str) -> int:
        """Returns the rank of a module; the first pattern that matches wins."""
        return _first_match(self.rank_pattern, name, self.r)

    def alpha_for(self, name: str) -> float:
        """Returns alpha for a module, looked up independently of the rank."""
        return float(_first_match(self.alpha_pattern, name, self.lora_alpha))

    def scaling_for(self, name: str) -> float:
        """Returns ``alpha / rank``, or ``alpha / sqrt(rank)``."""
        rank = self.rank_for(name)
        return self.alpha_for(name) / (rank**0.5 if self.use_rslora else rank)

    def is_target(self, name: str) -> bool | None:
        """Returns whether PEFT adapts the module with this full Hugging Face name.

        None for ``"all-linear"``, which depends on the module's type.
        """
        if any(_is_named(self.target_parameters, n) for n in (name, f"{name}.weight")):
            return True
        if _is_named(self.exclude_modules, name) or any(
            match(rf"(^|.*\.){saved}($|\..*)", name) for saved in self.modules_to_save
        ):
            return False
        if self.target_modules == ALL_LINEAR:
            return None
        if isinstance(self.target_modules, str) or name in self.target_modules:
            return _is_named(self.target_modules, name)
        return _is_named(self.target_modules, name) and self._has_layer(name)

    def _has_layer(self, name: str) -> bool:
        if not self.layers_to_transform:
            return True
        # The first number after any segment, or after one named by `layers_pattern`.
        named = [rf"(?:^|.*?\.){pattern}" for pattern in self.layers_pattern]
        for start in named or [r".*?\.[^.]*"]:
            if found := match(rf"{start}\.(?P<index>\d+)\.", name):
                return int(found["index"]) in self.layers_to_transform
        return False


def parse_config(settings: Mapping[str, Any], origin: str) -> PeftConfig:
    """Parses and checks a config's settings.

    Args:
      settings: the content of ``adapter_config.json``.
      origin: its name in errors.

    Raises:
      ValueError: if it isn't for LoRA, has values of the wrong type, or uses
        unsupported options; lists all of them.
    """
    kind = settings.get("peft_type")
    if kind not in ("LORA", VERA):
        raise ValueError(
            f"{origin} must have peft_type 'LORA' or {VERA!r}; got {kind!r}. Other "
            "PEFT methods can't be loaded: merge the adapter into its base with PEFT."
        )
    if kind == VERA:
        settings = as_lora_config(settings)
    values, faults = read_fields(settings, _FIELDS)
    if settings.get("target_modules") is None and not values["target_parameters"]:
        faults.append("target_modules must name the adapted modules; got null")
    faults += [
        f"{key} = {_short(settings[key])} is not supported: it changes what the adapter"
        f" computes{WHY.get(key, '')}"
        for key, neutral in NEUTRAL.items()
        if key in settings and not any(_same(settings[key], value) for value in neutral)
    ]
    init = settings.get("init_lora_weights", True)
    if not any(_same(init, value) for value in SILENT_INITS):
        faults.append(
            f"init_lora_weights = {_short(init)} changes the base, and the adapter is "
            "for the changed one. Convert it to an adapter of the original base by "
            "saving it with PEFT's `path_initial_model_for_weight_conversion`"
        )
    if values["lora_bias"] is True and values["use_dora"] is True:
        faults.append("lora_bias must be false with use_dora; got true")
    if faults:
        raise ValueError(f"{origin} has {len(faults)} faults: {'; '.join(faults)}.")
    known = {*_FIELDS, *NEUTRAL, *NO_EFFECT, "peft_type", "init_lora_weights"}
    targets, tokens = values["target_modules"], values["trainable_token_indices"]
    if isinstance(targets, str) and targets.lower() == ALL_LINEAR:
        values["target_modules"] = ALL_LINEAR
    if not isinstance(tokens, dict):
        values["trainable_token_indices"] = {"": tokens} if tokens else {}
    if isinstance(values["layers_to_transform"], int):
        values["layers_to_transform"] = [values["layers_to_transform"]]
    if isinstance(pattern := values["layers_pattern"], str):
        values["layers_pattern"] = [pattern] if pattern else []
    values["modules_to_save"] = list(dict.fromkeys(values["modules_to_save"]))
    return PeftConfig(
        **values,
        is_vera=kind == VERA,
        settings=dict(settings),
        unknown=tuple(sorted(set(settings) - known)),
    )


def read_fields(
    settings: Mapping[str, Any], fields: Mapping[str, Field]
) -> tuple[dict[str, Any], list[str]]:
    """Reads ``fields`` of a tool's config, with defaults for absent or null keys.

    Returns the value of each key, and the problems found.
    """
    values, faults = {}, []
    for key, (is_valid, wanted, default) in fields.items():
        value = settings.get(key)
        values[key] = default if value is None else value
        if not is_valid(values[key]):
            faults.append(f"{key} must be {wanted}; got {_short(value)}")
    return values, faults


def match(pattern: str, name: str) -> Any:
    """Matches the start of a module's name like `re.match`, but with a timeout.

    Raises:
      ValueError: if matching takes over a second, as ``(a+)+`` can; `re` might never
        return.
    """
    regex = load_optional("matching PEFT's patterns", "regex")  # has a timeout
    try:
        return regex.match(pattern, name, timeout=1.0)
    except (TimeoutError, regex.error) as error:
        raise ValueError(
            f"{ADAPTER_CONFIG}: the pattern {_short(pattern)} must match or fail on "
            f"{name!r} within a second; got: {error or 'timeout'}. Avoid a repetition "
            "inside a repetition."
        ) from error


def _is_named(patterns: str | list[str], name: str) -> bool:
    if isinstance(patterns, str):
        return bool(patterns) and match(rf"(?:{patterns})\Z", name) is not None
    return any(name == p or name.endswith(f".{p}") for p in patterns)


def _first_match(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    for key, value in patterns.items():
        if match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _same(value: Any, neutral: Any) -> bool:
    """Compares values of one type: 0 is not False here, nor 1 True."""
    return type(value) is type(neutral) and value == neutral


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _is_a(kind: type) -> Check:
    return lambda value: type(value) is kind


def is_positive(value: Any) -> bool:
    """Returns whether a value is a positive number that float32 can compute with."""
    return type(value) in (int, float) and LEAST <= value <= MOST


def is_rank(value: Any) -> bool:
    """Returns whether a value is a valid rank."""
    return type(value) is int and 1 <= value <= MAX_RANK


def _is_regex(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _patterns(check: Check) -> Check:
    def is_valid(value: Any) -> bool:
        return isinstance(value, dict) and all(
            _is_regex(key) and check(item) for key, item in value.items()
        )

    return is_valid


def _either(*checks: Check) -> Check:
    return lambda value: any(check(value) for check in checks)


def is_share(value: Any) -> bool:
    """Returns whether a value is a number in [0, 1]."""
    return type(value) in (int, float) and 0 <= value <= 1


def _are_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and all(type(i) is int and 0 <= i < 1 << 31 for i in value)
        and len(set(value)) == len(value)
    )


def _are_tokens(value: Any) -> bool:
    groups = value.values() if isinstance(value, dict) else [value]
    return all(map(_are_ids, groups))


_NAMES = "a list of names or a regular expression"
_is_names = _either(_is_regex, _list_of(_is_a(str)))
_FIELDS: dict[str, Field] = {
    "r": (is_rank, "an integer of at least 1", 8),
    "lora_alpha": (is_positive, "a number above 0", 8),
    "target_modules": (_is_names, _NAMES, []),
    "exclude_modules": (_is_names, _NAMES, []),
    "layers_to_transform": (
        _either(_is_a(NoneType), _is_a(int), _list_of(_is_a(int))),
        "an integer or a list of them",
        None,
    ),
    "layers_pattern": (
        _either(_is_regex, _list_of(_is_regex)),
        "a regular expression or a list of them",
        [],
    ),
    "rank_pattern": (_patterns(is_rank), "ranks by regular expression", {}),
    "alpha_pattern": (_patterns(is_positive), "alphas by regular expression", {}),
    "target_parameters": (_list_of(_is_a(str)), "a list of names", []),
    "modules_to_save": (_list_of(_is_regex), "a list of names", []),
    "trainable_token_indices": (
        _are_tokens,
        "a list of token ids, each once, or one for each module",
        [],
    ),
    "ensure_weight_tying": (_is_a(bool), "true or false", False),
    "lora_bias": (_is_a(bool), "true or false", False),
    "use_rslora": (_is_a(bool), "true or false", False),
    "use_dora": (_is_a(bool), "true or false", False),
    "fan_in_fan_out": (_is_a(bool), "true or false", False),
    "lora_dropout": (is_share, "in [0, 1]", 0.0),
    "bias": (
        lambda value: value in ("none", "lora_only", "all"),
        "'none', 'lora_only' or 'all'",
        "none",
    ),
}
