"""A GGUF file's tokenizer gives the ids that transformers and llama.cpp give."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from experiments.fetch import FetchError, smollm2
from lora_jax.files.gguf_tokenizer import build_tokenizer
from lora_jax.files.tokenizer import load_tokenizer

from .test_gguf import write

GOLDEN = Path(__file__).parents[1] / "golden" / "smollm_tokens.json"
PIECES = GOLDEN.with_name("sentencepiece.json")
# The model's vocabulary lacks some bytes: of control characters and unused planes.
WRITTEN = st.characters(
    max_codepoint=0x3FFFF, exclude_categories=["Cc", "Cs"], include_characters="\t\n\r"
)
ALPHABET = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
# "12" and "t1" are merges that a rule may forbid.
MERGES = ["1 2", "12 3", "t 1", "a b", "Ġ a", "Ġ Ġ"]
TOKENS = [*ALPHABET, *("".join(m.split()) for m in MERGES), "<s>", "</s>", "<tool>"]


def metadata(**changes):
    kinds = [1] * (len(TOKENS) - 3) + [3, 3, 4]
    fields = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": TOKENS,
        "merges": MERGES,
        "token_type": np.array(kinds),
        "bos_token_id": len(TOKENS) - 3,
        "eos_token_id": len(TOKENS) - 2,
    } | changes
    return {f"tokenizer.ggml.{k}": v for k, v in fields.items() if v is not None}


def assert_covers(text, spans):
    """Every character is some token's."""
    at = 0
    for start, end in spans:
        assert start <= at <= end
        at = end
    assert at == len(text)


def tokens_of(rule, text):
    tokenizer, _ = build_tokenizer(Path("m.gguf"), metadata(pre=rule))
    return tokenizer.encode(text, add_special_tokens=False).tokens


@pytest.mark.parametrize(
    ("rule", "digits"),
    [
        ("smollm", ["a", "1", "2", "3", "1"]),
        ("gpt-2", ["a", "123", "1"]),
        ("qwen2", ["a", "1", "2", "3", "1"]),
        ("llama-bpe", ["a", "123", "1"]),
    ],
)
def test_each_rule_splits_numbers_its_way(rule, digits):
    assert tokens_of(rule, "a1231") == digits
    assert tokens_of(rule, "t1") == ["t", "1"]  # though there is a merge
    assert tokens_of(rule, "a  a") == ["a", "Ġ", "Ġa"]


def test_a_rule_that_is_not_known_is_an_error_with_the_known_ones():
    with pytest.raises(ValueError, match=r"one of \['gpt-2', .*'smollm'\]; got 'new'"):
        build_tokenizer(Path("m.gguf"), metadata(pre="new"))
    with pytest.raises(ValueError, match=r"byte-level BPE .*; its type is 't5'"):
        build_tokenizer(Path("m.gguf"), metadata(model="t5"))


def test_special_tokens_are_whole_and_user_defined_ones_are_kept_in_text():
    tokenizer, special = build_tokenizer(Path("m.gguf"), metadata())
    encoding = tokenizer.encode("a<s><tool>b</s>")
    assert encoding.tokens == ["a", "<s>", "<tool>", "b", "</s>"]
    assert tokenizer.decode(encoding.ids) == "a<tool>b"
    assert (special.bos_id, special.eos_id) == (len(TOKENS) - 3, len(TOKENS) - 2)
    assert special.stop_ids == (special.eos_id,)
    assert special.pad_id is special.chat_template is None


def test_bos_comes_first_where_the_file_says_so_and_for_llama_3():
    for changes, begins in (
        ({}, False),
        ({"add_bos_token": True}, True),
        ({"pre": "llama-bpe"}, True),
        ({"pre": "llama-bpe", "add_bos_token": False}, False),
    ):
        tokenizer, special = build_tokenizer(Path("m.gguf"), metadata(**changes))
        ids = tokenizer.encode("ab").ids
        assert (ids[0] == special.bos_id) is begins


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merges": None}, "merges must be a list, got NoneType"),
        ({"merges": ["a b c"]}, "merge 'a b c' must join two"),
        ({"merges": ["a zz"]}, "merge 'a zz' must join two"),
        ({"tokens": [*TOKENS, "a"]}, r"\d+ tokens and \d+ token types; 1 tokens app"),
        ({"tokens": [*TOKENS[:-1], "a" * 1001]}, "1 tokens have over 1000 characters"),
        ({"model": "llama"}, "scores must be a list, got NoneType"),
        ({"model": "llama", "scores": np.zeros(3)}, r"\d+ tokens and 3 scores"),
        (
            {"model": "llama", "scores": np.full(len(TOKENS), np.nan)},
            "scores must be finite",
        ),
        ({"eos_token_id": 9999}, r"eos_token_id must be a token in \[0, .*got 9999"),
    ],
)
def test_parts_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=rf"m.gguf.*{message}"):
        build_tokenizer(Path("m.gguf"), metadata(**changes))


