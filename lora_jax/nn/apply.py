"""The adapter of one layer: initialising its factors and applying its op.

The LoRA layers and every layer of an `adapt`-ed model call `apply_adapter`, which runs
the public ops.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from lora_jax.array_types import AnyFloat, KeepKey
from lora_jax.config import LoRAConfig
from lora_jax.names import BIAS, DROPOUT, FROZEN, KEEP, PARAMS
from lora_jax.nn.layer_rules import ATTEND, LayerRule, registered_type, rule_of
from lora_jax.ops.dora import column_norm
from lora_jax.ops.embed import dora_query
from lora_jax.ops.factors import Factors
from lora_jax.ops.start import init_factors as draw_factors


class AlreadyAdaptedError(ValueError):
    """Raised for a model that already has LoRA layers."""


def rule_of_call(
    context: nn.module.InterceptorContext, *, lora_layers_only: bool = False
) -> LayerRule | None:
    """Returns the rule of the registered layer whose own method is called, or None.

    A subclass that calls ``super().__call__`` is intercepted twice per call; only the
    registered class's own method multiplies by the kernel. A subclass that overrides
    the arithmetic does not match.

    Args:
      context: context of the intercepted call.
      lora_layers_only: whether to match only LoRA layers.

    Raises:
      AlreadyAdaptedError: if the layer is a LoRA layer and ``lora_layers_only`` is
        False.
    """
    cls, rule = registered_type(context.module), rule_of(context.module)
    if cls is None or rule is None or context.method_name not in rule.methods:
        return None
    called = getattr(context.orig_method, "func", None)  # orig_method is a partial
    if called is not inspect.unwrap(getattr(cls, context.method_name)):
        return None
    is_lora_layer = isinstance(getattr(context.module, "lora", None), LoRAConfig)
    if lora_layers_only:
        return rule if is_lora_layer else None
    if is_lora_layer:
        path = "/".join(context.module.path)
        raise AlreadyAdaptedError(
            f"the model already has LoRA layers, such as {path!r}; use it without "
            "`adapt`."
        )
    return rule


def call_inputs(
    method: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Returns the arguments of a call of ``method`` as positional arguments."""
    return inspect.signature(method).bind(*args, **kwargs).args


def base_weight(module: nn.Module, name: str) -> Any:
    """Returns a base weight of a bound layer, trained or frozen, or None."""
    assert module.scope is not None
    values = (module.scope.get_variable(c, name) for c in (PARAMS, FROZEN))
    return nn.meta.unbox(next((value for value in values if value is not None), None))


def init_factors(
    module: nn.Module, inputs: tuple[Any, ...], config: LoRAConfig, path: str
) -> Factors:
    """Initialises the factors of a bound layer, from its ``params`` PRNG stream.

    With DoRA, ``magnitude`` is the kernel's column norms.

    Args:
      module: a bound layer whose type is registered and whose weight exists.
      inputs: the arguments of its call.
      config: determines the rank, distribution of A and use of DoRA.
      path: the layer's path, as matched by the config's patterns.
    """
    rule = rule_of(module)
    assert rule is not None, path
    kernel = jnp.asarray(base_weight(module, rule.weight))
    contraction = rule.contraction(module, *inputs)
    found = draw_factors(
        module.make_rng(PARAMS),
        kernel,
        config.rank_for(path),
        init=config.start,
        scaling=config.scaling_for(path),
        contraction=contraction,
        one_hot=rule.kind == "embed",
    )
    if config.dora:
        found = found._replace(magnitude=column_norm(kernel, contraction))
    return found


def adapted_query(
    module: nn.Module, query: AnyFloat, factors: Factors, scaling: float
) -> AnyFloat:
    """Returns the query ``[*b, d]`` for a tied head, scaled if DoRA is used.

    Both the base's ``attend`` and `apply_adapter` take it. The factors are plain.
    """
    a, b, magnitude = factors[:3]
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
    hidden: AnyFloat | None = None,
) -> AnyFloat:
    """Applies the adapter at ``path`` to one call of ``module``.

    Args:
      module: a bound layer whose type is registered.
      method: the method that was called.
      inputs: its arguments; for ``attend``, from `adapted_query`.
      y: the output of the frozen layer; sets the dtype of the result.
      factors: the layer's factors, plain.
      config: determines scaling and dropout rate.
      path: the layer's path, as matched by the config's patterns.
      deterministic: disables dropout, so that no PRNG key is needed.
      hidden: ``x A`` of a dense layer if it is computed already.
    """
    rule = rule_of(module)
    assert rule is not None, path
    options: dict[str, Any] = {"scaling": config.scaling_for(path)}
    rate, keep = config.dropout_rate, base_weight(module, KEEP)
    if not deterministic and (rate or keep is not None):
        what = f"dropout_rate={rate} of the adapter at {path!r}"
        key = dropout_key(module, what)
        key = key if keep is None else KeepKey(key, keep)
        options |= {"dropout_rate": rate, "dropout_key": key}
    if factors.magnitude is not None and method != ATTEND:  # `attend` scales the query
        options["magnitude"] = factors.magnitude
        if (bias := base_weight(module, BIAS)) is not None:
            options["bias"] = bias
    if hidden is not None:
        options["hidden"] = hidden
    kernel = jnp.asarray(base_weight(module, rule.weight))
    return rule.apply(module, method, inputs, y, kernel, *factors[:2], **options)


def dropout_key(module: nn.Module, what: str) -> Any:
    """Returns a key from a module's dropout stream; errors say ``what`` needs it.

    Raises:
      ValueError: if the module has no dropout stream.
    """
    if not (module.has_rng(DROPOUT) or module.has_rng(PARAMS)):
        raise ValueError(
            f"rngs must have {DROPOUT!r} for {what}; got none. Pass "
            f"`rngs={{{DROPOUT!r}: key}}` or `deterministic=True`; nn.scan and nn.vmap "
            f"need split_rngs={{{DROPOUT!r}: True}}."
        )
    return module.make_rng(DROPOUT)
