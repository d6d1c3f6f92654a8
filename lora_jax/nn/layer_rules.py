"""How LoRA applies to each type of Linen layer: the registry for `lora_jax.nn`.

A `LayerRule` defines which weight of a module is adapted, the roles of its axes, and
the op that applies the adapter. The base layer itself is never reimplemented: its
output, with its own bias, padding and dtype handling, is passed to the op. An adapter
with ``B = 0`` is therefore bitwise equal to the base.
"""

import math
import re
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
from lora_jax.ops.experts import EXPERTS, lora_experts

# Rows of experts: the label of the experts is in the kernel alone.
_SORTED_ROWS = re.compile(r"(\w)(\w),\w(?:\2(\w)|(\w)\2)->\1(?:\3|\4)")
EXPERTS_KIND = "experts"
CALL, ATTEND = "__call__", "attend"


class LayerRule(NamedTuple):
    """How to adapt one type of layer.

    Attributes:
      kind: ``"dense"``, ``"einsum"``, ``"experts"``, ``"embed"`` or ``"conv"``.
      weight: name of the adapted parameter.
      methods: methods whose output is adapted.
      contraction: ``(module, x, *args) -> Contraction`` of the weight.
      apply: ``(module, method, inputs, y, kernel, lora_a, lora_b, **options) -> y'``:
        calls the op with the base's output ``y`` and the op's options.
    """

    kind: str
    weight: str
    methods: tuple[str, ...]
    contraction: Callable[..., Contraction]
    apply: Callable[..., AnyFloat]


def einsum_rule(
    kind: str, equation: Callable[..., str], weight: str = KERNEL
) -> LayerRule:
    """Makes the `LayerRule` of a module that computes an einsum with a kernel.

    Args:
      kind: name in the table of targets.
      equation: ``(module, x, *args) -> "...i,io->...o"``.
      weight: name of the kernel.
    """

    def contraction(module: nn.Module, x: jax.Array, *args: Any) -> Contraction:
        return parse_equation(equation(module, x, *args), x.ndim).contraction

    def apply(module, method, inputs, y, kernel, lora_a, lora_b, **options) -> AnyFloat:
        del method
        options.setdefault("precision", getattr(module, "precision", None))
        x = inputs[0].astype(y.dtype)  # Linen's layers also accept integers
        labels = equation(module, *inputs)
        x, folded = _fold(labels, x, y, kernel)
        factors = (lora_a, lora_b)
        y_new = lora_einsum(labels, x, kernel, *factors, base_output=folded, **options)
        return y_new.reshape(y.shape)

    return LayerRule(kind, weight, (CALL,), contraction, apply)


def experts_rule(
    kind: str, weight: str = KERNEL, *, is_transposed: bool = False
) -> LayerRule:
    """Makes the `LayerRule` of a module that multiplies rows sorted by expert.

    Args:
      kind: name in the table of targets.
      weight: name of the kernel ``[e, i, o]``.
      is_transposed: whether the kernel is ``[e, o, i]``.

    Returns:
      The rule for calls ``(x, sizes)``, as `lora_experts` takes them.
    """

    def apply(module, method, inputs, y, kernel, lora_a, lora_b, **options) -> AnyFloat:
        del method
        options.setdefault("precision", getattr(module, "precision", None))
        x, sizes = inputs[0].astype(y.dtype), inputs[1]
        kernel = kernel.swapaxes(1, 2) if is_transposed else kernel
        factors = (kernel, lora_a, lora_b)
        return lora_experts(x, *factors, sizes, base_output=y, **options)

    roles = EXPERTS
    if is_transposed:
        roles = roles._replace(inputs=roles.outputs, outputs=roles.inputs)
    return LayerRule(kind, weight, (CALL,), lambda *_: roles, apply)


def register_layer(
    module_type: type[nn.Module],
    equation: str | Callable[..., str],
    *,
    weight: str = KERNEL,
    kind: str | None = None,
) -> None:
    """Makes a custom layer adaptable: any module that computes an einsum with a kernel.

    Args:
      module_type: the Linen class; its subclasses are covered too.
      equation: einsum of its ``__call__``, ``"...i,io->...o"``, or a function
        ``(module, x, *args) -> equation``. If a 2-D kernel merges several axes of the
        input or output (heads times features, as in T5X), give the equation of the
        reshaped arrays. ``"mi,eio->mo"``, where the experts' label is in the kernel
        alone, is a layer called with rows sorted by expert and the number of each
        expert's rows, as `lora_experts` takes them; ``"mi,eoi->mo"`` is one whose
        kernels are stored transposed. With a label of experts in all three
        (``"ebi,eio->ebo"``) each expert has its own A and B too.
      weight: name of the kernel parameter.
      kind: name in the table of targets; "einsum" by default, or "experts" for sorted
        rows. ``"all-linear"`` covers both; layers of a new kind must be named in the
        config.

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
    if (of_rows := sorted_rows_rule(equation, weight, kind)) is not None:
        _RULES[module_type] = of_rows
        return
    as_function = equation if callable(equation) else lambda *_: equation
    _RULES[module_type] = einsum_rule(kind or "einsum", as_function, weight)


def sorted_rows_rule(
    equation: str | Callable[..., str], weight: str, kind: str | None
) -> LayerRule | None:
    """Returns the rule of a layer of experts; None if it is not ``"mi,eio->mo"``.

    Args:
      equation: as for `register_layer`.
      weight: name of the kernel.
      kind: name in the table of targets; ``"experts"`` by default.
    """
    if not isinstance(equation, str):
        return None
    parsed = _SORTED_ROWS.fullmatch(equation.replace(" ", ""))
    if parsed is None:
        return None
    is_transposed = parsed[4] is not None
    return experts_rule(kind or EXPERTS_KIND, weight, is_transposed=is_transposed)


def _fold(
    equation: str, x: AnyFloat, y: AnyFloat, kernel: AnyFloat
) -> tuple[AnyFloat, AnyFloat]:
    """Merges trailing axes of input and output that a 2-D kernel merges (T5X)."""
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
    """Returns every registered layer type with its rule."""
    return tuple(_RULES.items())


def registered_type(module: nn.Module) -> type[nn.Module] | None:
    """Returns the registered class of a module, or None."""
    if getattr(module, "mask", None) is not None and isinstance(module, nn.Conv):
        return None  # a masked kernel differs from the one in the tree
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


def dense_general_equation(module: Any, x: jax.Array, *_: Any) -> str:
    """Returns the einsum of a `flax.linen.DenseGeneral` for an input ``x``."""

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


def _einsum_equation(
    module: nn.Einsum, x: jax.Array, equation: str | None = None, *_: Any
) -> str:
    del x
    return str(module.einsum_str if equation is None else equation)


def _embed(module, method, inputs, y, table, lora_a, lora_b, **options) -> AnyFloat:
    del module
    if method == ATTEND:
        query = inputs[0].astype(y.dtype)
        return lora_attend(query, table, lora_a, lora_b, base_output=y, **options)
    for name in ("dropout_rate", "dropout_key"):
        options.pop(name, None)  # no dropout: the input is one-hot
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
    nn.DenseGeneral: einsum_rule("dense", dense_general_equation),
    nn.Einsum: einsum_rule("einsum", _einsum_equation),
    nn.Embed: LayerRule("embed", EMBEDDING, (CALL, ATTEND), lambda *_: DENSE, _embed),
    nn.Conv: LayerRule("conv", KERNEL, (CALL,), _conv_contraction, _conv),
}
