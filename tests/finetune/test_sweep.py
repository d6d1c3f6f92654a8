"""Sweeps: each run equals its own, whatever runs beside it."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lora_jax import sweep
from lora_jax.files.adapter import load_adapter
from lora_jax.finetune import sweep_group, sweep_job
from lora_jax.finetune.errors import Interrupted, UserError
from lora_jax.finetune.reporter import Reporter
from lora_jax.finetune.run import fine_tune
from lora_jax.finetune.run_folder import open_run
from lora_jax.finetune.sweep_grid import expand, groups
from lora_jax.train.data import TextBatches
from lora_jax.train.slots import Members
from lora_jax.tree.paths import flatten
from tests.tiny_decoder import make_decoder

GRID = {
    "train.learning_rate": [1e-2, 1e30, 3e-3, 2e-3],
    "lora.rank": [2, 1, 3, 2],
    "lora.rank_pattern": [{}, {"query": 2}, {"down": 1}, {}],
    "lora.alpha": [3.0, 1.0, 5.0, 7.0],
    "lora.rslora": [False, False, True, False],
    "lora.dropout_rate": [0.1, 0.0, 0.3, 0.1],
    "train.schedule": ["linear", "constant", "cosine", "constant"],
    "train.seed": [0, 1, 2, 3],
    "train.lora_b_ratio": [1.0, 1.0, 4.0, 1.0],
    "train.weight_decay": [0.0, 0.0, 0.1, 0.0],
    "train.clip_norm": [1.0, None, 0.5, None],
    "train.epochs": [3, 3, 3, 2],
    "train.patience": [None, None, None, 1],
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    rows = [{"text": f"the {a} is {b} ."} for a in ("sky", "sea") for b in "abcdefg"]
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model": {"path": str(make_decoder(folder / "llama"))},
        "data": {"train": str(data), "holdout": 0.3, "packing": True, "max_length": 12},
        "lora": {"targets": ["query", "down"], "dropout_rate": 0.1},
        "train": {"batch_size": 2, "eval_every": 2, "log_every": 1},
        "output": {"dir": str(folder / "sweep")},
    }


@pytest.fixture(scope="module")
def slots():
    """The slots of the sweeps so far."""
    return []


@pytest.fixture(scope="module")
def done(tree, slots):
    with pytest.MonkeyPatch.context() as patch:
        make = sweep_group.Members

        def kept(*args):
            slots.append(make(*args))
            return slots[-1]

        patch.setattr(sweep_group, "Members", kept)
        return sweep(tree, GRID, zipped=True, together=2)


def lines_of(folder, *, without=("seconds", "targets_per_second")):
    text = (folder / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in x.items() if k not in without} for x in lines]


def adapter_of(folder):
    return flatten(load_adapter(folder / "adapter").variables)


@pytest.mark.parametrize("number", [0, 2])
def test_each_run_equals_its_own(done, tree, tmp_path, number):
    line = next(x for x in done.runs if x["name"].startswith(f"00{number}"))
    folder = done.path / line["name"]
    own = fine_tune(folder, [f"output.dir={tmp_path}/own"])
    together, alone = lines_of(folder), lines_of(own.path)
    assert len(together) == len(alone)
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            is_number = isinstance(value, (int, float))
            wanted = pytest.approx(value, rel=1e-5) if is_number else value
            assert ours[name] == wanted
    ours, theirs = (adapter_of(path) for path in (folder, own.path))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        # Adam turns the rounding of a gradient near zero into that of its step.
        atol = 1e-5 * np.abs(value).max()
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=atol)
    assert line["validation"] == pytest.approx(own.summary["validation"], rel=1e-5)


def test_a_run_that_ended_makes_room_without_a_compilation(done, slots):
    by_name = {line["name"][:3]: line for line in done.runs}
    assert {k: line["status"] for k, line in by_name.items()} == {
        "000": "done",
        "001": "diverged",
        "002": "done",
        "003": "done",
    }
    (used,) = slots  # `together` is given, so no other number was tried
    assert used.update._cache_size() == 1
    assert "the run has diverged" in by_name["001"]["warning"]
    assert not (done.path / by_name["001"]["name"] / "summary.json").exists()


def test_the_runs_are_sorted_drawn_and_the_best_is_a_run_folder(done):
    losses = [line["validation"]["loss"] for line in done.runs[:3]]
    assert losses == sorted(losses)
    assert done.metric == "loss"
    assert done.runs[-1]["status"] == "diverged"
    folder, settings = open_run(done.path / "best")
    values = done.runs[0]["values"]
    assert settings.train.learning_rate == float(values["train.learning_rate"])
    assert settings.output.dir == str(done.path / "best")
    best = done.path / done.runs[0]["name"]
    assert adapter_of(folder.path).keys() == adapter_of(best).keys()
    # Drawing takes as long as a short run, so only the best is drawn.
    assert not list(done.path.glob("0*/curves.png"))
    assert (folder / "curves.png").exists() == (done.plot is not None)
    assert done.plot is None or done.plot.read_bytes().startswith(b"\x89PNG")


def test_a_kill_loses_nothing(done, tree, tmp_path, monkeypatch):
    again = {**tree, "output": {"dir": str(tmp_path / "again")}}
    batch_at, count = TextBatches.batch_at, 0

    def interrupting(self, number):
        nonlocal count
        count += self.shuffle
        if self.shuffle and count == 9:
            signal.raise_signal(signal.SIGINT)
        return batch_at(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(TextBatches, "batch_at", interrupting)
        with pytest.raises(Interrupted, match=r"\d of 4 runs have ended(.|\n)*sweep\("):
            sweep(again, GRID, zipped=True, together=2)
    with pytest.raises(UserError, match="already contains a sweep"):
        sweep(again, GRID, zipped=True)
    with pytest.raises(UserError, match=r"other(.|\n)*train.epochs: 3 -> 4"):
        sweep(again, {**GRID, "train.epochs": [4] * 4}, zipped=True, resume=True)
    check_same(done, sweep(again, GRID, zipped=True, resume=True))


def test_a_sweep_that_was_killed_resumes_to_the_same_bits(done, tree, tmp_path):
    again = {**tree, "output": {"dir": str(tmp_path / "again")}}
    file = tmp_path / "c.json"
    file.write_text(json.dumps(again))
    words = [
        f"{key}={','.join(x if isinstance(x, str) else json.dumps(x) for x in values)}"
        for key, values in GRID.items()
    ]
    process = subprocess.run(
        [
            *(sys.executable, "-m", "tests.cli.at_step", "4s", "SIGKILL", "sweep"),
            *(str(file), *words, "--zip", "--together", "2"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    record = json.loads((tmp_path / "again" / "sweep.json").read_text())
    assert record["together"] == {"0": 2}
    resumed = sweep(again, GRID, zipped=True, resume=True)
    check_same(done, resumed)


def test_methods_share_steps_and_evaluations(tree, tmp_path, monkeypatch):
    together, evaluated = Members.evaluate, []

    def counting(self, evaluation, batches):
        evaluated.append(self)
        return together(self, evaluation, batches)

    monkeypatch.setattr(Members, "evaluate", counting)
    own = {**tree, "output": {"dir": str(tmp_path / "methods")}}
    # Batches of two lengths, each of which is a program.
    rows = [{"text": "the sky is blue . " * (1 + i % 3)} for i in range(12)]
    data = tmp_path / "lengths.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own["data"] = {"train": str(data), "holdout": 0.3, "max_length": 16}
    own["lora"] = {**tree["lora"], "lora_fa": True}
    own["train"] = {**tree["train"], "max_steps": 3, "eval_every": 2, "baseline": False}
    grid = {
        "lora.init": ["pissa", "lora_ga", "olora"],
        "lora.rank": [3, 2, 2],
        "lora.alpha": [5, 3, 2],
    }
    done = sweep(own, grid, zipped=True, together=2)
    record = json.loads((done.path / "sweep.json").read_text())
    assert record["together"] == {"0": 2}  # one group
    assert evaluated[0].update._cache_size() == 2
    assert len(evaluated) == 4  # after steps 2 and 3, of the first two and of the last
    line = next(x for x in done.runs if x["values"]["lora.init"] == "lora_ga")
    alone = fine_tune(line["folder"], [f"output.dir={tmp_path}/own"])
    assert line["validation"] == pytest.approx(alone.summary["validation"], 1e-5)
    ours, theirs = (adapter_of(Path(x)) for x in (line["folder"], alone.path))
    assert {"fixed", "lora"} == {name.split("/")[0] for name in ours}
    for name, value in theirs.items():
        atol = 1e-5 * np.abs(value).max()
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def job(tree):
    return sweep_job.opened(expand(tree, ["lora.targets=[query]"])[0].settings, None)


def test_groups_share_the_base_and_the_data_that_were_read(tree, job, monkeypatch):
    points = expand(tree, ["lora.targets=[query],[down]", "lora.init=uniform,pissa"])
    found, _ = groups(points)
    assert len(found) == 4
    first = job
    monkeypatch.setattr(sweep_job, "open_job", lambda *_, **__: "read anew")
    for point in points[1:]:
        again = sweep_job.opened(point.settings, first)
        pair = (flatten(job.loaded.params) for job in (again, first))
        assert all(x is y for x, y in zip(*map(dict.values, pair), strict=True))
        assert again.splits is first.splits
        assert again.lora == point.settings.lora
    one_layer = expand(tree, ["lora.targets=[layer_0/attention/query]"])
    longer = expand(tree, ["data.max_length=9"])
    for other in (one_layer, longer):
        assert sweep_job.opened(other[0].settings, first) == "read anew"


def test_adapters_that_do_not_fit_are_told_before_the_first_run(tree, job):
    words = ["lora.init=uniform,pissa,lora_ga", "lora.targets=[query],[nope]"]
    points = expand(tree, [*words, "lora.rank=12,22"])
    faults = (
        r'^targets=\["nope"\] matched 0 of (.|\n)*'
        r"from 1 to 20, the smaller side (.|\n)*; got 22(.|\n)*"
        r"from 1 to 20(.|\n)*; got 24"
    )
    with pytest.raises(ValueError, match=faults):
        sweep_job.check_adapters(points, job)
    sweep_job.check_adapters([points[0], points[1], points[4]], job)


def check_same(done, resumed):
    for before, after in zip(done.runs, resumed.runs, strict=True):
        assert after["validation"] == before["validation"]
        if before["status"] == "done":
            old, new = (adapter_of(Path(x["folder"])) for x in (before, after))
            assert all(np.array_equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ({"train.learning_rat": [1]}, "Did you mean 'train.learning_rate'"),
        (["learning_rate=1,2"], "Did you mean 'train.learning_rate'"),
        ({"lora.rank": []}, "lora.rank: no values"),
        ({}, "no setting is given"),
        (["lora.rank=1,2", "lora.rank=3"], "lora.rank: given twice"),
        (["lora.rank=1,1"], "lora.rank: the same value twice"),
        (["lora.rank=8,010"], r"differ in a setting; got 000_rank=8 and 001_rank=010"),
        (["lora.rank=1,,2"], "lora.rank: a value is missing between commas; got 1,,2"),
        (["seed=0.."], r"seed: a range is FIRST\.\.LAST, like 0\.\.2; got 0\.\."),
        (["seed=2..0"], "must have from 1 to 2,000 values; got 2"),
        (["seed=0..9999999999"], "must have from 1 to 2,000 values; got 0"),
        (["seed=0..999", "lora.rank=1..20"], "at most 2,000 runs; got 20,000"),
        (["lora.r=1,2"], "PEFT's r is lora.rank here"),
        (["train.lr=1,2"], r"Known: (.|\n)*train.learning_rate"),
        ({"model.path": "llama"}, "model.path: its values must be a list; got 'llama'"),
        ({"lora.rank": 4}, "lora.rank: its values must be a list; got 4"),
        (
            {"data.train": ["a", "b"]},
            "data.train can't be swept: (.|\n)*data.validation",
        ),
        (
            ["data.train=a,b", "data.validation=c"],
            r"data files .*/a, .*/b, .*/c must exist",
        ),
        (["model.path=nothere,elsewhere"], "nothere must be a model folder"),
        (["lora.targets=[query],[nope]"], "matched 0 of"),
        (["lora.rank=0,-1", "seed=x"], "lora: (.|\n)*train.seed: must be"),
        (["output.dir=a,b"], "output.dir can't be swept: it is the sweep's own"),
        (["data.holdout=0.1,0.2"], "data.holdout can't be swept: runs are compared"),
        (["mesh.member=1,2"], "mesh.member can't be swept"),
        (["mesh.member=64"], "mesh.member must be at most the"),
        (["mesh.fsdp=2"], "other sizes of the mesh must be 1; got mesh.fsdp = 2"),
    ],
)
def test_a_bad_grid_is_refused_before_anything_is_written(tree, tmp_path, grid, said):
    own = {**tree, "output": {"dir": str(tmp_path / "none")}}
    with pytest.raises((ValueError, UserError, FileNotFoundError), match=said):
        sweep(own, grid)
    assert not (tmp_path / "none").exists()


def test_ranges_arrays_and_nested_lists_are_values(tree):
    assert len(expand(tree, ["seed=0..2,7"])) == 4
    points = expand(tree, {"train.learning_rate": np.array([1e-3, 2e-3], np.float32)})
    assert points[1].settings.train.learning_rate == pytest.approx(2e-3)
    words = ["train.samples=[],[[{role: user, content: hi}, {role: user, content: a}]]"]
    assert len(expand(tree, words)[1].settings.train.samples[0]) == 2


def test_a_damaged_record_is_named(tree, tmp_path):
    file = tmp_path / "sweep.json"
    own = {**tree, "output": {"dir": str(tmp_path)}}
    for text, said in (
        ('{"runs": {', "sweep.json"),
        ('{"runs": {}}', "must have runs"),
    ):
        file.write_text(text)
        with pytest.raises((ValueError, UserError), match=said):
            sweep(own, ["seed=0..1"], resume=True)
    assert file.read_text() == text


def test_zipped_values_must_be_as_many(tree):
    with pytest.raises(ValueError, match=r"lora.rank has 2, train.seed has 3"):
        expand(tree, ["lora.rank=1,2", "seed=0..2"], zipped=True)


def test_a_grid_has_all_combinations_and_its_words_are_yaml(tree):
    points = expand(
        tree, ["lora.targets=[query,up],[down]", "seed=0..2", "lora.rank=4"]
    )
    assert len(points) == 6
    assert points[0].settings.lora.targets == ("query", "up")
    assert [p.settings.train.seed for p in points] == [0, 1, 2] * 2
    assert {p.settings.lora.rank for p in points} == {4}
    assert points[5].name == "005_targets=-down-_seed=2"
    found, differing = groups(points)
    assert [len(group) for group in found] == [3, 3]
    assert differing == ["lora.targets"]


def test_a_run_is_named_by_the_name_of_a_file_not_by_its_path(tree, tmp_path):
    files = [str(tmp_path / f"{name}.jsonl") for name in ("films", "tweets")]
    tree = {**tree, "data": {**tree["data"], "validation": files[0]}}
    points = expand(tree, {"data.train": files, "train.learning_rate": [1e-3, 1e-2]})
    assert points[2].name == "002_train=tweets_learning_rate=0.001"
    assert points[2].values["data.train"] == files[1]


def test_the_members_are_split_over_devices(done, tree, tmp_path):
    code = (
        "import json, sys; from lora_jax import sweep;"
        "tree, grid = json.load(sys.stdin);"
        "done = sweep(tree, grid, zipped=True, together=2);"
        "print(json.dumps([line['validation'] for line in done.runs]))"
    )
    own = {**tree, "output": {"dir": str(tmp_path / "mesh")}, "mesh": {"member": 2}}
    flags = os.environ.get("XLA_FLAGS", "")
    devices = "--xla_force_host_platform_device_count=2"
    process = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps([own, GRID]),
        env={**os.environ, "XLA_FLAGS": f"{flags} {devices}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    for line, found in zip(done.runs, json.loads(process.stdout), strict=True):
        assert (found or {}) == pytest.approx(line["validation"] or {}, rel=1e-5)


def test_as_many_run_side_by_side_as_make_it_faster(tree, monkeypatch):
    points = expand(tree, ["seed=0..9"])
    group = sweep_group.Group(points, Reporter())
    monkeypatch.setattr(group, "_largest", lambda count, exactly: (count, None))
    monkeypatch.setattr(group, "_settle", lambda count, remat: count)

    def choose(**seconds):
        times = {int(key[1:]): value for key, value in seconds.items()}
        monkeypatch.setattr(group, "_seconds", lambda count, remat: times[count])
        return group.choose()

    assert choose(m1=1.0, m10=5.0) == 10
    assert choose(m1=1.0, m10=12.0, m5=4.0) == 5  # two rounds of 4.0 s a step
    assert choose(m1=1.0, m10=12.0, m5=6.0, m2=2.5) == 1  # never slower
    assert group.choice.startswith("measured here, a step takes: of one run 1,000 ms, ")
    assert group.choice.endswith("of 10 12,000 ms, of 5 6,000 ms, of 2 2,500 ms")
    assert group.choose(together=4) == 4  # in three rounds: 4, 4 and 2
    assert group.choose(together=9) == 5  # two even rounds


def test_runs_split_over_devices_are_halved_to_as_many_on_each(tree, monkeypatch):
    group = sweep_group.Group(expand(tree, ["seed=0..11"]), Reporter())
    tried = []

    def price(number, remat):
        tried.append(number)
        return SimpleNamespace(fits=number <= 4)

    monkeypatch.setattr(group, "price", price)
    monkeypatch.setattr(group, "mesh", SimpleNamespace(size=4))
    assert group._largest(12, exactly=False)[0] == 4
    assert tried == [12, 4]


def test_a_sweep_stops_before_it_compiles_and_says_what_is_left(
    tree, tmp_path, monkeypatch
):
    points = expand(tree, ["seed=0..3"])
    group = sweep_group.Group(points, Reporter(), should_stop=lambda: True)
    for together in (None, 2):
        with pytest.raises(KeyboardInterrupt):
            group.choose(together)
    own = {**tree, "output": {"dir": str(tmp_path / "left")}}

    def raising(error):
        def raises(*args):
            raise error

        return raises

    with monkeypatch.context() as patch:
        patch.setattr(sweep_group.Group, "choose", raising(KeyboardInterrupt()))
        with pytest.raises(Interrupted, match="Nothing was written yet"):
            sweep(own, ["seed=0..3"])
    assert not (tmp_path / "left").exists()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.npz")
    monkeypatch.setattr(sweep_group.Group, "choose", lambda *args: 2)
    for error in (full, UserError("the disk has 1 kB free", code=1)):
        monkeypatch.setattr(sweep_group.Group, "train", raising(error))
        said = r"(left is full|1 kB)(.|\n)*0 of 4 runs have ended(.|\n)*resume=True"
        with pytest.raises(UserError, match=said) as caught:
            sweep(own, ["seed=0..3"], overwrite=True)
        assert caught.value.code == 1


def test_a_plan_compiles_no_more_runs_than_anyone_trains(tree, monkeypatch):
    group, tried = sweep_group.Group(expand(tree, ["lora.rank=2"]), Reporter()), []

    def price(members, state, batch, **options):
        count, rows, _ = batch["input_ids"].shape
        tried.append(count)
        total = 10**6 + 10**3 * count
        return SimpleNamespace(batch=count * rows, total=total, limit=10**9, fits=True)

    monkeypatch.setattr(sweep_group, "price_step", price)
    for together, most, compiled in (4, 64, [1, 2, 64, 4]), (100, 100, [1, 2, 100]):
        tried.clear()
        assert group.plan_most(together, None)[1] == most
        assert tried == compiled


def test_runs_whose_batches_differ_in_length_wait_for_each_other(tree):
    group = sweep_group.Group(expand(tree, ["seed=0..2"]), Reporter())

    class Run:
        def __init__(self, number, length):
            self.number, self.batches = number, self
            self.length_at = lambda number: length

    runs = {0: Run(5, 8), 1: Run(9, 16), 2: Run(7, 16)}
    assert group._next(runs) == {1: runs[1], 2: runs[2]}
    del runs[2]
    assert group._next(runs) == {0: runs[0]}  # the one that is behind
