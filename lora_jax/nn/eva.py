"""EVA: A from the principal components of each layer's inputs, where ranks matter most.

The components of all layers compete: of the sum of the config's ranks, each layer gets
as many as its components explain variance better than the others'. B is zero, so the
start is silent.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.array_types import PyTree
from lora_jax.config import LoRAConfig
from lora_jax.names import LORA_A
from lora_jax.nn.adapt import Adapted
from lora_jax.nn.apply import call_inputs, rule_of_call
from lora_jax.nn.data_start import Loss
from lora_jax.nn.layer_rules import CALL
from lora_jax.tree.partition import join, partition
from lora_jax.tree.paths import flatten, unflatten
from lora_jax.tree.target import Target, child
from lora_jax.tree.token_rows import token_rows_of

RHO = 2.0  # of EVA's paper


class Components(NamedTuple):
    """The principal components of a layer's inputs.

    Attributes:
      rows: unit vectors ``[k, in]``, the most important first.
      ratios: the share of the variance that each explains ``[k]``.
    """

    rows: np.ndarray
    ratios: np.ndarray


def eva_init(
    adapted: Adapted,
    variables: Mapping[str, PyTree],
    loss_fn: Loss,
    batches: Iterable[Any],
    *,
    rho: float = RHO,
    mask: Callable[[Any], Any] = lambda batch: None,
) -> tuple[Adapted, dict[str, PyTree]]:
    """Starts A from the principal components of the layers' inputs.

    Args:
      adapted: of a config with ``init="eva"``, whose ranks sum to the budget.
      variables: from ``adapted.attach``, with adapters that weren't trained.
      loss_fn: as for `make_train_step`, called with no rngs; what it returns is not
        used, only what it computes. The model must not use `flax.linen.scan` or
        `flax.linen.remat`.
      batches: of the training data.
      rho: a layer gets at most ``rho`` times the config's rank; 1 keeps all ranks.
      mask: gives the mask ``[b, t]`` of a batch's rows that count, or None for all.

    Returns:
      The model of a config with the new ranks (layers of rank 0 are not targets), and
      its variables. Scalings are those of the given config.

    Raises:
      ValueError: if the config has another ``init``, ``rho`` is below 1, there are no
        batches, inputs aren't finite, or a target is stacked or isn't a linear layer.

    References:
      Paischer et al., https://arxiv.org/abs/2410.07170, section 3.
    """
    base = adapted.detach(variables)
    targets = adapted.targets(base)
    check_eva(adapted.config, targets, rho)
    moments = _moments(targets, variables, loss_fn, batches, mask)
    found = components_of(targets, moments, rho)
    config = with_ranks(adapted.config, targets, found)
    made = adapted.clone(config=config)
    flat, leaves = flatten(base), {}
    for target in made.targets(base):
        own = start_at(target, flat[target.weight_path], found[target.path])
        leaves |= {child(target.path, name): leaf for name, leaf in own.items()}
    rows = token_rows_of(variables)
    return made, partition(join(base, unflatten(leaves), rows), config)


def components_of(
    targets: Sequence[Target],
    moments: Mapping[str, tuple[np.ndarray, np.ndarray, float]],
    rho: float,
) -> dict[str, Components]:
    """Returns the components of each layer's inputs, as many as it may get.

    Args:
      targets: the adapted layers, of the config's ranks.
      moments: `sum_moments`'s, by path.
      rho: see `eva_init`.
    """
    found = {}
    for target in targets:
        sides = target.contraction.matrix_size(target.kernel_shape)
        most = min(round(rho * target.rank), *sides)
        found[target.path] = principal_components(*moments[target.path], most)
    return found


def start_at(target: Target, kernel: Any, components: Components) -> dict[str, Any]:
    """Returns a layer's leaves, with A from the components of its inputs.

    Args:
      target: the layer, of its new rank.
      kernel: ``W0``.
      components: of its inputs.
    """
    own = target.init(jax.random.key(0), kernel)
    rows = components.rows[: target.rank]
    own[LORA_A] = jnp.asarray(rows.T.reshape(own[LORA_A].shape), jnp.float32)
    return own


def principal_components(
    second: np.ndarray, total: np.ndarray, count: float, most: int
) -> Components:
    """Returns the principal components of rows, given their moments.

    Args:
      second: ``Σ x xᵀ`` ``[in, in]``.
      total: ``Σ x`` ``[in]``.
      count: number of rows.
      most: how many components.

    Example:
      >>> rows = np.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
      >>> found = principal_components(rows.T @ rows, rows.sum(0), 4, most=1)
      >>> abs(found.rows).tolist(), found.ratios.round(6).tolist()
      ([[1.0, 0.0]], [0.9])
    """
    covariance = second - np.outer(total, total) / count
    values, vectors = np.linalg.eigh(covariance)
    values = np.maximum(values[::-1], 0)
    whole = values.sum() or 1.0
    return Components(vectors.T[::-1][:most], values[:most] / whole)


def redistribute(ratios: Mapping[str, np.ndarray], budget: int) -> dict[str, int]:
    """Returns each layer's rank: its components among the ``budget`` most important.

    Args:
      ratios: by path, the share of variance of each component, largest first.
      budget: the sum of the ranks.

    Example:
      >>> redistribute({"a": np.array([0.9, 0.05]), "b": np.array([0.5, 0.4])}, 3)
      {'a': 1, 'b': 2}
    """
    order = sorted(
        ((-ratio, path) for path, own in ratios.items() for ratio in own.tolist()),
        key=lambda pair: pair[0],
    )
    ranks = dict.fromkeys(ratios, 0)
    for _, path in order[:budget]:
        ranks[path] += 1
    return ranks


def check_eva(config: LoRAConfig, targets: Sequence[Target], rho: float) -> None:
    """Raises unless EVA can start these layers.

    Raises:
      ValueError: if the config has another ``init``, ``rho`` is below 1, or a target is
        stacked or isn't a linear layer; lists these.
    """
    if config.init != "eva" or rho < 1:
        raise ValueError(
            "adapted must have a config with init='eva', and rho be at least 1; got "
            f"init={config.init!r}, rho={rho}."
        )
    faults = [
        f"{t.path} is {'stacked' if t.contraction.batch else f'of kind {t.kind!r}'}"
        for t in targets
        if t.contraction.batch or t.kind not in ("dense", "einsum")
    ]
    if faults:
        raise ValueError(
            "init='eva' adapts linear layers that aren't stacked (by nn.scan or as "
            f"experts); {', '.join(faults)}. Exclude them, or unroll the model."
        )


def _moments(
    targets: Sequence[Target],
    variables: Mapping[str, PyTree],
    loss_fn: Loss,
    batches: Iterable[Any],
    mask: Callable[[Any], Any],
) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """Returns ``Σ x xᵀ``, ``Σ x`` and the number of the rows of each layer's input."""
    by_path = {target.path: target for target in targets}

    @jax.jit
    def observed(variables, batch, weights):
        found: dict[str, Any] = {}

        def observe(next_fun, args, kwargs, context):
            if context.method_name != CALL or isinstance(context.module, Adapted):
                return next_fun(*args, **kwargs)
            path = "/".join(context.module.path)
            if path in by_path and rule_of_call(context) is not None:
                x = call_inputs(context.orig_method, args, kwargs)[0]
                new = moments_of(x, by_path[path], weights)
                old = found.get(path)
                found[path] = new if old is None else jax.tree.map(jnp.add, old, new)
            return next_fun(*args, **kwargs)

        with nn.intercept_methods(observe):
            loss_fn(variables, batch, {})
        return found

    def observe_batch(batch: Any) -> dict[str, Any]:
        return observed(variables, batch, mask(batch))

    return sum_moments(observe_batch, by_path, batches)


