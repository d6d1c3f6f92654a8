"""One layer that LoRA can adapt, and the adapter of one that it does."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lora_jax.array_types import AnyFloat, PRNGKey
from lora_jax.config import LoRAConfig
from lora_jax.names import (
    LORA,
    LORA_A,
    LORA_B,
    MAGNITUDE,
    START_A,
    START_B,
    VERA_B,
    VERA_D,
)
from lora_jax.ops.contraction import Contraction, Shape
from lora_jax.ops.dora import column_norm, magnitude_shape
from lora_jax.ops.factors import Factors
from lora_jax.ops.init import path_key
from lora_jax.ops.start import init_factors
from lora_jax.ops.vera import vera_shapes


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

    @property
    def places(self) -> dict[str, tuple[int, ...]]:
        """Positions of the scanned axes in the tree's leaves, by name."""
        return {
            **dict.fromkeys((LORA_A, START_A), self.scanned_a),
            **dict.fromkeys((LORA_B, START_B, VERA_D, VERA_B), self.scanned_b),
            MAGNITUDE: self.scanned_m,
        }

    def stored(self, name: str, leaf: Any) -> Any:
        """Returns a leaf of the ops with scanned axes at their places in the tree."""
        places = self.places[name]
        return _moved(leaf, range(len(places)), places)

    def first(self, name: str, leaf: Any) -> Any:
        """Returns a leaf of the tree with the scanned axes first, as the ops expect."""
        places = self.places[name]
        return _moved(leaf, places, range(len(places)))

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
      leaves: names of its leaves, each with its collection; see `LoRAConfig.leaves`.
    """

    rank: int
    alpha: float
    scaling: float
    dora: bool = False
    leaves: tuple[tuple[str, str], ...] = ((LORA_A, LORA), (LORA_B, LORA))

    @property
    def trainable(self) -> int:
        """Number of elements that are trained: of A, B and (with DoRA) m."""
        shapes = self.leaf_shapes
        return sum(math.prod(shapes[n]) for n, held in self.leaves if held == LORA)

    @property
    def factor_shapes(self) -> tuple[Shape, Shape]:
        """Shapes of ``lora_a`` and ``lora_b`` in the parameter tree."""
        a, b = self.contraction.factor_shapes(self.kernel_shape, self.rank)
        return _stacked_at(a, self.scanned_a), _stacked_at(b, self.scanned_b)

    @property
    def leaf_shapes(self) -> dict[str, Shape]:
        """Shapes of the adapter's leaves in the parameter tree, by name."""
        a, b = self.factor_shapes
        m = magnitude_shape(self.kernel_shape, self.contraction)
        m = _stacked_at(m, self.scanned_m)
        shapes = {LORA_A: a, LORA_B: b, MAGNITUDE: m, START_A: a, START_B: b}
        _, whole = self.contraction.factor_shapes(self.kernel_shape, self.rank)
        for name, shape in vera_shapes(whole, self.contraction).items():
            shapes[name] = _stacked_at(shape, self.scanned_b)
        return {name: shapes[name] for name, _ in self.leaves}

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
        a = _stacked_at((*batch, *inputs, None), self.scanned_a)
        b = _stacked_at((*batch, None, *outputs), self.scanned_b)
        stored = batch[:-1] if roles.groups > 1 else batch
        m = _stacked_at((*stored, *outputs), self.scanned_m)
        axes = {LORA_A: a, LORA_B: b, MAGNITUDE: m, START_A: a, START_B: b}
        none = (None,) * (1 + len(outputs))
        axes |= {VERA_B: b, VERA_D: _stacked_at((*batch, *none), self.scanned_b)}
        return {name: axes[name] for name, _ in self.leaves}

    def init(
        self, key: PRNGKey, kernel: AnyFloat, init: str = "uniform"
    ) -> dict[str, AnyFloat]:
        """Initialises the adapter's leaves.

        Args:
          key: PRNG key of the whole tree; the path is folded in.
          kernel: ``W0``.
          init: see `LoRAConfig.start`.

        Returns:
          The leaves by name, in the layout of the parameter tree.
        """
        found = init_factors(
            path_key(key, self.path),
            jnp.asarray(kernel),
            self.rank,
            init=init,
            scaling=self.scaling,
            contraction=self.contraction,
            one_hot=self.kind == "embed",
        )
        if self.dora:
            found = found._replace(
                magnitude=column_norm(jnp.asarray(kernel), self.contraction)
            )
        leaves = found._asdict()
        return {name: self.stored(name, leaves[name]) for name, _ in self.leaves}

    def plain(self, leaves: Mapping[str, AnyFloat]) -> Factors:
        """Returns the LoRA or DoRA adapter that the tree's leaves amount to.

        Args:
          leaves: the tree's leaves by path.

        Returns:
          A, B and m with the scanned axes first, as the ops expect; see
          `Factors.plain`.
        """
        found = {
            name: self.first(name, leaves[child(self.path, name)])
            for name, _ in self.leaves
        }
        return Factors(**found).plain(self.contraction)

    def init_magnitude(self, kernel: AnyFloat) -> AnyFloat:
        """Returns DoRA's m, the column norms of ``W0``, in the tree's layout."""
        m = column_norm(jnp.asarray(kernel), self.contraction)
        return self.stored(MAGNITUDE, m)

    def as_stored(self, a: AnyFloat, b: AnyFloat) -> tuple[AnyFloat, AnyFloat]:
        """Returns A and B with the scanned axes at their positions in the tree."""
        return self.stored(LORA_A, a), self.stored(LORA_B, b)

    def batch_first(self, a: AnyFloat, b: AnyFloat) -> tuple[AnyFloat, AnyFloat]:
        """Returns the tree's A and B with the scanned axes first, as the ops expect."""
        return self.first(LORA_A, a), self.first(LORA_B, b)


def child(path: str, name: str) -> str:
    """Joins a path, empty for the root, and a name."""
    return f"{path}/{name}" if path else name


def as_target(site: Site, config: LoRAConfig) -> Target:
    """Returns the `Target` of a layer that is adapted, whatever ``config`` targets."""
    return Target(
        **{field.name: getattr(site, field.name) for field in dataclasses.fields(Site)},
        rank=config.rank_for(site.path),
        alpha=config.alpha_for(site.path),
        scaling=config.scaling_for(site.path),
        dora=config.dora,
        leaves=tuple(config.leaves.items()),
    )


def _stacked_at(values: tuple[Any, ...], axes: tuple[int, ...]) -> tuple[Any, ...]:
    """Moves the leading values (e.g. an array's sizes) to ``axes``."""
    stacked = list(values[len(axes) :])
    for axis, value in zip(axes, values, strict=False):
        stacked.insert(axis, value)
    return tuple(stacked)


def _moved(leaf: Any, source: Sequence[int], target: Sequence[int]) -> Any:
    """Moves axes of an array, NumPy's or JAX's."""
    move = np.moveaxis if isinstance(leaf, np.ndarray) else jnp.moveaxis
    return move(leaf, source, target) if source else leaf
