"""The sections of a run's settings, with the documentation of each key."""

import dataclasses
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from lora_jax.config import LEAST

LARGEST = (1 << 31) - 1  # int32


def _check_float(value: float) -> float:
    if 0 < value < LEAST:
        raise ValueError(
            f"must be at least {LEAST:g}; smaller values underflow in float32"
        )
    return value


Float = Annotated[float, Field(le=1e30, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Index = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[Float, Field(gt=0), AfterValidator(_check_float)]
NotNegative = Annotated[Float, Field(ge=0), AfterValidator(_check_float)]
Fraction = Annotated[NotNegative, Field(lt=1)]
Devices = Annotated[int, Field(le=LARGEST)]
Axis = Literal["data", "fsdp", "tensor", "expert", "sequence"] | None


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """Which pretrained model to start from.

    Attributes:
      path: a Hugging Face folder, a GGUF file, a hub id (``owner/name``), or a model in
        an installed Python package (``package:NAME/path``).
      pooling: an encoder's sentence vector: the ``"mean"`` over unmasked tokens, the
        ``"cls"`` token, or BERT's own ``"pooler"``.
      dtype: dtype of the computation.
      param_dtype: dtype of the frozen parameters; null for that of the file.
      add_tokens: new tokens of a decoder, such as ``<tool>``: they are added to its
        tokenizer and to its embedding (and head), with rows that start as the mean of
        the others and are trained.
      scan: whether to compile a decoder's blocks once, as a loop; null for yes if the
        adapters of all blocks are alike. Unrolled blocks take longer to compile but run
        faster on a GPU.
      remat: what a decoder recomputes in the backward pass to save memory: ``"none"``,
        cheap activations (``"lora"``), or each whole ``"block"``; ``"auto"`` is
        ``lora``, or ``block`` if the step doesn't fit otherwise; on a TPU ``none`` if
        it fits.
    """

    path: str
    pooling: Literal["mean", "cls", "pooler"] = "mean"
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] | None = None
    add_tokens: tuple[str, ...] = ()
    scan: bool | None = None
    remat: Literal["auto", "none", "lora", "block"] = "auto"

    def first_remat(self, platform: str) -> str:
        """Returns the remat policy to try first, the fastest on a platform."""
        if self.remat != "auto":
            return self.remat
        return "none" if platform == "tpu" else "lora"


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """The examples: one JSONL file for each split.

    Attributes:
      train: a JSONL file. Its lines are ``{"text": str, "label": int or str}`` for an
        encoder; ``{"messages"}``, ``{"prompt", "completion"}``, ``{"text"}`` or
        ``{"input_ids"}`` for a decoder; ``{"prompt", "completion"}`` or ``{"input_ids",
        "labels"}`` for an encoder–decoder. Beside ``messages`` there may be ``tools``;
        an assistant's message with ``"weight": 0`` is read and not trained on. Lines
        ``{"anchor", "positive"}``, maybe with a ``"negative"`` (``"query"`` may stand
        for ``"anchor"``), train the embeddings of an encoder, or of another model with
        a ``modules.json``, by contrast with the other texts of a batch. If the
        lines of all files also have ``"adapter": NAME`` (not for an encoder–decoder),
        the run trains an adapter for each name, on batches that mix them: each is
        updated by its own lines alone, only in steps that have some of them, and has
        its own moments, schedule and best step. It is kept in ``adapters/NAME`` of the
        run folder.
      validation: the same, to choose the best step; null to hold out a part of
        ``train`` (of each adapter's lines if there are several).
      test: the same, evaluated once at the end; null for none.
      holdout: the fraction of ``train`` held out for validation if there is no file.
      seed: seed for choosing the held-out examples.
      max_length: maximum tokens per example, including special ones; null for 128
        (encoders), 512 (encoder–decoders: of a prompt and of a completion), 1,024
        (decoders) or 256 (embeddings, or the model's own limit if that is lower).
      packing: whether to pack a decoder's examples into rows of ``max_length`` tokens;
        they don't attend to each other.
      query_prompt: of pairs of texts, the name of the model's prompt to put before each
        anchor, such as ``"query"``; null for its default one, if it has one.
      document_prompt: the same for the positive and negative texts.
    """

    train: str
    validation: str | None = None
    test: str | None = None
    holdout: Annotated[Positive, Field(lt=1)] = 0.05
    seed: Index = 0
    max_length: Annotated[int, Field(ge=3, le=LARGEST)] | None = None
    packing: bool = False
    query_prompt: str | None = None
    document_prompt: str | None = None


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Attributes:
      epochs: passes over the training split.
      max_steps: maximum number of steps; null for all of ``epochs``. The schedule spans
        the steps that are run.
      batch_size: examples per step.
      accumulate: number of micro-batches per step; must divide ``batch_size``.
      learning_rate: peak of the schedule.
      lora_b_ratio: learning rate of B divided by that of A (LoRA+).
      schedule: shape of the learning rate after warmup.
      warmup: fraction of the steps over which the learning rate rises from 0.
      weight_decay: decoupled weight decay of trained weights.
      clip_norm: maximum global norm of the trainable gradient; null for no clipping.
      label_smoothing: probability moved from an encoder's label to all classes.
      temperature: by which cosines are divided in the loss of embeddings.
      router_aux_loss_coef: weight of the load-balancing loss of a mixture of experts,
        which is added to the training loss; 0 for none.
      seed: seed of A, the head, dropout and the order of the examples.
      log_every: steps between lines of metrics.jsonl.
      eval_every: steps between validations; null for twice per epoch.
      save_every: steps between checkpoints; null for one per validation.
      keep: number of latest checkpoints to keep, besides the best.
      patience: stop after this many validations without improvement; null for never.
      samples: prompts for a decoder to continue at every validation, for the log; user
        messages if it is trained on messages. A list of messages with ``role`` and
        ``content``, a system message first say, is a prompt too.
      baseline: whether to evaluate the frozen base for comparison (an encoder's with a
        linear head fitted to it).
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
    temperature: Positive = 0.05
    router_aux_loss_coef: NotNegative = 0.0
    seed: Index = 0
    log_every: Count = 10
    eval_every: Count | None = None
    save_every: Count | None = None
    keep: Count = 2
    patience: Count | None = None
    samples: tuple[str | tuple[dict[str, str], ...], ...] = ()
    baseline: bool = True


@dataclasses.dataclass(frozen=True)
class OutputSettings:
    """The run's output.

    Attributes:
      dir: the run folder. It must not exist yet, except with ``--resume`` or
        ``--overwrite``.
    """

    dir: str


@dataclasses.dataclass(frozen=True)
class MeshSettings:
    """The mesh of devices of all processes, and how weights are sharded over it.

    Attributes:
      data: number of copies of the model, each for a part of the batch. One of the
        three sizes may be -1, for the remaining devices.
      fsdp: number of devices over which each copy's kernels and its part of the batch
        are sharded.
      tensor: number of devices over which each layer's outputs are sharded.
      expert: number of devices over which the experts of a mixture are split; each has
        a copy of the rest of the model, and the same part of the batch.
      sequence: number of devices over which the tokens of each row are split, for long
        rows; each has a copy of the model. Causal decoders only.
      member: number of devices over which the runs of a sweep are split, each with the
        whole model; 1 for a run of its own.
      uneven: what to do if a weight's axis is not divisible: ``"error"``, or
        ``"replicate"`` the axis on every device.
      rules: mesh axes for each axis of the weights whose path ends in the key, e.g.
        ``{"mlp/up/kernel": [fsdp, null]}``; tried before the built-in rules.
    """

    data: Devices = -1
    fsdp: Devices = 1
    tensor: Devices = 1
    expert: Count = 1
    sequence: Count = 1
    member: Count = 1
    uneven: Literal["error", "replicate"] = "error"
    rules: dict[str, tuple[Axis, ...]] = dataclasses.field(default_factory=dict)
