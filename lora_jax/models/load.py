"""Loads pretrained models from Hugging Face folders, GGUF files, packages and the hub.

Strict: a model is loaded completely or not at all, and one error lists every tensor
that is missing, unexpected, wrongly shaped or not finite. Only `Family` knows how model
families differ. Tensors are read one by one, a few rows at a time, straight to their
dtype, layout and devices: the host never holds a second copy of the model, nor of the
layers that one array stacks.
"""

import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.array_types import PRNGKey
from lora_jax.files.arrays import empty_aligned
from lora_jax.files.tokenizer import load_tokenizer
from lora_jax.models.added_tokens import open_grown
from lora_jax.models.family import Family, Shape, config_of
from lora_jax.models.loaded import LoadedModel
from lora_jax.models.sentence_config import read_sentence
from lora_jax.models.sentence_files import with_sentence
from lora_jax.models.source import MODEL_CONFIG, TIED_HEAD, Source
from lora_jax.models.stacking import file_slices
from lora_jax.names import (
    CLASSIFIER,
    EMBED,
    EMBEDDING,
    FROZEN,
    HEAD,
    KERNEL,
    PARAMS,
    SCALE,
    WORD_EMBEDDING,
)
from lora_jax.nn.trace import Example, trace_model
from lora_jax.parallel.mesh import put_array
from lora_jax.parallel.rules import resolve_shardings
from lora_jax.tree.paths import flatten, unflatten

OURS = "lora_jax"  # the key of config.json for what Hugging Face has no key for

Sharding = jax.sharding.Sharding | Callable[[str, tuple[int, ...]], Any] | None


def load_base(
    path: str | os.PathLike[str],
    *,
    num_labels: int | None = None,
    pooling: str | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    sharding: Sharding = None,
    scan_layers: bool | None = None,
    remat: str = "none",
    key: PRNGKey | None = None,
    own_head: bool = False,
    add_tokens: Sequence[str] = (),
) -> LoadedModel:
    """Loads a pretrained model without adapters; see `load_model`.

    ``own_head`` unties a tied decoder: its head is initialised from the embedding.
    """
    source, tokenizer = open_grown(path, add_tokens)
    config, is_asked = source.config, pooling is not None
    is_tied = not source.family.head and config.is_tied
    if own_head and is_tied and not _tied_faults(source, {}):
        config = dataclasses.replace(config, is_tied=False)
        source = source.with_own_head()
    fresh_head: tuple[str, ...] = ()
    if source.has_other_head and (pooling is None or not source.family.head):
        kinds = {
            "decoder": "ForCausalLM",
            "encoder": f"Model and {source.family.head_class}",
            "encoder-decoder": "ForConditionalGeneration and EncoderModel",
        }[source.family.kind]
        raise ValueError(
            f"{path}: the architecture {source.architecture} is unsupported; only heads"
            f" of {kinds} are. An encoder can be loaded without its head by giving "
            "pooling."
        )
    if not source.family.head:
        refused = [
            n for n, v in (("num_labels", num_labels), ("pooling", pooling)) if v
        ]
        if refused:
            raise ValueError(
                f"{' and '.join(refused)} must not be given for a decoder; {path} is a "
                f"{source.settings['model_type']}, whose head predicts tokens."
            )
        options: dict[str, Any] = {"remat": remat}
        if not source.family.has_source:
            options["scan_layers"] = bool(scan_layers)
    else:
        own_pooling, own_labels = _own_head(source)
        pooling = own_pooling if pooling is None else pooling
        if pooling != own_pooling:
            own_labels = None
        num_labels = own_labels if num_labels is None else num_labels
        if num_labels != own_labels:
            fresh_head = _missing_head(source)
        options = {"num_labels": num_labels, "pooling": pooling}
    if source.path.is_dir() and not is_asked and options.get("num_labels") is None:
        sentence = read_sentence(source.path)
        source = with_sentence(source, sentence)
        if sentence is not None:
            options["sentence"] = sentence
            if not (source.family.head or is_tied or TIED_HEAD in source.names):
                config = dataclasses.replace(config, has_head=False)

    module = source.family.module(config, dtype=dtype, **options)
    shapes = param_shapes(source.family, module)
    places: Mapping[str, Any] = dict.fromkeys(shapes, sharding)
    if callable(sharding):
        places = resolve_shardings(shapes, sharding)
    fresh = [path for path in shapes if path.split("/")[0] in fresh_head]
    stored = {path: shape for path, shape in shapes.items() if path not in fresh}
    flat, unused = _read(source, stored, places, param_dtype)
    for path in fresh:
        flat[path] = _place(_new_leaf(path, shapes[path], key), places[path])
    return LoadedModel(
        module=module,
        variables={PARAMS: unflatten(flat)},
        config=config,
        tokenizer=tokenizer or load_tokenizer(source.path),
        path=source.path,
        family=source.family,
        unused=tuple(unused),
        new=tuple(fresh),
        added=tuple(add_tokens),
    )


