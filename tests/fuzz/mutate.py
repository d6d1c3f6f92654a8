"""Mutating bytes, JSON values, and the headers of safetensors and GGUF files."""

import copy
import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

NASTY: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, -(2**63)),
    *(10**400, -(10**400), 0.0, -0.0, 0.5, 1e-300, 1e39, 1e300, float("inf")),
    *(float("-inf"), float("nan"), "", " ", "a", "\ud800", "\x00", "é😀\u0301"),
    *(
        "a" * 5000,
        "../../x",
        "/etc/passwd",
        "(a+)+$",
        "[",
        "{{ 1 }}",
        "%s" * 9,
        "1e999",
    ),
    *([], [[]], {}, [None], [0], ["a"], {"a": 1}, {"": []}, [[[[[[[[]]]]]]]]),
]
WORDS = [b"\x00", b"\xff", b"\xff" * 8, b"[" * 300, b"{" * 300, b'"', b"\\ud800", b"\n"]
WORDS += [
    b"9" * 400,
    b"-",
    b"1e999",
    b"Infinity",
    b"NaN",
    b"null",
    b"&a ",
    b"*a",
    b"!!x",
]


def damage_bytes(rng: Random, data: bytes) -> bytes:
    """Changes, deletes, repeats or inserts a few bytes."""
    work = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 4, 16])):
        at = rng.randrange(len(work) + 1)
        end = min(len(work), at + rng.choice([1, 1, 2, 4, 8, 64]))
        match rng.randrange(7):
            case 0 if at < len(work):
                work[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(work):
                work[at] = rng.randrange(256)
            case 2:
                del work[at:end]
            case 3:
                work[at:at] = work[at:end] * rng.choice([1, 2, 50])
            case 4:
                work[at:end] = rng.choice(WORDS)
            case 5:
                del work[at:]
            case _:
                word = rng.choice([2**31, 2**32 - 1, 2**63, 2**64 - 1, 0, 1, 255])
                work[at : at + 8] = word.to_bytes(8, "little")
    return bytes(work)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Returns every (container, key) in a JSON value."""
    found, left = [], [value]
    while left:
        node = left.pop()
        keys = node if isinstance(node, dict) else range(len(node))
        found += [(node, key) for key in keys]
        left += [node[key] for key in keys if isinstance(node[key], dict | list)]
    return found


def damage_json(rng: Random, value: Any) -> Any:
    """Replaces, removes, renames, wraps or repeats values of a JSON object."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        places = _places(value)
        if not places:
            break
        node, key = rng.choice(places)
        match rng.randrange(8):
            case 0:
                del node[key]
            case 1 if isinstance(node, dict):
                node[rng.choice(["", "a", "\ud800", "../x", "lora", key + "x"])] = (
                    node.pop(key)
                )
            case 2:
                node[key] = [node[key]]
            case 3:
                node[key] = copy.deepcopy(rng.choice(places)[0])
                if node[key] is value:
                    node[key] = {}
            case 4 if isinstance(node, list):
                node *= rng.choice([0, 2, 30])
            case _:
                node[key] = copy.deepcopy(rng.choice(NASTY))
    return value


def to_json(value: Any) -> bytes:
    """Encodes JSON, including lone surrogates and huge integers."""
    return json.dumps(value).encode()


def damage_json_file(rng: Random, data: bytes) -> bytes:
    """Damages the values of a JSON file, or sometimes its bytes."""
    if rng.random() < 0.25:
        return damage_bytes(rng, data)
    return to_json(damage_json(rng, json.loads(data)))


def damage_safetensors(rng: Random, data: bytes) -> bytes:
    """Damages values in the header, or any bytes."""
    if rng.random() < 0.4:
        return damage_bytes(rng, data)
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if rng.random() < 0.3:
        names = [name for name in header if name != "__metadata__"]
        new = ["lora", "k/x", "lora/", "params/a", "a" * 2000, "..", "lora//a", "é"]
        header[rng.choice(new)] = header.pop(rng.choice(names))
        text = to_json(header)
    elif rng.random() < 0.3:
        name = rng.choice([name for name in header if name != "__metadata__"])
        header[name]["dtype"] = rng.choice(
            ["F64", "I8", "BOOL", "F8_E4M3", "BF16", "X"]
        )
        text = to_json(header)
    else:
        text = to_json(damage_json(rng, header))
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def encode_gguf(
    fields: dict[str, Any], tensors: dict[str, tuple[list[int], int, bytes]]
) -> bytes:
    """Encodes a GGUF file with any fields: Python values, or raw (type, bytes)."""
    out = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(fields))]

    def text(value: str) -> bytes:
        data = value.encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(data)) + data

    def one(value: Any) -> tuple[int, bytes]:
        if isinstance(value, tuple):
            return value
        if isinstance(value, bool):
            return 7, bytes([value])
        if isinstance(value, int):
            return 11, struct.pack("<q", max(min(value, 2**63 - 1), -(2**63)))
        if isinstance(value, float):
            return 12, struct.pack("<d", value)
        if isinstance(value, list):
            parts = [one(item) for item in value] or [(8, b"")]
            kind = parts[0][0]
            body = b"".join(data for k, data in parts if k == kind)
            count = len([1 for k, _ in parts if k == kind]) * bool(value)
            return 9, struct.pack("<IQ", kind, count) + body
        return 8, text(value if isinstance(value, str) else str(value))

    for key, value in fields.items():
        kind, data = one(value)
        out += [text(key), struct.pack("<I", kind), data]
    offset, body = 0, []
    for name, (shape, kind, data) in tensors.items():
        dims = shape[::-1]
        out += [text(name), struct.pack("<I", len(dims))]
        out += [struct.pack("<Q", dim % 2**64) for dim in dims]
        out += [struct.pack("<IQ", kind, offset)]
        body.append(data + bytes(-len(data) % 32))
        offset += len(body[-1])
    head = b"".join(out)
    return head + bytes(-len(head) % 32) + b"".join(body)


def damage_gguf(
    rng: Random,
    fields: dict[str, Any],
    tensors: dict[str, tuple[list[int], int, bytes]],
) -> bytes:
    """Damages fields, the tensor table, or bytes."""
    fields, tensors = dict(fields), dict(tensors)
    for _ in range(rng.choice([1, 1, 2, 3])):
        key = rng.choice(sorted(fields))
        name = rng.choice(sorted(tensors))
        shape, kind, data = tensors[name]
        match rng.randrange(8):
            case 0:
                del fields[key]
            case 1 if isinstance(fields[key], list):
                fields[key] = damage_json(rng, fields[key])
            case 2:
                fields[key] = [fields[key]] * rng.choice([0, 1, 3])
            case 3:
                shape = [rng.choice([0, 1, 3, 2**31, 2**63, *shape]) for _ in shape]
                tensors[name] = (shape * rng.choice([0, 1, 1, 3]), kind, data)
            case 4:
                tensors[name] = (shape, rng.choice([*range(41), 2**31]), data)
            case 5:
                new = rng.choice(["", "rope_freqs.weight", "blk.9.attn_q.weight", "x"])
                tensors[new] = tensors.pop(name)
            case _:
                fields[key] = rng.choice(NASTY)
        if not fields or not tensors:
            break
    data = encode_gguf(fields, tensors)
    return damage_bytes(rng, data) if rng.random() < 0.3 else data


Damage = Callable[[Random, bytes], bytes]
