"""Optimizers for adapters: a recipe, and a wrapper to restrict any other to adapters.

With separate trainable collections (`TrainState`), `lora_optimizer` is all you need.
For a single tree that also contains the base, `adapters_only` restricts a transform to
the adapters; put clipping, decay and accumulation inside it. (``optax.masked`` alone
passes the raw gradient of W0 through as its update: gradient *ascent*.)
"""

import sys
from collections.abc import Callable
from math import inf
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.array_types import PyTree
from lora_jax.config import Patterns, matches
from lora_jax.names import (
    ADAPTER_LEAVES,
    BIAS,
    LORA_A,
    LORA_B,
    MAGNITUDE,
    SCALE,
    TOKEN_ROWS,
    VERA_D,
)
from lora_jax.tree.paths import key_path, leaves_by_path, nearest

ADAPTER = "adapter"
REST = "rest"
DECAYS: dict[str, Callable[[Any], Any]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + jnp.cos(jnp.pi * x)) / 2,
    "constant": lambda x: 1.0,
}
SCHEDULES = tuple(DECAYS)


def lora_optimizer(
    learning_rate: float,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    schedule: str = "linear",
    clip_norm: float | None = 1.0,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    lora_b_ratio: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW for adapters, with clipping, decay mask, LoRA+ ratio and a schedule.

    Computes ``p ← p - lr(t) · ratio(p) · (adam(clip(g)) + weight_decay(p) · p)``, where
    ``ratio`` is ``lora_b_ratio`` for ``lora_b`` and 1 otherwise.

    Weight decay applies to ``lora_b`` and other arrays with at least 2 dimensions, but
    not to ``lora_a``, DoRA's ``magnitude``, ``token_rows``, any ``bias`` or ``scale``
    (which have 2 dimensions if scanned), or arrays with fewer dimensions. Decaying B is
    enough to shrink ``A B``, and decaying A while B is near zero only shrinks the first
    gradients; the neutral values of a magnitude and of a token's row are W0's, not
    zero.

    Args:
      learning_rate: peak learning rate.
      total_steps: optimizer steps in the run, including warmup.
      warmup_steps: steps of linear warmup; the rate is never zero.
      schedule: ``"linear"`` or ``"cosine"`` to zero at ``total_steps``, or
        ``"constant"``.
      clip_norm: maximum global norm of the gradient, or None for no clipping.
      weight_decay: decoupled weight decay.
      b1: Adam's decay rate of the first moment.
      b2: Adam's decay rate of the second moment.
      eps: Adam's epsilon.
      lora_b_ratio: ratio of B's learning rate to A's.

    Returns:
      An optax transform over a tree of trainable leaves.

    Raises:
      ValueError: listing every argument that is out of range.

    Example:
      >>> tx = lora_optimizer(1e-3, total_steps=100, warmup_steps=10)
      >>> params = {"lora_a": jnp.ones((3, 1)), "lora_b": jnp.zeros((1, 2))}
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> f"{updates['lora_a'][0, 0]:.6f}"  # a tenth of the peak: warmup
      '-0.000100'

    References:
      AdamW: https://arxiv.org/abs/1711.05101; LoRA+: https://arxiv.org/abs/2402.12354,
      section 4 (it suggests a ratio of 16 with a lower base rate).
    """
    rate = learning_rate_schedule(
        learning_rate,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        schedule=schedule,
    )
    _raise_faults(
        "lora_optimizer",
        [
            (clip_norm is None or clip_norm > 0, "clip_norm", "above 0", clip_norm),
            (0 <= weight_decay < inf, "weight_decay", "at least 0", weight_decay),
            (0 <= b1 < 1, "b1", "in [0, 1)", b1),
            (0 <= b2 < 1, "b2", "in [0, 1)", b2),
            (0 < eps < inf, "eps", "above 0", eps),
            (0 < lora_b_ratio < inf, "lora_b_ratio", "above 0", lora_b_ratio),
        ],
    )
    transforms = [optax.scale_by_adam(b1=b1, b2=b2, eps=eps)]
    if clip_norm is not None:
        transforms.insert(0, optax.clip_by_global_norm(clip_norm))
    if weight_decay:
        transforms.append(optax.add_decayed_weights(weight_decay, decay_mask))
    if lora_b_ratio != 1.0:
        transforms.append(optax.masked(optax.scale(lora_b_ratio), lora_b_mask))
    chain = optax.chain(*transforms, optax.scale_by_learning_rate(rate))

    def init(params: PyTree) -> PyTree:
        _check_no_base(params)
        return chain.init(params)

    return optax.GradientTransformationExtraArgs(init, chain.update)


def learning_rate_schedule(
    learning_rate: float,
    *,
    total_steps: int,
    warmup_steps: int = 0,
    schedule: str = "linear",
) -> optax.Schedule:
    """Linear warmup, then constant or decay to zero.

    Computes ``lr · min(1, (t + 1) / warmup) · d((t - warmup) / (total - warmup))`` for
    steps ``t`` from 0, with ``d(x) = 1 - x`` (linear), ``(1 + cos πx) / 2`` (cosine) or
    1. The rate is zero at ``t = total_steps``, one past the last step.

    Args:
      learning_rate: peak learning rate.
      total_steps: steps in the run, including warmup.
      warmup_steps: steps of linear warmup.
      schedule: ``"linear"``, ``"cosine"`` or ``"constant"``.

    Returns:
      A function from the step to the learning rate.

    Raises:
      ValueError: listing every argument that is out of range.

    Example:
      >>> rate = learning_rate_schedule(1.0, total_steps=6, warmup_steps=2)
      >>> [float(rate(t)) for t in range(7)]
      [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    is_warmup, steps = 0 <= warmup_steps <= total_steps, f"[0, {total_steps}]"
    _raise_faults(
        "learning_rate_schedule",
        [
            (0 < learning_rate < inf, "learning_rate", "above 0", learning_rate),
            (total_steps >= 1, "total_steps", "at least 1", total_steps),
            (is_warmup, "warmup_steps", f"in [0, total_steps] = {steps}", warmup_steps),
            (schedule in SCHEDULES, "schedule", f"one of {SCHEDULES}", schedule),
        ],
    )
    numbers = (learning_rate, warmup_steps, total_steps)
    return lambda step: scheduled(step, *numbers, DECAYS[schedule])


def scheduled(
    step: Any, peak: Any, warmup: Any, total: Any, decay: Callable[[Any], Any]
) -> Any:
    """Computes `learning_rate_schedule` at a step; all numbers may be traced."""
    x = jnp.clip((step - warmup) / jnp.maximum(total - warmup, 1), 0.0, 1.0)
    return peak * jnp.minimum(1.0, (step + 1) / jnp.maximum(warmup, 1)) * decay(x)


def adapters_only(
    tx: optax.GradientTransformation, *, train: Patterns = ()
) -> optax.GradientTransformationExtraArgs:
    """Restricts a transform to the adapter leaves of a mixed tree.

    Adapter leaves get ``tx``'s updates and state; all other leaves get zero updates and
    no state. Put clipping, decay and accumulation *inside*:
    ``adapters_only(optax.chain(clip, adam))``. Clipping outside would make XLA compute
    the gradient of every base kernel, and clip by the wrong norm.

    Args:
      tx: any optax transform, including ``optax.MultiSteps``.
      train: other leaves to train, as in `adapter_mask`.

    Returns:
      A transform over the mixed tree.

    Raises:
      ValueError: on init, if the tree has no adapter leaves, or a ``train`` pattern
        matches nothing.

    Example:
      >>> params = {"kernel": jnp.ones((3, 2)), "lora_b": jnp.zeros((1, 2))}
      >>> tx = adapters_only(optax.adam(0.1))
      >>> grads = jax.tree.map(jnp.ones_like, params)
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> float(updates["kernel"].sum()), f"{updates['lora_b'][0, 0]:.3f}"
      (0.0, '-0.100')
    """
    return optax.partition(
        {ADAPTER: tx, REST: optax.set_to_zero()},
        lambda tree: adapter_labels(tree, train=train),
    )


def adapter_mask(tree: PyTree, *, train: Patterns = ()) -> PyTree:
    """Returns a mask of the trained leaves: adapters, and those that ``train`` names.

    Args:
      tree: a tree of parameters; adapters are recognised by the names ``lora_a``,
        ``lora_b`` and ``magnitude``.
      train: other leaves to train: suffixes of the paths of leaves or modules
        (``["classifier"]``), or one regular expression.

    Returns:
      The same tree with True or False at each leaf.

    Raises:
      ValueError: if the tree has no adapter leaves, or a pattern matches nothing.

    Example:
      >>> adapter_mask({"up": {"kernel": 1.0, "lora_a": 1.0, "lora_b": 1.0}})
      {'up': {'kernel': False, 'lora_a': True, 'lora_b': True}}
    """
    # Masked nodes are not leaves, so leaves hidden by an outer mask stay hidden.
    paths = list(leaves_by_path(tree))
    if not any(map(_is_adapter, paths)):
        raise ValueError(
            f"the tree must contain adapter leaves, named {LORA_A} or {LORA_B}; "
            f"got 0 among {len(paths)} leaves. "
            "`adapt(model, config).attach(params, key)` adds adapters."
        )
    for pattern in (train,) if isinstance(train, str) else train:
        as_given = pattern if isinstance(train, str) else (pattern,)
        if not any(_is_named(as_given, path) for path in paths):
            names = sorted({name for path in paths for name in _prefixes(path)})
            raise ValueError(
                f"train={pattern!r} matched 0 of {len(paths)} leaves. "
                f"Did you mean: {nearest(pattern, names)}?"
            )
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _is_adapter(p := key_path(path)) or _is_named(train, p), tree
    )


def adapter_labels(tree: PyTree, *, train: Patterns = ()) -> PyTree:
    """Labels leaves ``"adapter"`` or ``"rest"``, for ``optax.partition``.

    Args:
      tree: a tree of parameters.
      train: as in `adapter_mask`.

    Returns:
      The same tree with a label at each leaf.

    Raises:
      ValueError: as `adapter_mask`.

    Example:
      >>> adapter_labels({"up": {"kernel": 1.0, "lora_b": 1.0}})
      {'up': {'kernel': 'rest', 'lora_b': 'adapter'}}
    """
    mask = adapter_mask(tree, train=train)
    return jax.tree.map(lambda is_trained: ADAPTER if is_trained else REST, mask)


def decay_mask(tree: PyTree) -> PyTree:
    """Returns a mask of the decayed leaves: ``lora_b``, kernels and embeddings.

    True for 2 or more dimensions, except for ``lora_a``, ``vera_d``, ``magnitude``,
    ``token_rows``, ``bias`` and ``scale``.

    Example:
      >>> decay_mask({"lora_a": jnp.ones((3, 1)), "lora_b": jnp.ones((1, 2))})
      {'lora_a': False, 'lora_b': True}
    """

    exempt = {LORA_A, VERA_D, MAGNITUDE, TOKEN_ROWS, BIAS, SCALE}

    def decays(path: Any, leaf: Any) -> bool:
        return jnp.ndim(leaf) >= 2 and exempt.isdisjoint(key_path(path).split("/"))

    return jax.tree_util.tree_map_with_path(decays, tree)


def _check_no_base(params: PyTree) -> None:
    """Raises if the state of an NNX model holds base weights beside its adapters."""
    nnx = sys.modules.get("flax.nnx")  # heavy, and loaded where there is such a state
    if nnx is None:
        return
    leaves = jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    )
    found = [(p, leaf) for p, leaf in leaves if isinstance(leaf, nnx.Variable)]
    base = [key_path(p) for p, leaf in found if not isinstance(leaf, nnx.LoRAParam)]
    if base and len(base) < len(found):
        raise ValueError(
            f"the optimizer would train {len(base)} weights of the base beside the "
            f"adapters, such as {base[0]}. Select what is trained: "
            "`nnx.Optimizer(model, tx, wrt=lora_jax.nnx.Trained)`; weights of the base "
            "that are to be trained go into `LoRAConfig.train`."
        )


