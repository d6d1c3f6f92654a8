"""Adapters of ours in the files of other tools.

The names come from the model's family, the shapes from tracing its module: no weight of
the base is read. A scanned model's layers are written one by one.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import numpy as np

from lora_jax.array_types import PyTree
from lora_jax.config import LoRAConfig
from lora_jax.interop.external import ExternalAdapter, Factors
from lora_jax.interop.full_tensors import single_leaves
from lora_jax.interop.fused import drop_zero_ranks, split_factors
from lora_jax.interop.mlx import write_mlx
from lora_jax.interop.naming import EMBED, HEAD, LM_HEAD, Names, find_slots
from lora_jax.interop.peft import write_peft
from lora_jax.interop.portable import make_portable
from lora_jax.models.family import Family, config_of
from lora_jax.models.load import HEAD as CLASSIFIER
from lora_jax.models.load import SCANNED, LoadedModel, unscanned
from lora_jax.models.save import POOLER
from lora_jax.models.source import open_source
from lora_jax.names import (
    BIAS,
    EMBEDDING,
    FROZEN,
    KERNEL,
    LORA,
    LORA_A,
    LORA_B,
    MAGNITUDE,
    PARAMS,
)
from lora_jax.nn.adapt import Adapted
from lora_jax.nn.trace import Example, trace_model
from lora_jax.tree.merge import check_adapters
from lora_jax.tree.partition import join
from lora_jax.tree.paths import flatten
from lora_jax.tree.targets import Target, child, select_targets

Source = LoadedModel | str | os.PathLike[str]
FORMATS = ("peft", "mlx")


def export_adapter(
    directory: str | os.PathLike[str],
    variables: Mapping[str, PyTree],
    config: LoRAConfig,
    source: Source,
    *,
    format: Literal["peft", "mlx"] = "peft",
    portable: bool = False,
    pooling: str | None = None,
    skip_head: bool = False,
    base_model: str | None = None,
) -> Path:
    """Writes an adapter as a folder that PEFT or mlx-lm loads.

    Args:
      directory: made if absent; an adapter there is replaced.
      variables: holds ``lora``, and ``params`` if something was trained in full.
        ``frozen`` is needed only for modules trained in part, whose rest it holds.
      config: what the adapter was made with.
      source: the base: a `LoadedModel`, or the path it was loaded from, of which the
        config and the tensors' names are read.
      format: whose folder.
      portable: of PEFT's: write what every loader (PEFT, vLLM, SGLang, llama.cpp)
        computes the same: the scaling in B, one rank, no patterns, q, k and v together.
      pooling: what an encoder's head was trained on; None for the module's own, and
        where that isn't known for transformers' own.
      skip_head: leaves out a trained head of an encoder.
      base_model: what the file names as its base; None for the source's own path.

    Returns:
      The folder.

    Raises:
      ValueError: if the adapter is not the config's or not finite, or the format has no
        way to say it; one error names all of it, and nothing is written.
      OSError: if it can't be written.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {FORMATS}; got {format!r}.")
    if portable and format != "peft":
        raise ValueError(
            "portable must be False for mlx-lm; its format has no options."
        )
    base = _open(source, variables, pooling)
    found = trace_model(base.module, None, base.example)
    weights, slots = flatten(found.params), find_slots(found.sites)
    unknown = found.unsupported
    targets = select_targets(found.sites, config, weights=weights, unsupported=unknown)
    names = Names(base.family, list(slots), single_leaves(weights))
    if not skip_head:
        _check_head(variables, base)
    adapter = _describe(variables, config, targets, names, skip_head=skip_head)
    if format == "mlx":
        return _write_mlx(directory, adapter, names, base)
    spelling = names.spelling()
    if portable:
        adapter = make_portable(adapter, slots, spelling.modules)
    files = [names.full_name(bare.rpartition(".")[0]) for bare in base.tensors]
    settings: dict[str, Any] = {
        "base_model_name_or_path": base_model or str(base.path),
        "fan_in_fan_out": not base.family.is_transposed,
        "target_modules": _shortest(
            sorted(adapter.modules), {*spelling.modules.values(), *files}
        ),
        "modules_to_save": _saved(adapter, names) or None,
        "task_type": None if base.family.head else "CAUSAL_LM",
    }
    return write_peft(directory, adapter, settings)


