"""Kills tiny runs at random moments, resumes them, and compares the results bit by bit.

``python -m tests.fuzz.kills --runs 40 --seed 0 [--processes 2]``. A run is started and
killed with SIGKILL repeatedly until it finishes; then its adapter, metrics and summary
must be those of an uninterrupted run. Half of the moments are random times; the others
are the nth time that the process accesses a file of the run, where a kill does most
harm.

Every process is forked from this one, which has imported everything and computed
nothing, and all share one cache of compiled programs: a process then costs 3 s of a
core, most of it JAX's tracing.
"""

import argparse
import importlib
import json
import math
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

LIMIT = 300  # seconds after which a process counts as hung
HUNG = 124  # its status
KILLS = 8  # of a run at most, so that it ends
EVENTS = ("open", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate")
IMPORTS = (
    "lora_jax.cli.train",
    "lora_jax.finetune.session",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "orbax.checkpoint",
)
CONFIG = """
model: {{path: {place}/llama, scan: true}}
data: {{train: {place}/train.jsonl, holdout: 0.25, max_length: 24, packing: true}}
lora: {{targets: [query], rank: 2, alpha: 8, dropout_rate: 0.1}}
train: {{max_steps: 8, epochs: 8, batch_size: 2, eval_every: 2, save_every: 1,
  log_every: 1, learning_rate: 1e-2, keep: 1}}
mesh: {{fsdp: -1, data: 1}}
output: {{dir: {place}/whole}}
"""


class Kill(NamedTuple):
    """When to kill a process.

    Attributes:
      seconds: seconds after its start, or None.
      events: number of accesses to the run's files, or None.
      index: index of the process in the run.
    """

    seconds: float | None
    events: int | None
    index: int = 0


class Report(NamedTuple):
    """The results.

    Attributes:
      runs: number of runs.
      kills: number of kills.
      late: number of planned kills that the run finished before.
      faults: descriptions of what went wrong.
    """

    runs: int
    kills: int
    late: int
    faults: list[str]


class Child:
    """A forked process that runs `lora-jax`.

    Args:
      words: the command's arguments.
      folder: the run folder.
      count: number of accesses to the run's files after which it dies; 0 for never.
      place: folder for its output and the number of accesses.
      index: index of the process.
    """

    def __init__(
        self, words: list[str], folder: Path, count: int, place: Path, index: int
    ):
        self.said, self.log = place / f"said{index}", place / f"touched{index}"
        self.log.unlink(missing_ok=True)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                out = os.open(self.said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.dup2(out, 1)
                os.dup2(out, 2)
                status = _die_at(str(folder), count, self.log, words)
                sys.stdout.flush()
                sys.stderr.flush()
            except BaseException:
                traceback.print_exc()
                status = 1
            os._exit(status)

    def kill(self) -> None:
        """Kills it."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, seconds: float) -> int | None:
        """Returns its status, or None if it is still running after some seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        return None


def make_job(place: Path) -> None:
    """Writes a model, data and a config of eight steps."""
    from tests.tiny_decoder import make_decoder

    make_decoder(place / "llama")
    rows = [
        {"prompt": "what is the sky ? " * (i % 3 + 1), "completion": f"w{i % 9} ."}
        for i in range(1, 22)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (place / "train.jsonl").write_text(lines)
    (place / "c.yaml").write_text(CONFIG.format(place=place))


def attempt(
    place: Path, name: str, kill: Kill | None = None, *, processes: int = 1
) -> tuple[list[int], str, float, int]:
    """Starts or resumes a run and waits for the end of its processes.

    Args:
      place: a folder prepared by `make_job`.
      name: name of the run folder.
      kill: when to kill one of the processes, if at all.
      processes: number of processes.

    Returns:
      The statuses and output of all processes, the seconds, and the number of accesses
      to the run's files by the first one, if it was not killed.
    """
    folder, start = place / name, time.monotonic()
    words = ["train", str(place / "c.yaml"), f"output.dir={folder}"]
    words += ["--resume"] * (folder / "config.yaml").exists()
    port = _free_port()
    children: list[Child] = []
    for index in range(processes):
        count = kill.events if kill and kill.index == index else None
        own = list(words)
        if processes > 1:
            own += ["--coordinator", f"localhost:{port}", "--process-id", str(index)]
            own += ["--processes", str(processes)]
        children.append(Child(own, folder, count or 0, place, index))
    statuses: dict[int, int | None] = {}
    if kill and kill.seconds is not None:
        victim = children[kill.index]
        statuses[kill.index] = victim.wait(kill.seconds)
        if statuses[kill.index] is None:
            victim.kill()
    for index, process in enumerate(children):
        if statuses.get(index) is None:
            statuses[index] = process.wait(LIMIT)
        if statuses[index] is None:
            process.kill()
            process.wait(LIMIT)
    said = "\n".join(process.said.read_text() for process in children)
    log = children[0].log
    touched = int(log.read_text()) if log.exists() else 0
    ends = [HUNG if end is None else end for _, end in sorted(statuses.items())]
    return ends, said, time.monotonic() - start, touched


def result(folder: Path) -> dict[str, Any]:
    """Returns the results that all runs of a config must have in common."""
    summary = json.loads((folder / "summary.json").read_text())
    lines = [
        json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    timed = ("seconds", "targets_per_second")
    kept = ("validation", "baseline", "steps", "skipped", "examples", "parameters")
    return {
        "adapter": (folder / "adapter" / "adapter.safetensors").read_bytes(),
        "adapter step": json.loads(
            (folder / "adapter" / "adapter_config.json").read_text()
        )["extra"]["step"],
        "metrics": [{k: v for k, v in x.items() if k not in timed} for x in lines],
        "summary": {name: summary[name] for name in kept},
        "strange files": sorted(
            str(p.relative_to(folder)) for p in folder.rglob("*.tmp*")
        ),
    }


def run(
    place: Path, runs: int, *, seed: int, processes: int = 1, minutes: float = math.inf
) -> Report:
    """Kills runs and compares each with an uninterrupted one.

    Args:
      place: an empty folder.
      runs: number of runs.
      seed: seed of the moments.
      processes: processes per run.
      minutes: time after which no new run is started.
    """
    make_job(place)
    rng, kills, late, faults = random.Random(seed), 0, 0, []
    statuses, said, _, _ = attempt(place, "first", processes=processes)  # compiles
    _, _, seconds, events = attempt(place, "whole", processes=processes)
    if any(statuses):
        return Report(0, 0, 0, [f"the first run failed: {said[-2000:]}"])
    wanted = result(place / "whole")
    end = time.monotonic() + 60 * minutes
    for number in range(runs):
        if time.monotonic() > end:
            runs = number
            break
        name = f"run{number}"
        for left in range(KILLS, -1, -1):
            kill = None
            if left:
                is_timed = rng.random() < 0.5
                kill = Kill(
                    rng.uniform(0.3, 1) * seconds if is_timed else None,
                    # A run that goes on touches fewer files.
                    None
                    if is_timed
                    else rng.randint(1, events // (1 + (left < KILLS))),
                    rng.randrange(processes),
                )
            statuses, said, taken, _ = attempt(place, name, kill, processes=processes)
            if not any(statuses):
                late += kill is not None
                seconds = taken  # the machine may be quicker now
                break
            if kill is None or -signal.SIGKILL not in statuses or HUNG in statuses:
                faults.append(f"{name}, {kill}, statuses {statuses}: {said[-2000:]}")
                break
            kills += 1
        else:
            faults.append(f"{name} did not end")
        if any(statuses):
            continue
        found = result(place / name)
        faults += [
            f"{name}: {part} differ: {str(found[part])[:500]}"
            for part in wanted
            if found[part] != wanted[part]
        ]
        print(f"run {number}: {kills} kills so far, {len(faults)} faults", flush=True)
    return Report(runs, kills, late, faults)


def _die_at(folder: str, count: int, log: Path, words: list[str]) -> int:
    """Runs `lora-jax`, and dies at the nth access to the run's files."""
    from lora_jax.cli.main import main

    touched = 0

    def watch(event: str, args: tuple[Any, ...]) -> None:
        nonlocal touched
        if event not in EVENTS or not isinstance(args[0], (str, os.PathLike)):
            return
        if not os.fspath(args[0]).startswith(folder):
            return
        if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR):
            return
        touched += 1
        if touched == count:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    status = main(words)
    log.write_text(str(touched))
    return status


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def main() -> int:
    """Runs and prints the results; returns 1 if anything went wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.kills")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=math.inf)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        os.environ |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": f"{place}/compiled",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        for name in IMPORTS:
            importlib.import_module(name)
        report = run(
            Path(place),
            args.runs,
            seed=args.seed,
            processes=args.processes,
            minutes=args.minutes,
        )
    for fault in report.faults:
        print(fault)
    print(
        f"{report.runs} runs of {args.processes} processes, {report.kills} kills, "
        f"{report.late} moments too late, {len(report.faults)} faults"
    )
    return int(bool(report.faults))


if __name__ == "__main__":
    raise SystemExit(main())
