"""Adapters of experts in other tools' files.

Here all experts of a layer are one kernel, and so are their factors: ``a [e, r, in]``
and ``b [e, out, r]`` of ``…experts.gate_up_proj`` or ``…experts.down_proj``. PEFT wraps
such a parameter (``target_parameters``): A is ``[e r, in]``, expert by expert, and B is
``[out, r e]``, rank by rank. The wrapper of a module's second parameter wraps that of
the first, whose factors are then under ``…experts.base_layer``, those of the second
under ``…experts``. vLLM, and files from before transformers 5, name every expert:
``…experts.3.gate_proj``.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from lora_jax.interop.external import ExternalAdapter, ExternalFactors
from lora_jax.interop.fused import fuse_factors
from lora_jax.interop.naming import Names
from lora_jax.names import ROUTER
from lora_jax.tree.targets import Target

GATE_UP, DOWN = "gate_up_proj", "down_proj"  # in the order of PEFT's wrappers
INNER = ".base_layer"


def parameter_names(
    modules: Iterable[str], parameters: Iterable[str]
) -> dict[str, str]:
    """Returns which parameter the factors of each wrapper of experts are of.

    Args:
      modules: names in a PEFT file.
      parameters: ``target_parameters`` of its config: full names or their ends.

    Returns:
      The parameter's full name by the module's; modules of other kinds are left out.

    Example:
      >>> names = ["h.0.experts", "h.0.experts.base_layer", "h.1.q_proj"]
      >>> found = parameter_names(names, ["gate_up_proj", "experts.down_proj"])
      >>> sorted(found.values())
      ['h.0.experts.down_proj', 'h.0.experts.gate_up_proj']
    """
    found = {}
    for module in modules:
        owner = module.removesuffix(INNER)
        if not f".{owner}".endswith(".experts"):
            continue
        targeted = [
            name
            for name in (f"{owner}.{GATE_UP}", f"{owner}.{DOWN}")
            if any(f".{name}".endswith(f".{end}") for end in parameters)
        ]
        if targeted:
            found[module] = targeted[0 if module != owner else -1]
    return found


def unpack_experts(
    a: np.ndarray, b: np.ndarray, rank: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns ``[e, r, in]`` and ``[e, out, r]`` of PEFT's factors; None if wrong.

    Args:
      a: ``[e r, in]``.
      b: ``[out, r e]``.
      rank: ``r``.
    """
    if a.ndim != 2 or b.ndim != 2 or len(a) % rank or b.shape[1] != len(a):
        return None
    experts = len(a) // rank
    b = b.reshape(len(b), rank, experts)
    return a.reshape(experts, rank, -1), b.transpose(2, 0, 1)


def pack_experts(factors: ExternalFactors) -> tuple[np.ndarray, np.ndarray]:
    """Undoes `unpack_experts`."""
    a = factors.a.reshape(-1, factors.a.shape[-1])
    b = factors.b.transpose(1, 2, 0)
    return a, b.reshape(len(b), -1)


def wrapper_name(name: str, modules: Mapping[str, Any]) -> str:
    """Returns the name of PEFT's wrapper of a parameter of experts.

    Args:
      name: of the parameter.
      modules: by name, everything that is adapted.
    """
    owner, _, parameter = name.rpartition(".")
    is_inner = parameter == GATE_UP and f"{owner}.{DOWN}" in modules
    return owner + INNER if is_inner else owner


def parameter_targets(adapter: ExternalAdapter, names: Names) -> list[str]:
    """Returns PEFT's ``target_parameters``: experts, and weights of routers.

    Args:
      adapter: what is written.
      names: of the model.
    """
    spelled = names.spelling().modules.items()
    routers = {name for path, name in spelled if path.endswith(f"/{ROUTER}")}
    found = [name for name, f in adapter.modules.items() if f.is_experts]
    return sorted(found + [f"{n}.weight" for n in adapter.modules if n in routers])


