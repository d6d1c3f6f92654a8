"""A tiny BERT folder with a tokenizer, data that can be learned, and a trained run."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

from lora_jax.cli.main import main
from lora_jax.files.safetensors import write_tensors
from lora_jax.models.families.bert import BERT
from lora_jax.models.load import param_shapes

GOOD = ("lovely", "superb", "moving", "funny")
BAD = ("dull", "awful", "tedious", "flat")
PLAIN = ("the", "film", "plot", "is", "and", "actors", "were", "with", "a", "story")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = (*SPECIAL, *GOOD, *BAD, *PLAIN)


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Keeps the commands' cache of compiled programs out of the home directory.

    It holds quick programs too: most runs here are compiled like one before.
    """
    values = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    settings = {
        "model_type": "bert",
        "vocab_size": len(WORDS),
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 40,
        "type_vocab_size": 2,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    rng = np.random.default_rng(0)
    module = BERT.module(BERT.read_config(settings), num_labels=None, pooling="mean")
    tensors = {}
    for path, shape in param_shapes(BERT, module).items():
        value = 0.3 * rng.standard_normal(shape).astype(np.float32)
        if path.endswith("scale"):
            value = np.ones(shape, np.float32)
        if "/word/" in path:  # a pretrained model knows good from bad
            feature = rng.standard_normal(16).astype(np.float32)
            value[[WORDS.index(word) for word in GOOD]] += feature
            value[[WORDS.index(word) for word in BAD]] -= feature
        value = value.T if path.endswith("kernel") else value
        tensors[BERT.tensor_name(path)] = np.ascontiguousarray(value)
    write_tensors(folder / "model.safetensors", tensors, metadata={"format": "pt"})
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_rows(path: Path, count: int, seed: int) -> Path:
    """Writes sentences of 3 to 12 words, half of them with good words in them."""
    rng = np.random.default_rng(seed)
    with path.open("w") as file:
        for i in range(count):
            words = list(rng.choice(PLAIN, rng.integers(2, 11)))
            words.insert(rng.integers(len(words)), rng.choice(GOOD if i % 2 else BAD))
            row = {"text": " ".join(words), "label": ["bad", "good"][i % 2]}
            file.write(json.dumps(row) + "\n")
    return path


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for seed, (name, count) in enumerate(
        {"train": 90, "validation": 24, "test": 25}.items()
    ):
        write_rows(folder / f"{name}.jsonl", count, seed)
    return folder


@pytest.fixture(scope="session")
def config(tmp_path_factory, model_dir, data_dir) -> Path:
    file = tmp_path_factory.mktemp("config") / "tiny.yaml"
    file.write_text(
        f"""
model: {{path: {model_dir}}}
data:
  train: {data_dir}/train.jsonl
  validation: {data_dir}/validation.jsonl
  test: {data_dir}/test.jsonl
lora: {{rank: 2, alpha: 8, dropout_rate: 0.1}}
train:
  epochs: 2
  batch_size: 8
  learning_rate: 1e-2
  log_every: 4
  eval_every: 6
output: {{dir: {file.parent}/run}}
"""
    )
    return file


@pytest.fixture(scope="package")
def run_dir(config) -> Path:
    """A run that was never interrupted."""
    assert main(["train", str(config)]) == 0
    return config.parent / "run"


@pytest.fixture
def call(capsys):
    """Runs a command; gives its exit code, stdout and stderr."""

    def run(*words):
        capsys.readouterr()
        code = main([str(word) for word in words])
        return code, *capsys.readouterr()

    return run
