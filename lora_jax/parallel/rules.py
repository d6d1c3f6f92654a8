"""Sharding rules: which axis of a weight is sharded over which mesh axis.

A rule is a path pattern and a `jax.sharding.PartitionSpec`; the first match applies.
`RULES` covers every model of this library: expanding layers (query, up, ...) are
sharded by outputs over ``tensor`` and the layers after them by inputs, so two matmuls
need one all-reduce; the other axis of each is sharded over ``fsdp``.

Adapters have no rules of their own. A is sharded like W0's input axes and B like its
output axes, by the layer's `Contraction`; the rank axis is never sharded.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from lora_jax.array_types import PyTree
from lora_jax.names import ADAPTER, EXPERT, EXPERTS, FSDP, LAYERS, TENSOR
from lora_jax.ops.contraction import Shape
from lora_jax.parallel.mesh import put_array
from lora_jax.tree.paths import flatten, nearest, unflatten
from lora_jax.tree.targets import Target, child

Rules = Sequence[tuple[str, PartitionSpec]]
ShardingOf = Callable[[str, Shape], Sharding]

# Layers that ``tensor`` splits by outputs, and those after them, by inputs.
EXPANDING = (
    "query|key|value|qkv|gate|up|gate_up|gated_up|own_gate|own_projection"
    "|short_conv/input|distance_query|distance_key|head|pooler|text_head|in_proj"
    "|projection|visual_projection|text_projection"
)
REDUCING = "output|down|gated_down|own_up"
REPLICATED = (
    "router/(kernel|bias)",
    "attention/sinks",
    f"({REDUCING})/bias",
    "delta_net/decay_(log|bias)",
    "(delta_net|short_conv)/conv/(kernel|bias)",
    "shared/opening/kernel",
    "token_rows",
    "(positions|position|token_type|relative_bias|distances)/embedding",
    "embeddings/(cls|position|patch/kernel|patch/bias)",
    "probe",
    "logit_scale|logit_bias",
    r"(classifier|sentence_head/dense_\d+)/(kernel|bias)",
    r"[^/]*norm/(scale|bias)",
    "(attention|mlp|layer|router|expert)_scale",
)
RULES: Rules = (
    ("experts/gate_up/kernel", PartitionSpec(EXPERT, FSDP, TENSOR)),
    ("experts/down/kernel", PartitionSpec(EXPERT, TENSOR, FSDP)),
    ("experts/[^/]*/bias", PartitionSpec(EXPERT)),
    (f"({EXPANDING})/kernel", PartitionSpec(FSDP, TENSOR)),
    (f"({EXPANDING})/bias", PartitionSpec(TENSOR)),
    (f"({REDUCING})/kernel", PartitionSpec(TENSOR, FSDP)),
    ("delta_net/(beta|decay)/kernel", PartitionSpec(FSDP)),
    ("(embed|own_embed|word)/embedding", PartitionSpec(TENSOR, FSDP)),
    ("conv/conv/kernel", PartitionSpec(None, FSDP, TENSOR)),
    ("conv/conv/bias", PartitionSpec(TENSOR)),
    *((pattern, PartitionSpec()) for pattern in REPLICATED),
)


class WeightSharding:
    """The sharding of base weights: a function ``(path, shape) -> NamedSharding``.

    Made by `make_sharding`.

    Attributes:
      mesh: the devices.
      rules: the user's rules, tried before `RULES`.
      uneven: "error" or "replicate".
    """

    def __init__(self, mesh: Mesh, rules: Rules, uneven: str) -> None:
        self.mesh, self.rules, self.uneven = mesh, tuple(rules), uneven

    def __call__(self, path: str, shape: Shape) -> NamedSharding:
        """Returns a leaf's sharding, or raises ValueError."""
        rules = (*self.rules, *RULES)
        spec = next((s for pattern, s in rules if is_match(pattern, path)), None)
        if spec is not None and EXPERT not in self.mesh.shape:  # most meshes
            spec = PartitionSpec(
                *(None if entry == EXPERT else entry for entry in spec)
            )
        if spec is None:
            raise ValueError(
                f"{path} {shape}: no rule matches it; add "
                f"({path.rpartition('/')[2]!r}, PartitionSpec()) to replicate it"
            )
        if len(spec) > len(shape):
            raise ValueError(
                f"{path} {shape}: its rule {spec} has {len(spec) - len(shape)} more "
                "axes than the weight"
            )
        is_stacked = path.startswith(f"{LAYERS}/") and len(spec) < len(shape)
        entries = (*(None,) * is_stacked, *spec)
        entries = (*entries, *(None,) * (len(shape) - len(entries)))
        spec = fit_spec(path, shape, entries, self.mesh, self.uneven)
        return NamedSharding(self.mesh, spec)


