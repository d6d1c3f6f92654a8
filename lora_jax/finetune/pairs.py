"""The task of an encoder–decoder: prompts that it reads, completions that it writes."""

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from lora_jax.files.messages import Message
from lora_jax.files.tokenizer import Tokenizer
from lora_jax.finetune.devices import Devices
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.job import (
    Facts,
    Split,
    attach,
    load,
)
from lora_jax.finetune.language import Language, check_no_classes
from lora_jax.finetune.settings import RunSettings
from lora_jax.models.source import Source
from lora_jax.parallel.processes import fail_together
from lora_jax.train.buckets import Schedule
from lora_jax.train.causal_lm import make_lm_loss
from lora_jax.train.pairs import (
    INPUTS,
    PairBatches,
    encode_source,
    read_pairs,
)
from lora_jax.train.step import LossFn
from lora_jax.train.text import TextData

MAX_LENGTH = 512


@dataclasses.dataclass
class Pairs(Language):
    """See `Job`; as `Language`, but a prompt is the encoder's."""

    default_length: ClassVar[int] = MAX_LENGTH

    def loss(self, module: Any, *, is_training: bool, copies: int = 1) -> LossFn:
        """Returns the cross-entropy of the targets' tokens."""
        del is_training
        return make_lm_loss(
            module,
            is_tied=self.loaded.config.is_tied,
            inputs=INPUTS,
            chunk=self.chunk(copies),
        )

    def schedule(
        self, split: Split, rows: int, buckets: list[int] | None, **order: Any
    ) -> Schedule:
        """See `Job.schedule`."""
        start = self.loaded.config.start_id
        return PairBatches(split.examples, rows, buckets, start_id=start, **order)

    def read(self, path: str, owners: Sequence[int] | None = None) -> TextData:
        """See `Language.read`; each line is an example."""
        del owners
        data = read_pairs(
            path,
            self.loaded.tokenizer,
            max_length=self.max_length,
            vocab_size=self.loaded.config.vocab_size,
        )
        lines = [*range(len(data.examples))]
        return TextData(data.examples, lines, data.truncated, 0, 0, "pairs", {})

    def data_facts(self, batches: Schedule) -> Facts:
        """See `Job.data_facts`."""
        assert isinstance(batches, PairBatches)  # from `batches`
        lengths = [len(e["labels"]) for e in self.splits["train"].examples]
        sources, mean = batches.lengths, sum(lengths) / len(lengths)
        return [
            ("data", self.sizes),
            (
                "prompts",
                f"mean {sources.mean():.1f} tokens, max {sources.max()}; padded to "
                f"{', '.join(map(str, batches.buckets))}",
            ),
            (
                "targets",
                f"mean {mean:.1f} tokens, max {max(lengths)}; {batches.targets:,} "
                f"({batches.token_fraction:.0%} of all positions are tokens)",
            ),
            *self.cut_facts(),
        ]

    def encode_sample(
        self, prompt: str | Sequence[Message], tokenizer: Tokenizer
    ) -> list[int]:
        """See `Language.encode_sample`."""
        if not isinstance(prompt, str):
            raise UserError(
                "train.samples must be texts for an encoder–decoder, which has no "
                "chats; got messages."
            )
        return encode_source(prompt, tokenizer)


def open_pairs(
    settings: RunSettings, devices: Devices, source: Source, *, splits: Sequence[str]
) -> Pairs:
    """Builds the job; see `open_job`."""
    check_no_classes(settings)
    if settings.data.packing:
        raise UserError(
            "data.packing must be false for an encoder–decoder: a packed row has no "
            "source of its own. Prompts are padded to few lengths instead."
        )
    with fail_together():
        loaded = load(settings, devices, source)
        if not loaded.config.predicts:
            raise UserError(
                f"{loaded.path} must have a decoder to be trained; it is the encoder "
                "of one alone. Train its embeddings on pairs of texts, lines with an "
                "'anchor' and a 'positive'."
            )
    job = Pairs(splits={}, **attach(settings, devices, loaded, settings.lora))
    job.read_splits(splits, {})
    return job
