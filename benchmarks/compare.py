"""Compares two results files of one benchmark to find regressions."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MEASURES = ("median_ms", "temp_bytes", "flops", "compile_seconds")
NOISE = 0.1  # relative change that is noise on shared machines


def main(old: Path, new: Path) -> bool:
    """Prints the ratio new / old of every measure that both files have.

    Args:
      old: a JSON results file.
      new: another results file of the same comparison.

    Returns:
      Whether no measure grew by more than `NOISE`.

    Raises:
      ValueError: if the files are from different comparisons.
    """
    records = [json.loads(path.read_text()) for path in (old, new)]
    names = [record["comparison"] for record in records]
    if names[0] != names[1]:
        raise ValueError(f"{old} is from {names[0]!r}, {new} from {names[1]!r}.")
    before, after = (dict(_measures(record["rows"])) for record in records)
    for record in records:
        print(f"{record['commit']}, {record['device']}, {record['date']}")
    print("| shape | contender | measure | old | new | new / old |")
    print("|---" * 6 + "|")
    is_worse = False
    for key in (key for key in before if key in after and before[key]):
        ratio = after[key] / before[key]
        is_worse |= ratio > 1 + NOISE
        mark = " **worse**" if ratio > 1 + NOISE else ""
        cells = (
            *key,
            f"{before[key]:,.4g}",
            f"{after[key]:,.4g}",
            f"{ratio:.2f}{mark}",
        )
        print(f"| {' | '.join(cells)} |")
    for title, only in (("old", before.keys() - after), ("new", after.keys() - before)):
        if only:
            gone = sorted({f"{shape}: {name}" for shape, name, _ in only})
            print(f"only in the {title} file: {', '.join(gone)}")
    return not is_worse


def _measures(
    rows: list[dict[str, Any]],
) -> Iterator[tuple[tuple[str, str, str], float]]:
    for row in rows:
        plain = [str(v) for v in row.values() if isinstance(v, str | int)]
        for name, found in row.items():
            if isinstance(found, dict):
                for measure in MEASURES:
                    if found.get(measure) is not None:
                        yield (", ".join(plain), name, measure), found[measure]
