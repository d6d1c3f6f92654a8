"""Finding and merging the LoRA layers of a model built from them.

`LoRADense` and the other LoRA layers carry their own config, so tracing the model finds
the adapted layers, as `adapt` does for a plain model.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from lora_jax.array_types import PyTree
from lora_jax.names import FROZEN, PARAMS
from lora_jax.nn.trace import Example, trace_model
from lora_jax.tree.merge import merge_params
from lora_jax.tree.partition import adapter_of, join
from lora_jax.tree.targets import Target, target_at


def lora_layer_targets(
    model: nn.Module,
    variables: Mapping[str, PyTree],
    *example_args: Any,
    **example_kwargs: Any,
) -> list[Target]:
    """Returns the adapted LoRA layers of a model.

    Args:
      model: an unbound Linen module that contains LoRA layers.
      variables: its collections, arrays or shapes.
      *example_args: example inputs, used only for their shapes; not needed if they
        follow from the parameters, as in `adapt`.
      **example_kwargs: example keyword arguments.

    Returns:
      One `Target` per adapted layer, for `merge_params`, `unmerge_params` and
      `merge_errors`.

    Raises:
      ValueError: if example inputs are needed but not given, or the model has no
        adapted LoRA layer.
    """
    base = nn.meta.unbox(_base(variables))
    example = None
    if example_args or example_kwargs:
        example = Example.of(*example_args, **example_kwargs)
    found = trace_model(model, base, example, lora_layers_only=True)
    rows = [target_at(site, found.configs[site.path]) for site in found.sites]
    targets = [row for row in rows if row is not None]
    if not targets:
        raise ValueError(
            f"{type(model).__name__} must contain LoRA layers (LoRADense, ...) that "
            f"their config adapts; {len(rows)} LoRA layers were found, 0 adapted. For "
            "a model of plain layers use `adapt(model, config).merge`."
        )
    return targets


def merge_lora_layers(
    model: nn.Module,
    variables: Mapping[str, PyTree],
    *example_args: Any,
    **example_kwargs: Any,
) -> dict[str, PyTree]:
    """Merges the adapters of a model's LoRA layers into its base.

    Args:
      model: an unbound Linen module that contains LoRA layers.
      variables: its collections.
      *example_args: example inputs, as for `lora_layer_targets`.
      **example_kwargs: example keyword arguments.

    Returns:
      The parameter tree of the same model built from Linen's own layers:
      W0 + scaling * A B under the paths and names of W0.

    Raises:
      ValueError: as for `lora_layer_targets`; or if an adapter is missing, unexpected,
        or not finite.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from lora_jax import LoRAConfig, LoRADense
      >>> model = LoRADense(4, lora=LoRAConfig(rank=2, alpha=4, targets=".*"))
      >>> x = jnp.ones((2, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> params = merge_lora_layers(model, variables)
      >>> plain = nn.Dense(4).apply({"params": params}, x)
      >>> bool((plain == model.apply(variables, x)).all())
      True
    """
    targets = lora_layer_targets(model, variables, *example_args, **example_kwargs)
    base = nn.meta.unbox(_base(variables))
    return merge_params(base, nn.meta.unbox(adapter_of(variables)), targets)


def _base(variables: Mapping[str, PyTree]) -> dict[str, Any]:
    return join(variables.get(FROZEN, {}), variables.get(PARAMS, {}))


merge_twins, twin_targets = merge_lora_layers, lora_layer_targets  # former names
