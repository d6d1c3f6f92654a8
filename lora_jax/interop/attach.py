"""Attaches adapters made by other tools to a model.

RoPE needs no permutation: every model here rotates halves, as Hugging Face's do, and
GGUF tensors are reordered when read. GPT-2's Conv1D, whose weights are ``[in, out]``,
needs none either.

Every module the file has factors for is adapted; the file's config must agree.
"""

import dataclasses
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lora_jax.config import LoRAConfig
from lora_jax.interop.experts import join_experts
from lora_jax.interop.external import (
    ExternalAdapter,
    ExternalFactors,
    report,
)
from lora_jax.interop.full_tensors import (
    check_base,
    place_biases,
    place_full,
    place_tokens,
    resized,
)
from lora_jax.interop.fused import fuse_factors, split_factors
from lora_jax.interop.layout import (
    Index,
    Stack,
    ranks_and_alphas,
    shape_faults,
    to_leaves,
)
from lora_jax.interop.naming import FUSIONS, Names
from lora_jax.interop.peft import config_faults
from lora_jax.interop.tied import place_tied
from lora_jax.models.family import OTHER_MODALITIES
from lora_jax.models.loaded import LoadedModel
from lora_jax.models.stacking import LayerSlice, layer_slices
from lora_jax.names import BIAS, TOKEN_ROWS
from lora_jax.nn.adapt import adapt
from lora_jax.nn.trace import Example, trace_model
from lora_jax.tree.partition import join, partition
from lora_jax.tree.paths import flatten, nearest, unflatten
from lora_jax.tree.targets import child
from lora_jax.tree.token_rows import full_of


def attach_adapter(loaded: LoadedModel, adapter: ExternalAdapter) -> LoadedModel:
    """Attaches another tool's adapter to a model.

    Adapter dropout is off, as in `load_model`; the rate is kept in the config.

    Args:
      loaded: the bare model.
      adapter: from `read_peft`, `read_mlx` or `read_loralib`.

    Returns:
      The adapted model, its variables split into collections.

    Raises:
      ValueError: if the adapter has modules that the model lacks or whose shapes
        differ, or its config and tensors disagree; one error lists all problems.
    """
    example = Example.of(*loaded.inputs)
    sites = {
        site.path: site
        for site in trace_model(loaded.module, loaded.params, example).sites
    }
    kernels = layer_slices({path: site.kernel_shape for path, site in sites.items()})
    flat = flatten(loaded.params)
    leaves = layer_slices(flat)
    names = Names(loaded.family, list(kernels), leaves)
    adapter = _for_text(adapter, names)
    spelling = names.spelled_as(adapter.modules)
    counts = {
        path: part.shape[0]
        for path, part in kernels.items()
        if sites[part.path].kind == "experts"
    }
    joined, faults = join_experts(adapter, names, counts)
    placed, wrong = _place(joined, names, kernels, loaded.config)
    faults += wrong
    placed = {p: f.narrowed(kernels[p].shape[-2]) for p, f in placed.items()}
    if "peft_type" in adapter.config:
        known = names.modules()
        unknown = [name for name in adapter.modules if known.get(name) not in kernels]
        by_expert = set(joined.modules) - set(adapter.modules)
        if not any(path in counts for path in placed):
            # "down_proj" is then a shared expert's: parameters are named elsewhere.
            by_expert |= {spelling.modules[path] for path in counts}
        modules = [n for n in spelling.modules.values() if n not in by_expert]
        tensors = spelling.tensors.values()
        faults += config_faults(adapter, modules, tensors, unknown=unknown)
    values, wrong = place_full(adapter.full, names, leaves, flat)
    faults += [*wrong, *check_base(adapter.base, names, leaves, flat)]
    tokens, wrong = place_tokens(adapter, names, leaves, values)
    faults += wrong
    faults += place_biases(placed, leaves, flat, values)
    for path, factors in placed.items():
        site = sites[kernels[path].path]
        faults += shape_faults(path, site, factors, resized)
    if faults:
        raise report(adapter.origin, faults)
    layers: dict[str, dict[Index, ExternalFactors]] = {}
    for path, factors in placed.items():
        part = kernels[path]
        index = () if part.index is None else (part.index,)
        layers.setdefault(part.path, {})[index] = factors
    lora = {}
    for path, stack in layers.items():
        lora |= to_leaves(sites[path], stack, flat)
    lora |= {child(path, TOKEN_ROWS): rows for path, (_, rows) in tokens.items()}
    config = _config(layers, adapter, values)
    ids = {path: ids for path, (ids, _) in tokens.items()}
    config = dataclasses.replace(config, tokens=ids)
    variables = partition(join(unflatten({**flat, **values}), unflatten(lora)), config)
    trained = flatten(full_of(variables))
    if set(trained) != set(values):
        missing = [f"missing: values of {p}" for p in trained if p not in values]
        extra = [f"unexpected: values of {p}" for p in values if p not in trained]
        raise report(adapter.origin, missing + extra)
    adapted = adapt(loaded.module, config, *loaded.inputs, deterministic=True)
    return loaded._replace(module=adapted, variables=variables, extra={})


