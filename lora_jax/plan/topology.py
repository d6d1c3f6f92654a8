"""A decoder's step on devices that need not be there, from shapes alone.

The step is the real one, `make_train_step` over `make_lm_loss`, lowered for abstract
arrays with their shardings. No weight is ever made.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax.config import LoRAConfig
from lora_jax.models.decoder import Decoder
from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.names import PARAMS
from lora_jax.nn.adapt import Adapted, adapt
from lora_jax.parallel.mesh import BATCH, batch_sharding, check_rows, make_mesh
from lora_jax.parallel.rules import (
    Rules,
    adapter_shardings,
    make_sharding,
    resolve_shardings,
)
from lora_jax.plan.flops import StepFlops, step_flops
from lora_jax.plan.slices import CHIPS, check_topology, open_slice, uncached
from lora_jax.plan.step import StepPlan, price_step, state_shapes
from lora_jax.train.causal_lm import make_lm_loss
from lora_jax.train.optimizer import lora_optimizer
from lora_jax.train.step import make_train_step
from lora_jax.tree.paths import flatten


@dataclasses.dataclass(frozen=True)
class Workload:
    """What is trained.

    Attributes:
      config: the decoder's sizes.
      lora: its adapters.
      tokens: of a row, ``t``.
      dtype: of the computation.
      param_dtype: of the frozen weights.
      remat: what the backward pass computes again; see `Decoder`.
      accumulate: microbatches of a step.
      is_scanned: whether the blocks are one scanned block; None: where they are alike.
      rules: of the mesh, as `make_sharding` takes them.
      uneven: likewise.
    """

    config: DecoderConfig
    lora: LoRAConfig
    tokens: int
    dtype: Any = jnp.bfloat16
    param_dtype: Any = jnp.bfloat16
    remat: str = "block"
    accumulate: int = 1
    is_scanned: bool | None = None
    rules: Rules = ()
    uneven: Literal["error", "replicate"] = "error"

    @functools.cached_property
    def adapted(self) -> Adapted:
        """The decoder with adapters."""
        are_alike = not self.lora.tells_layers_apart
        decoder = Decoder(
            self.config,
            dtype=self.dtype,
            is_scanned=are_alike if self.is_scanned is None else self.is_scanned,
            remat=self.remat,
        )
        return adapt(decoder, self.lora)

    @functools.cached_property
    def params(self) -> dict[str, Any]:
        """The shapes of the frozen weights, a plain nested dictionary."""
        ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
        shapes = jax.eval_shape(self.adapted.model.init, jax.random.key(0), ids)

        def typed(leaf: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(leaf.shape, self.param_dtype)

        return jax.tree.map(typed, shapes[PARAMS])

    def flops(self, batch: int) -> StepFlops:
        """Returns the arithmetic of a step of so many rows, by formula."""
        targets = self.adapted.targets(self.params)
        return step_flops(
            self.config, self.params, targets, batch, self.tokens, self.remat
        )

    def price(self, mesh: Mesh, batch: int, *, limit: int) -> StepPlan:
        """Prices a step on a mesh.

        Args:
          mesh: from `make_mesh`, of devices that may be absent.
          batch: rows of the whole batch.
          limit: bytes of memory that a device has.

        Returns:
          The plan; see `price_step`.

        Raises:
          ValueError: if the batch or a weight doesn't divide over the mesh, or the
            config names layers that aren't there.
        """
        check_rows({"batch": batch}, mesh, accumulate=self.accumulate)
        adapted, params = self.adapted, self.params
        sharding = make_sharding(mesh, self.rules, uneven=self.uneven)
        sizes = {path: leaf.shape for path, leaf in flatten(params).items()}
        where = resolve_shardings(sizes, sharding)
        where |= adapter_shardings(where, adapted.targets(params))
        tx = lora_optimizer(1e-4, total_steps=1000)
        variables = jax.eval_shape(adapted.attach, params, jax.random.key(0))
        everywhere = NamedSharding(mesh, PartitionSpec())
        dtypes = {
            "input_ids": jnp.int32,
            "labels": jnp.int32,
            "weights": jnp.float32,
        }
        rows = batch_sharding(mesh)
        examples = {
            name: jax.ShapeDtypeStruct((batch, self.tokens), dtype, sharding=rows)
            for name, dtype in dtypes.items()
        }
        cfg = self.config
        loss = make_lm_loss(adapted, is_tied=cfg.is_tied, softcap=cfg.final_softcap)
        with uncached():
            return price_step(
                make_train_step(loss, tx, self.accumulate),
                state_shapes(variables, tx, where, everywhere),
                examples,
                limit=limit,
                remat=self.remat,
            )


@dataclasses.dataclass(frozen=True)
class SliceSteps:
    """A decoder's steps on a TPU slice.

    Attributes:
      work: what is trained.
      topology: the slice, ``"v5e:4x4"``.
      sizes: of the mesh's axes; one may be -1.
    """

    work: Workload
    topology: str
    sizes: Mapping[str, int]

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The slice's chips.

        Raises:
          ValueError: if there is no such slice, or its chips don't divide.
        """
        return make_mesh(**self.sizes, devices=open_slice(self.topology))

    def rows(self, wanted: int = 1) -> int:
        """Returns the least number of rows from ``wanted`` up that divides."""
        unit = math.prod(self.mesh.shape[axis] for axis in BATCH) * self.work.accumulate
        return -(-wanted // unit) * unit

    def price(self, rows: int, remat: str | None) -> StepPlan:
        """Prices a step; see `Workload.price`."""
        work = dataclasses.replace(self.work, remat=remat or self.work.remat)
        limit = check_topology(self.topology).memory
        return work.price(self.mesh, rows, limit=limit)

    def flops(self, plan: StepPlan) -> StepFlops:
        """Returns the arithmetic of a planned step, by formula."""
        work = dataclasses.replace(self.work, remat=plan.remat or self.work.remat)
        return work.flops(plan.batch)

    def siblings(self, wanted: int) -> dict[str, tuple["SliceSteps", int]]:
        """Returns the slices of the same chip that the mesh divides, from the smallest.

        Args:
          wanted: rows.

        Returns:
          By topology, its steps and the least number of rows that divides there.
        """
        kind = self.topology.partition(":")[0]
        found = {}
        for shape in CHIPS[kind].slices:
            steps = dataclasses.replace(self, topology=f"{kind}:{shape}")
            with contextlib.suppress(ValueError):  # the mesh doesn't divide its chips
                found[steps.topology] = steps, steps.rows(wanted)
        return found
