"""Trained rows of tokens, applied to one call of a layer."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from lora_jax.config import LoRAConfig
from lora_jax.names import PARAMS, TOKEN_ROWS
from lora_jax.nn.apply import base_weight
from lora_jax.nn.layer_rules import CALL, LayerRule
from lora_jax.ops.token_rows import add_logits, lookup_rows, row_deltas


def apply_token_rows(
    module: nn.Module,
    rule: LayerRule,
    method: str,
    inputs: tuple[Any, ...],
    y: Any,
    *,
    config: LoRAConfig,
    path: str,
) -> Any:
    """Returns a layer's output ``y`` with the rows of ``config.tokens`` trained.

    Args:
      module: the bound layer, an embedding or linear layer.
      rule: its rule.
      method: the method that was called.
      inputs: its arguments.
      y: the output of the frozen layer; sets the dtype of the result.
      config: names the tokens.
      path: the layer's path, as matched by the config's patterns.

    Raises:
      ValueError: if the rows are missing.
    """
    assert module.scope is not None
    tokens = config.tokens_for(path)
    rows = nn.meta.unbox(module.scope.get_variable(PARAMS, TOKEN_ROWS))
    if rows is None:
        raise ValueError(
            f"the collection {PARAMS!r} must have '{path}/{TOKEN_ROWS}' for the "
            f"{len(tokens)} tokens of the config; got none. Make the variables with "
            "`attach`, or load them for this config."
        )
    if rule.kind == "embed" and method == CALL:
        return lookup_rows(y, inputs[0], rows, tokens)
    kernel = jnp.asarray(base_weight(module, rule.weight))
    table = kernel if rule.kind == "embed" else kernel.T
    deltas = row_deltas(rows, table, tokens)
    precision = getattr(module, "precision", None)
    x = inputs[0].astype(y.dtype)
    return add_logits(y, x, deltas, tokens, precision=precision)
