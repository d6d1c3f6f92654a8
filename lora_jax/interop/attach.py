"""Adapters of other tools put on a model of ours.

PEFT and loralib multiply from the left, ``ΔW = s B A`` of a ``[out, in]`` weight;
Flax's kernels are ``[in, out]``, so ``lora_a = Aᵀ`` and ``lora_b = Bᵀ`` (for GPT-2's
Conv1D too, whose weights are ``[in, out]``). Nothing has to be permuted for RoPE: all
models here rotate halves, as Hugging Face's do, and those read from GGUF files were
brought to that order when they were read.

What is adapted is what the file has factors of; what its config says must agree.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.config import LoRAConfig
from lora_jax.interop.external import ExternalAdapter, Factors, report
from lora_jax.interop.full_tensors import check_base, place_full, single_leaves
from lora_jax.interop.fused import fuse_factors, split_factors
from lora_jax.interop.naming import EMBED, FUSIONS, HEAD, Names, Slot, find_slots
from lora_jax.interop.peft import saved_faults, target_faults
from lora_jax.models.family import Family
from lora_jax.models.load import LoadedModel
from lora_jax.names import LORA_A, LORA_B, MAGNITUDE, PARAMS
from lora_jax.nn.adapt import adapt
from lora_jax.nn.trace import Example, trace_model
from lora_jax.ops.dora import column_norm
from lora_jax.tree.partition import join, partition
from lora_jax.tree.paths import flatten, nearest, unflatten
from lora_jax.tree.targets import Site, child


def put_adapter(loaded: LoadedModel, adapter: ExternalAdapter) -> LoadedModel:
    """Puts another tool's adapter on a model.

    Adapter dropout is off, as in `load_model`; the rate is in the config.

    Args:
      loaded: the bare model.
      adapter: as `read_peft`, `read_mlx` or `read_loralib` returned it.

    Returns:
      The model with the adapter: the module adapted, the variables in their
      collections.

    Raises:
      ValueError: if the adapter has modules that the model has not, or of other
        shapes, or its config names other modules than it has; one error lists all.
    """
    example = Example.of(*loaded.inputs)
    found = trace_model(loaded.module, loaded.params, example)
    slots, flat = find_slots(found.sites), flatten(loaded.params)
    leaves = single_leaves(flat)
    names = Names(loaded.family, list(slots), leaves)
    spelling = names.spelled_as(adapter.modules)
    placed, faults = _place(adapter, names, slots, loaded.config)
    if "peft_type" in adapter.config:
        known = names.modules()
        strange = [name for name in adapter.modules if known.get(name) not in slots]
        faults += target_faults(adapter, spelling.modules.values(), other=strange)
        faults += saved_faults(adapter, spelling.tensors.values())
    values, wrong = place_full(adapter.full, names, leaves, flat)
    faults += [
        *wrong,
        *check_base(adapter.base, names, leaves, flat),
        *_shape_faults(placed, slots),
    ]
    if faults:
        raise report(adapter.origin, faults)
    sites = {slots[path].site.path: slots[path].site for path in placed}
    layers = {path: _site_factors(site, placed, slots) for path, site in sites.items()}
    lora = {
        child(path, name): jnp.asarray(leaf)
        for path, factors in layers.items()
        for name, leaf in _leaves(sites[path], factors, flat).items()
    }
    config = _config(layers, adapter, values)
    tree = join(unflatten({**flat, **values}), unflatten(lora))
    variables = partition(tree, config)
    trained = flatten(variables.get(PARAMS, {}))
    if set(trained) != set(values):
        missing = [f"missing: values of {p}" for p in trained if p not in values]
        extra = [f"unexpected: values of {p}" for p in values if p not in trained]
        raise report(adapter.origin, missing + extra)
    adapted = adapt(loaded.module, config, *loaded.inputs, deterministic=True)
    return loaded._replace(module=adapted, variables=variables)


def _place(
    adapter: ExternalAdapter, names: Names, slots: Mapping[str, Slot], config: Any
) -> tuple[dict[str, Factors], list[str]]:
    """Returns the factors by the paths of the model's modules, and what is wrong."""
    paths, found, faults = names.modules(), {}, []
    for name, factors in adapter.modules.items():
        path = paths.get(name)
        if path is None:
            known = [n.replace(".", "/") for n, p in paths.items() if p in slots]
            hint = nearest(name.replace(".", "/"), known).replace("/", ".")
            faults.append(
                f"unexpected: {name} is no module of this model. Did you mean: {hint}?"
            )
        elif path in found:
            faults.append(f"twice: {name} is another name of a module that is there")
        else:
            found[path] = factors
    if not adapter.is_tied_once:
        faults += _place_tied(found, slots)
    faults += _place_fused(found, slots, config, rslora=adapter.rslora)
    if adapter.dora and (
        lacking := [path for path, f in found.items() if f.magnitude is None]
    ):
        faults += [f"missing: magnitude of {path}" for path in lacking]
    faults += [
        f"unexpected: this model has no {path}" for path in found if path not in slots
    ]
    return {path: f for path, f in found.items() if path in slots}, faults


