"""Text examples: exact loss masks, every bad line listed, truncation counted."""

import json
import unicodedata

import numpy as np
import pytest
import tokenizers
from hypothesis import given

from lora_jax.train.data import TextBatches
from lora_jax.train.text import read_text_examples
from tests.files.test_chat import CHATML, WORDS, chat, save_tokenizer
from tests.files.test_messages import QWEN3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tokenizer(tmp_path_factory.mktemp("t"))


@pytest.fixture(scope="module")
def composing(tmp_path_factory):
    nfc = tokenizers.normalizers.NFC()
    return save_tokenizer(tmp_path_factory.mktemp("t"), normalizer=nfc)


def write(folder, *records):
    path = folder / "train.jsonl"
    path.write_text(
        "\n".join(r if isinstance(r, str) else json.dumps(r) for r in records)
    )
    return path


def read(folder, tokenizer, *records, **options):
    return read_text_examples(write(folder, *records), tokenizer, **options)


def counted(example, tokenizer):
    ids = example["input_ids"][example["loss_mask"] == 1]
    return tokenizer.decode(ids.tolist(), skip_special=False)


def test_a_text_counts_whole_but_for_its_first_token(tmp_path, tokenizer):
    data = read(tmp_path, tokenizer, {"text": "ab\n a"})
    (example,) = data.examples
    assert tokenizer.decode(example["input_ids"], skip_special=False) == (
        "ab\n a<|im_end|>"
    )
    assert example["loss_mask"].tolist() == [0, 1, 1, 1]  # "ab", "\n ", "a", the end
    assert (data.truncated, data.dropped, data.targets) == (0, 0, 3)
    assert example["input_ids"].dtype == np.int32


@given(prompt=WORDS, completion=WORDS.filter(str.strip))
def test_a_token_counts_if_it_has_a_part_of_the_completion(
    tmp_path_factory, tokenizer, composing, prompt, completion
):
    folder = tmp_path_factory.mktemp("d")
    for coder in (tokenizer, composing):
        record = {"prompt": prompt, "completion": completion}
        (example,) = read(folder, coder, record).examples
        tokens = coder.encode_text(prompt + completion)
        ids = [*tokens.ids, coder.special.eos_id]
        assert example["input_ids"].tolist() == ids
        mask = [int(end > len(prompt)) for _, end in tokens.spans] + [1]
        assert example["loss_mask"].tolist() == [0, *mask[1:]]
        apart = coder.encode_text(prompt).ids
        first = mask.index(1)
        assert ids[:first] == apart[:first]  # nothing of the prompt alone counts
        assert counted(example, coder).endswith("<|im_end|>")
        shown = counted(example, coder).replace("\ufffd", "")
        normal = "NFC" if coder is composing else "NFD"
        whole = unicodedata.normalize(normal, completion + "<|im_end|>")
        assert unicodedata.normalize(normal, shown).endswith(whole[1:])


def test_a_token_over_the_border_counts(tmp_path, tokenizer, composing):
    record = {"prompt": "x\n", "completion": " b"}
    (example,) = read(tmp_path, tokenizer, record).examples
    assert counted(example, tokenizer) == "\n b<|im_end|>"
    record = {"prompt": "1e", "completion": "\u0301"}  # é is one token's then
    (example,) = read(tmp_path, composing, record).examples
    assert counted(example, composing) == "é<|im_end|>"


def test_an_end_that_the_text_wrote_is_not_written_twice(tmp_path, tokenizer):
    data = read(tmp_path, tokenizer, {"prompt": "1a", "completion": "b1<|im_end|>"})
    assert counted(data.examples[0], tokenizer) == "ab1<|im_end|>"
    ids = data.examples[0]["input_ids"].tolist()
    assert ids.count(tokenizer.special.eos_id) == 1


def test_messages_count_where_the_assistant_speaks(tmp_path, tokenizer):
    messages = [
        {"role": "user", "content": "11"},
        {"role": "assistant", "content": "ab"},
    ]
    data = read(tmp_path, tokenizer, {"messages": messages})
    assert counted(data.examples[0], tokenizer) == "ab<|im_end|>"


