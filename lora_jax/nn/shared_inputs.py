"""``x A`` of neighbouring layers that read the same array, at once on accelerators.

What their adapters add to the gradient of ``x`` is then one thin product too, which
reads and writes the wide gradient once and not for every layer.
"""

from collections.abc import Mapping
from typing import Any

from flax.core.scope import Scope

from lora_jax.array_types import AnyFloat
from lora_jax.names import LORA_A, LORA_B, MAGNITUDE, PARAMS
from lora_jax.ops.shared import shared_hidden
from lora_jax.ops.target import target_platform

NEIGHBOURS = (("query", "key", "value"), ("gate", "up"))


def neighbours(scope: Scope) -> tuple[str, ...]:
    """Returns the names of the layers, with this one, that may read the same array."""
    name = scope.path[-1] if scope.path else ""
    return next((names for names in NEIGHBOURS if name in names), ())


class SharedInputs:
    """The products of one run of a model.

    They are found by the array that was read, so that layers of these names with inputs
    of their own are not affected.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[str, ...], tuple[Any, dict[str, AnyFloat]]] = {}

    def hidden(self, scope: Scope, x: Any, dtype: Any) -> AnyFloat | None:
        """Returns ``x A`` ``[*b, r]`` of a dense layer, None if it has no neighbours.

        Args:
          scope: of the layer.
          x: its input.
          dtype: of the product.
        """
        if scope.parent is None or target_platform() == "cpu":
            return None
        group = neighbours(scope)
        if not group:
            return None
        name = scope.path[-1]
        key = (*scope.parent.path, *group)
        seen, found = self._found.get(key, (None, {}))
        if seen is not x or name not in found or found[name].dtype != dtype:
            modules = {each: scope.parent.get_variable(PARAMS, each) for each in group}
            factors = {n: m[LORA_A] for n, m in modules.items() if _is_plain(m, x)}
            if name not in factors or len(factors) == 1:
                return None
            parts = shared_hidden(x.astype(dtype), list(factors.values()))
            found = dict(zip(factors, parts, strict=True))
            self._found[key] = x, found
        return found[name]


def _is_plain(module: Any, x: Any) -> bool:
    """Whether a layer's adapter is A and B, and A could multiply ``x``."""
    if not isinstance(module, Mapping) or not {LORA_A, LORA_B} <= set(module):
        return False
    a = module[LORA_A]
    own = {LORA_A, LORA_B, MAGNITUDE, "kernel", "bias"}
    return set(module) <= own and a.ndim == 2 and a.shape[0] == x.shape[-1]
