"""PEFT's VeRA adapters: two vectors a module, and one A and B for all of them.

A module of ``in`` inputs and ``out`` outputs has
``ΔW = diag(λ_b) B[:out] diag(λ_d) A[:, :in]`` in PyTorch's orientation, which is LoRA's
update of the same rank. So that is what is read; writing needs the vectors.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_jax.files.safetensors import open_tensors
from lora_jax.interop.external import ExternalAdapter, report, write_folder
from lora_jax.interop.naming import Names
from lora_jax.models.stacking import layer_slices
from lora_jax.names import LORA_A, LORA_B, VERA_B, VERA_D
from lora_jax.tree.paths import flatten
from lora_jax.tree.targets import Target, child

TENSORS, PREFIX = "adapter_model.safetensors", "base_model.model."  # of PEFT
KIND = "VERA"  # the config's peft_type
A, B = "base_model.vera_A", "base_model.vera_B"
D_SUFFIX, B_SUFFIX = ".vera_lambda_d", ".vera_lambda_b"
MOST = 1 << 32  # numbers in all modules' B together
_RENAMED = {"vera_dropout": "lora_dropout"}  # keys of the config, as LoRA's
OWN_KEYS = ("projection_prng_key", "save_projection", "d_initial", "init_weights")


class VeraAdapter(NamedTuple):
    """What a file of PEFT's holds.

    Attributes:
      a: ``[r, in]``, as wide as the widest module.
      b: ``[out, r]``, as high as the highest module.
      vectors: ``λ_d`` ``[r]`` and ``λ_b`` ``[out]`` by module.
    """

    a: np.ndarray
    b: np.ndarray
    vectors: dict[str, tuple[np.ndarray, np.ndarray]]


def as_lora_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a VeRA config as that of the LoRA adapter with the same update.

    Args:
      settings: of ``adapter_config.json``, whose ``peft_type`` is ``"VERA"``.
    """
    kept = {_RENAMED.get(k, k): v for k, v in settings.items() if k not in OWN_KEYS}
    rank = settings.get("r", 256)  # PEFT's default
    bias = "lora_only" if kept.get("bias") == "vera_only" else kept.get("bias")
    return {**kept, "peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": bias}


