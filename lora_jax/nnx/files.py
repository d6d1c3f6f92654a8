"""Adapters of NNX models in files: the folders of the Linen side, and PEFT's.

A folder holds the same bytes whichever API trained it, if the paths are the same.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from lora_jax.array_types import PyTree
from lora_jax.config import LoRAConfig
from lora_jax.files import adapter as folders
from lora_jax.interop.external import ExternalAdapter
from lora_jax.interop.peft import read_peft, write_peft
from lora_jax.names import BIAS, FROZEN, LORA, PARAMS
from lora_jax.nnx.adapt import adapt_with, lora_targets, no_values
from lora_jax.nnx.external import from_external, from_tree, to_external
from lora_jax.nnx.find import adapted_layers, find_layers, other_sites
from lora_jax.nnx.full import Names, to_full
from lora_jax.nnx.functional import functional, update
from lora_jax.tree.fingerprint import fingerprint
from lora_jax.tree.paths import flatten, unflatten
from lora_jax.tree.plain import plain_targets, plain_variables


def save_adapter(
    directory: str | os.PathLike[str],
    model: nnx.Module,
    *,
    extra: Mapping[str, Any] | None = None,
) -> int:
    """Saves what was trained, and nothing of the base; see `lora_jax.save_adapter`.

    Args:
      directory: made if absent; an adapter there is replaced.
      model: a model with adapters.
      extra: JSON values to keep beside.

    Returns:
      The size of the tensors' file in bytes.

    Raises:
      ValueError: if the model has no adapters, those of several configs, or one that
        is not finite.
    """
    config, variables = config_of(model), functional(model)[1]
    base = fingerprint(variables[FROZEN])
    return folders.save_adapter(directory, variables, config, base, extra=extra)


def load_adapter(
    directory: str | os.PathLike[str],
    model: nnx.Module,
    *,
    rngs: nnx.Rngs | None = None,
    stack_axis: int | None = None,
) -> Any:
    """Loads an adapter that `save_adapter` wrote, of this API or the Linen side's.

    Args:
      directory: the folder.
      model: the base that it was trained on, not changed; or a model with adapters of
        the same config, such as one of LoRA layers, which is given the values.
      rngs: the stream of adapter dropout; None disables it.
      stack_axis: as for `lora_jax.nnx.adapt`.

    Returns:
      The model with the adapter.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if a file is damaged, base or config is another one, or the tensors
        don't fit the model; one error names all of them.
    """
    config = LoRAConfig.from_dict(folders.read_adapter_config(directory)["lora"])
    if not adapted_layers(model):
        adapted = adapt_with(no_values, model, config, rngs=rngs, stack_axis=stack_axis)
    elif config_of(model) == config:
        adapted = model
    else:
        raise ValueError(
            f"the adapters of the model and of {directory} must have one config; got "
            f"{config_of(model)} and {config}."
        )
    expected = functional(adapted)[1]
    mark = fingerprint(expected[FROZEN])
    found = folders.load_adapter(directory, expected=expected, fingerprint=mark)
    update(adapted, found.variables)
    return adapted


def export_adapter(
    directory: str | os.PathLike[str],
    model: nnx.Module,
    names: Names | None = None,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
) -> Path:
    """Writes the adapters of a model as a folder that PEFT loads.

    Args:
      directory: made if absent; an adapter there is replaced.
      model: a model with adapters.
      names: the Hugging Face module of each adapted layer, ``{pattern: name}``. A
        pattern is a regular expression for the whole path, and ``\\1`` in the name
        its first group; ``{}`` in the name of stacked layers is the layer's number. A
        layer that Hugging Face has in equal parts (key and value) takes a list of
        names, by the first axes of its output; experts the parameter's name,
        ``…experts.down_proj``. Default: the path, with dots.
      base_model: the base that the file names.
      task_type: PEFT's, such as ``"CAUSAL_LM"``.

    Returns:
      The folder.

    Raises:
      ValueError: if a layer has no name or no form in PEFT (grouped convolutions, DoRA
        of experts, a weight trained beside its adapter), or is not finite; one error
        names all.
    """
    config, targets = config_of(model), lora_targets(model)
    variables = plain_variables(functional(model)[1], targets)
    leaves, targets = flatten(variables[LORA]), plain_targets(targets, config)
    modules, faults = to_external(targets, leaves, names, rslora=config.rslora)
    trained = flatten(variables.get(PARAMS, {}))
    full, wrong = to_full(
        [*targets, *other_sites(model)],
        {**flatten(variables[FROZEN]), **trained},
        trained,
        {target.path for target in targets},
        config,
        names,
    )
    if faults := faults + wrong:
        raise ValueError(f"the adapter can't be exported: {'; '.join(faults)}.")
    experts = sorted(name for name, factors in modules.items() if factors.is_experts)
    adapter = ExternalAdapter(
        modules,
        full,
        rslora=config.rslora,
        dropout_rate=0.0 if experts else config.dropout_rate,  # PEFT has none there
        bias=config.bias,
    )
    is_beside = config.bias != "none"
    saved = {n.rpartition(".")[0] for n in full if not (is_beside and n.endswith(BIAS))}
    settings = {
        "base_model_name_or_path": base_model,
        "modules_to_save": sorted(saved) or None,
        "target_modules": sorted({*modules} - {*experts}),
        **({"target_parameters": experts} if experts else {}),
        "task_type": task_type,
    }
    return write_peft(directory, adapter, settings)


def load_peft(
    directory: str | os.PathLike[str],
    model: nnx.Module,
    names: Names | None = None,
    *,
    rngs: nnx.Rngs | None = None,
    stack_axis: int | None = None,
) -> Any:
    """Puts an adapter that PEFT wrote on a model.

    Args:
      directory: PEFT's folder.
      model: the base without adapters; not changed.
      names: as for `export_adapter`.
      rngs: the stream of adapter dropout; None disables it.
      stack_axis: as for `lora_jax.nnx.adapt`.

    Returns:
      The model with the adapter.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if the folder is damaged, or has modules that the model lacks, of
        other shapes; one error lists all.
    """
    adapter = read_peft(directory)
    found = find_layers(model, LoRAConfig(), stack_axis)
    config, lora, full = from_external(adapter, found.sites, found.weights, names)
    adapted = adapt_with(no_values, model, config, rngs=rngs, stack_axis=stack_axis)
    own = flatten(functional(adapted)[1].get(PARAMS, {}))
    full = {p: x.astype(own[p].dtype) if p in own else x for p, x in full.items()}
    update(adapted, {LORA: lora, PARAMS: unflatten(full)})
    return adapted


def config_of(model: nnx.Module) -> LoRAConfig:
    """Returns the one config of a model's adapters."""
    configs = {layer.lora.config for layer in adapted_layers(model).values()}
    if len(configs) != 1:
        raise ValueError(
            f"{type(model).__name__} must have adapters of one LoRAConfig; it has "
            f"those of {len(configs)}."
        )
    return configs.pop()


def load_factors(
    tree: PyTree,
    model: nnx.Module,
    *,
    alpha: float | None = None,
    rngs: nnx.Rngs | None = None,
) -> Any:
    """Puts an adapter that qwix, tunix or gemma.peft trained on a model.

    Args:
      tree: its arrays, or a `flax.nnx.State`: ``<weight>_lora_a`` and
        ``<weight>_lora_b`` (qwix, tunix), or ``lora/a`` and ``lora/b`` (gemma.peft).
      model: the base without adapters; not changed.
      alpha: of qwix's rule, which its arrays don't hold; None for a scaling of 1, as
        gemma.peft's.
      rngs: the stream of adapter dropout; None disables it.

    Returns:
      The model with the adapter.

    Raises:
      ValueError: listing every array that doesn't fit a layer of the model.
    """
    tree = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
    sites = find_layers(model, LoRAConfig()).sites
    config, lora = from_tree(tree, sites, alpha)
    adapted = adapt_with(no_values, model, config, rngs=rngs)
    update(adapted, {LORA: lora})
    return adapted
