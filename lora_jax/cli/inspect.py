"""`lora-jax inspect`: what is in an adapter, run or model folder; damage included.

The norm of an update ``scaling * A B`` comes from its factors: with ``A = Qa Ra`` and
``Bᵀ = Qb Rb`` its singular values are those of the ``[r, r]`` matrix ``Ra Rbᵀ``, so the
``[in, out]`` product is never formed.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.cli.console import Console
from lora_jax.config import LoRAConfig
from lora_jax.files.adapter import TENSORS, read_adapter_config
from lora_jax.files.fetch import SCHEME, find_model
from lora_jax.files.gguf import SUFFIX, GGUFReader
from lora_jax.files.safetensors import TensorReader, open_tensors
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.formatting import size
from lora_jax.interop.external import ExternalAdapter
from lora_jax.interop.pretrained import find_adapter, read_external
from lora_jax.models.stacking import layer_slices
from lora_jax.names import LORA, LORA_A, LORA_B


def run(args: argparse.Namespace, out: Console) -> dict[str, Any]:
    """Inspects a folder or a GGUF file.

    Args:
      args: ``dir``.
      out: where to print.

    Returns:
      Kind of the folder and a row for each layer or tensor.
    """
    folder = find_model(args.dir) if args.dir.startswith(SCHEME) else Path(args.dir)
    if folder.suffix == SUFFIX and folder.is_file():
        return _inspect_model(folder, GGUFReader(folder), out)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}, nor a {SUFFIX} file.")
    if any((folder / f).is_file() for f in ("config.yaml", "adapter_config.json")):
        found = find_adapter(folder)
        foreign = read_external(found)
        if foreign is not None:
            return _inspect_foreign(foreign, found, out)
        return _inspect_adapter(found, out)
    if (folder / "config.json").is_file():
        return _inspect_model(folder, open_tensors(folder), out)
    raise UserError(
        f"{folder} is no run folder (config.yaml), adapter folder "
        "(adapter_config.json) or model folder (config.json)."
    )


def singular_values(a: np.ndarray, b: np.ndarray, *, scaling: float) -> np.ndarray:
    """Returns the singular values of ``scaling * A B`` without forming it.

    Args:
      a: ``[i, r]``.
      b: ``[r, o]``.
      scaling: the factor.

    Returns:
      At most ``r`` float64 values, largest first.

    Example:
      >>> a, b = np.array([[3.0], [4.0]]), np.array([[1.0, 0.0]])
      >>> singular_values(a, b, scaling=2.0).round(6).tolist()
      [10.0]
    """
    left = np.asarray(np.linalg.qr(a.astype(np.float64), mode="r"))
    right = np.asarray(np.linalg.qr(b.astype(np.float64).T, mode="r"))
    return abs(scaling) * np.linalg.svd(left @ right.T, compute_uv=False)


def _inspect_adapter(folder: Path, out: Console) -> dict[str, Any]:
    meta = read_adapter_config(folder)
    config = LoRAConfig.from_dict(meta["lora"])
    reader = open_tensors(folder / TENSORS)
    suffix = f"/{LORA_A}"
    layers = [
        row
        for name in reader.shapes
        if name.startswith(f"{LORA}/") and name.endswith(suffix)
        for row in _layers(
            reader, name.removeprefix(f"{LORA}/").removesuffix(suffix), config
        )
    ]
    full = {
        n: list(s) for n, s in reader.shapes.items() if not n.startswith(f"{LORA}/")
    }
    broken = _not_finite(reader)
    out.heading(f"Adapter {folder}")
    out.facts(
        [
            ("trained on", str(meta["extra"].get("model", "not said"))),
            ("base", f"fingerprint {meta['base']}"),
            ("targets", str(meta["lora"]["targets"])),
            ("numbers", f"{meta['trainable']:,} in {size(_bytes(folder))}"),
            (
                "in full",
                ", ".join(f"{n} {s}" for n, s in full.items()) or "nothing",
            ),
            ("not finite", _broken_text(broken)),
        ]
    )
    _show_layers(layers, out)
    return {
        "kind": "adapter",
        "path": str(folder),
        "lora": meta["lora"],
        "base": meta["base"],
        "trainable": meta["trainable"],
        "extra": meta["extra"],
        "layers": layers,
        "full": full,
        "not_finite": broken,
    }


def _inspect_foreign(
    adapter: ExternalAdapter, folder: Path, out: Console
) -> dict[str, Any]:
    """Shows an adapter that another tool wrote; reading it has checked it."""
    layers = [
        {
            "path": name,
            "rank": factors.rank,
            "alpha": factors.alpha,
            "scaling": factors.scaling,
            **_norms(factors.a.T, factors.b.T, scaling=factors.scaling),
        }
        for name, factors in adapter.modules.items()
    ]
    full = {name: list(array.shape) for name, array in adapter.full.items()}
    tool = "PEFT" if "peft_type" in adapter.config else "mlx-lm"
    named = adapter.config.get("base_model_name_or_path", adapter.config.get("model"))
    leaves = [
        leaf for f in adapter.modules.values() for leaf in (f.a, f.b, f.magnitude)
    ]
    arrays = [*leaves, *adapter.full.values()]
    count = sum(array.size for array in arrays if array is not None)
    variant = [name for name in ("rslora", "dora") if getattr(adapter, name)]
    out.heading(f"Adapter {folder}, written by {tool}")
    out.facts(
        [
            ("trained on", str(named or "not said")),
            ("variant", ", ".join(variant) or "plain LoRA"),
            ("numbers", f"{count:,} in {size(_bytes(folder))}"),
            ("in full", ", ".join(f"{n} {s}" for n, s in full.items()) or "nothing"),
            ("unknown keys", ", ".join(adapter.unknown) or "none"),
        ]
    )
    _show_layers(layers, out)
    return {
        "kind": "adapter",
        "tool": tool,
        "path": str(folder),
        "config": dict(adapter.config),
        "unknown": list(adapter.unknown),
        "trainable": count,
        "layers": layers,
        "full": full,
        "not_finite": {},
    }


def _show_layers(layers: list[dict[str, Any]], out: Console) -> None:
    layers.sort(key=lambda row: _natural(row["path"]))
    out.table(
        ("layer", "rank", "alpha", "norm of update", "largest singular value"),
        [
            (
                r["path"],
                r["rank"],
                f"{r['alpha']:g}",
                _number(r["norm"]),
                _number(r["top"]),
            )
            for r in layers
        ],
    )


def _layers(
    reader: TensorReader, path: str, config: LoRAConfig
) -> list[dict[str, Any]]:
    """Returns a row for each layer that an adapter's leaves hold: one, or a stack."""
    a = reader[f"{LORA}/{path}/{LORA_A}"]
    name = f"{LORA}/{path}/{LORA_B}"
    if name not in reader.shapes:
        raise UserError(f"the adapter has {path}/{LORA_A} but no {path}/{LORA_B}.")
    b = reader[name]
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
    """Returns the norms of ``scaling * A B``; None where it is no finite matrix."""
    is_matrix = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0]
    if is_matrix and np.isfinite(a).all() and np.isfinite(b).all():
        values = singular_values(a, b, scaling=scaling)
        return {"norm": float(np.linalg.norm(values)), "top": float(values[0])}
    return {"norm": None, "top": None}