def with_new_head(loaded: LoadedModel, key: PRNGKey) -> LoadedModel:
    """Returns a base whose new leaves are drawn again with ``key``; shares the rest."""
    flat = flatten(loaded.params)
    for path in loaded.new:
        where = flat[path].sharding
        flat[path] = put_array(_new_leaf(path, flat[path].shape, key), where)
    return loaded._replace(variables={**loaded.variables, PARAMS: unflatten(flat)})


def _new_leaf(path: str, shape: Shape, key: PRNGKey | None) -> Any:
    """Initialises a leaf of a new head; float32, as it is to be trained."""
    owner, _, leaf = path.rpartition("/")
    if key is None or leaf != KERNEL:
        return np.full(shape, float(leaf == SCALE), np.float32)
    own_key = key if owner == CLASSIFIER else jax.random.fold_in(key, 1)
    return 0.02 * jax.random.normal(own_key, shape, jnp.float32)


def as_stored(loaded: LoadedModel) -> LoadedModel:
    """Returns a model whose base has the exact values in its file, to merge into.

    ``param_dtype`` may have rounded the base to another dtype; then its frozen
    parameters are read again, in the file's dtypes. Trained values stay as they are.
    """
    module = getattr(loaded.module, "model", None)
    source, _ = open_grown(loaded.path, loaded.added)
    source = with_sentence(source, loaded.sentence)
    frozen = flatten(loaded.variables.get(FROZEN, {}))
    own_head = not getattr(loaded.config, "is_tied", True)
    names = (source.with_own_head() if own_head else source).names

    def is_rounded(path: str, leaf: Any) -> bool:
        single = next(iter(file_slices(source.family, {path: leaf})))
        name = source.family.tensor_name(single)
        if name not in names:
            return False
        stored = next(source.tensors.pieces(names[name]))[1].dtype
        return jnp.promote_types(stored, leaf.dtype) != leaf.dtype

    if module is None or not any(is_rounded(p, leaf) for p, leaf in frozen.items()):
        return loaded
    own = load_base(
        loaded.path,
        num_labels=getattr(module, "num_labels", None),
        pooling=None if loaded.sentence else getattr(module, "pooling", None),
        scan_layers=getattr(module, "scan_layers", None),
        own_head=own_head,
        add_tokens=loaded.added,
    )
    stored = flatten(own.params)
    kept = {p: leaf if p in own.new else stored[p] for p, leaf in frozen.items()}
    return loaded._replace(variables={**loaded.variables, FROZEN: unflatten(kept)})


def param_shapes(family: Family, module: nn.Module) -> dict[str, Shape]:
    """Returns the shape of each parameter by path, by tracing; nothing is computed."""
    example = Example.of(*family.inputs(config_of(module)))
    params = flatten(trace_model(module, None, example).params)
    return {path: array.shape for path, array in params.items()}


def _own_head(source: Source) -> tuple[str, int | None]:
    """Returns the pooling that a folder's weights were made with, and its head size."""
    name = source.family.tensor_name(f"{CLASSIFIER}/{KERNEL}")
    has_head = name in source.names and not source.has_other_head
    labels = source.shape(name)[0] if has_head else None
    ours = source.settings.get(OURS)
    if isinstance(ours, dict) and "pooling" in ours:
        return ours["pooling"], labels
    return source.family.head_pooling if has_head else "mean", labels


def _missing_head(source: Source) -> tuple[str, ...]:
    """Returns the head's modules to initialise if the number of classes changes."""
    absent = (
        path
        for path in source.family.head
        if source.family.tensor_name(f"{path}/{KERNEL}") not in source.names
    )
    return (CLASSIFIER, *absent)


def _place(array: Any, sharding: Any) -> jax.Array:
    """Places one leaf; on CPU without a copy if the array is aligned."""
    return jax.device_put(array) if sharding is None else put_array(array, sharding)


