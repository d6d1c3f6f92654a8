"""Pretrained models from Hugging Face folders, GGUF files, packages and the hub.

Strict: a model is loaded whole or not at all, and one error lists every tensor that is
missing, unexpected, mis-shaped, or not finite. What differs between model families is
in `Family` alone. Tensors are read one by one, some rows at a time, straight to their
dtype, layout and devices: the host never holds a second copy of the model, nor of the
layers that one array stacks.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.array_types import PRNGKey, PyTree
from lora_jax.files.host import empty_aligned
from lora_jax.files.tokenizer import Tokenizer, load_tokenizer
from lora_jax.models.family import Family, config_of
from lora_jax.models.source import CONFIG, Source, open_source
from lora_jax.names import EMBEDDING, FROZEN, KERNEL, PARAMS
from lora_jax.nn.trace import Example, trace_model
from lora_jax.parallel.mesh import put_array
from lora_jax.parallel.rules import resolve_shardings
from lora_jax.tree.partition import join
from lora_jax.tree.paths import flatten

OURS = "lora_jax"  # the key of config.json that holds what Hugging Face has no word for
HEAD = "classifier"
SCANNED = "layers"
TIED_HEAD = "lm_head.weight"  # may stand in a file beside the embedding that it is

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
    scan_layers: bool = False,
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
        options: dict[str, Any] = {"scan_layers": scan_layers, "remat": remat}
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
        places,
        param_dtype,
    )
    for leaf in fresh:
        new = np.zeros(expected[leaf], np.float32)
        if key is not None and leaf[-1] == KERNEL:
            own_key = key if leaf[0] == HEAD else jax.random.fold_in(key, 1)
            new = 0.02 * jax.random.normal(own_key, expected[leaf], jnp.float32)
        flat[leaf] = _place(new, places[leaf])  # float32: it is there to be trained
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
    example = Example.of(*family.inputs(config_of(module)))
    params = flatten(trace_model(module, None, example).params)
    return {tuple(path.split("/")): array.shape for path, array in params.items()}


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


def _place(array: Any, sharding: Any) -> jax.Array:
    """Puts one leaf where it belongs; on CPU that is where it is, if it is aligned."""
    if sharding is None:
        return jax.device_put(array)
    return put_array(array, sharding)


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
    places: Mapping[Leaf, Any],
    dtype: Any,
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
    faults += _tied_faults(source, expected)
    flat = {}
    for leaf, singles in wanted.items():
        whole: Any = None  # filled piece by piece, with its axes as they will be
        for i, name in enumerate(singles):
            if name not in names:
                continue
            for where, piece in _checked(source, name, faults):
                if whole is None:
                    own = jax.dtypes.canonicalize_dtype(dtype or piece.dtype)
                    whole = empty_aligned(expected[leaf], own)
                single = whole[i] if leaf[0] == SCANNED else whole
                family.to_file(leaf[-1], single)[where] = piece.astype(whole.dtype)
        if not faults:
            flat[leaf] = _place(whole, places[leaf])
    if faults:
        raise ValueError(
            f"{source.path}: {len(faults)} of its {len(names)} tensors or of the "
            f"{len(used)} expected don't fit the model of its {CONFIG}; nothing was "
            "loaded.\n  " + "\n  ".join(faults)
        )
    return flat, unused


def _tied_faults(source: Source, expected: Mapping[Leaf, Any]) -> list[str]:
    """Says so where a tied decoder's file has a head that is not its embedding."""
    family, names = source.family, source.names
    if family.head or ("head", KERNEL) in expected or TIED_HEAD not in names:
        return []
    embed = family.tensor_name(("embed", EMBEDDING))
    if embed not in names:
        return []  # missing, said elsewhere
    pairs = zip(source.pieces(TIED_HEAD), source.pieces(embed), strict=True)
    if source.shape(TIED_HEAD) == source.shape(embed) and all(
        np.array_equal(a.astype(np.float32), b.astype(np.float32))
        for (_, a), (_, b) in pairs
    ):
        return []
    return [
        f"unexpected: {names[TIED_HEAD]} differs from {names[embed]}, which is the "
        "head of a tied model. Set tie_word_embeddings to false in config.json if the "
        "model has a head of its own, or take the tensor out of the file"
    ]


def _checked(
    source: Source, name: str, faults: list[str]
) -> Iterator[tuple[Any, np.ndarray]]:
    """Yields a tensor's pieces while nothing is wrong, and notes what is."""
    bad = 0
    for where, piece in source.pieces(name):
        if not jnp.issubdtype(piece.dtype, jnp.floating):
            faults.append(
                f"dtype: {source.names[name]} must be floats; got {piece.dtype}"
            )
            return
        bad += int(piece.size - np.isfinite(piece).sum())
        if not faults and not bad:
            yield where, piece
    if bad:
        size = math.prod(source.shape(name))
        faults.append(f"not finite: {source.names[name]}, {bad} of {size} values")
