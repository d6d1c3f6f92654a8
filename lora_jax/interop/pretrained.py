"""`load_model`: one door to pretrained models, with or without adapters."""

import os
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.array_types import PRNGKey
from lora_jax.config import LoRAConfig
from lora_jax.files import adapter as ours
from lora_jax.files.json_file import read_json
from lora_jax.interop.attach import put_adapter
from lora_jax.interop.external import ExternalAdapter
from lora_jax.interop.mlx import read_mlx
from lora_jax.interop.peft import read_peft
from lora_jax.models.load import HEAD, SCANNED, LoadedModel, Sharding, load_base
from lora_jax.models.source import open_source
from lora_jax.models.unscan import unscan
from lora_jax.names import FROZEN, KERNEL, PARAMS, TRAINABLE
from lora_jax.nn.adapt import Adapted, adapt
from lora_jax.parallel.rules import shard_variables
from lora_jax.tree.fingerprint import fingerprint
from lora_jax.tree.partition import join, partition
from lora_jax.tree.paths import unflatten
from lora_jax.tree.targets import child

RUN_ADAPTER = "adapter"  # the adapter's folder in a run folder
FLOATS = ("float32", "bfloat16", "float16")  # what a base may have been cast to


def load_model(
    path: str | os.PathLike[str],
    adapter: str | os.PathLike[str] | ExternalAdapter | None = None,
    lora: LoRAConfig | None = None,
    *,
    num_labels: int | None = None,
    pooling: str | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    sharding: Sharding = None,
    is_scanned: bool | None = None,
    remat: str = "none",
    key: PRNGKey | None = None,
) -> LoadedModel:
    """Loads a pretrained model, tensor by tensor.

    Args:
      path: a Hugging Face folder (``config.json`` and safetensors), a GGUF file, one of
        these in an installed Python package (``"package:NAME/path"``), or a hub id.
      adapter: a run folder, an adapter folder of ours, of PEFT or of mlx-lm, told apart
        by their contents, or a `ExternalAdapter`; its adapters are put on the model.
        Dropout of adapters is off (``module.clone(deterministic=None)`` for training).
      lora: puts fresh adapters on the model; needs ``key``.
      num_labels: classes of an encoder's head. If the file holds a head of as many
        classes for the same pooling, it is loaded; else a new one is made. None: the
        file's head if it has one for this pooling, else no head.
      pooling: of an encoder: "mean", "cls", "pooler" or "cls_mean" (see `Classifier`);
        None for what the file was made with.
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters; None for that which an adapter of ours says
        it was trained in (``"param_dtype"`` of its ``extra``), else the file's own. A
        new head is float32, and so becomes what an adapter or ``lora`` trains in full,
        see `Adapted.upcast_trained`.
      sharding: where the parameters go: a `jax.sharding.Sharding`, or a function of a
        leaf's path and shape that returns one, as `make_sharding` makes it. Adapters go
        where the weights they adapt are: A like the input axes, B like the output axes.
      is_scanned: of a decoder: whether its blocks are one `nn.scan`. None: as an
        adapter of ours was trained, else not. False also takes apart an adapter that
        was trained on scanned blocks, see `unscan`.
      remat: of a decoder: what the backward pass computes again, "none", "lora" or
        "block" (see `Decoder`).
      key: PRNG key of a new head, normal with standard deviation 0.02 (without a key it
        is zero), and of fresh adapters.

    Returns:
      The module, its variables, config and tokenizer, and where they came from.

    Raises:
      FileNotFoundError: if there is no such model or adapter.
      ValueError: if the model type is unknown, the config doesn't fit, tensors are
        missing, unexpected, mis-shaped or not finite; if the adapter is damaged or was
        made on another base, or on single blocks and ``is_scanned``; if both
        ``adapter`` and ``lora`` are given, or ``lora`` without ``key``.
    """
    if adapter is not None and lora is not None:
        raise ValueError(
            "adapter and lora must not both be given; an adapter brings its own config."
        )
    if lora is not None and key is None:
        raise ValueError("key must be a PRNG key where lora is given; got None.")
    options: dict[str, Any] = {
        "dtype": dtype,
        "param_dtype": param_dtype,
        "sharding": sharding,
        "is_scanned": bool(is_scanned),
        "remat": remat,
        "key": key,
    }
    if isinstance(adapter, ExternalAdapter):
        loaded = _load_foreign(path, adapter, num_labels, pooling, options)
        return _placed(loaded, sharding)
    if adapter is not None:
        folder = find_adapter(adapter)
        if (foreign := read_external(folder)) is not None:
            loaded = _load_foreign(path, foreign, num_labels, pooling, options)
        else:
            own = {**options, "is_scanned": is_scanned}
            loaded = _load_ours(path, folder, num_labels, pooling, own)
        return _placed(loaded, sharding)
    loaded = load_base(path, num_labels=num_labels, pooling=pooling, **options)
    if lora is None or key is None:
        return loaded
    adapted = adapt(loaded.module, lora, *loaded.inputs)
    variables = adapted.attach(loaded.params, key)
    loaded = loaded._replace(module=adapted, variables=variables)
    return _placed(loaded, sharding)


