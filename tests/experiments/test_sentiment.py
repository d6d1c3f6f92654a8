"""The main job hands the model, the splits and its config to the library's command."""

import json

from experiments.sentiment import train
from experiments.vader import Splits
from lora_jax.cli.parser import parse
from lora_jax.finetune.settings import load_settings
from lora_jax.train.data import read_jsonl


def test_the_splits_become_files_and_the_settings_name_them(tmp_path, monkeypatch):
    rows = [{"text": f"Text {i}, café", "label": i % 2} for i in range(6)]
    splits = Splits(rows[:3], rows[3:5], rows[5:])
    monkeypatch.setenv("LORA_JAX_CACHE", str(tmp_path))
    monkeypatch.setattr(train, "minilm", lambda: tmp_path / "minilm")
    monkeypatch.setattr(train, "load_vader", lambda name, seed: splits)
    args = parse(train.arguments(["--json", "lora.rank=4"]))
    assert args.command == "train"
    assert args.json
    settings = load_settings(args.config, args.overrides)
    assert settings.lora.rank == 4
    assert settings.model.path == str(tmp_path / "minilm")
    for name, expected in splits._asdict().items():
        file = getattr(settings.data, name)
        assert read_jsonl(file) == expected
        with open(file, encoding="utf-8") as lines:
            assert [json.loads(line) for line in lines] == expected
    assert len(list(tmp_path.iterdir())) == 3  # no temporary file is left
