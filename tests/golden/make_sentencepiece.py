"""Writes tests/golden/sentencepiece.json: what SentencePiece itself makes of texts.

Run once, with sentencepiece 0.2.1 or newer installed:

    python tests/golden/make_sentencepiece.py

Two small BPE models are trained on E2E's sentences with Llama 2's and Gemma's settings
(the one puts a space before a text, the other has pieces of user-defined spaces); their
pieces, scores and types are what a converter would put into a GGUF file.
"""

import gzip
import io
import json
from pathlib import Path

import sentencepiece

from tests.golden.make_smollm_tokens import TEXTS

ROOT = Path(__file__).parents[2]
SENTENCES = ROOT / "experiments" / "e2e" / "data" / "valid.txt.gz"
OUT = Path(__file__).parent / "sentencepiece.json"
VARIANTS = {
    "llama": {"add_dummy_prefix": True},
    "gemma": {
        "add_dummy_prefix": False,
        "user_defined_symbols": ["<tool>", "\u2581" * 2, "\u2581" * 3],
    },
}
MORE = [
    "The Phoenix is a cheap French restaurant near Crowne Plaza Hotel .",
    "  The  price   range    is      £20-25",
    "aaaa bbbbbb aaaaa",
    "name : Blue Spice | eatType : coffee shop",
    "a<tool>b <tool>",
]


def train(settings: dict) -> sentencepiece.SentencePieceProcessor:
    """Trains a model on the sentences and their tables."""
    with gzip.open(SENTENCES, "rt", encoding="utf-8") as file:
        lines = [line.strip() for line in file][:2000]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        character_coverage=0.999,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
        **settings,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def kind_of(model: sentencepiece.SentencePieceProcessor, i: int) -> int:
    """Returns GGUF's number for the type of a piece."""
    kinds = {
        2: model.is_unknown(i),
        3: model.is_control(i),
        5: model.is_unused(i),
        6: model.is_byte(i),
    }
    special = [kind for kind, holds in kinds.items() if holds]
    if special:
        return special[0]
    user = VARIANTS["gemma"]["user_defined_symbols"]
    return 4 if model.id_to_piece(i) in user and model.get_score(i) == 0 else 1


def main() -> None:
    """Trains both and writes their pieces, and the ids of every text."""
    golden = {}
    for name, settings in VARIANTS.items():
        model = train(settings)
        size = model.get_piece_size()
        golden[name] = {
            "tokens": [model.id_to_piece(i) for i in range(size)],
            "scores": [model.get_score(i) for i in range(size)],
            "token_type": [kind_of(model, i) for i in range(size)],
            "texts": {text: model.encode(text) for text in [*TEXTS, *MORE]},
        }
    text = json.dumps(golden, ensure_ascii=False, separators=(",", ":"))
    OUT.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
