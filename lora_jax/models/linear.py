"""Linear layers whose outputs a remat policy can save."""

from typing import Any

import flax.linen as nn
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from lora_jax.names import LINEAR, MAGNITUDE, PARAMS


def apply_linear(layer: nn.Module, *inputs: Any) -> Array:
    """Returns ``layer(*inputs)``, named `LINEAR` for remat policies.

    DoRA's `rescale` names the output before it is scaled, which its gradient needs;
    the scaled one is cheap to compute again, and so is not saved beside it.
    """
    y = layer(*inputs)
    is_named = layer.has_variable(PARAMS, MAGNITUDE)
    return y if is_named else checkpoint_name(y, LINEAR)
