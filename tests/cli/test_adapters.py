"""Lines that name their adapters: each as if it ran with that adapter alone."""

import json

import jax
import numpy as np
import pytest

from lora_jax import (
    LoRAConfig,
    export_adapter,
    load_adapter,
    load_bank,
    load_model,
    save_adapter,
)
from lora_jax.cli.main import main
from lora_jax.names import FROZEN
from lora_jax.tree.fingerprint import fingerprint
from tests.nn.external_models import trained
from tests.tiny_decoder import make_decoder


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model; an adapter of ours and one of PEFT's, of other ranks and layers."""
    place = tmp_path_factory.mktemp("adapters")
    model = str(make_decoder(place / "model"))
    for seed, (name, config) in enumerate(
        {
            "ours": LoRAConfig(rank=2, alpha=9),
            "peft": LoRAConfig(rank=3, alpha=30, targets=["query", "value"]),
        }.items()
    ):
        loaded = load_model(model, lora=config, key=jax.random.key(seed))
        variables = trained(loaded.variables)
        if name == "peft":
            export_adapter(place / name, variables, config, loaded)
        else:
            mark = fingerprint(variables[FROZEN])
            save_adapter(place / name, variables, config, mark)
    return place


def named(place):
    return [
        word
        for name in ("ours", "peft")
        for word in ("--adapter", f"{name}={place / name}")
    ]


def call(capsys, *words):
    code = main([*map(str, words), "--json"])
    text = capsys.readouterr()
    assert code == 0, text.err
    return json.loads(text.out)


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def alone(place, name):
    return [] if name is None else ["--adapter", place / name]


def test_each_scored_line_is_its_adapter_alone(place, tmp_path, capsys):
    ids = [[3, 4, 5, 6], [7, 8, 9], [3, 4, 5, 6], [3, 4, 5, 6]]
    names = ["peft", None, "ours", None]
    rows = [
        {"input_ids": row, **({"adapter": name} if name else {})}
        for row, name in zip(ids, names, strict=True)
    ]
    data, out = write(tmp_path / "mixed.jsonl", rows), tmp_path / "scores.jsonl"
    model = ["--model", place / "model"]
    call(capsys, "score", *model, *named(place), "--data", data, "--out", out)
    got = [line["logprobs"] for line in lines_of(out)]
    for row, name, logprobs in zip(ids, names, got, strict=True):
        one, into = write(tmp_path / "one.jsonl", [{"input_ids": row}]), tmp_path / "o"
        call(capsys, "score", *model, *alone(place, name), "--data", one, "--out", into)
        wanted = lines_of(into)[0]["logprobs"]
        np.testing.assert_allclose(logprobs, wanted, rtol=1e-5, atol=1e-6)
    assert np.abs(np.array(got[0]) - got[3]).max() > 1e-3
    assert np.abs(np.array(got[0]) - got[2]).max() > 1e-3


def test_a_prompt_is_continued_by_every_adapter(place, capsys):
    args = ["generate", "--model", place / "model", "--max-new-tokens", 5]
    prompt = ["--prompt", "the sky is"]
    both = call(capsys, *args, *named(place), *prompt)["results"]
    assert [result["adapter"] for result in both] == ["ours", "peft"]
    for result in both:
        one = call(capsys, *args, *alone(place, result["adapter"]), *prompt)
        assert one["results"][0]["output_ids"] == result["output_ids"]
    assert both[0]["output_ids"] != both[1]["output_ids"]


def test_conversations_name_their_adapter(place, tmp_path, capsys):
    chat = {"messages": [{"role": "user", "content": "what is the sky ?"}]}
    names = ["peft", "ours", None]
    rows = [{**chat, "adapter": name} for name in names]
    data = write(tmp_path / "chats.jsonl", rows)
    args = ["generate", "--model", place / "model", "--max-new-tokens", 4]
    mixed = call(capsys, *args, *named(place), "--messages", data)["results"]
    assert [result["adapter"] for result in mixed] == names
    data = write(tmp_path / "chat.jsonl", [chat])
    for name, result in zip(names, mixed, strict=True):
        one = call(capsys, *args, *alone(place, name), "--messages", data)
        assert one["results"][0]["output_ids"] == result["output_ids"]


def test_an_adapter_of_another_base_is_refused(place, tmp_path):
    found = load_adapter(place / "ours")
    other = tmp_path / "other"
    save_adapter(other, found.variables, found.config, "another base")
    with pytest.raises(ValueError, match="another base"):
        load_bank(str(place / "model"), {"ours": place / "ours", "other": other})


@pytest.mark.parametrize(
    ("adapters", "rows", "said"),
    [
        (["A=1", "2"], [], "need names: --adapter NAME=DIR; got 2."),
        (["A=1", "A=2"], [], "names of adapters must differ; got A, A."),
        (["ours", "peft"], ["pfet"], "must be one of ours, peft, or null for the base"),
        (["ours", "peft"], ["pfet"], "Did you mean peft?"),
        ([], ["peft"], "needs named adapters, --adapter NAME=DIR; got 'peft'"),
    ],
)
def test_adapters_that_are_not_there_are_told(
    place, tmp_path, capsys, adapters, rows, said
):
    lines = [{"input_ids": [3, 4], "adapter": name} for name in rows]
    data = write(tmp_path / "d.jsonl", lines or [{"input_ids": [3, 4]}])
    args = ["score", "--model", str(place / "model"), "--data", str(data)]
    for name in adapters:
        folder = f"{name}={place / name}" if name in ("ours", "peft") else name
        args += ["--adapter", folder]
    assert main([*args, "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
