"""Other tools' adapters in the layout of an NNX model, and back.

Rotary positions must rotate halves, as Hugging Face's.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax.array_types import PyTree
from lora_jax.config import LoRAConfig
from lora_jax.interop.experts import DOWN, GATE_UP
from lora_jax.interop.external import (
    ExternalAdapter,
    ExternalFactors,
    report,
)
from lora_jax.interop.fused import drop_zero_ranks, fuse_factors, split_factors
from lora_jax.interop.layout import (
    Index,
    experts_of,
    ranks_and_alphas,
    shape_faults,
    to_factors,
    to_leaves,
)
from lora_jax.names import LORA_A, LORA_B
from lora_jax.nnx.full import Names, from_full, names_of, trained_modules
from lora_jax.tree.paths import leaves_by_path, nearest, unflatten
from lora_jax.tree.targets import Site, Target, child

_EXPERTS_NAME = re.compile(rf"([^|]*\.)?experts\.({GATE_UP}|{DOWN})")
AB = (LORA_A, LORA_B)


class Spelled(NamedTuple):
    """A kernel and the names that another tool has for it.

    Attributes:
      path: of the layer in the model.
      index: of the layer in its stack.
      parts: its names, several if the other tool has it in parts.
    """

    path: str
    index: Index
    parts: tuple[str, ...]


def to_external(
    targets: Sequence[Target],
    leaves: Mapping[str, Any],
    names: Names | None,
    *,
    rslora: bool,
) -> tuple[dict[str, ExternalFactors], list[str]]:
    """Returns adapters under other names and in PyTorch's orientation, and the faults.

    Args:
      targets: the adapted layers.
      leaves: ``lora_a``, ``lora_b`` and magnitudes by path.
      names: see `lora_jax.nnx.export_adapter`.
      rslora: whether the scaling is ``alpha / sqrt(rank)``.

    Returns:
      Factors by module name, and what is wrong.
    """
    by_path, modules = {target.path: target for target in targets}, {}
    spelled, faults = _spelled(targets, names)
    for place in spelled:
        target = by_path[place.path]
        if experts_of(target) and target.dora:
            faults.append(f"{target.path} has DoRA of experts, which PEFT lacks")
        factors = to_factors(target, leaves, place.index)
        if len(place.parts) == 1:
            modules[place.parts[0]] = factors
            continue
        sizes = [len(factors.b) // len(place.parts)] * len(place.parts)
        for name, part in zip(place.parts, split_factors(factors, sizes), strict=True):
            lean = drop_zero_ranks(part, rslora=rslora)
            alpha = float(f"{lean.alpha:.12g}")  # as it was before it was fused
            modules[name] = lean._replace(alpha=alpha)
    if len(modules) < sum(len(place.parts) for place in spelled):
        faults.append("the names must differ; two layers have the same one")
    return modules, faults


def from_external(
    adapter: ExternalAdapter,
    sites: Sequence[Site],
    weights: Mapping[str, Any],
    names: Names | None,
) -> tuple[LoRAConfig, PyTree, dict[str, np.ndarray]]:
    """Returns the config and the arrays of another tool's adapter for a model.

    Args:
      adapter: as it was read.
      sites: every layer of the model that can be adapted.
      weights: its weights, by path.
      names: see `lora_jax.nnx.export_adapter`.

    Returns:
      A config that adapts the layers and trains the weights that the file has, the
      collection ``lora``, and by path what is trained in full.

    Raises:
      ValueError: listing everything that doesn't fit.
    """
    by_path = {site.path: site for site in sites}
    faults = [f"unexpected: rows of {name}" for name in adapter.tokens]
    layers: dict[str, dict[Index, ExternalFactors]] = {}
    left = dict(adapter.modules)
    spelled = _spelled(sites, names)[0]
    for place in spelled:
        parts = [left.pop(name, None) for name in place.parts]
        if all(part is None for part in parts):
            continue
        factors = parts[0]
        site = by_path[place.path]
        if len(parts) > 1:
            out = site.contraction.matrix_size(site.kernel_shape)[1] // len(parts)
            factors = fuse_factors(parts, [out] * len(parts), rslora=adapter.rslora)
        assert factors is not None
        factors = factors.narrowed(site.contraction.matrix_size(site.kernel_shape)[0])
        faults += shape_faults(place.path, site, factors)
        layers.setdefault(place.path, {})[place.index] = factors
    known = [name.replace(".", "/") for place in spelled for name in place.parts]
    for name in left:
        hint = nearest(name.replace(".", "/"), known).replace("/", ".")
        faults.append(
            f"unexpected: {name} is not a module of this model"
            + (f". Did you mean: {hint}?" if hint else ".")
        )
    faults += [
        f"unexpected: a bias of {n}" for n, f in adapter.modules.items() if f.bias
    ]
    full, wrong = from_full(adapter, sites, weights, names)
    if faults := faults + wrong:
        raise report(adapter.origin, faults)
    lora = {}
    for path, stack in layers.items():
        lora |= to_leaves(by_path[path], stack, weights)
    config = config_of_sites(
        *ranks_and_alphas(layers),
        rslora=adapter.rslora,
        dora=adapter.dora,
        dropout_rate=adapter.dropout_rate,
        bias=adapter.bias,
        train=trained_modules(full, adapter.bias),
    )
    return config, unflatten(lora), full


def from_tree(
    tree: PyTree, sites: Sequence[Site], alpha: float | None
) -> tuple[LoRAConfig, PyTree]:
    """Returns the config and the arrays of an adapter that qwix or gemma.peft made.

    Both keep A as ``[*batch and in, r]`` and B as ``[r, *out]``, in the order of the
    kernel's axes, or flattened for a dense layer; B has no batch axis for an einsum.

    Args:
      tree: arrays named ``<weight>_lora_a`` and ``<weight>_lora_b`` (qwix), or
        ``lora/a`` and ``lora/b`` (gemma.peft), beside the weights.
      sites: every layer of the model that can be adapted.
      alpha: of qwix's rule; None for a scaling of 1, as gemma.peft's.

    Returns:
      A config that adapts the layers the tree has, and the collection ``lora``.

    Raises:
      ValueError: listing everything that doesn't fit.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    faults = []
    for path, leaf in leaves_by_path(tree).items():
        parsed = re.fullmatch(r"(.*?)(?:_lora_|(?:^|/)lora/)(a|b)(?:/value)?", path)
        if parsed is None:
            faults.append(f"unexpected: {path} is neither qwix's nor gemma.peft's")
            continue
        found.setdefault(parsed[1], {})[parsed[2]] = np.asarray(leaf, np.float32)
    by_path = {name: site for site in sites for name in (site.path, site.weight_path)}
    lora, ranks = {}, {}
    for path, pair in found.items():
        site = by_path.get(path)
        if site is None or set(pair) != {"a", "b"}:
            faults.append(
                f"missing: a and b of {path}"
                if site
                else f"unexpected: {path} is not a layer of this model. Did you mean: "
                f"{nearest(path, by_path)}?"
            )
            continue
        rank = ranks[site.path] = pair["a"].shape[-1]
        shapes = site.contraction.factor_shapes(site.kernel_shape, rank)
        try:
            values = _of_einsum(site, pair["a"], pair["b"], shapes)
        except ValueError:
            got = [list(pair[name].shape) for name in "ab"]
            faults.append(
                f"shape: A, B of {path} must be {shapes[0]}, {shapes[1]}; got "
                f"{got[0]}, {got[1]}"
            )
            continue
        lora |= {child(site.path, n): v for n, v in zip(AB, values, strict=True)}
    if faults or not lora:
        raise report("the tree", faults or ["it holds no adapters"])
    alphas = {
        path: float(rank if alpha is None else alpha) for path, rank in ranks.items()
    }
    return config_of_sites(ranks, alphas), unflatten(lora)


