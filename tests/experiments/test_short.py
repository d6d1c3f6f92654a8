"""The short experiments run from end to end on a tiny model, once."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import fetch, short, trunk, vader
from experiments.methods import language
from experiments.without_regret.report import optimum
from lora_jax import load_model
from lora_jax.files.safetensors import open_tensors, write_tensors
from tests.cli.conftest import BAD, GOOD, PLAIN, compilation_cache, model_dir
from tests.tiny_decoder import make_decoder

__all__ = ["compilation_cache", "model_dir"]


@pytest.fixture
def tiny(tmp_path, monkeypatch, model_dir):
    """Two layers instead of MiniLM, made-up sentences instead of VADER's."""
    reader = open_tensors(model_dir / "model.safetensors")
    tensors = {name: reader[name] for name in reader.shapes}
    tensors |= {n.replace(".layer.0.", ".layer.1."): a for n, a in tensors.items()}
    folder = tmp_path / "model"
    folder.mkdir()
    write_tensors(folder / "model.safetensors", tensors, metadata={"format": "pt"})
    config = json.loads((model_dir / "config.json").read_text())
    config["num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_bytes((model_dir / "tokenizer.json").read_bytes())
    rng = np.random.default_rng(0)
    rows = []
    for i in range(99):
        words = [*rng.choice(PLAIN, rng.integers(3, 7)), (BAD, GOOD)[i % 2][i % 4]]
        rows.append({"text": " ".join(rng.permutation(words)), "label": i % 2})
    monkeypatch.setattr(fetch, "minilm", lambda: folder)
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path / "cache"))
    splits = vader.Splits(rows, [], [])
    monkeypatch.setattr(vader, "load_vader", lambda name, seed: splits)
    monkeypatch.chdir(tmp_path)
    return folder


def test_cached_layers_change_nothing(tiny):
    whole = load_model(tiny)
    texts = ["the film is superb", "a dull story"]
    folder, words = trunk.cache_trunk(whole, texts, top=1)
    small = load_model(folder)
    assert small.config.num_layers == 1
    outputs = []
    for model, sentences in ((whole, texts), (small, words)):
        ids = short.encode(model.tokenizer, [{"text": text} for text in sentences])
        tokens, mask = np.zeros((2, 2, 8), np.int32)
        for i, row in enumerate(ids):
            tokens[i, : len(row)], mask[i, : len(row)] = row, 1
        inputs = jnp.asarray(tokens), jnp.asarray(mask)
        outputs.append(jax.jit(model.module.apply)(model.variables, *inputs))
    np.testing.assert_allclose(*outputs, atol=2e-5)
    assert trunk.cache_trunk(whole, texts, top=1) == (folder, words)


FEW = {
    "domains": {
        "DOMAINS": ("movie", "nyt"),
        "RATES": [1e-2],
        "SEEDS": [0, 1],
        "RULES": {"cat": {"method": "cat"}, "ties": {"method": "ties", "rank": 2}},
        "WEIGHTS": (0.5, 1.0),
    },
    "low_rank": {
        "RATES": [1e-2],
        "SEEDS": [0, 1],
        "RANKS": [1, 16],
        "BASE_RANKS": [16],
    },
    "without_regret": {
        "RATES": {"full": [1e-2], "lora": [1e-2]},
        "SEEDS": [0],
        "RANKS": [1, 8],
        "ATTENTION_RANK": 4,
    },
    "methods": {"RATES": [1e-2], "ALONE_RATES": [1e-2], "SEEDS": [1, 2]},
}


@pytest.mark.parametrize("name", FEW)
def test_an_experiment_runs_once(name, tiny, monkeypatch, capsys):
    module = importlib.import_module(f"experiments.{name}.run")
    for constant, value in FEW[name].items():
        monkeypatch.setattr(module, constant, value)
    if name == "methods":
        few = {k: module.CONTENDERS[k] for k in ("LoRA", "PiSSA")}
        monkeypatch.setattr(module, "CONTENDERS", few)
        decoder = make_decoder(tiny.parent / "decoder")
        monkeypatch.setattr(fetch, "smollm2", lambda: decoder)
        monkeypatch.setattr(language, "CONTENDERS", {"LoRA": ({}, 1e-2)})
        monkeypatch.setattr(language, "RATES", [3e-3, 1e-2, 3e-2])
        monkeypatch.setattr(language, "QUICK", language.Size(8, 2, 2))
    quick = short.Size(1, 32, 16, 16, (3, 8))
    monkeypatch.setattr(module, "QUICK", quick)
    module.main(["--quick"])
    (results,) = (tiny.parent / "runs").glob("*/results")
    lines = (results / "runs.jsonl").read_text()
    for row in map(json.loads, lines.splitlines()):
        scores = [row[k] for k in ("loss", "accuracy", "test_loss") if k in row]
        assert np.isfinite(np.array(scores, float)).all()
    tables = {path: path.read_text() for path in results.rglob("*.md")}
    assert len(tables) >= 1 + (name == "methods")
    assert list(results.glob("*.png"))
    first = capsys.readouterr().out
    module.main(["--quick"])
    assert (results / "runs.jsonl").read_text() == lines
    assert "CPU time" in first
    assert "CPU time" not in capsys.readouterr().out
    assert {path: path.read_text() for path in results.rglob("*.md")} == tables


def test_the_best_rate_lies_between_those_tried():
    losses = {rate: [(np.log10(rate) + 2.4) ** 2] for rate in (1e-3, 3e-3, 1e-2)}
    found = optimum(losses)
    assert found.rate == 3e-3
    assert found.fitted == pytest.approx(10**-2.4)
    assert optimum({1e-3: [1.0], 1e-2: [2.0]}).fitted is None


def test_the_lowest_mean_wins_and_a_diverged_run_never_does():
    runs = [
        {"rate": rate, "loss": loss}
        for rate, loss in [(1, 0.5), (1, 0.7), (2, 0.1), (2, None), (3, 0.65)]
    ]
    assert short.best(runs, "rate") == (1,)


def test_rates_are_tried_until_the_best_lies_between_two(monkeypatch):
    tried = []

    class Runs:
        def alone(self, name, config, grid):
            ((rate,), (seed,)) = grid.values()
            tried.append(rate)
            loss = None if rate > 0.5 else (np.log10(rate) + 1.4) ** 2
            return [{language.RATE: rate, "train.seed": seed, "loss": loss}]

    monkeypatch.setattr(language, "RATES", [1e-3, 1e-2, 1e-1, 1])
    assert language.tune(Runs(), "LoRA", {}, 1) == 1e-1
    assert tried == [1e-3, 1e-2, 1e-1, 1]
