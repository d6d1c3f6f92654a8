"""The contents of an adapter, run or model folder, including damage.

The norm of an update ``scaling * A B`` is computed from its factors: with ``A = Qa Ra``
and ``Bᵀ = Qb Rb`` its singular values are those of the ``[r, r]`` matrix ``Ra Rbᵀ``, so
the ``[in, out]`` product is never formed.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.config import LoRAConfig
from lora_jax.files import adapter as ours
from lora_jax.files.arrays import count_not_finite
from lora_jax.files.fetch import SCHEME, find_model
from lora_jax.files.gguf import SUFFIX, GGUFReader
from lora_jax.files.safetensors import TensorReader, open_tensors
from lora_jax.finetune import settings
from lora_jax.finetune.errors import UserError
from lora_jax.interop.adapter_folder import find_adapter
from lora_jax.interop.external import ExternalAdapter
from lora_jax.interop.pretrained import read_external
from lora_jax.models import source
from lora_jax.models.stacking import layer_slices
from lora_jax.names import ADAPTER, ADAPTER_LEAVES, LORA_A, LORA_B, PARAMS
from lora_jax.ops.factors import Factors


def inspect(path: str) -> dict[str, Any]:
    """Describes the contents of a folder or GGUF file.

    Args:
      path: a run folder, an adapter folder of ours or of another tool, a model folder,
        a GGUF file or a package's model.

    Returns:
      JSON values. For an adapter ``"kind": "adapter"``, its config, a row for each of
      its ``"layers"``, the shapes trained in ``"full"``, and, if another tool wrote it,
      ``"tool"``; for a model ``"kind": "model"`` and a row for each of its
      ``"tensors"``. ``"not_finite"`` counts NaN and infinities by tensor.

    Raises:
      UserError: if it is none of these.
      ValueError: if a file is damaged.
    """
    folder = find_model(path) if path.startswith(SCHEME) else Path(path)
    if folder.suffix == SUFFIX and folder.is_file():
        return _inspect_model(folder, GGUFReader(folder))
    if not folder.is_dir():
        raise UserError(f"{folder} must be a folder or a {SUFFIX} file.")
    if any((folder / name).is_file() for name in (settings.CONFIG, ours.CONFIG)):
        found = find_adapter(folder)
        external = read_external(found)
        if external is not None:
            return _inspect_external(external, found)
        return _inspect_adapter(found)
    if (folder / source.MODEL_CONFIG).is_file():
        return _inspect_model(folder, open_tensors(folder))
    raise UserError(
        f"{folder} is not a run folder ({settings.CONFIG}), adapter folder "
        f"({ours.CONFIG}) or model folder ({source.MODEL_CONFIG})."
    )


def singular_values(a: np.ndarray, b: np.ndarray, *, scaling: float) -> np.ndarray:
    """Returns the singular values of ``scaling * A B``, largest first, in float64.

    Example:
      >>> a, b = np.array([[3.0], [4.0]]), np.array([[1.0, 0.0]])
      >>> singular_values(a, b, scaling=2.0).round(6).tolist()
      [10.0]
    """
    left = np.asarray(np.linalg.qr(a.astype(np.float64), mode="r"))
    right = np.asarray(np.linalg.qr(b.astype(np.float64).T, mode="r"))
    return abs(scaling) * np.linalg.svd(left @ right.T, compute_uv=False)


def _inspect_adapter(folder: Path) -> dict[str, Any]:
    meta = ours.read_adapter_config(folder)
    config = LoRAConfig.from_dict(meta["lora"])
    reader = open_tensors(folder / ours.TENSORS)
    parts = [name.partition("/") for name in reader.shapes]
    paths = [
        path.removesuffix(f"/{LORA_B}")
        for held, _, path in parts
        if held in ADAPTER and path.endswith(f"/{LORA_B}")
    ]
    layers = [row for path in paths for row in _layers(reader, path, config)]
    shapes = reader.shapes.items()
    return {
        "kind": "adapter",
        "path": str(folder),
        "lora": meta["lora"],
        "base": meta["base"],
        "trainable": meta["trainable"],
        "extra": meta["extra"],
        "layers": sorted(layers, key=lambda row: _natural(row["path"])),
        "full": {n: list(s) for n, s in shapes if n.startswith(f"{PARAMS}/")},
        "not_finite": _not_finite(reader),
    }


def _inspect_external(adapter: ExternalAdapter, folder: Path) -> dict[str, Any]:
    """Describes an adapter of another tool, which was validated when read."""
    layers = [
        {
            "path": name,
            "rank": factors.rank,
            "alpha": factors.alpha,
            "scaling": factors.scaling,
            **(
                {"norm": None, "top": None}
                if factors.is_wide
                else _norms(factors.a.T, factors.b.T, scaling=factors.scaling)
            ),
        }
        for name, factors in adapter.modules.items()
    ]
    leaves = [
        leaf for f in adapter.modules.values() for leaf in (f.a, f.b, f.magnitude)
    ]
    arrays = [*leaves, *adapter.full.values()]
    return {
        "kind": "adapter",
        "tool": "PEFT" if "peft_type" in adapter.config else "mlx-lm",
        "path": str(folder),
        "config": dict(adapter.config),
        "variant": [name for name in ("rslora", "dora") if getattr(adapter, name)],
        "unknown": list(adapter.unknown),
        "trainable": sum(array.size for array in arrays if array is not None),
        "layers": sorted(layers, key=lambda row: _natural(row["path"])),
        "full": {name: list(array.shape) for name, array in adapter.full.items()},
        "not_finite": {},
    }


def _layers(
    reader: TensorReader, path: str, config: LoRAConfig
) -> list[dict[str, Any]]:
    """Returns a row for each layer of an adapter's leaves: one, or those of a stack."""
    leaves = {
        leaf: reader[name]
        for leaf in ADAPTER_LEAVES
        for held in ADAPTER
        if (name := f"{held}/{path}/{leaf}") in reader.shapes
    }
    if LORA_A not in leaves:
        raise UserError(f"the adapter has {path}/{LORA_B} but no {path}/{LORA_A}.")
    a, b = leaves[LORA_A], leaves[LORA_B]
    if a.ndim == b.ndim and a.ndim in (2, 3):
        a, b = map(np.asarray, Factors(**leaves).plain()[:2])
    scaling = config.scaling_for(path)
    facts = {
        "rank": config.rank_for(path),
        "alpha": config.alpha_for(path),
        "scaling": scaling,
    }
    singles = layer_slices({path: a})
    if len(singles) == 1 or a.ndim != 3 or len(a) != len(b):
        return [{"path": path, **facts, **_norms(a, b, scaling=scaling)}]
    return [
        {"path": single, **facts, **_norms(*pair, scaling=scaling)}
        for single, *pair in zip(singles, a, b, strict=True)
    ]


