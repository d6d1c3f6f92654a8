"""PEFT adapter folders: ``adapter_config.json`` and ``adapter_model.safetensors``.

Read strictly (what a name means is in `_SUFFIXES` and nowhere guessed) and written so
that PEFT loads them. Nothing that a file names is opened: not the base it says it was
made on, no other folder, no pickle.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.files.atomic import new_folder, write_text
from lora_jax.files.safetensors import open_tensors, write_tensors
from lora_jax.interop.external import ExternalAdapter, Factors, read_floats, report
from lora_jax.interop.peft_config import (
    CONFIG,
    PEFT_VERSION,
    PeftConfig,
    match,
    parse_config,
    read_peft_config,
)

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
_A, _B, _M, _BASE, _BIAS = "a", "b", "m", "base", "base bias"
_SUFFIXES = {  # what stands after the module's name, and what it is
    ".lora_A.weight": (_A, False),
    ".lora_B.weight": (_B, False),
    ".lora_embedding_A": (_A, True),
    ".lora_embedding_B": (_B, True),
    ".lora_magnitude_vector": (_M, None),
    ".lora_magnitude_vector.weight": (_M, None),
    ".base_layer.weight": (_BASE, None),
    ".base_layer.bias": (_BIAS, None),
}


def read_peft(directory: str | os.PathLike[str]) -> ExternalAdapter:
    """Reads a PEFT folder.

    Args:
      directory: with `CONFIG` and `TENSORS`.

    Returns:
      The adapter; 16-bit factors are widened to float32.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if a file is damaged, the config asks for what isn't supported, or
        tensors are of unknown meaning, missing, mis-shaped, of a rank that the config
        doesn't say, or not finite; one error lists all of them.
    """
    folder = Path(directory)
    config = read_peft_config(folder)
    if not (folder / TENSORS).is_file():
        found = sorted(path.name for path in folder.iterdir())[:20]
        raise FileNotFoundError(
            f"{folder} must hold {TENSORS}; it holds {found}. Pickled adapters (.bin) "
            "are not read: load and save it with PEFT to get safetensors."
        )
    reader = open_tensors(folder / TENSORS)
    roles, faults = _roles(reader.shapes)
    arrays, bad = read_floats(reader, roles)
    faults += bad
    faults += [f"missing: {name}" for name in _missing(roles, config)]
    modules = {}
    for module in dict.fromkeys(name for name, kind in roles if kind == _A):
        a, b, m = (arrays.get((module, kind)) for kind in (_A, _B, _M))
        if a is None or b is None:
            continue  # missing or unreadable: said above
        is_embedding = ".lora_embedding_" in roles[module, _A]
        wrong = _shape_faults(module, a, b, m, config)
        faults += wrong
        if not wrong:
            modules[module] = Factors(
                a=a,
                b=b.reshape(b.shape[:2]),
                scaling=config.scaling_for(module),
                alpha=config.alpha_for(module),
                magnitude=None if m is None else m.reshape(-1),
                is_embedding=is_embedding,
            )
    if not modules and not faults:
        faults.append("it holds no factors of any module")
    if faults:
        raise report(str(folder / TENSORS), faults)
    return ExternalAdapter(
        modules=modules,
        full={
            f"{name}.bias" if kind == _BIAS else name: array
            for (name, kind), array in arrays.items()
            if kind in ("full", _BIAS)
        },
        base={
            f"{name}.weight": array
            for (name, kind), array in arrays.items()
            if kind == _BASE
        },
        config=config.settings,
        rslora=config.rslora,
        dropout_rate=config.dropout_rate,
        bias=config.bias,
        unknown=config.unknown,
        origin=str(folder),
    )


def target_faults(
    adapter: ExternalAdapter, modules: Iterable[str], *, other: Any = ()
) -> list[str]:
    """Compares the modules in a PEFT file with those that its config names.

    Args:
      adapter: as `read_peft` returned it.
      modules: full names of the model's modules.
      other: names of modules in the file that the model has not; said elsewhere.

    Returns:
      A line for each module that is in one and not in the other.
    """
    config = parse_config(adapter.config, adapter.origin)
    faults = []
    for name in dict.fromkeys((*modules, *adapter.modules)):
        if name in other:
            continue
        wanted = config.is_target(name)
        if wanted is None:  # all-linear: heads are left out by rules of PEFT's own
            continue
        if wanted and name not in adapter.modules:
            faults.append(f"missing: factors of {name}, which target_modules names")
        elif not wanted and name in adapter.modules:
            faults.append(
                f"unexpected: factors of {name}, which the config does not target"
            )
    return faults


def saved_faults(adapter: ExternalAdapter, tensors: Iterable[str]) -> list[str]:
    """Says which tensors are absent though ``modules_to_save`` names their modules.

    Args:
      adapter: as `read_peft` returned it.
      tensors: names of the model's parameters.

    Returns:
      A line for each. Names that no module of the model has are no fault: PEFT adds
      ``classifier`` and ``score`` unasked.
    """
    saved = parse_config(adapter.config, adapter.origin).saved
    return [
        f"missing: {name}, whose module modules_to_save names"
        for name in tensors
        if name not in adapter.full
        and any(match(rf"(^|.*\.){s}\.", name) for s in saved)
    ]


def write_peft(
    directory: str | os.PathLike[str],
    adapter: ExternalAdapter,
    settings: Mapping[str, Any],
) -> Path:
    """Writes a folder that PEFT loads.

    Args:
      directory: made if absent; an adapter there is replaced once the new one is
        written.
      adapter: what to write; ``config`` is not looked at.
      settings: keys of ``adapter_config.json`` beside those that follow from
        ``adapter``: ``target_modules``, ``modules_to_save``, ``task_type``, ....

    Returns:
      The folder.

    Raises:
      ValueError: if a tensor is not finite; names all of them.
      OSError: if it can't be written.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, factors in adapter.modules.items():
        is_conv = factors.a.ndim > 2
        ones = (1,) * (factors.a.ndim - 2)
        a, b = (
            ("lora_embedding_A", "lora_embedding_B")
            if factors.is_embedding
            else ("lora_A.weight", "lora_B.weight")
        )
        tensors[f"{name}.{a}"] = factors.a
        tensors[f"{name}.{b}"] = factors.b.reshape(*factors.b.shape, *ones)
        if factors.magnitude is not None:
            m = factors.magnitude
            shape = (1, -1, *ones) if is_conv else (-1,)
            tensors[f"{name}.lora_magnitude_vector"] = m.reshape(shape)
    for name, array in adapter.full.items():
        module, _, leaf = name.rpartition(".")
        inside = module in adapter.modules and leaf == "bias"
        tensors[f"{module}.base_layer.bias" if inside else name] = array
    tensors |= {
        f"{name.removesuffix('.weight')}.base_layer.weight": array
        for name, array in adapter.base.items()
    }
    if bad := [n for n, t in tensors.items() if not np.isfinite(t).all()]:
        raise ValueError(f"an adapter must be finite to be saved; {', '.join(bad)}.")
    folder = Path(directory)
    ordered = {PREFIX + name: tensors[name] for name in sorted(tensors)}
    config = _config(adapter) | dict(settings)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    with new_folder(folder) as new:
        write_tensors(new / TENSORS, ordered, metadata={"format": "pt"})
        write_text(new / CONFIG, text)
    return folder


