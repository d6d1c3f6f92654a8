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
from lora_jax.names import FROZEN, LORA_A, LORA_B, START_A, START_B
from lora_jax.nn.adapt import Adapted
from lora_jax.ops.start import GAMMA, gradient_factors
from lora_jax.tree.paths import flatten, unflatten
from lora_jax.tree.target import child

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
    if adapted.config.init != "lora_ga":
        raise ValueError(
            "adapted must have a config with init='lora_ga'; got "
            f"init={adapted.config.init!r}."
        )
    targets = adapted.targets(adapted.detach(variables))
    frozen = flatten(nn.meta.unbox(variables[FROZEN]))
    kernels = {t.weight_path: frozen[t.weight_path] for t in targets}

    @jax.jit
    def gradient(kernels, others, batch):
        def loss(kernels):
            whole = {
                **others,
                FROZEN: unflatten({**flatten(others[FROZEN]), **kernels}),
            }
            return loss_fn(whole, batch, {})[0]

        found = jax.grad(loss)(kernels)
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), found)

    total = None
    for batch in batches:
        found = gradient(kernels, variables, batch)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    if total is None:
        raise ValueError("batches must have at least one batch; got none.")
    wrong = [path for path, leaf in total.items() if not jnp.isfinite(leaf).all()]
    if wrong:
        raise ValueError(
            f"the gradients of W0 must be finite; {', '.join(wrong)} have NaN or "
            "infinity. Check the data and the loss."
        )
    leaves = {name: flatten(tree) for name, tree in variables.items()}
    for target in targets:
        a, b = target.as_stored(
            *gradient_factors(
                total[target.weight_path],
                target.rank,
                contraction=target.contraction,
                gamma=gamma,
            )
        )
        values = {LORA_A: a, LORA_B: b, START_A: a, START_B: b}
        for name, held in target.leaves:
            if name in values:
                leaves[held][child(target.path, name)] = values[name]
    return {name: unflatten(tree) for name, tree in leaves.items()}
