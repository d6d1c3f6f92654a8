"""Pretrained models from Hugging Face folders, GGUF files, packages and the hub.

Strict: a model is loaded whole or not at all, and one error lists every tensor that is
missing, unexpected, mis-shaped, or not finite. What differs between model families is
in `Family` alone. Tensors are read one by one, straight to their dtype and devices: the
host never holds a second copy of the model.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.array_types import PRNGKey, PyTree
from lora_jax.io.tokenizer import Tokenizer, load_tokenizer
from lora_jax.models.family import Family, config_of
from lora_jax.models.source import CONFIG, Source, open_source
from lora_jax.names import FROZEN, KERNEL, PARAMS
from lora_jax.parallel.mesh import put_array
from lora_jax.parallel.rules import resolve_shardings
from lora_jax.tree.partition import join

OURS = "lora_jax"  # the key of config.json that holds what Hugging Face has no word for
HEAD = "classifier"
SCANNED = "layers"

Leaf = tuple[str, ...]  # a leaf's path
Sharding = jax.sharding.Sharding | Callable[[str, tuple[int, ...]], Any] | None


class LoadedModel(NamedTuple):
    """A pretrained model in memory.

    Attributes:
      module: the Linen module; ``module.apply(variables, ...)``.
      variables: ``{"params": ...}``, or, with an adapter or a `LoRAConfig`, the
        collections ``frozen``, ``lora`` and ``params``.
      config: the module's config.
      tokenizer: the model's tokenizer; None where it has none.
      path: the folder or file that was read.
      family: how Hugging Face names what is in it.
      unused: names of tensors in the file that the module has no use for.
      new: paths of parameters that were not in the file and were made here (a head).
    """

    module: nn.Module
    variables: dict[str, PyTree]
    config: Any
    tokenizer: Tokenizer | None
    path: Path
    family: Family
    unused: tuple[str, ...] = ()
    new: tuple[str, ...] = ()

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Shapes of one example's inputs."""
        return self.family.inputs(self.config)

    @property
    def params(self) -> dict[str, PyTree]:
        """The base's parameters, a plain nested dictionary."""
        return join(self.variables.get(FROZEN, {}), self.variables.get(PARAMS, {}))


def load_base(
    path: str | os.PathLike[str],
    *,
    num_labels: int | None = None,
    pooling: str | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    sharding: Sharding = None,
    is_scanned: bool = False,
    remat: str = "none",
    key: PRNGKey | None = None,
) -> LoadedModel:
    """Loads a pretrained model without adapters; the arguments are `load_model`'s."""
    source = open_source(path)
    config = source.family.read_config(source.settings)
    fresh_head: tuple[str, ...] = ()
    if not source.family.head:
        refused = [
            n for n, v in (("num_labels", num_labels), ("pooling", pooling)) if v
        ]
        if refused:
            raise ValueError(
                f"{' and '.join(refused)} must not be given for a decoder; {path} is a "
                f"{source.settings['model_type']}, whose head predicts tokens."
            )
        options: dict[str, Any] = {"is_scanned": is_scanned, "remat": remat}
    else:
        own_pooling, own_labels = _own_head(source)
        pooling = own_pooling if pooling is None else pooling
        if pooling != own_pooling:
            own_labels = None
        num_labels = own_labels if num_labels is None else num_labels
        if num_labels != own_labels:
            fresh_head = _missing_head(source)
        options = {"num_labels": num_labels, "pooling": pooling}

    module = source.family.module(config, dtype=dtype, **options)
    expected = param_shapes(source.family, module)
    places: Mapping[Leaf, Any] = dict.fromkeys(expected, sharding)
    if callable(sharding):
        shapes = {"/".join(leaf): shape for leaf, shape in expected.items()}
        found = resolve_shardings(shapes, sharding)
        places = {leaf: found["/".join(leaf)] for leaf in expected}
    fresh = [leaf for leaf in expected if leaf[0] in fresh_head]
    flat, unused = _read(
        source,
        {leaf: shape for leaf, shape in expected.items() if leaf not in fresh},
        lambda leaf, array: _place(array, param_dtype, places[leaf]),
    )
    for leaf in fresh:
        new = np.zeros(expected[leaf], np.float32)
        if key is not None and leaf[-1] == KERNEL:
            own_key = key if leaf[0] == HEAD else jax.random.fold_in(key, 1)
            new = 0.02 * jax.random.normal(own_key, expected[leaf], jnp.float32)
        flat[leaf] = _place(new, param_dtype, places[leaf])
    return LoadedModel(
        module=module,
        variables={PARAMS: flax.traverse_util.unflatten_dict(flat)},
        config=config,
        tokenizer=load_tokenizer(source.path),
        path=source.path,
        family=source.family,
        unused=tuple(unused),
        new=tuple("/".join(leaf) for leaf in fresh),
    )


