"""The task of an embedding model: to tell texts that belong together from all others.

It is chosen by the training file: lines with an ``anchor`` and a ``positive``.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from lora_jax.array_types import PyTree
from lora_jax.finetune.devices import Devices
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.held_out import hold_out
from lora_jax.finetune.job import (
    EVAL_ROWS,
    EvalStep,
    Facts,
    Job,
    Split,
    attach,
    data_files,
    load,
)
from lora_jax.finetune.mixed_data import names_adapters
from lora_jax.finetune.settings import RunSettings
from lora_jax.finetune.texts import encode_texts, prompt_of, with_prompt
from lora_jax.models.dual import DualConfig
from lora_jax.models.encoder_config import ImageEncoderConfig
from lora_jax.models.sentence_config import MODULES
from lora_jax.models.source import Source
from lora_jax.names import OWNER
from lora_jax.parallel.activation_sharding import on_mesh_of
from lora_jax.parallel.mesh import mesh_of
from lora_jax.parallel.processes import fail_together
from lora_jax.train.buckets import Schedule
from lora_jax.train.embedding import embed_roles, embedding_loss, pair_loss
from lora_jax.train.step import LossFn
from lora_jax.train.text_pairs import (
    ARRAYS,
    TextPairBatches,
    by_role,
    read_text_pairs,
)

MAX_LENGTH = 256
CHUNK = 1024  # queries that are compared with all keys at once
Rows = list[tuple[str, ...]]


@dataclasses.dataclass
class Embeddings(Job):
    """See `Job`."""

    unit: ClassVar[str] = "pairs"
    weight: ClassVar[str] = "pairs"
    metrics: ClassVar[tuple[str, ...]] = ("loss", "accuracy")
    best_mode: ClassVar[str] = "max"
    has_formula: ClassVar[bool] = False

    @property
    def method(self) -> str:
        """The model's method that returns embeddings."""
        return "embed" if self.loaded.family.kind == "encoder" else "encode"

    @property
    def max_length(self) -> int:
        """Maximum tokens of a text."""
        longest = self.loaded.config.max_positions
        own = self.loaded.sentence and self.loaded.sentence.max_length
        asked = self.settings.data.max_length or min(MAX_LENGTH, own or MAX_LENGTH)
        return min(asked, longest)

    def loss(self, module: Any, *, is_training: bool, copies: int = 1) -> LossFn:
        """Returns the contrastive loss; every other key of a batch is a negative."""
        del is_training, copies
        temperature = self.settings.train.temperature
        inner = embedding_loss(module, method=self.method, temperature=temperature)
        return lambda variables, batch, rngs: inner(variables, by_role(batch), rngs)

    def eval_step(self, module: Any, *, copies: int = 1) -> EvalStep:
        """See `Job.eval_step`; also returns the embeddings, on every device."""
        del copies
        ways = (self.method, self.method)
        temperature = self.settings.train.temperature

        def run(variables, batch, mesh):
            with on_mesh_of(mesh):
                found = embed_roles(module, variables, by_role(batch), ways, {})
                weights = batch["weights"]
                loss, weight, _ = pair_loss(found, weights, temperature=temperature)
            return {**found, "loss": loss, "weight": weight, "weights": weights}

        where = self.devices.everywhere
        compiled = jax.jit(run, static_argnums=2, out_shardings=where)
        return lambda variables, batch: compiled(variables, batch, mesh_of(variables))

    def measure(
        self, step: EvalStep, variables: PyTree, batches: Iterable[Any]
    ) -> dict[str, float]:
        """See `Job.measure`; the accuracy is that among the keys of all batches."""
        loss, weight = 0.0, 0.0
        found: dict[str, list[np.ndarray]] = {}
        for batch in batches:
            sums = jax.device_get(step(variables, batch))
            loss, weight = loss + float(sums["loss"]), weight + float(sums["weight"])
            is_real = sums["weights"] != 0
            for role in ARRAYS.keys() & sums.keys():
                found.setdefault(role, []).append(sums[role][is_real])
        together = {role: np.concatenate(parts) for role, parts in found.items()}
        hits = share_nearest(**together)
        return {"loss": loss / weight, "accuracy": hits, "weight": weight}

    @property
    def eval_rows(self) -> int:
        """See `Job.eval_rows`; a pair alone would have no negatives."""
        return self.devices.rows(max(2, min(EVAL_ROWS, self.settings.train.batch_size)))

    def lengths(self, split: Split) -> list[int]:
        """See `Job.lengths`; a pair's texts are padded to one length."""
        return [max(map(len, example["texts"])) for example in split.examples]

    def schedule(
        self, split: Split, rows: int, buckets: list[int] | None, **order: Any
    ) -> Schedule:
        """See `Job.schedule`."""
        return TextPairBatches(split.examples, rows, buckets, **order)

    def tokenize(self, rows: Rows) -> Split:
        """Tokenises texts, with the prompts of the settings before them."""
        data = self.settings.data
        examples: list[dict[str, Any]] = [{"texts": []} for _ in rows]
        cut = 0
        for place in range(len(rows[0])):
            name = data.document_prompt if place else data.query_prompt
            texts = with_prompt(self.loaded, [row[place] for row in rows], name)
            found = encode_texts(self.loaded, texts, max_length=self.max_length)
            cut += found.truncated
            for example, ids in zip(examples, found.ids, strict=True):
                example["texts"].append(ids)
        return Split(examples, cut)

    def tokenize_file(self, path: str) -> Split:
        """See `Job.tokenize_file`."""
        return self.tokenize(read_text_pairs(path))

    def data_facts(self, batches: Schedule) -> Facts:
        """See `Job.data_facts`."""
        data, lengths = self.settings.data, batches.lengths
        padded = ", ".join(map(str, batches.buckets))
        tokens = (
            f"mean {lengths.mean():.1f} in a pair's longest text, padded to {padded}"
        )
        if cut := sum(split.truncated for split in self.splits.values()):
            tokens += f"; {cut:,} texts truncated to {self.max_length}"
        prompts = {"query": data.query_prompt, "document": data.document_prompt}
        shown = [
            f"{kind} {prompt_of(self.loaded, name)!r}" for kind, name in prompts.items()
        ]
        way = "as modules.json says" if self.loaded.sentence else "mean of the tokens"
        return [
            ("data", self.sizes),
            ("embedding", way),
            ("prompts", ", ".join(shown)),
            ("tokens", tokens),
            ("negatives", f"{self._negatives()} for each query of a batch"),
        ]

    def _negatives(self) -> int:
        train, first = self.settings.train, self.splits["train"].examples[0]
        rows = train.batch_size // train.accumulate
        return (len(first["texts"]) - 1) * rows - 1

    def extra(self) -> dict[str, Any]:
        """See `Job.extra`."""
        return {"max_length": self.settings.data.max_length}


