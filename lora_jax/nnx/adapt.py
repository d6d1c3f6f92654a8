"""LoRA for an NNX model that was written without it.

``adapt(model, config, rngs=rngs)`` returns a model with the same structure, in which
each targeted layer is an instance of a subclass of its class, with ``lora_a`` and
``lora_b`` beside its kernel. Every other `flax.nnx.Variable` is the given model's own:
W0 is not copied, paths don't change, and the given model stays as it is.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.array_types import PRNGKey
from lora_jax.config import LoRAConfig
from lora_jax.names import DROPOUT, PARAMS
from lora_jax.nn.checks import check_kernels
from lora_jax.nnx.factors import add_lora, site_of
from lora_jax.nnx.find import (
    Found,
    adapted_layers,
    find_layers,
    rebuild,
    select,
    shared_weights,
)
from lora_jax.nnx.layers import (
    check_config,
    layer_rule,
    lora_class,
    set_class,
)
from lora_jax.tree.paths import unflatten
from lora_jax.tree.targets import Target, as_target

OF_TARGET = ("alpha", "scaling", "is_plain")  # what a layer keeps of its `Target`
Targets = Mapping[str, Target]  # by path
Values = dict[str, dict[str, Any]]  # leaves of adapters, by path and name
Trained = nnx.LoRAParam
"""The filter of all that is trained: adapters, and what `LoRAConfig.train` names.

Not `flax.nnx.Param`, which selects the base too: an adapted layer raises where the
gradient of its frozen weight is taken.
"""


class TrainedParam(nnx.LoRAParam):
    """A weight of the base that is trained in full.

    It is a `flax.nnx.LoRAParam`, so training loops that select those train it too.
    """


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
        kernel isn't finite or too small for the rank of an ``init`` made of it, or the
        model already has adapters.

    Warns:
      UserWarning: if a rank exceeds a kernel's smaller side, but for VeRA.

    Example:
      >>> model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
      >>> adapted = adapt(model, LoRAConfig(rank=2, targets=".*"), rngs=nnx.Rngs(1))
      >>> x = jnp.ones((2, 3))
      >>> bool((adapted(x) == model(x)).all()), adapted.kernel is model.kernel
      (True, True)

    References:
      Hu et al., https://arxiv.org/abs/2106.09685, section 4.
    """
    check_config(config)
    if config.init in ("lora_ga", "eva"):
        raise ValueError(
            f"init must not be {config.init!r} for `adapt`, which has no data; use "
            f"`lora_jax.nnx.{config.init}_init` in its place."
        )

    def values_of(found: Found, targets: Targets) -> Values:
        return fresh_values(found, targets, config, rngs)

    return adapt_with(values_of, model, config, rngs=rngs, stack_axis=stack_axis)


def adapt_with(
    values_of: Callable[[Found, Targets], Values],
    model: nnx.Module,
    config: LoRAConfig,
    *,
    rngs: nnx.Rngs | None,
    stack_axis: int | None = None,
) -> Any:
    """Adds LoRA as `adapt`, with values from elsewhere.

    Args:
      values_of: gives the leaves of all adapters, from what was found in the model and
        the targets by path.
      model: as for `adapt`, as are the others.
      config: of the adapters.
      rngs: their streams; None disables adapter dropout.
      stack_axis: position of the layer axis of stacked layers.
    """
    found = find_layers(model, config, stack_axis)
    targets = {target.path: target for target in select(found, config)}
    values = values_of(found, targets)
    _warn_of_ties(model, {target.weight_path for target in targets.values()})
    drops = config.dropout_rate and rngs is not None
    dropout_key = seed_of(rngs, DROPOUT) if drops else None
    trained = {
        id(weight): TrainedParam(weight.get_value(), **weight.get_metadata())
        for path, weight in found.weights.items()
        if config.is_trained(path, is_adapted=found.owner(path) in targets)
    }

    def change(path: str, module: Any) -> None:
        if path in targets:
            set_class(module, lora_class(type(module), module))
            add_lora(
                module, targets[path], config, values[path], dropout_key, stack_axis
            )
        _widen_trained(module)

    return rebuild(model, trained, change)


