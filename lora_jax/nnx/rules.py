"""How LoRA applies to each type of NNX layer: the registry for `lora_jax.nnx`.

A flax layer has the rule of its Linen counterpart: the ops, and what is passed to them,
are the same. Layers of tunix, MaxText and Bonsai are recognised by their attributes, so
none of these libraries is imported.
"""

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lora_jax.array_types import AnyFloat
from lora_jax.names import EMBEDDING, KERNEL
from lora_jax.nn.layer_rules import (
    ATTEND,
    CALL,
    dense_general_equation,
    einsum_rule,
    registered_rules,
    sorted_rows_rule,
)
from lora_jax.ops.contraction import DENSE, Contraction, Shape
from lora_jax.ops.einsum import parse_equation
from lora_jax.ops.embed import lora_embed

ENCODE, DECODE = "encode", "decode"  # of tunix's Embedder: lookup and tied head
HEAD_METHODS = (ATTEND, DECODE)


class Rule(NamedTuple):
    """How to adapt one type of layer.

    Attributes:
      kind: ``"dense"``, ``"einsum"``, ``"embed"`` or ``"conv"``.
      weight: name of the adapted `flax.nnx.Param`.
      methods: methods whose output is adapted.
      contraction: ``module -> Contraction`` of the weight, without stacked axes.
      apply: as in `lora_jax.nn.layer_rules.LayerRule`.
      shape: ``module ->`` the weight's shape as the module declares it, or None.
      equation: ``module ->`` the einsum of a call, or None.
      is_guess: whether it holds only for modules that are seen to compute it.
    """

    kind: str
    weight: str
    methods: tuple[str, ...]
    contraction: Callable[[Any], Contraction]
    apply: Callable[..., AnyFloat]
    shape: Callable[[Any], Shape | None] = lambda module: None
    equation: Callable[[Any], str] | None = None
    is_guess: bool = False


def register_layer(
    module_type: type[nnx.Module],
    equation: str | Callable[..., str],
    *,
    weight: str = KERNEL,
    kind: str | None = None,
) -> None:
    """Makes a custom layer adaptable: any module that computes an einsum with a weight.

    `adapt` refuses a layer whose equation does not reproduce its output.

    Args:
      module_type: the NNX class; its subclasses are covered too.
      equation: einsum of its ``__call__``, ``"...i,io->...o"``, or a function
        ``module -> equation``. ``"mi,eio->mo"``, where the experts' label is in the
        weight alone, is a layer called with rows sorted by expert and the number of
        each expert's rows, as `lora_jax.lora_experts` takes them; ``"mi,eoi->mo"`` is
        one whose weights are stored transposed. With a label of experts in all three
        (``"ebi,eio->ebo"``) each expert has its own A and B too.
      weight: name of the weight, a `flax.nnx.Param`.
      kind: name in the table of targets; "einsum" by default, or "experts" for sorted
        rows. ``"all-linear"`` covers both; layers of a new kind must be named in the
        config.

    Raises:
      TypeError: if ``module_type`` is not an NNX module class.

    Example:
      >>> class Transposed(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.w = nnx.Param(jax.random.normal(rngs.params(), (4, 3)))
      ...     def __call__(self, x):
      ...         return x @ self.w.T
      >>> register_layer(Transposed, "...i,oi->...o", weight="w")
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nnx.Module)):
        raise TypeError(
            f"module_type must be an NNX module class; got {module_type!r}."
        )
    if (linen := sorted_rows_rule(equation, weight, kind)) is not None:
        _RULES[module_type] = Rule(*linen)
        return
    as_function = equation if callable(equation) else lambda module: equation
    _RULES[module_type] = _einsum(kind or "einsum", as_function, weight)


def rule_of(cls: type, module: Any) -> tuple[type, Rule] | None:
    """Returns the rule of a module, and the class it is made for.

    Args:
      cls: the module's class.
      module: the module.

    Returns:
      The class and the rule; None if LoRA can't adapt the module. A subclass that
      replaces the arithmetic of a method, instead of calling ``super``, has no rule but
      a guess.
    """
    if isinstance(module, nnx.Conv) and module.mask is not None:
        return None  # a masked kernel differs from the stored one
    for known in cls.__mro__:
        rule = _RULES.get(known)
        if rule is not None:
            if all(_calls_super(cls, known, name) for name in rule.methods):
                return known, rule
            break
    rule = next((rule for is_like, rule in _LIKE if is_like(module)), None)
    return None if rule is None else (cls, rule)


def _calls_super(cls: type, known: type, name: str) -> bool:
    """Returns whether overrides of a method between two classes call ``super``."""
    for sub in cls.__mro__[: cls.__mro__.index(known)]:
        function = vars(sub).get(name)
        code = getattr(function and inspect.unwrap(function), "__code__", None)
        if function and "super" not in getattr(code, "co_names", ()):
            return False
    return True


def _einsum(
    kind: str,
    equation: Callable[[Any], str],
    weight: str,
    shape: Callable[[Any], Shape | None] = lambda module: None,
) -> Rule:
    def contraction(module: Any) -> Contraction:
        labels = equation(module).replace(" ", "")
        named = labels.partition(",")[0].replace("...", "")
        return parse_equation(labels, len(named)).contraction

    rule = einsum_rule(kind, lambda module, *_: equation(module), weight)
    return Rule(kind, weight, (CALL,), contraction, rule.apply, shape, equation)


def _general(
    fields: Callable[[Any], tuple[tuple[int, ...], ...]], axes: Callable[[Any], Any]
) -> Rule:
    """Makes the rule of a ``DenseGeneral``, whose equation needs the input's rank."""

    def equation(module: Any, x: jax.Array, *_: Any) -> str:
        outputs = fields(module)[2]
        axis, batch_axes = axes(module)
        as_linen = SimpleNamespace(features=outputs, axis=axis, batch_dims=batch_axes)
        return dense_general_equation(as_linen, x)

    def contraction(module: Any) -> Contraction:
        batch, inputs, outputs = map(len, fields(module))
        ends = np.cumsum([0, batch, inputs, outputs]).tolist()
        b, i, o = (tuple(range(*ends[part : part + 2])) for part in range(3))
        return Contraction(b, i, o)

    rule = einsum_rule("dense", equation)
    return Rule(
        *("dense", KERNEL, (CALL,), contraction, rule.apply),
        shape=lambda module: tuple(np.concatenate(fields(module)).astype(int).tolist()),
    )


