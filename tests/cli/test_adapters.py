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
from lora_jax.interop.pretrained import load_each
from lora_jax.names import FROZEN
from lora_jax.tree.fingerprint import fingerprint
from lora_jax.tree.paths import flatten
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


@pytest.fixture(scope="module")
def headed(model_dir, tmp_path_factory):
    """Adapters of an encoder, each with a head: two of two classes, one of three."""
    place = tmp_path_factory.mktemp("headed")
    for seed, (name, classes) in enumerate({"a": 2, "b": 2, "c": 3}.items()):
        config = LoRAConfig(rank=1 + seed % 2, alpha=5, train=("classifier",))
        options = {"num_labels": classes, "key": jax.random.key(seed)}
        loaded = load_model(str(model_dir), lora=config, **options)
        variables = trained(loaded.variables)
        mark = fingerprint(variables[FROZEN])
        extra = {"model": str(model_dir), "pooling": "mean"}
        save_adapter(place / name, variables, config, mark, extra=extra)
    config = LoRAConfig(rank=1, alpha=5)
    loaded = load_model(str(model_dir), lora=config, key=jax.random.key(3))
    mark = fingerprint(loaded.variables[FROZEN])
    extra = {"model": str(model_dir), "pooling": "mean"}
    save_adapter(place / "bare", loaded.variables, config, mark, extra=extra)
    return place


def test_each_encoded_line_has_the_head_of_its_adapter(headed, tmp_path, capsys):
    text, names = "the film is lovely", ["b", "a", "b"]
    rows = [{"text": text, "adapter": name} for name in names]
    data, out = write(tmp_path / "mixed.jsonl", rows), tmp_path / "out.jsonl"
    both = [w for name in "ab" for w in ("--adapter", f"{name}={headed / name}")]
    assert call(capsys, "encode", *both, "--data", data, "--out", out)["has_logits"]
    got = lines_of(out)
    one, into = write(tmp_path / "one.jsonl", [{"text": text}]), tmp_path / "o"
    for name, line in zip(names, got, strict=True):
        word = ["--adapter", headed / name]
        call(capsys, "encode", *word, "--data", one, "--out", into)
        wanted = lines_of(into)[0]
        for key in ("embedding", "logits"):
            np.testing.assert_allclose(line[key], wanted[key], rtol=1e-5, atol=1e-6)
    assert np.abs(np.array(got[0]["logits"]) - got[1]["logits"]).max() > 1e-2
    data = write(tmp_path / "none.jsonl", [rows[0], {"text": text}])
    words = ["encode", *both, "--data", str(data), "--out", str(tmp_path / "none")]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "lines 2 must name an adapter: the base has no classifier/bias, cl" in said


def test_heads_that_differ_in_shape_or_are_missing_are_told(headed, model_dir):
    with pytest.raises(
        ValueError, match=r"classifier/kernel is \[16, 2\] of a, \[16, 3\] of c"
    ):
        load_bank(None, {name: headed / name for name in "ac"})
    with pytest.raises(ValueError, match="'bare' must have classifier/bias, classif"):
        load_bank(str(model_dir), {name: headed / name for name in ("a", "bare")})


def test_heads_are_averaged_or_taken_from_one(headed, tmp_path, capsys):
    a, b, c, bare = (str(headed / name) for name in ("a", "b", "c", "bare"))
    heads = {
        name: load_adapter(headed / name).variables["params"]["classifier"]
        for name in "abc"
    }

    def combine(name, *words):
        out = str(tmp_path / name)
        call(capsys, "combine", *words, "--out", out)
        found = load_adapter(out)
        assert load_model(None, out).module.model.num_labels
        return found.variables["params"]["classifier"], found

    head, found = combine("mean", a, b, bare, "--weights", 3, 1, 2)
    assert found.config.train == ("classifier",)
    assert found.extra["combined"] == [[a, 3], [b, 1], [bare, 2]]
    wanted = 0.75 * heads["a"]["kernel"] + 0.25 * heads["b"]["kernel"]
    np.testing.assert_allclose(head["kernel"], wanted, rtol=1e-5, atol=1e-7)
    head, _ = combine("one", a, c, "--head", c, "--rank", 2)
    np.testing.assert_array_equal(head["kernel"], heads["c"]["kernel"])
    head, _ = combine("same", a)
    np.testing.assert_array_equal(head["kernel"], heads["a"]["kernel"])
    for words, said in (
        ([a, c], r"classifier/kernel has shapes [[16, 2], [16, 3]]"),
        (
            [a, b, "--weights", "1", "-1"],
            "has no classifier/bias, and weights of it",
        ),
        ([a, "--head", b], "--head must be one of the adapters"),
        ([a, "--density", "0.2", "--seed", "1"], "cat has no --density and --seed"),
        ([a, "--method", "ties", "--seed", "0"], "ties has no --seed"),
    ):
        out = str(tmp_path / "bad")
        assert main(["combine", *words, "--out", out]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "bad").exists()


def test_heads_of_other_classes_are_not_averaged(headed, tmp_path, capsys):
    found = load_adapter(headed / "b")
    extra = {**found.extra, "labels": ["x", "y"]}
    save_adapter(
        tmp_path / "b", found.variables, found.config, found.fingerprint, extra=extra
    )
    words = ["combine", str(headed / "a"), str(tmp_path / "b")]
    assert main([*words, "--out", str(tmp_path / "out")]) == 2
    assert "heads of different classes can't be averaged" in capsys.readouterr().err


def test_adapters_share_the_memory_of_their_base(place):
    paths = {name: place / name for name in ("ours", "peft")}
    both = load_each(str(place / "model"), paths, scan_layers=False)
    kernels = [flatten(one.variables[FROZEN]) for one in both.values()]
    assert kernels[0].keys() == kernels[1].keys()
    assert all(kernels[0][path] is kernels[1][path] for path in kernels[0])


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
        (["=1", "A="], [], "need names: --adapter NAME=DIR; got =1, A=."),
        (["A=1", "A=2"], [], "names of adapters must differ; got A twice."),
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
