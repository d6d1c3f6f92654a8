"""Exports adapters in the formats of other tools.

Names come from the model's family and shapes from tracing its module, so the base's
weights are never read.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lora_jax.array_types import PyTree
from lora_jax.config import LoRAConfig
from lora_jax.interop.base import (
    Base,
    Source,
    auto_class,
    check_head,
    open_base,
)
from lora_jax.interop.experts import (
    check_exportable,
    known_names,
    parameter_targets,
    split_experts,
)
from lora_jax.interop.external import ExternalAdapter, ExternalFactors
from lora_jax.interop.full_tensors import EMBED_LEAF, HEAD_LEAF, update_biases
from lora_jax.interop.fused import drop_zero_ranks, split_factors
from lora_jax.interop.identity import base_name
from lora_jax.interop.layout import to_factors
from lora_jax.interop.mlx import write_mlx
from lora_jax.interop.naming import Names
from lora_jax.interop.peft import write_peft
from lora_jax.interop.portable import make_portable
from lora_jax.interop.tied import check_one_table, tied_factors
from lora_jax.interop.vera import find_vectors, write_vera
from lora_jax.models.added_tokens import write_tokenizer
from lora_jax.models.family import config_of
from lora_jax.models.loaded import LoadedModel
from lora_jax.models.source import Source as ModelSource
from lora_jax.models.stacking import layer_slices
from lora_jax.names import (
    BIAS,
    EMBED,
    FROZEN,
    HEAD,
    LM_HEAD,
    LORA,
    PARAMS,
)
from lora_jax.nn.trace import trace_model
from lora_jax.tree.merge import check_adapters
from lora_jax.tree.partition import adapter_of, join
from lora_jax.tree.paths import flatten
from lora_jax.tree.plain import plain_config, plain_targets, plain_variables
from lora_jax.tree.targets import Target, select_targets
from lora_jax.tree.token_rows import full_of, token_rows_of

FORMATS = ("peft", "mlx", "vera")


def export_adapter(
    directory: str | os.PathLike[str],
    variables: Mapping[str, PyTree],
    config: LoRAConfig,
    source: Source,
    *,
    format: Literal["peft", "mlx", "vera"] = "peft",
    portable: bool = False,
    pooling: str | None = None,
    skip_head: bool = False,
    base_model: str | None = None,
) -> Path:
    """Writes an adapter as a folder that PEFT or mlx-lm loads.

    The adapter of a method such as PiSSA is written as the LoRA of the base as it is
    that has the same update; its rank is twice the config's.

    Args:
      directory: created if absent; an adapter there is replaced.
      variables: holds ``lora``, and ``params`` if anything was trained in full.
        ``frozen`` is needed only for modules trained in part, to supply the rest.
      config: the config the adapter was made with.
      source: the base: a `LoadedModel`, or the path it was loaded from, where the
        config and tensor names are read.
      format: ``"peft"``, ``"mlx"``, or for an adapter with ``vera=True`` ``"vera"``:
        PEFT's `VeraConfig`, a file of the vectors and of A and B once.
      portable: writes a PEFT folder that every loader (PEFT, vLLM, SGLang, llama.cpp)
        interprets alike: scaling folded into B, one rank, no patterns, and q, k and v
        all present.
      pooling: the pooling that an encoder's head was trained with; None for the
        module's own, or transformers' if that is unknown.
      skip_head: leaves out an encoder's trained head.
      base_model: the base model name to record; None for the source's hub id if it has
        one, else its folder name. Local paths are never written.

    Returns:
      The folder.

    Raises:
      ValueError: if the adapter doesn't fit the config, is not finite, or can't be
        stored in the format; one error lists all problems, and nothing is written.
      OSError: if the folder can't be written.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {FORMATS}; got {format!r}.")
    if portable and format != "peft":
        raise ValueError(
            f"portable must be False for format {format!r}, which has no variants."
        )
    if format == "vera" and not config.vera:
        raise ValueError(
            "format must be 'peft' or 'mlx' for an adapter without vera=True; got "
            "'vera'."
        )
    base = open_base(source, variables, pooling)
    found = trace_model(base.module, None, base.example)
    weights, unknown = flatten(found.params), found.unsupported
    kernels = layer_slices({site.path: site.kernel_shape for site in found.sites})
    targets = select_targets(found.sites, config, weights=weights, unsupported=unknown)
    given, seed = (adapter_of(variables), targets), config.vera_seed
    variables = plain_variables(variables, targets)
    targets, config = plain_targets(targets, config), plain_config(config)
    heads = () if skip_head else base.family.head
    has_head = any(path in variables.get(PARAMS, {}) for path in heads)
    has_prefix, auto_mapping = auto_class(base, has_head=has_head)
    leaves = layer_slices(weights)
    names = Names(base.family, list(kernels), leaves, has_prefix=has_prefix)
    if has_head:
        check_head(base)
    adapter = _describe(
        variables, config, targets, names, base.source, skip_head=skip_head
    )
    if format == "mlx":
        return _write_mlx(directory, adapter, names, base)
    spelling = names.spelling()
    if portable:
        adapter = make_portable(adapter, kernels, spelling.modules)
        adapter = adapter._replace(modules=split_experts(adapter.modules, names))
    parameters = parameter_targets(adapter, names)
    wrapped = {name.removesuffix(".weight") for name in parameters}
    if wrapped:  # PEFT has no dropout there, and none is needed to compute
        adapter = adapter._replace(dropout_rate=0.0)
    by_expert = portable and not names.family.is_served_whole
    known = known_names(names, base.source.names, by_expert=by_expert)
    settings: dict[str, Any] = {
        "auto_mapping": auto_mapping,
        "base_model_name_or_path": base_name(
            base_model,
            None if isinstance(source, LoadedModel) else source,
            base.source.path,
            base.source.settings.get("_name_or_path"),
        ),
        "fan_in_fan_out": not base.family.is_transposed,
        "target_modules": _shortest(sorted(set(adapter.modules) - wrapped), known),
        **({"target_parameters": parameters} if parameters else {}),
        "modules_to_save": _saved(adapter, names) or None,
        "task_type": base.task,
    }
    if format == "vera":
        vectors = find_vectors(*given, names)
        return write_vera(directory, vectors, adapter, settings, seed=seed)
    folder = write_peft(directory, adapter, settings)
    if isinstance(source, LoadedModel) and source.added and source.tokenizer:
        write_tokenizer(folder, source.tokenizer, source.path)
    return folder