def test_tools_weights_and_ends_of_a_chat(tmp_path, tokenizer):
    messages = chat("11", "ab", "1", "a1")
    messages[1]["weight"] = 0
    data = read(tmp_path, tokenizer, {"messages": messages, "tools": []})
    assert counted(data.examples[0], tokenizer) == "a1<|im_end|>"
    assert data.ends == {tokenizer.special.eos_id: 1}
    tooled = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
    other = save_tokenizer(tmp_path / "t", tooled)
    tools = [{"type": "function", "function": {"name": "weather"}}]
    data = read(tmp_path, other, {"messages": messages, "tools": tools})
    text = other.decode(data.examples[0]["input_ids"].tolist())
    assert text.startswith(json.dumps(tools))
    with pytest.raises(ValueError, match=r"jsonl:1: tools must be empty.*; got 1"):
        read(tmp_path, tokenizer, {"messages": messages, "tools": tools})
    with pytest.raises(ValueError, match=r"jsonl:1: .*'tool'; did you mean 'tools'\?"):
        read(tmp_path, tokenizer, {"messages": messages, "tool": tools})
    data = read(
        tmp_path,
        save_tokenizer(tmp_path / "e", CHATML.replace("_end", "")),
        {"messages": messages},
    )
    assert tokenizer.special.eos_id not in data.ends


def test_a_chat_whose_template_drops_thoughts_gives_an_example_a_turn(tmp_path):
    tokenizer = save_tokenizer(tmp_path / "t", QWEN3)
    thought = "<think>\n1\n</think>\n\n"
    long = chat("1", f"{thought}a", "1", f"{thought}b")
    data = read(tmp_path, tokenizer, {"messages": chat("1", "a")}, {"messages": long})
    assert data.lines == [0, 1, 1]
    assert [counted(e, tokenizer) for e in data.examples[1:]] == [
        f"{thought}a<|im_end|>",
        f"{thought}b<|im_end|>",
    ]
    assert sum(data.ends.values()) == 3


def test_token_ids_work_without_a_tokenizer(tmp_path):
    ids = [5, 6, 7]
    for extra, mask in (
        ({}, [0, 1, 1]),
        ({"loss_mask": [1, 0, 1]}, [0, 0, 1]),
        ({"labels": [-100, 6, -100]}, [0, 1, 0]),
    ):
        data = read(tmp_path, None, {"input_ids": ids} | extra)
        assert data.examples[0]["input_ids"].tolist() == ids
        assert data.examples[0]["loss_mask"].tolist() == mask


def test_what_is_cut_is_counted_and_what_is_lost_is_dropped(tmp_path):
    records = [
        {"input_ids": [1] * 9},
        {"input_ids": [1] * 9, "loss_mask": [0] * 8 + [1]},
        {"input_ids": [1] * 4},
    ]
    data = read(tmp_path, None, *records, max_length=4)
    assert [len(e["input_ids"]) for e in data.examples] == [4, 4]
    assert (data.truncated, data.dropped, data.targets) == (2, 1, 6)
    with pytest.raises(ValueError, match=r"max_length = 4 .* in 1 examples .* 9 tok"):
        read(tmp_path, None, records[1], max_length=4)
    with pytest.raises(ValueError, match=r"max_length must be at least 2.* got 1"):
        read(tmp_path, None, records[0], max_length=1)


BAD_LINES = [  # after a good line of prompt and completion
    ("{", "not JSON"),
    ('"text"', "must be an object"),
    ({"text": "a"}, "is text, but the lines before are prompt and completion"),
    ({"prompt": "a"}, "has no 'completion'; its keys are ['prompt']"),
    ({"other": 1}, "must hold one of input_ids, messages, prompt and completion, text"),
    ({"prompt": "a", "completion": "b", "text": "c"}, "must hold one of"),
    ({"prompt": "a", "completion": " \n"}, "'completion' must not be empty"),
    ({"prompt": 1, "completion": "b"}, "'prompt' must be str; got 1"),
    (
        {"prompt": "a", "completion": "b", "promt": "c"},
        "has an unknown key, 'promt'; did you mean 'prompt'?",
    ),
    (
        {"prompt": "a", "completion": "b", "id": 1},
        "has an unknown key, 'id'; known: prompt, completion",
    ),
    ({"prompt": "a", "completion": None}, "'completion' must be str; got None"),
]


