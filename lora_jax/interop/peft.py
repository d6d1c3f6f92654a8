"""PEFT adapter folders: ``adapter_config.json`` and ``adapter_model.safetensors``.

Reading is strict (`_SUFFIXES` defines each name; nothing is guessed); what is written,
PEFT loads. No path named in a file is opened, and no pickle is read.
"""

import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.files.json_file import read_json
from lora_jax.files.safetensors import open_tensors
from lora_jax.interop.experts import (
    pack_experts,
    parameter_names,
    unpack_experts,
    wrapper_name,
)
from lora_jax.interop.external import (
    ADAPTER_CONFIG,
    ExternalAdapter,
    ExternalFactors,
    most_common,
    read_floats,
    report,
    write_folder,
)
from lora_jax.interop.peft_config import (
    PEFT_VERSION,
    PeftConfig,
    match,
    parse_config,
)
from lora_jax.interop.vera import PREFIX, TENSORS, LoRATensors

_A, _B, _M, _BASE, _BIAS = "a", "b", "m", "base", "base bias"
_UPDATE_BIAS, _TOKENS, _FULL = "update bias", "tokens", "full"
_SUFFIXES = {  # the kind of a tensor by the end of its name, after the module's
    ".lora_A.weight": _A,
    ".lora_B.weight": _B,
    ".lora_embedding_A": _A,
    ".lora_embedding_B": _B,
    ".lora_magnitude_vector": _M,
    ".lora_magnitude_vector.weight": _M,
    ".lora_B.bias": _UPDATE_BIAS,
    ".token_adapter.trainable_tokens_delta": _TOKENS,
    ".token_adapter.base_layer.weight": _BASE,
    ".base_layer.weight": _BASE,
    ".base_layer.bias": _BIAS,
}


def read_peft(directory: str | os.PathLike[str]) -> ExternalAdapter:
    """Reads a PEFT adapter folder, in float32.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if a file is damaged, the config uses unsupported options, or tensors
        have unknown names, are missing, wrongly shaped, of another rank than the
        config's, or not finite; one error lists all of them.
    """
    folder = Path(directory)
    file = folder / ADAPTER_CONFIG
    config = parse_config(read_json(file), str(file))
    if not (folder / TENSORS).is_file():
        found = sorted(path.name for path in folder.iterdir())[:20]
        raise FileNotFoundError(
            f"{folder} must hold {TENSORS}; it holds {found}. Pickled adapters (.bin) "
            "are not read: load and save them with PEFT to get safetensors."
        )
    reader: Any = (LoRATensors if config.is_vera else open_tensors)(folder / TENSORS)
    roles, copies, faults = _roles(reader.shapes)
    arrays, bad = read_floats(reader, roles)
    faults += bad
    faults += [
        f"duplicate: {name} differs from {roles[role]}"
        for name, role in copies.items()
        if role in arrays and not np.array_equal(reader[name], arrays[role])
    ]
    faults += [f"missing: {name}" for name in _missing(roles, config)]
    modules = {}
    adapted = dict.fromkeys(name for name, kind in roles if kind == _A)
    wrapped = parameter_names(adapted, config.target_parameters)
    for module in adapted:
        a, b, m = (arrays.get((module, kind)) for kind in (_A, _B, _M))
        if a is None or b is None:
            continue  # missing or unreadable: already reported
        if (name := wrapped.get(module)) is not None:
            rank = config.rank_for(name)
            pair = unpack_experts(a, b, rank)
            if pair is None:
                faults.append(
                    f"shape: A and B of {name} must be [experts * {rank}, in], [out, "
                    f"{rank} * experts]; got {list(a.shape)}, {list(b.shape)}"
                )
                continue
            scaling, alpha = config.scaling_for(name), config.alpha_for(name)
            modules[name] = ExternalFactors(*pair, scaling, alpha)
            continue
        is_embedding = ".lora_embedding_" in roles[module, _A]
        bias = arrays.get((module, _UPDATE_BIAS))
        wrong = _shape_faults(module, a, b, m, bias, config)
        faults += wrong
        if not wrong:
            modules[module] = ExternalFactors(
                a=a,
                b=b.reshape(b.shape[:2]),
                scaling=config.scaling_for(module),
                alpha=config.alpha_for(module),
                magnitude=None if m is None else m.reshape(-1),
                is_embedding=is_embedding,
                bias=bias,
                is_wide=config.is_vera,
            )
    faults += [
        f"missing: factors of {end}, which target_parameters names"
        for end in config.target_parameters
        if not any(f".{n}".endswith(f".{end.removesuffix('.weight')}") for n in modules)
    ]
    tokens, wrong = _tokens(arrays, config)
    faults += wrong
    if not modules and not faults:
        faults.append("it holds no adapters")
    if faults:
        raise report(str(folder / TENSORS), faults)
    return ExternalAdapter(
        modules=modules,
        full={
            f"{name}.bias" if kind == _BIAS else name: array
            for (name, kind), array in arrays.items()
            if kind in (_FULL, _BIAS)
        },
        base={
            f"{name}.weight": array
            for (name, kind), array in arrays.items()
            if kind == _BASE
        },
        config=config.settings,
        rslora=config.use_rslora,
        dropout_rate=float(config.lora_dropout),
        bias=config.bias,
        tokens=tokens,
        is_tied_once=config.ensure_weight_tying,
        unknown=config.unknown,
        origin=str(folder),
    )


