"""What a compiled program's schedule says: a TPU's cycles.

A loop's body counts as often as it runs, a conditional as its slowest branch.

libtpu writes ``estimated_cycles`` on the instructions of the schedule. Their sum leaves
out: Pallas kernels that state no cost of their own, products of rows with the matrix of
their group, waiting for asynchronous copies, which the compiler expects to overlap with
other work, and all that happens at run time (the launch, the batch's transfer,
contention for memory).

A product by groups, `jax.lax.ragged_dot`, carries an estimate, but one that grows with
the number of groups, which a row's product does not: an upper limit.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LIMIT = re.compile(r"s32\[\][^ ]* constant\((\d+)\)")
_BRANCHES = re.compile(
    r" conditional\(.*(?:branch_computations=\{([^}]*)\}"
    r"|true_computation=(%?[\w.\-]+), false_computation=(%?[\w.\-]+))"
)
_CALL = re.compile(r" (?:call|async-start)\(.*(?:to_apply|calls)=%?([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_CUSTOM = ' custom_call_target="tpu_custom_call"'
_RAGGED = re.compile(r' kind=kCustom, .*op_name="[^"]*ragged_dot_general"')
_NAME = re.compile(r'op_name="([^"]*)"')


class Cycles(NamedTuple):
    """What the compiler estimates for one run of a program.

    Attributes:
      total: cycles of the instructions that carry an estimate.
      unknown: calls of Pallas kernels that carry none, and products by groups.
    """

    total: int
    unknown: int


def sum_cycles(text: str, *, by_groups: bool = False) -> Cycles:
    """Sums the estimates over the schedule of a compiled program.

    Args:
      text: the scheduled HLO, ``compiled.as_text()``.
      by_groups: whether to add the upper limits of products by groups.

    Returns:
      The sum, and how many kernels it leaves out.

    Raises:
      ValueError: if no instruction has an estimate: the program is not for a TPU.
    """
    if not _CYCLES.search(text):
        raise ValueError(
            "the program must carry `estimated_cycles`, which libtpu writes; found "
            "none. Compile it for a TPU topology."
        )
    found = by_operation(text, by_groups=by_groups)
    return Cycles(
        sum(cycles for cycles, _ in found.values()),
        sum(unknown for _, unknown in found.values()),
    )


def by_operation(text: str, *, by_groups: bool = False) -> dict[str, tuple[int, int]]:
    """Returns cycles and kernels by the name of the JAX operation, for a profile.

    Args:
      text: as for `sum_cycles`.
      by_groups: as for `sum_cycles`.

    Returns:
      For each ``op_name`` of the HLO its cycles, and its kernels without an estimate.
    """
    computations, entry = split_computations(text)
    totals: dict[str, tuple[int, int]] = {}
    for name, times in count_runs(computations, entry).items():
        for line in computations[name]:
            if _is_control(line):
                continue
            is_unknown = not by_groups and bool(_RAGGED.search(line))
            cycles = None if is_unknown else _CYCLES.search(line)
            if cycles is None and not is_unknown and _CUSTOM not in line:
                continue
            named = _NAME.search(line)
            key = named[1] if named else ""
            before = totals.get(key, (0, 0))
            own = int(cycles[1]) * times if cycles else 0
            unknown = 0 if cycles else times
            totals[key] = before[0] + own, before[1] + unknown
    return totals


def split_computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of each computation, and the name of the first to run."""
    found: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name = header[2]
            found[name] = []
            entry = name if header[1] else entry
        elif name:
            found[name].append(line)
    return found, entry


def count_runs(computations: Mapping[str, list[str]], entry: str) -> dict[str, int]:
    """Returns how often each scheduled computation runs, by its name."""
    runs: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        runs[name] = runs.get(name, 0) + times
        for line in computations[name]:
            if loop := _LOOP.search(line):
                trips = _trips(line, computations.get(loop[1], []))
                visit(loop[2], times * trips)
            elif branches := _BRANCHES.search(line):
                names = [
                    each.strip(" %")
                    for group in branches.groups()
                    if group
                    for each in group.split(",")
                ]
                visit(max(names, key=lambda each: _alone(computations, each)), times)
            elif called := _CALL.search(line):
                visit(called[1], times)

    visit(entry, 1)
    return runs


def _alone(computations: Mapping[str, list[str]], name: str) -> int:
    """Returns the cycles of a computation run once."""
    total = 0
    for each, times in count_runs(computations, name).items():
        for line in computations[each]:
            if not _is_control(line) and (cycles := _CYCLES.search(line)):
                total += int(cycles[1]) * times
    return total


def _is_control(line: str) -> bool:
    return any(each.search(line) for each in (_LOOP, _BRANCHES, _CALL))


def _trips(loop: str, condition: list[str]) -> int:
    """Returns a loop's trip count: as annotated, or the limit in its condition."""
    if known := _TRIPS.search(loop):
        return int(known[1])
    limits = [int(limit) for line in condition for limit in _LIMIT.findall(line)]
    return max(limits, default=1)
