"""How LoRA meets each type of Linen layer: one registry for all of `lora_jax.nn`.

A `LayerRule` says which weight of a module is adapted, what role its axes have, and
which op applies the adapter. The base layer itself is never rewritten: its output,
whatever it does about bias, padding or dtype, is handed to the op. So an adapter with
``B = 0`` is bit-equal to the base by construction.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from lora_jax.array_types import AnyFloat
from lora_jax.names import EMBEDDING, KERNEL
from lora_jax.ops.contraction import DENSE, Contraction
from lora_jax.ops.conv import conv_contraction, lora_conv
from lora_jax.ops.dense import lora_dense
from lora_jax.ops.einsum import lora_einsum, parse_equation
from lora_jax.ops.embed import lora_attend, lora_embed

CALL, ATTEND = "__call__", "attend"


class LayerRule(NamedTuple):
    """What LoRA has to know about a type of layer.

    Attributes:
      kind: ``"dense"``, ``"einsum"``, ``"embed"`` or ``"conv"``.
      weight: name of the adapted parameter.
      methods: methods whose output is adapted.
      contraction: ``(module, x, *args) -> Contraction`` of the weight.
      apply: ``(module, method, inputs, y, kernel, lora_a, lora_b, **options) -> y'``:
        calls the op with the base's output ``y``; the options are the op's.
    """

    kind: str
    weight: str
    methods: tuple[str, ...]
    contraction: Callable[..., Contraction]
    apply: Callable[..., AnyFloat]


def einsum_rule(
    kind: str, equation: Callable[..., str], weight: str = KERNEL
) -> LayerRule:
    """Makes the `LayerRule` of a module that is one einsum of its input and a kernel.

    Args:
      kind: name in the table of targets.
      equation: ``(module, x, *args) -> "...i,io->...o"``.
      weight: name of the kernel.

    Returns:
      The rule.
    """

    def contraction(module: nn.Module, x: jax.Array, *args: Any) -> Contraction:
        return parse_equation(equation(module, x, *args), x.ndim).contraction

    def apply(module, method, inputs, y, kernel, lora_a, lora_b, **options) -> AnyFloat:
        del method
        options.setdefault("precision", getattr(module, "precision", None))
        x = inputs[0].astype(y.dtype)  # integers too, as Linen's layers take them
        labels = equation(module, *inputs)
        x, folded = _fold(labels, x, y, kernel)
        factors = (lora_a, lora_b)
        y_new = lora_einsum(labels, x, kernel, *factors, base_output=folded, **options)
        return y_new.reshape(y.shape)

    return LayerRule(kind, weight, (CALL,), contraction, apply)


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
        ``(module, x, *args) -> equation``. Where a kernel of two axes has several axes
        of the input or the output in one (heads times features, as in T5X), the
        equation is that of the folded arrays.
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
    _RULES[module_type] = einsum_rule(kind, as_function, weight)


def _fold(
    equation: str, x: AnyFloat, y: AnyFloat, kernel: AnyFloat
) -> tuple[AnyFloat, AnyFloat]:
    """Folds the last axes of input and output that a 2-D kernel has as one (T5X)."""
    if kernel.ndim != 2 or not equation.replace(" ", "").startswith("..."):
        return x, y
    roles = parse_equation(equation, x.ndim).contraction
    sizes = kernel.shape[roles.inputs[0]], kernel.shape[roles.outputs[0]]

    def fold(array: AnyFloat, size: int) -> AnyFloat:
        for axis in range(array.ndim - 1, -1, -1):
            if math.prod(array.shape[axis:]) == size:
                return array.reshape(*array.shape[:axis], size)
        return array

    return fold(x, sizes[0]), fold(y, sizes[1])


def registered_rules() -> tuple[tuple[type[nn.Module], LayerRule], ...]:
    """Returns the rule of every layer that LoRA knows, with its type."""
    return tuple(_RULES.items())


def registered_type(module: nn.Module) -> type[nn.Module] | None:
    """Returns the registered class that a module is of, or None."""
    if getattr(module, "mask", None) is not None and isinstance(module, nn.Conv):
        return None  # a masked kernel is not the kernel the tree holds
    return next((cls for cls in type(module).__mro__ if cls in _RULES), None)


def rule_of(module: nn.Module) -> LayerRule | None:
    """Returns the rule of a module's type, or None if LoRA can't adapt it."""
    cls = registered_type(module)
    return None if cls is None else _RULES[cls]


def _dense(module, method, inputs, y, kernel, lora_a, lora_b, **options) -> AnyFloat:
    del method
    options.setdefault("precision", module.precision)
    x = inputs[0].astype(y.dtype)
    return lora_dense(x, kernel, lora_a, lora_b, base_output=y, **options)


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


def _embed(module, method, inputs, y, table, lora_a, lora_b, **options) -> AnyFloat:
    del module
    if method == ATTEND:
        query = inputs[0].astype(y.dtype)
        return lora_attend(query, table, lora_a, lora_b, base_output=y, **options)
    for name in ("dropout_rate", "dropout_key"):
        options.pop(name, None)  # a lookup's input is one-hot: nothing to drop
    return lora_embed(inputs[0], table, lora_a, lora_b, base_output=y, **options)


def _conv_contraction(module: nn.Conv, *_: Any) -> Contraction:
    size = module.kernel_size
    spatial = 1 if isinstance(size, int) else len(size)
    return conv_contraction(spatial, module.feature_group_count)


def _conv(module, method, inputs, y, kernel, lora_a, lora_b, **options) -> AnyFloat:
    del method
    return lora_conv(
        inputs[0].astype(y.dtype),
        kernel,
        lora_a,
        lora_b,
        base_output=y,
        strides=module.strides,
        padding=module.padding,
        input_dilation=module.input_dilation,
        kernel_dilation=module.kernel_dilation,
        groups=module.feature_group_count,
        precision=module.precision,
        **options,
    )


_RULES: dict[type[nn.Module], LayerRule] = {
    nn.Dense: LayerRule("dense", KERNEL, (CALL,), lambda *_: DENSE, _dense),
    nn.DenseGeneral: einsum_rule("dense", _dense_general_equation),
    nn.Einsum: einsum_rule("einsum", _einsum_equation),
    nn.Embed: LayerRule("embed", EMBEDDING, (CALL, ATTEND), lambda *_: DENSE, _embed),
    nn.Conv: LayerRule("conv", KERNEL, (CALL,), _conv_contraction, _conv),
}
