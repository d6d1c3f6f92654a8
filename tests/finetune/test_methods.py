"""Methods in runs: one line of config, resumable to the bit."""

import shutil

import numpy as np
import pytest

from lora_jax import fine_tune, load_model
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.evaluation import evaluate_run
from lora_jax.finetune.inspection import inspect
from lora_jax.finetune.run_folder import open_run
from lora_jax.finetune.sweep_grid import expand
from lora_jax.nn import data_start
from tests.finetune.test_run import adapter_of

QUICK = "train.baseline=false"
STEPS = [QUICK, "train.max_steps=4", "train.eval_every=2", "train.batch_size=8"]


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora_ga") / "run"
    words = [f"output.dir={folder}", "lora.init=lora_ga", *STEPS]
    return fine_tune(config, words)


def test_a_run_resumes_from_the_start_that_it_keeps(run, tmp_path, monkeypatch):
    again = tmp_path / "again"
    shutil.copytree(run.path, again)
    (again / "summary.json").unlink()
    shutil.rmtree(again / "checkpoints" / "4")
    svd = data_start.gradient_factors

    def elsewhere(*args, **kwargs):  # another machine's SVD, so to speak
        a, b = svd(*args, **kwargs)
        return -1.01 * a, -b

    monkeypatch.setattr(data_start, "gradient_factors", elsewhere)
    resumed = fine_tune(run.path, [f"output.dir={again}"], resume=True)
    assert adapter_of(again) == adapter_of(run.path)
    assert resumed.summary["validation"] == run.summary["validation"]


def test_a_run_s_adapter_is_evaluated_loaded_and_inspected(run):
    found = evaluate_run(*open_run(run.path))
    assert found.metrics["accuracy"] == run.summary["test"]["accuracy"]
    loaded = run.load()
    assert loaded.module.config.rank == 2 * run.settings.lora.rank
    assert "fixed" not in loaded.variables
    rows = inspect(str(run.path))["layers"]
    (target, *_) = loaded.module.targets(loaded.params)
    (row,) = [row for row in rows if row["path"] == target.path]
    base = load_model(run.settings.model.path).params
    merged = loaded.module.merge(loaded.variables)
    for name in target.weight_path.split("/"):
        base, merged = base[name], merged[name]
    norm = np.linalg.norm(np.asarray(merged) - np.asarray(base))
    assert row["norm"] == pytest.approx(norm, rel=1e-3)


def test_a_sweep_says_that_it_does_not_take_eva(config):
    with pytest.raises(UserError, match=r"lora\.init = eva can't be swept"):
        expand(config, {"lora.init": ["pissa", "eva"], "train.seed": [0, 1]})


def test_eva_s_ranks_are_those_of_the_run(config, tmp_path):
    words = [f"output.dir={tmp_path}/run", "lora.init=eva", "train.max_steps=2"]
    run = fine_tune(config, [*words, QUICK, "train.batch_size=8"])
    loaded = run.load()
    ranks = [target.rank for target in loaded.module.targets(loaded.params)]
    given = run.settings.lora.rank
    assert len(set(ranks)) > 1
    assert max(ranks) <= 2 * given
    shutil.copytree(run.path, tmp_path / "again")
    (tmp_path / "again" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "again" / "checkpoints")
    fine_tune(run.path, [f"output.dir={tmp_path}/again"], resume=True)
    assert adapter_of(tmp_path / "again") == adapter_of(run.path)
    found = evaluate_run(*open_run(run.path))
    assert found.metrics["accuracy"] == run.summary["test"]["accuracy"]