def _place_tied(found: dict[str, Factors], slots: Mapping[str, Slot]) -> list[str]:
    """Makes one of the two adapters of a tied embedding; they must be the same.

    Here an embedding that is the head too has one adapter, in both places. Other tools
    have one for the lookup and another for the head.
    """
    if HEAD in slots or EMBED not in slots or not {EMBED, HEAD} & set(found):
        return []
    head, embed = found.pop(HEAD, None), found.get(EMBED)
    if head is not None and embed is not None:
        same = head.scaling == embed.scaling and embed.magnitude is None
        pairs = ((head.a, embed.b.T), (head.b, embed.a.T))
        if same and all(np.array_equal(x, y) for x, y in pairs):
            return []
    there = "both, which differ" if head is not None and embed is not None else "one"
    return [
        "unexpected: the head of this model is its embedding (tied), so adapters of "
        f"embed_tokens and lm_head must both be there, each the other's transpose; got "
        f"{there}"
    ]


def _place_fused(
    found: dict[str, Factors], slots: Mapping[str, Slot], config: Any, *, rslora: bool
) -> list[str]:
    """Splits adapters of fused projections that the model has split, or fuses them."""
    faults = []
    for fusion in FUSIONS:
        ends = (fusion.whole, *fusion.parts)
        layers = {
            path.removesuffix(end): None
            for path in found
            for end in ends
            if path.endswith("/" + end) and path not in slots
        }
        for layer in layers:
            whole, parts = layer + fusion.whole, [layer + p for p in fusion.parts]
            sizes = _part_sizes(config, len(parts))
            try:
                if whole in found and set(parts) <= set(slots) - set(found):
                    split = split_factors(found.pop(whole), sizes)
                    found.update(zip(parts, split, strict=True))
                elif whole in slots and whole not in found:
                    group = [found.pop(part, None) for part in parts]
                    found[whole] = fuse_factors(group, sizes, rslora=rslora)
            except ValueError as error:
                faults.append(f"{whole}: {error}")
    return faults


def _part_sizes(config: Any, count: int) -> tuple[int, ...]:
    """Outputs of query, key and value, or of gate and up."""
    if count == 2:
        return (config.mlp_size,) * 2
    kv = config.num_kv_heads * config.head_dim
    return config.num_heads * config.head_dim, kv, kv


def _shape_faults(
    placed: Mapping[str, Factors], slots: Mapping[str, Slot]
) -> list[str]:
    faults = []
    for path, factors in placed.items():
        slot = slots[path]
        *window, inputs, outputs = slot.kernel_shape
        is_embedding = slot.site.kind == "embed"
        if factors.is_embedding not in (None, is_embedding):
            kind = "an embedding" if is_embedding else "no embedding"
            faults.append(f"unexpected: {path} is {kind}; its factors are of the other")
        wanted = [
            ("A", factors.a, (factors.rank, inputs, *window)),
            ("B", factors.b, (outputs, factors.rank)),
        ]
        if factors.magnitude is not None:
            wanted.append(("magnitude", factors.magnitude, (outputs,)))
        faults += [
            f"shape: {what} of {path} must be {list(shape)}; got {list(array.shape)}"
            for what, array, shape in wanted
            if array.shape != shape
        ]
    return faults