def test_every_bad_line_is_named_at_once(tmp_path, tokenizer):
    good = {"prompt": "", "completion": "b"}
    path = write(tmp_path, good, *(line for line, _ in BAD_LINES))
    with pytest.raises(ValueError, match=f"{len(BAD_LINES)} bad lines") as error:
        read_text_examples(path, tokenizer)
    shown = str(error.value).splitlines()[1:]
    for number, (line, (_, reason)) in enumerate(
        zip(shown, BAD_LINES, strict=True), start=2
    ):
        assert line.strip().startswith(f"{path}:{number}: {reason}")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"input_ids": []}, "'input_ids' must not be empty"),
        ({"input_ids": [1, True]}, "must be a list of integers"),
        ({"input_ids": "ab"}, "must be a list of integers; got 'ab'"),
        ({"input_ids": [1]}, "at least 1 target; got 0 of 1 tokens"),
        ({"input_ids": [1, 2], "loss_mask": [1]}, "as long as 'input_ids', 2; got 1"),
        ({"input_ids": [1, 2], "loss_mask": [1, 2]}, r"must be 0 and 1; got \[1, 2\]"),
        ({"input_ids": [1, 2], "labels": [2, -100]}, "-100; got 2 for 1 at index 0"),
        ({"input_ids": [1, 2], "labels": [-100] * 2}, "1 target; got 0 of 2"),
        (
            {"input_ids": [1, 2], "labels": [1, 2], "loss_mask": [1, 1]},
            "'labels' or 'loss_mask'; got both",
        ),
        ({"input_ids": [1, 400]}, r"in \[0, 300\); got 1 to 400"),
        ({"input_ids": [-1, 4]}, r"in \[0, 300\); got -1 to 4"),
        ({"text": "a"}, "must be input_ids, as the model has no tokenizer"),
    ],
)
def test_bad_records_of_ids_are_named(tmp_path, record, message):
    with pytest.raises(ValueError, match=rf"train.jsonl:1: .*{message}"):
        read(tmp_path, None, record, vocab_size=300)


def test_what_the_template_refuses_is_named_with_its_line(tmp_path, tokenizer):
    user = {"role": "user", "content": "a"}
    with pytest.raises(ValueError, match=r"train.jsonl:1: messages must have a turn"):
        read(tmp_path, tokenizer, {"messages": [user]})
    silent = save_tokenizer(tmp_path / "t", "{{ raise_exception('no') }}" + CHATML)
    with pytest.raises(ValueError, match=r"train.jsonl:1: .*can't render .*: no"):
        read(tmp_path, silent, {"messages": [user, user | {"role": "assistant"}]})


def test_a_tokenizer_without_an_end_is_an_error(tmp_path):
    endless = save_tokenizer(tmp_path / "t")
    endless.special = endless.special._replace(eos_id=None)
    with pytest.raises(ValueError, match=r"jsonl:1: a text must end .* it has none"):
        read(tmp_path, endless, {"text": "a"})


def test_labels_of_a_prompt_and_padding_change_nothing(tmp_path):
    """Law 29, without a model: what reaches the loss is the same."""
    ids, mask = [5, 6, 7, 8], [0, 0, 1, 1]
    (example,) = read(tmp_path, None, {"input_ids": ids, "loss_mask": mask}).examples
    (other,) = read(
        tmp_path, None, {"input_ids": ids, "labels": [-100, -100, 7, 8]}
    ).examples
    short, long = (
        TextBatches([e], 1, [t]).batch_at(0) for e, t in ((example, 4), (other, 16))
    )

    def targets(batch):
        used = batch["weights"] > 0
        return [batch[k][used].tolist() for k in ("input_ids", "labels", "positions")]

    assert targets(short) == targets(long) == [[6, 7], [7, 8], [1, 2]]