class LoRATensors:
    """The tensors of a VeRA file as those of the LoRA adapter with the same update.

    Every ``lora_A`` is the whole A: how many inputs a module has, its file doesn't say.

    Attributes:
      shapes: tensor shapes by name, as far as they need no reading.
    """

    def __init__(self, path: Path):
        self._reader = open_tensors(path)
        shapes, origin = self._reader.shapes, str(path)
        if missing := [name for name in (A, B) if name not in shapes]:
            raise ValueError(
                f"{origin} must hold {' and '.join(missing)}, VeRA's projections; PEFT "
                "would draw them again. Save it with `save_projection=True`."
            )
        a, b = shapes[A], shapes[B]
        faults = []
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            faults.append(
                f"shape: vera_A, vera_B must be [r, in], [out, r]; got {list(a)}, "
                f"{list(b)}"
            )
        self._modules = {
            name.removesuffix(end): None
            for name in shapes
            for end in (D_SUFFIX, B_SUFFIX)
            if name.endswith(end)
        }
        for module in self._modules if not faults else ():
            d, of_b = (shapes.get(module + end) for end in (D_SUFFIX, B_SUFFIX))
            if d != a[:1] or of_b is None or len(of_b) != 1 or of_b[0] > b[0]:
                faults.append(
                    f"shape: lambda_d, lambda_b of {module} must be [{a[0]}] and at "
                    f"most [{b[0]}]; got {d}, {of_b}"
                )
        if not faults:
            rows = sum(shapes[module + B_SUFFIX][0] for module in self._modules)
            if rows * a[0] > MOST:
                faults.append(f"size: its modules' B have {rows * a[0]} numbers")
        if faults:
            raise report(origin, faults)
        own = {A, B, *(m + end for m in self._modules for end in (D_SUFFIX, B_SUFFIX))}
        self.shapes = {name: s for name, s in shapes.items() if name not in own}
        self.shapes |= {f"{m}.lora_A.weight": a for m in self._modules}
        self.shapes |= {
            f"{m}.lora_B.weight": (*shapes[m + B_SUFFIX], a[0]) for m in self._modules
        }
        self._shared: dict[str, np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        """Reads one tensor, or makes it; every A is one array."""
        for end, shared in ((".lora_A.weight", A), (".lora_B.weight", B)):
            module = name.removesuffix(end)
            if module == name or module not in self._modules:
                continue
            if shared not in self._shared:
                self._shared[shared] = self._reader[shared]
            if shared == A:
                return self._shared[A]
            d, b = (self._reader[module + e] for e in (D_SUFFIX, B_SUFFIX))
            return b[:, None] * self._shared[B][: len(b)] * d
        return self._reader[name]


def find_vectors(
    leaves: Mapping[str, Any], targets: list[Target], names: Names
) -> VeraAdapter:
    """Returns an adapter of ours as PEFT's file holds it.

    The scaling, and the scale of a narrow layer's A beside the widest one's, go into
    ``λ_d``.

    Args:
      leaves: the adapters' leaves, trained or not, by path.
      targets: the adapted layers.
      names: Hugging Face's names of the modules.

    Raises:
      ValueError: listing every layer that PEFT's VeRA can't hold.
    """
    flat = {
        path: np.asarray(leaf, np.float32) for path, leaf in flatten(leaves).items()
    }
    by_path = {target.path: target for target in targets}
    kernels = layer_slices({path: t.kernel_shape for path, t in by_path.items()})
    spelled, found, faults = names.spelling().modules, {}, []
    for path, layer in kernels.items():
        target = by_path[layer.path]
        if target.kind not in ("dense", "einsum") or names.split_names(path):
            faults.append(f"{path} is not a linear layer of transformers'")
            continue
        a, b, d, of_b = (
            layer.of(flat[child(target.path, leaf)])
            for leaf in (LORA_A, LORA_B, VERA_D, VERA_B)
        )
        d, rank = d.reshape(-1) * np.float32(target.scaling), target.rank
        found[spelled[path]] = (
            a.reshape(-1, rank).T,
            b.reshape(rank, -1).T,
            d,
            of_b.reshape(-1),
        )
    if len({target.rank for target in targets}) > 1:
        faults.append("its layers have several ranks")
    if any(target.dora for target in targets):
        faults.append("it has DoRA's magnitudes")
    if faults:
        raise ValueError(f"PEFT's VeRA can't hold this: {'; '.join(faults)}.")
    wide = max((a for a, *_ in found.values()), key=lambda a: a.shape[1])
    high = max((b for _, b, *_ in found.values()), key=len)
    vectors = {}
    for name, (a, b, d, of_b) in found.items():
        part = wide[:, : a.shape[1]]
        largest = np.unravel_index(np.argmax(abs(part)), part.shape)
        ratio = a[largest] / part[largest]
        vectors[name] = d * ratio, of_b
        if not (np.allclose(a, ratio * part) and np.array_equal(b, high[: len(b)])):
            faults.append(name)
    if faults:
        raise ValueError(
            "PEFT's VeRA has one A and one B for all modules, of which each takes the "
            f"first rows; {', '.join(faults)} have others. Export with format 'peft'."
        )
    return VeraAdapter(wide, high, vectors)


def write_vera(
    directory: str | os.PathLike[str],
    found: VeraAdapter,
    adapter: ExternalAdapter,
    settings: Mapping[str, Any],
    *,
    seed: int,
) -> Path:
    """Writes a folder that PEFT loads as a `VeraConfig`'s.

    Args:
      directory: created if absent; an adapter there is replaced.
      found: the vectors, and A and B, which are written too (``save_projection``).
      adapter: the same adapter as LoRA, with what was trained in full.
      settings: as for `lora_jax.interop.peft.write_peft`.
      seed: recorded as ``projection_prng_key``; PEFT's draws of it are others.

    Raises:
      ValueError: if biases are trained, or a tensor is not finite.
      OSError: if the folder can't be written.
    """
    if adapter.bias != "none" or any(
        f.bias is not None for f in adapter.modules.values()
    ):
        raise ValueError(
            "biases must not be trained for format 'vera'; got "
            f"bias={adapter.bias!r}. Export with format 'peft'."
        )
    tensors = {A: found.a, B: found.b}
    tensors |= {PREFIX + name: array for name, array in adapter.full.items()}
    for name, (d, b) in found.vectors.items():
        tensors |= {f"{PREFIX}{name}{D_SUFFIX}": d, f"{PREFIX}{name}{B_SUFFIX}": b}
    config = {
        "bias": "none",
        "d_initial": 0.1,
        "inference_mode": True,
        "init_weights": True,
        "peft_type": KIND,
        "projection_prng_key": seed,
        "r": found.a.shape[0],
        "save_projection": True,
        "vera_dropout": adapter.dropout_rate,
    }
    return write_folder(directory, TENSORS, tensors, config | dict(settings), kind="pt")