def _read(
    source: Source,
    expected: Mapping[str, Shape],
    places: Mapping[str, Any],
    dtype: Any,
) -> tuple[dict[str, jax.Array], list[str]]:
    """Reads every expected leaf; raises one error with the faults of all of them."""
    family, names = source.family, source.names
    slices = file_slices(family, expected)
    wanted = {path: family.tensor_name(path) for path in slices}
    used = dict.fromkeys(wanted.values())
    left = [name for name in names if name not in used]
    unused = [names[name] for name in left if family.is_unused(name)]
    faults = [f"missing: {name}" for name in used if name not in names]
    faults += [
        f"unexpected: {names[name]} {list(source.shape(name))}"
        for name in left
        if not family.is_unused(name)
    ]
    for path, name in wanted.items():
        shape = family.file_shape(path, slices[path].shape)
        if name in names and source.shape(name) != shape:
            got = list(source.shape(name))
            faults.append(f"shape: {names[name]} must be {list(shape)}; got {got}")
    faults += [*_tied_faults(source, expected), *_copy_faults(source)]
    flat = {}
    for leaf, paths in itertools.groupby(slices, key=lambda path: slices[path].path):
        whole: Any = None  # filled piece by piece, in its final layout
        for path in paths:
            if wanted[path] not in names:
                continue
            for where, piece in _checked(source, wanted[path], faults):
                if whole is None:
                    own = jax.dtypes.canonicalize_dtype(dtype or piece.dtype)
                    whole = empty_aligned(expected[leaf], own)
                part = family.to_file(path, slices[path].of(whole))
                part[where] = piece.astype(whole.dtype)
        if not faults:
            flat[leaf] = _place(whole, places[leaf])
    if faults:
        raise ValueError(
            f"{source.path}: {len(faults)} faults in its {len(names)} tensors, of which"
            f" its {MODEL_CONFIG} expects {len(used)}; nothing was loaded.\n  "
            + "\n  ".join(faults + _likely_causes(source))
        )
    return flat, unused


def _likely_causes(source: Source) -> list[str]:
    """Returns likely reasons, judging by the config, why the tensors don't fit it."""
    causes, settings = [], source.settings
    if quantised := settings.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        causes.append(
            f"The model is quantised ({method or 'quantization_config'}), which is not "
            "read: take the one it was made from, or save it in bfloat16."
        )
    table = source.family.module_name(WORD_EMBEDDING if source.family.head else EMBED)
    size = getattr(source.config, "vocab_size", None)
    name = f"{table}.weight"
    rows = source.shape(name)[0] if name in source.names else size
    if rows != size:
        causes.append(
            f"The vocabulary was resized: {source.names[name]} has {rows} tokens, "
            f"vocab_size of {MODEL_CONFIG} is {size}. Save the config with the model."
        )
    return causes


def _tied_faults(source: Source, expected: Mapping[str, Any]) -> list[str]:
    """Returns a fault if a tied decoder's file has a head unlike its embedding."""
    family, names = source.family, source.names
    if family.head or f"{HEAD}/{KERNEL}" in expected or TIED_HEAD not in names:
        return []
    embed = family.tensor_name(f"{EMBED}/{EMBEDDING}")
    if embed not in names:
        return []  # already reported as missing
    if _are_equal(source, TIED_HEAD, embed):
        return []
    return [
        f"unexpected: {names[TIED_HEAD]} differs from {names[embed]}, which is the "
        "head of a tied model. Set tie_word_embeddings to false in config.json if the "
        "model has a separate head, or remove the tensor from the file"
    ]


def _copy_faults(source: Source) -> list[str]:
    """Returns a fault for each copy of a tensor that differs from it."""
    names = source.names
    return [
        f"unexpected: {names[copy]} differs from {names[bare]}, of which it must be a "
        "copy: the model has one such table"
        for copy, bare in source.family.copies.items()
        if copy in names and bare in names and not _are_equal(source, copy, bare)
    ]


def _are_equal(source: Source, one: str, other: str) -> bool:
    """Returns whether two tensors, by their bare names, have the same values."""
    pairs = zip(source.pieces(one), source.pieces(other), strict=True)
    return source.shape(one) == source.shape(other) and all(
        np.array_equal(a.astype(np.float32), b.astype(np.float32))
        for (_, a), (_, b) in pairs
    )


def _checked(
    source: Source, name: str, faults: list[str]
) -> Iterator[tuple[Any, np.ndarray]]:
    """Yields a tensor's pieces until a fault is found; appends it to ``faults``."""
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
