"""The interceptor that applies adapters to the layer calls of an `adapt`-ed model."""

from typing import Any

from flax.core.scope import Scope

from lora_jax.config import LoRAConfig
from lora_jax.names import ADAPTER_LEAVES, LORA_A, MAGNITUDE, PARAMS, TOKEN_ROWS
from lora_jax.nn.apply import (
    adapted_query,
    apply_adapter,
    base_weight,
    call_inputs,
    init_factors,
    rule_of_call,
)
from lora_jax.nn.checks import check_factors_fit, check_presence
from lora_jax.nn.layer_rules import ATTEND
from lora_jax.nn.shared_inputs import SharedInputs, neighbours
from lora_jax.nn.token_rows import apply_token_rows
from lora_jax.nn.watch import find_contraction, is_flagged
from lora_jax.ops.factors import Factors
from lora_jax.ops.fence import fence_gradient, fence_output
from lora_jax.tree.targets import LINEAR_KINDS
from lora_jax.tree.token_rows import TokenRows


def make_interceptor(
    config: LoRAConfig, root: int, *, deterministic: bool, initializing: bool
) -> Any:
    """Returns an interceptor for `flax.linen.intercept_methods` that adapts layers.

    Args:
      config: the adapter config.
      root: depth of the model's scope; paths start below it.
      deterministic: disables adapter dropout.
      initializing: whether to initialise missing adapters.

    Raises:
      ValueError: if the config's tokens are not named by layer.
    """
    if "" in config.tokens_by_layer:
        raise ValueError(
            f"tokens must be given by layer here, {{'embed': {list(config.tokens)}}}; "
            "got a list."
        )

    shared = SharedInputs()

    def intercept(next_fun, args, kwargs, context):
        module, scope = context.module, context.module.scope
        method, rule = context.method_name, rule_of_call(context)
        # A layer applied to its own variables (`head.apply({...}, x)`) is not part of
        # this model.
        if rule is None or not is_flagged(scope):
            return next_fun(*args, **kwargs)
        path = "/".join(scope.path[root:])
        inputs = call_inputs(context.orig_method, args, kwargs)
        if config.tokens_for(path):
            y = next_fun(*args, **kwargs)
            if initializing and not scope.has_variable(PARAMS, TOKEN_ROWS):
                weight = base_weight(module, rule.weight)
                tokens = config.tokens_for(path)
                rows = TokenRows(path, rule.weight, weight.shape, tokens)
                scope.put_variable(PARAMS, TOKEN_ROWS, rows.init(weight))
            options = {"config": config, "path": path}
            return apply_token_rows(module, rule, method, inputs, y, **options)
        if method == ATTEND and scope.has_variable(PARAMS, MAGNITUDE):
            plain = stored_factors(scope).plain()
            query = adapted_query(module, inputs[0], plain, config.scaling_for(path))
            inputs, args, kwargs = (query,), (query,), {}
        is_target = config.is_target(path, is_linear=rule.kind in LINEAR_KINDS)
        has_adapter = scope.has_variable(PARAMS, LORA_A)
        if not is_target and not has_adapter:
            return next_fun(*args, **kwargs)
        is_dense = rule.kind == "dense" and bool(args)
        if is_dense:
            args = (fence_gradient(args[0]), *args[1:])
            if not neighbours(scope):  # A's gradient joins the base's at once
                inputs = (args[0], *inputs[1:])
        y = next_fun(*args, **kwargs)
        is_rescaled = scope.has_variable(PARAMS, MAGNITUDE)
        if is_dense and is_rescaled:
            y = fence_output(y)
        if initializing and is_target and not has_adapter:
            fresh = init_factors(module, inputs, config, path)
            for name, value in zip(ADAPTER_LEAVES, fresh, strict=True):
                if value is not None:
                    scope.put_variable(PARAMS, name, value)
        factors = stored_factors(scope)
        contraction = find_contraction(rule, module, method, inputs)
        if isinstance(contraction, str):
            raise ValueError(f"{path!r} can't be adapted: {contraction}")
        check_presence(path, factors, config, is_target)
        shape = base_weight(module, rule.weight).shape
        check_factors_fit(path, factors, shape, contraction, config)
        hidden = None
        if is_dense and (deterministic or not config.dropout_rate):
            hidden = shared.hidden(scope, inputs[0], y.dtype)
        y = apply_adapter(
            module,
            method,
            inputs,
            y,
            factors.plain(contraction),
            config=config,
            path=path,
            deterministic=deterministic,
            hidden=hidden,
        )
        return fence_output(y) if is_dense and not is_rescaled else y

    return intercept


def stored_factors(scope: Scope) -> Factors:
    """Returns the adapter leaves stored beside a kernel, None for missing ones."""
    return Factors(*(scope.get_variable(PARAMS, name) for name in ADAPTER_LEAVES))
