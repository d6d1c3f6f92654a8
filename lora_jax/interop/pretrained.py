"""`load_model`: pretrained models, with or without adapters."""

import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.array_types import PRNGKey
from lora_jax.config import LoRAConfig
from lora_jax.files import adapter as ours
from lora_jax.files.json_file import read_json
from lora_jax.interop.adapter_folder import find_adapter
from lora_jax.interop.attach import attach_adapter
from lora_jax.interop.external import ADAPTER_CONFIG, ExternalAdapter
from lora_jax.interop.identity import check_not_merged
from lora_jax.interop.mlx import read_mlx
from lora_jax.interop.peft import read_peft
from lora_jax.interop.tied import needs_own_head
from lora_jax.models.added_tokens import ADDED, new_tokens
from lora_jax.models.load import Sharding, load_base
from lora_jax.models.loaded import LoadedModel
from lora_jax.models.source import open_source
from lora_jax.models.stacking import unscan
from lora_jax.models.tokens import localize
from lora_jax.names import (
    CLASSIFIER,
    FIXED,
    FROZEN,
    HEAD,
    KERNEL,
    LAYERS,
    PARAMS,
    SAVED,
)
from lora_jax.nn.adapt import Adapted, adapt
from lora_jax.parallel.rules import shard_variables
from lora_jax.tree.fingerprint import fingerprint
from lora_jax.tree.partition import join, partition
from lora_jax.tree.paths import unflatten
from lora_jax.tree.plain import plain_config, plain_variables
from lora_jax.tree.targets import child

FLOATS = ("float32", "bfloat16", "float16")  # dtypes a base may have been cast to


def load_model(
    path: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | ExternalAdapter | None = None,
    lora: LoRAConfig | None = None,
    *,
    num_labels: int | None = None,
    pooling: str | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    sharding: Sharding = None,
    scan_layers: bool | None = None,
    remat: str = "none",
    key: PRNGKey | None = None,
    add_tokens: Sequence[str] = (),
) -> LoadedModel:
    """Loads a pretrained model, tensor by tensor.

    Args:
      path: a Hugging Face folder (``config.json`` and safetensors), a GGUF file, one of
        these in an installed Python package (``"package:NAME/path"``), or a hub id.
        None: the model that ``adapter`` was trained on, as recorded when it was saved
        (``"model"`` in its ``extra``); for another tool's adapter, its
        ``base_model_name_or_path`` if that is a local folder.
      adapter: a run folder, an adapter folder of ours, PEFT's or mlx-lm's (detected by
        content), or an `ExternalAdapter`, to attach to the model. Adapter dropout is
        off (``module.clone(deterministic=None)`` for training).
      lora: attaches fresh adapters; needs ``key``. Names may be Hugging Face's, such as
        ``k_proj``, see `translate_names`; ``tokens`` may be the tokenizer's.
      num_labels: classes of an encoder's head. If the file holds a head with as many
        classes for the same pooling, it is loaded; otherwise a new one is made. None:
        the file's head if it has one for this pooling, else no head.
      pooling: of an encoder: "mean", "cls", "pooler" or "cls_mean" (see `Classifier`);
        None for the one that the file was made with. Without one and without a head,
        embeddings are what a folder of sentence-transformers says (modules.json).
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters; None for the one that an adapter of ours was
        trained in (``"param_dtype"`` in its ``extra``), else the file's own. A new head
        and everything that an adapter or ``lora`` trains in full is float32, see
        `Adapted.upcast_trained`.
      sharding: where the parameters go: a `jax.sharding.Sharding`, or a function from a
        leaf's path and shape to one, such as `make_sharding` returns. Adapters follow
        the weights they adapt: A like the input axes, B like the output axes.
      scan_layers: of a decoder: whether its blocks are one `nn.scan`. None: as an
        adapter of ours was trained, else False. False also splits an adapter that was
        trained on scanned blocks, see `unscan`.
      remat: of a decoder: what the backward pass recomputes, "none", "lora" or "block"
        (see `Decoder`).
      key: PRNG key for a new head, normal with standard deviation 0.02 (zero without a
        key), and for fresh adapters.
      add_tokens: of a decoder: new tokens for its tokenizer and its embedding (and
        head), whose rows are the mean of the others. A fresh adapter trains them; an
        adapter that was trained on some brings them itself (PEFT's, if its folder has
        the tokenizer).

    Returns:
      The module, its variables, config and tokenizer, and where they came from.

    Raises:
      FileNotFoundError: if there is no such model or adapter.
      ValueError: if ``path`` is None and the adapter names no model; if the model type
        is unknown, the config doesn't fit, or tensors are missing, unexpected, wrongly
        shaped or not finite; if the adapter is damaged, was made for another base, or
        was trained on unrolled blocks and ``scan_layers=True``; if both ``adapter`` and
        ``lora`` are given, or ``lora`` without ``key``.
    """
    if adapter is not None and lora is not None:
        raise ValueError(
            "adapter and lora must not both be given; an adapter brings its own config."
        )
    if lora is not None and key is None:
        raise ValueError("key must be a PRNG key when lora is given; got None.")
    options: dict[str, Any] = {
        "num_labels": num_labels,
        "pooling": pooling,
        "dtype": dtype,
        "param_dtype": param_dtype,
        "sharding": sharding,
        "scan_layers": scan_layers,
        "remat": remat,
        "key": key,
        "add_tokens": add_tokens,
    }
    return _load(path, adapter, lora, options, load_base)


