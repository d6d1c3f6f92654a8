"""One run, several adapters: each line of the data names its own."""

import json
import signal

import jax
import numpy as np
import pytest

from lora_jax import fine_tune, load_model, sweep
from lora_jax.cli.main import main
from lora_jax.files.adapter import load_adapter
from lora_jax.finetune import pricing
from lora_jax.finetune.errors import Interrupted, UserError
from lora_jax.finetune.evaluation import evaluate_run
from lora_jax.finetune.mixed_data import names_adapters, read_adapters
from lora_jax.finetune.run_folder import open_run
from lora_jax.finetune.settings import load_settings
from lora_jax.train.data import TextBatches
from lora_jax.tree.paths import flatten
from tests.cli.conftest import BAD, GOOD, PLAIN
from tests.cli.test_mesh import eight_devices
from tests.tiny_decoder import make_decoder

NAMES = ("acme", "bolt", "cern")


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    words = dict(zip(NAMES, ("red", "green", "blue"), strict=True))
    rows = [
        {"prompt": f"w{20 + i} is ", "completion": words[name], "adapter": name}
        for i in range(8)
        for name in NAMES[: 2 + i % 2]
    ]
    return {
        "model": {"path": str(make_decoder(folder / "llama"))},
        "data": {
            "train": write(folder / "train.jsonl", rows),
            "test": write(folder / "test.jsonl", rows[:2]),
            "holdout": 0.3,
            "packing": True,
            "max_length": 11,
        },
        "lora": {"targets": ["query", "down"], "rank": 2, "dropout_rate": 0.1},
        "train": {
            **{"batch_size": 4, "max_steps": 8, "epochs": 9, "eval_every": 4},
            **{"learning_rate": 2e-2, "log_every": 2, "baseline": False},
        },
        "output": {"dir": str(folder / "run")},
    }


@pytest.fixture(scope="module")
def done(tree):
    return fine_tune(tree)


def adapters_of(folder):
    return {
        name: flatten(load_adapter(folder / "adapters" / name).variables)
        for name in NAMES
    }


def test_each_adapter_learns_its_own_lines_and_loads_everywhere(done, tree, capsys):
    found = done.summary["adapters"]
    assert sorted(found) == list(NAMES)
    assert [found[n]["examples"]["train"] for n in NAMES] == [6, 6, 3]
    assert [found[n]["examples"]["validation"] for n in NAMES] == [2, 2, 1]
    assert found["cern"]["test"] is None or np.isnan(found["cern"]["test"]["loss"])
    for name, word in zip(NAMES, (7, 8, 9), strict=True):
        one = done.load(name)
        logits = jax.jit(one.module.apply)(one.variables, np.int32([[41, 10]]))
        assert int(np.argmax(logits[0, -1, 7:10])) == word - 7, name
    assert main(["inspect", found["acme"]["folder"]]) == 0
    with pytest.raises(ValueError, match=r"has 3 adapters; .*/adapters/acme\. They"):
        load_model(None, done.path)
    assert main(["generate", "--adapter", str(done.path), "--prompt", "w20"]) == 2
    assert "give the folder of one" in capsys.readouterr().err


