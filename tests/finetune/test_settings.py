import dataclasses
import math
from typing import get_args, get_type_hints

import pytest

from lora_jax.config import LoRAConfig
from lora_jax.finetune.settings import SECTIONS, differences, load_settings
from lora_jax.finetune.yaml_file import parse_yaml

MINIMAL = """
model: {path: some/model}
data: {train: my.jsonl}
output: {dir: runs/x}
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(MINIMAL)
    return path


def test_defaults_fill_what_is_not_said(file):
    settings = load_settings(file)
    assert settings.lora == LoRAConfig()
    assert settings.train.batch_size == 32
    assert settings.data.max_length is None


def test_overrides_are_read_as_yaml_and_keep_their_types(file):
    settings = load_settings(
        file,
        [
            "lora.rank=4",
            "lora.targets=[query, value]",
            "train.learning_rate=3e-4",
            "train.baseline=false",
            "train.clip_norm=null",
            "output.dir=2024",
            "lora.rank_pattern={query: 2}",
        ],
    )
    assert settings.lora.rank == 4
    assert settings.lora.targets == ("query", "value")
    assert settings.lora.rank_pattern == (("query", 2),)
    assert settings.train.learning_rate == 3e-4
    assert settings.train.baseline is False
    assert settings.train.clip_norm is None
    assert settings.output.dir.endswith("/2024")  # text stays text


def test_the_resolved_yaml_reads_back_unchanged(file, tmp_path):
    settings = load_settings(file, ["lora.rank=4", "train.epochs=3"])
    again = tmp_path / "resolved.yaml"
    again.write_text(settings.to_yaml())
    assert load_settings(again) == settings


def test_every_fault_of_a_file_is_in_one_error(file):
    file.write_text(
        """