def config_faults(
    adapter: ExternalAdapter,
    modules: Iterable[str],
    tensors: Iterable[str],
    *,
    unknown: Collection[str] = (),
) -> list[str]:
    """Compares the contents of a PEFT file with its config.

    Args:
      adapter: from `read_peft`.
      modules: full names of the model's modules.
      tensors: names of the model's parameters.
      unknown: modules in the file that the model lacks; reported elsewhere.

    Returns:
      A line for each module that is only in the file or only in ``target_modules``, and
      for each tensor missing from a module in ``modules_to_save``. The latter may name
      modules that the model lacks: PEFT adds ``classifier`` and ``score``.
    """
    config = parse_config(adapter.config, adapter.origin)
    faults = []
    for name in dict.fromkeys((*modules, *adapter.modules)):
        # None for all-linear: PEFT decides by the type.
        wanted = None if name in unknown else config.is_target(name)
        if wanted and name not in adapter.modules:
            faults.append(f"missing: factors of {name}, which target_modules names")
        elif wanted is False and name in adapter.modules:
            faults.append(
                f"unexpected: factors of {name}, which the config does not target"
            )
    return faults + [
        f"missing: {name}, whose module is in modules_to_save"
        for name in tensors
        if name not in adapter.full
        and any(match(rf"(^|.*\.){saved}\.", name) for saved in config.modules_to_save)
    ]


def write_peft(
    directory: str | os.PathLike[str],
    adapter: ExternalAdapter,
    settings: Mapping[str, Any],
) -> Path:
    """Writes a folder that PEFT loads, replacing an adapter that is there.

    Args:
      directory: created if absent.
      adapter: what to write; its ``config`` is ignored.
      settings: keys of ``adapter_config.json`` that ``adapter`` doesn't determine, or
        overrides of those it does: ``modules_to_save``, ``task_type``, ....

    Raises:
      ValueError: if a tensor is not finite; lists all of them.
      OSError: if the folder can't be written.
    """
    tensors: dict[str, np.ndarray] = {}
    for name, factors in adapter.modules.items():
        if factors.is_experts:
            wrapper = wrapper_name(name, adapter.modules)
            pair = pack_experts(factors)
            for letter, array in zip("AB", pair, strict=True):
                tensors[f"{wrapper}.lora_{letter}.weight"] = array
            continue
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
        if factors.bias is not None:
            tensors[f"{name}.lora_B.bias"] = factors.bias
    for name, (_, rows) in adapter.tokens.items():
        tensors[f"{name}.token_adapter.trainable_tokens_delta"] = rows
    for name, array in adapter.full.items():
        module, _, leaf = name.rpartition(".")
        inside = module in adapter.modules and leaf == "bias"
        tensors[f"{module}.base_layer.bias" if inside else name] = array
    tensors |= {
        f"{name.removesuffix('.weight')}.base_layer.weight": array
        for name, array in adapter.base.items()
    }
    config = _config(adapter) | dict(settings)
    return write_folder(directory, TENSORS, tensors, config, kind="pt", prefix=PREFIX)


Role = tuple[str, str]  # the module (or tensor), and the kind of tensor


def _roles(
    names: Mapping[str, Any],
) -> tuple[dict[Role, str], dict[str, Role], list[str]]:
    """Returns tensors by role, the roles of duplicates, and unknown names as problems.

    When biases are trained in a module that is saved whole, PEFT writes that module's
    bias twice more: ``ln_f.modules_to_save.bias`` duplicates ``ln_f.bias``, and
    ``ln_f.original_module.bias`` has no effect.
    """
    roles: dict[Role, str] = {}
    copies, faults = {}, []
    for name in names:
        bare = name.removeprefix(PREFIX)
        if ".original_module." in bare:
            continue
        if ".modules_to_save." in bare:
            single = bare.replace(".modules_to_save.", ".")
            if PREFIX + single in names:
                copies[name] = single, _FULL
                continue
            bare = single
        suffix = next((s for s in _SUFFIXES if bare.endswith(s)), None)
        if bare == name:
            faults.append(f"unexpected: {name} does not start with {PREFIX}")
            continue
        if suffix is not None:
            role = bare.removesuffix(suffix), _SUFFIXES[suffix]
        elif re.search(r"(^|\.)(lora_|token_adapter|base_layer)", bare):
            faults.append(f"unexpected: {name} is of an unknown kind")
            continue
        else:
            role = bare, _FULL
        if role in roles:
            faults.append(f"duplicate: {roles[role]} and {name}")
        roles[role] = name
    return roles, copies, faults


