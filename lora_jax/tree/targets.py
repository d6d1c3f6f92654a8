"""Which layers of a model get an adapter, and its shapes.

Tracing a model gives a `Site` for every layer that LoRA can adapt. The config selects
among them; a pattern that matches nothing is an error.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from lora_jax.array_types import AnyFloat, PRNGKey
from lora_jax.config import ALL_LINEAR, LoRAConfig, Patterns, layer_index, matches
from lora_jax.names import LORA_A, LORA_B, MAGNITUDE
from lora_jax.ops.contraction import Contraction, Shape
from lora_jax.ops.dora import column_norm, magnitude_shape
from lora_jax.ops.init import init_adapter, path_key
from lora_jax.tree.paths import nearest

LINEAR_KINDS = ("dense", "einsum", "experts")  # what "all-linear" covers


@dataclasses.dataclass(frozen=True)
class Site:
    """A layer that can be adapted.

    Attributes:
      path: path of the layer in the parameter tree.
      kind: ``"dense"``, ``"einsum"``, ``"experts"``, ``"embed"`` or ``"conv"``.
      weight: name of its weight, ``"kernel"`` or ``"embedding"``.
      kernel_shape: shape of the weight in the tree, scanned axes included.
      contraction: the roles of its axes.
      scanned_a: positions of the scanned axes in the tree's ``lora_a``.
      scanned_b: positions of the scanned axes in the tree's ``lora_b``.
      scanned_m: positions of the scanned axes in the tree's ``magnitude``.
      is_plain: whether the layer multiplies by its weight as stored; a layer that
        transforms it first can be adapted, but not merged.
    """

    path: str
    kind: str
    weight: str
    kernel_shape: Shape
    contraction: Contraction
    scanned_a: tuple[int, ...] = ()
    scanned_b: tuple[int, ...] = ()
    scanned_m: tuple[int, ...] = ()
    is_plain: bool = True

    @property
    def weight_path(self) -> str:
        """Path of ``W0``."""
        return child(self.path, self.weight)

    def is_same_layer(self, other: "Site") -> bool:
        """Returns whether path, kernel shape and layout equal those of ``other``."""
        names = [field.name for field in dataclasses.fields(Site)]
        return all(getattr(self, name) == getattr(other, name) for name in names)


class UnsupportedWeight(NamedTuple):
    """A weight that can't be adapted.

    Attributes:
      kind: type name of the module that owns it.
      is_linear: whether ``"all-linear"`` covers that type.
      why: the reason, if the type in general can be adapted.
      shape: shape of the weight, without scanned axes.
    """

    kind: str
    is_linear: bool = False
    why: str = ""
    shape: Shape = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target(Site):
    """An adapted layer: a `Site` and its settings from the config.

    Attributes:
      rank: ``r``.
      alpha: numerator of the scaling.
      scaling: the factor before ``A B``.
      dora: whether it has a magnitude.
    """

    rank: int
    alpha: float
    scaling: float
    dora: bool = False

    @property
    def trainable(self) -> int:
        """Number of elements of A, B and (with DoRA) m."""
        return sum(map(math.prod, self.leaf_shapes.values()))

    @property
    def factor_shapes(self) -> tuple[Shape, Shape]:
        """Shapes of ``lora_a`` and ``lora_b`` in the parameter tree."""
        a, b = self.contraction.factor_shapes(self.kernel_shape, self.rank)
        return _stacked_at(a, self.scanned_a), _stacked_at(b, self.scanned_b)

    @property
    def leaf_shapes(self) -> dict[str, Shape]:
        """Shapes of the adapter's leaves in the parameter tree, by name."""
        a, b = self.factor_shapes
        shapes: dict[str, Shape] = {LORA_A: a, LORA_B: b}
        if self.dora:
            m = magnitude_shape(self.kernel_shape, self.contraction)
            shapes[MAGNITUDE] = _stacked_at(m, self.scanned_m)
        return shapes

    def leaf_axes(self, of_kernel: Sequence[Any]) -> dict[str, tuple[Any, ...]]:
        """Maps a value for each axis of ``W0`` to the axes of the adapter's leaves.

        Args:
          of_kernel: one value for each axis of ``W0`` in the tree, e.g. the mesh axis
            it is sharded over.

        Returns:
          One value per axis of each leaf, by leaf name: A takes the values of the input
          axes, B and m those of the output axes, and all of them those of the batch
          axes. The rank axis, and both output axes of a grouped convolution, get None.
        """
        roles = self.contraction
        batch, inputs, outputs = (
            tuple(of_kernel[axis] for axis in axes)
            for axes in (roles.batch, roles.inputs, roles.outputs)
        )
        if roles.groups > 1:
            batch, outputs = (*batch, None), (None,)
        axes = {
            LORA_A: _stacked_at((*batch, *inputs, None), self.scanned_a),
            LORA_B: _stacked_at((*batch, None, *outputs), self.scanned_b),
        }
        if self.dora:
            stored = batch[:-1] if roles.groups > 1 else batch
            axes[MAGNITUDE] = _stacked_at((*stored, *outputs), self.scanned_m)
        return axes

    def init(self, key: PRNGKey, init: str = "uniform") -> tuple[AnyFloat, AnyFloat]:
        """Initialises ``lora_a`` randomly and ``lora_b`` to zero.

        Args:
          key: PRNG key of the whole tree; the path is folded in.
          init: distribution of A, see `LoRAConfig`.

        Returns:
          Both in the layout of the parameter tree.
        """
        a, b = init_adapter(
            path_key(key, self.path),
            self.kernel_shape,
            self.rank,
            contraction=self.contraction,
            init=init,  # pyright: ignore[reportArgumentType] - LoRAConfig checked it
            one_hot=self.kind == "embed",
        )
        return self.as_stored(a, b)

    def init_magnitude(self, kernel: AnyFloat) -> AnyFloat:
        """Returns DoRA's m, the column norms of ``W0``, in the tree's layout."""
        m = column_norm(jnp.asarray(kernel), self.contraction)
        return jnp.moveaxis(m, range(len(self.scanned_m)), self.scanned_m)

    def magnitude_first(self, magnitude: AnyFloat) -> AnyFloat:
        """Returns the tree's m with the scanned axes first, as the ops expect."""
        return jnp.moveaxis(magnitude, self.scanned_m, range(len(self.scanned_m)))

    def as_stored(self, a: AnyFloat, b: AnyFloat) -> tuple[AnyFloat, AnyFloat]:
        """Returns A and B with the scanned axes at their positions in the tree."""
        return (
            jnp.moveaxis(a, range(len(self.scanned_a)), self.scanned_a),
            jnp.moveaxis(b, range(len(self.scanned_b)), self.scanned_b),
        )

    def batch_first(self, a: AnyFloat, b: AnyFloat) -> tuple[AnyFloat, AnyFloat]:
        """Returns the tree's A and B with the scanned axes first, as the ops expect."""
        return (
            jnp.moveaxis(a, self.scanned_a, range(len(self.scanned_a))),
            jnp.moveaxis(b, self.scanned_b, range(len(self.scanned_b))),
        )


