"""`lora-jax plan` on this machine: does a job's step fit, and what would."""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from lora_jax.cli.console import Console
from lora_jax.finetune import job as jobs
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.formatting import size
from lora_jax.finetune.report import memory_plan
from lora_jax.finetune.sections import TrainSettings
from lora_jax.models.decoder import REMATS
from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.names import PARAMS
from lora_jax.nn.adapt import adapt
from lora_jax.parallel.mesh import batch_sharding
from lora_jax.plan.fit import device_memory, largest_batch
from lora_jax.plan.flops import StepFlops, step_flops, traced_flops
from lora_jax.plan.step import state_shapes
from lora_jax.train.step import make_train_step
from lora_jax.tree.paths import flatten


class StepMemory(NamedTuple):
    """What a compiled step needs of this machine's device.

    Attributes:
      batch: rows.
      remat: what the backward pass computes again; None of an encoder.
      parts: bytes of base, trained weights, optimizer, temporaries, and in all.
      limit: bytes that the device has.
      flops: of the step's products, as traced.
    """

    batch: int
    remat: str | None
    parts: dict[str, int]
    limit: int
    flops: float

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.parts["total"]

    @property
    def fits(self) -> bool:
        """Whether the device has them."""
        return self.total <= self.limit


class Pricer:
    """Compiles steps of a job for batches of its longest shape.

    Attributes:
      job: from `open_job`.
      total: steps of the run.
      longest: a batch of the longest shape.
    """

    def __init__(self, job: jobs.Job, total: int, longest: dict[str, Any]) -> None:
        self.job, self.total, self.longest = job, total, longest
        self.limit = device_memory(jax.local_devices()[0])

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(self.longest["input_ids"])

    @property
    def remats(self) -> tuple[str | None, ...]:
        """The policies to try, from that of the settings."""
        if not isinstance(self.job.loaded.config, DecoderConfig):
            return (None,)
        policies = list(REMATS)
        return tuple(policies[policies.index(self.job.settings.model.remat) :])

    def price(self, rows: int, remat: str | None = None) -> StepMemory:
        """Compiles a LoRA step of so many rows."""
        job, adapted = self.job, self.job.adapted
        if remat is not None:
            module = job.loaded.module.clone(remat=remat)
            adapted = adapt(module, job.lora, *job.loaded.inputs)
        return self._compile(adapted, job.variables, job.settings.train, rows, remat)

    def full(self, rows: int) -> StepMemory:
        """Compiles a step that trains the whole base; it has no B for a LoRA+ ratio."""
        job = self.job
        train = dataclasses.replace(job.settings.train, lora_b_ratio=1.0)
        return self._compile(
            job.loaded.module, {PARAMS: job.loaded.params}, train, rows
        )

    def _compile(
        self,
        module: Any,
        variables: dict[str, Any],
        train: TrainSettings,
        rows: int,
        remat: str | None = None,
    ) -> StepMemory:
        """Compiles a step from shapes alone: what doesn't fit is not allocated."""
        loss = self.job.loss(module, is_training=True)
        tx = jobs.optimizer(train, self.total)
        mesh = self.job.devices.mesh
        one = SingleDeviceSharding(jax.local_devices()[0])
        where = {path: leaf.sharding for path, leaf in flatten(variables).items()}
        state = state_shapes(
            variables,
            tx,
            where,
            one if mesh is None else NamedSharding(mesh, PartitionSpec()),
        )
        spread = None if mesh is None else batch_sharding(mesh)
        batch = {
            name: jax.ShapeDtypeStruct(
                (rows, *leaf.shape[1:]), leaf.dtype, sharding=spread
            )
            for name, leaf in self.longest.items()
        }
        step = make_train_step(loss, tx, train.accumulate)
        traced = step.trace(state, batch)
        parts = memory_plan(state, traced.lower().compile())
        return StepMemory(
            rows, remat, parts, self.limit, traced_flops(traced.jaxpr.jaxpr)
        )

    def flops(self, rows: int, remat: str | None) -> StepFlops | None:
        """Counts a decoder's arithmetic by formula: cuDNN's attention is not traced."""
        job = self.job
        if not isinstance(job.loaded.config, DecoderConfig) or remat is None:
            return None
        tokens = self.longest["input_ids"].shape[1]
        return step_flops(
            job.loaded.config, job.loaded.params, job.targets, rows, tokens, remat
        )

    def fitting(self, out: Console) -> StepMemory:
        """Returns the step as asked, under the first policy with which it fits.

        Raises:
          UserError: if it fits under none; names the largest batch that does.
        """
        plan = None
        for remat in self.remats:
            plan = self.price(self.rows, remat)
            if plan.fits:
                return plan
            out.say(f"  {_line(plan)}")
        assert plan is not None  # there is a policy at least
        found = self.largest(plan.remat)
        way_out = (
            f"The largest batch that fits is train.batch_size={found.batch}: "
            f"{size(found.total)}."
            if found
            else "Not even the smallest batch fits: take shorter rows "
            "(data.max_length) or model.param_dtype=bfloat16."
        )
        raise UserError(
            f"a step of {plan.batch} rows needs {size(plan.total)}"
            f"{f' with remat {plan.remat}' if plan.remat else ''}; this machine has "
            f"{size(plan.limit)}. {way_out}"
        )

    def largest(self, remat: str | None) -> StepMemory | None:
        """Returns the largest batch that fits under a policy."""
        unit = self.job.settings.train.accumulate * self.job.devices.parts
        return largest_batch(lambda rows: self.price(rows, remat), unit)


def _line(plan: StepMemory) -> str:
    policy = f", remat {plan.remat}" if plan.remat else ""
    return (
        f"{plan.batch} rows{policy}: {size(plan.total)} of {size(plan.limit)}, does "
        "not fit"
    )
