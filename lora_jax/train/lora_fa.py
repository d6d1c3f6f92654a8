"""LoRA-FA's gradient of B: what brings the update nearest to full fine-tuning's.

With A fixed, a step ``-η G_B`` of B moves W by ``-η s A G_B``. Of all these, the one
nearest to full fine-tuning's ``-η G`` has, as ``g_B = s Aᵀ G``::

    G_B = (AᵀA)⁻¹ g_B / s²
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.array_types import PyTree
from lora_jax.names import FIXED, LORA, LORA_A, LORA_B
from lora_jax.tree.paths import flatten, key_path
from lora_jax.tree.target import Target, child

DELTA = 1e-8  # of PEFT


def lora_fa_projection(
    variables: Mapping[str, PyTree], targets: Sequence[Target], *, delta: float = DELTA
) -> optax.GradientTransformation:
    """Multiplies the gradient of each B as LoRA-FA's optimizer does.

    Computes ``(AᵀA + δI)⁻¹ g_B / s²`` for ``lora_b``, and passes other gradients on.
    The inverses ``[r, r]`` are computed once, for A doesn't move. Chain it before
    Adam::

        optax.chain(lora_fa_projection(variables, targets), lora_optimizer(1e-3, ...))

    Args:
      variables: the model's, with A in ``fixed`` (``LoRAConfig(lora_fa=True)``).
      targets: its adapted layers, ``adapted.targets(params)``.
      delta: ``δ``.

    Returns:
      An optax transform without state.

    Raises:
      ValueError: if the adapters weren't made with ``lora_fa=True``.

    References:
      Zhang et al., https://arxiv.org/abs/2308.03303. PEFT's `create_lorafa_optimizer`
      does it, inside an Adam of its own, in bfloat16 where the device has it.
    """
    leaves = flatten(variables.get(FIXED, {}))
    missing = [t.path for t in targets if child(t.path, LORA_A) not in leaves]
    wrong = [t.path for t in targets if dict(t.leaves).get(LORA_B) != LORA]
    if missing or wrong:
        raise ValueError(
            f"adapters must have A in {FIXED!r} and train B, as lora_fa=True makes "
            f"them; {', '.join(missing or wrong)} have not."
        )
    places = {child(t.path, LORA_B): t for t in targets}
    inverses = {
        path: _inverse(leaves[child(t.path, LORA_A)], t, delta)
        for path, t in places.items()
    }

    def project(path: Any, gradient: Any) -> Any:
        name = key_path(path).removeprefix(f"{LORA}/")
        if name not in places:
            return gradient
        return _projected(gradient, inverses[name], places[name])

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> Any:
        del params
        return jax.tree_util.tree_map_with_path(project, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _inverse(lora_a: Any, target: Target, delta: float) -> jax.Array:
    """Returns ``(AᵀA + δI)⁻¹ / s²`` ``[*batch, r, r]``."""
    a = target.first(LORA_A, lora_a)
    batch, inputs, _ = target.contraction.split(target.kernel_shape)
    a = a.reshape(*batch, math.prod(inputs), target.rank).astype(jnp.float32)
    gram = jnp.einsum("...ir,...iq->...rq", a, a, precision="highest")
    return jnp.linalg.pinv(gram + delta * jnp.eye(target.rank)) / target.scaling**2


def _projected(gradient: jax.Array, inverse: jax.Array, target: Target) -> jax.Array:
    first = target.first(LORA_B, gradient)  # [*batch, r, *out]
    rows = first.reshape(*inverse.shape[:-1], -1).astype(jnp.float32)
    found = jnp.matmul(inverse, rows, precision="highest").reshape(first.shape)
    return target.stored(LORA_B, found).astype(gradient.dtype)
