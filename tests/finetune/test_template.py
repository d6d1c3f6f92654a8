"""The commented config holds every setting, its default and what it means."""

import dataclasses
import json
import re

import pytest
import yaml

from lora_jax.cli.main import main
from lora_jax.finetune.settings import SECTIONS, load_settings
from lora_jax.finetune.template import config_template, documentation

REQUIRED = ["model.path=my-model", "data.train=my-data.jsonl", "output.dir=my-run"]


def test_the_file_loads_and_holds_the_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full.yaml").write_text(config_template())
    (tmp_path / "empty.yaml").write_text("{}")
    assert load_settings("full.yaml") == load_settings("empty.yaml", REQUIRED)


def test_every_key_is_there_and_no_other():
    tree = yaml.safe_load(config_template())
    fields = {
        section: [field.name for field in dataclasses.fields(kind)]
        for section, kind in SECTIONS.items()
    }
    assert {section: list(values) for section, values in tree.items()} == fields


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_stands_under_what_the_docstring_says_of_it(section):
    kind = SECTIONS[section]
    summary, meanings = documentation(kind)
    assert list(meanings) == [field.name for field in dataclasses.fields(kind)]
    text = config_template()
    block = re.search(rf"((?:^# .*\n)+)^{section}:\n((?:  .*\n)+)", text, re.MULTILINE)
    assert block is not None
    assert words(block[1]) == words(summary)
    found = re.findall(r"((?:^  # .*\n)+)^  (\w+): ", block[2], re.MULTILINE)
    assert {key: words(comment) for comment, key in found} == {
        key: words(meaning) for key, meaning in meanings.items()
    }


def words(comment):
    return [word for word in comment.split() if word != "#"]


def test_a_setting_that_is_one_of_a_few_words_lists_them():
    assert "\n  pooling: mean  # mean | cls | pooler\n" in config_template()
    assert "\n  param_dtype: null  # float32 | bfloat16\n" in config_template()
    assert "\n  rules: {}\n" in config_template()


def test_lines_fit_a_terminal():
    assert max(map(len, config_template().splitlines())) <= 88


def test_the_command_writes_the_file_and_never_over_another(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(["init"]) == 0
    assert "lora-jax train config.yaml" in capsys.readouterr().out
    assert (tmp_path / "config.yaml").read_text() == config_template()
    assert main(["init", "mine.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"config": "mine.yaml"}
    (tmp_path / "mine.yaml").write_text("kept")
    assert main(["init", "mine.yaml"]) == 2
    assert "mine.yaml already exists" in capsys.readouterr().err
    assert (tmp_path / "mine.yaml").read_text() == "kept"
