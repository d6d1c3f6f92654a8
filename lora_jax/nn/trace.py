"""Looking at a model without running it: which layers can be adapted.

The model's own ``init`` is traced abstractly (no memory, no arithmetic), with every
layer call watched. Flax's lifted transforms then do the book-keeping for us: a marker
parameter written beside a kernel comes out of ``nn.scan`` or ``nn.vmap`` with the same
new axes as the kernel, and since the marker's sizes are like no other, where the new
axes stand is read off without a guess.

Tracing needs example inputs. Where none are given, a few plausible ones are tried
(token ids; features of a width that a kernel has; an image): the shape checks that Flax
makes for every parameter let only a fitting one through, and which one it is makes no
difference to the kernels.
"""

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_jax.names import EMBEDDING, KERNEL, PARAMS
from lora_jax.nn.layers import call_inputs, layer_of
from lora_jax.ops.contraction import Contraction, Shape
from lora_jax.tree.paths import flatten, unflatten
from lora_jax.tree.targets import Site, child

_MARKERS = ("__kernel_marker", "__a_marker", "__b_marker")
_ODD_SIZE = 1_000_003  # no layer count or batch size: marks an axis that was there


class Example(NamedTuple):
    """Example inputs of a model: arrays as shapes, everything else as it is.

    Attributes:
      leaves: flattened positional and keyword arguments.
      treedef: their structure.
      method: name of the method they are for.
    """

    leaves: tuple[Any, ...]
    treedef: Any
    method: str = "__call__"

    @classmethod
    def of(cls, *args: Any, method: str = "__call__", **kwargs: Any) -> "Example":
        """Makes an example of a call's arguments; arrays are kept as shapes only."""
        leaves, treedef = jax.tree.flatten((args, kwargs))
        shaped = [
            jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if _is_array(leaf) else leaf
            for leaf in leaves
        ]
        return cls(tuple(shaped), treedef, method)


class Trace(NamedTuple):
    """What one look at a model found.

    Attributes:
      sites: layers that can be adapted.
      unknown: layers that own a weight but can't be, ``{path: type}``.
      params: shapes of the model's parameters.
    """

    sites: list[Site]
    unknown: dict[str, str]
    params: dict[str, Any]


def trace_model(
    model: nn.Module, params: Mapping[str, Any] | None, example: Example | None
) -> Trace:
    """Finds every layer of ``model`` that can be adapted.

    Args:
      model: any Linen module, unbound.
      params: its parameter tree, for the choice of inputs where no example is given.
      example: example inputs, or None to try plausible ones.

    Returns:
      The layers and the shapes of all parameters.

    Raises:
      ValueError: if no example is given and none of those tried fits.
    """
    if example is not None:
        return _trace(model, example)
    shapes = {path: jnp.shape(leaf) for path, leaf in flatten(params or {}).items()}
    tried = []
    for candidate in _plausible_examples(model, shapes):
        try:
            found = _trace(model, candidate)
        except Exception as error:  # whatever a wrong input provokes
            tried.append(f"{_describe(candidate)}: {type(error).__name__}")
            continue
        got = {path: leaf.shape for path, leaf in flatten(found.params).items()}
        if got == shapes:
            return found
        tried.append(f"{_describe(candidate)}: other parameters")
    raise ValueError(
        f"{type(model).__name__} must be traced to find its layers, and none of "
        f"{len(tried)} plausible inputs fits it ({'; '.join(tried[:6])}). Give example "
        "inputs: `adapt(model, config, x)`."
    )