def share_nearest(
    queries: np.ndarray, keys: np.ndarray, negatives: np.ndarray | None = None
) -> float:
    """Returns the share of queries whose own key is nearest, by cosine.

    Args:
      queries: ``[n, e]``.
      keys: ``[n, e]``; ``keys[i]`` belongs to ``queries[i]``. Equal keys count as one.
      negatives: keys of no query ``[m, e]``, or None.

    Example:
      >>> keys, negatives = np.array([[3.0, 1.0], [2.0, 1.0]]), np.array([[1.0, 0.0]])
      >>> share_nearest(np.eye(2), keys), share_nearest(np.eye(2), keys, negatives)
      (1.0, 0.5)
    """

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)

    queries, own = unit(queries), unit(keys)
    known = own if negatives is None else np.concatenate([own, unit(negatives)])
    hits = 0
    for start in range(0, len(queries), CHUNK):
        some = slice(start, start + CHUNK)
        best = (queries[some] @ known.T).max(axis=-1)
        hits += int(np.sum(np.sum(queries[some] * own[some], axis=-1) >= best - 1e-6))
    return hits / len(queries)


def open_embeddings(
    settings: RunSettings, devices: Devices, source: Source, *, splits: Sequence[str]
) -> Embeddings:
    """Builds the job; see `open_job`."""
    _check(settings, source.config)
    with fail_together():
        loaded = load(settings, devices, source)
        if source.family.kind == "decoder" and loaded.sentence is None:
            raise UserError(
                f"{loaded.path} must have a {MODULES}, which says how a decoder makes "
                "embeddings; it has none. Train it on prompts and completions, or take "
                "an embedding model."
            )
        files = data_files(settings.data, splits)
        rows = {name: read_text_pairs(file) for name, file in files.items()}
        if len({len(own[0]) for own in rows.values()}) > 1:
            raise UserError(
                "all files must have a 'negative' in their lines, or none; got "
                + ", ".join(f"{n} {len(own[0]) - 2}" for n, own in rows.items())
            )
    job = Embeddings(splits={}, **attach(settings, devices, loaded, settings.lora))
    found = hold_out(rows, settings.data)
    job.splits = {name: job.tokenize(found[name]) for name in found if name in splits}
    return job


def _check(settings: RunSettings, config: Any) -> None:
    """Raises one error for all settings that embeddings can't have."""
    data, train, faults = settings.data, settings.train, []
    if isinstance(config, (DualConfig, ImageEncoderConfig)):
        faults.append(
            f"the model must read texts only; its config is a {type(config).__name__}"
        )
    if getattr(config, "is_siglip", False):
        faults.append("the model must not be SigLIP's, which sees its padding")
    if data.packing or train.samples:
        faults.append("data.packing and train.samples are for decoders of text")
    if train.label_smoothing or train.router_aux_loss_coef:
        faults.append(
            "train.label_smoothing and train.router_aux_loss_coef must be 0; got "
            f"{train.label_smoothing} and {train.router_aux_loss_coef}"
        )
    if settings.model.pooling != "mean":
        faults.append(
            "model.pooling must be 'mean': any other is modules.json's to say; "
            f"got {settings.model.pooling!r}"
        )
    if train.batch_size // train.accumulate < 2:
        faults.append(
            "train.batch_size must be at least 2 for each of train.accumulate = "
            f"{train.accumulate}, as a pair's negatives are the others; got "
            f"{train.batch_size}"
        )
    if settings.lora.init == "eva":
        faults.append("lora.init must not be 'eva', whose inputs are one text a row")
    if settings.mesh.sequence != 1:
        faults.append(f"mesh.sequence must be 1; got {settings.mesh.sequence}")
    if names_adapters(data):
        faults.append(f"pairs of texts can't name their {OWNER}")
    if faults:
        raise UserError("embeddings are trained on pairs: " + "; ".join(faults) + ".")