def find_adapter(path: str | os.PathLike[str]) -> Path:
    """Returns the adapter folder that a path means: itself, or that of a run folder.

    Args:
      path: an adapter folder or a run folder, told apart by their contents.

    Returns:
      The folder with ``adapter_config.json``.

    Raises:
      FileNotFoundError: if it is neither.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"no adapter at {folder}: there is no such folder.")
    inside = folder / RUN_ADAPTER
    for candidate in (folder, inside):
        if (candidate / ours.CONFIG).is_file():
            return candidate
    raise FileNotFoundError(
        f"{folder} is neither a run folder nor an adapter folder: it has no "
        f"{ours.CONFIG}."
    )


def read_external(folder: Path) -> ExternalAdapter | None:
    """Reads an adapter folder of another tool; None if it is not one.

    Args:
      folder: with ``adapter_config.json``.

    Returns:
      The adapter. Keys of a PEFT config that nobody here knows are warned of.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if a file is damaged or can't be understood.
    """
    settings = read_json(folder / ours.CONFIG)
    if "fine_tune_type" in settings or "lora_parameters" in settings:
        return read_mlx(folder)
    if "peft_type" not in settings:
        return None
    found = read_peft(folder)
    if found.unknown:
        warnings.warn(
            f"{folder / ours.CONFIG} has keys that are not known here and have no "
            f"effect: {', '.join(found.unknown)}.",
            stacklevel=3,
        )
    return found


def _placed(loaded: LoadedModel, sharding: Sharding) -> LoadedModel:
    """Puts adapters where the weights are that they adapt."""
    if not callable(sharding) or not isinstance(loaded.module, Adapted):
        return loaded
    targets = loaded.module.targets(loaded.params)
    return loaded._replace(
        variables=shard_variables(loaded.variables, sharding, targets)
    )


def _load_foreign(
    path: str | os.PathLike[str],
    adapter: ExternalAdapter,
    num_labels: int | None,
    pooling: str | None,
    options: dict[str, Any],
) -> LoadedModel:
    """Loads a base, with the head that the adapter brings, and puts the adapter on."""
    if adapter.full:
        family = open_source(path).family
        head = adapter.full.get(f"{family.modules.get(HEAD)}.weight")
        if head is not None:
            num_labels = len(head) if num_labels is None else num_labels
            pooling = family.head_pooling if pooling is None else pooling
    loaded = load_base(path, num_labels=num_labels, pooling=pooling, **options)
    return put_adapter(loaded, adapter)


def _load_ours(
    path: str | os.PathLike[str],
    folder: Path,
    num_labels: int | None,
    pooling: str | None,
    options: dict[str, Any],
) -> LoadedModel:
    """Loads a base and, strictly, an adapter that this library saved."""
    found = ours.load_adapter(folder)
    head = found.variables.get(PARAMS, {}).get(HEAD)
    if num_labels is None and head and KERNEL in head:  # "all" trains its bias alone
        num_labels = head[KERNEL].shape[-1]
    pooling = pooling or found.extra.get("pooling")
    param_dtype, kept = options["param_dtype"], found.extra.get("param_dtype")
    if param_dtype is None:
        if kept not in (None, *FLOATS):
            raise ValueError(
                f"{folder / ours.CONFIG}: param_dtype of extra must be null or one of "
                f"{FLOATS}; got {kept!r}."
            )
        param_dtype = kept
    was_scanned = any(SCANNED in tree for tree in found.variables.values())
    is_scanned = options["is_scanned"]
    if is_scanned and not was_scanned:
        raise ValueError(
            f"is_scanned must be False or None for {folder}, which was trained on "
            "blocks that are no nn.scan; got True."
        )
    options = {**options, "param_dtype": param_dtype, "is_scanned": was_scanned}
    loaded = load_base(path, num_labels=num_labels, pooling=pooling, **options)
    adapted = adapt(loaded.module, found.config, *loaded.inputs, deterministic=True)
    shapes = {  # no arrays: the config may lie about ranks
        child(target.path, name): jax.ShapeDtypeStruct(shape, jnp.float32)
        for target in adapted.targets(loaded.params)
        for name, shape in target.leaf_shapes.items()
    }
    wanted = partition(join(loaded.params, unflatten(shapes)), found.config)
    wanted = adapted.upcast_trained(wanted)
    found = ours.load_adapter(
        folder,
        expected={name: wanted.get(name, {}) for name in TRAINABLE},
        fingerprint=fingerprint(wanted[FROZEN]),
    )
    variables = {FROZEN: wanted[FROZEN], **found.variables}
    loaded = loaded._replace(module=adapted, variables=variables)
    return unscan(loaded) if is_scanned is False else loaded