def _trace(model: nn.Module, example: Example) -> Trace:
    """Traces ``model.init`` once, watching every layer."""
    found: dict[str, tuple[str, str, Shape, Contraction]] = {}
    unknown: dict[str, str] = {}

    def watch(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        module = context.module
        layer = layer_of(module)
        path = "/".join(module.scope.path) if module.scope else ""
        if layer is None:
            own = module.variables.get(PARAMS, {})
            if any(
                not isinstance(v, Mapping) and jnp.ndim(v) > 1 for v in own.values()
            ):
                unknown[path] = type(module).__name__
        elif context.method_name in layer.methods and not module.scope.has_variable(
            PARAMS, _MARKERS[0]
        ):
            if context.method_name == "__call__":
                contraction = layer.contraction(module, *call_inputs(args, kwargs))
            else:  # a lookup's weight needs no inputs
                contraction = layer.contraction(module)
            kernel = nn.meta.unbox(module.scope.get_variable(PARAMS, layer.weight))
            found[path] = (layer.kind, layer.weight, kernel.shape, contraction)
            factors = contraction.factor_shapes(kernel.shape, 1)
            for name, shape in zip(_MARKERS, (kernel.shape, *factors), strict=True):
                marker = jnp.zeros((_ODD_SIZE,) * len(shape), jnp.int8)
                module.scope.put_variable(PARAMS, name, marker)
        return y

    dynamic = [leaf for leaf in example.leaves if _is_array(leaf)]

    def init(key, dynamic):
        arrays = iter(dynamic)
        leaves = [next(arrays) if _is_array(leaf) else leaf for leaf in example.leaves]
        args, kwargs = jax.tree.unflatten(example.treedef, leaves)
        with nn.intercept_methods(watch):
            return model.init(key, *args, method=example.method, **kwargs)

    variables = jax.eval_shape(init, jax.random.key(0), dynamic)
    flat = flatten(nn.meta.unbox(variables[PARAMS]))
    markers = {path: flat.pop(path) for path in list(flat) if path.endswith(_MARKERS)}
    sites = []
    for path, (kind, weight, _, contraction) in found.items():
        in_kernel, in_a, in_b = (
            tuple(
                axis
                for axis, size in enumerate(markers[child(path, name)].shape)
                if size != _ODD_SIZE
            )
            for name in _MARKERS
        )
        shape = flat[child(path, weight)].shape
        stacked = contraction.stacked(in_kernel)
        sites.append(Site(path, kind, weight, shape, stacked, in_a, in_b))
    return Trace(sites, unknown, unflatten(flat))


def _plausible_examples(
    model: nn.Module, shapes: Mapping[str, Shape]
) -> Iterator[Example]:
    """Yields inputs a model with these parameters may take."""
    signature = inspect.signature(type(model).__call__)
    required = [
        p
        for p in list(signature.parameters.values())[1:]
        if p.default is p.empty
        and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    flags = {
        name: value
        for name, value in (("deterministic", True), ("train", False))
        if name in signature.parameters
    }
    others = [p for p in required if p.name not in flags]
    for shape, dtype in _plausible_shapes(shapes):
        # Further required arguments are masks or ids of the same shape.
        args = [jax.ShapeDtypeStruct(shape, dtype)]
        args += [jax.ShapeDtypeStruct(shape[:2], jnp.int32) for _ in others[1:]]
        named = {p.name: arg for p, arg in zip(others, args, strict=False)}
        yield Example.of(**named, **flags)


def _plausible_shapes(shapes: Mapping[str, Shape]) -> Iterator[tuple[Shape, Any]]:
    length = 8
    if any(path.endswith(EMBEDDING) for path in shapes):
        yield (1, length), jnp.int32
    kernels = [s for path, s in shapes.items() if path.endswith(KERNEL)]
    for kernel in kernels:
        if len(kernel) == 4:  # an image for the first convolution: [k, k, i, o]
            sides = {224, 32, 64, 28}
            for table in shapes.values():  # a learned position table tells the side
                tokens = table[-2] if len(table) in (2, 3) else 0
                sides |= {
                    math.isqrt(n) * kernel[0] for n in (tokens, tokens - 1) if n > 0
                }
            for side in sorted(sides, reverse=True):
                yield (1, side, side, kernel[2]), jnp.float32
    widths = dict.fromkeys(size for kernel in kernels for size in kernel)
    for width in widths:
        yield (1, length, width), jnp.float32
        yield (1, width), jnp.float32


def _describe(example: Example) -> str:
    return ", ".join(
        f"{jnp.dtype(leaf.dtype).name}{list(leaf.shape)}"
        for leaf in example.leaves
        if _is_array(leaf)
    )


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")
