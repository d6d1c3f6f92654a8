"""LoRA for JAX and Flax: ``y = x W0 + scaling * (x A) B``, with W0 frozen.

Three ways in: pure functions (`lora_dense` and its kin), Linen modules (`LoRADense`,
`LoRAAttention`), and `adapt` for a model that was written without LoRA.

The public names stand in ``__init__.pyi``, one a line, and nowhere else. Each is
imported when it is first used, so that ``import lora_jax`` loads no JAX.
"""

import ast
import importlib
import pkgutil
from typing import Any

_STUB = ast.parse(pkgutil.get_data(__name__, "__init__.pyi") or b"")
_MODULES = {
    alias.name: str(node.module)
    for node in _STUB.body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
__all__ = sorted(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]  # in the stub


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