class _Base(NamedTuple):
    """A base without its weights."""

    module: nn.Module
    family: Family
    path: Path
    tensors: tuple[str, ...]  # bare names of those in its files
    pooling: str | None  # what the head was trained on; None if nobody says

    @property
    def example(self) -> Example:
        """Shapes of its inputs."""
        return Example.of(*self.family.inputs(config_of(self.module)))


def _open(
    source: Source, variables: Mapping[str, PyTree], pooling: str | None
) -> _Base:
    """Finds the module, from a model in memory or by the leaves of the adapter."""
    if isinstance(source, LoadedModel):
        module = source.module
        module = module.model if isinstance(module, Adapted) else module
        found = open_source(source.path)
        pooling = pooling or getattr(module, "pooling", None)
        return _Base(module, source.family, source.path, tuple(found.names), pooling)
    found = open_source(source)
    family, trees = found.family, [variables.get(c, {}) for c in (FROZEN, LORA, PARAMS)]
    paths = {key for tree in trees for key in tree}
    options: dict[str, Any] = {}
    if family.head:
        heads = [tree[CLASSIFIER] for tree in trees if CLASSIFIER in tree]
        kernel = next((head[KERNEL] for head in heads if KERNEL in head), None)
        options["num_labels"] = None if kernel is None else kernel.shape[-1]
        if pooling or POOLER in paths:
            options["pooling"] = pooling or POOLER
    elif SCANNED in paths:
        options["is_scanned"] = True
    module = family.module(family.read_config(found.settings), **options)
    return _Base(module, family, found.path, tuple(found.names), pooling)


def _check_head(variables: Mapping[str, PyTree], base: _Base) -> None:
    """Refuses a head that transformers would feed with something else."""
    trained, wanted = variables.get(PARAMS, {}), base.family.head_pooling
    if base.pooling in (None, wanted):
        return
    if any(path in trained for path in base.family.head):
        raise ValueError(
            f"the head must sit on {wanted!r} pooling to be used by transformers; it "
            f"was trained on {base.pooling!r}. Leave it out (skip_head=True, "
            "--skip-head), and the adapter alone is exported."
        )


