"""What happens to a run: interrupted, resumed, damaged, refused, out of disk."""

import errno
import json
import math
import shutil
import signal
from types import SimpleNamespace

import pytest

from experiments.fetch import FetchError
from experiments.sentiment.train import arguments
from lora_jax.cli.main import main
from lora_jax.files.adapter import _digest
from lora_jax.finetune import job, pricing, session, verdict
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.held_out import hold_out
from lora_jax.finetune.job import Job
from lora_jax.finetune.run_folder import RunFolder
from lora_jax.finetune.settings import load_settings
from lora_jax.finetune.tasks import open_job
from lora_jax.train.data import Batches


def same_adapter(a, b):
    name = "adapter/adapter.safetensors"
    return (a / name).read_bytes() == (b / name).read_bytes()


def same_numbers(a, b):
    summaries = [json.loads((run / "summary.json").read_text()) for run in (a, b)]
    return all(
        summaries[0][key] == summaries[1][key]
        for key in ("test", "validation", "baseline", "steps", "skipped")
    )


@pytest.fixture
def stopped(config, tmp_path, monkeypatch, call):
    """A run that a Ctrl-C ended in its second epoch, and what was printed."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        batch_at = Batches.batch_at

        def interrupting(self, number):
            if self.shuffle and number == 15:  # while step 15 is taken
                signal.raise_signal(signal.SIGINT)
            return batch_at(self, number)

        patch.setattr(Batches, "batch_at", interrupting)
        code, out, err = call("train", config, f"output.dir={folder}")
    assert code == 130
    return folder, out + err


def test_ctrl_c_saves_a_checkpoint_and_says_how_to_go_on(stopped, config):
    folder, shown = stopped
    assert "The checkpoint of step 15 is saved. Resume with" in shown
    assert f"lora-jax train {config} output.dir={folder} --resume" in shown
    assert "Traceback" not in shown
    assert not (folder / "summary.json").exists()


def test_a_resumed_run_is_bit_equal_to_one_never_interrupted(
    stopped, config, run_dir, call
):
    folder, _ = stopped
    code, out, _ = call("train", config, f"output.dir={folder}", "--resume")
    assert code == 0
    assert "Resuming at step 15 of 24" in out
    assert same_adapter(folder, run_dir)
    assert same_numbers(folder, run_dir)
    lines = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert [x["step"] for x in lines if x["split"] == "validation"] == [6, 12, 18, 24]
    assert sum(x["split"] == "baseline" for x in lines) == 1


# Orbax's threads fail where they meet the damage, and nobody collects their errors.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    stopped, config, run_dir, call
):
    folder, _ = stopped
    for file in (folder / "checkpoints" / "15").rglob("*"):
        if file.is_file() and "/d/" in str(file):
            file.write_bytes(b"\0" * file.stat().st_size)
    code, out, err = call("train", config, f"output.dir={folder}", "--resume")
    assert code == 0, err
    assert "The checkpoint of step 15" in out
    assert "damaged" in out
    assert "Resuming at step 12 of 24" in out
    assert same_adapter(folder, run_dir)
    assert same_numbers(folder, run_dir)


def test_resuming_a_finished_run_tests_it_again(run_dir, config, tmp_path, call):
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    code, out, _ = call("train", config, f"output.dir={folder}", "--resume", "--json")
    assert code == 0
    assert json.loads(out)["steps"] == 24
    assert same_numbers(folder, run_dir)


def test_a_run_that_exists_is_not_touched(run_dir, config, call):
    before = (run_dir / "summary.json").read_bytes()
    code, _, shown = call("train", config)
    assert code == 2
    assert "already contains a run (finished). Use --resume" in shown
    assert (run_dir / "summary.json").read_bytes() == before


def test_resume_with_other_settings_names_them(run_dir, config, call):
    code, _, shown = call("train", config, "--resume", "lora.rank=3", "train.seed=1")
    assert code == 2
    assert "lora.rank: 2 -> 3" in shown
    assert "train.seed: 0 -> 1" in shown


def test_resume_without_a_run_says_so(config, tmp_path, call):
    code, _, shown = call("train", config, "--resume", f"output.dir={tmp_path}/no")
    assert code == 2
    assert "nothing to resume" in shown


@pytest.mark.parametrize("place", ["{tmp}/file/run", "/proc/run"])
def test_a_run_folder_that_cant_be_made_is_named(place, config, tmp_path, call):
    (tmp_path / "file").write_text("")
    folder = place.format(tmp=tmp_path)
    code, _, shown = call("train", config, f"output.dir={folder}")
    assert code == 2
    assert f"output.dir {folder} can't be" in shown
    assert "Choose another output.dir." in shown


def test_overwrite_deletes_runs_only(run_dir, config, tmp_path, call):
    (tmp_path / "thesis.tex").write_text("years of work")
    code, _, shown = call("train", config, "--overwrite", f"output.dir={tmp_path}")
    assert code == 2
    assert "is not a run folder" in shown
    shutil.copytree(run_dir, tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    code, _, shown = call("train", config, "--overwrite", f"output.dir={tmp_path}/run")
    assert code == 2
    assert "contains other files than a run's (notes.txt)" in shown


def test_overwrite_keeps_the_old_run_where_the_new_one_cannot_start(
    run_dir, config, tmp_path, call
):
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    words = [f"output.dir={folder}", "--overwrite", f"data.train={tmp_path}/no.jsonl"]
    code, _, shown = call("train", config, *words)
    assert code == 2
    assert "no.jsonl must exist" in shown
    assert (folder / "summary.json").exists()
    code, _, _ = call("train", config, *words[:2], "train.max_steps=2")
    assert code == 0
    assert json.loads((folder / "summary.json").read_text())["steps"] == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a", "label": "bad"}\n{"text": "b"\n', "train.jsonl:2: not JSON"),
        ('{"text": "a"}\n', "train.jsonl:1: has no 'label'"),
        ('{"text": "a", "label": "bad"}\n', "at least 2 classes; got 1: ['bad']"),
        ('{"text": "a", "label": 0}\n{"text": "b", "label": "x"}\n', "int, str"),
        ("", "must hold at least 1 example"),
        (
            '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n',
            "labels of validation must be among the 2 classes ['x', 'y']",
        ),
    ],
)
def test_malformed_data_is_refused_before_anything_starts(
    content, message, config, tmp_path, call
):
    file = tmp_path / "train.jsonl"
    file.write_text(content)
    code, _, shown = call(
        "train", config, f"data.train={file}", f"output.dir={tmp_path}/run"
    )
    assert code == 2
    assert message in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora.targets=[qurey]", "attention/query"),
        ("lora.train=[attention_norm]", "lora.train must include the head"),
        ("model.path=/nowhere/model", "/nowhere/model"),
        ("lora.rank=0", "rank must be at least 1; got 0"),
        ("lora.rnak=1", "Did you mean 'rank'?"),
        ("data.packing=true", "data.packing and train.samples are for decoders"),
    ],
)
def test_bad_settings_are_refused(override, message, config, tmp_path, call):
    code, _, shown = call("train", config, override, f"output.dir={tmp_path}/run")
    assert code == 2
    assert message in shown
    assert not (tmp_path / "run").exists()


def test_a_full_disk_stops_the_run_and_keeps_what_is_saved(
    config, tmp_path, monkeypatch, call
):
    folder, save = tmp_path / "run", session.save_adapter

    def full(directory, trainable, *args, extra, **kwargs):
        if extra["step"] > 6:
            raise OSError(errno.ENOSPC, "No space left on device", str(directory))
        return save(directory, trainable, *args, extra=extra, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(session, "save_adapter", full)
        code, _, shown = call("train", config, f"output.dir={folder}")
    assert code == 1
    assert "No space left on device" in shown
    assert "The checkpoint of step 6 is saved. Resume with" in shown
    assert (folder / "adapter" / "adapter.safetensors").exists()
    assert main(["train", str(config), f"output.dir={folder}", "--resume"]) == 0


def test_a_disk_that_is_full_at_once_is_said_and_the_run_can_start_anew(
    config, tmp_path, monkeypatch, call
):
    folder = tmp_path / "run"

    def full(directory, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device", str(directory))

    with monkeypatch.context() as patch:
        patch.setattr(session, "save_adapter", full)
        code, _, shown = call("train", config, f"output.dir={folder}")
    assert code == 1
    assert "No checkpoint was written yet. Start from step 0 with" in shown
    assert f"output.dir={folder} --resume" in shown
    assert main(["train", str(config), f"output.dir={folder}", "--resume"]) == 0


def test_too_little_space_is_said_before_training(config, tmp_path, monkeypatch, call):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    code, _, shown = call("train", config, f"output.dir={tmp_path}/run")
    assert code == 1
    assert "has 1 kB free; this run needs about 4." in shown


@pytest.mark.real
@pytest.mark.slow
def test_the_main_job_starts_on_real_weights_and_sentences(tmp_path, call):
    words = ["--json", f"output.dir={tmp_path}/run", "train.max_steps=3"]
    try:
        words = arguments([*words, "train.baseline=false", "data.max_length=16"])
    except FetchError as error:
        pytest.skip(f"real weights or data can't be fetched: {error}")
    code, out, shown = call(*words)
    assert code == 0, shown
    summary = json.loads(out)
    assert summary["examples"] == {"train": 8000, "validation": 1000, "test": 1605}
    # Rank 8: 6 layers of four 384 x 384 and two 384 x 1536 kernels; 30,522 words.
    linears = 6 * 8 * (4 * 768 + 2 * 1920)
    assert summary["parameters"]["adapter"] == linears + 8 * (30522 + 384)
    assert summary["parameters"]["encoder_share"] < 0.03
    assert summary["adapter_bytes"] < 1.1 * 4 * summary["parameters"]["trainable"]
    assert "encoder/layer_{0..5}/attention/query" in shown


def test_a_class_that_is_only_held_out_is_a_class(config, tmp_path):
    rows = [{"text": "the film", "label": label} for label in ["a", "b"] * 10 + ["c"]]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"data.train={file}", "data.validation=null", "data.test=null"]

    def is_held_out(seed):
        data = load_settings(config, [*words, f"data.seed={seed}"]).data
        return rows[-1] in hold_out({"train": rows}, data)["validation"]

    seed = next(filter(is_held_out, range(1000)))
    job = open_job(load_settings(config, [*words, f"data.seed={seed}"]))
    assert job.extra()["labels"] == ["a", "b", "c"]
    assert {example["label"] for example in job.splits["train"].examples} == {0, 1}


def test_a_run_that_was_copied_goes_on_where_it_is(run_dir, tmp_path, call):
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    before = (run_dir / "summary.json").stat().st_mtime_ns
    code, out, shown = call("train", folder, "--resume", "--json")
    assert code == 0, shown
    assert json.loads(out)["run"] == str(folder)
    assert (run_dir / "summary.json").stat().st_mtime_ns == before
    assert same_numbers(folder, run_dir)


def test_a_run_that_was_stopped_early_has_nothing_to_go_on_with(config, tmp_path, call):
    words = ["train.patience=1", "train.eval_every=2", "train.learning_rate=1e-12"]
    words += ["train.baseline=false", f"output.dir={tmp_path}/run", "--json"]
    words = ["train", config, *words]
    code, out, shown = call(*words)
    assert code == 0, shown
    assert json.loads(out)["steps"] == 5  # validations at 2 and 4; 5 was under way
    code, again, shown = call(*words, "--resume")
    assert code == 0, shown
    assert json.loads(again)["steps"] == 5


def test_an_adapter_that_lost_its_checkpoint_to_a_kill_is_written_anew(
    run_dir, config, tmp_path, call
):
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    file = folder / "adapter" / "adapter_config.json"
    saved = json.loads(file.read_text())
    assert saved["extra"]["step"] == 24 or saved["extra"]["step"] % 6 == 0
    kept = saved["extra"].pop("step")
    saved["extra"]["step"] = kept + 1
    saved["config_sha256"] = _digest(saved)
    file.write_text(json.dumps(saved))
    code, _, shown = call("train", config, f"output.dir={folder}", "--resume")
    assert code == 0, shown
    assert json.loads(file.read_text())["extra"]["step"] == kept
    assert same_adapter(folder, run_dir)
    assert same_numbers(folder, run_dir)


@pytest.mark.parametrize(
    ("new", "old", "is_better"),
    [
        (1.0, 2.0, True),
        (2.0, 1.0, False),
        (math.nan, 1.0, False),
        (1.0, math.nan, True),
        (1.0, None, True),
        (math.nan, math.nan, False),
    ],
)
def test_any_loss_is_better_than_nan(new, old, is_better):
    assert Job.is_better(SimpleNamespace(best_mode="min"), new, old) is is_better


def test_two_processes_do_not_start_a_run_in_one_folder(config, tmp_path):
    settings = load_settings(config)
    RunFolder(tmp_path / "run").create(settings, overwrite=False)
    with pytest.raises(UserError, match="another process has just started a run in"):
        RunFolder(tmp_path / "run").create(settings, overwrite=False)


def test_a_folder_of_something_else_is_no_run(config, tmp_path, call):
    (tmp_path / "thesis.tex").write_text("years of work")
    code, _, shown = call("train", config, f"output.dir={tmp_path}")
    assert code == 2
    assert "is not a run folder (it has no config.yaml, but 'thesis.tex')" in shown


def test_a_run_that_diverges_ends_with_an_error_and_keeps_what_was_good(
    config, tmp_path, call, monkeypatch
):
    folder, evaluate = tmp_path / "run", job.evaluate
    results = []

    def diverging(*args):
        results.append(evaluate(*args))
        return results[-1] | ({"loss": math.nan} if len(results) > 1 else {})

    monkeypatch.setattr(job, "evaluate", diverging)
    words = [f"output.dir={folder}", "train.baseline=false"]
    code, out, shown = call("train", config, *words)
    assert code == 1
    assert out.count("(best so far)") == 1
    assert "merge" not in out
    assert "the run has diverged: 0 of 12 steps were skipped" in shown
    assert "and the validation loss is nan.\nLower train.learning_rate (now" in shown
    assert "The last good adapter, of step 6 (validation acc" in shown
    assert "--resume" not in shown  # would end in the same way
    assert not (folder / "summary.json").exists()
    assert [p.name for p in (folder / "checkpoints").iterdir() if p.is_dir()] == ["6"]
    saved = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert saved["extra"]["step"] == 6
    code, _, shown = call("train", config, *words)
    assert "already contains a run (diverged at step 12)" in shown


@pytest.mark.parametrize(
    ("rate", "message", "kept"),
    [
        ("1e30", "5 of 6 steps were skipped, their loss or gradient not finite", False),
        ("1e9", "23 of 24 steps were skipped, their loss or gradient not", True),
    ],
)
def test_a_learning_rate_that_is_far_too_high_ends_in_an_error(
    rate, message, kept, config, tmp_path, call
):
    folder = tmp_path / "run"
    words = [f"output.dir={folder}", f"train.learning_rate={rate}"]
    code, out, shown = call("train", config, *words, "train.baseline=false")
    assert code == 1
    assert message in shown
    assert ("No validation was finite, so no adapter was kept." in shown) != kept
    assert out.count("(best so far)") == kept
    assert (folder / "adapter").exists() == kept


def test_a_run_that_ends_worse_than_the_frozen_base_says_so(config, tmp_path, call):
    words = [f"output.dir={tmp_path}/run", "train.learning_rate=10", "train.epochs=1"]
    code, out, shown = call("train", config, *words)
    assert code == 0, shown
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (
        summary["validation"]["accuracy"] < (summary["baseline"]["validation_accuracy"])
    )
    assert (
        "The adapter is worse than the base without it (validation accuracy"
        in (summary["warning"])
    )
    assert summary["warning"] in out
    assert "lora-jax merge" not in out


@pytest.mark.parametrize(
    ("best", "last", "said"),
    [
        (2.0, 2.5, "The adapter is worse than the base"),
        (1.0, 2.5, "The run ended worse than the base (validation loss 2.5000 at step"),
        (1.0, 1.1, None),
        (1.5 + 1e-7, 1.5 + 1e-7, None),  # equal, as rounded
    ],
)
def test_a_verdict_compares_with_the_base(best, last, said):
    job = SimpleNamespace(
        metric="loss",
        is_better=lambda new, old: new < old,
    )
    found = verdict.warning(
        job,
        best={"step": 3, "loss": best},
        last={"step": 9, "loss": last},
        baseline={"validation_loss": 1.5, "what": "frozen base"},
    )
    assert (found and said in found) if said else found is None
    lines = ({"step": 3, "loss": 9.0}, {"step": 9, "loss": 9.0})
    none = verdict.warning(job, best=lines[0], last=lines[1], baseline=None)
    assert none is None


def test_a_base_that_is_not_finite_is_told_from_a_learning_rate():
    model = SimpleNamespace(dtype="bfloat16")
    job = SimpleNamespace(
        settings=SimpleNamespace(model=model, train=None),
        loaded=SimpleNamespace(path="base"),
    )
    error = verdict.diverged(job, step=6, skipped=6, best=None, last=None)
    assert error.code == 1
    assert "Not even the first step was finite" in str(error)
    assert "`lora-jax inspect base` counts weights that are not finite" in str(error)


def test_a_step_that_does_not_fit_is_refused_before_anything_is_written(
    config, tmp_path, call, monkeypatch
):
    folder = tmp_path / "run"
    words = [config, f"output.dir={folder}", "train.batch_size=100000000"]
    monkeypatch.setattr(Batches, "batch_at", None)  # no batch is formed
    monkeypatch.setattr(pricing, "device_memory", lambda device: 3 * 10**6)
    code, _, shown = call("train", *words)
    assert code == 2
    assert "a step of 100000000 x 16 tokens needs" in shown
    assert "The largest batch that fits is train.batch_size=" in shown
    assert not folder.exists()
    code, _, planned = call("plan", *words)
    assert code == 2
    assert shown.split(":", 1)[1] == planned.split(":", 1)[1]  # the same words


def test_a_run_without_an_adapter_yet_says_so_to_all_who_ask(config, tmp_path, call):
    folder = tmp_path / "run"
    RunFolder(folder).create(load_settings(config), overwrite=False)
    out = ["--out", tmp_path / "out"]
    for words in (
        ["inspect", folder],
        ["eval", "--run", folder],
        ["merge", "--adapter", folder, *out],
        ["export", "--adapter", folder, "--format", "peft", *out],
    ):
        code, _, shown = call(*words)
        assert code == 2
        assert f"the run in {folder} has no adapter yet" in shown
        assert f"`lora-jax train {folder} --resume`" in shown


@pytest.mark.parametrize("left", [[], [".lock"], [".config.yaml.abcd1234.tmp"]])
def test_a_start_that_was_killed_before_it_wrote_anything_is_started_anew(
    left, config, tmp_path
):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in left:
        (folder / name).touch()
    settings, run = load_settings(config), RunFolder(folder)
    run.check(settings, resume=False, overwrite=False)
    run.create(settings, overwrite=False)
    run.release()
    assert load_settings(folder / "config.yaml") == settings
    assert [path.name for path in folder.iterdir()] == ["config.yaml"]


def test_old_runs_with_another_default_of_remat_go_on(run_dir, config, tmp_path, call):
    folder = tmp_path / "run"
    shutil.copytree(run_dir, folder)
    file = folder / "config.yaml"
    assert "remat: auto" in file.read_text()
    file.write_text(file.read_text().replace("remat: auto", "remat: lora"))
    code, _, shown = call("train", config, f"output.dir={folder}", "--resume")
    assert code == 0, shown
