"""A model folder's files other than weights: tokenizer, templates, code, model card.

They are copied as bytes and never executed. No link is followed out of the folder,
except into the blobs that a folder in the hub's cache links to.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from lora_jax.files.special_tokens import MODEL_CONFIG

# Weights in any format: they are the model's before the merge.
WEIGHTS = {
    *(
        ".safetensors",
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".pkl",
        ".pickle",
        ".npz",
        ".npy",
    ),
    *(".h5", ".hdf5", ".keras", ".msgpack", ".gguf", ".ggml", ".onnx", ".onnx_data"),
    *(".tflite", ".ot", ".pb", ".engine", ".mlmodel", ".joblib", ".nemo", ".distcp"),
    ".data",
}
ADAPTER_CONFIG = "adapter_config.json"  # transformers would apply it to the merge


def copy_side_files(source: Path, target: Path, *, leave_out: Path) -> None:
    """Copies all of a model folder's files except weights, hidden files and its config.

    Subfolders that hold weights (other formats, checkpoints, adapters) are skipped.

    Args:
      source: the model folder; a file has none.
      target: an existing folder; files there are replaced.
      leave_out: a folder to skip if it is inside.
    """
    for file in _side_files(source, leave_out.resolve()):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)


def _side_files(source: Path, leave_out: Path) -> Iterator[Path]:
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
            and (here / name).resolve() != leave_out
        )
        if here != source and any(map(_is_weight, files)):
            folders.clear()
            continue
        for name in sorted(files):
            is_written = name == MODEL_CONFIG and here == source
            if name.startswith(".") or name == ADAPTER_CONFIG or is_written:
                continue
            file = here / name
            real = file.resolve()
            is_inside = any(real.is_relative_to(place) for place in roots)
            if not _is_weight(name) and is_inside and real.is_file():
                yield file


def _is_weight(name: str) -> bool:
    return Path(name).suffix.lower() in WEIGHTS or name.endswith(".index.json")
