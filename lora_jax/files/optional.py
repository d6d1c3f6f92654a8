"""Packages of the `train` extra, imported on use rather than with lora_jax."""

import importlib
from typing import Any


def load_optional(purpose: str, *modules: str) -> Any:
    """Imports modules of a package that may not be installed; returns the first.

    Args:
      purpose: what the package is for, the start of the error message.
      *modules: full module names; the package is the first one's.

    Raises:
      ImportError: with the install command.

    Example:
      >>> load_optional("reading tea leaves", "tealeaves")
      Traceback (most recent call last):
      ...
      ImportError: reading tea leaves needs tealeaves: pip install "lora_jax[train]".
    """
    try:
        first, *_ = [importlib.import_module(name) for name in modules]
    except ImportError as error:
        package = modules[0].partition(".")[0]
        raise ImportError(
            f'{purpose} needs {package}: pip install "lora_jax[train]".'
        ) from error
    return first
