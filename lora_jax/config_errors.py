"""The checks of `LoRAConfig`'s fields, all reported together."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

ALL_LINEAR = "all-linear"
INITS = ("uniform", "gaussian", "orthogonal", "pissa", "olora", "lora_ga", "eva")
_PISSA = re.compile("pissa_niter_[0-9]{1,3}")
MAX_RANK = 1 << 20
LEAST, MOST = 1e-30, 1e30  # what float32 computes with; 1 / LEAST is below 1e30
BIASES = ("none", "lora_only", "all")

PEFT_NAMES = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout_rate",
    "target_modules": "targets",
    "exclude_modules": "exclude",
    "layers_to_transform": "layers",
    "modules_to_save": "train",
    "use_rslora": "rslora",
    "use_dora": "dora",
    "init_lora_weights": "init",
    "trainable_token_indices": "tokens",
}


def unknown_fields(unknown: Iterable[str], known: Iterable[str]) -> str:
    """Describes unknown fields of a config, translating PEFT's names."""
    hints = [f"{n} is {PEFT_NAMES[n]} here" for n in unknown if n in PEFT_NAMES]
    return (
        f"LoRAConfig has no field {', '.join(unknown)}; its fields are "
        f"{', '.join(known)}.{' ' * bool(hints)}{'; '.join(hints)}" + "." * bool(hints)
    )


def report(errors: list[str]) -> str:
    """Returns the message of an error that lists ``errors``."""
    return "LoRAConfig: " + "; ".join(errors) + "."


def as_tuples(tokens: Any) -> Any:
    """Returns `LoRAConfig.tokens` hashable, a mapping as pairs; else as given."""
    if isinstance(tokens, Mapping):
        tokens = tokens.items()
    elif not isinstance(tokens, (list, tuple)):
        return tokens

    def freeze(value: Any) -> Any:
        return tuple(map(freeze, value)) if isinstance(value, (list, tuple)) else value

    return tuple(map(freeze, tokens))


def _token_errors(tokens: Any) -> tuple[list[str], list[str]]:
    """Returns the type errors and the value errors of `LoRAConfig.tokens`."""
    are_pairs = isinstance(tokens, tuple) and all(
        isinstance(each, tuple)
        and len(each) == 2
        and isinstance(each[0], str)
        and isinstance(each[1], tuple)
        for each in tokens
    )
    groups = dict(tokens) if are_pairs else {"": tokens}
    types: list[str] = []
    values: list[str] = []
    for layer, group in groups.items():
        where = f"tokens of {layer!r}" if layer else "tokens"
        if not isinstance(group, tuple) or not all(
            isinstance(token, str) or _is_int(token) for token in group
        ):
            types.append(
                f"{where} must be a list of ids and strings, or one for each layer; "
                f"got {_short(group)}"
            )
            continue
        if are_pairs and (not group or not layer):
            values.append(f"{where} must name a layer and at least one token of it")
        wrong = [t for t in group if t == "" or (_is_int(t) and not 0 <= t < 1 << 31)]
        if wrong:
            values.append(f"{where} must be ids from 0 up, or not empty; got {wrong}")
        again = [t for t in dict.fromkeys(group) if group.count(t) > 1]
        if again:
            values.append(f"{where} must name each token once; got {again} again")
    return types, values