def make_sharding(
    mesh: Mesh,
    rules: Rules = (),
    *,
    uneven: Literal["error", "replicate"] = "error",
) -> WeightSharding:
    """Makes the function that determines the sharding of base weights.

    Pass it to `load_model` as ``sharding`` (each tensor is then read directly into its
    shards) or to `shard_variables`. It raises ValueError for a leaf that no rule
    matches, whose rule has too many axes, or whose axes are not divisible.

    Args:
      mesh: from `make_mesh`.
      rules: tried before `RULES`: ``(pattern, spec)``, where the pattern is a regular
        expression for the end of a leaf's path, after a ``/`` (``"mlp/up/kernel"``),
        and the spec names a mesh axis for each axis of the leaf. For scanned layers it
        describes a single layer, with the leading axis unsharded, unless it names every
        axis.
      uneven: what to do with an axis not divisible by the mesh: raise, or leave it
        unsharded.

    Returns:
      ``(path, shape) -> NamedSharding``.

    Raises:
      ValueError: if a rule names an axis that the mesh lacks, or ``uneven`` is unknown.

    Example:
      >>> import jax
      >>> from lora_jax.parallel.mesh import make_mesh
      >>> sharding = make_sharding(make_mesh(devices=jax.devices()[:1]))
      >>> tuple(sharding("layers/mlp/up/kernel", (2, 8, 16)).spec)
      (None, 'fsdp', 'tensor')
    """
    if uneven not in ("error", "replicate"):
        raise ValueError(f"uneven must be 'error' or 'replicate'; got {uneven!r}.")
    unknown = {
        f"{pattern!r} names {axis!r}"
        for pattern, spec in rules
        for axis in _mesh_axes(spec)
        if axis not in mesh.shape
    }
    if unknown:
        raise ValueError(
            f"rules must name axes of the mesh, {', '.join(mesh.shape)}; got "
            f"{'; '.join(sorted(unknown))}."
        )
    return WeightSharding(mesh, rules, uneven)


def partitioned_rules(params: Mapping[str, Any]) -> Rules:
    """Returns the sharding rules of a model that uses ``nn.with_partitioning``.

    Args:
      params: the result of ``model.init``, boxed in `flax.linen.Partitioned` with names
        of mesh axes.

    Returns:
      One rule per leaf, for `make_sharding`; unboxed leaves are replicated.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> init = nn.with_partitioning(nn.initializers.ones, ("fsdp", "tensor"))
      >>> model = nn.Dense(4, kernel_init=init)
      >>> params = model.init(jax.random.key(0), jnp.ones(3))["params"]
      >>> [(path, tuple(spec)) for path, spec in partitioned_rules(params)]
      [('kernel', ('fsdp', 'tensor')), ('bias', ())]
    """
    specs = flatten(nn.get_partition_spec(params))
    # Longest first: "dense/kernel" also matches "block/dense/kernel".
    paths = sorted(specs, key=len, reverse=True)
    return [(re.escape(path), specs[path] or PartitionSpec()) for path in paths]


def is_match(pattern: str, path: str) -> bool:
    """Returns whether a pattern matches a path or the end of one after a ``/``."""
    return re.fullmatch(f"(.*/)?({pattern})", path) is not None


def fit_spec(
    path: str, shape: Shape, entries: Sequence[Any], mesh: Mesh, uneven: str
) -> PartitionSpec:
    """Returns a spec whose mesh axes divide the axes of a leaf.

    With ``uneven="replicate"``, entries that don't divide their axis are dropped.

    Raises:
      ValueError: listing each axis that is not divisible, with sizes that would work.
    """
    fitted, faults = [], []
    for axis, (size, entry) in enumerate(zip(shape, entries, strict=True)):
        names = _mesh_axes([entry])
        parts = math.prod(mesh.shape[name] for name in names)
        if size % parts == 0:
            fitted.append(entry)
            continue
        fitted.append(None)
        below = max(d for d in range(1, min(parts, size) + 1) if size % d == 0)
        above = next((d for d in range(parts, size + 1) if size % d == 0), None)
        faults.append(
            f"axis {axis}, {size}, must be divisible by {' x '.join(names)} = {parts}; "
            f"{below}{f' or {above}' if above else ''} would work"
        )
    if faults and uneven == "error":
        raise ValueError(f"{path} {shape}: {'; '.join(faults)}")
    return PartitionSpec(*fitted)


