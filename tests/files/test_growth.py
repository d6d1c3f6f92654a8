"""A tokenizer that lengthens a text without end is refused, before it does."""

import base64
import json

import pytest
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors

from lora_jax.files.growth import text_growth
from lora_jax.files.tokenizer import Tokenizer

DOUBLE = normalizers.Replace("a", "aa")
BYTES = pre_tokenizers.ByteLevel()


def made(folder, **parts):
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"a": 0, "<s>": 1}, "a"))
    tokenizer.add_special_tokens(["<s>"])
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": normalizers.Sequence([DOUBLE] * 4)},
        {"normalizer": normalizers.Replace("", "b" * 1000)},
        {"normalizer": normalizers.Replace(Regex("x*"), "b" * 1000)},
        {"normalizer": normalizers.Sequence([normalizers.Prepend("bbb")] * 4)},
        {"pre_tokenizer": pre_tokenizers.Sequence([BYTES] * 4)},
        {
            "normalizer": normalizers.Sequence([DOUBLE] * 2),
            "pre_tokenizer": pre_tokenizers.Sequence([BYTES] * 3),
        },
    ],
    ids=["doubling", "nothing", "regex", "prepend", "bytes", "together"],
)
def test_a_text_that_would_grow_is_refused(parts, tmp_path):
    tokenizer = Tokenizer(made(tmp_path, **parts))
    tokenizer.encode_text("a")
    with pytest.raises(ValueError, match=r"must have at most .* for this tokenizer"):
        tokenizer.encode_text("a" * 400_000)
    with pytest.raises(ValueError, match=r"text 1 must have at most"):
        tokenizer.encode(["", "a" * 400_000])


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"normalizer": normalizers.Sequence([DOUBLE] * 40)},
            r"at most 16,384 characters of one; they may make 1\.1e\+12",
        ),
        (
            {"pre_tokenizer": pre_tokenizers.Sequence([BYTES] * 40)},
            r"characters of one; they may make 4\.05e\+18",
        ),
        (
            {"decoder": decoders.Sequence([decoders.Replace("a", "aa")] * 40)},
            r"decoder must make at most 64 characters of one; it may make 1\.1e\+12",
        ),
        (
            {"normalizer": normalizers.Sequence([normalizers.NFC()] * 300)},
            "at most 256; there are 300",
        ),
        (
            {
                "post_processor": processors.TemplateProcessing(
                    single="<s> $A $A", special_tokens=[("<s>", 1)]
                )
            },
            "must write a text once; it writes it 2 times",
        ),
        (
            {
                "post_processor": processors.TemplateProcessing(
                    single="<s> " * 2000 + "$A", special_tokens=[("<s>", 1)]
                )
            },
            "at most 1024; it has 2000",
        ),
    ],
    ids=["doubling", "bytes", "decoder", "parts", "twice", "special"],
)
def test_what_never_ends_is_refused_at_once(parts, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        Tokenizer(made(tmp_path, **parts))
    assert str(tmp_path / "tokenizer.json") in str(caught.value)


def test_a_map_of_characters_is_measured():
    def growth(text):
        data = (4).to_bytes(4, "little") + bytes(4) + text.encode() + b"\0"
        state = {"type": "Precompiled"}
        state["precompiled_charsmap"] = base64.b64encode(data).decode()

        class Fake:
            def __getstate__(self):
                return json.dumps(state).encode()

        class Parts:
            normalizer = Fake()
            pre_tokenizer = decoder = post_processor = None

        return text_growth(Parts())

    assert growth("ab") == 1
    assert growth("ab" * 900) == 100


@pytest.mark.parametrize(
    ("growth", "parts"),
    [
        (
            2,
            {  # Llama 2's
                "normalizer": normalizers.Sequence(
                    [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
                ),
                "decoder": decoders.Sequence(
                    [
                        decoders.Replace("▁", " "),
                        decoders.ByteFallback(),
                        decoders.Fuse(),
                        decoders.Strip(" ", 1, 0),
                    ]
                ),
            },
        ),
        (
            1,
            {  # BERT's
                "normalizer": normalizers.BertNormalizer(),
                "pre_tokenizer": pre_tokenizers.BertPreTokenizer(),
                "decoder": decoders.WordPiece(),
            },
        ),
        (
            1,
            {  # Llama 3's, Qwen's
                "normalizer": normalizers.NFC(),
                "pre_tokenizer": pre_tokenizers.Sequence(
                    [pre_tokenizers.Split(Regex("x"), "isolated"), BYTES]
                ),
                "post_processor": processors.Sequence(
                    [
                        processors.ByteLevel(),
                        processors.TemplateProcessing(
                            single="<s> $A", special_tokens=[("<s>", 1)]
                        ),
                    ]
                ),
                "decoder": decoders.ByteLevel(),
            },
        ),
    ],
    ids=["llama2", "bert", "llama3"],
)
def test_real_tokenizers_take_a_mebibyte(growth, parts, tmp_path):
    made(tmp_path, **parts)
    file = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert text_growth(file) == growth
