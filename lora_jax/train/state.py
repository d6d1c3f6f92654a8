"""TrainState: trainable, frozen and optimizer state of a run.

The trainable collections and the optimizer state are small and change on each step; the
frozen base is large and never changes. As separate fields, a step can donate the former
and only read the latter.
"""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from lora_jax.array_types import PyTree
from lora_jax.names import TRAINABLE
from lora_jax.parallel.mesh import mesh_of, on_mesh
from lora_jax.tree.paths import leaves_by_path


@flax.struct.dataclass
class TrainState:
    """The complete state of a training run between steps.

    Attributes:
      step: int32 scalar, number of batches consumed, including skipped steps: the
        position in the data.
      trainable: the trained collections, ``{"lora": ..., "params": ...}``.
      frozen: all other collections, ``{"frozen": ..., ...}``; never changed.
      opt_state: the optimizer state of the trainable leaves.
      rng: PRNG key of the run; constant, folded with the step number.
      skipped: int32 scalar, number of steps skipped as not finite.

    Example:
      >>> lora = {"lora_a": jnp.ones((3, 1)), "lora_b": jnp.zeros((1, 2))}
      >>> variables = {"frozen": {"kernel": jnp.ones((3, 2))}, "lora": lora}
      >>> state = TrainState.create(variables, optax.adam(1e-3), jax.random.key(0))
      >>> sorted(state.trainable), sorted(state.frozen), sorted(state.variables)
      (['lora'], ['frozen'], ['frozen', 'lora'])
    """

    step: jax.Array
    trainable: dict[str, PyTree]
    frozen: dict[str, PyTree]
    opt_state: PyTree
    rng: jax.Array
    skipped: jax.Array

    @property
    def variables(self) -> dict[str, PyTree]:
        """All collections, as ``Module.apply`` takes them."""
        return {**self.frozen, **self.trainable}

    @property
    def changing(self) -> dict[str, Any]:
        """All fields except ``frozen``: those a step donates and a checkpoint saves."""
        return {
            "step": self.step,
            "trainable": self.trainable,
            "opt_state": self.opt_state,
            "rng": self.rng,
            "skipped": self.skipped,
        }

    @classmethod
    def create(
        cls,
        variables: Mapping[str, PyTree],
        tx: optax.GradientTransformation,
        rng: jax.Array,
    ) -> "TrainState":
        """Splits variables into trainable and frozen, and initialises the optimizer.

        The trainable leaves and the key are copied, since the training step donates
        them; ``variables`` stays usable.

        Args:
          variables: ``{"frozen": ..., "lora": ..., "params": ...}`` and any others. If
            any leaf is sharded over a mesh, the whole state is: optimizer leaves like
            their parameters, other leaves replicated.
          tx: the optimizer; sees only the trainable collections.
          rng: a PRNG key.

        Returns:
          The state before the first step.

        Raises:
          ValueError: if there is no trainable leaf.
          TypeError: listing every trainable leaf that is not floating-point.
        """
        trainable = {name: variables[name] for name in TRAINABLE if name in variables}
        check_trainable(trainable)
        frozen = {k: v for k, v in variables.items() if k not in trainable}
        trainable = jax.tree.map(_owned, trainable)
        state = cls(
            step=jnp.zeros((), jnp.int32),
            trainable=trainable,
            frozen=jax.tree.map(jnp.asarray, frozen),
            opt_state=jax.tree.map(_owned, tx.init(trainable)),
            rng=jnp.array(rng, copy=True),
            skipped=jnp.zeros((), jnp.int32),
        )
        mesh = mesh_of((trainable, frozen))
        return state if mesh is None else on_mesh(state, mesh)


def check_trainable(trainable: Mapping[str, PyTree]) -> None:
    """Raises unless there are trainable leaves and all are floating-point.

    Raises:
      ValueError: if there are no leaves.
      TypeError: listing every leaf that is not floating-point.
    """
    leaves = leaves_by_path(trainable)
    if not leaves:
        raise ValueError(
            f"variables must have leaves in {' or '.join(map(repr, TRAINABLE))} to "
            f"train; got {dict.fromkeys(trainable, 0)} leaves. "
            "`adapt(model, config).attach(params, key)` adds adapters."
        )
    wrong = [
        f"{path} ({dtype})"
        for path, leaf in leaves.items()
        if not jnp.issubdtype(dtype := jnp.result_type(leaf), jnp.floating)
    ]
    if wrong:
        raise TypeError(
            f"trainable leaves must be floating; got {len(wrong)} that are not: "
            f"{', '.join(wrong)}. Keep such arrays in another collection."
        )


def _owned(leaf: Any) -> jax.Array:
    """Copies a leaf to a strong dtype, to avoid recompiling on the second step."""
    return jnp.array(leaf, dtype=jnp.result_type(leaf), copy=True)
