"""Pricing and compiling the training steps of a run's settings before running any."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lora_jax.files.fetch import find_model
from lora_jax.files.gguf import SUFFIX, GGUFReader
from lora_jax.files.tokenizer import load_tokenizer
from lora_jax.finetune import job as jobs
from lora_jax.finetune import pairs
from lora_jax.finetune.checks import check_experts, check_sequence
from lora_jax.finetune.devices import mesh_rules
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.formatting import size
from lora_jax.finetune.language import MAX_LENGTH
from lora_jax.finetune.mixed_step import mixed_hypers, mixed_shapes
from lora_jax.finetune.reporter import Reporter
from lora_jax.finetune.settings import RunSettings
from lora_jax.models.added_tokens import grow_tokenizer, train_added
from lora_jax.models.decoder import REMATS
from lora_jax.models.families import FAMILIES
from lora_jax.models.sentence_config import MODULES, read_sentence
from lora_jax.models.source import check_settings, read_config, read_settings
from lora_jax.models.stacking import can_scan
from lora_jax.models.target_names import translate_names
from lora_jax.models.tokens import name_tokens
from lora_jax.names import EXPERT, PARAMS, SEQUENCE
from lora_jax.nn.adapt import adapt
from lora_jax.nn.rows import RowAdapted
from lora_jax.parallel.mesh import make_mesh
from lora_jax.parallel.rules import make_sharding
from lora_jax.parallel.sequence import check_length
from lora_jax.plan.fit import (
    Price,
    device_memory,
    first_fitting,
    largest_batch,
    remats_from,
)
from lora_jax.plan.flops import StepFlops, pair_step_flops, step_flops
from lora_jax.plan.slices import check_topology, open_slice
from lora_jax.plan.step import StepPlan, batch_shapes, price_step, price_training
from lora_jax.plan.topology import DecoderSteps, PairSteps, TextPairSteps
from lora_jax.train.buckets import Schedule
from lora_jax.train.members import Hyper
from lora_jax.train.mixed import make_mixed_step, mixed_state
from lora_jax.train.state import TrainState
from lora_jax.train.step import TrainStep, make_train_step


class Compiled(NamedTuple):
    """A run's compiled step.

    Attributes:
      step: the step, compiled for every shape of the run.
      state: the initial state.
      plan: the plan of the longest shape.
    """

    step: TrainStep
    state: TrainState
    plan: StepPlan


class JobSteps:
    """A job's steps on this machine, with batches of its longest shape.

    Attributes:
      job: a job from `open_job`.
      batches: batches of its training split; created if not given.
      total: number of steps of the run.
      longest: the longest batch, as shapes.
      remat: the (first) remat policy; None for an encoder alone.
      limit: bytes per device.
    """

    def __init__(self, job: jobs.Job, batches: Schedule | None = None) -> None:
        self.job, self.batches = job, job.batches() if batches is None else batches
        per_epoch = self.batches.steps_per_epoch
        self.total = jobs.total_steps(job.settings.train, per_epoch)
        number = max(range(min(self.total, per_epoch)), key=self.batches.length_at)
        self.longest = self.batches.shapes_at(number)
        first = job.settings.model.first_remat(jax.default_backend())
        has_remat = job.loaded.family.kind != "encoder"
        self.remat = first if has_remat else None
        self.limit = device_memory(jax.local_devices()[0])

    @functools.cached_property
    def hypers(self) -> Hyper:
        """The optimizers' numbers of a job with several adapters."""
        return mixed_hypers(self.job, self.batches, self.total)

    @functools.cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer of a job with one adapter."""
        return jobs.optimizer(self.job.settings.train, self.total)

    def make(self, adapted: Any) -> TrainStep:
        """Makes the step of the job's model, with the remat policy to use."""
        job, accumulate = self.job, self.job.settings.train.accumulate
        if job.adapters:
            loss_fn = job.loss(RowAdapted(adapted), is_training=True)
            return make_mixed_step(loss_fn, self.hypers, accumulate)
        loss_fn = job.loss(adapted, is_training=True)
        return make_train_step(loss_fn, self.optimizer, accumulate)

    def price(
        self, rows: int, remat: str | None, *, trains_all: bool = False
    ) -> StepPlan:
        """Prices a step.

        Args:
          rows: batch size.
          remat: a decoder's remat policy.
          trains_all: whether to train the whole base, without adapters; this step is
            compiled for comparison even if it is too large.
        """
        job, loaded, train = self.job, self.job.loaded, self.job.settings.train
        module = loaded.module if remat is None else loaded.module.clone(remat=remat)
        variables = {PARAMS: loaded.params}
        if trains_all:
            train = dataclasses.replace(train, lora_b_ratio=1.0)  # there is no B
        else:
            module = adapt(module, job.lora, *loaded.inputs)
            variables = job.variables
        options: dict[str, Any] = {"limit": self.limit, "remat": remat}
        if job.adapters and not trains_all:
            batch = batch_shapes(self.longest, rows, job.devices.mesh)
            state = mixed_shapes(job, self.hypers)
            return price_step(self.make(module), state, batch, **options)
        return price_training(
            job.loss(module, is_training=True),
            jobs.optimizer(train, self.total),
            variables,
            self.longest,
            rows,
            accumulate=train.accumulate,
            even_if_too_large=trains_all,
            **options,
        )

    @property
    def policies(self) -> Sequence[str | None]:
        """The remat policies to choose from, the fastest first."""
        is_free = self.job.settings.model.remat == "auto"
        return remats_from(self.remat) if is_free else [self.remat]

    def choose(self, price: Price) -> StepPlan:
        """Returns the plan of the first remat policy that fits, using ``price``.

        Raises:
          UserError: if the step does not fit with the policy of the settings, or with
            any policy if that is "auto"; suggests what would.
        """
        rows, _ = self.longest["input_ids"].shape
        _, tried = first_fitting(lambda remat: price(rows, remat), self.policies)
        *_, plan = tried.values()
        if not plan.fits:
            raise too_large(plan, "this machine", self.suggestion(plan))
        return plan

    def compile(self, out: Reporter) -> Compiled:
        """Compiles the step for every shape of the run, the longest first.

        It is compiled from shapes, and rejected before it fills the memory. A decoder's
        ``remat`` is set to the policy that fits.

        Args:
          out: where to show progress.

        Raises:
          UserError: if the step doesn't fit the device; suggests what does.
        """
        job, key = self.job, jax.random.key(self.job.settings.train.seed)
        if job.adapters:
            state = mixed_shapes(job, self.hypers)
        else:
            state = TrainState.create(job.variables, self.optimizer, key)
        longest, *others = self._shapes()
        made: list[TrainStep] = []

        def price(rows: int, remat: str | None) -> StepPlan:
            del rows  # given by the shape
            if remat is not None:
                job.set_remat(remat)
            made.append(self.make(job.adapted))
            return price_step(made[-1], state, longest, limit=self.limit, remat=remat)

        with out.progress("compile", 1 + len(others)) as tick:
            plan = self.choose(price)
            tick(1, f"{plan.tokens} tokens")
            for number, shape in enumerate(others, start=2):
                tick(number, f"{price_step(made[-1], state, shape).tokens} tokens")
        if job.adapters:
            state = mixed_state(job.variables, self.hypers, key)
        return Compiled(made[-1], state, plan)

    def _shapes(self) -> list[dict[str, Any]]:
        """Returns the batch shapes of the run, longest first."""
        batches, found = self.batches, dict[int, int]()
        for number in range(min(self.total, batches.steps_per_epoch)):
            found.setdefault(batches.length_at(number), number)
            if len(found) == len(batches.buckets):
                break
        rows, mesh = batches.batch_size, self.job.devices.mesh
        return [
            batch_shapes(batches.shapes_at(found[length]), rows, mesh)
            for length in sorted(found, reverse=True)
        ]

    def suggestion(self, plan: StepPlan, price: Price | None = None) -> str:
        """Suggests what would fit instead of a step, using ``price`` or `price`."""
        price = price or self.price
        policies = list(REMATS)
        tried = len(policies) if plan.remat is None else policies.index(plan.remat) + 1
        for remat in policies[tried:]:
            plan = price(plan.batch, remat)
            if plan.fits:
                return (
                    f"With model.remat={plan.remat} it fits: {size(plan.total)}. "
                    "model.remat=auto chooses it automatically."
                )
        unit = self.job.settings.train.accumulate * self.job.devices.parts
        if found := largest_batch(lambda rows: price(rows, plan.remat), unit):
            return (
                f"The largest batch that fits is train.batch_size={found.batch}: "
                f"{size(found.total)}."
            )
        fewer = ""
        if count := len(self.job.adapters):
            state = size(plan.trained + plan.optimizer)
            fewer = (
                f", or fewer adapters in a run: the weights and optimizer state of "
                f"{count:,} adapters take {state}"
            )
        return (
            "Even the smallest batch does not fit: use shorter rows (data.max_length) "
            f"or model.param_dtype=bfloat16{fewer}."
        )

    def flops(self, plan: StepPlan, full: StepPlan) -> StepFlops:
        """Returns the FLOPs of two steps, with adapters and with everything trained.

        A decoder's are computed by formula, because cuDNN's attention can't be traced.
        """
        if plan.remat is None or not self.job.has_formula:
            return StepFlops(plan.flops, full.flops)
        loaded, counted = self.job.loaded, (plan.batch, plan.tokens)
        common = (loaded.config, loaded.params, self.job.targets)
        if loaded.family.has_source:
            written = self.longest["labels"].shape[1]
            return pair_step_flops(*common, *counted, written, plan.remat)
        return step_flops(*common, *counted, plan.remat)


