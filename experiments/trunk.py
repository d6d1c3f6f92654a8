"""Caches the outputs of a BERT's first layers, as the word embeddings of a small model.

Training adapters on the last layers only needs what the first ones give for each token
of each sentence. So every token of every sentence becomes a word of its own: its
embedding is the first layers' output before the last scale and bias, which are those of
the small model's embedding norm, as post-norm BERTs end every layer with a LayerNorm.
The small model's outputs are the whole model's, up to float32 rounding.
"""

import dataclasses
import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers

from experiments import fetch
from lora_jax import LoadedModel
from lora_jax.files.safetensors import open_tensors, write_tensors
from lora_jax.models.encoder import Encoder

SPECIAL = ("[PAD]", "[UNK]")
LAYER = "encoder.layer.{}."
NORM, EMBEDDINGS = "output.LayerNorm.", "embeddings."
ROWS = 50


def cache_trunk(
    whole: LoadedModel, texts: Sequence[str], top: int
) -> tuple[Path, list[str]]:
    """Makes a model folder of the last layers, over cached outputs of the others.

    Args:
      whole: a BERT, read from a folder.
      texts: all sentences that the small model will read.
      top: the number of its layers.

    Returns:
      The folder, in the cache, and each sentence in the small model's words.
    """
    assert whole.tokenizer is not None  # in the folder
    ids = whole.tokenizer.encode(list(texts)).ids
    words = [[f"s{i}p{j}" for j in range(len(row))] for i, row in enumerate(ids)]
    sentences = [" ".join(row) for row in words]
    mark = hashlib.sha256(json.dumps([str(whole.path), top, ids]).encode()).hexdigest()
    target = fetch.cache_dir() / "short" / f"model-{mark[:12]}"
    if target.is_dir():
        return target, sentences
    first = whole.config.num_layers - top
    states = np.concatenate(_states(whole, ids, first))
    reader = open_tensors(whole.path / "model.safetensors")
    last = LAYER.format(first - 1) + NORM
    weight, bias = reader[last + "weight"], reader[last + "bias"]
    cached = np.zeros((len(SPECIAL) + len(states), states.shape[-1]), np.float32)
    cached[len(SPECIAL) :] = (states - bias) / weight
    tensors = {
        EMBEDDINGS + "word_embeddings.weight": cached,
        EMBEDDINGS + "LayerNorm.weight": weight,
        EMBEDDINGS + "LayerNorm.bias": bias,
    }
    for name in ("position_embeddings", "token_type_embeddings"):
        shape = reader.shapes[f"{EMBEDDINGS}{name}.weight"]
        tensors[f"{EMBEDDINGS}{name}.weight"] = np.zeros(shape, np.float32)
    for i in range(top):
        old, new = LAYER.format(first + i), LAYER.format(i)
        names = [name for name in reader.shapes if name.startswith(old)]
        tensors |= {name.replace(old, new): reader[name] for name in names}
    config = json.loads((whole.path / "config.json").read_text())
    config |= {"num_hidden_layers": top, "vocab_size": len(cached)}
    vocabulary = [*SPECIAL, *(word for row in words for word in row)]
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as work:
        new = Path(work) / "model"
        new.mkdir()
        write_tensors(new / "model.safetensors", tensors, metadata={"format": "pt"})
        (new / "config.json").write_text(json.dumps(config))
        _tokenizer(vocabulary).save(str(new / "tokenizer.json"))
        new.rename(target)
    return target, sentences


def _states(whole: LoadedModel, ids: Sequence[Sequence[int]], first: int) -> list[Any]:
    """Returns the outputs of the first layers for each sentence, ``[t, d]``."""
    encoder = Encoder(dataclasses.replace(whole.config, num_layers=first))
    params = {"params": whole.params["encoder"]}
    apply = jax.jit(lambda p, ids, mask: encoder.apply(p, ids, mask))
    longest = -(-max(map(len, ids)) // 8) * 8
    found = []
    for start in range(0, len(ids), ROWS):
        rows = ids[start : start + ROWS]
        tokens, mask = np.zeros((2, ROWS, longest), np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row)], mask[i, : len(row)] = row, 1
        mask[len(rows) :, 0] = 1
        out = np.asarray(apply(params, tokens, mask))
        found += [out[i, : len(row)] for i, row in enumerate(rows)]
    return found


def _tokenizer(vocabulary: Sequence[str]) -> tokenizers.Tokenizer:
    model = tokenizers.models.WordLevel(
        {word: i for i, word in enumerate(vocabulary)}, unk_token=SPECIAL[1]
    )
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return made