def _embedder(module, method, inputs, y, table, lora_a, lora_b, **options) -> AnyFloat:
    """Adapts a lookup that may scale, cast or shard its rows, and the tied head.

    The lookup is the module's own, in a table of the adapted rows.
    """
    if method == DECODE:
        attend = _LINEN[nn.Embed].apply
        return attend(module, ATTEND, inputs, y, table, lora_a, lora_b, **options)
    ids = jnp.asarray(inputs[0])
    options = {k: v for k, v in options.items() if not k.startswith("dropout")}
    rows = lora_embed(ids, table, lora_a, lora_b, **options)
    of_rows = object.__new__(type(module))
    weight = nnx.Param(rows.reshape(-1, rows.shape[-1]))
    vars(of_rows).update(vars(module), input_embedding=weight, lora=None)
    return of_rows.encode(jnp.arange(ids.size).reshape(ids.shape))


def _has(*names: str) -> Callable[[Any], bool]:
    return lambda module: all(hasattr(module, name) for name in names)


_LINEN = dict(registered_rules())
_RULES: dict[type, Rule] = {
    nnx.Linear: Rule(*_LINEN[nn.Dense], lambda m: (m.in_features, m.out_features)),
    nnx.LinearGeneral: _general(
        lambda m: (tuple(m.batch_axis.values()), m.in_features, m.out_features),
        lambda m: (m.axis, tuple(m.batch_axis)),
    ),
    nnx.Einsum: _einsum(
        "einsum", lambda m: m.einsum_str, KERNEL, lambda m: tuple(m.kernel_shape)
    )._replace(apply=_LINEN[nn.Einsum].apply),
    nnx.Embed: Rule(*_LINEN[nn.Embed], lambda m: (m.num_embeddings, m.features)),
    nnx.Conv: Rule(*_LINEN[nn.Conv], lambda m: tuple(m.kernel_shape)),
}
# Layers of other libraries, by their attributes: tunix's Einsum and Embedder, MaxText's
# DenseGeneral, Bonsai's ShardedLinear and ShardedEmbedding.
_LIKE: tuple[tuple[Callable[[Any], bool], Rule], ...] = (
    (
        lambda m: _has("einsum_str", "w")(m) and getattr(m, "w_scale", None) is None,
        _einsum(
            "einsum", lambda m: m.einsum_str, "w", lambda m: getattr(m, "shape", None)
        ),
    ),
    (
        _has("input_embedding", ENCODE, DECODE),
        Rule("embed", "input_embedding", (ENCODE, DECODE), lambda m: DENSE, _embedder),
    ),
    (
        _has("in_features_shape", "out_features_shape", "axis", KERNEL),
        _general(
            lambda m: ((), _tuple(m.in_features_shape), _tuple(m.out_features_shape)),
            lambda m: (m.axis, ()),
        ),
    ),
    (
        lambda m: _is_matrix(m, KERNEL),
        _einsum("dense", lambda m: "...i,io->...o", KERNEL)._replace(is_guess=True),
    ),
    (
        lambda m: _is_matrix(m, EMBEDDING) and hasattr(m, ATTEND),
        Rule(*_LINEN[nn.Embed], is_guess=True),
    ),
)


def _is_matrix(module: Any, name: str) -> bool:
    weight = getattr(module, name, None)
    return isinstance(weight, nnx.Param) and len(getattr(weight, "shape", ())) == 2


def _tuple(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)