def _inspect_model(folder: Path, reader: Any, out: Console) -> dict[str, Any]:
    broken = _not_finite(reader)
    tensors = []
    for name in sorted(reader.shapes, key=_natural):
        array = reader[name]
        is_float = array.dtype.kind not in "iub"
        norm = float(np.linalg.norm(array.astype(np.float64))) if is_float else None
        tensors.append(
            {
                "name": name,
                "shape": list(array.shape),
                "dtype": str(array.dtype),
                "norm": norm,
            }
        )
    total = sum(int(np.prod(shape)) for shape in reader.shapes.values())
    out.heading(f"Model {folder}")
    out.facts(
        [
            ("tensors", f"{len(tensors)}, {total:,} numbers, {size(_bytes(folder))}"),
            ("not finite", _broken_text(broken)),
        ]
    )
    out.table(
        ("tensor", "shape", "dtype", "norm"),
        [
            (
                t["name"],
                " x ".join(map(str, t["shape"])),
                t["dtype"],
                _number(t["norm"]),
            )
            for t in tensors
        ],
    )
    return {
        "kind": "model",
        "path": str(folder),
        "parameters": total,
        "tensors": tensors,
        "not_finite": broken,
    }


def _not_finite(reader: Any) -> dict[str, int]:
    """Returns how many values are NaN or infinite, for each tensor that has any."""
    counts = {
        name: int(np.sum(~np.isfinite(array.astype(np.float32))))
        for name in reader.shapes
        if (array := reader[name]).dtype.kind not in "iub"
    }
    return {name: count for name, count in counts.items() if count}


def _broken_text(broken: dict[str, int]) -> str:
    return ", ".join(f"{n}: {count} values" for n, count in broken.items()) or "none"


def _bytes(folder: Path) -> int:
    files = folder.glob("*.safetensors") if folder.is_dir() else (folder,)
    return sum(file.stat().st_size for file in files)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _natural(name: str) -> list[tuple[int, int, str]]:
    parts = re.findall(r"\d+|\D+", name)
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in parts]
