"""An adapter brought to the form that every loader computes alike.

vLLM, SGLang, llama.cpp and PEFT differ in what they refuse and, worse, in what they
ignore: rsLoRA, rank and alpha patterns, a q without its k and v. What is left when all
of that is taken out is ``y = x W + (x Aᵀ) B'ᵀ`` with one rank and a factor of one::

    B' = scaling * B            A, B' padded with zeros to the largest rank
    r = lora_alpha = rank       q, k and v all there if one of them is
"""

from collections.abc import Mapping

import numpy as np

from lora_jax.interop.external import ExternalAdapter, Factors
from lora_jax.interop.naming import Slot

TOGETHER = ("attention/query", "attention/key", "attention/value")
LOADED_HEADS = ("classifier", "score")  # modules trained in full that vLLM takes


def make_portable(
    adapter: ExternalAdapter, slots: Mapping[str, Slot], names: Mapping[str, str]
) -> ExternalAdapter:
    """Returns the same update in the form that every loader computes.

    Args:
      adapter: what is exported, under Hugging Face's names.
      slots: the model's modules by path.
      names: Hugging Face's name of each.

    Returns:
      The adapter; B is rounded once where the scaling is no power of two.

    Raises:
      ValueError: naming everything that some loader refuses: DoRA, embeddings,
        convolutions, modules and biases trained in full.
    """
    faults = []
    if adapter.dora:
        faults.append("it has DoRA's magnitudes")
    for name, factors in adapter.modules.items():
        if factors.is_embedding or factors.a.ndim > 2 or name == "lm_head":
            faults.append(f"{name} is no linear layer of a block")
    faults += [
        f"{name} is trained in full"
        for name in adapter.full
        if name.split(".")[0] not in LOADED_HEADS
    ]
    if adapter.bias != "none":
        faults.append(f"biases are trained (bias={adapter.bias!r})")
    if faults:
        raise ValueError(
            f"the adapter can't be made portable: {'; '.join(faults)}. Merge it into "
            "its base, which every loader takes, or train without that."
        )
    rank = max(factors.rank for factors in adapter.modules.values())
    modules = {name: _plain(f, rank) for name, f in adapter.modules.items()}
    for path, slot in slots.items():
        end = next((end for end in TOGETHER if path.endswith("/" + end)), None)
        if end is None or names[path] in modules:
            continue
        layer = path.removesuffix(end)
        if any(names.get(layer + other) in modules for other in TOGETHER):
            inputs, outputs = slot.kernel_shape
            a, b = np.zeros((rank, inputs)), np.zeros((outputs, rank))
            zeros = Factors(a.astype(np.float32), b.astype(np.float32), 1.0, rank)
            modules[names[path]] = zeros
    return adapter._replace(modules=modules, rslora=False)


def _plain(factors: Factors, rank: int) -> Factors:
    """Returns the factors with the scaling in B, padded to ``rank``."""
    more = (0, rank - factors.rank)
    b = factors.b * np.float32(factors.scaling)
    return factors._replace(
        a=np.pad(factors.a, (more, (0, 0))),
        b=np.pad(b, ((0, 0), more)),
        scaling=1.0,
        alpha=float(rank),
    )
