"""Plans for a decoder's training steps on devices that may be absent.

Lowers the actual step, `make_train_step` over `make_lm_loss`, for abstract arrays with
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
from lora_jax.models.decoder import Decoder
from lora_jax.names import PARAMS
from lora_jax.nn.adapt import Adapted, adapt
from lora_jax.parallel.mesh import BATCH, check_rows
from lora_jax.parallel.rules import (
    WeightSharding,
    adapter_shardings,
    resolve_shardings,
)
from lora_jax.plan.flops import StepFlops, step_flops
from lora_jax.plan.slices import uncached
from lora_jax.plan.step import StepPlan, price_step, price_training
from lora_jax.train.causal_lm import make_lm_loss
from lora_jax.train.members import Hyper, member_optimizer
from lora_jax.train.optimizer import lora_optimizer
from lora_jax.train.slots import Members
from lora_jax.train.state import TrainState
from lora_jax.train.step import LossFn
from lora_jax.tree.paths import flatten

_BATCH = {"input_ids": jnp.int32, "labels": jnp.int32, "weights": jnp.float32}


@dataclasses.dataclass(frozen=True)
class DecoderSteps:
    """Training steps of a decoder with adapters.

    Attributes:
      decoder: the model, including its ``remat`` policy.
      lora: the adapter config.
      tokens: tokens per row, ``t``.
      sharding: sharding of the weights, from `make_sharding`.
      limit: memory of a device in bytes.
      param_dtype: dtype of the frozen weights.
      accumulate: microbatches per step.
      router_aux_loss_coef: see `make_lm_loss`.
    """

    decoder: Decoder
    lora: LoRAConfig
    tokens: int
    sharding: WeightSharding
    limit: int
    param_dtype: Any = jnp.bfloat16
    accumulate: int = 1
    router_aux_loss_coef: float = 0.0

    @functools.cached_property
    def params(self) -> dict[str, Any]:
        """Shapes of the frozen weights."""
        ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        shapes = jax.eval_shape(self.decoder.init, jax.random.key(0), ids)[PARAMS]
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
        shape = (1, self.tokens)
        batch = {n: jax.ShapeDtypeStruct(shape, t) for n, t in _BATCH.items()}
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
        shape = (rows, self.tokens)
        batch = {
            name: jax.ShapeDtypeStruct((count, *shape), kind, sharding=here)
            for name, kind in _BATCH.items()
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
        return adapt(self.decoder.clone(remat=remat), self.lora)