def child(path: str, name: str) -> str:
    """Joins a path, empty for the root, and a name."""
    return f"{path}/{name}" if path else name


def select_targets(
    sites: Sequence[Site],
    config: LoRAConfig,
    *,
    weights: Iterable[str] = (),
    unsupported: Mapping[str, UnsupportedWeight] | None = None,
) -> list[Target]:
    """Selects the layers that ``config`` adapts.

    Args:
      sites: every layer that can be adapted.
      config: the adapter config.
      weights: paths of all leaves of the base, for ``train`` and ``exclude``.
      unsupported: weights that can't be adapted, by path.

    Returns:
      One `Target` per adapted layer, in the order of ``sites``.

    Raises:
      ValueError: listing every pattern that matches nothing (with the nearest path) and
        every target that can't be adapted; or if no layer is selected.
    """
    unsupported = unsupported or {}
    paths = [site.path for site in sites]
    others = [*unsupported, *(_owner(path) for path in unsupported)]
    faults = [
        *_unmatched("targets", config.targets, paths, "kernels", others=others),
        *_unmatched("exclude", config.exclude, paths, "kernels", others=others),
        *_unmatched("train", config.train, _ancestors(weights, paths), "parameters"),
    ]
    for name in ("rank_pattern", "alpha_pattern"):
        for pattern, _ in getattr(config, name):
            faults += _unmatched(
                name, f"(.*/)?({pattern})", paths, "kernels", shown=pattern
            )
    faults += [
        f"targets={_shown(config.targets)} match {path!r}, a weight of {weight.kind}, "
        f"which can't be adapted{': ' * bool(weight.why)}{weight.why.rstrip('.')}. "
        "Register its layer with `register_layer`, or exclude it."
        for path, weight in unsupported.items()
        if _is_named(path, weight, config)
    ]
    faults += _layer_faults(sites, config)
    if config.dora:
        faults += [
            f"dora=True needs the kernel that {site.path!r} multiplies by, but its "
            f"module transforms {site.weight!r} first. Exclude it, or set dora=False."
            for site in sites
            if not site.is_plain and _is_chosen(site, config)
        ]
    chosen = [t for site in sites if (t := target_at(site, config)) is not None]
    if not chosen and not faults:
        faults.append(
            f"targets={_shown(config.targets)}, exclude={_shown(config.exclude)}, "
            f"train={_shown(config.train)}, layers={config.layers} leave 0 of "
            f"{len(sites)} kernels to adapt."
        )
    if faults:
        raise ValueError(" ".join(faults))
    return chosen