def test_a_file_is_loaded_with_its_template_and_all_its_ends(tmp_path):
    def add(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(TOKENS)
        writer.add_token_merges(MERGES)
        writer.add_token_types([1] * (len(TOKENS) - 3) + [3, 3, 4])
        writer.add_eos_token_id(len(TOKENS) - 2)
        writer.add_eot_token_id(len(TOKENS) - 3)
        writer.add_chat_template("{{ eos_token }}")

    tokenizer = load_tokenizer(write(tmp_path / "m.gguf", add=add))
    assert tokenizer.vocab_size == len(TOKENS)
    assert tokenizer.special.stop_ids == (len(TOKENS) - 3, len(TOKENS) - 2)
    assert tokenizer.render_chat([{"role": "user", "content": ""}]) == "</s>"


def sentencepiece(name, **changes):
    pieces = json.loads(PIECES.read_text(encoding="utf-8"))[name]
    fields = {
        "model": "llama",
        "pre": None,
        "merges": None,
        "tokens": pieces["tokens"],
        "scores": np.array(pieces["scores"], np.float32),
        "token_type": np.array(pieces["token_type"]),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_space_prefix": name == "llama",
    } | changes
    return build_tokenizer(Path("m.gguf"), metadata(**fields))[0], pieces


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_sentencepieces_ids_are_its_own(name):
    tokenizer, pieces = sentencepiece(name)
    assert len(pieces["texts"]) == 25
    for text, ids in pieces["texts"].items():
        assert tokenizer.encode(text).ids == [1, *ids], text
        assert tokenizer.decode(ids) == text


def test_sentencepieces_bos_comes_first_unless_the_file_says_no():
    assert sentencepiece("llama")[0].encode("a").tokens[0] == "<s>"
    tokenizer, _ = sentencepiece("llama", add_bos_token=False)
    assert tokenizer.encode("a</s>").tokens == ["▁a", "</s>"]


def test_runs_of_spaces_are_the_tokens_that_newer_files_write_as_spaces():
    tokenizer, pieces = sentencepiece("gemma")
    spaces = [
        token.replace("▁", " ") if kind == 4 else token
        for token, kind in zip(pieces["tokens"], pieces["token_type"], strict=True)
    ]
    newer, _ = sentencepiece("gemma", tokens=spaces)
    for text in pieces["texts"]:
        assert newer.encode(text).ids == tokenizer.encode(text).ids
        assert newer.decode(newer.encode(text).ids) == text


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_sentencepiece_file_gives_spans_and_streams_its_text(name, tmp_path):
    pieces = json.loads(PIECES.read_text(encoding="utf-8"))[name]

    def add(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(pieces["tokens"])
        writer.add_token_scores(pieces["scores"])
        writer.add_token_types(pieces["token_type"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_add_space_prefix(name == "llama")

    tokenizer = load_tokenizer(write(tmp_path / "m.gguf", add=add))
    for text, ids in pieces["texts"].items():
        tokens = tokenizer.encode_text(text)
        assert tokens.ids == [1, *ids]
        stream = tokenizer.stream()
        assert "".join(stream.push(i) for i in ids) == text
        assert_covers(text, tokens.spans)


@pytest.fixture(scope="module")
def smollm():
    try:
        return load_tokenizer(smollm2())
    except FetchError as error:
        pytest.skip(f"real weights can't be fetched: {error}")


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.mark.real
def test_smollms_ids_are_those_of_transformers_and_llama_cpp(smollm, golden):
    assert len(golden["texts"]) == 20
    for text, ids in golden["texts"].items():
        assert smollm.encode([text]).ids == [ids], text
        assert smollm.encode_text(text).ids == ids
        assert smollm.decode(ids, skip_special=False) == text


@pytest.mark.real
def test_smollms_published_ids(smollm):
    """Of HuggingFaceTB/SmolLM2-135M-Instruct, as cpldcpu/smollm.c's reference.json."""
    texts = ["Hello", "The capital of France is", "def fibonacci(n):"]
    assert smollm.encode(texts).ids == [
        [19556],
        [504, 3575, 282, 4649, 314],
        [1604, 3987, 46477, 24, 94, 727],
    ]


@pytest.mark.real
@given(text=st.text(WRITTEN, max_size=30))
def test_any_text_comes_back_whole_and_streamed(smollm, text):
    tokens = smollm.encode_text(text)
    assert smollm.decode(tokens.ids, skip_special=False) == text
    stream = smollm.stream()
    pieces = [stream.push(i) for i in tokens.ids]
    shown = smollm.decode(tokens.ids).replace("\ufffd", "")
    assert "".join(pieces) == shown
    assert_covers(text, tokens.spans)


@pytest.mark.real
def test_chats_are_those_of_transformers(smollm, golden):
    for chat in golden["chats"]:
        messages = chat["messages"]
        assert smollm.render_chat(messages, add_generation_prompt=False) == chat["text"]
        assert smollm.render_chat(messages[:-1]) == chat["prompt"]
        (tokens,) = smollm.encode_chat(messages)
        assert smollm.decode(tokens.ids, skip_special=False) == chat["text"]
        said = [i for i, m in zip(tokens.ids, tokens.mask, strict=True) if m]
        assert (
            smollm.decode(said, skip_special=False)
            == {
                2: "é😀 <|im_end|>",
                # The line break before "  two" shares a token with its first space.
                5: "one<|im_end|>\n  two\n\n<|im_end|>",
            }[len(messages)]
        )


@pytest.mark.real
def test_marked_turns_are_those_of_transformers(smollm, golden, monkeypatch):
    special = smollm.special._replace(chat_template=golden["template"])
    monkeypatch.setattr(smollm, "special", special)
    monkeypatch.setattr(smollm, "_chat", None)
    for chat in golden["chats"]:
        messages, text = chat["messages"], chat["marked_text"]
        assert smollm.render_chat(messages, add_generation_prompt=False) == text
        (tokens,) = smollm.encode_chat(messages)
        assert tokens.ids == chat["marked_ids"]
        assert tokens.mask == chat["marked_mask"]
