"""loralib's state dicts: ``lora_A`` ``[r, in]`` and ``lora_B`` ``[out, r]`` per layer.

They carry no config, so alpha has to be given. A ``MergedLinear`` adapts n of the m
projections that share one kernel: ``lora_A`` is ``[r n, in]``, and ``lora_B``
``[n out / m, r]`` holds each projection's rows in turn. That is one adapter of rank r n
with a block-diagonal B.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lora_jax.files.safetensors import open_tensors
from lora_jax.interop.external import (
    ExternalAdapter,
    ExternalFactors,
    read_floats,
    report,
)


def read_loralib(
    path: str | os.PathLike[str],
    *,
    alpha: float,
    enabled: Mapping[str, Sequence[bool]] | None = None,
) -> ExternalAdapter:
    """Reads a state dict that loralib's ``lora_state_dict`` returned.

    Args:
      path: a ``.safetensors`` file, or an ``.npz`` of the tensors by name.
      alpha: ``lora_alpha`` of all layers.
      enabled: ``enable_lora`` of each `MergedLinear`, by the end of its name:
        ``{"c_attn": (True, False, True)}``.

    Returns:
      The adapter; all other tensors (biases, a head) count as trained in full.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is in another format (such as a pickle), or tensors are
        missing, wrongly shaped or not finite; one error lists all of them.
    """
    path = Path(path)
    if not alpha > 0:
        raise ValueError(f"alpha must be above 0; got {alpha!r}.")
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be a file; it doesn't exist.")
    tensors = _open(path)
    arrays, faults = read_floats(tensors, {name: name for name in tensors})
    names = [name.rpartition(".") for name in tensors]
    factors = {module for module, _, leaf in names if leaf in ("lora_A", "lora_B")}
    modules = {}
    for module in sorted(factors):
        a, b = (arrays.get(f"{module}.lora_{x}") for x in "AB")
        faults += [
            f"missing: {module}.lora_{x}"
            for x in "AB"
            if f"{module}.lora_{x}" not in tensors
        ]
        if a is None or b is None:
            continue
        groups = next(
            (
                tuple(map(bool, on))
                for end, on in (enabled or {}).items()
                if module == end or module.endswith(f".{end}")
            ),
            (True,),
        )
        n = sum(groups)
        rank = b.shape[-1]
        chains = a.ndim == b.ndim == 2 and a.shape[0] == rank * n and rank
        if not n or not chains or len(b) % n:
            faults.append(
                f"shape: lora_A, lora_B of {module} must be [{n} r, in], [out, r] with "
                f"{n} of {len(groups)} projections adapted; got {list(a.shape)}, "
                f"{list(b.shape)}. For a MergedLinear, say which are: "
                'enabled={"c_attn": (True, False, True)}'
            )
            continue
        scaling = alpha / rank
        modules[module] = ExternalFactors(
            a, _block_diagonal(b, groups), scaling, scaling * len(a), is_embedding=None
        )
    if not modules and not faults:
        faults.append("it holds no lora_A and lora_B")
    if faults:
        raise report(str(path), faults)
    kept = {f"{m}.lora_{x}" for m in modules for x in "AB"}
    return ExternalAdapter(
        modules=modules,
        full={name: array for name, array in arrays.items() if name not in kept},
        origin=str(path),
    )


def _open(path: Path) -> dict[str, np.ndarray]:
    """Reads every tensor of a file without unpickling anything."""
    if path.suffix == ".npz":
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        except Exception as error:  # NumPy and zipfile raise errors of many types
            raise ValueError(f"{path} can't be read as npz: {error}.") from error
        if others := [n for n, a in arrays.items() if not isinstance(a, np.ndarray)]:
            raise ValueError(f"{path} must hold arrays only; {others[:8]} are not.")
        return arrays
    if path.suffix != ".safetensors":
        raise ValueError(
            f"{path} must be .safetensors or .npz; got {path.suffix!r}. Pickled state "
            "dicts (.bin, .pt, .pth) are not read: save them with "
            "`safetensors.torch.save_file`."
        )
    reader = open_tensors(path)
    return {name: reader[name] for name in reader.shapes}


def _block_diagonal(b: np.ndarray, groups: Sequence[bool]) -> np.ndarray:
    """Returns B with the adapted projections' rows placed among all outputs."""
    n, rank = sum(groups), b.shape[1]
    rows = len(b) // n
    whole = np.zeros((rows * len(groups), rank * n), np.float32)
    places = [place for place, on in enumerate(groups) if on]
    for i, place in enumerate(places):
        part = slice(place * rows, (place + 1) * rows)
        whole[part, i * rank : (i + 1) * rank] = b[i * rows : (i + 1) * rows]
    return whole