model: {path: abc, poling: cls}
data: {train: my.jsonl}
lora: {rank: 0, alpha: x, targts: [query]}
train: {batch_size: "8", epochs: 1.0, schedule: lin, warmup: 2}
trian: {}
"""
    )
    with pytest.raises(ValueError, match="12 faults in the settings") as caught:
        load_settings(file, ["lora.rnak=3", "rank=3", "trn.x=1"])
    message = str(caught.value)
    for line in (
        "model.poling: unknown key. Did you mean 'pooling'?",
        "lora.targts: unknown key. Did you mean 'targets'?",
        "trian: no such section. Did you mean 'train'?",
        "lora.rnak: unknown key. Did you mean 'rank'?",
        "'rank=3': overrides must be section.key=value",
        "trn.x: no section 'trn'. Did you mean 'train'?",
        "output: missing",
        "alpha must be a number; got 'x'; rank must be at least 1; got 0",
        "train.batch_size: must be a valid integer; got '8'",
        "train.epochs: must be a valid integer; got 1.0",
        "train.schedule: must be 'linear', 'cosine' or 'constant'; got 'lin'",
        "train.warmup: must be less than 1; got 2",
    ):
        assert line in message


def test_a_missing_file_names_itself_and_its_neighbour(file):
    with pytest.raises(FileNotFoundError, match=r"confg\.yaml .*config\.yaml"):
        load_settings(file.with_name("confg.yaml"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train=null", "data.train: must be a valid string; got None"),
        ("train.accumulate=3", "a multiple of accumulate = 3; got 32"),
        ("train.learning_rate=0", "must be greater than 0; got 0"),
        ("train.log_every=[", "train.log_every is not valid YAML"),
        ("model.dtype=float16", "'float32' or 'bfloat16'; got 'float16'"),
    ],
)
def test_values_that_do_not_go_together_are_refused(file, override, message):
    with pytest.raises(ValueError, match=message):
        load_settings(file, [override])


def numeric_fields():
    """Yields the name and the types of each setting that is a number."""
    for section, kind in SECTIONS.items():
        hints = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            kinds = {hints[field.name], *get_args(hints[field.name])}
            if kinds & {int, float}:
                yield f"{section}.{field.name}", kinds


NUMERIC = dict(numeric_fields())


@pytest.mark.parametrize("name", NUMERIC)
def test_no_number_that_is_none_reaches_a_run(name):
    section, key = name.split(".")
    bad = [math.inf, -math.inf, math.nan, 10**400, 10**5000, -(10**400), 1e39]
    bad += ["8", True, [1]] + [None] * (type(None) not in NUMERIC[name])
    bad += [1 << 31] * (int in NUMERIC[name])
    for value in bad:
        tree = parse_yaml(MINIMAL, "minimal")
        tree.setdefault(section, {})[key] = value
        with pytest.raises(ValueError, match=rf"1 fault in .*\n  {section}") as error:
            load_settings(tree)
        assert key in str(error.value)
        assert "must be" in str(error.value)
        assert len(str(error.value)) < 500


def test_every_number_was_looked_at():
    assert {"lora.rank", "train.warmup", "mesh.data", "data.holdout"} <= NUMERIC.keys()
    assert len(NUMERIC) >= 20


@pytest.mark.parametrize("value", [1e-31, 5e-324])
def test_a_number_that_float32_does_not_have_is_refused(value):
    tree = {**parse_yaml(MINIMAL, "minimal"), "train": {"clip_norm": value}}
    with pytest.raises(ValueError, match="clip_norm: must be at least 1e-30"):
        load_settings(tree)


def test_a_repeated_key_is_an_error(file):
    file.write_text(MINIMAL + "train: {epochs: 1, epochs: 2}\n")
    with pytest.raises(ValueError, match="the key 'epochs' appears twice"):
        load_settings(file)


def test_a_key_that_is_a_mapping_is_an_error_and_merging_one_is_not(file):
    file.write_text(MINIMAL.replace("some/model", "{{MODEL}}"))
    with pytest.raises(ValueError, match=r"'MODEL': None\} can't be a key"):
        load_settings(file)
    text = "{a: &base {x: 1, y: 2}, b: {<<: *base, y: 3}}"
    assert parse_yaml(text, "here")["b"] == {"x": 1, "y": 3}


BOMB = "a0: &a0 [1, 2, 3, 4]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
)

MERGES = BOMB.replace("[1, 2, 3, 4]", "{x: 1}").replace("[", "{<<: [")
MERGES = MERGES.replace("]", "]}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "over 10,000 values, including aliases"),
        (MERGES, "over 10,000 values, including aliases"),
        ("a: &a [*a]", "over 10,000 values"),
        ("a: !!timestamp x", "the tag 'tag:yaml.org,2002:timestamp' is not supp"),
        ("!!bool x", "the tag .*bool' is not supp"),
        ("a: !!map", "the tag .*map' is not supp"),
        ("a: !!python/object/apply:os.getpid []", "the tag .* is not supp"),
        ("[" * 30_000, "nests deeper than 20 levels"),
        ("- " * 9000 + "x", "nests deeper than 20 levels"),
        ("a: 2147483648", "2147483648 must be below"),
        ("a: -1" + "0" * 400, "must be below"),
        ("a: .inf", ".inf must be 0 or from 1e-30 to 1e"),
        ("a: .nan", ".nan must be 0 or from"),
        ("a: 1e999", "1e999 must be 0 or from"),
        ("a: 1e-40", "1e-40 must be 0 or from"),
        ("null: 1", "None can't be a key"),
        ("1.5: 1", "1.5 can't be a key"),
        ("yes: 1", "True can't be a key; put it in quotes"),
        ("[1]: 1", r"\[1\] can't be a key"),
        ("a: 0x_", "invalid literal"),
        ("a: " + "9" * 5000, "limit .* digits"),
        ('a: "\\ud800"', "a lone surrogate"),
        ("a: b\n" * 20_000, "at most 65,536 bytes; it has 100,000"),
    ],
    ids=lambda value: value[:20],
)
def test_hostile_yaml_is_refused_at_once(text, message):
    with pytest.raises(ValueError, match=f"F .*{message}"):
        parse_yaml(text, "F")


def test_dates_are_words():
    assert parse_yaml("{a: 2020-13-45, b: 2020-01-01}", "F")["a"] == "2020-13-45"


def test_a_model_that_is_a_file_is_found_from_any_folder(file, tmp_path, monkeypatch):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    settings = load_settings(file, ["model.path=tiny.gguf"])
    assert settings.model.path == str(tmp_path / "tiny.gguf")


def test_a_file_that_is_no_text_is_named(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_bytes(b"model: \xff\n")
    with pytest.raises(
        ValueError, match=r"config.yaml is not valid YAML: .*invalid start byte"
    ):
        load_settings(file)


def test_a_file_without_sections_is_refused(file):
    file.write_text("just words")
    with pytest.raises(ValueError, match=r"must contain sections .*got 'just words'"):
        load_settings(file)


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "+1E-3", ".001"])
def test_numbers_with_an_exponent_are_numbers(text):
    assert parse_yaml(text, "here") == 0.001


def test_differences_name_what_changed(file):
    old = load_settings(file)
    train = dataclasses.replace(old.train, epochs=3)
    assert differences(old, dataclasses.replace(old, train=train)) == [
        "train.epochs: 1 -> 3"
    ]


def test_a_dictionary_and_settings_are_configs_too():
    tree = {**parse_yaml(MINIMAL, "minimal"), "lora": LoRAConfig(rank=3)}
    settings = load_settings(tree, ["train.epochs=2"])
    assert settings.lora.rank == 3
    assert tree.keys() == {"model", "data", "output", "lora"}  # not changed
    assert load_settings(settings) == settings
    assert load_settings(settings, ["lora.rank=4"]).lora.rank == 4


def test_the_faults_of_a_dictionary_are_named():
    tree = {"model": {"path": 3}, "dta": {}, "output": {"dir": "x"}}
    with pytest.raises(ValueError, match=r"config: 3 faults .*\n.*Did you mean 'data'"):
        load_settings(tree)
    assert "dta" in tree


def test_peft_s_names_are_told_in_a_file_and_in_an_override():
    lora = {"modules_to_save": ["head"], "r": 2}
    tree = {**parse_yaml(MINIMAL.encode(), "x"), "lora": lora}
    with pytest.raises(ValueError, match=r"lora\.r: unknown key") as error:
        load_settings(tree, ["lora.trainable_token_indices=[1]"])
    for name, own in (
        ("modules_to_save", "train"),
        ("r", "rank"),
        ("trainable_token_indices", "tokens"),
    ):
        assert f"lora.{name}: unknown key. PEFT's {name} is {own} here." in str(
            error.value
        )
