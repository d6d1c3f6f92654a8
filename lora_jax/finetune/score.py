"""Log-probabilities of tokens according to a decoder or an encoder–decoder."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.finetune.errors import UserError
from lora_jax.finetune.lines import (
    Choose,
    by_length,
    check_faults,
    check_ids,
    text_fault,
)
from lora_jax.finetune.reporter import Reporter
from lora_jax.models.load import LoadedModel
from lora_jax.train.causal_lm import chunk_tokens
from lora_jax.train.pairs import INPUTS, Pair, PairBatches, encode_pair
from lora_jax.train.text import MESSAGES, Encoded, encode_record, kind_of


class Scored(NamedTuple):
    """The scores of a line's tokens except the first; a chat may have several.

    Of an encoder–decoder they are those of the completion's tokens, the first too.

    Attributes:
      line: index of the line.
      tokens: number of tokens, with a first one that has no score.
      logprobs: ``log p(token | previous tokens)``.
      counted: 1 for each token that training counts, 0 for the others.
    """

    line: int
    tokens: int
    logprobs: np.ndarray
    counted: np.ndarray


def score_fault(record: Mapping[str, Any]) -> str:
    """Returns an error message for a line to score; empty if it is valid."""
    if not _is_trained(record):
        return text_fault(record)
    try:
        kind_of(record)
    except ValueError as error:
        return str(error)
    return ""


def score(
    loaded: LoadedModel,
    records: Sequence[Mapping[str, Any]],
    path: str,
    *,
    batch_size: int = 8,
    choose: Choose | None = None,
    reporter: Reporter | None = None,
) -> list[Scored]:
    """Returns ``log p(token | previous tokens)`` of each line's tokens from the second.

    Texts and token ids are scored as they are, and all their tokens count. Messages,
    and prompts with completions, are tokenised as in training, where only some count.

    Args:
      loaded: a decoder, or an encoder–decoder, whose lines are prompts with completions
        (or ``input_ids`` with ``labels``).
      records: the lines, valid according to `score_fault`.
      path: their file, for error messages.
      batch_size: lines per batch.
      choose: returns the variables of a batch of lines; None for the model's own.
      reporter: shows the progress.

    Returns:
      The scores, in the order of the lines.

    Raises:
      UserError: if lines can't be tokenised or exceed the model's context.
    """
    if loaded.tokenizer is None and any("text" in record for record in records):
        raise UserError(f"{loaded.path} has no tokenizer; {path} must contain ids.")
    encoded = _encode(loaded, records, path)
    apply, config = loaded.module.apply, loaded.config
    chunk = chunk_tokens(config.vocab_size)

    @jax.jit
    def log_probabilities(variables, labels, *inputs):
        hidden: Any = apply(variables, *inputs, method="hidden")
        b, t = labels.shape
        size = max(1, min(t, chunk // b))  # so that [b, t, v] is never materialised
        count = -(-t // size)
        more = (0, count * size - t)
        hidden = jnp.pad(hidden[:, :t], ((0, 0), more, (0, 0)))
        labels = jnp.pad(labels, ((0, 0), more))

        def of_chunk(pair):
            h, label = pair
            logits: Any = apply(variables, h, method="logits")
            scores = jax.nn.log_softmax(logits)
            return jnp.take_along_axis(scores, label[..., None], axis=-1)[..., 0]

        chunks = (
            jnp.moveaxis(x.reshape(b, count, size, *x.shape[2:]), 1, 0)
            for x in (hidden, labels)
        )
        found = jax.lax.map(of_chunk, tuple(chunks))  # [count, b, size]
        return jnp.moveaxis(found, 0, 1).reshape(b, -1)[:, :t]

    scores: list[np.ndarray] = [np.zeros(0)] * len(encoded)
    rows, done = min(batch_size, len(encoded)), 0
    with (reporter or Reporter()).progress("score", len(encoded)) as tick:
        own = [each for _, each in encoded]
        for members, *arrays in _batches(own, rows, config):
            variables = loaded.variables
            if choose is not None:
                lines = [encoded[member][0] for member in members]
                variables = choose(lines, len(arrays[0]))
            found = np.asarray(log_probabilities(variables, *arrays))
            for row, member in enumerate(members):
                scores[member] = found[row, : len(_counted(own[member]))]
            done += len(members)
            tick(done, "lines")
    return [
        Scored(line, len(_written(each)), logprobs, _counted(each))
        for (line, each), logprobs in zip(encoded, scores, strict=True)
    ]


def _batches(
    lines: Sequence[Encoded | Pair], rows: int, config: Any
) -> Iterator[tuple[np.ndarray, ...]]:
    """Yields line indices, the tokens to score and the model's inputs."""
    pairs = [line for line in lines if isinstance(line, Pair)]
    if not pairs:
        ids = [_written(line) for line in lines]
        for members, (batch,) in by_length(rows, config.max_positions, ids):
            yield members, batch[:, 1:], batch
        return
    examples = [{"input_ids": p.source, "labels": p.target} for p in pairs]
    made = PairBatches(examples, rows, start_id=config.start_id, shuffle=False)
    for step in range(made.steps_per_epoch):
        batch = made.batch_at(step)
        yield made.indices_at(step), batch["labels"], *(batch[n] for n in INPUTS)


def _written(line: Encoded | Pair) -> list[int]:
    return line.target if isinstance(line, Pair) else line.ids


def _counted(line: Encoded | Pair) -> np.ndarray:
    """Returns which of the scored tokens training counts."""
    mask = [1] * len(line.target) if isinstance(line, Pair) else line.mask[1:]
    return np.array(mask, np.uint8)


def _is_trained(record: Mapping[str, Any]) -> bool:
    return MESSAGES in record or "prompt" in record


def _encode(
    loaded: LoadedModel, records: Sequence[Mapping[str, Any]], path: str
) -> list[tuple[int, Encoded | Pair]]:
    """Returns the tokens of lines, each with the index of its line."""
    tokenizer, size = loaded.tokenizer, loaded.config.vocab_size

    def tokens(record: Mapping[str, Any]) -> Sequence[Encoded | Pair]:
        if loaded.family.has_source:
            return [encode_pair(record, tokenizer, vocab_size=size)]
        if _is_trained(record):
            return encode_record(record, tokenizer, vocab_size=size)
        ids = record.get("input_ids")
        if ids is None:
            assert tokenizer is not None  # checked before
            ids = tokenizer.encode_text(record["text"]).ids
        return [Encoded(ids, [1] * len(ids))]

    encoded, faults = [], []
    for line, record in enumerate(records):
        try:
            encoded += [(line, each) for each in tokens(record)]
        except (ValueError, TypeError) as error:
            faults.append(f"{path}: example {line + 1}: {error}")
    check_faults("lines that can't be scored", faults)
    ids = [each.ids for _, each in encoded if isinstance(each, Encoded)]
    check_ids(ids, loaded.config, path)
    return encoded
