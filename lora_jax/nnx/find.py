"""The layers and weights of an NNX model, by path, and its structure rebuilt."""

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
from flax import nnx

from lora_jax.config import LoRAConfig
from lora_jax.names import BIAS, SCALE
from lora_jax.nnx.exactness import checked
from lora_jax.nnx.layers import LoRALayer, base_class, check_config, site_of
from lora_jax.nnx.rules import rule_of
from lora_jax.tree.targets import (
    LINEAR_KINDS,
    Site,
    Target,
    UnsupportedWeight,
    child,
    select_targets,
)
from lora_jax.tree.uncovered import describe_uncovered

_WRAPPED = (
    "wrap the adapted module instead, "
    "`nnx.bridge.ToNNX(lora_jax.adapt(module, config, x), rngs=rngs)`"
)
# Modules that rewrite the weights of the layer they call.
_REWRITING = (nnx.WeightNorm, nnx.SpectralNorm)


class Found(NamedTuple):
    """The layers of a model.

    Attributes:
      sites: layers that can be adapted.
      unsupported: weights that can't be, by path.
      weights: every `flax.nnx.Param`, by path.
      first: the first path of each module, by every path that it has.
    """

    sites: list[Site]
    unsupported: dict[str, UnsupportedWeight]
    weights: dict[str, nnx.Param]
    first: dict[str, str]

    def owner(self, weight_path: str) -> str:
        """Returns the first path of the module that holds a weight."""
        path = weight_path.rpartition("/")[0]
        return self.first.get(path, path)


def find_layers(
    model: nnx.Module, config: LoRAConfig, stack_axis: int | None = None
) -> Found:
    """Finds the layers and weights of a model without adapters.

    Args:
      model: any NNX module.
      config: the adapter config, for its type only.
      stack_axis: as for `adapt`.

    Returns:
      What was found.

    Raises:
      TypeError: if ``model`` is not an NNX module or ``config`` not a `LoRAConfig`.
      ValueError: if the model already has adapters.
    """
    if not isinstance(model, nnx.Module):
        is_linen = isinstance(model, nn.Module)
        raise TypeError(
            f"model must be a flax.nnx Module; got {type(model).__name__}"
            + (", a flax.linen one: use `lora_jax.adapt`." if is_linen else ".")
        )
    check_config(config)
    modules = {as_path(p): m for p, m in nnx.iter_modules(model, graph=True)}
    has = [p for p, m in modules.items() if isinstance(m, (LoRALayer, nnx.LoRA))]
    if has:
        raise ValueError(
            f"the model already has LoRA layers, such as {has[0]!r}; adapt the model "
            "that it was made from."
        )
    weights = params_of(model)
    rewritten = {p for p, m in modules.items() if isinstance(m, _REWRITING)}
    sites, why, linear, tried = {}, {}, set(), {}
    for path, module in modules.items():
        known = rule_of(type(module), module)
        if known is None or child(path, known[1].weight) not in weights:
            continue
        rule = known[1]
        is_linear = rule.kind in LINEAR_KINDS and not rule.is_guess
        linear |= {path} if is_linear else set()
        if any(path.startswith(f"{outer}/" if outer else "") for outer in rewritten):
            why[path] = "a module around it rewrites its weights on each call"
            continue
        try:
            site = site_of(path, module, rule, stack_axis)
            sites[path] = checked(site, module, rule, tried)
        except ValueError as error:
            why[path] = str(error)
    unsupported = {}
    wrapped = {
        child(path, ""): type(module.to_nnx__module).__name__
        for path, module in modules.items()
        if isinstance(module, nnx.bridge.ToNNX)
    }
    first = _first_paths(model, modules)
    for path, weight in weights.items():
        owner, _, name = path.rpartition("/")
        owner, shape = first.get(owner, owner), getattr(weight, "shape", ())
        if owner in sites or name in (BIAS, SCALE) or len(shape) < 2:
            continue
        kind, reason = type(modules.get(owner, model)).__name__, why.get(owner, "")
        for start, inner in wrapped.items():
            if path.startswith(start):
                kind, reason = f"the Linen module {inner}", _WRAPPED
        unsupported[path] = UnsupportedWeight(
            kind, owner in linear, reason, tuple(shape)
        )
    return Found(list(sites.values()), unsupported, weights, first)