def sum_moments(
    observed: Callable[[Any], Mapping[str, Any]],
    paths: Iterable[str],
    batches: Iterable[Any],
) -> dict[str, tuple[np.ndarray, np.ndarray, float]]:
    """Sums the moments of layers' inputs over batches, in float64.

    Args:
      observed: gives a batch's moments by path, each of `moments_of`.
      paths: of the layers that there must be.
      batches: of the training data.

    Raises:
      ValueError: if there are no batches, a layer got no input, or one isn't finite.
    """
    total: dict[str, Any] | None = None
    with _explained():
        for batch in batches:
            new = jax.tree.map(
                lambda leaf: np.asarray(leaf, np.float64), dict(observed(batch))
            )
            total = new if total is None else jax.tree.map(np.add, total, new)
    if total is None:
        raise ValueError("batches must have at least one batch; got none.")
    faults = [f"{path} got no input" for path in paths if path not in total]
    faults += [
        f"{path} has NaN or infinity"
        for path, own in total.items()
        if not all(np.isfinite(part).all() for part in own)
    ]
    if faults:
        raise ValueError(f"inputs can't be analysed: {'; '.join(faults)}.")
    return total


@contextlib.contextmanager
def _explained():
    try:
        yield
    except jax.errors.UnexpectedTracerError as error:
        raise ValueError(
            "init='eva' observes the inputs of layers, which nn.remat and nnx.remat "
            "hide, and scans too. Pass a loss of the model without them, such as "
            "`model.clone(remat='none')`."
        ) from error


def moments_of(x: jax.Array, target: Target, weights: Any) -> tuple[Any, ...]:
    """Returns ``Σ x xᵀ``, ``Σ x`` and the number of the rows of one layer's input.

    Args:
      x: the input.
      target: the layer.
      weights: the mask of its rows, or None.
    """
    roles = target.contraction
    sizes = tuple(target.kernel_shape[axis] for axis in roles.inputs)
    if x.shape[x.ndim - len(sizes) :] != sizes:
        raise ValueError(
            f"init='eva' needs layers that contract the last axes of their input; "
            f"{target.path} has kernel {target.kernel_shape} and input {x.shape}."
        )
    leading = x.shape[: x.ndim - len(sizes)]
    rows = x.reshape(-1, math.prod(sizes)).astype(jnp.float32)
    counted = jnp.ones(leading, jnp.float32)
    if weights is not None and leading[: weights.ndim] == weights.shape:
        more = (1,) * (len(leading) - weights.ndim)
        counted = counted * (weights > 0).reshape(*weights.shape, *more)
    counted = counted.reshape(-1, 1)
    kept = rows * counted
    second = jnp.matmul(kept.T, kept, precision="highest")
    return second, kept.sum(0), counted.sum()


def with_ranks(
    config: LoRAConfig, targets: Sequence[Target], found: Mapping[str, Components]
) -> LoRAConfig:
    """Returns the config of EVA's ranks, at the scalings that the layers have.

    Args:
      config: given, whose ranks sum to the budget.
      targets: its layers.
      found: the components of their inputs.
    """
    ratios = {path: each.ratios for path, each in found.items()}
    ranks = redistribute(ratios, sum(target.rank for target in targets))
    kept = {target.path: target for target in targets if ranks[target.path]}

    def alpha(target: Target) -> float:
        rank = ranks[target.path]
        return target.scaling * (rank**0.5 if config.rslora else rank)

    own = ("targets", "exclude", "layers", "rank", "alpha")
    fields = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in (*own, "rank_pattern", "alpha_pattern")
    }
    return LoRAConfig.for_layers(
        {path: ranks[path] for path in kept},
        {path: alpha(target) for path, target in kept.items()},
        **fields,
    )
