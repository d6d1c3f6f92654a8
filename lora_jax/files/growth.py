"""How much a ``tokenizer.json`` may lengthen a text.

Its parts run in turn: thirty that each write ``aa`` for ``a`` make a gigabyte of one
letter, inside a package that no signal interrupts. So the file is read for it first::

    characters out <= growth * bytes in        growth = product over the parts

What any real tokenizer does once (spelling bytes as characters, composing letters) is
not counted; a second time it is.
"""

import base64
import json
from collections.abc import Iterator
from typing import Any

MAX_PARTS = 256
MAX_ADDED = 1024  # special tokens around a text
MAX_GROWTH = 1 << 14
MAX_DECODED = 64  # growth in decoding, where no text is there to be measured
LONGEST = 18  # characters that Unicode's compositions make of one
ONCE = ("ByteLevel", "Metaspace", "Precompiled", "BertNormalizer", "BertPreTokenizer")


def text_growth(tokenizer: Any) -> float:
    """Returns how many characters may come of each byte of a text.

    Args:
      tokenizer: of the `tokenizers` package.

    Returns:
      At least 1.

    Raises:
      ValueError: if there are too many parts, a text is written twice, special tokens
        are too many, or encoding or decoding may lengthen a text without end.
    """
    parts = [*_parts(tokenizer.normalizer), *_parts(tokenizer.pre_tokenizer)]
    decoders = [*_parts(tokenizer.decoder)]
    processors = [*_parts(tokenizer.post_processor)]
    count = len(parts) + len(decoders) + len(processors)
    if count > MAX_PARTS:
        raise ValueError(f"its parts must be at most {MAX_PARTS}; there are {count}")
    if (decoded := _product(decoders)) > MAX_DECODED:
        raise ValueError(
            f"its decoder must make at most {MAX_DECODED} characters of one; it may "
            f"make {decoded:.3g}"
        )
    added = 0
    for part in processors:
        single = part.get("single") or []
        texts = sum("Sequence" in piece for piece in single)
        if part.get("type") == "TemplateProcessing" and texts > 1:
            raise ValueError(
                f"its post-processor must write a text once; it writes it {texts} times"
            )
        special = part.get("special_tokens") or {}
        tokens = [
            piece["SpecialToken"]["id"]
            for piece in single
            if texts and ("SpecialToken" in piece)
        ]
        added += sum(len(special.get(name, {}).get("ids", [0])) for name in tokens)
    if added > MAX_ADDED:
        raise ValueError(
            f"its special tokens around a text must be at most {MAX_ADDED}; it has "
            f"{added}"
        )
    if (growth := _product(parts)) > MAX_GROWTH:
        raise ValueError(
            f"its normalizer and pre-tokenizer must make at most {MAX_GROWTH:,} "
            f"characters of one; they may make {growth:.3g}"
        )
    return growth


def _parts(part: Any) -> Iterator[dict[str, Any]]:
    """Yields the parts of a part, those of sequences apart."""
    left = [] if part is None else [json.loads(part.__getstate__())]
    while left:
        node = left.pop(0)
        inside = [
            value
            for key in ("normalizers", "pretokenizers", "decoders", "processors")
            for value in node.get(key) or ()
        ]
        left = inside + left
        if not inside:
            yield node


def _product(parts: list[dict[str, Any]]) -> float:
    seen: set[str] = set()
    growth = 1.0
    for part in parts:
        kind = part.get("type", "")
        growth *= _growth(part)
        if kind in ONCE:
            growth *= 3.0 if kind in seen else 1.0
            seen.add(kind)
    return growth


def _growth(part: dict[str, Any]) -> float:
    """Returns how many characters a part may make of one."""
    match part.get("type"):
        case "Replace":
            content, pattern = len(part["content"]), part["pattern"]
            if pattern.get("String"):
                return max(1.0, content / len(pattern["String"]))
            return 1.0 + content  # a regular expression may match between characters
        case "Prepend":
            return 1.0 + len(part["prepend"])
        case "Precompiled":
            return _longest(part["precompiled_charsmap"]) / LONGEST
        case "WordPiece":
            return 1.0 + len(part.get("prefix") or "")
        case "BPEDecoder" | "CTC":
            return 2.0
        case _:
            return 1.0


def _longest(charsmap: str) -> float:
    """Returns the length of the longest text in SentencePiece's map of characters."""
    data = base64.b64decode(charsmap)
    texts = data[4 + int.from_bytes(data[:4], "little") :].split(b"\0")
    return float(max(LONGEST, *(len(t.decode(errors="replace")) for t in texts)))