def adapted_layers(model: nnx.Module) -> dict[str, Any]:
    """Returns the layers of a model that have an adapter, by path."""
    return {
        as_path(parts): module
        for parts, module in nnx.iter_modules(model, graph=True)
        if isinstance(module, LoRALayer) and module.lora is not None
    }


def other_sites(model: nnx.Module) -> list[Site]:
    """Returns the layers of an adapted model that have no adapter."""
    sites, adapted = [], adapted_layers(model)
    for parts, module in nnx.iter_modules(model, graph=True):
        path, known = as_path(parts), rule_of(base_class(type(module)), module)
        if known is not None and path not in adapted:
            with contextlib.suppress(ValueError):  # stacked, in an unknown way
                sites.append(site_of(path, module, known[1]))
    return sites


def params_of(model: nnx.Module) -> dict[str, nnx.Param]:
    """Returns every `flax.nnx.Param`, a shared one under each of its paths."""
    leaves = {
        as_path(parts): leaf
        for parts, leaf in nnx.iter_graph(model, graph=True)
        if isinstance(leaf, nnx.Param)
    }
    return {path: leaves[first] for path, first in _first_paths(model, leaves).items()}


def shared_weights(model: nnx.Module) -> list[list[str]]:
    """Returns the paths of each `flax.nnx.Param` that several modules hold."""
    groups = nnx.find_duplicates(model, only=nnx.Param)
    return [[*map(as_path, group)] for group in groups]


def _first_paths(model: nnx.Module, paths: Iterable[str]) -> dict[str, str]:
    """Returns first paths by all paths, with those of what is shared."""
    first = {path: path for path in paths}
    for group in nnx.find_duplicates(model):
        known, *others = map(as_path, group)
        inside = [p for p in first if p == known or p.startswith(f"{known}/")]
        first |= {o + p[len(known) :]: first[p] for o in others for p in inside}
    return first


def rebuild(
    model: nnx.Module,
    replaced: Mapping[int, nnx.Variable],
    change: Callable[[str, Any], None],
) -> Any:
    """Returns a copy of a model's structure that shares its Variables, then changed.

    Args:
      model: the model, not changed.
      replaced: Variables of the copy by the ``id`` of those that they replace.
      change: called with the path and each object of the copy, innermost first.

    Returns:
      The copy.

    Raises:
      ValueError: if a Variable to replace is in a plain list or dictionary.
    """

    def visit(parts: tuple[Any, ...], node: Any) -> Any:
        if isinstance(node, nnx.Pytree):
            # Not by `visit`'s result, with which flax would overwrite the given
            # model's Variable.
            own = vars(node)
            own.update(
                {k: replaced[id(v)] for k, v in own.items() if id(v) in replaced}
            )
            change(as_path(parts), node)
        return node

    rebuilt = nnx.recursive_map(visit, model, graph=True)
    left = [
        p for p, leaf in nnx.iter_graph(rebuilt, graph=True) if id(leaf) in replaced
    ]
    if left:
        names = ", ".join(map(as_path, left))
        raise ValueError(
            f"{names} must be attributes of modules to be replaced; they are in plain "
            "lists or dictionaries. Use `nnx.List` or `nnx.Dict`."
        )
    return rebuilt


def as_path(parts: tuple[Any, ...]) -> str:
    """Returns the path of a node of a model, joined by ``/``."""
    return "/".join(map(str, parts))


def select(found: Found, config: LoRAConfig) -> list[Target]:
    """Selects targets by any of their paths; each has its first path."""
    named = [
        dataclasses.replace(site, path=path)
        for site in found.sites
        for path, first in found.first.items()
        if first == site.path
    ]
    chosen = select_targets(
        named, config, weights=found.weights, unsupported=found.unsupported
    )
    if message := describe_uncovered(found.unsupported, config):
        warnings.warn(message, stacklevel=3)
    targets: dict[str, Target] = {}
    for target in chosen:
        first = found.first[target.path]
        target = dataclasses.replace(target, path=first)
        if targets.setdefault(first, target) != target:
            raise ValueError(
                f"{first!r} must have one rank and alpha; its other paths match other "
                "patterns."
            )
    return list(targets.values())
