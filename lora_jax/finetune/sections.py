"""The sections of a run's settings, and what each of their keys means."""

import dataclasses
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from lora_jax.config import LEAST

LARGEST = (1 << 31) - 1  # of an int32


def _check_float(value: float) -> float:
    if 0 < value < LEAST:
        raise ValueError(f"must be at least {LEAST:g}, as float32 has it")
    return value


Float = Annotated[float, Field(le=1e30, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Index = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[Float, Field(gt=0), AfterValidator(_check_float)]
NotNegative = Annotated[Float, Field(ge=0), AfterValidator(_check_float)]
Fraction = Annotated[NotNegative, Field(lt=1)]
Devices = Annotated[int, Field(le=LARGEST)]
Axis = Literal["data", "fsdp", "tensor"] | None


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """Which pretrained model to start from.

    Attributes:
      path: a Hugging Face folder, a GGUF file, a hub id (``owner/name``), or a model
        that an installed Python package ships (``package:NAME/path``).
      pooling: the sentence vector of an encoder: the ``"mean"`` over unmasked tokens,
        the ``"cls"`` token, or BERT's own ``"pooler"``.
      dtype: dtype of the computation.
      param_dtype: dtype of the frozen parameters; null keeps their file's.
      scan: whether a decoder's blocks are compiled once, as a loop; null means yes
        where the adapters of all blocks are alike. An unrolled step compiles longer and
        runs faster on a GPU.
      remat: what the backward pass of a decoder computes again to save memory:
        ``"none"``, what is cheap (``"lora"``), or each whole ``"block"``; ``"auto"``
        takes ``lora``, and ``block`` where a step doesn't fit without it.
    """

    path: str
    pooling: Literal["mean", "cls", "pooler"] = "mean"
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] | None = None
    scan: bool | None = None
    remat: Literal["auto", "none", "lora", "block"] = "auto"

    @property
    def first_remat(self) -> str:
        """The policy to begin with."""
        return "lora" if self.remat == "auto" else self.remat


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Which examples: one JSONL file for each split.

    Attributes:
      train: a JSONL file. Its lines are ``{"text": str, "label": int or str}`` for an
        encoder; ``{"messages"}``, ``{"prompt", "completion"}``, ``{"text"}`` or
        ``{"input_ids"}`` for a decoder.
      validation: the same, to choose the best step by; null takes it from ``train``.
      test: the same, scored once at the end; null for none.
      holdout: the fraction of ``train`` that becomes the validation split where there
        is no file of one.
      seed: seed of the choice of what is held out.
      max_length: tokens kept of each example, special ones included; null for 128
        (encoders) or 1,024 (decoders).
      packing: whether a decoder's rows of ``max_length`` tokens hold several examples,
        which don't see each other.
    """

    train: str
    validation: str | None = None
    test: str | None = None
    holdout: Annotated[Positive, Field(lt=1)] = 0.05
    seed: Index = 0
    max_length: Annotated[int, Field(ge=3, le=LARGEST)] | None = None
    packing: bool = False


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
      epochs: passes over the training split.
      max_steps: stop after this many steps; null for all of ``epochs``. The schedule
        is stretched over the steps that are run.
      batch_size: examples in a step.
      accumulate: micro-batches that a step is cut into; divides ``batch_size``.
      learning_rate: peak of the schedule.
      lora_b_ratio: learning rate of B divided by that of A (LoRA+).
      schedule: shape of the learning rate after warmup.
      warmup: fraction of the steps over which the learning rate rises from 0.
      weight_decay: decoupled, on trained weights.
      clip_norm: largest global norm of the trainable gradient; null for no clipping.
      label_smoothing: probability taken from an encoder's label and spread over all
        classes.
      seed: seed of A, the head, dropout and the order of the examples.
      log_every: steps between lines of metrics.jsonl.
      eval_every: steps between validations; null for twice an epoch.
      save_every: steps between checkpoints; null for one at every validation.
      keep: number of latest checkpoints kept, besides the best.
      patience: stop after this many validations without a better one; null never does.
      samples: prompts that a decoder continues at every validation, for the log; if it
        learns from messages, they are what a user says.
      baseline: whether to measure the frozen base (an encoder's with a linear head
        fitted to it) for comparison.
    """

    epochs: Count = 1
    max_steps: Count | None = None
    batch_size: Count = 32
    accumulate: Count = 1
    learning_rate: Positive = 1e-3
    lora_b_ratio: Positive = 1.0
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Fraction = 0.1
    weight_decay: NotNegative = 0.0
    clip_norm: Positive | None = 1.0
    label_smoothing: Fraction = 0.0
    seed: Index = 0
    log_every: Count = 10
    eval_every: Count | None = None
    save_every: Count | None = None
    keep: Count = 2
    patience: Count | None = None
    samples: tuple[str, ...] = ()
    baseline: bool = True


@dataclasses.dataclass(frozen=True)
class OutputSettings:
    """Where the run folder goes.

    Attributes:
      dir: the run folder. It must not exist yet, unless ``--resume`` or
        ``--overwrite`` is given.
    """

    dir: str


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """How the devices of all processes are arranged, and what each of them holds.

    Attributes:
      data: groups of devices, each with a copy of the model and a part of the batch. -1
        (for one of the three sizes) means the devices that are left.
      fsdp: devices that share each copy's kernels and its part of the batch.
      tensor: devices that share each layer's outputs.
      member: of a sweep alone: devices that its runs are split over, each with the
        whole model.
      uneven: what to do where a weight's axis doesn't divide: ``"error"``, or
        ``"replicate"``, which leaves the axis whole on every device.
      rules: mesh axes for each axis of the weights whose path ends in the key, as in
        ``{"mlp/up/kernel": [fsdp, null]}``; tried before the built-in rules.
    """

    data: Devices = -1
    fsdp: Devices = 1
    tensor: Devices = 1
    member: Count = 1
    uneven: Literal["error", "replicate"] = "error"
    rules: dict[str, tuple[Axis, ...]] = dataclasses.field(default_factory=dict)