def _of_einsum(
    site: Site, a: np.ndarray, b: np.ndarray, shapes: tuple[Index, Index]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns A and B of one layer in the layout of `Contraction`."""
    roles = site.contraction
    if site.scanned_a or roles.groups > 1:
        raise ValueError("stacked")
    if roles.batch and a.ndim == len(roles.batch) + len(roles.inputs) + 1:
        order = sorted((*roles.batch, *roles.inputs))
        wanted = [order.index(axis) for axis in (*roles.batch, *roles.inputs)]
        a = a.transpose(*wanted, a.ndim - 1)
        if b.ndim == len(roles.outputs) + 1:  # one B for all
            b = np.broadcast_to(b, shapes[1])
    return a.reshape(shapes[0]), b.reshape(shapes[1])


def config_of_sites(
    ranks: Mapping[str, int], alphas: Mapping[str, float], **fields: Any
) -> LoRAConfig:
    """Returns the config that adapts just these layers, with their own numbers."""
    exact = "|".join(map(re.escape, sorted(ranks)))  # not the ends of longer paths
    config = LoRAConfig.for_layers(ranks, alphas, **fields)
    return dataclasses.replace(config, targets=exact)


def _spelled(
    sites: Sequence[Site], names: Names | None
) -> tuple[list[Spelled], list[str]]:
    """Returns the names of all kernels, and faults for those that have none."""
    spelled, faults = [], []
    for site in sites:
        found = names_of(site.path, names)
        stack = tuple(site.kernel_shape[axis] for axis in site.scanned_a)
        if found is None:
            faults.append(f"names has no pattern for {site.path!r}")
        elif site.contraction.groups > 1:
            faults.append(f"{site.path}, a grouped convolution, has no form in PEFT")
        elif experts_of(site) and not _EXPERTS_NAME.fullmatch("|".join(found)):
            faults.append(
                f"the name of {site.path}, a layer of experts, must end in "
                f"experts.{GATE_UP} or experts.{DOWN} for PEFT; got {', '.join(found)}"
            )
        elif stack and not all("{}" in name for name in found):
            faults.append(f"the name of {site.path}, a stack of layers, needs {{}}")
        else:
            for index in np.ndindex(*stack):
                own = tuple(name.format(*index) if stack else name for name in found)
                spelled.append(Spelled(site.path, index, own))
    return spelled, faults
