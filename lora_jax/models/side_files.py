"""A model folder's files beside its weights: tokenizer, templates, code, its card.

They are copied as bytes. Nothing is executed, and no link is followed out of the
folder, but into the blobs that a folder of the hub's cache consists of links to.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lora_jax.files.special_tokens import MODEL_CONFIG

# Weights in any format, which are those of the model before the merge.
WEIGHTS = frozenset(
    (
        *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npz"),
        *(".npy", ".h5", ".hdf5", ".keras", ".msgpack", ".gguf", ".ggml", ".onnx"),
        *(".onnx_data", ".tflite", ".ot", ".pb", ".engine", ".mlmodel", ".joblib"),
        *(".nemo", ".distcp", ".data"),
    )
)
# Written anew, or of an adapter, which transformers would put on the merged model.
LEFT_OUT = (MODEL_CONFIG, "adapter_config.json")


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copies all files of a model folder but weights, hidden files and its config.

    Folders inside that hold weights (other formats, checkpoints, adapters) stay.

    Args:
      source: the model folder; a file has none.
      target: an existing folder; files there are replaced, but none is made anew.

    Returns:
      The copied files, relative to the folder.

    Raises:
      OSError: if one can't be copied.
    """
    copied = []
    for file in list(_side_files(source, target)):
        inside = file.relative_to(source)
        (target / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / inside)
        copied.append(str(inside))
    return copied


def _side_files(source: Path, target: Path) -> Iterator[Path]:
    root = source.resolve()
    roots = [root]
    if root.parent.name == "snapshots":  # of the hub's cache: links to ../../blobs
        roots.append(root.parent.parent / "blobs")
    for folder, folders, files in os.walk(source):  # follows no links to folders
        here = Path(folder)
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".")
            and not (here / name).is_symlink()
            and (here / name).resolve() != target.resolve()
        )
        if here != source and any(map(_is_weight, files)):
            folders.clear()
            continue
        for name in sorted(files):
            if name.startswith(".") or name in LEFT_OUT[here != source :]:
                continue
            file = here / name
            real = file.resolve()
            is_inside = any(real.is_relative_to(place) for place in roots)
            if not _is_weight(name) and is_inside and real.is_file():
                yield file


def _is_weight(name: str) -> bool:
    return Path(name).suffix.lower() in WEIGHTS or name.endswith(".index.json")
