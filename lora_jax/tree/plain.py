"""A method's adapter as the LoRA (or DoRA) adapter with the same update.

PiSSA's ``s (A B - A0 B0)`` is LoRA of rank ``2 r`` with the same ``s``, so everything
made for LoRA (files of other tools, banks, arithmetic, servers) takes it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.array_types import PyTree
from lora_jax.config import LoRAConfig
from lora_jax.names import FIXED, LORA, LORA_A, LORA_B, MAGNITUDE
from lora_jax.tree.partition import adapter_of
from lora_jax.tree.paths import flatten, unflatten
from lora_jax.tree.target import Target, child


def plain_config(config: LoRAConfig) -> LoRAConfig:
    """Returns the config of `plain_variables`: of no method, at each layer's own rank.

    Example:
      >>> plain_config(LoRAConfig(rank=4, alpha=8, init="pissa"))
      ... # doctest: +ELLIPSIS
      LoRAConfig(rank=8, alpha=16...init='uniform'...)
    """
    if not config.fixes_leaves:
        return config
    config = dataclasses.replace(config, lora_fa=False, vera=False, vera_seed=0)
    if not config.starts_from_base:
        return config
    growth = _growth(config)
    return dataclasses.replace(
        config,
        rank=2 * config.rank,
        alpha=growth * config.alpha,
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern},
        alpha_pattern={key: growth * float(a) for key, a in config.alpha_pattern},
        init="uniform",
    )


def plain_targets(targets: Sequence[Target], config: LoRAConfig) -> list[Target]:
    """Returns the targets of `plain_variables`, with the same scalings.

    Args:
      targets: the adapted layers.
      config: that they were made with.
    """
    leaves = tuple(plain_config(config).leaves.items())
    times, growth = (2, _growth(config)) if config.starts_from_base else (1, 1.0)
    return [
        dataclasses.replace(
            target,
            rank=times * target.rank,
            alpha=growth * target.alpha,
            leaves=leaves,
        )
        for target in targets
    ]


def plain_variables(
    variables: Mapping[str, PyTree], targets: Sequence[Target]
) -> dict[str, PyTree]:
    """Returns the variables with a plain adapter in place of a method's.

    Args:
      variables: the collections; arrays, or anything with a shape under
        `jax.eval_shape`.
      targets: the adapted layers, by the config that they were made with.

    Returns:
      The same collections, without ``fixed``, for the model of `plain_config`. W0 and
      what is trained in full are not copied.
    """
    if FIXED not in variables:
        return dict(variables)
    leaves, plain = flatten(adapter_of(variables)), {}
    for target in targets:
        factors = target.plain(leaves)
        a, b = target.as_stored(factors.lora_a, factors.lora_b)
        plain |= {child(target.path, LORA_A): a, child(target.path, LORA_B): b}
        if target.dora:
            name = child(target.path, MAGNITUDE)
            plain[name] = leaves[name]
    others: dict[str, Any] = {k: v for k, v in variables.items() if k != FIXED}
    return {**others, LORA: unflatten(plain)}


def _growth(config: LoRAConfig) -> float:
    """Returns the factor of alpha that keeps the scaling at twice the rank."""
    return 2**0.5 if config.rslora else 2.0