def _short(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 200:
        return f"an integer of {value.bit_length()} bits"  # repr has a limit
    return repr(value)[:200]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_seed(value: int) -> bool:
    return 0 <= value < 1 << 32


def find_errors(config: Any) -> tuple[list[str], list[str]]:
    """Returns the type errors and the value errors of a config, in field order."""
    types: list[str] = []
    values: list[str] = []

    def check(name: str, value: Any, is_type, kind: str, is_valid, wanted: str) -> None:
        if not is_type(value):
            types.append(f"{name} must be {kind}; got {_short(value)}")
        elif not is_valid(value):
            values.append(f"{name} must be {wanted}; got {_short(value)}")

    def check_rank(name: str, value: Any) -> None:
        def in_range(r: int) -> bool:
            return 1 <= r <= MAX_RANK

        is_low = _is_int(value) and value < 1
        wanted = "at least 1" if is_low else f"at most {MAX_RANK}"
        check(name, value, _is_int, "an integer", in_range, wanted)

    def check_alpha(name: str, value: Any) -> None:
        def in_range(a: float) -> bool:
            return LEAST <= a <= MOST

        is_extreme = _is_number(value) and 0 < value < math.inf
        wanted = f"from {LEAST:g} to {MOST:g}" if is_extreme else "above 0"
        check(name, value, _is_number, "a number", in_range, wanted)

    check_rank("rank", config.rank)
    check_alpha("alpha", config.alpha)
    for name in ("targets", "exclude", "train"):
        value = getattr(config, name)
        if isinstance(value, str):
            if value != ALL_LINEAR or name != "targets":
                values.extend(_regex_error(name, value))
            if value == "":
                values.append(f"{name} must not be the empty string")
        elif not (isinstance(value, tuple) and all(isinstance(p, str) for p in value)):
            types.append(f"{name} must be a string or a list of strings; got {value!r}")
        elif any(p == "" for p in value):
            values.append(
                f"{name} must not contain the empty string; got {list(value)}"
            )
        is_alone = name == "targets" and value == ALL_LINEAR
        listed = value if isinstance(value, tuple) else (value,)
        if ALL_LINEAR in listed and not is_alone:
            values.append(
                f"{name} must name layers; got {_short(value)}. {ALL_LINEAR!r} stands "
                f"alone, as targets={ALL_LINEAR!r}"
            )
    if config.targets == ():
        values.append("targets must name at least one layer; got an empty list")
    checks = {"rank_pattern": check_rank, "alpha_pattern": check_alpha}
    for name, check_value in checks.items():
        keys = [key for key, _ in getattr(config, name)]
        values.extend(
            f"{name} must name each pattern once; got {key!r} again"
            for key in sorted({str(key) for key in keys if keys.count(key) > 1})
        )
        for key, value in getattr(config, name):
            values.extend(_regex_error(name, key))
            check_value(f"{name}[{key!r}]", value)
    if config.layers is not None and not (
        isinstance(config.layers, tuple) and all(map(_is_int, config.layers))
    ):
        types.append(f"layers must be a list of integers; got {config.layers!r}")
    elif config.layers is not None and (
        not config.layers or any(index < 0 for index in config.layers)
    ):
        values.append(
            "layers must be a non-empty list of non-negative indices; got "
            f"{list(config.layers)}"
        )

    def in_unit(rate: float) -> bool:
        return 0.0 <= rate <= 1.0

    rate = config.dropout_rate
    check("dropout_rate", rate, _is_number, "a number", in_unit, "in [0, 1]")
    for name in ("rslora", "dora", "lora_fa", "vera"):
        if not isinstance(getattr(config, name), bool):
            got = getattr(config, name)
            types.append(f"{name} must be true or false; got {got!r}")
    init = config.init
    if not isinstance(init, str) or not (init in INITS or _PISSA.fullmatch(init)):
        values.append(f"init must be one of {INITS}, or pissa_niter_N; got {init!r}")
    elif init == "orthogonal":
        pairs = config.rank_pattern
        ranks = [config.rank, *(rank for _, rank in pairs)]
        values.extend(
            f"rank must be even for init='orthogonal', which splits it in two; got {r}"
            for r in dict.fromkeys(ranks)
            if _is_int(r) and r % 2
        )
    seed = config.vera_seed
    check("vera_seed", seed, _is_int, "an integer", _is_seed, "from 0 to 2**32 - 1")
    if config.vera is True:
        fields = {"init": (init, "uniform"), "lora_fa": (config.lora_fa, False)}
        values.extend(
            f"{name} must be {wanted!r} for vera=True, whose A and B are frozen as "
            f"VeRA draws them; got {got!r}"
            for name, (got, wanted) in fields.items()
            if got != wanted
        )
    elif seed != 0:
        values.append(f"vera_seed must be 0 unless vera=True; got {_short(seed)}")
    if config.bias not in BIASES:
        values.append(f"bias must be one of {BIASES}; got {config.bias!r}")
    of_types, of_values = _token_errors(config.tokens)
    return types + of_types, values + of_values


def _regex_error(name: str, pattern: Any) -> list[str]:
    if not isinstance(pattern, str):
        return [f"{name} must have strings as patterns; got {pattern!r}"]
    try:
        re.compile(pattern)
    except re.error as error:
        return [f"{name} is not a regular expression: {pattern!r} ({error})"]
    return []
