"""EVA and LoRA-GA for NNX models: adapters that start from data.

They take the place of `lora_jax.nnx.adapt`: the given model computes the inputs of its
layers, or the gradient of its weights, and has no adapters yet.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.config import LoRAConfig
from lora_jax.names import FROZEN
from lora_jax.nn.data_start import check_lora_ga, start_along, sum_gradients
from lora_jax.nn.eva import (
    RHO,
    check_eva,
    components_of,
    moments_of,
    start_at,
    sum_moments,
    with_ranks,
)
from lora_jax.nnx.adapt import (
    Targets,
    Values,
    adapt_with,
    fresh_values,
    key_and_kernels,
)
from lora_jax.nnx.find import Found, find_layers, rebuild, select
from lora_jax.nnx.functional import functional
from lora_jax.nnx.layers import set_class
from lora_jax.nnx.rules import rule_of
from lora_jax.ops.start import GAMMA
from lora_jax.tree.paths import flatten, unflatten

Loss = Callable[[Any, Any], jax.Array]  # loss(model, batch)


def lora_ga_init(
    model: nnx.Module,
    config: LoRAConfig,
    loss_fn: Loss,
    batches: Iterable[Any],
    *,
    rngs: nnx.Rngs,
    gamma: float = GAMMA,
    stack_axis: int | None = None,
) -> Any:
    """Adds LoRA whose A and B start from the gradient of the loss.

    Args:
      model: any NNX module without adapters, not changed.
      config: of ``init="lora_ga"``.
      loss_fn: ``loss_fn(model, batch)``, a scalar; the model is in evaluation mode.
      batches: of the training data; their gradients are summed.
      rngs: as for `lora_jax.nnx.adapt`.
      gamma: as for `lora_jax.lora_ga_init`.
      stack_axis: as for `lora_jax.nnx.adapt`.

    Returns:
      The adapted model, whose output is still the base's.

    Raises:
      ValueError: as `lora_jax.lora_ga_init` and `lora_jax.nnx.adapt`.

    Example:
      >>> model, x = nnx.Linear(4, 4, rngs=nnx.Rngs(0)), jnp.eye(4)
      >>> config = LoRAConfig(rank=2, init="lora_ga", targets=".*")
      >>> loss = lambda model, batch: jnp.sum(model(batch) ** 2)
      >>> adapted = lora_ga_init(model, config, loss, [x], rngs=nnx.Rngs(1))
      >>> bool(jnp.allclose(adapted(x), model(x), atol=1e-6))
      True

    References:
      Wang, Yu and Li, https://arxiv.org/abs/2407.05000, section 3.3.
    """
    check_lora_ga(config)
    module, variables = functional(model)

    def loss(kernels, others, batch):
        whole = {**others, FROZEN: unflatten({**flatten(others[FROZEN]), **kernels})}
        return loss_fn(module.bind(whole, deterministic=True), batch)

    def values_of(found: Found, targets: Targets) -> Values:
        values = fresh_values(found, targets, config, rngs)
        frozen = flatten(variables[FROZEN])
        kernels = {t.weight_path: frozen[t.weight_path] for t in targets.values()}
        total = sum_gradients(loss, kernels, variables, batches)
        for path, target in targets.items():
            start = start_along(target, total[target.weight_path], gamma)
            values[path] |= {
                name: start[name] for name in start if name in values[path]
            }
        return values

    return adapt_with(values_of, model, config, rngs=rngs, stack_axis=stack_axis)


def eva_init(
    model: nnx.Module,
    config: LoRAConfig,
    loss_fn: Loss,
    batches: Iterable[Any],
    *,
    rngs: nnx.Rngs,
    rho: float = RHO,
    mask: Callable[[Any], Any] = lambda batch: None,
) -> Any:
    """Adds LoRA whose A are the principal components of the layers' inputs.

    Args:
      model: any NNX module without adapters, not changed; not under `flax.nnx.scan` or
        `flax.nnx.remat`.
      config: of ``init="eva"``, whose ranks sum to the budget.
      loss_fn: ``loss_fn(model, batch)``; only what it computes matters. The model is in
        evaluation mode.
      batches: of the training data.
      rngs: as for `lora_jax.nnx.adapt`.
      rho: a layer gets at most ``rho`` times the config's rank; 1 keeps all ranks.
      mask: gives the mask ``[b, t]`` of a batch's rows that count, or None for all.

    Returns:
      The adapted model. Its ranks, where the components explain most, are in the
      config of its layers; a layer of rank 0 is not adapted.

    Raises:
      ValueError: as `lora_jax.eva_init` and `lora_jax.nnx.adapt`.

    Example:
      >>> model, x = nnx.Linear(4, 4, rngs=nnx.Rngs(0)), jnp.eye(4)
      >>> config = LoRAConfig(rank=2, init="eva", targets=".*")
      >>> loss = lambda model, batch: jnp.sum(model(batch))
      >>> adapted = eva_init(model, config, loss, [x], rngs=nnx.Rngs(1))
      >>> bool((adapted(x) == model(x)).all())
      True

    References:
      Paischer et al., https://arxiv.org/abs/2410.07170, section 3.
    """
    targets = select(find_layers(model, config), config)
    check_eva(config, targets, rho)
    by_path = {target.path: target for target in targets}
    seen: dict[str, list[Any]] = {}

    def change(path: str, layer: Any) -> None:
        if path in by_path:
            set_class(layer, _observing(layer, functools.partial(_append, seen, path)))

    module, variables = functional(rebuild(model, {}, change))

    @jax.jit
    def observed(variables, batch, weights):
        seen.clear()
        loss_fn(module.bind(variables, deterministic=True), batch)
        return {
            path: jax.tree.map(
                lambda *parts: sum(parts[1:], start=parts[0]),
                *(moments_of(jnp.asarray(x), by_path[path], weights) for x in inputs),
            )
            for path, inputs in seen.items()
        }

    moments = sum_moments(
        lambda batch: observed(variables, batch, mask(batch)), by_path, batches
    )
    found = components_of(targets, moments, rho)

    def values_of(layers: Found, targets: Targets) -> Values:
        _, kernels = key_and_kernels(layers, targets, rngs)
        return {p: start_at(t, kernels[p], found[p]) for p, t in targets.items()}

    return adapt_with(values_of, model, with_ranks(config, targets, found), rngs=rngs)


def _append(seen: dict[str, list[Any]], path: str, x: Any) -> None:
    seen.setdefault(path, []).append(x)


def _observing(layer: Any, observe: Callable[[Any], None]) -> type:
    """Returns a subclass of a layer's class that shows its inputs."""
    cls = type(layer)
    known = rule_of(cls, layer)
    assert known is not None, cls
    name = known[1].methods[0]
    original = getattr(cls, name)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        observe(inspect.signature(original).bind(self, *args, **kwargs).args[1])
        return original(self, *args, **kwargs)

    return type(cls.__name__, (cls,), {name: method, "__module__": __name__})
