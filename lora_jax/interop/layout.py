"""Factors in PyTorch's orientation as an adapter's leaves, and back.

PyTorch multiplies from the left, ``ΔW = s B A`` of an ``[out, in]`` weight; here
``lora_a`` is ``[*in, r]`` and ``lora_b`` ``[r, *out]``, with the axes in the kernel's
order. So ``lora_a = Aᵀ`` and ``lora_b = Bᵀ``, reshaped; stacked layers are one array.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.interop.external import ExternalFactors
from lora_jax.names import LORA_A, LORA_B, MAGNITUDE
from lora_jax.ops.contraction import Shape
from lora_jax.ops.dora import column_norm, magnitude_shape
from lora_jax.tree.targets import Site, Target, child

Index = tuple[int, ...]  # of a layer in a stack; empty without one
Stack = Mapping[Index, ExternalFactors]  # the layers of one site


def to_factors(
    target: Target, leaves: Mapping[str, Any], index: Index
) -> ExternalFactors:
    """Returns one layer of an adapter in PyTorch's orientation.

    Args:
      target: the adapted layer, or stack of layers.
      leaves: ``lora_a``, ``lora_b`` and magnitudes of the model by path.
      index: of the layer in its stack.
    """

    def own(name: str) -> Any:
        leaf = np.asarray(leaves[child(target.path, name)], np.float32)
        return target.first(name, leaf)[index]

    a, b, batch, r = own(LORA_A), own(LORA_B), experts_of(target), target.rank
    is_conv = target.kind == "conv"  # [*k, in, r] is [r, in, *k] there
    rows = a.reshape(*batch, -1, r).swapaxes(-1, -2)
    return ExternalFactors(
        a=np.moveaxis(a, (-1, -2), (0, 1)) if is_conv else rows,
        b=b.reshape(*batch, r, -1).swapaxes(-1, -2),
        scaling=target.scaling,
        alpha=target.alpha,
        magnitude=own(MAGNITUDE).reshape(-1) if target.dora else None,
        is_embedding=target.kind == "embed",
    )


def to_leaves(site: Site, stack: Stack, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the leaves of a site by path, of one layer or of a stack.

    Layers of a stack share a rank and a scaling: smaller ranks are padded with zeros,
    another scaling goes into B, and a layer without an adapter gets zeros (and with
    DoRA the norms of its kernel).

    Args:
      site: the layers.
      stack: the factors of each that has some.
      weights: the model's, by path.
    """
    lead, roles = lead_of(stack), site.contraction
    shapes = roles.factor_shapes(site.kernel_shape, lead.rank)
    names = (LORA_A, LORA_B)
    leaves = {n: np.zeros(s, np.float32) for n, s in zip(names, shapes, strict=True)}
    if lead.magnitude is not None:
        m = np.zeros(magnitude_shape(site.kernel_shape, roles), np.float32)
        if site.scanned_m:
            kernel = jnp.asarray(weights[site.weight_path][...])
            m = np.array(column_norm(kernel, roles))
        leaves[MAGNITUDE] = m
    for index, factors in stack.items():
        r, ratio = factors.rank, np.float32(factors.scaling / lead.scaling)
        rows = factors.a.swapaxes(-1, -2)
        if site.kind == "conv":
            rows = np.moveaxis(factors.a, (0, 1), (-1, -2))
        a = leaves[LORA_A][index]
        a[..., :r] = rows.reshape(*a.shape[:-1], r)
        b = np.moveaxis(leaves[LORA_B][index], len(experts_of(site)), 0)  # rank first
        b[:r] = np.moveaxis(factors.b * ratio, -1, 0).reshape(r, *b.shape[1:])
        if factors.magnitude is not None:
            m = leaves[MAGNITUDE][index]
            m[...] = factors.magnitude.reshape(m.shape)
    return {
        child(site.path, name): jnp.asarray(site.stored(name, leaf))
        for name, leaf in leaves.items()
    }


def shape_faults(
    path: str,
    site: Site,
    factors: ExternalFactors,
    explain: Callable[[str, Shape, Shape], str] = lambda *_: "",
) -> list[str]:
    """Compares factors with one layer of a site.

    Args:
      path: of the layer, for messages.
      site: the layer, or its stack.
      factors: its own.
      explain: what to add of a shape that differs, from path, shape and wanted shape.
    """
    _, inputs, _ = site.contraction.split(site.kernel_shape)
    i, o = site.contraction.matrix_size(site.kernel_shape)
    batch, r = experts_of(site), factors.rank
    a = (r, inputs[-1], *inputs[:-1]) if site.kind == "conv" else (r, i)
    wanted = [("A", factors.a, (*batch, *a)), ("B", factors.b, (*batch, o, r))]
    if factors.magnitude is not None:
        wanted.append(("magnitude", factors.magnitude, (o,)))
    is_embedding, kinds = site.kind == "embed", ("a linear layer", "an embedding")
    faults = []
    if factors.is_embedding not in (None, is_embedding):
        own, other = kinds[is_embedding], kinds[not is_embedding]
        faults.append(f"unexpected: {path} is {own}; its factors are for {other}")
    return faults + [
        f"shape: {what} of {path} must be {list(shape)}; got {list(array.shape)}"
        + explain(path, array.shape, shape)
        for what, array, shape in wanted
        if array.shape != shape
    ]


def lead_of(stack: Stack) -> ExternalFactors:
    """Returns the layer that sets the rank and scaling of its stack."""
    return max(stack.values(), key=lambda factors: factors.rank)


def ranks_and_alphas(
    layers: Mapping[str, Stack],
) -> tuple[dict[str, int], dict[str, float]]:
    """Returns the rank and the alpha of each site, by path, for a config."""
    leads = {path: lead_of(stack) for path, stack in layers.items()}
    ranks = {path: lead.rank for path, lead in leads.items()}
    return ranks, {path: lead.alpha for path, lead in leads.items()}


def experts_of(site: Site) -> Shape:
    """Returns the sizes of the batch axes that are not a stack's: experts, or none."""
    batch = site.contraction.split(site.kernel_shape)[0]
    return batch[len(site.scanned_a) :]
