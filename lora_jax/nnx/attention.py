"""LoRAAttention: flax's multi-head attention with LoRA on any of its projections."""

import functools
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from lora_jax.array_types import AnyFloat
from lora_jax.config import LoRAConfig
from lora_jax.nn.layer_rules import CALL
from lora_jax.nnx.layers import (
    LoRALinearGeneral,
    call_adapted,
    check_config,
    dropout_options,
    give_lora,
    plain_factors,
    set_class,
)
from lora_jax.ops.shared import shared_hidden
from lora_jax.tree.targets import child


class LoRAAttention(nnx.MultiHeadAttention):
    """`flax.nnx.MultiHeadAttention` with LoRA on any of its projections.

    Takes its arguments, ``lora``, a `LoRAConfig`, and ``path``, under which its
    projections ``query``, ``key``, ``value`` and ``out`` are looked up in the config.
    Projections with the same input share one product ``x @ [Aq | Ak | Av]`` and one
    adapter dropout mask (but for calls that sow the attention weights).

    Example:
      >>> config = LoRAConfig(rank=2, targets=["query", "value"])
      >>> layer = LoRAAttention(4, 16, lora=config, decode=False, rngs=nnx.Rngs(0))
      >>> sorted(nnx.state(layer, nnx.LoRAParam))
      ['query', 'value']

    References:
      Hu et al., https://arxiv.org/abs/2106.09685, section 4.2.
    """

    def __init__(
        self, *args: Any, lora: LoRAConfig, path: str = "", rngs: nnx.Rngs, **kw: Any
    ) -> None:
        check_config(lora)
        super().__init__(*args, rngs=rngs, **kw)
        for name in ("query", "key", "value", "out"):
            projection, where = getattr(self, name), child(path, name)
            set_class(projection, LoRALinearGeneral)
            give_lora(projection, lora, where, rngs)

    def __call__(
        self,
        inputs_q: AnyFloat,
        inputs_k: AnyFloat | None = None,
        inputs_v: AnyFloat | None = None,
        *,
        sow_weights: bool = False,
        **kwargs: Any,
    ) -> AnyFloat:
        """Attends, as `flax.nnx.MultiHeadAttention.__call__` does."""
        given = (inputs_q, inputs_k, inputs_v)
        if sow_weights:
            return super().__call__(*given, sow_weights=True, **kwargs)
        key = inputs_q if inputs_k is None else inputs_k
        value = key if inputs_v is None else inputs_v
        inputs = {"query": inputs_q, "key": key, "value": value}
        # Not an attribute of the layer: what a call computes must not outlive it.
        shared = object.__new__(type(self))
        vars(shared).update({**vars(self), **self._projections(inputs)})
        return super(LoRAAttention, shared).__call__(*given, **kwargs)

    def _projections(self, inputs: Mapping[str, AnyFloat]) -> dict[str, Any]:
        """Returns the projections by name; calls of adapted ones use the product."""
        found: dict[str, Any] = {}
        for x in {id(x): x for x in inputs.values()}.values():
            layers = {n: getattr(self, n) for n, other in inputs.items() if other is x}
            layers = {n: each for n, each in layers.items() if _is_adapted(each)}
            if len(layers) < 2:
                continue
            first = next(iter(layers.values()))
            wide = x.astype(first.dtype or jnp.result_type(x, first.kernel[...]))
            hidden = shared_hidden(
                wide,
                [plain_factors(layer).lora_a for layer in layers.values()],
                precision=first.precision,
                **dropout_options(first),
            )
            for (name, layer), h in zip(layers.items(), hidden, strict=True):
                found[name] = functools.partial(_project, layer, h)
        return found


def _project(layer: Any, hidden: AnyFloat, *args: Any, **kwargs: Any) -> AnyFloat:
    return call_adapted(layer, nnx.LinearGeneral, CALL, args, kwargs, hidden)


def _is_adapted(layer: Any) -> bool:
    return isinstance(layer, LoRALinearGeneral) and layer.lora is not None
