"""LAWS 19: two real processes train as one does, and neither outlives the other."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lora_jax.cli.main import main
from lora_jax.files.adapter import load_adapter
from lora_jax.tree.paths import flatten
from tests.tiny_decoder import make_decoder

ROOT = Path(__file__).parent.parent.parent
TIMEOUT = 300  # seconds: a bound, many times what is needed


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A config of eight steps, with a validation and a checkpoint after every two."""
    place = tmp_path_factory.mktemp("job")
    folder = make_decoder(place / "llama")
    rows = [
        {"prompt": "what is the sky ? " * (i % 3 + 1), "completion": "blue " * (i % 2)}
        for i in range(1, 22)
    ]
    rows = [{**row, "completion": row["completion"] + "."} for row in rows]
    (place / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (place / "c.yaml").write_text(
        f"""
model: {{path: {folder}, scan: true}}
data: {{train: {place}/train.jsonl, holdout: 0.25, max_length: 24, packing: true}}
lora: {{rank: 2, alpha: 8, dropout_rate: 0.1}}
train: {{max_steps: 8, epochs: 8, batch_size: 2, eval_every: 2, log_every: 1,
  learning_rate: 1e-2, baseline: false}}
mesh: {{fsdp: -1, data: 1}}
output: {{dir: {place}/one}}
"""
    )
    return place


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def start(place, name, *words, index, port, step=-1, cluster=False):
    """Starts one of two processes, killed at a step; asked of SLURM where it is there.

    What SLURM says to its processes is said here by their environment alone.
    """
    own = {
        "JAX_PLATFORMS": "cpu",
        "LORA_JAX_CACHE": str(place / "compiled"),
    }
    how = ["--coordinator", f"localhost:{port}", "--processes", "2"]
    how += ["--process-id", str(index)]
    if cluster:
        how = ["--distributed"]
        own |= {
            "SLURM_JOB_ID": "7",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_STEP_NUM_NODES": "1",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": str(index),
            "SLURM_LOCALID": str(index),
            "JAX_COORDINATOR_PORT": str(port),
        }
    words = ["train", str(place / "c.yaml"), f"output.dir={place / name}", *words, *how]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.cli.at_step", str(step), "SIGKILL", *words],
        env={**os.environ, **own},
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def two(place, name, *words, killed=-1, **options):
    """Runs two processes to their ends; gives (stdout, stderr, status) of each."""
    port = free_port()
    started = [
        start(
            place,
            name,
            *words,
            index=index,
            port=port,
            step=killed if index == 1 else -1,
            **options,
        )
        for index in range(2)
    ]
    try:
        return [(*p.communicate(timeout=TIMEOUT), p.returncode) for p in started]
    finally:
        for process in started:
            process.kill()


def adapter(folder):
    return flatten(load_adapter(folder / "adapter").variables)


def lines(folder, *splits):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"]) for row in rows if row["split"] in splits]


@pytest.fixture(scope="module")
def never_killed(job):
    ends = two(job, "two")
    assert [end[2] for end in ends] == [0, 0], ends
    return job / "two", ends


@pytest.mark.slow
def test_two_processes_have_the_losses_and_the_adapters_of_one(job, never_killed):
    folder, _ = never_killed
    assert main(["train", str(job / "c.yaml"), "mesh.fsdp=1"]) == 0
    for split, count in (("train", 8), ("validation", 4)):
        alone, both = (np.array(lines(f, split)) for f in (job / "one", folder))
        assert len(alone) == count
        np.testing.assert_allclose(both, alone, rtol=1e-5)
    alone, both = adapter(job / "one"), adapter(folder)
    for path, leaf in alone.items():
        np.testing.assert_allclose(both[path], leaf, atol=2e-5, err_msg=path)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["processes"] == 2
    assert summary["mesh"] == {"data": 1, "fsdp": 2, "tensor": 1}


@pytest.mark.slow
def test_the_first_process_speaks_for_both(never_killed):
    (first, _, _), (second, _, _) = never_killed[1]
    assert "Result" in first
    assert second.splitlines()[0].startswith("Process 1 of 2 is waiting for")
    assert "Loaded" not in second


def saved_step(ends) -> int:
    """Checks how two processes end of which the second was killed."""
    (_, said, code), (_, _, killed) = ends
    assert (code, killed) == (1, -signal.SIGKILL), said
    assert "another process of this run has ended" in said
    told = re.search(r"The checkpoint of step (\d) is saved. Resume with", said)
    assert told, said
    return int(told[1])


@pytest.mark.slow
def test_a_killed_process_ends_the_other(job):
    assert saved_step(two(job, "ended", killed="5")) == 4


@pytest.mark.slow
def test_a_job_killed_while_it_saves_resumes_to_the_same_bits(job, never_killed):
    step = saved_step(two(job, "killed", killed="4s"))
    assert step in (2, 4)  # 4 where both had written it before the one was gone
    ends = two(job, "killed", "--resume", cluster=True)
    assert [end[2] for end in ends] == [0, 0], ends
    resumed = re.search(r"Resuming at step (\d) of 8", ends[0][0])
    # The save may have ended after the one that is left had said what there was.
    assert resumed, ends[0][0]
    assert step <= int(resumed[1]) <= 4
    file = Path("adapter", "adapter.safetensors")
    folder = never_killed[0]
    assert (job / "killed" / file).read_bytes() == (folder / file).read_bytes()
    splits = ("train", "validation")
    assert lines(job / "killed", *splits) == lines(folder, *splits)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--processes", "2"],
            "must come with --coordinator, --process-id",
        ),
        (["--distributed", "--processes", "2"], "one or the other"),
        (
            ["--coordinator", "h:1", "--processes", "2", "--process-id", "2"],
            "index must be from 0 to 1 for 2 processes; got 2",
        ),
        (
            ["--coordinator", "host", "--processes", "2", "--process-id", "1"],
            "HOST:PORT, with a port from 1 to 65535; got 'host'",
        ),
    ],
    ids=["alone", "both", "range", "address"],
)
def test_words_about_processes_that_make_no_sense_are_refused(
    words, message, job, call
):
    code, _, shown = call("train", job / "c.yaml", *words)
    assert code == 2
    assert message in shown


def test_a_coordinator_that_nobody_is_is_not_waited_for_without_end(job, call):
    port = free_port()
    words = ["--coordinator", f"localhost:{port}", "--processes", "2"]
    words += ["--start-timeout", "1"]
    code, _, shown = call("train", job / "c.yaml", *words, "--process-id", "1")
    assert code == 2
    assert f"could not reach the coordinator at localhost:{port}" in shown
    assert "lora-jax train, process 1:" in shown
    with socket.create_server(("", 0)) as server:
        words[1] = f"localhost:{server.getsockname()[1]}"
        code, _, shown = call("train", job / "c.yaml", *words, "--process-id", "0")
    assert code == 2
    assert "Choose another port for all processes" in shown
