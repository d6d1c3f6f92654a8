"""Plans for training steps on devices that may be absent.

Lowers the actual step, `make_train_step` over the task's loss, for abstract arrays with
shardings. No weights are allocated.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from lora_jax.config import LoRAConfig
from lora_jax.names import PARAMS
from lora_jax.nn.adapt import Adapted, adapt
from lora_jax.parallel.mesh import BATCH, check_rows
from lora_jax.parallel.rules import (
    WeightSharding,
    adapter_shardings,
    resolve_shardings,
)
from lora_jax.plan.flops import StepFlops, pair_step_flops, step_flops
from lora_jax.plan.slices import uncached
from lora_jax.plan.step import StepPlan, price_step, price_training
from lora_jax.train.causal_lm import make_lm_loss
from lora_jax.train.embedding import ROLES, embedding_loss
from lora_jax.train.members import Hyper, member_optimizer
from lora_jax.train.optimizer import lora_optimizer
from lora_jax.train.pairs import INPUTS
from lora_jax.train.slots import Members
from lora_jax.train.state import TrainState
from lora_jax.train.step import LossFn
from lora_jax.train.text_pairs import ARRAYS, by_role
from lora_jax.tree.paths import flatten

_BATCH = {"input_ids": jnp.int32, "labels": jnp.int32, "weights": jnp.float32}


@dataclasses.dataclass(frozen=True)
class DecoderSteps:
    """Training steps of a decoder with adapters.

    Attributes:
      decoder: the model, a decoder or (`PairSteps`) an encoder–decoder, including its
        ``remat`` policy.
      lora: the adapter config.
      tokens: tokens per row, ``t``.
      sharding: sharding of the weights, from `make_sharding`.
      limit: memory of a device in bytes.
      param_dtype: dtype of the frozen weights.
      accumulate: microbatches per step.
      router_aux_loss_coef: see `make_lm_loss`.
    """

    decoder: Any
    lora: LoRAConfig
    tokens: int
    sharding: WeightSharding
    limit: int
    param_dtype: Any = jnp.bfloat16
    accumulate: int = 1
    router_aux_loss_coef: float = 0.0

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Shapes of the model's inputs."""
        return (jax.ShapeDtypeStruct((1, 1), jnp.int32),)

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """The arrays of a batch: the shape of a row, and the dtype."""
        return {name: ((self.tokens,), kind) for name, kind in _BATCH.items()}

    @functools.cached_property
    def params(self) -> dict[str, Any]:
        """Shapes of the frozen weights."""
        key, examples = jax.random.key(0), self.inputs
        shapes = jax.eval_shape(self.decoder.init, key, *examples)[PARAMS]
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, self.param_dtype), shapes
        )

    def rows(self, wanted: int = 1) -> int:
        """Returns the smallest valid number of rows that is at least ``wanted``."""
        sizes = self.sharding.mesh.shape
        unit = math.prod(sizes[axis] for axis in BATCH) * self.accumulate
        return -(-wanted // unit) * unit

    def price(self, rows: int, remat: str | None = None) -> StepPlan:
        """Plans a step of ``rows`` rows; ``remat`` overrides the decoder's policy.

        Raises:
          ValueError: if the batch or a weight is not divisible over the mesh, or the
            config names layers that don't exist.
        """
        check_rows({"batch": rows}, self.sharding.mesh, accumulate=self.accumulate)
        adapted = self._adapted(remat)
        variables = jax.eval_shape(adapted.attach, self.params, jax.random.key(0))
        leaves = flatten(self.params) | flatten(variables.get(PARAMS, {}))
        sizes = {path: leaf.shape for path, leaf in leaves.items()}
        where = resolve_shardings(sizes, self.sharding)
        where |= adapter_shardings(where, adapted.targets(self.params))
        batch = {
            name: jax.ShapeDtypeStruct((1, *row), kind)
            for name, (row, kind) in self.arrays.items()
        }
        with uncached():
            return price_training(
                self._loss(adapted),
                lora_optimizer(1e-4, total_steps=1000),
                variables,
                batch,
                rows,
                accumulate=self.accumulate,
                where=where,
                limit=self.limit,
                remat=adapted.model.remat,
            )

    def price_together(
        self, count: int, rows: int, remat: str | None = None
    ) -> StepPlan:
        """Plans the step of a sweep's runs on one device, which has the whole base.

        Args:
          count: how many runs are side by side on the device.
          rows: of each run's batch.
          remat: overrides the decoder's policy.

        Returns:
          The plan.
        """
        adapted, key = self._adapted(remat), jax.random.key(0)
        here = SingleDeviceSharding(self.sharding.mesh.devices.flat[0])
        hyper = Hyper.of(
            adapted.targets(self.params), learning_rate=1e-4, total_steps=1000
        )
        variables = jax.eval_shape(adapted.attach, self.params, key)
        tx = member_optimizer(hyper)
        state, hyper = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
            (jax.eval_shape(lambda v: TrainState.create(v, tx, key), variables), hyper),
        )
        members = Members(self._loss(adapted), self.accumulate, state, hyper, count)
        batch = {
            name: jax.ShapeDtypeStruct((count, rows, *row), kind, sharding=here)
            for name, (row, kind) in self.arrays.items()
        }
        remat = adapted.model.remat
        with uncached():
            return price_step(
                members, members.state, batch, limit=self.limit, remat=remat
            )

    def flops(self, plan: StepPlan) -> StepFlops:
        """Returns the FLOPs of a planned step, by formula."""
        targets = self._adapted().targets(self.params)
        shape = plan.batch, plan.tokens, plan.remat or self.decoder.remat
        return step_flops(self.decoder.config, self.params, targets, *shape)

    def _loss(self, adapted: Adapted) -> LossFn:
        config = self.decoder.config
        return make_lm_loss(
            adapted,
            is_tied=config.is_tied,
            softcap=config.final_softcap,
            router_aux_loss_coef=self.router_aux_loss_coef,
        )

    def _adapted(self, remat: str | None = None) -> Adapted:
        remat = remat or self.decoder.remat
        return adapt(self.decoder.clone(remat=remat), self.lora, *self.inputs)


