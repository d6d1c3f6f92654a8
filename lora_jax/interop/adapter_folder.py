"""Finding the folder of an adapter."""

import os
from pathlib import Path

from lora_jax.files.gguf import SUFFIX, read_metadata
from lora_jax.interop.external import ADAPTER_CONFIG

RUN_ADAPTER, RUN_CONFIG = "adapter", "config.yaml"  # in a run folder
RUN_ADAPTERS = "adapters"  # in that of a run with several
MOST_SHOWN = 20


def find_adapter(path: str | os.PathLike[str]) -> Path:
    """Returns the adapter folder that a path stands for: itself, or a run folder's.

    Raises:
      FileNotFoundError: if it is neither, or a run folder without an adapter yet.
      ValueError: if it is a file.
    """
    folder = Path(path)
    if folder.is_file():
        raise ValueError(
            f"{folder} must be a folder; it is {_file_kind(folder)}. Adapters are read "
            "from folders written by lora_jax, PEFT or mlx-lm: give the one it was "
            "converted from."
        )
    if not folder.is_dir():
        raise FileNotFoundError(f"no adapter at {folder}: there is no such folder.")
    inside = folder / RUN_ADAPTER
    for candidate in (folder, inside):
        if (candidate / ADAPTER_CONFIG).is_file():
            return candidate
    if several := adapter_folders(folder / RUN_ADAPTERS):
        more = ", ..." if len(several) > MOST_SHOWN else ""
        raise ValueError(
            f"the run in {folder} has {len(several)} adapters; give the folder of one, "
            f"like {folder / RUN_ADAPTERS / several[0]}. They are "
            f"{', '.join(several[:MOST_SHOWN])}{more}."
        )
    if (folder / RUN_CONFIG).is_file():
        raise FileNotFoundError(
            f"the run in {folder} has no adapter yet: it ended before its first "
            f"validation, which writes it. `lora-jax train {folder} --resume` (in "
            "Python: fine_tune(folder, resume=True)) resumes it."
        )
    raise FileNotFoundError(
        f"{folder} is neither a run folder nor an adapter folder: it has no "
        f"{ADAPTER_CONFIG}."
    )


def adapter_folders(folder: Path) -> list[str]:
    """Returns the names of the adapters in a folder of adapters, sorted."""
    return sorted(file.parent.name for file in folder.glob(f"*/{ADAPTER_CONFIG}"))


def _file_kind(file: Path) -> str:
    """Describes a file that was given in place of an adapter folder."""
    if file.suffix != SUFFIX:
        return "a file"
    try:
        kind = read_metadata(file).get("general.type")
    except ValueError:
        return "a GGUF file"
    return (
        f"llama.cpp's GGUF file of a {'LoRA adapter' if kind == 'adapter' else 'model'}"
    )
