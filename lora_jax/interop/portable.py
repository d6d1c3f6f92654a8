"""Rewrites an adapter so that every loader computes the same update.

vLLM, SGLang, llama.cpp and PEFT differ in what they refuse and, worse, in what they
ignore: rsLoRA, rank and alpha patterns, a q without its k and v. Without any of these
an adapter is ``y = x W + (x Aᵀ) B'ᵀ`` with one rank and a scaling of one::

    B' = scaling * B            A, B' zero-padded to the largest rank
    r = lora_alpha = rank       q, k and v all present if any is
"""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lora_jax.interop.external import ExternalAdapter, ExternalFactors
from lora_jax.interop.identity import base_name
from lora_jax.interop.peft import write_peft
from lora_jax.models.stacking import LayerSlice
from lora_jax.names import CLASSIFIER, LM_HEAD

QKV = ("attention/query", "attention/key", "attention/value")
KEPT = ("auto_mapping", "modules_to_save", "task_type", "target_modules")
KEPT_IF_GIVEN = (
    *("ensure_weight_tying", "trainable_token_indices", "exclude_modules"),
    *("layers_pattern", "layers_to_transform"),
)
LOADED_HEADS = (CLASSIFIER, "score")  # fully trained modules that vLLM loads


def make_portable(
    adapter: ExternalAdapter,
    modules: Mapping[str, LayerSlice],
    names: Mapping[str, str],
) -> ExternalAdapter:
    """Returns the same update in a form that every loader interprets alike.

    B is rounded once where the scaling is not a power of two.

    Args:
      adapter: what is exported, under Hugging Face's names.
      modules: kernels of the model's modules by path.
      names: Hugging Face's name of each module.

    Raises:
      ValueError: listing everything that some loader refuses: DoRA, embeddings,
        convolutions, modules and biases trained in full.
    """
    faults = []
    if adapter.dora:
        faults.append("it has DoRA's magnitudes")
    for name, factors in adapter.modules.items():
        if factors.is_embedding or _is_conv(factors) or name == LM_HEAD:
            faults.append(f"{name} is not a linear layer of a block")
    faults += [
        f"{name} is trained in full"
        for name in adapter.full
        if name.split(".")[0] not in LOADED_HEADS
    ]
    if adapter.tokens:
        faults.append("rows of single tokens are trained")
    if any(factors.bias is not None for factors in adapter.modules.values()):
        faults.append("updates have biases (lora_bias)")
    if adapter.bias != "none":
        faults.append(f"biases are trained (bias={adapter.bias!r})")
    if faults:
        raise ValueError(
            f"the adapter can't be made portable: {'; '.join(faults)}. Merge it into "
            "its base, which every loader accepts, or train without these."
        )
    rank = max(factors.rank for factors in adapter.modules.values())
    plain = {name: _plain(f, rank) for name, f in adapter.modules.items()}
    for path, kernel in modules.items():
        end = next((end for end in QKV if path.endswith("/" + end)), None)
        if end is None or names[path] in plain:
            continue
        layer = path.removesuffix(end)
        if any(names.get(layer + other) in plain for other in QKV):
            inputs, outputs = kernel.shape
            a = np.zeros((rank, inputs), np.float32)
            b = np.zeros((outputs, rank), np.float32)
            plain[names[path]] = ExternalFactors(a, b, 1.0, rank)
    return adapter._replace(modules=plain, rslora=False)


def rewrite_peft(
    directory: str | os.PathLike[str],
    adapter: ExternalAdapter,
    *,
    portable: bool,
    base_model: str | None = None,
) -> Path:
    """Rewrites an adapter from `read_peft` as a PEFT folder, without a model.

    Tensors and what the config says of them stay as they are, unless ``portable``.

    Args:
      directory: created if absent; an adapter there is replaced.
      adapter: from `read_peft`.
      portable: as for `export_adapter`.
      base_model: the base to record; None to keep the recorded one.

    Raises:
      ValueError: if the adapter isn't PEFT's, or the model is needed for shapes that
        the file lacks.
      OSError: if the folder can't be written.
    """
    config, why = adapter.config, []
    if "peft_type" not in config:
        why.append("it isn't PEFT's, so its modules' PEFT names are unknown")
    if any(factors.is_wide for factors in adapter.modules.values()):
        why.append("it is VeRA's, whose file doesn't say how many inputs a module has")
    settings = {key: config.get(key) for key in KEPT}
    settings |= {key: config[key] for key in KEPT_IF_GIVEN if config.get(key)}
    settings["fan_in_fan_out"] = config.get("fan_in_fan_out") or False
    settings["base_model_name_or_path"] = base_name(
        base_model, config.get("base_model_name_or_path")
    )
    if portable:
        ends = (".q_proj", ".k_proj", ".v_proj")
        layers = {n[: -len(e)] for n in adapter.modules for e in ends if n.endswith(e)}
        why += [
            f"{layer} has no adapter of {end[1:]}, so the shape of its zeros is unknown"
            for layer in sorted(layers)
            for end in ends
            if layer + end not in adapter.modules
        ]
    if why:
        raise ValueError(
            f"{adapter.origin} can't be exported without its base: {'; '.join(why)}. "
            "Give the base (--model)."
        )
    if portable:
        adapter = make_portable(adapter, {}, {})
        dropped = [settings.pop(key, None) for key in KEPT_IF_GIVEN]
        if any(dropped) or not isinstance(settings["target_modules"], list):
            settings["target_modules"] = sorted(adapter.modules)
    return write_peft(directory, adapter, settings)


def _is_conv(factors: ExternalFactors) -> bool:
    return factors.a.ndim > 2 and not factors.is_experts


def _plain(factors: ExternalFactors, rank: int) -> ExternalFactors:
    """Returns the factors with the scaling folded into B, padded to ``rank``."""
    more = (0, rank - factors.rank)
    b = factors.b * np.float32(factors.scaling)
    return factors._replace(
        a=np.pad(factors.a, [*[(0, 0)] * (factors.a.ndim - 2), more, (0, 0)]),
        b=np.pad(b, [*[(0, 0)] * (b.ndim - 1), more]),
        scaling=1.0,
        alpha=float(rank),
    )