def _site_factors(
    site: Site, placed: Mapping[str, Factors], slots: Mapping[str, Slot]
) -> dict[int | None, Factors]:
    """Returns the factors of each layer of a site; None for one that isn't stacked."""
    return {
        slots[path].index: factors
        for path, factors in placed.items()
        if slots[path].site.path == site.path
    }


def _lead(layers: Mapping[int | None, Factors]) -> Factors:
    """Returns the layer whose rank and scaling a whole stack has."""
    return max(layers.values(), key=lambda factors: factors.rank)


def _leaves(
    site: Site, layers: Mapping[int | None, Factors], flat: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Returns the adapter leaves of a site, as Flax has them.

    Layers of a scanned model share a rank and a scaling: smaller ranks are padded with
    zeros, another scaling goes into B, and a layer without an adapter gets zeros.
    """
    axes, lead = Family.axes(_lead(layers).a.ndim), _lead(layers)
    if None in layers:
        leaves = {LORA_A: lead.a.transpose(axes), LORA_B: lead.b.T}
        if lead.magnitude is not None:
            leaves[MAGNITUDE] = lead.magnitude
        return leaves
    count, inputs, outputs = len_of(site), lead.a.shape[1:], lead.b.shape[0]
    a = np.zeros((count, lead.rank, *inputs), np.float32)
    b = np.zeros((count, outputs, lead.rank), np.float32)
    for index, factors in layers.items():
        ratio = np.float32(factors.scaling / lead.scaling)
        a[index, : factors.rank] = factors.a
        b[index, :, : factors.rank] = factors.b * ratio
    stacked = (0, *(axis + 1 for axis in axes))
    leaves = {LORA_A: a.transpose(stacked), LORA_B: b.transpose(0, 2, 1)}
    if lead.magnitude is not None:
        kernel = jnp.asarray(flat[child(site.path, site.weight)])
        m = np.array(column_norm(kernel, site.contraction))
        for index, factors in layers.items():
            m[index] = factors.magnitude
        leaves[MAGNITUDE] = m
    places = {LORA_A: site.scanned_a, LORA_B: site.scanned_b, MAGNITUDE: site.scanned_m}
    return {name: np.moveaxis(x, 0, places[name][0]) for name, x in leaves.items()}


def len_of(site: Site) -> int:
    """Returns how many layers a scanned site stacks."""
    return site.kernel_shape[0]


def _config(
    layers: Mapping[str, Mapping[int | None, Factors]],
    adapter: ExternalAdapter,
    values: Mapping[str, Any],
) -> LoRAConfig:
    """Returns the config that adapts exactly these sites, each with its own numbers."""
    leads = {path: _lead(factors) for path, factors in layers.items()}
    ranks = {path: lead.rank for path, lead in leads.items()}
    alphas = {path: lead.alpha for path, lead in leads.items()}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    return LoRAConfig(
        rank=rank,
        alpha=alpha,
        targets=sorted(layers),
        rank_pattern={path: r for path, r in ranks.items() if r != rank},
        alpha_pattern={path: a for path, a in alphas.items() if a != alpha},
        dropout_rate=adapter.dropout_rate,
        rslora=adapter.rslora,
        dora=adapter.dora,
        train=sorted(_modules(values, adapter.bias)),
        bias=adapter.bias,  # pyright: ignore[reportArgumentType] - read_peft checked it
    )


def _modules(values: Iterable[str], bias: str) -> set[str]:
    """Returns the modules of leaves that are trained in full, not for their biases."""
    owners = {path.rpartition("/")[0] for path in values if not path.endswith("/bias")}
    if bias == "none":
        owners |= {path.rpartition("/")[0] for path in values}
    return owners


def _most_common(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]
