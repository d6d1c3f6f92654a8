"""Starts that are functions of data: LoRA-GA's, from the first gradient of W0.

``attach`` draws A as ever and leaves B at zero; then a function here, given the loss
and some batches of the training data, replaces both.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from lora_jax.array_types import PyTree
from lora_jax.config import LoRAConfig
from lora_jax.names import FROZEN, LORA_A, LORA_B, START_A, START_B
from lora_jax.nn.adapt import Adapted
from lora_jax.ops.start import GAMMA, gradient_factors
from lora_jax.tree.paths import flatten, unflatten
from lora_jax.tree.target import Target, child

Loss = Callable[..., tuple[jax.Array, jax.Array, Mapping[str, jax.Array]]]


def lora_ga_init(
    adapted: Adapted,
    variables: Mapping[str, PyTree],
    loss_fn: Loss,
    batches: Iterable[Any],
    *,
    gamma: float = GAMMA,
) -> dict[str, PyTree]:
    """Starts A and B from the gradient of the loss with respect to W0.

    The gradients of all adapted kernels are in memory at once, in float32; nothing else
    here is larger than in training.

    Args:
      adapted: of a config with ``init="lora_ga"``.
      variables: from ``adapted.attach``, with adapters that weren't trained.
      loss_fn: as for `make_train_step`; called with no rngs, so without dropout.
      batches: of the training data; their gradients are summed. A few dozen examples
        are enough.
      gamma: the paper's γ; see `lora_jax.ops.start.gradient_factors`.

    Returns:
      The variables with new adapters; the model's output is still the base's.

    Raises:
      ValueError: if the config has another ``init``, there are no batches, or a
        gradient is not finite.

    References:
      Wang, Yu and Li, https://arxiv.org/abs/2407.05000, section 3.3.
    """
    check_lora_ga(adapted.config)
    targets = adapted.targets(adapted.detach(variables))
    frozen = flatten(nn.meta.unbox(variables[FROZEN]))
    kernels = {t.weight_path: frozen[t.weight_path] for t in targets}

    def loss(kernels, others, batch):
        whole = {**others, FROZEN: unflatten({**flatten(others[FROZEN]), **kernels})}
        return loss_fn(whole, batch, {})[0]

    total = sum_gradients(loss, kernels, variables, batches)
    leaves = {name: flatten(tree) for name, tree in variables.items()}
    for target in targets:
        values = start_along(target, total[target.weight_path], gamma)
        for name, held in target.leaves:
            if name in values:
                leaves[held][child(target.path, name)] = values[name]
    return {name: unflatten(tree) for name, tree in leaves.items()}


def check_lora_ga(config: LoRAConfig) -> None:
    """Raises a `ValueError` unless a config has ``init="lora_ga"``."""
    if config.init != "lora_ga":
        raise ValueError(
            f"adapted must have a config with init='lora_ga'; got init={config.init!r}."
        )


def sum_gradients(
    loss: Callable[..., jax.Array],
    kernels: Mapping[str, Any],
    others: PyTree,
    batches: Iterable[Any],
) -> dict[str, jax.Array]:
    """Sums the gradients of a loss over batches, in float32.

    Args:
      loss: ``loss(kernels, others, batch)``, a scalar.
      kernels: what it is differentiated by, by path.
      others: the rest of its arrays.
      batches: of the training data.

    Raises:
      ValueError: if there are no batches, or a gradient is not finite.
    """

    @jax.jit
    def gradient(kernels, others, batch):
        found = jax.grad(loss)(kernels, others, batch)
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), found)

    total = None
    for batch in batches:
        found = gradient(dict(kernels), others, batch)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    if total is None:
        raise ValueError("batches must have at least one batch; got none.")
    wrong = [path for path, leaf in total.items() if not jnp.isfinite(leaf).all()]
    if wrong:
        raise ValueError(
            f"the gradients of W0 must be finite; {', '.join(wrong)} have NaN or "
            "infinity. Check the data and the loss."
        )
    return total


def start_along(target: Target, gradient: Any, gamma: float) -> dict[str, Any]:
    """Returns A and B, and what they start from, along a gradient of W0.

    Args:
      target: the layer.
      gradient: of its ``W0``.
      gamma: see `lora_ga_init`.
    """
    roles = target.contraction
    found = gradient_factors(gradient, target.rank, contraction=roles, gamma=gamma)
    a, b = target.as_stored(*found)
    return {LORA_A: a, LORA_B: b, START_A: a, START_B: b}
