"""How LoRA meets each type of Linen layer: one registry for all of `lora_jax.nn`.

A `Layer` says which weight of a module is adapted, what role its axes have, and what
the update is. The base layer itself is never rewritten: its output, whatever it does
about bias, padding or dtype, gets ``scaling * (x A) B`` added. So an adapter with
``B = 0`` is bit-equal to the base by construction.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lora_jax.array_types import AnyFloat
from lora_jax.config import LoRAConfig
from lora_jax.names import DROPOUT, EMBEDDING, FROZEN, KERNEL, PARAMS
from lora_jax.ops.contraction import DENSE, Contraction
from lora_jax.ops.conv import conv_contraction, conv_update
from lora_jax.ops.einsum import Equation, parse_equation
from lora_jax.ops.embed import attend_update, embed_update
from lora_jax.ops.init import init_adapter
from lora_jax.ops.product import low_rank_update
from lora_jax.tree.targets import LINEAR_KINDS as LINEAR_KINDS

CALL, ATTEND = "__call__", "attend"


class AlreadyAdaptedError(ValueError):
    """A model that has LoRA layers of its own."""


class Layer(NamedTuple):
    """What LoRA has to know about a type of layer.

    Attributes:
      kind: ``"dense"``, ``"einsum"``, ``"embed"`` or ``"conv"``.
      weight: name of the adapted parameter.
      methods: methods whose output gets the update.
      contraction: ``(module, x, *args) -> Contraction`` of the weight.
      update: ``(module, method, inputs, lora_a, lora_b, **options) -> array``.
      align: ``(module, inputs, per_output) -> array``: lays ``[*batch, *out]`` out for
        broadcasting over the output; by default it is left as it is, for layers whose
        output ends in ``[*out]``.
    """

    kind: str
    weight: str
    methods: tuple[str, ...]
    contraction: Callable[..., Contraction]
    update: Callable[..., AnyFloat]
    align: Callable[..., AnyFloat] = lambda module, inputs, per_output: per_output


def einsum_layer(
    kind: str, equation: Callable[..., str], weight: str = KERNEL
) -> Layer:
    """Makes the `Layer` of a module that is one einsum of its input and a kernel.

    Args:
      kind: name in the table of targets.
      equation: ``(module, x, *args) -> "...i,io->...o"``.
      weight: name of the kernel.

    Returns:
      The description.
    """

    def parse(module: nn.Module, x: jax.Array, *args: Any) -> Equation:
        return parse_equation(equation(module, x, *args), x.ndim)

    def update(module, method, inputs, lora_a, lora_b, *, dtype, **options) -> AnyFloat:
        del method
        parsed = parse(module, *inputs)
        options.setdefault("precision", getattr(module, "precision", None))
        x = inputs[0].astype(dtype)  # integers too, as Linen's layers take them
        return low_rank_update(parsed.down, parsed.up, x, lora_a, lora_b, **options)

    def contraction(*args) -> Contraction:
        return parse(*args).contraction

    def align(module, inputs, per_output) -> AnyFloat:
        parsed = parse(module, *inputs)
        roles = (*parsed.contraction.batch, *parsed.contraction.outputs)
        labels = [parsed.kernel[axis] for axis in roles]
        ordered = [labels.index(label) for label in parsed.out if label in labels]
        others = [i for i, label in enumerate(parsed.out) if label not in labels]
        return jnp.expand_dims(jnp.transpose(per_output, ordered), others)

    return Layer(kind, weight, (CALL,), contraction, update, align)


def register_layer(
    module_type: type[nn.Module],
    equation: str | Callable[..., str],
    *,
    weight: str = KERNEL,
    kind: str = "einsum",
) -> None:
    """Teaches LoRA a layer of your own: any module that is an einsum with a kernel.

    Args:
      module_type: the Linen class; its subclasses are covered too.
      equation: of its ``__call__``, ``"...i,io->...o"``, or a function
        ``(module, x, *args) -> equation``.
      weight: name of the kernel parameter.
      kind: name in the table of targets. ``"all-linear"`` covers ``"einsum"``; a layer
        of a kind of its own has to be named.

    Raises:
      TypeError: if ``module_type`` is not a Linen module class.

    Example:
      >>> class Transposed(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         w = self.param("w", nn.initializers.lecun_normal(), (4, x.shape[-1]))
      ...         return x @ w.T
      >>> register_layer(Transposed, "...i,oi->...o", weight="w")
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(
            f"module_type must be a Linen module class; got {module_type!r}."
        )
    as_function = equation if callable(equation) else lambda *_: equation
    _LAYERS[module_type] = einsum_layer(kind, as_function, weight)


def registered_layers() -> tuple[tuple[type[nn.Module], Layer], ...]:
    """Returns every layer that LoRA knows, with its type."""
    return tuple(_LAYERS.items())


def layer_of(module: nn.Module) -> Layer | None:
    """Returns the description of a module's type, or None if LoRA can't adapt it."""
    cls = _registered(module)
    return None if cls is None else _LAYERS[cls]


def layer_of_call(
    context: nn.module.InterceptorContext, *, native: bool = False
) -> Layer | None:
    """Returns the layer whose own method is being called, or None.

    A subclass that calls ``super().__call__`` is seen twice for one call: the layer's
    own method is the one that multiplies by the kernel. A subclass that does its own
    arithmetic is not that layer.

    Args:
      context: of the intercepted call.
      native: whether to look for LoRA twins, and for nothing else.

    Returns:
      The description, if ``context`` is a call of a registered class's method.

    Raises:
      AlreadyAdaptedError: if the layer is a twin, which adds its own update, and
        not looked for.
    """
    cls = _registered(context.module)
    name = context.method_name
    if cls is None or name not in _LAYERS[cls].methods:
        return None
    called = getattr(context.orig_method, "func", None)  # a partial of the method
    if called is not inspect.unwrap(getattr(cls, name)):
        return None
    is_twin = isinstance(getattr(context.module, "lora", None), LoRAConfig)
    if native:
        return _LAYERS[cls] if is_twin else None
    if is_twin:
        path = "/".join(context.module.path)
        raise AlreadyAdaptedError(
            f"the model has LoRA layers of its own, {path!r} for one; use it as it is, "
            "without `adapt`."
        )
    return _LAYERS[cls]


def call_inputs(
    method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Returns the arguments of a call of ``method`` in order, however passed."""
    return inspect.signature(method).bind(*args, **kwargs).args


def _registered(module: nn.Module) -> type[nn.Module] | None:
    if getattr(module, "mask", None) is not None and isinstance(module, nn.Conv):
        return None  # a masked kernel is not the kernel the tree holds
    return next((cls for cls in type(module).__mro__ if cls in _LAYERS), None)


def adapter_update(
    module: nn.Module,
    method: str,
    inputs: tuple[Any, ...],
    lora_a: AnyFloat,
    lora_b: AnyFloat,
    *,
    config: LoRAConfig,
    path: str,
    deterministic: bool,
    dtype: DTypeLike,
) -> AnyFloat:
    """Computes what the adapter at ``path`` adds to the output of ``module``.

    Args:
      module: a bound layer whose type is registered.
      method: the method that was called.
      inputs: its arguments.
      lora_a: A of this layer.
      lora_b: B of this layer.
      config: gives scaling and dropout rate.
      path: of the layer, as the config's patterns see it.
      deterministic: switches dropout off; no PRNG key is needed then.
      dtype: of the base layer's output, and so of the update.

    Returns:
      ``scaling * (dropout(x) A) B``.
    """
    layer = layer_of(module)
    assert layer is not None, path
    rate = 0.0 if deterministic else config.dropout_rate
    if rate and not (module.has_rng(DROPOUT) or module.has_rng(PARAMS)):
        raise ValueError(
            f"rngs must have {DROPOUT!r} for dropout_rate={rate} of the adapter at "
            f"{path!r}; got none there. Pass `rngs={{{DROPOUT!r}: key}}` or "
            f"`deterministic=True`; nn.scan and nn.vmap need split_rngs={{{DROPOUT!r}: "
            "True}."
        )
    return layer.update(
        module,
        method,
        inputs,
        lora_a,
        lora_b,
        scaling=config.scaling_for(path),
        dropout_rate=rate,
        dropout_key=module.make_rng(DROPOUT) if rate else None,
        dtype=dtype,
    )


def init_factors(
    module: nn.Module, inputs: tuple[Any, ...], config: LoRAConfig, path: str
) -> tuple[AnyFloat, AnyFloat]:
    """Draws A and zeroes B for a bound layer, from its own ``params`` stream.

    Args:
      module: a bound layer whose type is registered and whose weight exists.
      inputs: the arguments of its call.
      config: gives rank and distribution.
      path: of the layer, as the config's patterns see it.

    Returns:
      ``lora_a`` and ``lora_b``.
    """
    layer = layer_of(module)
    assert layer is not None, path
    return init_adapter(
        module.make_rng(PARAMS),
        base_weight(module, layer.weight).shape,
        config.rank_for(path),
        contraction=layer.contraction(module, *inputs),
        init=config.init,
        one_hot=layer.kind == "embed",
    )


def base_weight(module: nn.Module, name: str) -> Any:
    """Returns a base weight of a bound layer, trained or frozen, or None."""
    assert module.scope is not None
    values = (module.scope.get_variable(c, name) for c in (PARAMS, FROZEN))
    return nn.meta.unbox(next((value for value in values if value is not None), None))


def _dense_general_equation(module: nn.DenseGeneral, x: jax.Array, *_: Any) -> str:
    def axes(value) -> list[int]:
        values = value if isinstance(value, (tuple, list)) else (value,)
        return sorted(axis % x.ndim for axis in values)

    features = module.features
    new = len(features) if isinstance(features, (tuple, list)) else 1
    x_labels = "abcdefghijklm"[: x.ndim]
    out_labels = "nopqstuvwxyz"[:new]
    contracted, batch = axes(module.axis), axes(module.batch_dims)
    free = [i for i in range(x.ndim) if i not in contracted and i not in batch]

    def pick(indices: list[int]) -> str:
        return "".join(x_labels[i] for i in indices)

    kernel = pick(batch) + pick(contracted) + out_labels
    return f"{x_labels},{kernel}->{pick(batch)}{pick(free)}{out_labels}"


def _einsum_equation(module: nn.Einsum, x: jax.Array, *args: Any) -> str:
    del x
    equation = args[0] if args and args[0] is not None else module.einsum_str
    return str(equation)


def _embed_update(module, method, inputs, lora_a, lora_b, **options):
    if method == ATTEND:
        return attend_update(inputs[0], lora_a, lora_b, **options)
    for name in ("dropout_rate", "dropout_key"):
        options.pop(name, None)  # a lookup's input is one-hot: nothing to drop
    return embed_update(inputs[0], lora_a, lora_b, **options)


def _window(module: nn.Conv) -> dict[str, Any]:
    return {
        "strides": module.strides,
        "padding": module.padding,
        "input_dilation": module.input_dilation,
        "kernel_dilation": module.kernel_dilation,
        "groups": module.feature_group_count,
        "precision": module.precision,
    }


def _conv_contraction(module: nn.Conv, *_: Any) -> Contraction:
    size = module.kernel_size
    spatial = 1 if isinstance(size, int) else len(size)
    return conv_contraction(spatial, module.feature_group_count)


def _conv_update(module, method, inputs, lora_a, lora_b, *, dtype, **options):
    del method
    x = inputs[0].astype(dtype)
    return conv_update(x, lora_a, lora_b, **_window(module), **options)


_LAYERS: dict[type[nn.Module], Layer] = {
    nn.Dense: einsum_layer("dense", lambda *_: "...i,io->...o"),
    nn.DenseGeneral: einsum_layer("dense", _dense_general_equation),
    nn.Einsum: einsum_layer("einsum", _einsum_equation),
    nn.Embed: Layer(
        "embed", EMBEDDING, (CALL, ATTEND), lambda *_: DENSE, _embed_update
    ),
    nn.Conv: Layer("conv", KERNEL, (CALL,), _conv_contraction, _conv_update),
}
