"""Finding a model's adaptable layers with one abstract trace.

Tracing needs example inputs. If none are given they are inferred from the parameters:
token ids for an embedding, features as wide as a kernel's input. An inferred input is
accepted only if tracing with it yields exactly the given parameters. Other inputs
(images, masks, several inputs) must be given.
"""

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import core
from flax.core import freeze
from flax.core.scope import Scope
from flax.errors import FlaxError

from lora_jax.config import LoRAConfig
from lora_jax.names import EMBEDDING, FIXED, FROZEN, KERNEL, LORA, PARAMS
from lora_jax.nn.apply import AlreadyAdaptedError
from lora_jax.nn.checks import DETERMINISTIC_FLAGS
from lora_jax.nn.layer_rules import registered_rules
from lora_jax.nn.watch import FLAG, Watcher
from lora_jax.ops.contraction import Shape
from lora_jax.tree.paths import flatten
from lora_jax.tree.targets import Site, UnsupportedWeight

_TRACES = itertools.count()


class Example(NamedTuple):
    """Example inputs of a model, with arrays reduced to shapes.

    Attributes:
      leaves: flattened positional and keyword arguments.
      treedef: their structure.
      method: the method they are for, by name or function.
    """

    leaves: tuple[Any, ...]
    treedef: Any
    method: str | Callable[..., Any] = "__call__"

    @classmethod
    def of(
        cls, *args: Any, method: str | Callable[..., Any] = "__call__", **kwargs: Any
    ) -> "Example":
        """Makes an example from a call's arguments, keeping only shapes of arrays."""
        leaves, treedef = jax.tree.flatten((args, kwargs))
        shaped = [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if _is_array(leaf) else leaf
            for leaf in leaves
        ]
        return cls(tuple(shaped), treedef, method)

    def arguments(self, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns positional and keyword arguments, with inference-mode flags."""
        args, kwargs = jax.tree.unflatten(self.treedef, self.leaves)
        return args, _with_flags(model, self.method, args, kwargs)


class Trace(NamedTuple):
    """The result of tracing a model. Cached: do not mutate.

    Attributes:
      sites: layers that can be adapted.
      unsupported: weights that can't be, by path.
      params: shapes of the model's parameters.
      configs: the LoRA layers' own configs, by path.
      typed: paths of modules whose output dtype is their ``dtype`` attribute,
        independent of their parameters' dtype.
      others: shapes of the model's other collections (e.g. ``batch_stats``).
      example: the inputs it was traced with.
    """

    sites: tuple[Site, ...]
    unsupported: dict[str, UnsupportedWeight]
    params: dict[str, Any]
    configs: dict[str, LoRAConfig]
    typed: frozenset[str]
    others: dict[str, Any]
    example: Example


def shapes_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the shape of every leaf (array, number or shape) by path."""
    flat = flatten(nn.meta.unbox(params))

    def shape(leaf: Any) -> Shape:
        return tuple(getattr(leaf, "shape", ()))

    return {path: jax.tree.map(shape, leaf) for path, leaf in flat.items()}


def trace_model(
    model: nn.Module,
    params: Mapping[str, Any] | None,
    example: Example | None,
    *,
    lora_layers_only: bool = False,
) -> Trace:
    """Finds every layer of ``model`` that can be adapted, and all parameters' shapes.

    Cached: equal models with equal inputs are traced once.

    Args:
      model: an unbound Linen module.
      params: its parameter tree, to infer the inputs from if no example is given.
      example: example inputs, or None.
      lora_layers_only: whether to find the model's LoRA layers instead of plain ones.

    Raises:
      ValueError: if no example is given and none can be inferred.
    """
    if example is not None:
        return _trace(model, example, lora_layers_only)
    shapes, tried = shapes_of(params or {}), []
    for candidate in _examples_from(model, shapes):
        try:
            found = _trace(model, candidate, lora_layers_only)
        except AlreadyAdaptedError:
            raise
        except (TypeError, ValueError, FlaxError) as error:
            tried.append(f"{_describe(candidate)}: {type(error).__name__}: {error}")
            continue
        if shapes_of(found.params) == shapes:
            return found
        tried.append(f"{_describe(candidate)} makes other parameters")
    why = f"{tried[0][:300]}" if tried else "they can't be inferred from its parameters"
    raise ValueError(
        f"{type(model).__name__} needs example inputs to find its layers: {why}. Pass "
        "them after the config (arrays or jax.ShapeDtypeStruct), for example "
        "adapt(model, config, jnp.ones((1, 224, 224, 3)))."
    )


def flag_scope(scope: Scope, value: Any) -> None:
    """Flags a scope and all scopes below it, to separate cache entries of ``nn.jit``.

    ``nn.jit`` caches by module and scope, unaware of interceptors: without the flag it
    would reuse a compilation made for other adapters, or for none. Calls with equal
    (hashable) values share compilations.
    """
    scope.flags = freeze({**scope.flags, FLAG: value})


def bound_method(
    model: nn.Module, method: str | Callable[..., Any]
) -> Callable[..., Any]:
    """Returns a method of a bound model, given by name or function."""
    if isinstance(method, str):
        return getattr(model, method)
    return functools.partial(method, model)


def _trace(model: nn.Module, example: Example, lora_layers_only: bool) -> Trace:
    """Traces with caching, except bound models, whose scope holds arrays."""
    x64 = jax.config.values["jax_enable_x64"]
    known = (model, example, lora_layers_only, registered_rules(), x64)
    try:
        hash(known)
    except TypeError:
        return _trace_uncached(*known)
    is_bound = model.scope is not None or model.parent is not None
    return _trace_uncached(*known) if is_bound else _trace_cached(*known)


@functools.lru_cache(maxsize=64)
def _trace_cached(*known: Any) -> Trace:
    return _trace_uncached(*known)


def _trace_uncached(
    model: nn.Module, example: Example, lora_layers_only: bool, *_: Any
) -> Trace:
    """Traces ``model.init`` once, intercepting every layer."""
    watcher = Watcher(lora_layers_only)
    dynamic = list(filter(_is_array, example.leaves))

    def init(key, dynamic):
        arrays = iter(dynamic)
        leaves = [next(arrays) if _is_array(leaf) else leaf for leaf in example.leaves]
        args, kwargs = jax.tree.unflatten(example.treedef, leaves)
        kwargs = _with_flags(model, example.method, args, kwargs)

        def run(scope: Scope) -> None:
            bound = model.clone(parent=scope, _deep_clone=True)
            with nn.intercept_methods(watcher):
                bound_method(bound, example.method)(*args, **kwargs)

        flags = {FLAG: next(_TRACES)}  # unique, so nn.jit's cache is not reused
        return core.init(run, flags=flags)({PARAMS: key})[1]

    variables = jax.eval_shape(init, jax.random.key(0), dynamic)
    if not lora_layers_only and (FROZEN in variables or LORA in variables):
        raise AlreadyAdaptedError(
            f"{type(model).__name__} already has LoRA layers (a collection {FROZEN!r} "
            f"or {LORA!r}); use it without `adapt`."
        )
    params, sites = watcher.finish(variables)
    sown = ("intermediates", FROZEN, LORA, PARAMS, FIXED)
    others = {name: tree for name, tree in variables.items() if name not in sown}
    return Trace(
        sites,
        watcher.unsupported,
        params,
        watcher.configs,
        frozenset(path for path, is_own in watcher.typed.items() if is_own),
        nn.meta.unbox(others),
        example,
    )


def _with_flags(
    model: nn.Module, method: str | Callable[..., Any], args: tuple, kwargs: dict
) -> dict[str, Any]:
    """Adds the inference-mode flags that an example does not set."""
    function = getattr(type(model), method) if isinstance(method, str) else method
    signature = inspect.signature(function)
    given = signature.bind_partial(model, *args, **kwargs).arguments
    unset = {
        name: value
        for name, value in DETERMINISTIC_FLAGS.items()
        if name in signature.parameters
        and name not in given
        and getattr(model, name, None) is None
        and signature.parameters[name].default in (inspect.Parameter.empty, None)
    }
    return {**kwargs, **unset}


def _examples_from(model: nn.Module, shapes: Mapping[str, Shape]) -> Iterator[Example]:
    """Yields candidate inputs of a model with one input, inferred from parameters."""
    parameters = list(inspect.signature(type(model).__call__).parameters.values())[1:]
    flags: dict[str, Any] = {
        p.name: DETERMINISTIC_FLAGS[p.name]
        for p in parameters
        if p.name in DETERMINISTIC_FLAGS
    }
    required = [
        p
        for p in parameters
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        and p.name not in flags
    ]
    if len(required) > 1:
        return
    if any(path.rpartition("/")[2] == EMBEDDING for path in shapes):
        yield Example.of(jax.ShapeDtypeStruct((1, 8), jnp.int32), **flags)
    kernels = [s for path, s in shapes.items() if path.rpartition("/")[2] == KERNEL]
    if any(len(kernel) > 3 for kernel in kernels):
        return  # images: no kernel determines their size
    for width in dict.fromkeys(kernel[0] for kernel in kernels):
        for shape in ((1, 8, width), (1, width)):
            yield Example.of(jax.ShapeDtypeStruct(shape, jnp.float32), **flags)


def _describe(example: Example) -> str:
    arrays = filter(_is_array, example.leaves)
    return ", ".join(f"{jnp.dtype(a.dtype).name}{list(a.shape)}" for a in arrays)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")
