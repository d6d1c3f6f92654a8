"""Texts to ids, with nothing inherited from the file but its vocabulary."""

import sys

import pytest
import tokenizers

from lora_jax.io.tokenizer import Tokenizer, load_tokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "man", "eats", "bread"]


@pytest.fixture
def folder(tmp_path):
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, "[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_padding_and_truncation_of_the_file_are_off(folder):
    encoded = load_tokenizer(folder).encode(["a man eats bread", "a"])
    assert encoded.ids == [[2, 4, 5, 6, 7, 3], [2, 4, 3]]
    assert encoded.truncated == 0


def test_truncation_keeps_the_closing_token_and_counts_texts(folder):
    tokenizer = load_tokenizer(folder)
    texts = ["a man eats bread", "a man", "a man eats"]
    encoded = tokenizer.encode(texts, max_length=4)
    assert encoded.ids == [[2, 4, 5, 3], [2, 4, 5, 3], [2, 4, 5, 3]]
    assert encoded.truncated == 2
    assert tokenizer.encode(texts[:1]).ids == [[2, 4, 5, 6, 7, 3]]


def test_an_empty_text_and_an_empty_batch(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode([""]).ids == [[2, 3]]
    assert tokenizer.encode([]) == ([], 0)


def test_decode_leaves_special_tokens_out(folder):
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode([2, 4, 5, 3]) == "a man"
    assert tokenizer.vocab_size == 8


def test_texts_of_a_wrong_kind_are_named(folder):
    tokenizer = load_tokenizer(folder)
    with pytest.raises(TypeError, match=r"got one string, 'a man'"):
        tokenizer.encode("a man")
    with pytest.raises(TypeError, match=r"got NoneType at index 1 \(2 of 3"):
        tokenizer.encode(["a", None, 3])
    with pytest.raises(ValueError, match=r"max_length must be above 2, .*got 2"):
        tokenizer.encode(["a"], max_length=2)


def test_a_folder_without_a_tokenizer_gives_none(tmp_path):
    assert load_tokenizer(tmp_path) is None


def test_a_damaged_or_missing_file_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer.json must be .*can't be read"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none.json must be"):
        Tokenizer(tmp_path / "none.json")


def test_without_the_package_the_error_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r'pip install "lora_jax\[train\]"'):
        load_tokenizer(folder)