def _describe(
    variables: Mapping[str, PyTree],
    config: LoRAConfig,
    targets: Sequence[Target],
    names: Names,
    *,
    skip_head: bool,
) -> ExternalAdapter:
    """Returns the adapter in PyTorch's orientation, under Hugging Face's names."""
    lora = flatten(variables.get(LORA, {}))
    check_adapters(lora, targets)
    spelled, modules = names.spelling().modules, {}
    for target in targets:
        a, b = (lora[child(target.path, name)] for name in (LORA_A, LORA_B))
        a, b = target.batch_first(a, b)
        m = None
        if target.dora:
            m = target.magnitude_first(lora[child(target.path, MAGNITUDE)])
        path = tuple(target.path.split("/"))
        for i, single in enumerate(unscanned(path, target.kernel_shape)):
            own = [x if single == path or x is None else x[i] for x in (a, b, m)]
            factors, name = _factors(target, *own), "/".join(single)
            if parts := names.split_names(name):
                sizes = [len(factors.b) // len(parts)] * len(parts)
                for part, own in zip(parts, split_factors(factors, sizes), strict=True):
                    modules[part] = drop_zero_ranks(own, rslora=config.rslora)
            else:
                modules[spelled[name]] = factors
    if EMBED in {target.path for target in targets} and HEAD not in spelled:
        if config.dora:
            raise ValueError(
                "an adapter with DoRA of an embedding that is the head too can't be "
                "exported: no other tool scales both alike. Merge it into its base."
            )
        embed = modules[spelled[EMBED]]
        modules[LM_HEAD] = embed._replace(a=embed.b.T, b=embed.a.T, is_embedding=False)
    return ExternalAdapter(
        modules=modules,
        full=_full(variables, config, names, skip_head, adapted=modules),
        base={},
        config={},
        rslora=config.rslora,
        dropout_rate=config.dropout_rate,
        bias=config.bias,
    )


def _factors(target: Target, a: Any, b: Any, m: Any) -> Factors:
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    return Factors(
        a=a.transpose(np.argsort(Family.axes(a.ndim))),
        b=b.T,
        scaling=target.scaling,
        alpha=target.alpha,
        magnitude=None if m is None else np.asarray(m, np.float32),
        is_embedding=target.kind == "embed",
    )


def _full(
    variables: Mapping[str, PyTree],
    config: LoRAConfig,
    names: Names,
    skip_head: bool,
    *,
    adapted: Mapping[str, Factors],
) -> dict[str, np.ndarray]:
    """Returns the tensors of modules trained in full, whole, and trained biases."""
    trained = flatten(variables.get(PARAMS, {}))
    there = flatten(join(variables.get(FROZEN, {}), variables.get(PARAMS, {})))
    spelled = names.spelling().tensors
    tensors, faults = {}, []
    arrays = {
        "/".join(single): array if single == tuple(path.split("/")) else array[i]
        for path, array in there.items()
        for i, single in enumerate(unscanned(tuple(path.split("/")), array.shape))
    }
    for single in single_leaves(trained):
        module, _, leaf = single.rpartition("/")
        if skip_head and single.split("/")[0] in names.family.head:
            continue
        only_bias = leaf == BIAS and config.bias != "none"
        inside = spelled[single].rpartition(".")[0] in adapted
        if inside and not only_bias:
            faults.append(
                f"{single} is trained beside an adapter; PEFT has a word for that only "
                "with bias='lora_only' or 'all'"
            )
        of_module = [p for p in spelled if p.rpartition("/")[0] == module]
        for path in [single] if only_bias else of_module:
            if path not in arrays:
                faults.append(
                    f"{path} must be in variables ('frozen'), for PEFT saves modules "
                    "whole"
                )
                continue
            array = np.asarray(arrays[path], np.float32)
            name = spelled[path]
            tensors[name] = names.family.to_file(path.rpartition("/")[2], array)
    embed = spelled.get(f"{EMBED}/{EMBEDDING}")
    if embed in tensors and f"{HEAD}/{KERNEL}" not in spelled:
        tensors[f"{LM_HEAD}.weight"] = tensors[embed]  # tied
    if faults:
        raise ValueError(f"the adapter can't be exported: {'; '.join(faults)}.")
    return tensors


def _saved(adapter: ExternalAdapter, names: Names) -> list[str]:
    """Returns modules_to_save: whole heads by their first word, else full names."""
    modules = {
        name.rpartition(".")[0]
        for name in adapter.full
        if adapter.bias == "none" or not name.endswith(f".{BIAS}")
    }
    known = names.spelling().tensors.values()
    words = set()
    for module in modules:
        word = module.split(".")[0]
        is_whole = all(n in adapter.full for n in known if n.startswith(f"{word}."))
        words.add(word if is_whole else module)
    return sorted(words)


def _shortest(chosen: Sequence[str], known: Iterable[str]) -> list[str]:
    """Returns last words of names where they name no other module, else full names."""
    left = {name.rpartition(".")[2] for name in set(known) - set(chosen)}
    words = {name: name.rpartition(".")[2] for name in chosen}
    return sorted({n if word in left else word for n, word in words.items()})


def _write_mlx(
    directory: str | os.PathLike[str],
    adapter: ExternalAdapter,
    names: Names,
    base: _Base,
) -> Path:
    """Writes for mlx-lm, under its names: ``model.`` before everything but the head."""
    if base.family.head:
        raise ValueError("mlx-lm has causal language models alone; this is an encoder.")
    modules = dict(adapter.modules)
    if HEAD not in names.spelling().modules:
        modules.pop(LM_HEAD, None)  # tied: the embedding's adapter is the head's too
    prefix = base.family.prefix

    def own(name: str) -> str:
        return name if name == LM_HEAD else "model." + name.removeprefix(prefix)

    renamed = {own(name): factors for name, factors in modules.items()}
    layers = config_of(base.module).num_layers
    return write_mlx(directory, adapter._replace(modules=renamed), num_layers=layers)
