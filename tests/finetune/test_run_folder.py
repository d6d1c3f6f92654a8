"""The run folder: one run at a time, and nothing written through a link."""

import os
import subprocess
import sys

import pytest

from lora_jax.finetune.errors import UserError
from lora_jax.finetune.run_folder import RunFolder
from lora_jax.finetune.settings import load_settings

HOLDS = """
import sys, time
from lora_jax.finetune.run_folder import RunFolder
from lora_jax.finetune.settings import load_settings
folder = RunFolder(sys.argv[1])
folder.check(load_settings(sys.argv[1] + "/config.yaml"), resume=True, overwrite=False)
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture
def settings(tmp_path):
    config = tmp_path / "job.yaml"
    config.write_text(
        f"model: {{path: m}}\ndata: {{train: t.jsonl}}\noutput: {{dir: {tmp_path}/run}}"
    )
    return load_settings(config)


@pytest.fixture
def run(settings):
    folder = RunFolder(settings.output.dir)
    folder.create(settings, overwrite=False)
    return folder.path


@pytest.mark.parametrize("option", ["resume", "overwrite"])
def test_a_folder_in_use_is_refused_and_a_killed_run_is_not(run, settings, option):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(run)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    options = {"resume": False, "overwrite": False, option: True}
    with pytest.raises(
        UserError, match=f"in progress: .* held by process {process.pid}"
    ):
        RunFolder(run).check(settings, **options)
    process.kill()
    process.wait()
    process.stdout.close()
    RunFolder(run).check(settings, **options)


def test_a_run_that_has_ended_in_this_process_is_not_in_the_way(run, settings):
    class Holder:
        folder: RunFolder
        me: "Holder"

    holder = Holder()
    holder.folder, holder.me = RunFolder(run), holder  # a cycle, as tracebacks make
    holder.folder.check(settings, resume=True, overwrite=False)
    with pytest.raises(UserError, match=f"process {os.getpid()}"):
        RunFolder(run).check(settings, resume=True, overwrite=False)
    del holder
    RunFolder(run).check(settings, resume=True, overwrite=False)


def test_metrics_are_never_written_through_a_link(run, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    folder = RunFolder(run)
    (run / ".metrics.jsonl.tmp").symlink_to(outside)
    (run / "metrics.jsonl").symlink_to(outside)
    with pytest.raises(OSError, match="symbolic link"):
        folder.log({"step": 1})
    folder.rewind(0)
    folder.log({"step": 1})
    folder.summarise({"step": 1})
    assert outside.read_text() == "precious"
    assert folder.metrics() == [{"step": 1}]


def test_what_a_kill_left_is_no_stranger_and_is_overwritten(run, settings):
    left = run / ".metrics.jsonl.abcd1234.tmp"
    left.write_text("half")
    folder = RunFolder(run)
    folder.check(settings, resume=False, overwrite=True)
    folder.create(settings, overwrite=True)
    del folder
    assert [path.name for path in run.iterdir()] == ["config.yaml"]
