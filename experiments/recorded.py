"""The recorded runs of an experiment, and the frame of a ``run.py`` that makes them.

`Runs` records every run in a JSONL file; what is recorded is not run again.
"""

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax import fine_tune, sweep
from lora_jax.finetune.errors import DivergedError


class Runs:
    """The recorded runs of an experiment, one JSON object per line.

    Attributes:
      path: the file.
      work: the folder for run folders.
    """

    def __init__(self, results: Path, work: Path) -> None:
        results.mkdir(parents=True, exist_ok=True)
        self.path, self.work = results / "runs.jsonl", work

    def part(self, name: str) -> "Runs":
        """Returns the runs of a second setting, recorded in a folder of their own."""
        return Runs(self.path.parent / name, self.work / name)

    def of(self, name: str) -> list[dict[str, Any]]:
        """Returns the recorded runs of a part."""
        if not self.path.exists():
            return []
        lines = map(json.loads, self.path.read_text().splitlines())
        return [line for line in lines if line["part"] == name]

    def parts(self) -> list[str]:
        """Returns the names of the recorded parts, in order."""
        lines = self.path.read_text().splitlines() if self.path.exists() else ()
        return list(dict.fromkeys(json.loads(line)["part"] for line in lines))

    def once(
        self, name: str, make: Callable[[], Iterable[Mapping[str, Any]]]
    ) -> list[dict[str, Any]]:
        """Records the runs of a part, unless they are recorded.

        Args:
          name: of the part.
          make: runs it.

        Returns:
          The part's runs.
        """
        if not (found := self.of(name)):
            start = time.process_time()
            rows = [{**row, "part": name} for row in make()]
            with self.path.open("a") as file:
                file.writelines(f"{json.dumps(row)}\n" for row in rows)
            spent = time.process_time() - start
            print(f"{name}: {len(rows)} runs, {spent:.0f} s of CPU time", flush=True)
            found = self.of(name)
        return found

    def sweep(
        self,
        name: str,
        config: Mapping[str, Any],
        grid: Mapping[str, Sequence[Any]],
        **options: Any,
    ) -> list[dict[str, Any]]:
        """Runs `lora_jax.sweep` once, continuing it if it was stopped.

        Args:
          name: of the part, and of its folder.
          config: of all runs.
          grid: values by setting.
          **options: of `lora_jax.sweep`.

        Returns:
          One row per run: what the grid says of it, ``loss`` and ``accuracy`` on the
          validation sentences (None if it diverged), ``test`` ones if there are any,
          and the run's ``folder``.
        """

        def make() -> list[dict[str, Any]]:
            folder = self.work / name
            done = sweep(
                {**config, "output": {"dir": str(folder)}},
                grid,
                resume=(folder / "sweep.json").exists(),
                **options,
            )
            lines = sorted(done.runs, key=lambda line: line["name"])
            # A setting with one value is not in the sweep's lines.
            alike = {k: v[0] for k, v in grid.items() if len(v) == 1}
            return [{**alike, **_row(line)} for line in lines]

        return self.once(name, make)

    def alone(
        self, name: str, config: Mapping[str, Any], grid: Mapping[str, Sequence[Any]]
    ) -> list[dict[str, Any]]:
        """Trains what `sweep` refuses, one run after the other, with the same rows.

        Args:
          name: of the part, and of its folder.
          config: of all runs.
          grid: values by setting.

        Returns:
          As `sweep`.
        """

        def make() -> list[dict[str, Any]]:
            rows = []
            for number, values in enumerate(itertools.product(*grid.values())):
                folder = self.work / name / f"{number:03d}"
                words = [f"{k}={v}" for k, v in zip(grid, values, strict=True)]
                given = {**config, "output": {"dir": str(folder)}}
                line = {
                    "values": dict(zip(grid, map(json.dumps, values), strict=True)),
                    "folder": folder,
                }
                try:
                    done = fine_tune(given, words, overwrite=True).summary
                except DivergedError:
                    lost = {"validation": None, "test": None, "status": "diverged"}
                    rows.append(_row({**line, **lost}))
                    continue
                scores = {name: done.get(name) for name in ("validation", "test")}
                rows.append(_row({**line, **scores, "status": "done"}))
            return rows

        return self.once(name, make)


def run_short(
    doc: str | None,
    results: Path,
    make_task: Callable[[bool], Any],
    train: Callable[[Any, Runs], object],
    report: Callable[[Runs, Path], None],
    argv: list[str] | None = None,
) -> None:
    """Runs what an experiment lacks, then its report: the frame of each ``run.py``.

    Args:
      doc: the module's docstring, for ``--help``.
      results: the experiment's folder of results.
      make_task: gives the `Task`, a tiny one if its argument is True.
      train: records the runs.
      report: writes tables and plots of them to a folder.
      argv: the arguments; None for the command line's.
    """
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--report", action="store_true", help="tables and plot only")
    parser.add_argument("--quick", action="store_true", help="tiny, in runs/")
    args = parser.parse_args(argv)
    work = Path("runs") / (results.parent.name + "-quick" * args.quick)
    results = work / "results" if args.quick else results
    runs = Runs(results, work)
    if not args.report:
        train(make_task(args.quick), runs)
    report(runs, results)


def _row(line: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a sweep's line as a row of the results."""
    values = {key: _value(text) for key, text in line["values"].items()}
    scores = {}
    for prefix, found in (("", line["validation"]), ("test_", line["test"])):
        if found is None and not prefix:
            scores["loss"] = None
        for name in ("loss", "accuracy"):
            if found and name in found:
                scores[prefix + name] = round(found[name], 5)
    folder = os.path.relpath(line["folder"])
    return {**values, **scores, "status": line["status"], "folder": folder}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return Path(text).name  # of a file