def target_at(site: Site, config: LoRAConfig) -> Target | None:
    """Returns the `Target` of one layer, or None if ``config`` doesn't adapt it."""
    return as_target(site, config) if _is_chosen(site, config) else None


def as_target(site: Site, config: LoRAConfig) -> Target:
    """Returns the `Target` of a layer that is adapted, whatever ``config`` targets."""
    return Target(
        **{field.name: getattr(site, field.name) for field in dataclasses.fields(Site)},
        rank=config.rank_for(site.path),
        alpha=config.alpha_for(site.path),
        scaling=config.scaling_for(site.path),
        dora=config.dora,
    )


def _stacked_at(values: tuple[Any, ...], axes: tuple[int, ...]) -> tuple[Any, ...]:
    """Moves the leading values (e.g. an array's sizes) to ``axes``."""
    stacked = list(values[len(axes) :])
    for axis, value in zip(axes, values, strict=False):
        stacked.insert(axis, value)
    return tuple(stacked)


def _is_chosen(site: Site, config: LoRAConfig) -> bool:
    return config.is_target(site.path, is_linear=site.kind in LINEAR_KINDS)


def _is_named(path: str, weight: UnsupportedWeight, config: LoRAConfig) -> bool:
    """Returns whether the config targets a weight, by its path or its layer's."""
    paths = (path, _owner(path))
    if any(matches(out, p) for out in (config.exclude, config.train) for p in paths):
        return False
    return any(config.is_target(p, is_linear=weight.is_linear) for p in paths)


def _layer_faults(sites: Sequence[Site], config: LoRAConfig) -> list[str]:
    """Returns the errors in ``config.layers``: stacked or missing layers."""
    if config.layers is None:
        return []
    everywhere = dataclasses.replace(config, layers=None)
    named = [site for site in sites if _is_chosen(site, everywhere)]
    indices = {layer_index(site.path) for site in named}
    known = sorted(index for index in indices if index is not None)
    faults = [
        f"layers={list(config.layers)} can't select within {site.path!r}: its layers "
        "are stacked in one array (nn.scan) and have no index in the path."
        for site in named
        if site.scanned_a and layer_index(site.path) is None
    ][:1]
    absent = [index for index in config.layers if index not in indices]
    if absent and not faults:
        faults.append(f"layers={absent} matched 0 of the layers {known}.")
    return faults


def _unmatched(
    field: str,
    patterns: Patterns,
    paths: Sequence[str],
    what: str,
    *,
    shown: str | None = None,
    others: Sequence[str] = (),
) -> list[str]:
    """Returns an error message for each pattern that matches none of the paths."""
    if patterns == ALL_LINEAR:
        return []
    faults = []
    for pattern in [patterns] if isinstance(patterns, str) else [[p] for p in patterns]:
        if any(matches(pattern, path) for path in (*paths, *others)):
            continue
        name = shown or (pattern if isinstance(pattern, str) else pattern[0])
        hint = nearest(name, paths)
        faults.append(
            f"{field}={_shown(shown or pattern)} matched 0 of {len(paths)} {what}."
            + (f" Did you mean: {hint}?" if hint else "")
        )
    return faults


def _shown(patterns: Patterns) -> str:
    """Formats patterns as in a config file."""
    return json.dumps(patterns, ensure_ascii=False)


def _owner(path: str) -> str:
    return path.rpartition("/")[0]


def _ancestors(weights: Iterable[str], paths: Sequence[str]) -> list[str]:
    """Returns all leaves and the modules above them: the valid ``train`` names."""
    found: dict[str, None] = dict.fromkeys(paths)
    for weight in weights:
        parts = weight.split("/")
        found.update(("/".join(parts[: i + 1]), None) for i in range(len(parts)))
    return list(found)