def resolve_shardings(
    shapes: Mapping[str, Shape], sharding: ShardingOf
) -> dict[str, Sharding]:
    """Resolves the sharding of every leaf, by path, before any is transferred.

    Args:
      shapes: shapes of the leaves by path.
      sharding: from `make_sharding`, or any function of path and shape.

    Raises:
      ValueError: listing the errors of all leaves, or the rules that match nothing.
    """
    found, faults = {}, []
    if isinstance(sharding, WeightSharding):
        check_patterns(sharding.rules, shapes)
    for path, shape in shapes.items():
        try:
            found[path] = sharding(path, tuple(shape))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError(
            f"{len(faults)} of {len(shapes)} weights can't be sharded:\n  "
            + "\n  ".join(faults)
            + "\nChange the mesh, pass your own rules, or pass uneven='replicate'."
        )
    return found


def check_patterns(rules: Rules, paths: Iterable[str]) -> None:
    """Raises a ValueError listing the user's rules that match no weight."""
    paths = list(paths)
    faults = [
        f"{pattern!r} matches 0 of {len(paths)} weights. Did you mean: "
        f"{nearest(pattern, paths)}?"
        for pattern, _ in rules
        if not any(is_match(pattern, path) for path in paths)
    ]
    if faults:
        raise ValueError(f"rules: {' '.join(faults)}")


def shard_variables(
    variables: Mapping[str, PyTree],
    sharding: ShardingOf,
    targets: Sequence[Target] = (),
) -> dict[str, PyTree]:
    """Shards variables over a mesh, each adapter like the weight it adapts.

    Leaves that already have their sharding are not moved. `TrainState.create` then
    shards the optimizer state to match, and the training step preserves the shardings.

    Args:
      variables: ``{"params": ...}``, or ``{"frozen": ..., "lora": ..., ...}`` as
        returned by `Adapted.attach`; the same on every process.
      sharding: from `make_sharding`.
      targets: the adapted layers, from `Adapted.targets`.

    Returns:
      The same collections of committed arrays.

    Raises:
      ValueError: listing every weight that can't be sharded and every adapter leaf
        without a target.
    """
    base = {
        (name, path): leaf
        for name, tree in variables.items()
        if name not in ADAPTER
        for path, leaf in flatten(tree).items()
    }
    shapes = {path: leaf.shape for (_, path), leaf in base.items()}
    placed = resolve_shardings(shapes, sharding)
    adapters = {name: flatten(variables.get(name, {})) for name in ADAPTER}
    where = adapter_shardings(placed, targets)
    if stray := sorted(set().union(*adapters.values()) - set(where)):
        raise ValueError(
            f"targets must include every adapter; {', '.join(stray)} have none. Pass "
            "`adapted.targets(params)`."
        )
    flat: dict[str, dict[str, Any]] = {name: {} for name in variables}
    for (name, path), leaf in base.items():
        flat[name][path] = put_array(leaf, placed[path])
    for name, leaves in adapters.items():
        for path, leaf in leaves.items():
            flat[name][path] = put_array(leaf, where[path])
    return {name: unflatten(leaves) for name, leaves in flat.items()}


def adapter_shardings(
    base: Mapping[str, Sharding], targets: Sequence[Target]
) -> dict[str, Sharding]:
    """Returns adapter shardings by path: A like W0's inputs, B and m like its outputs.

    Those of experts are also split over ``fsdp`` where that is the kernel's other axis.

    Args:
      base: sharding of each weight by path; an adapter gets the same sharding if it has
        no named axes (a single device).
      targets: the adapted layers.
    """
    found = {}
    for target in targets:
        kernel = base[target.weight_path]
        spec = kernel.spec if isinstance(kernel, NamedSharding) else ()
        whole = (None,) * (len(target.kernel_shape) - len(spec))
        shapes = target.leaf_shapes
        for name, axes in target.leaf_axes((*spec, *whole)).items():
            own = kernel
            if isinstance(kernel, NamedSharding):
                if target.kind == EXPERTS:
                    axes = _over_fsdp(axes, shapes[name], kernel.mesh.shape)
                own = NamedSharding(kernel.mesh, PartitionSpec(*axes))
            found[child(target.path, name)] = own
    return found


def _over_fsdp(
    axes: tuple[Any, ...], shape: Shape, sizes: Mapping[str, int]
) -> tuple[Any, ...]:
    """Splits an expert's B of gate and up, or A of down, over ``fsdp`` too.

    Their kernels have ``fsdp`` on the other axis. Of a layer that is one matmul the two
    are small; of all experts they are most of what is trained.
    """
    if FSDP in _mesh_axes(axes) or TENSOR not in axes:
        return axes
    place = axes.index(TENSOR)
    if shape[place] % (sizes.get(TENSOR, 1) * sizes.get(FSDP, 1)):
        return axes
    return (*axes[:place], (TENSOR, FSDP), *axes[place + 1 :])


def _mesh_axes(entries: Iterable[Any]) -> list[str]:
    """Returns the names of the mesh axes in a spec's entries."""
    groups = [(e,) if isinstance(e, str) else e or () for e in entries]
    return [name for group in groups for name in group]
