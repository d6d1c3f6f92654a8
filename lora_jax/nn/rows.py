"""A model whose rows each have their own adapter, without a bank or from one.

The model is mapped over rows (`jax.vmap`), so a layer is called with one row and
needn't know that there are others. W0 is not mapped: its product stays one matmul for
the whole batch.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_jax.array_types import PyTree
from lora_jax.names import FROZEN, LORA, LORA_A, LORA_B, PARAMS, TRAINABLE
from lora_jax.nn.adapt import Adapted
from lora_jax.nn.apply import apply_adapter, base_weight, call_inputs, rule_of_call
from lora_jax.ops.banked import AUTO, Way, row_update
from lora_jax.ops.factors import Factors
from lora_jax.tree.partition import join
from lora_jax.tree.paths import flatten
from lora_jax.tree.targets import child

SLOTS = "slots"  # beside the collections: the place of each row's adapter in the bank


@dataclasses.dataclass(frozen=True)
class RowAdapted:
    """An adapted model whose trained leaves have a leading axis: the batch's rows.

    Attributes:
      adapted: the model, for one adapter.
      way: how the adapters of a whole bank are applied, where `SLOTS` are given.
    """

    adapted: Adapted
    way: Way = AUTO

    @property
    def model(self) -> nn.Module:
        """The wrapped model."""
        return self.adapted.model

    def apply(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        method: Any = None,
        rngs: Mapping[str, jax.Array] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Calls the model, each row with its own adapter.

        Args:
          variables: ``{"frozen": base, "lora": leaves [b, ...]}``, and ``params``
            likewise if weights are trained in full. Or, from `AdapterBank.variables`,
            ``"lora": [leaves [m, ...], ...], "slots": [ids [b], ...]``.
          *args: as for the model; the first axis of every array is the rows.
          method: of the model.
          rngs: keys; each row has its own from them.
          **kwargs: as ``args``.

        Returns:
          What the model returns; its arrays have the rows as their first axis.
        """
        if SLOTS in variables:
            own = (variables[SLOTS], variables.get(PARAMS, {}))
            call = _banked(self, variables, method)
        else:
            own = {name: variables[name] for name in TRAINABLE if name in variables}
            shared = {name: variables[name] for name in variables if name not in own}

            def call(own: PyTree, keys: PyTree, *args: Any, **kwargs: Any) -> Any:
                whole = {**shared, **own}
                return self.adapted.apply(
                    whole, *args, method=method, rngs=keys, **kwargs
                )

        return _mapped(call, own, rngs or {}, args, kwargs)


def _mapped(
    call: Callable[..., Any],
    own: PyTree,
    rngs: Mapping[str, jax.Array],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Maps a call over rows: of ``own``, the keys, and every array among its inputs."""
    leaves, treedef = jax.tree.flatten((args, dict(kwargs)))
    mapped = [place for place, leaf in enumerate(leaves) if jnp.ndim(leaf)]
    count = len(jax.tree.leaves(own)[0])
    found = {len(leaves[place]) for place in mapped}
    if found - {count}:
        raise ValueError(
            f"inputs must have {count} rows, one for each row's adapter; got "
            f"{', '.join(map(str, sorted(found)))}."
        )
    keys = {name: jax.random.split(key, count) for name, key in rngs.items()}

    def of_row(own: PyTree, keys: PyTree, *rows: jax.Array) -> Any:
        filled = list(leaves)
        for place, row in zip(mapped, rows, strict=True):
            filled[place] = row[None]
        args, kwargs = jax.tree.unflatten(treedef, filled)
        return jax.tree.map(lambda y: y[0], call(own, keys, *args, **kwargs))

    return jax.vmap(of_row)(own, keys, *(leaves[place] for place in mapped))


def _banked(module: RowAdapted, variables: Mapping[str, Any], method: Any) -> Any:
    """Returns a call of the model whose adapters are those of a whole bank."""
    banks = [flatten(leaves) for leaves in variables[LORA]]
    ours = (FROZEN, LORA, SLOTS, PARAMS)
    others = {k: v for k, v in variables.items() if k not in ours}

    def call(own: PyTree, keys: PyTree, *args: Any, **kwargs: Any) -> Any:
        ids, trained = own
        whole = {PARAMS: join(variables[FROZEN], trained), **others}

        def intercept(next_fun, args, kwargs, context):
            y = next_fun(*args, **kwargs)
            rule, layer = rule_of_call(context), context.module
            path = "/".join(layer.path)
            if rule is None or not any(child(path, LORA_A) in bank for bank in banks):
                return y
            inputs = call_inputs(context.orig_method, args, kwargs)
            shape = jnp.shape(base_weight(layer, rule.weight))
            sides = trailing_axes(layer, inputs[0], shape)
            if sides is None and module.way == AUTO:
                for bank, slot in zip(banks, ids, strict=True):
                    leaves = (
                        bank[child(path, leaf)][slot] for leaf in (LORA_A, LORA_B)
                    )
                    y = apply_adapter(
                        layer,
                        context.method_name,
                        inputs,
                        y,
                        Factors(*leaves),
                        config=module.adapted.config,
                        path=path,
                        deterministic=True,
                    )
                return y
            if sides is None:
                raise ValueError(
                    f"{path!r} is not a layer that the way {module.way!r} knows, a "
                    "product with the last axes of its input; use 'gather'."
                )
            x = inputs[0].astype(y.dtype)
            x = x.reshape(*x.shape[: x.ndim - sides[0]], -1)
            precision = getattr(layer, "precision", None)
            update = row_update(module.way, precision)
            for bank, slot in zip(banks, ids, strict=True):
                if slot.ndim and slot.shape != x.shape[1:-1]:
                    raise ValueError(
                        f"ids of tokens {slot.shape} need layers whose inputs are the "
                        f"tokens; {path!r} has {x.shape[1:-1]}. Give a row's id."
                    )
                a, b = (bank[child(path, leaf)] for leaf in (LORA_A, LORA_B))
                a = a.reshape(len(a), x.shape[-1], -1)
                b = b.reshape(len(b), a.shape[-1], -1)
                y = y + update(x, a, b, slot).reshape(y.shape).astype(y.dtype)
            return y

        with nn.intercept_methods(intercept):
            return module.model.apply(whole, *args, method=method, rngs=keys, **kwargs)

    return call


def trailing_axes(layer: nn.Module, x: Any, shape: Sequence[int]) -> Any:
    """Returns how many axes of a layer's kernel are inputs and outputs, or None.

    Args:
      layer: a bound layer.
      x: its input.
      shape: of its kernel.

    Returns:
      The two numbers if the layer multiplies the last axes of its input by the kernel;
      None for other layers.
    """
    if isinstance(layer, nn.DenseGeneral):
        axes = layer.axis if isinstance(layer.axis, (tuple, list)) else (layer.axis,)
        wanted = range(x.ndim - len(axes), x.ndim)
        if layer.batch_dims or [axis % x.ndim for axis in axes] != [*wanted]:
            return None
        return len(axes), len(shape) - len(axes)
    return (1, 1) if isinstance(layer, nn.Dense) else None
