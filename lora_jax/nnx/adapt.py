"""LoRA for an NNX model that was written without it.

``adapt(model, config, rngs=rngs)`` returns a model with the same structure, in which
each targeted layer is an instance of a subclass of its class, with ``lora_a`` and
``lora_b`` beside its kernel. Every other `flax.nnx.Variable` is the given model's own:
W0 is not copied, paths don't change, and the given model stays as it is.
"""

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx

from lora_jax.array_types import PRNGKey
from lora_jax.config import LoRAConfig
from lora_jax.names import BIAS, DROPOUT, PARAMS, SCALE
from lora_jax.nn.checks import check_kernels
from lora_jax.nnx.layers import (
    LoRALayer,
    add_factors,
    check_config,
    layer_rule,
    lora_class,
    set_class,
    site_of,
)
from lora_jax.nnx.rules import rule_of
from lora_jax.tree.paths import unflatten
from lora_jax.tree.targets import (
    LINEAR_KINDS,
    Site,
    Target,
    UnsupportedWeight,
    as_target,
    child,
    select_targets,
)
from lora_jax.tree.uncovered import describe_uncovered

# Modules that rewrite the weights of the layer they call.
_REWRITING = (nnx.WeightNorm, nnx.SpectralNorm)

Trained = nnx.LoRAParam
"""The filter of all that is trained: adapters, and what `LoRAConfig.train` names."""


class TrainedParam(nnx.LoRAParam):
    """A weight of the base that is trained in full.

    It is a `flax.nnx.LoRAParam`, so training loops that select those train it too.
    """


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


def adapt(
    model: nnx.Module,
    config: LoRAConfig,
    *,
    rngs: nnx.Rngs,
    stack_axis: int | None = None,
) -> Any:
    """Adds LoRA to an NNX model; needs no example inputs.

    Args:
      model: any NNX module. It is not changed, and the result shares its Variables.
      config: the adapter config. A path is that of `flax.nnx.iter_modules` joined by
        ``/`` (``"blocks/0/attention/query"``). A module in several places is named by
        any of its paths, and has one adapter.
      rngs: its ``params`` (or default) stream, as it was seeded, gives A; with dropout
        its ``dropout`` (or default) stream the masks. Both have the path folded in: the
        same seed and path give the adapter that the Linen side's ``attach`` gives.
      stack_axis: position of the layer axis of stacked layers (by `flax.nnx.vmap`),
        needed only if their shapes leave it open.

    Returns:
      A model of the same class. Leaves of the base that the config trains in full are
      `TrainedParam` of its own, in float32 if their module sets its own ``dtype``.

    Raises:
      TypeError: if ``model`` is not an NNX module, or another argument has the wrong
        type.
      ValueError: if the config names layers that don't exist or can't be adapted, a
        rank exceeds a kernel's smaller side, a kernel isn't finite, or the model
        already has adapters.

    Example:
      >>> model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
      >>> adapted = adapt(model, LoRAConfig(rank=2, targets=".*"), rngs=nnx.Rngs(1))
      >>> x = jnp.ones((2, 3))
      >>> bool((adapted(x) == model(x)).all()), adapted.kernel is model.kernel
      (True, True)

    References:
      Hu et al., https://arxiv.org/abs/2106.09685, section 4.
    """
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(
            f"rngs must be nnx.Rngs; got {type(rngs).__name__}. Pass `nnx.Rngs(seed)`."
        )
    found = find_layers(model, config, stack_axis)
    targets = {target.path: target for target in _select(found, config)}
    _check_ranks(targets)
    weights = {path: weight[...] for path, weight in found.weights.items()}
    check_kernels(unflatten(weights), list(targets.values()))
    key = seed_of(rngs, PARAMS)
    dropout_key = seed_of(rngs, DROPOUT) if config.dropout_rate else None

    trained = {
        id(weight): TrainedParam(weight[...], **weight.get_metadata())
        for path, weight in found.weights.items()
        if config.is_trained(path, is_adapted=found.owner(path) in targets)
    }

    def change(path: str, module: Any) -> None:
        if path in targets:
            set_class(module, lora_class(type(module), module))
            add_factors(module, targets[path], config, key, dropout_key, stack_axis)
        _widen_trained(module)

    return rebuild(model, trained, change)


