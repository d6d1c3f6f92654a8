"""Which layers of a model get an adapter, and its shapes.

Tracing a model gives a `Site` for every layer that LoRA can adapt. The config selects
among them; a pattern that matches nothing is an error.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence

from lora_jax.config import ALL_LINEAR, LoRAConfig, Patterns, layer_index, matches
from lora_jax.tree.paths import nearest
from lora_jax.tree.target import Site as Site
from lora_jax.tree.target import Target as Target
from lora_jax.tree.target import UnsupportedWeight as UnsupportedWeight
from lora_jax.tree.target import as_target as as_target
from lora_jax.tree.target import child as child

_UNFIT_FOR_EMBEDDINGS = {
    "init='orthogonal'": "its A would move tokens that never occur",
    "init='lora_ga'": "the gradient of its table is of the tokens in a few batches",
    "init='eva'": "its input is one-hot",
    "lora_fa=True": "its A is zero at the start, and would stay so",
    "vera=True": "its A would be a frozen random row for each token",
}
LINEAR_KINDS = ("dense", "einsum", "experts")  # what "all-linear" covers


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
    chosen = [site for site in sites if _is_chosen(site, config)]
    if config.dora:
        faults += [
            f"dora=True needs the kernel that {site.path!r} multiplies by, but its "
            f"module transforms {site.weight!r} first. Exclude it, or set dora=False."
            for site in chosen
            if not site.is_plain
        ]
    faults += [
        f"{field} can't adapt {site.path!r}, an embedding: {why}. Exclude it, or set "
        "another method."
        for field, why in _UNFIT_FOR_EMBEDDINGS.items()
        if field
        in (
            f"init={config.init!r}",
            f"lora_fa={config.lora_fa}",
            f"vera={config.vera}",
        )
        for site in chosen
        if site.kind == "embed"
    ]
    if not chosen and not faults:
        faults.append(
            f"targets={_shown(config.targets)}, exclude={_shown(config.exclude)}, "
            f"train={_shown(config.train)}, layers={config.layers} leave 0 of "
            f"{len(sites)} kernels to adapt.{_left_out(unsupported, config)}"
        )
    if faults:
        raise ValueError(" ".join(faults))
    return [as_target(site, config) for site in chosen]


def _left_out(unsupported: Mapping[str, UnsupportedWeight], config: LoRAConfig) -> str:
    """Says which weights can't be adapted, one of each kind of layer."""
    first: dict[str, str] = {}
    rest = 0
    for path, weight in unsupported.items():
        if _is_left(path, config):
            why = f": {weight.why.rstrip('.')}" if weight.why else ""
            rest += weight.kind in first
            first.setdefault(weight.kind, f"{path} ({weight.kind}{why})")
    more = f", and {rest} more like these" if rest else ""
    return f" It can't adapt {', '.join(first.values())}{more}." if first else ""


def target_at(site: Site, config: LoRAConfig) -> Target | None:
    """Returns the `Target` of one layer, or None if ``config`` doesn't adapt it."""
    return as_target(site, config) if _is_chosen(site, config) else None


def _is_chosen(site: Site, config: LoRAConfig) -> bool:
    return config.is_target(site.path, is_linear=site.kind in LINEAR_KINDS)


def _is_named(path: str, weight: UnsupportedWeight, config: LoRAConfig) -> bool:
    """Returns whether the config targets a weight, by its path or its layer's."""
    return _is_left(path, config) and any(
        config.is_target(p, is_linear=weight.is_linear) for p in (path, _owner(path))
    )


def _is_left(path: str, config: LoRAConfig) -> bool:
    """Returns whether a weight is neither excluded nor trained, nor its layer."""
    outs = (config.exclude, config.train)
    return not any(matches(out, p) for out in outs for p in (path, _owner(path)))


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