def _place(
    adapter: ExternalAdapter,
    names: Names,
    kernels: Mapping[str, LayerSlice],
    config: Any,
) -> tuple[dict[str, ExternalFactors], list[str]]:
    """Returns the factors by module path, and the problems found."""
    paths, found, faults = names.modules(), {}, []
    pooler = {names.family.prefix + "pooler.dense", "pooler.dense"}
    no_effect = [name for name in adapter.modules if name in pooler - set(paths)]
    if no_effect:  # a bare encoder lacks the pooler, whose output would be unused
        warnings.warn(
            f"{adapter.origin}: the adapter of {', '.join(no_effect)} is left out; no "
            "output of this model depends on that layer.",
            stacklevel=4,
        )
    for name, factors in adapter.modules.items():
        path = paths.get(name)
        if path is None and name in no_effect:
            continue
        if path is None:
            known = [n.replace(".", "/") for n, p in paths.items() if p in kernels]
            hint = nearest(name.replace(".", "/"), known).replace("/", ".")
            faults.append(
                f"unexpected: {name} is not a module of this model. Did you mean: "
                f"{hint}?"
            )
        elif path in found:
            faults.append(f"duplicate: {name} is another name of {path}")
        else:
            found[path] = factors
    faults += place_tied(found, kernels, is_tied_once=adapter.is_tied_once)
    faults += _place_fused(found, kernels, config, rslora=adapter.rslora)
    if adapter.dora:
        faults += [
            f"missing: magnitude of {path}"
            for path, factors in found.items()
            if factors.magnitude is None
        ]
    faults += [
        f"unexpected: this model has no {path}" for path in found if path not in kernels
    ]
    return {path: f for path, f in found.items() if path in kernels}, faults


def _for_text(adapter: ExternalAdapter, names: Names) -> ExternalAdapter:
    """Drops adapters for images or audio from a decoder's; warns if there are any."""
    if names.family.head:
        return adapter
    kept: dict[str, Any] = {
        part: {n: v for n, v in getattr(adapter, part).items() if not _is_other(n)}
        for part in ("modules", "full", "base")
    }
    if left := [n for n in (*adapter.modules, *adapter.full) if _is_other(n)]:
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        warnings.warn(
            f"{adapter.origin}: its adapters for images or sound ({left[0]}{more}) are "
            "left out; this model reads and writes text.",
            stacklevel=4,
        )
    return adapter._replace(**kept)


def _is_other(name: str) -> bool:
    bare = name.removeprefix("model.")
    return any(re.match(pattern, bare) for pattern in OTHER_MODALITIES)


def _place_fused(
    found: dict[str, ExternalFactors],
    kernels: Mapping[str, LayerSlice],
    config: Any,
    *,
    rslora: bool,
) -> list[str]:
    """Splits or fuses adapters where the model fuses projections differently."""
    faults = []
    for fusion in FUSIONS:
        layers = {
            path.removesuffix(end): None
            for path in found
            for end in (fusion.whole, *fusion.parts)
            if path.endswith("/" + end) and path not in kernels
        }
        for layer in layers:
            whole, parts = layer + fusion.whole, [layer + p for p in fusion.parts]
            sizes = _part_sizes(config, len(parts))
            try:
                if whole in found and set(parts) <= set(kernels) - set(found):
                    split = split_factors(found.pop(whole), sizes)
                    found.update(zip(parts, split, strict=True))
                elif whole in kernels and whole not in found:
                    group = [found.pop(part, None) for part in parts]
                    found[whole] = fuse_factors(group, sizes, rslora=rslora)
            except ValueError as error:
                faults.append(f"{whole}: {error}")
    return faults


def _part_sizes(config: Any, count: int) -> tuple[int, ...]:
    """Returns the output sizes of query, key and value, or of gate and up."""
    if count == 2:
        return (config.mlp_size,) * 2
    kv = config.num_kv_heads * config.head_dim
    return config.num_heads * config.head_dim, kv, kv


def _config(
    layers: Mapping[str, Stack],
    adapter: ExternalAdapter,
    values: Mapping[str, Any],
) -> LoRAConfig:
    """Returns the config that adapts exactly these sites, with their own numbers."""
    return LoRAConfig.for_layers(
        *ranks_and_alphas(layers),
        dropout_rate=adapter.dropout_rate,
        rslora=adapter.rslora,
        dora=adapter.dora,
        train=sorted(_modules(values, adapter.bias, layers)),
        bias=adapter.bias,  # pyright: ignore[reportArgumentType] - read_peft checked it
    )


def _modules(values: Iterable[str], bias: str, adapted: Collection[str]) -> set[str]:
    """Returns the modules (or lone biases) trained in full, for `LoRAConfig.train`.

    Biases that ``bias`` already trains are left out.
    """
    owners = set()
    for path in values:
        module, _, leaf = path.rpartition("/")
        if leaf != BIAS:
            owners.add(module)
        elif bias == "none":
            owners.add(path if module in adapted else module)
    return owners