def lora_b_mask(tree: PyTree) -> PyTree:
    """Returns a mask of the leaves named ``lora_b``.

    Args:
      tree: a tree of trainable leaves.

    Returns:
      The same tree with True or False at each leaf.

    Raises:
      ValueError: if there is none.
    """
    mask = b_leaves(tree)
    if not any(jax.tree.leaves(mask)):
        raise ValueError(
            f"lora_b_ratio needs leaves named {LORA_B}; got 0 among "
            f"{len(jax.tree.leaves(mask))} leaves. Set it to 1 without adapters, and "
            "for VeRA."
        )
    return mask


def b_leaves(tree: PyTree) -> PyTree:
    """Returns the mask of `lora_b_mask`, of trees without B (VeRA) too."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: LORA_B in key_path(path).split("/"), tree
    )


def _is_adapter(path: str) -> bool:
    # A boxed leaf (nn.Partitioned) is one level below its name.
    return not set(path.split("/")[-2:]).isdisjoint(ADAPTER_LEAVES)


def _is_named(patterns: Patterns, path: str) -> bool:
    return any(matches(patterns, prefix) for prefix in _prefixes(path))


def _prefixes(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def _raise_faults(name: str, checks: list[tuple[bool, str, str, Any]]) -> None:
    faults = [
        f"{argument} must be {wanted}; got {value!r}"
        for is_valid, argument, wanted, value in checks
        if not is_valid
    ]
    if faults:
        raise ValueError(f"{name}: {'; '.join(faults)}.")