def load_each(
    path: str | os.PathLike[str] | None,
    adapters: Mapping[str, str | os.PathLike[str]],
    **options: Any,
) -> dict[str, LoadedModel]:
    """Loads a base once, with each of several adapters.

    Args:
      path: see `load_model`.
      adapters: folders, by name.
      **options: of `load_model`.

    Returns:
      The model with each adapter; they share the base's arrays.
    """
    known: dict[str, LoadedModel] = {}

    def load(path: str | os.PathLike[str], **options: Any) -> LoadedModel:
        options["add_tokens"] = tuple(options["add_tokens"])
        asked = f"{path} {sorted(options.items())}"
        if asked not in known:
            known[asked] = load_base(path, **options)
        return known[asked]

    defaults = inspect.getfullargspec(load_model).kwonlydefaults or {}
    return {
        name: _load(path, folder, None, {**defaults, **options}, load)
        for name, folder in adapters.items()
    }


def _load(
    path: str | os.PathLike[str] | None,
    adapter: str | os.PathLike[str] | ExternalAdapter | None,
    lora: LoRAConfig | None,
    options: dict[str, Any],
    load: Callable[..., LoadedModel],
) -> LoadedModel:
    """Loads a model for `load_model`; ``load`` is `load_base`, or remembers bases."""
    if adapter is None:
        if path is None:
            raise ValueError("path must name a model unless an adapter does; got None.")
        loaded = load(path, **options)
    elif isinstance(adapter, ExternalAdapter):
        path = find_base(adapter) if path is None else path
        loaded = _load_external(path, adapter, options, load)
    else:
        folder = find_adapter(adapter)
        external = read_external(folder)
        if path is None:
            path = find_base(folder if external is None else external)
        source = open_source(path)
        config = {} if external is None else external.config
        check_not_merged(source.settings, source.path, folder, config)
        if external is None:
            loaded = _load_own(path, folder, options, load)
        else:
            if (external.tokens or external.full) and not options["add_tokens"]:
                options["add_tokens"] = new_tokens(folder, source)
            loaded = _load_external(path, external, options, load)
    if lora is not None:
        lora = localize(lora, loaded)
        adapted = adapt(loaded.module, lora, *loaded.inputs)
        variables = adapted.attach(loaded.params, options["key"])
        loaded = loaded._replace(module=adapted, variables=variables)
    sharding: Sharding = options["sharding"]
    if callable(sharding) and isinstance(loaded.module, Adapted):
        targets = loaded.module.targets(loaded.params)
        variables = shard_variables(loaded.variables, sharding, targets)
        loaded = loaded._replace(variables=variables)
    return loaded


def find_base(adapter: Path | ExternalAdapter) -> str:
    """Returns the base that an adapter names.

    Args:
      adapter: a folder of ours, or an adapter of another tool.

    Raises:
      ValueError: if it names none, or for an adapter of another tool, if that is not a
        folder on this machine.
    """
    if isinstance(adapter, ExternalAdapter):
        base = adapter.config.get("base_model_name_or_path")
        if isinstance(base, str) and Path(base).is_dir():
            return base
        raise ValueError(
            f"path must name the base of {adapter.origin}, an adapter of another tool: "
            f"the base that it names, {base!r}, is not a folder here. On the command "
            "line, add --model."
        )
    base = ours.read_adapter_config(adapter)["extra"].get("model")
    if base is None:
        raise ValueError(
            f"path must name the base of {adapter}; the adapter doesn't say which "
            "model it was trained on. On the command line, add --model."
        )
    return base


def read_external(folder: Path) -> ExternalAdapter | None:
    """Reads another tool's adapter folder; returns None if it is one of ours.

    Unknown keys of a PEFT config raise a warning.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if a file is damaged or not supported.
    """
    settings = read_json(folder / ADAPTER_CONFIG)
    if "fine_tune_type" in settings or "lora_parameters" in settings:
        return read_mlx(folder)
    if "peft_type" not in settings:
        return None
    found = read_peft(folder)
    if found.unknown:
        warnings.warn(
            f"{folder / ADAPTER_CONFIG} has unknown keys, which are ignored: "
            f"{', '.join(found.unknown)}.",
            stacklevel=3,
        )
    return found


