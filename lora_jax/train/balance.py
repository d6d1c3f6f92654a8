"""The load-balancing loss of mixtures of experts."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from lora_jax.array_types import PyTree, Scalar
from lora_jax.tree.paths import flatten
from lora_jax.tree.targets import child


def balance_loss(routed: PyTree, is_token: Bool[Array, "b t"] | None = None) -> Scalar:
    """Computes how unevenly routers send tokens to experts.

    Computes ``e Σ_e f_e p_e`` for ``f_e``, how often a token chooses expert ``e``, and
    ``p_e``, the mean probability of ``e``; both over the tokens of all layers together.
    It is ``k`` if ``k`` experts are chosen evenly, and more where the likely ones are
    chosen often. Only ``p_e`` has a gradient.

    Args:
      routed: the collection ``routed`` of `Decoder`: ``scores`` ``[*l, b, t, e]`` and
        the ``chosen`` experts ``[*l, b, t, k]`` of each router.
      is_token: False at padding, which does not count; all count if None.

    Returns:
      The loss, float32.

    Raises:
      ValueError: if there are no scores.

    Example:
      >>> scores, chosen = jnp.zeros((1, 3, 4)), jnp.array([[[0, 1], [2, 3], [0, 1]]])
      >>> float(balance_loss({"scores": (scores,), "chosen": (chosen,)}))
      2.0

    References:
      Fedus et al., https://arxiv.org/abs/2101.03961, equations 4 to 6, with ``k``
      experts for each token and over all layers at once, as in transformers.
    """
    pairs = list(_pairs(routed))
    if not pairs:
        raise ValueError(
            "router_aux_loss_coef must be 0 for a model without experts: no router "
            "has sown its scores."
        )
    counts = [_count(scores, chosen, is_token) for scores, chosen in pairs]
    chosen_times, probability, tokens = map(sum, zip(*counts, strict=True))
    e = pairs[0][0].shape[-1]
    return e * jnp.sum(chosen_times * probability) / tokens**2


def _count(scores: Array, chosen: Array, is_token: Any) -> tuple[Any, Any, Any]:
    """Counts how often each expert is chosen, its total probability, and the tokens."""
    *lead, e = scores.shape  # [*l, b, t]
    counts = jnp.ones(lead) if is_token is None else jnp.broadcast_to(is_token, lead)
    counts = counts.astype(jnp.float32)
    axes = tuple(range(len(lead)))
    is_chosen = chosen[..., None] == jnp.arange(e)  # [*l, b, t, k, e]
    times = jnp.where(is_chosen, counts[..., None, None], 0.0)
    probabilities = jax.nn.softmax(scores.astype(jnp.float32), axis=-1)
    return (
        jnp.sum(times, axis=(*axes, len(lead))),
        jnp.sum(probabilities * counts[..., None], axis=axes),
        jnp.sum(counts),
    )


def _pairs(routed: PyTree) -> Any:
    """Yields the scores of each router with what was chosen of them."""
    kept = flatten(routed)
    for path, scores in kept.items():
        owner, _, name = path.rpartition("/")
        if name == "scores":
            yield from zip(scores, kept[child(owner, "chosen")], strict=True)
