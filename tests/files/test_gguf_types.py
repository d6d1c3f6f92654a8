"""GGUF fields of other types than they should have are refused by name."""

import pytest

from lora_jax.files.gguf import GGUFReader
from lora_jax.files.tokenizer import Tokenizer
from tests.fuzz.mutate import encode_gguf
from tests.fuzz.samples import GGUF


def write(folder, **changes):
    fields, tensors = GGUF
    names = {name.replace("__", "."): value for name, value in changes.items()}
    path = folder / "m.gguf"
    path.write_bytes(encode_gguf(fields | names, tensors))
    return path


def test_the_file_itself_is_read(tmp_path):
    path = write(tmp_path)
    assert GGUFReader(path).config["num_hidden_layers"] == 1
    assert Tokenizer(path).special.texts == {"unk_token": "a", "eos_token": "</s>"}


@pytest.mark.parametrize("value", [["llama"], [], [1.0], 3, True, ""])
def test_an_architecture_is_a_string(tmp_path, value):
    path = write(tmp_path, general__architecture=value)
    with pytest.raises(
        ValueError, match=r"m\.gguf: general.architecture must be one of"
    ):
        GGUFReader(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("llama__block_count", [], r"block_count must be a positive int, got \[\]"),
        ("llama__block_count", ["a"], r"block_count must be .*int, got \['a'\]"),
        ("llama__block_count", -1, "block_count must be a positive int, got -1"),
        ("llama__rope__freq_base", 1e39, "rope.freq_base must be .*float, got inf"),
        ("llama__rope__freq_base", float("nan"), "freq_base must be .*float, got nan"),
        ("llama__rope__scaling__type", [], r"scaling.type must be .*str, got \[\]"),
        ("llama__expert_count", [1, 2], "expert_count must be a positive int, got"),
    ],
)
def test_fields_are_numbers_of_their_kind(tmp_path, key, value, message):
    path = write(tmp_path, **{key: value})
    with pytest.raises(ValueError, match=f"{path} must contain .*{message}"):
        GGUFReader(path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model", ["gpt2"], r"its type is \['gpt2'\]"),
        ("pre", [], r"tokenizer.ggml.pre must be one of .* got \[\]"),
        ("tokens", [], "faults"),
        ("tokens", [1, 2], "tokens must be a list, got ndarray"),
        ("merges", [1.0], "merges must be a list, got ndarray"),
        ("token_type", ["a"], "token_type must be a list, got list|token_type"),
        ("eos_token_id", [3], "eos_token_id must be a token in"),
        ("eos_token_id", 2**31, "eos_token_id must be a token in"),
        ("add_bos_token", [], "add_bos_token must be true or false; got"),
    ],
)
def test_parts_of_a_tokenizer_are_of_their_kind(tmp_path, key, value, message):
    path = write(tmp_path, **{f"tokenizer__ggml__{key}": value})
    with pytest.raises(ValueError, match=f"m.gguf.*{message}"):
        Tokenizer(path)