def find_targets(
    model: nnx.Module, config: LoRAConfig, *, stack_axis: int | None = None
) -> list[Target]:
    """Returns the layers that ``config`` adapts in ``model``.

    Args:
      model: any NNX module, also an abstract one.
      config: the adapter config.
      stack_axis: as for `adapt`.

    Returns:
      One `Target` per layer: path, kind, kernel shape, rank, alpha, scaling, trainable.

    Raises:
      ValueError: listing every pattern without a match and every target that can't be
        adapted.
    """
    return _select(find_layers(model, config, stack_axis), config)


def lora_targets(model: nnx.Module) -> list[Target]:
    """Returns the adapted layers of a model that `adapt` returned, or of LoRA layers.

    Args:
      model: a model with adapters.

    Returns:
      One `Target` per layer.

    Raises:
      ValueError: if there is no adapted layer.
    """
    targets = []
    for parts, module in nnx.iter_modules(model, graph=True):
        if isinstance(module, LoRALayer) and module.lora is not None:
            lora, path = module.lora, as_path(parts)
            site = site_of(path, module, layer_rule(module), lora.stack_axis)
            shape = list(module.lora_a.shape)  # pyright: ignore[reportAttributeAccessIssue] - adapted
            for axis in reversed(site.scanned_a):
                del shape[axis]
            target = as_target(site, lora.config)
            own = {"rank": shape[-1], "alpha": lora.alpha, "scaling": lora.scaling}
            targets.append(Target(**{**vars(target), **own}))
    if not targets:
        raise ValueError(
            f"{type(model).__name__} must have adapted layers; got none. "
            "`lora_jax.nnx.adapt` adds them."
        )
    return targets


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
    sites, why, linear = {}, {}, set()
    for path, module in modules.items():
        known = rule_of(type(module), module)
        if known is None or child(path, known[1].weight) not in weights:
            continue
        rule = known[1]
        linear |= {path} if rule.kind in LINEAR_KINDS else set()
        if any(path.startswith(f"{outer}/" if outer else "") for outer in rewritten):
            why[path] = "a module around it rewrites its weights on each call"
            continue
        try:
            sites[path] = site_of(path, module, rule, stack_axis)
        except ValueError as error:
            why[path] = str(error)
    unsupported = {}
    first = _first_paths(model, modules)
    for path, weight in weights.items():
        owner, _, name = path.rpartition("/")
        owner = first.get(owner, owner)
        if owner in sites or name in (BIAS, SCALE) or len(weight.shape) < 2:
            continue
        kind = type(modules.get(owner, model)).__name__
        unsupported[path] = UnsupportedWeight(
            kind, owner in linear, why.get(owner, ""), tuple(weight.shape)
        )
    return Found(list(sites.values()), unsupported, weights, first)


def params_of(model: nnx.Module) -> dict[str, nnx.Param]:
    """Returns every `flax.nnx.Param`, a shared one under each of its paths."""
    leaves = {
        as_path(parts): leaf
        for parts, leaf in nnx.iter_graph(model, graph=True)
        if isinstance(leaf, nnx.Param)
    }
    return {path: leaves[first] for path, first in _first_paths(model, leaves).items()}


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


def seed_of(rngs: nnx.Rngs, name: str) -> PRNGKey:
    """Returns the key that a stream was seeded with, whatever was drawn from it."""
    if name not in rngs and "default" not in rngs:
        raise ValueError(
            f"rngs must have a stream {name!r}, or a default one; it has "
            f"{sorted(map(str, rngs))}. Pass `nnx.Rngs(seed)`."
        )
    return rngs[name].key[...]


def _select(found: Found, config: LoRAConfig) -> list[Target]:
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


def _check_ranks(targets: dict[str, Target]) -> None:
    sides = {p: t.contraction.matrix_size(t.kernel_shape) for p, t in targets.items()}
    faults = [
        f"{path or 'the layer'} has rank {targets[path].rank} for {i} inputs and {o} "
        "outputs"
        for path, (i, o) in sides.items()
        if targets[path].rank > min(i, o)
    ]
    if faults:
        raise ValueError(
            "a rank must not exceed the smaller side of its kernel; "
            f"{'; '.join(faults)}. Lower `rank`, or that of a layer by `rank_pattern`."
        )


def _widen_trained(module: Any) -> None:
    """Widens a module's trained weights to float32, if that changes no output."""
    if getattr(module, "dtype", None) is None:
        return
    for leaf in vars(module).values():
        if isinstance(leaf, TrainedParam) and leaf.dtype in (jnp.bfloat16, jnp.float16):
            leaf.set_value(leaf[...].astype(jnp.float32))
