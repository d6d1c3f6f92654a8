"""Human-readable numbers, and strict JSON."""

import json
import math
from collections.abc import Sequence, Sized
from typing import Any


def perplexity(loss: float) -> float:
    """Returns the exponential of the loss in nats; infinity on overflow."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Returns strict JSON: NumPy scalars as numbers, NaN and infinities as null."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (int, float, bool, type(None))) else str(value)


def listed(names: Sequence[str], most: int = 20) -> str:
    """Lists the first names, and how many more there are: ``a, b and 3 more``."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def metric_text(name: str, value: float | None) -> str:
    """Formats the value of a metric; a dash for None."""
    if value is None:
        return "-"
    return format(value, {"accuracy": ".1%", "perplexity": ".3f"}.get(name, ".4f"))


def count_of(runs: Sized) -> str:
    """Says how many runs there are: ``1 run``, ``2 runs``."""
    return f"{len(runs)} run{'s' * (len(runs) != 1)}"


def size(count: float) -> str:
    """Formats a number of bytes: ``1.5 MB`` (powers of ten)."""
    return f"{count:.0f} B" if count < 1000 else _scaled(count / 1e3, "kB MB GB")


def arithmetic(count: float) -> str:
    """Formats a number of FLOPs: ``2.5 TFLOP``."""
    return _scaled(count / 1e6, "MFLOP GFLOP TFLOP PFLOP")


def _scaled(count: float, units: str) -> str:
    *smaller, unit = units.split()
    for name in smaller:
        if count < 1000:
            unit = name
            break
        count /= 1000
    return f"{count:.3g} {unit}" if count < 100 else f"{count:,.0f} {unit}"


def duration(seconds: float) -> str:
    """Formats a duration: ``8.1 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
