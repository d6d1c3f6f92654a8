"""`Fields`: reading a ``config.json``, with all of its faults in one error."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

_MISSING = object()
MAX_LAYERS = 1000  # bounds, as a config.json may ask for anything
LEAST, MOST = 1e-20, 1e20  # of non-zero numbers other than sizes
MAX_SIZE = 2**24  # of an axis, a vocabulary or a context


def is_extreme(value: Any) -> bool:
    """Returns whether a value is a number that is NaN, infinite, tiny or huge."""
    return (
        isinstance(value, (int, float))
        and value != 0
        and not LEAST <= abs(value) <= MOST
    )


def config_reader(make: Callable[..., Any], what: str, **defaults: Any) -> Any:
    """Makes `Family.read_config` of a function from `Fields` to the config's arguments.

    Args:
      make: the config's class.
      what: kind of model, for the error.
      **defaults: what absent keys mean.

    Returns:
      A decorator; what it makes raises a ValueError with every fault of the file.
    """

    def decorate(read: Callable[["Fields"], dict[str, Any]]) -> Any:
        @functools.wraps(read)
        def read_config(config: Mapping[str, Any]) -> Any:
            fields = Fields(config, what, defaults)
            arguments = read(fields)
            fields.check()
            return make(**arguments)

        return read_config

    return decorate


class Fields:
    """Reads a ``config.json``, collecting wrong types and missing keys in ``faults``.

    Args:
      config: the parsed file.
      what: kind of model, for the error.
      defaults: what absent keys mean; before the defaults given to methods.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        what: str,
        defaults: Mapping[str, Any] | None = None,
    ):
        self.config, self.what, self.defaults = config, what, defaults or {}
        self.faults: list[str] = []

    def nested(
        self, config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
    ) -> "Fields":
        """Reads a part of the file, or another file; the faults are one list."""
        own = Fields(config, self.what, defaults)
        own.faults = self.faults
        return own

    def is_null(self, key: str) -> bool:
        """Whether the file has ``null``, where that isn't the default."""
        return key in self.config and self.config[key] is None

    def integer(self, key: str, default: Any = _MISSING) -> Any:
        """A bounded integer; the default if the key is absent or null."""
        return self._bounded(key, default, MAX_SIZE)

    def layers(self, key: str, default: Any = _MISSING) -> int:
        """A layer count, at most `MAX_LAYERS`."""
        return self._bounded(key, default, MAX_LAYERS)

    def number(self, key: str, default: Any = _MISSING) -> Any:
        """A number that float32 can compute with: 0, or neither tiny nor huge."""
        value = self._get(key, default, (int, float), "a number")
        if is_extreme(value):
            is_finite = abs(value) < math.inf  # works for integers of any size
            wanted = f"0 or {LEAST:g} to {MOST:g}" if is_finite else "finite"
            self.faults.append(f"{key} must be {wanted}; got {value!r}"[:200])
            return 1.0
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        return self._get(key, default, (bool,), "true or false")

    def text(self, key: str, default: Any = _MISSING) -> Any:
        """A string."""
        return self._get(key, default, (str,), "a string")

    def sequence(self, key: str, length: int) -> list[Any] | None:
        """A list of ``length`` entries, or None if the key is absent or null."""
        value = self._get(key, None, (list,), "a list")
        if value is not None and len(value) != length:
            self.faults.append(
                f"{key} must have {length} entries, one per layer; got {len(value)}"
            )
            return None
        return value

    def mapping(self, key: str) -> dict[str, Any] | None:
        """A JSON object, or None."""
        return self._get(key, None, (dict,), "an object")

    def only(self, key: str, value: Any) -> None:
        """Rejects every value of ``key`` but one, as others make it another model."""
        got = self.config.get(key)
        if got is not None and got != value:
            self.faults.append(f"{key} must be {value!r} here; got {got!r}")

    def check(self) -> None:
        """Raises one ValueError with every fault, if there are any."""
        if self.faults:
            faults = "; ".join(dict.fromkeys(self.faults))
            raise ValueError(f"config.json doesn't fit a {self.what}: {faults}.")

    def _bounded(self, key: str, default: Any, most: int) -> Any:
        value = self._get(key, default, (int,), "an integer")
        if isinstance(value, int) and value > most:
            self.faults.append(f"{key} must be at most {most}; got {value}")
            return 1
        return value

    def _get(self, key: str, default: Any, types: tuple[type, ...], kind: str) -> Any:
        value, default = self.config.get(key), self.defaults.get(key, default)
        if value is None:
            if default is _MISSING:
                self.faults.append(f"{key} is missing")
                return 1 if int in types else ""
            return default
        is_bool = isinstance(value, bool) and bool not in types
        if is_bool or not isinstance(value, types):
            self.faults.append(f"{key} must be {kind}; got {value!r}"[:200])
            return 1 if default is _MISSING else default
        return value