def _load_external(
    path: str | os.PathLike[str],
    adapter: ExternalAdapter,
    options: dict[str, Any],
    load: Callable[..., LoadedModel],
) -> LoadedModel:
    """Loads a base, with the adapter's head if it has one, and attaches the adapter."""
    family = open_source(path).family
    if adapter.full:
        head = adapter.full.get(f"{family.modules.get(CLASSIFIER)}.weight")
        if head is not None:
            given = {k: options[k] for k in ("num_labels", "pooling")}
            found = {"num_labels": len(head), "pooling": family.head_pooling}
            options |= {k: found[k] if v is None else v for k, v in given.items()}
    own_head = needs_own_head(adapter, family)
    return attach_adapter(load(path, **options, own_head=own_head), adapter)


def _load_own(
    path: str | os.PathLike[str],
    folder: Path,
    options: dict[str, Any],
    load: Callable[..., LoadedModel],
) -> LoadedModel:
    """Loads a base and, strictly, an adapter that this library saved."""
    found, file = ours.load_adapter(folder), folder / ADAPTER_CONFIG
    head = found.variables.get(PARAMS, {}).get(CLASSIFIER)
    if (head or found.extra.get("pooling")) and not open_source(path).family.head:
        raise ValueError(
            f"the adapter in {folder} must be attached to the encoder that it was "
            f"trained on; {path} is a decoder."
        )
    if options["num_labels"] is None and head and KERNEL in head:
        # bias="all" trains the bias of a head alone.
        options["num_labels"] = head[KERNEL].shape[-1]
    options["pooling"] = options["pooling"] or found.extra.get("pooling")
    if options["param_dtype"] is None:
        kept = found.extra.get("param_dtype")
        if kept not in (None, *FLOATS):
            raise ValueError(
                f"{file}: param_dtype of extra must be null or one of {FLOATS}; got "
                f"{kept!r}."
            )
        options["param_dtype"] = kept
    options["add_tokens"] = _added(found, file, options["add_tokens"])
    asked = options["scan_layers"]
    was_scanned = any(LAYERS in tree for tree in found.variables.values())
    if asked and not was_scanned:
        raise ValueError(
            f"scan_layers must be False or None for {folder}, which was trained on "
            "blocks without nn.scan; got True."
        )
    options = {**options, "scan_layers": was_scanned}
    has_head = any(HEAD in tree for tree in found.variables.values())
    loaded = load(path, **options, own_head=has_head)
    adapted, wanted = _fitting(loaded, found)
    is_tied = getattr(loaded.config, "is_tied", False)
    if is_tied and fingerprint(wanted[FROZEN]) != found.fingerprint:
        # It may adapt the lookup alone; then the head has its own kernel.
        apart = load(path, **options, own_head=True)
        pair = _fitting(apart, found)
        if fingerprint(pair[1][FROZEN]) == found.fingerprint:
            loaded, (adapted, wanted) = apart, pair
    found = ours.load_adapter(
        folder,
        expected={name: wanted.get(name, {}) for name in SAVED},
        fingerprint=fingerprint(wanted[FROZEN]),
    )
    variables = {FROZEN: wanted[FROZEN], **found.variables}
    if FIXED in variables:  # of a method: the same update as plain LoRA
        variables = plain_variables(variables, adapted.targets(loaded.params))
        plain = plain_config(found.config)
        adapted = adapt(loaded.module, plain, *loaded.inputs, deterministic=True)
    loaded = loaded._replace(module=adapted, variables=variables, extra=found.extra)
    return unscan(loaded) if asked is False else loaded


def _added(found: ours.Adapter, file: Path, given: Sequence[str]) -> list[str]:
    """Returns the new tokens that an adapter of ours was trained on."""
    kept = found.extra.get(ADDED, [])
    is_list = isinstance(kept, list) and all(isinstance(token, str) for token in kept)
    if not is_list or (given and list(given) != kept):
        raise ValueError(
            f"{file}: {ADDED} of extra must be a list of strings, which add_tokens, if "
            f"it is given, repeats; got {kept!r}, and {list(given)}."
        )
    return kept


def _fitting(loaded: LoadedModel, found: ours.Adapter) -> tuple[Adapted, dict]:
    """Returns an adapter's model, and the shapes that its variables must have."""
    adapted = adapt(loaded.module, found.config, *loaded.inputs, deterministic=True)
    shapes = {  # not arrays: the config may claim any rank
        child(target.path, name): jax.ShapeDtypeStruct(shape, jnp.float32)
        for target in adapted.targets(loaded.params)
        for name, shape in target.leaf_shapes.items()
    }
    shapes |= {
        rows.leaf_path: jax.ShapeDtypeStruct(rows.shape, jnp.float32)
        for rows in adapted.token_rows(loaded.params)
    }
    wanted = partition(join(loaded.params, unflatten(shapes)), found.config)
    return adapted, adapted.upcast_trained(wanted)