def known_names(names: Names, files: Iterable[str], *, by_expert: bool) -> set[str]:
    """Returns the names of all modules that ``target_modules`` can match.

    Args:
      names: of the model.
      files: bare names of its tensors.
      by_expert: whether every expert has its own, as in files.
    """
    bare = (name.rpartition(".")[0] for name in files)
    known = {names.full_name(name, is_new=not by_expert) for name in bare}
    return known | {
        name
        for path, name in names.spelling().modules.items()
        if not (by_expert and names.family.expert_parts(path))
    }


def check_exportable(targets: Iterable[Target]) -> None:
    """Raises `ValueError` for DoRA of experts, which PEFT doesn't have."""
    paths = [t.path for t in targets if t.kind == "experts" and t.dora]
    if paths:
        raise ValueError(
            f"DoRA of experts can't be exported, as PEFT has none; got "
            f"{', '.join(paths)}. Merge the adapter into its base."
        )


def split_experts(
    modules: Mapping[str, ExternalFactors], names: Names
) -> dict[str, ExternalFactors]:
    """Names each expert separately, as vLLM does; gate and up share A.

    Args:
      modules: factors by name.
      names: of the model.

    Returns:
      The factors by name; those of a model whose files have one tensor for all experts
      (gpt-oss, Qwen3.5) stay as they are, which is vLLM's format for them.
    """
    if names.family.is_served_whole:
        return dict(modules)
    paths = {name: path for path, name in names.spelling().modules.items()}
    found = {}
    for name, factors in modules.items():
        parts = names.family.expert_parts(paths[name]) if name in paths else ()
        if not parts or not factors.is_experts:
            found[name] = factors
            continue
        for j, part in enumerate(parts):
            size = factors.b.shape[1] // len(parts)
            for i, (a, b) in enumerate(zip(factors.a, factors.b, strict=True)):
                own = names.expert_names(paths[name], i, part)[0]
                rows = b[j * size : (j + 1) * size]
                found[own] = factors._replace(a=a, b=rows)
    return found


def join_experts(
    adapter: ExternalAdapter, names: Names, counts: Mapping[str, int]
) -> tuple[ExternalAdapter, list[str]]:
    """Makes one adapter of those that name every expert; exact.

    Args:
      adapter: as it was read.
      names: of the model.
      counts: how many experts there are, by the path of their kernel.

    Returns:
      The adapter, with twice the rank where gate and up have their own A, and the names
      of what is missing.
    """
    modules, faults = dict(adapter.modules), []
    spelled = names.spelling().modules
    for path, count in counts.items():
        parts = names.family.expert_parts(path)
        found = [
            [_pop(modules, names.expert_names(path, i, part)) for part in parts]
            for i in range(count)
        ]
        if not any(own is not None for row in found for own in row):
            continue
        lacking = [
            f"missing: factors of {names.expert_names(path, i, part)[0]}; all experts "
            "of a layer must have them"
            for i, row in enumerate(found)
            for part, own in zip(parts, row, strict=True)
            if own is None
        ]
        faults += lacking
        if lacking:
            continue
        try:
            modules[spelled[path]] = _stack(found, rslora=adapter.rslora)
        except ValueError as error:
            faults.append(f"{spelled[path]}: {error}")
    return adapter._replace(modules=modules), faults


def _pop(modules: dict[str, ExternalFactors], spelled: list[str]) -> Any:
    return next((modules.pop(name) for name in spelled if name in modules), None)


def _stack(found: list[list[ExternalFactors]], *, rslora: bool) -> ExternalFactors:
    fused = [
        row[0]
        if len(row) == 1
        else fuse_factors(row, [len(own.b) for own in row], rslora=rslora)
        for row in found
    ]
    if len({(f.a.shape, f.b.shape, f.scaling) for f in fused}) > 1:
        raise ValueError(
            "the experts of a layer must have factors of one shape and one scaling; "
            f"got A {_listed(f.a.shape for f in fused)}, B "
            f"{_listed(f.b.shape for f in fused)}, scaling "
            f"{_listed(f.scaling for f in fused)}."
        )
    a, b = (np.stack([getattr(f, name) for f in fused]) for name in "ab")
    return fused[0]._replace(a=a, b=b)


def _listed(values: Iterable[Any]) -> str:
    return " and ".join(dict.fromkeys(map(str, values)))
