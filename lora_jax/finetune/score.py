"""Log-probabilities of the tokens of texts, by a decoder."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax.finetune.errors import UserError
from lora_jax.finetune.lines import by_length, check_ids
from lora_jax.finetune.reporter import Reporter
from lora_jax.models.load import LoadedModel
from lora_jax.train.causal_lm import chunk_tokens


def score(
    loaded: LoadedModel,
    records: Sequence[Mapping[str, Any]],
    path: str,
    *,
    batch_size: int = 8,
    reporter: Reporter | None = None,
) -> list[np.ndarray]:
    """Returns ``log p(token | those before it)`` of each line's tokens but the first.

    Args:
      loaded: a decoder.
      records: the lines, in which `lines.text_fault` finds none.
      path: their file, for errors.
      batch_size: lines at once.
      reporter: shows the progress.

    Returns:
      An array of one float less than a line has tokens, for each line.

    Raises:
      UserError: if texts can't be tokenised, or a line is not what the model reads.
    """
    if loaded.tokenizer is None and any("text" in record for record in records):
        raise UserError(f"{loaded.path} has no tokenizer; {path} must hold ids.")
    sequences = [_token_ids(loaded, record) for record in records]
    apply, config = loaded.module.apply, loaded.config
    check_ids(sequences, config, path)
    chunk = chunk_tokens(config.vocab_size)

    @jax.jit
    def log_probabilities(variables, ids):
        hidden: Any = apply(variables, ids, method="hidden")
        hidden = hidden[:, :-1]
        labels = ids[:, 1:]
        count = labels.size

        def of_token(pair):  # `chunk` of them at once: [b, t, v] never exists
            h, label = pair
            logits: Any = apply(variables, h[None, None], method="logits")
            return jax.nn.log_softmax(logits[0, 0])[label]

        tokens = (hidden.reshape(count, -1), labels.reshape(count))
        found = jax.lax.map(of_token, tokens, batch_size=chunk)
        return found.reshape(labels.shape)

    scores: list[np.ndarray] = [np.zeros(0)] * len(sequences)
    rows, done = min(batch_size, len(sequences)), 0
    with (reporter or Reporter()).progress("score", len(sequences)) as tick:
        for members, (ids,) in by_length(rows, config.max_positions, sequences):
            found = np.asarray(log_probabilities(loaded.variables, ids))
            for row, member in enumerate(members):
                scores[member] = found[row, : len(sequences[member]) - 1]
            done += len(members)
            tick(done, "lines")
    return scores


def _token_ids(loaded: LoadedModel, record: Mapping[str, Any]) -> list[int]:
    if "input_ids" in record:
        return record["input_ids"]
    assert loaded.tokenizer is not None  # looked at before
    return loaded.tokenizer.encode_text(record["text"]).ids
