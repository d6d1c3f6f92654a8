"""Weights that no adapter covers: what to say of them in a warning or below a table."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from lora_jax.config import ALL_LINEAR, LoRAConfig, matches
from lora_jax.tree.targets import Site, UnsupportedWeight, target_at

EXPERTS = "experts"  # the kind of their layers


def describe_uncovered(
    unsupported: Mapping[str, UnsupportedWeight], config: LoRAConfig
) -> str:
    """Names the linear weights whose layers can't be adapted, for a warning.

    These are the weights with at least two axes that are not position tables (a first
    axis of size 1) and match neither ``exclude`` nor ``train``.

    Args:
      unsupported: weights that can't be adapted, by path.
      config: the adapter config.

    Returns:
      The warning; empty if there are none, or ``config`` doesn't target
      ``"all-linear"``.
    """
    if config.targets != ALL_LINEAR:
        return ""
    left = {
        path: weight
        for path, weight in unsupported.items()
        if len(weight.shape) > 1
        and min(weight.shape) > 1
        and not any(
            matches(out, name)
            for out in (config.exclude, config.train)
            for name in (path, path.rpartition("/")[0])
        )
    }
    if not left:
        return ""
    first = {weight.kind: path for path, weight in reversed(left.items())}
    shown = ", ".join(
        f"{first[kind]} ({kind}" + (f", and {n - 1} more like it)" if n > 1 else ")")
        for kind, n in Counter(weight.kind for weight in left.values()).items()
    )
    total = sum(math.prod(weight.shape) for weight in left.values())
    count = f"{len(left)} weight{'s' * (len(left) > 1)}, {total:,} parameters"
    return (
        f"targets='all-linear' does not adapt {shown}: {count}, of layer types that "
        "are not registered. Register them with `register_layer`, or list them in "
        "`exclude` to silence this warning."
    )


def describe_experts(sites: Iterable[Site], config: LoRAConfig) -> str:
    """Names the experts that ``config`` leaves frozen, for the table of targets.

    Args:
      sites: every layer that can be adapted.
      config: the adapter config.

    Returns:
      One line; empty if the model has no experts, or all are adapted.

    Example:
      >>> from lora_jax.ops.experts import EXPERTS as ROLES
      >>> site = Site("mlp/experts/up", "experts", "kernel", (4, 2, 3), ROLES)
      >>> describe_experts([site], LoRAConfig(targets=["query"]))[:52]
      'experts: not adapted: mlp/experts/up, 24 parameters.'
      >>> describe_experts([site], LoRAConfig())
      ''
    """
    left = [
        site
        for site in sites
        if site.kind == EXPERTS and target_at(site, config) is None
    ]
    if not left:
        return ""
    alike: dict[str, list[str]] = {}  # layers that differ in their number
    for site in left:
        alike.setdefault(re.sub(r"\d+", "#", site.path), []).append(site.path)
    shown = ", ".join(
        f"{name} ({len(paths)})" if len(paths) > 1 else paths[0]
        for name, paths in alike.items()
    )
    total = sum(math.prod(site.kernel_shape) for site in left)
    ends = ", ".join(
        dict.fromkeys("/".join(site.path.split("/")[-2:]) for site in left)
    )
    return (
        f"experts: not adapted: {shown}, {total:,} parameters. They stay frozen unless "
        f"targets name them: {ends}."
    )
