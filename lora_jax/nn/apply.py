"""The adapter of one layer: its factors made, its op applied to one call.

`LoRADense` and its kin, and every layer of an `adapt`-ed model, come through
`apply_adapter`; the arithmetic is that of the public ops.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from lora_jax.array_types import AnyFloat
from lora_jax.config import LoRAConfig
from lora_jax.names import BIAS, DROPOUT, FROZEN, PARAMS
from lora_jax.nn.layer_rules import ATTEND, LayerRule, registered_type, rule_of
from lora_jax.ops.dora import column_norm
from lora_jax.ops.embed import dora_query
from lora_jax.ops.init import init_adapter


class Factors(NamedTuple):
    """What is trained of one layer.

    Attributes:
      lora_a: ``A`` ``[*batch, *in, r]``.
      lora_b: ``B`` ``[*batch, r, *out]``.
      magnitude: DoRA's ``m`` ``[*batch, *out]``, or None.
    """

    lora_a: AnyFloat
    lora_b: AnyFloat
    magnitude: AnyFloat | None = None


class AlreadyAdaptedError(ValueError):
    """A model that has LoRA layers of its own."""


def rule_of_call(
    context: nn.module.InterceptorContext, *, lora_layers_only: bool = False
) -> LayerRule | None:
    """Returns the rule of the layer whose own method is being called, or None.

    A subclass that calls ``super().__call__`` is seen twice for one call: the layer's
    own method is the one that multiplies by the kernel. A subclass that does its own
    arithmetic is not that layer.

    Args:
      context: of the intercepted call.
      lora_layers_only: whether to look for LoRA layers, and for nothing else.

    Returns:
      The rule, if ``context`` is a call of a registered class's method.

    Raises:
      AlreadyAdaptedError: if the layer is a LoRA layer, which applies its own adapter,
        and these are not looked for.
    """
    cls, rule = registered_type(context.module), rule_of(context.module)
    if cls is None or rule is None or context.method_name not in rule.methods:
        return None
    called = getattr(context.orig_method, "func", None)  # a partial of the method
    if called is not inspect.unwrap(getattr(cls, context.method_name)):
        return None
    is_lora_layer = isinstance(getattr(context.module, "lora", None), LoRAConfig)
    if lora_layers_only:
        return rule if is_lora_layer else None
    if is_lora_layer:
        path = "/".join(context.module.path)
        raise AlreadyAdaptedError(
            f"the model has LoRA layers of its own, {path!r} for one; use it as it is, "
            "without `adapt`."
        )
    return rule


def call_inputs(
    method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Returns the arguments of a call of ``method`` in order, however passed."""
    return inspect.signature(method).bind(*args, **kwargs).args


def base_weight(module: nn.Module, name: str) -> Any:
    """Returns a base weight of a bound layer, trained or frozen, or None."""
    assert module.scope is not None
    values = (module.scope.get_variable(c, name) for c in (PARAMS, FROZEN))
    return nn.meta.unbox(next((value for value in values if value is not None), None))


def init_factors(
    module: nn.Module, inputs: tuple[Any, ...], config: LoRAConfig, path: str
) -> Factors:
    """Draws A and zeroes B for a bound layer, from its own ``params`` stream.

    Args:
      module: a bound layer whose type is registered and whose weight exists.
      inputs: the arguments of its call.
      config: gives rank and distribution, and says whether there is a magnitude.
      path: of the layer, as the config's patterns see it.

    Returns:
      ``lora_a``, ``lora_b`` and, with DoRA, ``magnitude``: the kernel's column norms.
    """
    rule = rule_of(module)
    assert rule is not None, path
    kernel = base_weight(module, rule.weight)
    contraction = rule.contraction(module, *inputs)
    a, b = init_adapter(
        module.make_rng(PARAMS),
        kernel.shape,
        config.rank_for(path),
        contraction=contraction,
        init=config.init,
        one_hot=rule.kind == "embed",
    )
    return Factors(
        a, b, column_norm(jnp.asarray(kernel), contraction) if config.dora else None
    )


def adapted_query(
    module: nn.Module, query: AnyFloat, factors: Factors, scaling: float
) -> AnyFloat:
    """Returns what a tied head's ``attend`` is to be called with: scaled, with DoRA.

    Args:
      module: a bound embedding.
      query: ``[*b, d]``.
      factors: of this layer.
      scaling: ``alpha / rank``.

    Returns:
      The query for the base layer and for `apply_adapter` alike.
    """
    a, b, magnitude = factors
    rule = rule_of(module)
    if magnitude is None or rule is None:
        return query
    table = jnp.asarray(base_weight(module, rule.weight))
    return dora_query(query, table, a, b, magnitude, scaling=scaling)


def apply_adapter(
    module: nn.Module,
    method: str,
    inputs: tuple[Any, ...],
    y: AnyFloat,
    factors: Factors,
    *,
    config: LoRAConfig,
    path: str,
    deterministic: bool,
) -> AnyFloat:
    """Applies the adapter at ``path`` to one call of ``module``.

    Args:
      module: a bound layer whose type is registered.
      method: the method that was called.
      inputs: its arguments; of ``attend``, with `adapted_query`.
      y: the output of the frozen layer; sets the dtype of the result.
      factors: what is trained of this layer.
      config: gives scaling and dropout rate.
      path: of the layer, as the config's patterns see it.
      deterministic: switches dropout off; no PRNG key is needed then.

    Returns:
      The output of the adapted layer.
    """
    rule = rule_of(module)
    assert rule is not None, path
    options: dict[str, Any] = {"scaling": config.scaling_for(path)}
    if not deterministic and config.dropout_rate:
        rate = config.dropout_rate
        what = f"dropout_rate={rate} of the adapter at {path!r}"
        options |= {"dropout_rate": rate, "dropout_key": dropout_key(module, what)}
    if factors.magnitude is not None and method != ATTEND:  # there the query is scaled
        options["magnitude"] = factors.magnitude
        if (bias := base_weight(module, BIAS)) is not None:
            options["bias"] = bias
    kernel = jnp.asarray(base_weight(module, rule.weight))
    return rule.apply(module, method, inputs, y, kernel, *factors[:2], **options)


def dropout_key(module: nn.Module, what: str) -> Any:
    """Returns a key of a module's dropout stream; says what needs it if there is none.

    Args:
      module: bound.
      what: needs the key, for the error.

    Returns:
      The key.

    Raises:
      ValueError: if the module was given no key.
    """
    if not (module.has_rng(DROPOUT) or module.has_rng(PARAMS)):
        raise ValueError(
            f"rngs must have {DROPOUT!r} for {what}; got none. Pass "
            f"`rngs={{{DROPOUT!r}: key}}` or `deterministic=True`; nn.scan and nn.vmap "
            f"need split_rngs={{{DROPOUT!r}: True}}."
        )
    return module.make_rng(DROPOUT)