def _roles(names: Mapping[str, Any]) -> tuple[dict[tuple[str, str], str], list[str]]:
    """Says what each tensor is: ``(module or tensor, kind)``; and what has no role."""
    roles: dict[tuple[str, str], str] = {}
    faults = []
    for name in names:
        bare = name.removeprefix(PREFIX)
        suffix = next((s for s in _SUFFIXES if bare.endswith(s)), None)
        if bare == name:
            faults.append(f"unexpected: {name} does not start with {PREFIX}")
            continue
        if suffix is not None:
            role = bare.removesuffix(suffix), _SUFFIXES[suffix][0]
        elif re.search(r"(^|\.)(lora_|token_adapter|base_layer)", bare):
            faults.append(f"unexpected: {name} is of no known kind")
            continue
        else:
            role = bare, "full"
        if role in roles:
            faults.append(f"twice: {roles[role]} and {name}")
        roles[role] = name
    return roles, faults


def _missing(roles: Mapping[tuple[str, str], str], config: PeftConfig) -> list[str]:
    """Names what a module's tensors lack to be whole."""
    needed = (_A, _B, _M) if config.dora else (_A, _B)
    words = {_A: "lora_A", _B: "lora_B", _M: "lora_magnitude_vector"}
    modules = dict.fromkeys(name for name, kind in roles if kind in words)
    return [
        f"{PREFIX}{module}.{words[kind]}"
        for module in modules
        for kind in needed
        if (module, kind) not in roles
    ]


def _shape_faults(
    name: str,
    a: np.ndarray,
    b: np.ndarray,
    m: np.ndarray | None,
    config: PeftConfig,
) -> list[str]:
    """Says what doesn't chain in a module, or isn't of the config's rank."""
    rank = config.rank_for(name)
    wanted = [rank, *(["in"] if a.ndim == 2 else ["in", "*k"])]
    faults = []
    if a.ndim < 2 or a.shape[0] != rank:
        shown = ", ".join(map(str, wanted))
        faults.append(f"shape: A of {name} must be [{shown}]; got {list(a.shape)}")
    if b.ndim < 2 or b.shape[1] != rank or any(size != 1 for size in b.shape[2:]):
        faults.append(f"shape: B of {name} must be [out, {rank}]; got {list(b.shape)}")
    elif m is not None and m.size != b.shape[0]:
        faults.append(
            f"shape: magnitude of {name} must be [{b.shape[0]}]; got {list(m.shape)}"
        )
    if m is not None and not config.dora:
        faults.append(f"unexpected: magnitude of {name} with use_dora false")
    return faults


def _config(adapter: ExternalAdapter) -> dict[str, Any]:
    """The keys that follow from the modules; patterns name what differs, in full."""
    ranks = {name: factors.rank for name, factors in adapter.modules.items()}
    alphas = {name: _number(f.alpha) for name, f in adapter.modules.items()}
    rank, alpha = _most_common(ranks), _most_common(alphas)
    return {
        "alpha_pattern": {re.escape(n): a for n, a in alphas.items() if a != alpha},
        "base_model_name_or_path": None,
        "bias": adapter.bias,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,  # any other value makes PEFT change the base
        "lora_alpha": alpha,
        "lora_bias": False,
        "lora_dropout": adapter.dropout_rate,
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "r": rank,
        "rank_pattern": {re.escape(n): r for n, r in ranks.items() if r != rank},
        "target_modules": sorted(adapter.modules),
        "task_type": None,
        "use_dora": adapter.dora,
        "use_rslora": adapter.rslora,
    }


def _most_common(values: Mapping[str, Any]) -> Any:
    counts: dict[Any, int] = {}
    for value in values.values():
        counts[value] = counts.get(value, 0) + 1
    return max(counts, key=lambda value: counts[value])


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