class PairSteps(DecoderSteps):
    """The same of an encoder–decoder: ``tokens`` are those of a source and a target."""

    @property
    def inputs(self) -> tuple[Any, ...]:
        """See `DecoderSteps`."""
        return (jax.ShapeDtypeStruct((1, 1), jnp.int32),) * len(INPUTS)

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """See `DecoderSteps`."""
        names = dict.fromkeys(INPUTS, jnp.int32) | _BATCH
        return {name: ((self.tokens,), kind) for name, kind in names.items()}

    def flops(self, plan: StepPlan) -> StepFlops:
        """See `DecoderSteps`."""
        common = self.decoder.config, self.params, self._adapted().targets(self.params)
        sizes = plan.batch, plan.tokens, plan.tokens
        return pair_step_flops(*common, *sizes, plan.remat or self.decoder.remat)

    def _loss(self, adapted: Adapted) -> LossFn:
        is_tied = self.decoder.config.is_tied
        return make_lm_loss(adapted, is_tied=is_tied, inputs=INPUTS)


class TextPairSteps(DecoderSteps):
    """The same of a decoder's embeddings, of pairs of texts."""

    @property
    def arrays(self) -> dict[str, tuple[tuple[int, ...], Any]]:
        """See `DecoderSteps`."""
        names = [name for role in ROLES[:2] for name in ARRAYS[role]]
        found = {name: ((self.tokens,), jnp.int32) for name in names}
        return {**found, "weights": ((), jnp.float32)}

    def flops(self, plan: StepPlan) -> StepFlops:
        """Returns the FLOPs as traced; those of full fine-tuning are not known."""
        return StepFlops(plan.flops, 0.0)

    def _loss(self, adapted: Adapted) -> LossFn:
        inner = embedding_loss(adapted, method="encode")
        return lambda variables, batch, rngs: inner(variables, by_role(batch), rngs)