def _tokens(
    arrays: Mapping[Role, np.ndarray], config: PeftConfig
) -> tuple[dict[str, tuple[list[int], np.ndarray]], list[str]]:
    """Returns the rows of trained tokens by module, and problems with them."""
    tokens, faults, left = {}, [], dict(config.trainable_token_indices)
    for module, kind in arrays:
        if kind != _TOKENS:
            continue
        named = next((n for n in left if n and f".{module}".endswith(f".{n}")), "")
        ids = left.pop(named) if named else config.trainable_token_indices.get("")
        rows = arrays[module, kind]
        if ids is None or rows.ndim != 2 or len(ids) != len(rows):
            faults.append(
                f"shape: trainable_tokens_delta of {module} must have a row for each "
                f"of its {len(ids or ())} tokens in trainable_token_indices; got "
                f"{list(rows.shape)}"
            )
            continue
        tokens[module] = ids, rows
    # For tied modules with the same tokens PEFT saves only one, or both alike.
    kept = [ids for ids, _ in tokens.values()]
    faults += [
        f"missing: trainable_tokens_delta of {name or 'the input embedding'}"
        for name, ids in left.items()
        if ids and ids not in kept
    ]
    return tokens, faults


def _missing(roles: Mapping[tuple[str, str], str], config: PeftConfig) -> list[str]:
    """Lists the tensors that adapted modules lack."""
    needed = [_A, _B, *[_M] * config.use_dora, *[_UPDATE_BIAS] * config.lora_bias]
    words = {_A: "lora_A", _B: "lora_B", _UPDATE_BIAS: "lora_B.bias"}
    words[_M] = "lora_magnitude_vector"
    modules = dict.fromkeys(name for name, kind in roles if kind in words)
    return [
        f"{PREFIX}{module}.{words[kind]}"
        for module in modules
        for kind in needed
        if (module, kind) not in roles
        # PEFT gives no bias to the update of an embedding.
        and (
            kind != _UPDATE_BIAS
            or ".lora_embedding_" not in roles.get((module, _A), "")
        )
    ]


def _shape_faults(
    name: str,
    a: np.ndarray,
    b: np.ndarray,
    m: np.ndarray | None,
    bias: np.ndarray | None,
    config: PeftConfig,
) -> list[str]:
    """Finds shapes that don't chain or don't have the config's rank."""
    rank, faults = config.rank_for(name), []
    if a.ndim < 2 or a.shape[0] != rank:
        inputs = "in" if a.ndim == 2 else "in, *k"
        faults.append(
            f"shape: A of {name} must be [{rank}, {inputs}]; got {list(a.shape)}"
        )
    if b.ndim < 2 or b.shape[1] != rank or any(size != 1 for size in b.shape[2:]):
        faults.append(f"shape: B of {name} must be [out, {rank}]; got {list(b.shape)}")
    elif m is not None and m.size != b.shape[0]:
        faults.append(
            f"shape: magnitude of {name} must be [{b.shape[0]}]; got {list(m.shape)}"
        )
    if bias is not None and bias.shape != b.shape[:1]:
        faults.append(
            f"shape: lora_B.bias of {name} must be [{b.shape[0]}]; got "
            f"{list(bias.shape)}"
        )
    if bias is not None and not config.lora_bias:
        faults.append(f"unexpected: lora_B.bias of {name} with lora_bias false")
    if m is not None and not config.use_dora:
        faults.append(f"unexpected: magnitude of {name} with use_dora false")
    return faults


def _config(adapter: ExternalAdapter) -> dict[str, Any]:
    """Returns the config keys that follow from the modules; patterns are full names."""
    ranks = {name: factors.rank for name, factors in adapter.modules.items()}
    alphas = {
        name: int(f.alpha) if float(f.alpha).is_integer() else f.alpha
        for name, f in adapter.modules.items()
    }
    rank, alpha = most_common(ranks.values()), most_common(alphas.values())
    tokens = {name: ids for name, (ids, _) in adapter.tokens.items()}
    config = {
        "alpha_pattern": {re.escape(n): a for n, a in alphas.items() if a != alpha},
        "base_model_name_or_path": None,
        "bias": adapter.bias,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,  # any other value makes PEFT change the base
        "lora_alpha": alpha,
        "lora_bias": any(f.bias is not None for f in adapter.modules.values()),
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
    return config | ({"trainable_token_indices": tokens} if tokens else {})
