"""Texts to ids, with nothing inherited from the file but its vocabulary."""

import itertools
import json
import sys

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.files.special_tokens import SpecialTokens
from lora_jax.files.tokenizer import Tokenizer, close_gaps, load_tokenizer

PRINTED = [*range(33, 127), *range(161, 173), *range(174, 256)]
SHIFTED = [byte for byte in range(256) if byte not in PRINTED]
# How byte-level tokenizers write each byte: GPT-2's bytes_to_unicode.
SPELLING = {b: chr(b) for b in PRINTED} | {
    b: chr(256 + i) for i, b in enumerate(SHIFTED)
}

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
    with pytest.raises(ValueError, match=r"tokenizer.json must be .*can't use it"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none.json must be"):
        Tokenizer(tmp_path / "none.json")


def write_words(folder, **parts):
    """Writes a tokenizer of one word, with parts that the package can't use."""
    empty = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}
    whole = {"version": "1.0", **dict.fromkeys(empty), "added_tokens": []}
    text = json.dumps({**whole, "truncation": None, "padding": None, "model": model})
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(text) | parts))


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "!"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AQAAAA=="}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "a"]]}},
        {"model": {"type": "Unigram", "vocab": [], "unk_id": None}},
        {},  # an unknown word where there is no token for it
    ],
    ids=["panic", "panic later", "merges", "unigram", "unknown"],
)
def test_what_the_package_panics_on_is_an_error_with_the_file(tmp_path, parts):
    write_words(tmp_path, **parts)
    for encode in (lambda t: t.encode_text("b c"), lambda t: t.encode(["b c"])):
        with pytest.raises(ValueError, match=f"{tmp_path}/tokenizer.json must be a"):
            encode(load_tokenizer(tmp_path))


def test_what_the_package_raises_names_the_file(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    file = folder / "tokenizer.json"
    for text in ("a\ud800", "\ud83d\ude00"):
        with pytest.raises(ValueError, match="Unicode; it contains a lone surrogate"):
            tokenizer.encode_text(text)
        with pytest.raises(ValueError, match="text 1 must be Unicode"):
            tokenizer.encode(["a", text])
    with pytest.raises(ValueError, match="at most 1,048,576 bytes; it has 1,048,578"):
        tokenizer.encode_text("é" * (2**19 + 1))
    for ids in ([-1], [2**40]):
        with pytest.raises(
            ValueError, match=f"{file} must be a tokenizer; tokenizers can"
        ):
            tokenizer.decode(ids)


def test_without_the_package_the_error_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r'pip install "lora_jax\[train\]"'):
        load_tokenizer(folder)


def save_json(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_special_tokens_and_templates_come_from_the_files_beside(folder):
    assert load_tokenizer(folder).special == SpecialTokens()
    save_json(
        folder,
        tokenizer_config={
            "bos_token": {"content": "[CLS]"},
            "eos_token": "[SEP]",
            "unk_token": "[UNK]",
            "pad_token": "nowhere",
            "chat_template": [{"name": "default", "template": "A"}],
        },
        generation_config={"eos_token_id": [7], "pad_token_id": 0},
        config={"eos_token_id": 5},
    )
    file = folder / "tokenizer_config.json"
    texts = {"bos_token": "[CLS]", "eos_token": "[SEP]", "unk_token": "[UNK]"}
    texts["pad_token"] = "nowhere"
    expected = SpecialTokens(2, 3, 0, (3, 7), "A", file, texts)
    assert load_tokenizer(folder).special == expected
    (folder / "chat_template.jinja").write_text("B")
    expected = expected._replace(
        chat_template="B", template_file=folder / "chat_template.jinja"
    )
    assert load_tokenizer(folder).special == expected
    save_json(folder, generation_config={"eos_token_id": "x"})
    with pytest.raises(ValueError, match=r"generation_config.json: token ids .*'x'"):
        load_tokenizer(folder)
    (folder / "config.json").write_text("[]")
    save_json(folder, generation_config={})
    with pytest.raises(
        ValueError, match=r"config.json must be a JSON object; got list"
    ):
        load_tokenizer(folder)


def test_a_text_begins_once_and_never_ends_by_itself(folder):
    tokenizer = load_tokenizer(folder)
    expected = ([2, 4, 5], [(0, 0), (0, 1), (1, 5)])
    assert tokenizer.encode_text("a man") == expected
    assert tokenizer.encode_text("[CLS] a man").ids == [2, 4, 5]
    assert tokenizer.encode_text("") == ([2], [(0, 0)])


def byte_tokenizer(folder):
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, [])
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def test_a_stream_never_gives_half_a_character(tmp_path):
    tokenizer = byte_tokenizer(tmp_path)
    text = "aé日😀b"
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in tokenizer.encode_text(text).ids]
    assert pieces == ["a", "", "é", "", "", "日", "", "", "", "😀", "b"]


@given(st.binary(max_size=12))
def test_bytes_that_are_no_text_are_left_out_of_a_stream(tmp_path_factory, data):
    tokenizer = byte_tokenizer(tmp_path_factory.mktemp("t"))
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    ids = [alphabet.index(SPELLING[byte]) for byte in data]
    stream = tokenizer.stream()
    shown = "".join(stream.push(i) for i in ids)
    assert "\ufffd" not in shown
    assert shown == data.decode("utf-8", "replace").replace("\ufffd", "")


@given(st.text(max_size=8), st.lists(st.integers(0, 8), max_size=6))
def test_closed_gaps_hold_every_character_in_order(text, cuts):
    cuts = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    offsets = list(itertools.pairwise(cuts))[::2]  # with gaps between
    spans = close_gaps(text, offsets)
    assert len(spans) == len(offsets)
    held = {i for start, end in spans for i in range(start, end)}
    assert held == (set(range(len(text))) if spans else set())
    for (start, end), (a, b) in zip(spans, offsets, strict=True):
        assert start <= a <= b <= end
