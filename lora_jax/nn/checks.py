"""What is checked before an adapter meets a model, and how a call's flags are read."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core.scope import Scope

from lora_jax.config import LoRAConfig
from lora_jax.names import LORA, LORA_A, LORA_B, MAGNITUDE, PARAMS
from lora_jax.nn.layers import Layer
from lora_jax.nn.trace import DETERMINISTIC_FLAGS
from lora_jax.ops.contraction import Contraction
from lora_jax.ops.merge import is_finite
from lora_jax.tree.paths import flatten
from lora_jax.tree.targets import Target, child


def is_deterministic(
    model: nn.Module, method: str | Callable[..., Any], args: tuple, kwargs: dict
) -> bool:
    """Reads the model's own switch for dropout, as one call has set it.

    Args:
      model: bound or not.
      method: of the model, by name or as a function of it.
      args: positional arguments of the call.
      kwargs: keyword arguments of the call.

    Returns:
      Whether the call is deterministic; False where the model has no such switch.
    """
    function = getattr(type(model), method) if isinstance(method, str) else method
    try:
        bound = inspect.signature(function).bind(model, *args, **kwargs)
    except TypeError:  # a wrong call: the model itself says what is wrong with it
        return False
    bound.apply_defaults()
    for given in (bound.arguments, bound.kwargs, vars(model)):
        for name, value in DETERMINISTIC_FLAGS.items():
            if given.get(name) is not None:
                return bool(given[name]) == value
    return False


def check_adapter(
    path: str,
    layer: Layer,
    scope: Scope,
    contraction: Contraction,
    config: LoRAConfig,
    is_target: bool,
) -> None:
    """Raises unless the adapter of a called layer is the one the config asks for.

    Args:
      path: of the layer, as the config's patterns see it.
      layer: its description.
      scope: that holds its kernel, A, B and magnitude.
      contraction: roles of the kernel's axes.
      config: says of which rank it must be, and whether with DoRA.
      is_target: whether the config adapts the layer.

    Raises:
      ValueError: if A, B or the magnitude is missing, not wanted, or of another shape.
    """
    a, b = (scope.get_variable(PARAMS, name) for name in (LORA_A, LORA_B))
    cause = "Make the variables with `attach`, or load them for this config."
    if not is_target or a is None or b is None:
        raise ValueError(
            f"the collection {LORA!r} must have {child(path, LORA_A)!r} and {LORA_B!r} "
            f"if and only if the config targets {path!r}; got "
            f"{'no adapter for a target' if is_target else 'one too many'}. {cause}"
        )
    kernel = nn.meta.unbox(scope.get_variable(PARAMS, layer.weight))
    wanted = contraction.factor_shapes(kernel.shape, config.rank_for(path))
    if (a.shape, b.shape) != wanted:
        raise ValueError(
            f"lora_a, lora_b of {path!r} must be {wanted[0]}, {wanted[1]} for rank "
            f"{config.rank_for(path)}; got {a.shape}, {b.shape}. {cause}"
        )
    magnitude = scope.get_variable(PARAMS, MAGNITUDE)
    if (magnitude is not None) != config.dora:
        raise ValueError(
            f"the collection {LORA!r} must have {child(path, MAGNITUDE)!r} if and only "
            f"if the config has dora=True; got dora={config.dora}. {cause}"
        )


def check_shapes(wanted: Mapping[str, Any], got: Mapping[str, Any]) -> None:
    """Raises unless two trees have the same leaves.

    Args:
      wanted: shapes of the model's parameters by path.
      got: shapes of those given.

    Raises:
      ValueError: naming every leaf that is missing, unknown, or mis-shaped.
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
            f"params do not fit the model: {'; '.join(faults)}. Pass the tree that "
            "`model.apply` takes as 'params', and example inputs that reach all of it."
        )


def check_kernels(params: Mapping[str, Any], targets: list[Target]) -> None:
    """Raises unless every kernel to be adapted is floating and finite.

    Args:
      params: the base tree.
      targets: the adapted layers.

    Raises:
      TypeError: naming every kernel of another dtype.
      ValueError: naming every kernel with a NaN or an infinity.
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
        raise ValueError(f"kernels must be finite; {', '.join(bad)} hold NaN or inf.")
