"""The language modelling task: text, prompts and completions, or chats."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from lora_jax.array_types import PyTree
from lora_jax.files.messages import Message, text_of
from lora_jax.files.tokenizer import Tokenizer
from lora_jax.finetune.devices import Devices
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.formatting import perplexity
from lora_jax.finetune.held_out import hold_out
from lora_jax.finetune.job import (
    Facts,
    Job,
    Metrics,
    Split,
    attach,
    data_files,
    load,
)
from lora_jax.finetune.mixed_data import line_adapters, read_adapters
from lora_jax.finetune.settings import RunSettings
from lora_jax.finetune.texts import max_tokens
from lora_jax.finetune.turns import endless_turns
from lora_jax.models.added_tokens import ADDED
from lora_jax.models.generate import generate
from lora_jax.models.source import Source
from lora_jax.names import OWNER
from lora_jax.parallel.processes import fail_together
from lora_jax.parallel.sequence import check_length
from lora_jax.train.buckets import Schedule
from lora_jax.train.causal_lm import chunk_tokens, make_lm_loss
from lora_jax.train.data import TextBatches
from lora_jax.train.step import LossFn
from lora_jax.train.text import MESSAGES, TextData, read_text_examples

MAX_LENGTH = 1024
SAMPLE_TOKENS = 48


@dataclasses.dataclass
class Language(Job):
    """See `Job`.

    Attributes:
      is_chat: whether the training examples are messages; then so are the samples.
      ends: how often each token ends an assistant's turn in the training file.
    """

    is_chat: bool = False
    ends: Mapping[int, int] = dataclasses.field(default_factory=dict)
    unit: ClassVar[str] = "rows"
    weight: ClassVar[str] = "targets"
    metrics: ClassVar[tuple[str, ...]] = ("loss",)
    best_mode: ClassVar[str] = "min"
    default_length: ClassVar[int] = MAX_LENGTH

    def loss(self, module: Any, *, is_training: bool, copies: int = 1) -> LossFn:
        """Returns the next-token cross-entropy; in training, experts' balance too."""
        config, train = self.loaded.config, self.settings.train
        return make_lm_loss(
            module,
            is_tied=config.is_tied,
            softcap=config.final_softcap,
            chunk=self.chunk(copies),
            router_aux_loss_coef=train.router_aux_loss_coef if is_training else 0.0,
        )

    def chunk(self, copies: int) -> int | None:
        """Returns the tokens whose logits each of several losses may hold at once."""
        if copies == 1:
            return None  # as many as `make_lm_loss` finds best
        return max(1, chunk_tokens(self.loaded.config.vocab_size) // copies)

    def buckets(self, split: Split, known: Sequence[int] = ()) -> list[int] | None:
        """See `Job.buckets`; None for packed rows, which have one length."""
        if self.settings.data.packing:
            return None
        unit = self.devices.token_unit  # the mesh may split the rows
        sizes = super().buckets(split, known) or ()
        return sorted({-(-size // unit) * unit for size in sizes})

    def schedule(
        self, split: Split, rows: int, buckets: list[int] | None, **order: Any
    ) -> Schedule:
        """See `Job.schedule`."""
        packed = self.max_length if self.settings.data.packing else None
        if packed:
            check_length(packed, self.devices.sizes)
        examples = split.examples
        return TextBatches(examples, rows, buckets, packed_length=packed, **order)

    def tokenize_file(self, path: str) -> Split:
        """See `Job.tokenize_file`."""
        owners = None
        if self.adapters:
            owners = read_adapters({path: path}, self.adapters).lines[path]
        data = self.read(path, owners)
        return Split(list(data.examples), data.truncated, data.dropped)

    def read(self, path: str, owners: Sequence[int] | None = None) -> TextData:
        """Reads a file; ``owners`` are the numbers of its lines' adapters, if any."""
        data = read_text_examples(
            path,
            self.loaded.tokenizer,
            max_length=self.max_length,
            vocab_size=self.loaded.config.vocab_size,
            ignored=() if owners is None else (OWNER,),
        )
        if owners is not None:
            for line, example in zip(data.lines, data.examples, strict=True):
                example[OWNER] = np.array(owners[line])
        return data

    def read_splits(
        self, splits: Sequence[str], owners: Mapping[str, Sequence[int]]
    ) -> None:
        """Reads the examples, and holds out those of the same line together.

        Args:
          splits: the names of the wanted ones.
          owners: the numbers of the lines' adapters, if any, by split.
        """
        files = data_files(self.settings.data, splits)
        with fail_together():
            data = {name: self.read(f, owners.get(name)) for name, f in files.items()}
        self.is_chat = any(found.kind == MESSAGES for found in data.values())
        self.ends = data["train"].ends if "train" in data else {}
        rows = {name: _by_line(found) for name, found in data.items()}
        settings, owner_of = self.settings.data, lambda row: row[0][OWNER]
        for name, lines in hold_out(rows, settings, self.adapters, owner_of).items():
            if name in splits:
                found = data.get(name)  # None of a part that is held out
                cut = (found.truncated, found.dropped) if found else (0,)
                self.splits[name] = Split([e for line in lines for e in line], *cut)

    def describe(self, metrics: Metrics) -> str:
        """Formats the loss and its perplexity."""
        found = perplexity(metrics["loss"])
        return f"{super().describe(metrics)}  perplexity {found:.2f}"

    def data_facts(self, batches: Schedule) -> Facts:
        """See `Job.data_facts`."""
        assert isinstance(batches, TextBatches)  # from `batches`
        lengths = [len(e["input_ids"]) for e in self.splits["train"].examples]
        tokens = f"mean {sum(lengths) / len(lengths):.1f}, max {max(lengths)}; "
        if batches.packed_length:
            tokens += f"packed to {len(batches):,} rows of {batches.packed_length}"
        else:
            tokens += f"padded to {', '.join(map(str, batches.buckets))}"
        tokens += f" ({batches.token_fraction:.0%} of the positions are tokens)"
        share = batches.targets / sum(lengths)
        facts = [
            ("data", self.sizes),
            ("tokens", tokens),
            ("targets", f"{batches.targets:,} tokens count ({share:.0%} of train)"),
        ]
        tokenizer = self.loaded.tokenizer
        endless = endless_turns(tokenizer, self.ends) if tokenizer else ""
        return facts + self.cut_facts() + ([("warning", endless)] if endless else [])

    def cut_facts(self) -> Facts:
        """Describes what was truncated, and a lower limit than that asked for."""
        data, default = self.settings.data, self.default_length
        _, limit, facts = max_tokens(data, self.loaded, default)
        if cut := sum(split.truncated for split in self.splits.values()):
            note = f"{cut:,} examples truncated to {limit}"
            if dropped := sum(split.dropped for split in self.splits.values()):
                note += f"; {dropped:,} of them lost all targets and were dropped"
            return [("truncated", note), *facts]
        return facts

    def extra(self) -> dict[str, Any]:
        """See `Job.extra`."""
        added = list(self.loaded.added)
        return {"max_length": self.max_length, **({ADDED: added} if added else {})}

    @property
    def prompt(self) -> Literal["text", "chat"] | None:
        """See `Job.prompt`; None without a tokenizer."""
        if self.loaded.tokenizer is None:
            return None
        return "chat" if self.is_chat else "text"

    def encode_sample(
        self, prompt: str | Sequence[Message], tokenizer: Tokenizer
    ) -> list[int]:
        """Returns the token ids of an entry of ``train.samples``."""
        if not isinstance(prompt, str):
            return tokenizer.encode_prompt(prompt)
        if self.is_chat:
            return tokenizer.encode_prompt([{"role": "user", "content": prompt}])
        return tokenizer.encode_text(prompt).ids

    def samples(self, variables: PyTree) -> list[dict[str, str]]:
        """Returns greedy continuations of ``train.samples``."""
        prompts, tokenizer = self.settings.train.samples, self.loaded.tokenizer
        if not prompts:
            return []
        if tokenizer is None:
            raise UserError("train.samples needs a tokenizer; the model has none.")

        texts = generate(
            self.adapted,
            variables,
            [self.encode_sample(prompt, tokenizer) for prompt in prompts],
            max_new_tokens=SAMPLE_TOKENS,
            stop_ids=tokenizer.special.stop_ids,
        )
        return [
            {
                "prompt": prompt if isinstance(prompt, str) else text_of(prompt[-1]),
                "text": tokenizer.decode(ids),
            }
            for prompt, ids in zip(prompts, texts, strict=True)
        ]


def open_language(
    settings: RunSettings,
    devices: Devices,
    source: Source,
    *,
    splits: Sequence[str],
    adapters: Sequence[str] = (),
) -> Language:
    """Builds the job; see `open_job`. ``adapters`` are a trained run's."""
    check_no_classes(settings)
    with fail_together():
        new = settings.model.add_tokens
        loaded = load(settings, devices, source, add_tokens=new)
        if not getattr(loaded.config, "predicts", True):
            raise UserError(
                f"{loaded.path} must predict tokens; it makes embeddings only (it has "
                "no head, or tokens see later ones). Train it on pairs of texts, lines "
                "with an 'anchor' and a 'positive'."
            )
        owners = line_adapters(settings.data, splits, adapters)
    attached = attach(settings, devices, loaded, settings.lora)
    job = Language(splits={}, adapters=owners.names, **attached)
    job.read_splits(splits, owners.lines)
    return job


def check_no_classes(settings: RunSettings) -> None:
    """Raises a `UserError` for a setting of classification."""
    if settings.train.label_smoothing:
        raise UserError(
            "train.label_smoothing must be 0 for a decoder; it applies to an encoder's "
            f"classes. Got {settings.train.label_smoothing}."
        )


def _by_line(data: TextData) -> list[list[dict[str, Any]]]:
    """Groups the examples by line, so that those of a line are held out together."""
    rows: dict[int, list[dict[str, Any]]] = {}
    for line, example in zip(data.lines, data.examples, strict=True):
        rows.setdefault(line, []).append(dict(example))
    return [*rows.values()]