def _describe(
    variables: Mapping[str, PyTree],
    config: LoRAConfig,
    targets: Sequence[Target],
    names: Names,
    source: ModelSource,
    *,
    skip_head: bool,
) -> ExternalAdapter:
    """Returns the adapter in PyTorch's orientation, under Hugging Face's names."""
    rows = token_rows_of(variables)
    variables = {**variables, PARAMS: full_of(variables)}
    lora = flatten(variables.get(LORA, {}))
    check_adapters(lora, targets)
    check_exportable(targets)
    spelled, modules = names.spelling().modules, {}
    by_path = {target.path: target for target in targets}
    kernels = layer_slices({path: t.kernel_shape for path, t in by_path.items()})
    for path, layer in kernels.items():
        target = by_path[layer.path]
        index = () if layer.index is None else (layer.index,)
        factors = to_factors(target, lora, index)
        if parts := names.split_names(path):
            sizes = [len(factors.b) // len(parts)] * len(parts)
            for part, own in zip(parts, split_factors(factors, sizes), strict=True):
                modules[part] = drop_zero_ranks(own, rslora=config.rslora)
        else:
            modules[spelled[path]] = factors
    if EMBED in by_path:
        check_one_table(names.family)
    if EMBED in by_path and HEAD not in spelled:
        modules[LM_HEAD] = tied_factors(modules[spelled[EMBED]])
    if config.bias == "none" and not config.dora:
        modules = _with_biases(variables, names, source, modules)
    return ExternalAdapter(
        modules=modules,
        full=_full(variables, config, names, skip_head, adapted=modules),
        rslora=config.rslora,
        dropout_rate=config.dropout_rate,
        bias=config.bias,
        tokens=_tokens(rows, config, names, source),
    )


def _tokens(
    trained: Mapping[str, PyTree], config: LoRAConfig, names: Names, source: ModelSource
) -> dict[str, tuple[list[int], np.ndarray]]:
    """Returns tokens and their rows by Hugging Face's name of their layer.

    PEFT ties the rows of a tied head to the embedding's, unless they are of other
    tokens.
    """
    spelled, rows = names.spelling().modules, flatten(trained)
    layers = {leaf.rpartition("/")[0]: array for leaf, array in rows.items()}
    found = {path: config.tokens_for(path) for path in layers}
    if EMBED in found:
        check_one_table(names.family)
    is_tied = not names.family.head and source.config.is_tied
    is_alone = EMBED in found and found.get(HEAD, found[EMBED]) == found[EMBED]
    if is_tied and HEAD in spelled and is_alone:
        raise ValueError(
            "rows of tokens of an embedding can't be exported with a head of its own: "
            "PEFT ties both, as the base does. Merge it into its base."
        )
    return {
        spelled[path]: (list(found[path]), np.asarray(array, np.float32))
        for path, array in layers.items()
    }


def _with_biases(
    variables: Mapping[str, PyTree],
    names: Names,
    source: ModelSource,
    modules: dict[str, ExternalFactors],
) -> dict[str, ExternalFactors]:
    """Adds PEFT's ``lora_bias`` to the factors if biases of adapted layers are trained.

    PEFT has one for every linear layer or for none, so the other layers get zeros.
    """
    trained = flatten(variables.get(PARAMS, {}))
    biases = update_biases(trained, names, source, modules)
    if not biases:
        return modules
    return {
        name: f
        if f.is_embedding
        else f._replace(bias=biases.get(name, np.zeros(len(f.b), np.float32)))
        for name, f in modules.items()
    }


def _full(
    variables: Mapping[str, PyTree],
    config: LoRAConfig,
    names: Names,
    skip_head: bool,
    *,
    adapted: Mapping[str, ExternalFactors],
) -> dict[str, np.ndarray]:
    """Returns the tensors of modules trained in full, and trained biases."""
    trained = flatten(variables.get(PARAMS, {}))
    there = flatten(join(variables.get(FROZEN, {}), variables.get(PARAMS, {})))
    spelled = names.spelling().tensors
    tensors, faults = {}, []
    slices = layer_slices(there)
    for leaf in layer_slices(trained):
        module, _, name = leaf.rpartition("/")
        if skip_head and leaf.split("/")[0] in names.family.head:
            continue
        only_bias = name == BIAS and config.bias != "none"
        beside = adapted.get(spelled[leaf].rpartition(".")[0])
        if name == BIAS and beside is not None and beside.bias is not None:
            continue  # exported as the update's bias
        if beside is not None and not only_bias:
            faults.append(
                f"{leaf} is trained beside an adapter, which PEFT's format can't hold"
                + " with DoRA unless bias is 'lora_only' or 'all'" * (name == BIAS)
            )
        of_module = [p for p in spelled if p.rpartition("/")[0] == module]
        for path in [leaf] if only_bias else of_module:
            if path not in slices:
                faults.append(
                    f"{path} must be in variables ('frozen'): PEFT saves whole modules"
                )
                continue
            array = np.asarray(slices[path].of(there[slices[path].path]), np.float32)
            tensors[spelled[path]] = names.family.to_file(path, array)
    embed = spelled.get(EMBED_LEAF)
    if embed in tensors:
        check_one_table(names.family)
    if embed in tensors and HEAD_LEAF not in spelled:
        tensors[f"{LM_HEAD}.weight"] = tensors[embed]  # tied
    if faults:
        raise ValueError(f"the adapter can't be exported: {'; '.join(faults)}.")
    return tensors


def _saved(adapter: ExternalAdapter, names: Names) -> list[str]:
    """Returns modules_to_save: first components of whole heads, else full names."""
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
    """Returns each name's last component if unambiguous, else the full name."""
    left = {word for name in set(known) - set(chosen) for word in name.split(".")}
    words = {name: name.rpartition(".")[2] for name in chosen}
    return sorted({n if word in left else word for n, word in words.items()})


def _write_mlx(
    directory: str | os.PathLike[str],
    adapter: ExternalAdapter,
    names: Names,
    base: Base,
) -> Path:
    """Writes with mlx-lm's names: ``model.`` before everything but the head.

    There, a multimodal model's language model and its head are wrapped together.
    """
    if (kind := base.family.kind) != "decoder":
        raise ValueError(f"mlx-lm has only causal language models; this is an {kind}.")
    modules = dict(adapter.modules)
    if HEAD not in names.spelling().modules:
        modules.pop(LM_HEAD, None)  # tied: the embedding's adapter is the head's too
    prefix = base.family.prefix
    outer = "language_model." if base.family.is_multimodal else ""

    def own(name: str) -> str:
        inner = name if name == LM_HEAD else "model." + name.removeprefix(prefix)
        return outer + inner

    renamed = {own(name): factors for name, factors in modules.items()}
    layers = config_of(base.module).num_layers
    return write_mlx(directory, adapter._replace(modules=renamed), num_layers=layers)