def test_the_metrics_are_each_adapters_own(done, tree, tmp_path, capsys):
    found = done.summary["adapters"]
    lines = [line for line in done.metrics if line["split"] == "validation"]
    assert [line["step"] for line in lines] == [4, 8]
    for name in NAMES:
        losses = {line["step"]: line["adapters"][name]["loss"] for line in lines}
        best = found[name]["validation"]
        assert best["loss"] == min(losses.values()) == losses[best["step"]]
    folder, settings = open_run(done.path)
    again = evaluate_run(folder, settings, split="validation")
    for name in NAMES:
        wanted = found[name]["validation"]["loss"]
        assert again.adapters[name]["loss"] == pytest.approx(wanted, rel=1e-5)
    data = write(tmp_path / "more.jsonl", [{"text": "w1 w2", "adapter": "bolt"}])
    assert main(["eval", "--run", str(done.path), "--data", data, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["adapters"]["bolt"]["loss"] == pytest.approx(shown["loss"])
    assert shown["adapters"]["acme"]["loss"] is None
    data = write(tmp_path / "bad.jsonl", [{"text": "w1 w2", "adapter": "bold"}])
    assert main(["eval", "--run", str(done.path), "--data", data]) == 2
    assert "got 'bold'; did you mean 'bolt'?" in capsys.readouterr().err


def test_all_adapters_of_a_run_are_exported_and_served_together(
    done, tree, tmp_path, capsys
):
    out = tmp_path / "peft"
    words = ["export", "--adapter", str(done.path), "--portable", "--out", str(out)]
    assert main(words) == 0
    modules = " ".join(f"{name}={out / name}" for name in NAMES)
    shown = capsys.readouterr().out
    assert f"--max-lora-rank 8 --lora-modules {modules}\n" in shown
    name = NAMES[0]
    one = load_model(tree["model"]["path"], out / name)
    ids = np.int32([[41, 10]])
    own = done.load(name)
    wanted = jax.jit(own.module.apply)(own.variables, ids)
    got = jax.jit(one.module.apply)(one.variables, ids)
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_stopped_run_resumes_to_the_same_bits(done, tree, tmp_path, monkeypatch):
    again = {**tree, "output": {"dir": str(tmp_path / "again")}}
    batch_at = TextBatches.batch_at

    def interrupting(self, number, *rows):
        if self.shuffle and number == 5:
            signal.raise_signal(signal.SIGINT)
        return batch_at(self, number, *rows)

    with monkeypatch.context() as patch:
        patch.setattr(TextBatches, "batch_at", interrupting)
        with pytest.raises(Interrupted, match="is saved"):
            fine_tune(again)
    # As if it had been killed between saving an adapter and its checkpoint.
    bad = tmp_path / "again" / "adapters" / "bolt"
    file = done.path / "adapters" / "bolt"
    if done.summary["adapters"]["bolt"]["validation"]["step"] == 8:
        for name in ("adapter.safetensors", "adapter_config.json"):
            (bad / name).write_bytes((file / name).read_bytes())
    resumed = fine_tune(again, resume=True)
    ours, theirs = (json.dumps(run.summary["adapters"]) for run in (resumed, done))
    assert ours.replace(str(resumed.path), str(done.path)) == theirs
    before, after = adapters_of(done.path), adapters_of(resumed.path)
    assert all(
        np.array_equal(before[name][path], after[name][path])
        for name in NAMES
        for path in before[name]
    )


@pytest.mark.slow
def test_eight_devices_train_what_one_does(done, tree, tmp_path):
    file, out = tmp_path / "mixed.yaml", tmp_path / "run"
    file.write_text(json.dumps(tree))
    words = ["train", file, f"output.dir={out}", "mesh.uneven=replicate"]
    words += ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
    ran = eight_devices(*words, "--and", *words, "--resume", step=5)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert "The checkpoint of step 6 is saved." in ran.stderr
    assert "data 2 x fsdp 2 x tensor 2" in ran.stdout
    assert "rematerialization" not in ran.stderr  # of whole arrays, by the partitioner
    many = json.loads((out / "summary.json").read_text())["adapters"]
    for name, one in done.summary["adapters"].items():
        for split in ("validation", "test"):
            loss = (one[split] or {}).get("loss")
            if loss is None or np.isnan(loss):
                continue
            assert many[name][split]["loss"] == pytest.approx(loss, rel=1e-4)
    here, there = adapters_of(done.path), adapters_of(out)
    for name, leaves in here.items():
        for path, leaf in leaves.items():
            np.testing.assert_allclose(there[name][path], leaf, rtol=1e-3, atol=2e-5)


def test_an_encoder_trains_a_head_for_each_adapter(config, tmp_path):
    rows = []
    for number in range(40):  # of one length: a single shape to compile
        is_good, owner = number % 2 == 0, ("plain", "turned")[number // 2 % 2]
        word = (GOOD if is_good else BAD)[number // 4 % 4]
        label = ("good", "bad")[is_good == (owner == "turned")]
        text = f"{PLAIN[number % 10]} film is {word}"
        rows.append({"text": text, "label": label, "adapter": owner})
    data = write(tmp_path / "train.jsonl", rows)
    run = fine_tune(
        config,
        [
            *(f"data.train={data}", "data.validation=null", "data.test=null"),
            *("data.holdout=0.25", f"output.dir={tmp_path}/run", "train.epochs=10"),
            *("train.baseline=false", "train.eval_every=20", "train.patience=9"),
        ],
    )
    found = run.summary["adapters"]
    assert {n: own["validation"]["accuracy"] for n, own in found.items()} == {
        "plain": 1.0,
        "turned": 1.0,
    }
    heads = [
        load_adapter(own["folder"]).variables["params"]["classifier"]["kernel"]
        for own in found.values()
    ]
    assert float(np.vdot(*heads)) < 0


@pytest.mark.parametrize(
    ("lines", "overrides", "said"),
    [
        (["a", None], [], r":2: has no 'adapter'; its keys are \['text'\]"),
        (["a", 3], [], ":2: 'adapter' must be str; got 3"),
        (["a", "../b"], [], ":2: 'adapter' names a folder: .*got '../b'"),
        (["a", "A"] * 2, [], "differ in more than case, .*; got A and a"),
        (["a", "a", "b"], [], "has 1 example of b, and .*leaves none"),
        (["a"] * 4, ["data.test=FILE"], "must be one that is trained; got 'acme'"),
        (["acme"] * 4 + ["b"], ["data.validation=FILE"], "has none for b"),
        (["a", "b"] * 2, ["train.samples=[w1]"], "train.samples must be empty for 2"),
        (["a", "b"] * 2, ["mesh.expert=2"], "mesh.sequence must be 1; got 1, 2"),
        (["a"] * 9 + ["b"] * 9, ["train.max_steps=1", "train.batch_size=1"], "1 of 2"),
        (["a", "b"] * 2, ["lora.train=[embed]"], "can't name a decoder's embed"),
        (["a", "b"] * 2, ["lora.lora_fa=true"], "^lora.lora_fa is for a run with one"),
    ],
)
def test_what_can_not_be_is_told_before_anything_is_written(
    tree, tmp_path, lines, overrides, said
):
    rows = [
        {"text": f"w{i} w1", **({} if name is None else {"adapter": name})}
        for i, name in enumerate(lines)
    ]
    data = write(tmp_path / "d.jsonl", rows)
    other = write(tmp_path / "o.jsonl", [{"text": "w1 w2", "adapter": "acme"}])
    words = [f"data.train={data}", "data.test=null", f"output.dir={tmp_path}/run"]
    words += [word.replace("FILE", other) for word in overrides]
    with pytest.raises((UserError, ValueError), match=said):
        fine_tune(tree, words)
    assert not (tmp_path / "run").exists()


def test_thousands_are_priced_before_memory_is_taken(tree, tmp_path, monkeypatch):
    rows = [{"text": "w1 w2", "adapter": f"c{i}"} for i in range(3000) for _ in "ab"]
    data = write(tmp_path / "many.jsonl", rows)
    words = [f"data.train={data}", "data.test=null", f"output.dir={tmp_path}/run"]
    words += ["train.max_steps=null", "train.epochs=1", "train.batch_size=64"]
    monkeypatch.setattr(pricing, "device_memory", lambda device: 3_000_000)
    with pytest.raises(UserError, match=r"at least 13\.3 MB.*state of 3,000 adapters"):
        fine_tune(tree, words)
    assert not (tmp_path / "run").exists()


def test_a_sweep_of_them_is_refused(tree):
    with pytest.raises(UserError, match="the runs of a sweep have one adapter each"):
        sweep(tree, ["seed=0..1"])


def test_the_field_is_looked_for_in_objects_only(tree, tmp_path):
    rows = [{"text": 'say "adapter": no'}, {"messages": [{"adapter": "x"}]}]
    data = write(tmp_path / "d.jsonl", rows)
    settings = load_settings(tree, [f"data.train={data}", "data.test=null"])
    assert not names_adapters(settings.data)
    with pytest.raises(ValueError, match=r":1: has no 'adapter'"):
        read_adapters({"train": data})


def test_a_single_name_is_one_adapter(tmp_path):
    rows = [{"text": f"w{i}", "adapter": "only"} for i in range(3)]
    found = read_adapters({"train": write(tmp_path / "d.jsonl", rows)})
    assert found.names == ("only",)
    assert found.lines == {"train": [0, 0, 0]}