def too_large(plan: StepPlan, device: str, suggestion: str) -> UserError:
    """Returns the error for a step that does not fit, with a suggestion."""
    least = "" if plan.temporaries else "at least "  # only weights, if not compiled
    each = f" on each of {plan.devices} devices" if plan.devices > 1 else ""
    policy = f" with remat {plan.remat}" if plan.remat else ""
    return UserError(
        f"a step of {plan.batch} x {plan.tokens} tokens needs {least}"
        f"{size(plan.total)}{each}{policy}; {device} has {size(plan.limit)}. "
        f"{suggestion}"
    )


def slice_steps(
    settings: RunSettings, topology: str, mesh: Mapping[str, int], tokens: int | None
) -> DecoderSteps:
    """Returns a model's steps on a TPU slice, from the settings and its config only.

    Args:
      settings: settings of the run.
      topology: the slice, e.g. ``"v5e:4x4"``.
      mesh: sizes of the mesh axes; one may be -1.
      tokens: tokens per row; None for ``data.max_length``.

    Raises:
      UserError: if the model is an encoder alone, or a row exceeds its context.
      ValueError: if the slice does not exist, or the mesh doesn't divide it.
    """
    limit, found = check_topology(topology).memory, find_model(settings.model.path)
    if found.suffix == SUFFIX:
        config_json = check_settings(GGUFReader(found).config, found)
    else:
        config_json = read_settings(found)
    family = FAMILIES[config_json["model_type"]]
    config = read_config(family, config_json, found)
    if family.kind == "encoder" or not getattr(config, "num_decoder_layers", 1):
        raise UserError(
            f"--topology requires a decoder; {found} is a {config_json['model_type']}, "
            "an encoder. Omit --topology to compile its step for this machine."
        )
    check_experts(config, settings, axis=mesh.get(EXPERT, 1))
    check_sequence(family.kind, config, mesh.get(SEQUENCE, 1))
    default = pairs.MAX_LENGTH if family.has_source else MAX_LENGTH
    tokens = tokens or min(settings.data.max_length or default, config.max_positions)
    if tokens > config.max_positions:
        raise UserError(
            f"--tokens must be at most the model's context, {config.max_positions}; "
            f"got {tokens}."
        )
    check_length(tokens, mesh)
    inner = config_json.get("text_config")  # of a multimodal model
    both = (inner if isinstance(inner, dict) else {}) | config_json
    stored = both.get("dtype", both.get("torch_dtype"))
    lora = translate_names(settings.lora, family, config)
    tokenizer, new = load_tokenizer(found), settings.model.add_tokens
    if new:
        tokenizer = grow_tokenizer(tokenizer, new, str(found))
        ids = [tokenizer.token_id(token) or 0 for token in new]
        size = max(config.vocab_size, *(i + 1 for i in ids))
        config = dataclasses.replace(config, vocab_size=size)
        trained = train_added(lora, ids, is_tied=config.is_tied)
        lora = dataclasses.replace(lora, tokens=trained)
    lora = name_tokens(lora, tokenizer, config.vocab_size)
    options: dict[str, Any] = {
        "dtype": jnp.dtype(settings.model.dtype),
        "remat": settings.model.first_remat("tpu"),
    }
    make = DecoderSteps
    if family.has_source:
        is_tied = config_json.get("tie_word_embeddings", True)  # no file says it here
        config, make = dataclasses.replace(config, is_tied=bool(is_tied)), PairSteps
    else:
        scan = settings.model.scan
        options["scan_layers"] = can_scan(lora, config) if scan is None else scan
        options["sentence"] = read_sentence(found) if found.is_dir() else None
    if options.get("sentence") is not None or not config.predicts:
        make = _embedding_steps(options, found)
        config = dataclasses.replace(config, has_head=False)
    devices = make_mesh(**mesh, devices=open_slice(topology))
    return make(
        family.module(config, **options),
        lora,
        tokens,
        make_sharding(devices, mesh_rules(settings), uneven=settings.mesh.uneven),
        limit,
        param_dtype=jnp.dtype(settings.model.param_dtype or stored or "float32"),
        accumulate=settings.train.accumulate,
        router_aux_loss_coef=settings.train.router_aux_loss_coef,
    )


def _embedding_steps(options: Mapping[str, Any], path: Path) -> type[DecoderSteps]:
    """Returns the steps of a decoder that makes embeddings; raises if none says how."""
    if options.get("sentence") is None:
        raise UserError(
            f"{path} must have a {MODULES}, which says how a model that does not "
            "predict tokens makes embeddings; it has none."
        )
    return TextPairSteps
