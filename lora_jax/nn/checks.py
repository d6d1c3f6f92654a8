"""Checks of adapters against models, and reading a call's ``deterministic`` flag."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.config import LoRAConfig
from lora_jax.names import (
    FIXED,
    LORA,
    LORA_A,
    LORA_B,
    MAGNITUDE,
    START_A,
    START_B,
    VERA_B,
    VERA_D,
)
from lora_jax.ops.contraction import Contraction, Shape
from lora_jax.ops.dora import magnitude_shape
from lora_jax.ops.factors import Factors
from lora_jax.ops.merge import is_finite
from lora_jax.ops.vera import vera_shapes
from lora_jax.tree.paths import flatten
from lora_jax.tree.targets import Target, child

# Flags of a call and their values at inference.
DETERMINISTIC_FLAGS = {
    "deterministic": True,
    "train": False,
    "training": False,
    "is_training": False,
}


def is_deterministic(
    model: nn.Module, method: str | Callable[..., Any], args: tuple, kwargs: dict
) -> bool:
    """Returns whether a call of the model sets its dropout flag to deterministic.

    Args:
      model: bound or unbound.
      method: method of the model, by name or function.
      args: positional arguments of the call.
      kwargs: keyword arguments of the call.

    Returns:
      The model's own flag for this call; False if it has none.
    """
    function = getattr(type(model), method) if isinstance(method, str) else method
    try:
        bound = inspect.signature(function).bind(model, *args, **kwargs)
    except TypeError:  # invalid arguments: the model's own error is clearer
        return False
    bound.apply_defaults()
    for given in (bound.arguments, bound.kwargs, vars(model)):
        for name, value in DETERMINISTIC_FLAGS.items():
            if given.get(name) is not None:
                return bool(given[name]) == value
    return False


MAKE_OR_LOAD = "Make the variables with `attach`, or load them for this config."


def check_presence(
    path: str, factors: Factors, config: LoRAConfig, is_target: bool
) -> None:
    """Raises a ValueError unless exactly the targets have adapters, with all factors.

    Args:
      path: the layer's path, as matched by the config's patterns.
      factors: its leaves; None for missing ones.
      config: determines the leaves that there must be.
      is_target: whether the config adapts the layer.
    """
    a, b, magnitude = factors[:3]
    if not is_target or a is None or b is None:
        raise ValueError(
            f"the collection {LORA!r} must have {child(path, LORA_A)!r} and {LORA_B!r} "
            f"if and only if the config targets {path!r}; got "
            f"{'no adapter for a target' if is_target else 'an extra adapter'}. "
            f"{MAKE_OR_LOAD}"
        )
    if (magnitude is not None) != config.dora:
        raise ValueError(
            f"the collection {LORA!r} must have {child(path, MAGNITUDE)!r} if and only "
            f"if the config has dora=True; got dora={config.dora}. {MAKE_OR_LOAD}"
        )
    for name in (START_A, START_B, VERA_D, VERA_B):
        if (getattr(factors, name) is not None) != (name in config.leaves):
            held, why = (FIXED, "init starts from W0")
            if name in (VERA_D, VERA_B):
                held, why = (LORA, "vera is True")
            raise ValueError(
                f"the collection {held!r} must have {child(path, name)!r} if and only "
                f"if the config's {why}; got init={config.init!r}, "
                f"vera={config.vera}. {MAKE_OR_LOAD}"
            )


def check_factors_fit(
    path: str,
    factors: Factors,
    kernel_shape: Shape,
    contraction: Contraction,
    config: LoRAConfig,
) -> None:
    """Raises a ValueError unless the factors have the shapes that the config implies.

    Args:
      path: the layer's path, as matched by the config's patterns.
      factors: the layer's factors.
      kernel_shape: shape of its weight.
      contraction: roles of the kernel's axes.
      config: determines the rank.
    """
    rank = config.rank_for(path)
    a, b = contraction.factor_shapes(kernel_shape, rank)
    got = jnp.shape(factors.lora_a), jnp.shape(factors.lora_b)
    if got != (a, b):
        raise ValueError(
            f"lora_a, lora_b of {path!r} must be {a}, {b} for rank {rank} and a kernel "
            f"of shape {kernel_shape}; got {got[0]}, {got[1]}. {MAKE_OR_LOAD}"
        )
    others = {START_A: a, START_B: b, **vera_shapes(b, contraction)}
    faults = [
        f"{name} of {path!r} must be {shape}; got {jnp.shape(leaf)}"
        for name, shape in others.items()
        if (leaf := getattr(factors, name)) is not None and jnp.shape(leaf) != shape
    ]
    if faults:
        raise ValueError(f"{'; '.join(faults)}. {MAKE_OR_LOAD}")
    wanted = magnitude_shape(kernel_shape, contraction)
    if factors.magnitude is not None and jnp.shape(factors.magnitude) != wanted:
        raise ValueError(
            f"{child(path, MAGNITUDE)} must be {wanted}; "
            f"got {jnp.shape(factors.magnitude)}. {MAKE_OR_LOAD}"
        )


def check_shapes(wanted: Mapping[str, Any], got: Mapping[str, Any]) -> None:
    """Raises unless two mappings from paths to shapes are equal.

    Raises:
      ValueError: listing every leaf that is missing, unknown, or of the wrong shape.
    """
    faults = [f"{path} is missing" for path in wanted if path not in got]
    faults += [f"{path} is not in the model" for path in got if path not in wanted]
    faults += [
        f"{path} must be {wanted[path]}; got {got[path]}"
        for path in wanted
        if path in got and wanted[path] != got[path]
    ]
    if faults:
        raise ValueError(
            f"params do not match the model: {'; '.join(faults)}. Pass the tree that "
            "`model.apply` takes as 'params', and example inputs that use all of it."
        )


def check_kernels(params: Mapping[str, Any], targets: list[Target]) -> None:
    """Raises unless every kernel to be adapted is floating-point and finite.

    Raises:
      TypeError: listing every kernel of another dtype.
      ValueError: listing every kernel with NaN or infinity.
    """
    flat = flatten(params)
    kernels = {target.weight_path: flat[target.weight_path] for target in targets}
    wrong = [
        f"{path} is {leaf.dtype}"
        for path, leaf in kernels.items()
        if not jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    if wrong:
        raise TypeError(f"kernels must be floating-point; {', '.join(wrong)}.")
    bad = [
        path
        for path, leaf in kernels.items()
        if isinstance(leaf, (jax.Array, np.ndarray)) and not is_finite(leaf)
    ]
    if bad:
        raise ValueError(
            f"kernels must be finite; {', '.join(bad)} contain NaN or infinity."
        )