def fresh_values(
    found: Found, targets: Targets, config: LoRAConfig, rngs: nnx.Rngs
) -> Values:
    """Returns new values of the leaves of all adapters; see `key_and_kernels`."""
    key, kernels = key_and_kernels(found, targets, rngs)
    return {p: t.init(key, kernels[p], config.start) for p, t in targets.items()}


def key_and_kernels(
    found: Found, targets: Targets, rngs: nnx.Rngs
) -> tuple[PRNGKey, dict[str, Any]]:
    """Returns the key of a model's adapters, and the kernels to be adapted by path.

    Raises:
      TypeError: if ``rngs`` are not `flax.nnx.Rngs`, or a kernel is abstract or not
        floating.
      ValueError: if a kernel isn't finite, or too small for its rank's ``init``.
    """
    key = seed_of(rngs, PARAMS)
    weights = {t.weight_path: found.weights[t.weight_path] for t in targets.values()}
    for path, weight in weights.items():
        if isinstance(weight.get_value(), jax.ShapeDtypeStruct):
            raise TypeError(
                f"model must hold arrays; {path} is abstract. `find_targets` takes an "
                "abstract model; for the shapes of A and B, call `adapt` within "
                "`flax.nnx.eval_shape`."
            )
    kernels = {path: weight[...] for path, weight in weights.items()}
    check_kernels(unflatten(kernels), list(targets.values()))
    return key, {path: kernels[t.weight_path] for path, t in targets.items()}


def no_values(found: Found, targets: Targets) -> Values:
    """Returns zeros for `adapt_with`, to be replaced by values from a file."""
    del found
    return {
        path: {name: jnp.zeros(shape) for name, shape in target.leaf_shapes.items()}
        for path, target in targets.items()
    }


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
    return select(find_layers(model, config, stack_axis), config)


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
    for path, module in adapted_layers(model).items():
        lora = module.lora
        site = site_of(path, module, layer_rule(module), lora.stack_axis)
        shape = list(module.lora_a.shape)
        for axis in reversed(site.scanned_a):
            del shape[axis]
        target = as_target(site, lora.config)
        kept = {name: getattr(lora, name) for name in OF_TARGET}
        targets.append(dataclasses.replace(target, rank=shape[-1], **kept))
    if not targets:
        raise ValueError(
            f"{type(model).__name__} must have adapted layers; got none. "
            "`lora_jax.nnx.adapt` adds them."
        )
    return targets


def seed_of(rngs: Any, name: str) -> PRNGKey:
    """Returns the key that a stream was seeded with, whatever was drawn from it."""
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(
            f"rngs must be nnx.Rngs; got {type(rngs).__name__}. Pass `nnx.Rngs(seed)`."
        )
    if name not in rngs and "default" not in rngs:
        raise ValueError(
            f"rngs must have a stream {name!r}, or a default one; it has "
            f"{sorted(map(str, rngs))}. Pass `nnx.Rngs(seed)`."
        )
    return rngs[name].key[...]


def _warn_of_ties(model: nnx.Module, adapted: set[str]) -> None:
    """Warns of an adapted array that a module without an adapter holds too."""
    for group in shared_weights(model):
        rest = [path for path in group if path not in adapted]
        if rest and len(rest) < len(group):
            own = next(path for path in group if path in adapted)
            warnings.warn(
                f"{own} is adapted, and {', '.join(rest)}, the same array, is not: "
                "what reads it there keeps W0, and the adapters can't be merged. Adapt "
                "both or neither, or share the module (an `nnx.Embed` and its "
                "`attend`) instead of its array.",
                stacklevel=4,
            )


def _widen_trained(module: Any) -> None:
    """Widens a module's trained weights to float32, if that changes no output."""
    if getattr(module, "dtype", None) is None:
        return
    for leaf in vars(module).values():
        if isinstance(leaf, TrainedParam) and leaf.dtype in (jnp.bfloat16, jnp.float16):
            leaf.set_value(leaf[...].astype(jnp.float32))
