"""Locating pretrained models: folders, GGUF files, installed packages, the hub."""

import importlib.util
import os
import re
from pathlib import Path, PurePosixPath

from lora_jax.files.optional import load_optional

SCHEME = "package:"
MODEL_FILE = ".gguf"  # the only single-file model format


class FetchError(OSError):
    """A model could not be downloaded."""


def find_model(path: str | os.PathLike[str]) -> Path:
    """Finds a model folder or GGUF file, downloading it if ``path`` is a hub id.

    Args:
      path: a folder or a ``.gguf`` file; ``"package:NAME/path"`` for one inside an
        installed Python package, which is not imported; or a hub id, ``"owner/name"``.

    Returns:
      The folder or the file.

    Raises:
      FileNotFoundError: if there is no such folder, file or package.
      FetchError: if the hub can't serve it.
    """
    text = os.fspath(path)
    if text.startswith(SCHEME):
        return _find_in_package(text)
    if _is_model(Path(text)):
        return Path(text)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text):
        return _find_on_hub(text)
    raise FileNotFoundError(
        f"{text} must be a model folder, a {MODEL_FILE} file, {SCHEME}NAME/folder, or "
        "a hub id owner/name; there is no such folder or file."
    )


def _is_model(path: Path) -> bool:
    return path.is_dir() or (path.suffix == MODEL_FILE and path.is_file())


def _find_in_package(text: str) -> Path:
    """Finds a model inside an installed package without importing it."""
    name, _, inside = text.removeprefix(SCHEME).partition("/")
    parts = PurePosixPath(inside)
    if not name.isidentifier() or not inside or {"..", "/"} & {*parts.parts}:
        raise ValueError(
            f"{text!r} must be {SCHEME}NAME/folder: the package's import name, and a "
            f"folder or {MODEL_FILE} file inside it."
        )
    spec = importlib.util.find_spec(name)
    roots = [Path(root) for root in (spec and spec.submodule_search_locations) or ()]
    if not roots:
        raise FileNotFoundError(
            f"{text} must be in an installed package; Python finds no package {name}. "
            "Install the package that ships the model."
        )
    for root in roots:
        if _is_model(root / parts):
            return root / parts
    folders = sorted(p.name for root in roots for p in root.iterdir() if p.is_dir())
    raise FileNotFoundError(
        f"the package {name} must contain a folder or {MODEL_FILE} file {inside}; its "
        f"folders are {folders}."
    )


def _find_on_hub(repository: str) -> Path:
    """Downloads a hub model's config, safetensors, tokenizer and chat template."""
    purpose = f"{repository} is not a folder here, and the hub"
    huggingface_hub = load_optional(purpose, "huggingface_hub")
    try:
        folder = huggingface_hub.snapshot_download(
            repository, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]
        )
    except Exception as error:  # of any type, all handled alike
        raise FetchError(
            f"{repository} must be a model folder or a hub id; there is no such folder "
            f"here, and the hub could not serve it: {type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    return Path(folder)
