"""Packages of the `train` extra: imported where they are used, not with lora_jax."""

import importlib
from typing import Any


def load_optional(purpose: str, *modules: str) -> Any:
    """Imports modules of a package that may not be installed.

    Args:
      purpose: what the package is for, the start of the error.
      *modules: full names; the package is the first's.

    Returns:
      The first module.

    Raises:
      ImportError: that says what to install.

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
