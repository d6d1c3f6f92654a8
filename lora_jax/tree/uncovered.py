"""Linear weights that ``"all-linear"`` leaves out, for a warning."""

from collections import Counter
from collections.abc import Mapping

from lora_jax.config import ALL_LINEAR, LoRAConfig, matches
from lora_jax.tree.targets import UnsupportedWeight


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
        path: weight.kind
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
    first = {kind: path for path, kind in reversed(left.items())}
    shown = ", ".join(
        f"{first[kind]} ({kind}" + (f", and {n - 1} more like it)" if n > 1 else ")")
        for kind, n in Counter(left.values()).items()
    )
    return (
        f"targets='all-linear' does not adapt {shown}: these layer types are not "
        "registered. Register them with `register_layer`, or list them in `exclude` to "
        "silence this warning."
    )