def param_shapes(family: Family, module: nn.Module) -> dict[Leaf, tuple[int, ...]]:
    """Shapes of a model's parameters by path, from tracing; nothing is computed.

    Args:
      family: the model's family.
      module: the model; it has a ``config``.

    Returns:
      The shape of each leaf.
    """
    inputs = family.inputs(config_of(module))
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)[PARAMS]
    flat: dict[Any, Any] = flax.traverse_util.flatten_dict(params)
    return {leaf: array.shape for leaf, array in flat.items()}


def _own_head(source: Source) -> tuple[str, int | None]:
    """The pooling that a folder's weights were made with, and its head's classes."""
    name = source.family.tensor_name((HEAD, KERNEL))
    has_head = name in source.names
    labels = source.shape(name)[0] if has_head else None
    ours = source.settings.get(OURS)
    if isinstance(ours, dict) and "pooling" in ours:
        return ours["pooling"], labels
    return source.family.head_pooling if has_head else "mean", labels


def _missing_head(source: Source) -> tuple[str, ...]:
    """The modules of a head that are made anew for other classes than a file's."""
    absent = (
        path
        for path in source.family.head
        if source.family.tensor_name((path, KERNEL)) not in source.names
    )
    return (HEAD, *absent)


def _place(array: Any, dtype: Any, sharding: Any) -> jax.Array:
    """Puts one leaf where it belongs, in its dtype."""
    dtype = array.dtype if dtype is None else dtype
    if sharding is None:
        return jnp.asarray(array, dtype)
    return put_array(array.astype(dtype), sharding)


def unscanned(leaf: Leaf, shape: tuple[int, ...]) -> list[Leaf]:
    """The leaves of single layers that a scanned leaf stacks; itself if it is not one.

    Args:
      leaf: a path.
      shape: its shape; the first axis of a scanned leaf is the layers'.

    Returns:
      One path a layer.

    Example:
      >>> unscanned(("layers", "mlp", "up", "kernel"), (2, 3, 4))[1]
      ('layer_1', 'mlp', 'up', 'kernel')
    """
    if leaf[0] != SCANNED:
        return [leaf]
    return [(f"layer_{i}", *leaf[1:]) for i in range(shape[0])]


def _read(
    source: Source,
    expected: Mapping[Leaf, tuple[int, ...]],
    place: Callable[[Leaf, np.ndarray], jax.Array],
) -> tuple[dict[Leaf, jax.Array], list[str]]:
    """Reads every expected leaf; gathers the faults of all of them, raises once."""
    family, names = source.family, source.names
    wanted = {
        leaf: [family.tensor_name(single) for single in unscanned(leaf, shape)]
        for leaf, shape in expected.items()
    }
    used = dict.fromkeys(name for singles in wanted.values() for name in singles)
    left = [name for name in names if name not in used]
    unused = [names[name] for name in left if family.is_unused(name)]
    faults = [f"missing: {name}" for name in used if name not in names]
    faults += [
        f"unexpected: {names[name]} {list(source.shape(name))}"
        for name in left
        if not family.is_unused(name)
    ]
    for leaf, singles in wanted.items():
        own = expected[leaf][1:] if leaf[0] == SCANNED else expected[leaf]
        shape = family.file_shape(leaf[-1], own)
        faults += [
            f"shape: {names[n]} must be {list(shape)}; got {list(source.shape(n))}"
            for n in singles
            if n in names and source.shape(n) != shape
        ]
    flat = {}
    for leaf, singles in wanted.items():
        whole: Any = None
        for i, name in enumerate(singles):
            if name not in names:
                continue
            array = source.read(name)
            if fault := _fault(array):
                faults.append(fault.format(names[name]))
            if faults:
                continue
            array = family.from_file(leaf[-1], array)
            if leaf[0] != SCANNED:
                whole = array
            else:  # filled layer by layer: a list to stack would be one copy more
                whole = np.empty(expected[leaf], array.dtype) if i == 0 else whole
                whole[i] = array
        if not faults:
            flat[leaf] = place(leaf, whole)
    if faults:
        raise ValueError(
            f"{source.path}: {len(faults)} of its {len(names)} tensors or of the "
            f"{len(used)} expected don't fit the model of its {CONFIG}; nothing was "
            "loaded.\n  " + "\n  ".join(faults)
        )
    return flat, unused


def _fault(array: np.ndarray) -> str:
    """Says what is wrong with a tensor's values, with a gap for its name."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return f"dtype: {{}} must be floats; got {array.dtype}"
    count = int(array.size - np.isfinite(array).sum())
    return f"not finite: {{}}, {count} of {array.size} values" if count else ""