def _norms(a: np.ndarray, b: np.ndarray, *, scaling: float) -> dict[str, Any]:
    """Returns the norms of ``scaling * A B``; None if it is not a finite matrix."""
    is_matrix = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0]
    if is_matrix and np.isfinite(a).all() and np.isfinite(b).all():
        values = singular_values(a, b, scaling=scaling)
        return {"norm": float(np.linalg.norm(values)), "top": float(values[0])}
    return {"norm": None, "top": None}


def _inspect_model(folder: Path, reader: Any) -> dict[str, Any]:
    tensors = []
    for name in sorted(reader.shapes, key=_natural):
        array = reader[name]
        is_float = array.dtype.kind not in "iub"
        norm = np.linalg.norm(array.astype(np.float64)) if is_float else None
        tensors.append(
            {
                "name": name,
                "shape": list(array.shape),
                "dtype": str(array.dtype),
                "norm": None if norm is None else float(norm),
            }
        )
    return {
        "kind": "model",
        "path": str(folder),
        "parameters": sum(int(np.prod(shape)) for shape in reader.shapes.values()),
        "tensors": tensors,
        "not_finite": _not_finite(reader),
    }


def _not_finite(reader: Any) -> dict[str, int]:
    """Returns the number of NaN and infinite values of each tensor with any."""
    counts = {name: count_not_finite(reader[name]) for name in reader.shapes}
    return {name: count for name, count in counts.items() if count}


def _natural(name: str) -> list[tuple[int, int, str]]:
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in parts]
