"""JSONL and labels are parsed strictly, listing every bad line."""

import numpy as np
import pytest

from lora_jax.train.examples import encode_labels, label_vocabulary, read_jsonl


def write(tmp_path, *lines):
    path = tmp_path / "train.jsonl"
    path.write_bytes(
        b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines)
    )
    return path


def test_good_lines_are_read_whole_and_blank_ones_skipped(tmp_path):
    path = write(
        tmp_path,
        '{"text": "a\u2028b", "label": 1, "id": 7}',
        "",
        '{"text": "é", "label": 0}\r',
    )
    assert read_jsonl(path) == [
        {"text": "a\u2028b", "label": 1, "id": 7},
        {"text": "é", "label": 0},
    ]
    with pytest.raises(ValueError, match=r"train.jsonl:3: has no 'id'"):
        read_jsonl(path, fields={"id": (int,)})


def test_every_bad_line_is_named_with_its_number_and_reason(tmp_path):
    path = write(
        tmp_path,
        '{"text": "ok", "label": "pos"}',
        '{"text": "cut',
        '["text"]',
        '{"label": 1}',
        '{"text": 3, "label": 1}',
        '{"text": " ", "label": 1}',
        '{"text": "x", "label": 1.5}',
        '{"text": "x", "label": true}',
        b'{"text": "\xff", "label": 1}',
        "[" * 100_000,
        '{"label": ' + "9" * 5000 + "}",
        '{"text": "x", "label": 1, "text": "y"}',
        '{"text": "x", "label": 1, "more": [{"a": 1, "a": 2}]}',
    )
    with pytest.raises(ValueError, match="has 12 bad lines") as error:
        read_jsonl(path)
    lines = str(error.value).splitlines()[1:]
    for line, (number, reason) in zip(
        lines,
        [
            (2, "not JSON: Unterminated string"),
            (3, "must be an object {...}; got list"),
            (4, "has no 'text'; its keys are ['label']"),
            (5, "'text' must be str; got 3"),
            (6, "'text' must not be empty"),
            (7, "'label' must be str or int; got 1.5"),
            (8, "'label' must be str or int; got True"),
            (9, "not UTF-8 at byte 10"),
            (10, "not JSON: maximum recursion depth"),
            (11, "not JSON: Exceeds the limit"),
            (12, "has the key 'text' twice"),
            (13, "has the key 'a' twice"),
        ],
        strict=True,
    ):
        assert line.strip().startswith(f"{path}:{number}: {reason}")


def test_at_most_20_bad_lines_are_shown(tmp_path):
    path = write(tmp_path, *["{"] * 33)
    with pytest.raises(ValueError, match=r"(?s)has 33 bad lines.*and 13 more") as error:
        read_jsonl(path)
    assert str(error.value).count("not JSON") == 20


@pytest.mark.parametrize(
    "text", ["text,label\nx,1\n", '[{"text": "x", "label": 1}]', "[\n1"]
)
def test_a_file_of_another_format_is_told_what_a_line_is(tmp_path, text):
    with pytest.raises(ValueError, match=r"must be one JSON object.* CSV"):
        read_jsonl(write(tmp_path, text))
    with pytest.raises(ValueError, match="bad line") as error:
        read_jsonl(write(tmp_path, '{"text": "x", "label": 1}', text))
    assert "CSV" not in str(error.value)


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    path = write(tmp_path, b'\xef\xbb\xbf{"text": "a", "label": 1}')
    assert read_jsonl(path) == [{"text": "a", "label": 1}]


def test_no_file_and_no_data_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must exist; it is a folder"):
        read_jsonl(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl must exist"):
        read_jsonl(tmp_path / "nothing.jsonl")
    with pytest.raises(ValueError, match="at least 1 example; it has 0 lines"):
        read_jsonl(write(tmp_path, "", "  "))


def test_a_vocabulary_is_sorted_names_or_all_numbers_up_to_the_largest():
    assert label_vocabulary(["b", "a", "b"]) == ["a", "b"]
    assert label_vocabulary([3, 1]) == [0, 1, 2, 3]
    np.testing.assert_array_equal(encode_labels(["b", "a"], ["a", "b"]), [1, 0])


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (["a", 1], TypeError, "all strings or all integers; got int, str"),
        ([0.5], TypeError, "got float"),
        ([True, False], TypeError, "got bool"),
        (["a", "a"], ValueError, r"at least 2 classes; got 1: \['a'\]"),
        ([0, 0], ValueError, r"at least 2 classes; got 1: \[0\]"),
        ([-1, 2], ValueError, "at least 0; got -1"),
        ([], ValueError, "at least 2 classes; got 0"),
        ([0, 987654321], ValueError, "class numbers below 100,000; got 987,654,321"),
    ],
)
def test_bad_vocabularies_are_named(labels, error, message):
    with pytest.raises(error, match=message):
        label_vocabulary(labels)


def test_labels_out_of_range_are_named_with_their_examples():
    with pytest.raises(
        ValueError,
        match=r"labels of val.jsonl .* 2 classes \[0, 1\]; got 2 .*"
        r"2 \(example 2\), -1 \(example 4\)",
    ):
        encode_labels([0, 2, 1, -1], [0, 1], source="val.jsonl")


def test_half_a_character_and_an_endless_line_are_bad_lines(tmp_path):
    path = write(
        tmp_path,
        r'{"text": "\ud83d\ude00 \u00e9", "label": 1}',
        r'{"text": "a\ud800", "label": 1}',
        r'{"text": "a", "label": 1, "\udc00": []}',
        '{"text": "' + "a" * 2**24 + '", "label": 1}',
    )
    with pytest.raises(ValueError, match="has 3 bad lines") as error:
        read_jsonl(path)
    lines = str(error.value).splitlines()[1:]
    assert lines == [
        f"  {path}:2: not Unicode: it contains a lone surrogate, '\\ud800'",
        f"  {path}:3: not Unicode: it contains a lone surrogate, '\\udc00'",
        f"  {path}:4: has 16,777,240 bytes; at most 16,777,216 are allowed",
    ]
