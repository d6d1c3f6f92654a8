"""What a program compiled for a GPU says: the kernels it launches and XLA's estimate.

With `COST_MODEL` XLA writes its performance model's time on each kernel. A matmul's is
that of a tiling which XLA would replace after timing others on the device, so it counts
here as the longer of its arithmetic and its memory traffic at the data sheet's peaks.
Neither includes the launch of a kernel.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from benchmarks.schedule import count_runs, split_computations

COST_MODEL: dict[str, str | bool] = {"xla_gpu_collect_cost_model_stats": True}
PEAK_FLOPS, BANDWIDTH = 989e12, 3.35e12  # an H100 SXM: bfloat16, without sparsity

_LAUNCH = re.compile(
    r" = \S+(?: \S+)* (?:fusion|custom-call|copy|sort|dot|convolution|reduce|scatter)\("
)
_INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\([^=]*?\)|\S+) "
    r"(?P<op>[\w\-]+)\((?P<operands>[^)]*)\)"
)
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_CALLS = re.compile(r" calls=%?([\w.\-]+)")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_COSTS = re.compile(r'"reification_cost":(\[\{[^\]]*\])')


class Kernels(NamedTuple):
    """The kernels of one run of a program.

    Attributes:
      launches: fusions, library calls and copies of the schedule.
      microseconds: their estimated time.
      unknown: kernels without an estimate.
    """

    launches: int
    microseconds: float
    unknown: int


def sum_kernels(text: str) -> Kernels:
    """Sums the kernels over the schedule of a compiled program.

    Args:
      text: the scheduled HLO, ``compiled.as_text()``.

    Returns:
      Their number and time; a loop's body counts as often as it runs.
    """
    computations, entry = split_computations(text)
    program = {
        name: [found for line in lines if (found := _INSTRUCTION.search(line))]
        for name, lines in computations.items()
    }
    types = {each["name"]: each["type"] for body in program.values() for each in body}
    launches, total, unknown = 0, 0.0, 0
    for name, times in count_runs(computations, entry).items():
        for kernel in program[name]:
            if not _LAUNCH.search(kernel.string):
                continue
            time = _product_time(kernel, program, types) or _model_time(kernel.string)
            launches += times
            total += times * (time or 0.0)
            unknown += times * (time is None)
    return Kernels(launches, round(total, 1), unknown)


def _product_time(
    kernel: re.Match[str], program: Mapping[str, Any], types: Mapping[str, str]
) -> float | None:
    """Returns the least microseconds of a kernel of matmuls, None of another one."""
    flops = sum(_flops(dot, types) for dot in _dots(kernel, program))
    if not flops:
        return None
    operands = [types.get(name, "") for name in _names(kernel["operands"])]
    moved = sum(_bytes(each) for each in (kernel["type"], *operands))
    return 1e6 * max(flops / PEAK_FLOPS, moved / BANDWIDTH)


def _model_time(line: str) -> float | None:
    """Returns the microseconds of XLA's model; of a Triton kernel by its tiles."""
    found = _COSTS.search(line)
    costs = json.loads(found[1]) if found else []
    times = {each["name"]: each["exec_time_us"] for each in costs}
    return times.get("indexing-cost-model", times.get(""))


def _dots(kernel: re.Match[str], program: Mapping[str, Any]) -> Iterator[re.Match[str]]:
    """Yields the matmuls in a kernel, those of fusions within it too."""
    if kernel["op"] == "dot":
        yield kernel
    called = _CALLS.search(kernel.string)
    for each in program.get(called[1], ()) if called else ():
        yield from _dots(each, program)


def _flops(dot: re.Match[str], types: Mapping[str, str]) -> int:
    ((_, result),) = _arrays(dot["type"])
    ((_, left),) = _arrays(types[_names(dot["operands"])[0]])
    contracted: Any = _CONTRACTED.search(dot.string)
    depth = math.prod(left[int(axis)] for axis in contracted[1].split(",") if axis)
    return 2 * math.prod(result) * depth


def _bytes(kind: str) -> float:
    return sum(math.prod(shape) * bits / 8 for bits, shape in _arrays(kind))


def _arrays(kind: str) -> list[tuple[int, list[int]]]:
    """Returns the bits of an element and the shape of each array of a type."""
    return [
        (int(bits or 8), [int(size) for size in shape.split(",") if size])
        for _, bits, shape in _ARRAY.findall(kind)
    ]


def _names(operands: str) -> list[str]:
    return [
        each.split()[-1].lstrip("%") for each in operands.split(",") if each.strip()
    ]
