"""Reading rotary embeddings from a ``config.json``, under old and new keys."""

import math
from collections.abc import Mapping
from typing import Any

from lora_jax.models.decoder_config import KINDS, Rope
from lora_jax.models.family import Fields


def read_rope(
    fields: Fields,
    rotary_dim: int,
    *,
    default_theta: float = 10000.0,
    settings: Mapping[str, Any] | None = None,
) -> Rope:
    """Reads one table of rotary frequencies.

    Args:
      fields: the config; collects the faults.
      rotary_dim: dimensions of a head that are rotated.
      default_theta: where the file has none.
      settings: the table's own parameters; those of the config by default, where
        ``rope_scaling`` (older files) wins over ``rope_parameters``.

    Returns:
      The table.

    References:
      ``longrope`` is read with the factors of short contexts: this model's positions
      end at ``original_max_position_embeddings`` (see `max_positions`).
    """
    config = fields.config
    if settings is None:
        old = fields.mapping("rope_scaling")
        settings = old or fields.mapping("rope_parameters") or {}
    theta = config.get("rope_theta") or default_theta
    kind = settings.get("rope_type", settings.get("type", "default"))
    table: dict[str, Any] = {
        "theta": settings.get("rope_theta", theta),
        "rotary_dim": rotary_dim,
        "kind": kind,
    }
    if kind not in KINDS:
        fields.faults.append(f"rope_type must be one of {KINDS}; got {kind!r}")
        return Rope(10000.0, rotary_dim)
    original = original_positions(fields, settings)
    factor: Any = settings.get("factor")
    if kind == "longrope" and factor is None and original:
        factor = config.get("max_position_embeddings", original) / original
    if kind != "default":
        table |= {"factor": factor, "original_max_positions": original}
    if kind == "llama3":
        table |= {k: settings.get(k) for k in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        table |= {
            "beta_fast": settings.get("beta_fast") or 32.0,
            "beta_slow": settings.get("beta_slow") or 1.0,
            "truncate": settings.get("truncate", True),
        }
    if kind == "longrope":
        table["divisors"] = settings.get("short_factor")
    wrong = [
        f"rope {name} must be {wanted}; got {value!r}"
        for name, value in table.items()
        if (wanted := _fault(name, value))
    ]
    if wrong:
        fields.faults += wrong
        return Rope(10000.0, rotary_dim)
    if kind == "longrope":
        table["divisors"] = tuple(settings["short_factor"])
    if kind in ("yarn", "longrope"):
        table["attention_factor"] = _attention_factor(
            kind, settings, table["factor"], original
        )
    return Rope(**table)


def max_positions(fields: Fields, default: int) -> int:
    """The longest sequence; with longrope, the longest that short factors are for."""
    longest = fields.integer("max_position_embeddings", default)
    settings = fields.config.get("rope_scaling") or fields.config.get("rope_parameters")
    if isinstance(settings, dict):
        kind = settings.get("rope_type", settings.get("type"))
        if kind == "longrope":
            return min(longest, original_positions(fields, settings))
    return longest


def original_positions(fields: Fields, settings: Mapping[str, Any]) -> int:
    """The length of the context before it was stretched."""
    key = "original_max_position_embeddings"
    found = fields.config.get(key) or settings.get(key)
    return found or fields.integer("max_position_embeddings", 1)


def _attention_factor(
    kind: str, settings: Mapping[str, Any], factor: float, original: int
) -> float:
    given = settings.get("attention_factor")
    if isinstance(given, (int, float)):
        return float(given)
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(original))

    def scale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1

    m, m_all = settings.get("mscale"), settings.get("mscale_all_dim")
    return scale(m) / scale(m_all) if m and m_all else scale(1.0)


def _fault(name: str, value: Any) -> str:
    """Returns what ``value`` must be; empty if it is."""
    if name == "kind":
        return ""
    if name == "truncate":
        return "" if isinstance(value, bool) else "true or false"
    if name == "divisors":
        is_list = isinstance(value, list) and all(
            isinstance(v, (int, float)) and v > 0 for v in value
        )
        return "" if is_list else "a list of positive numbers"
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return "" if is_number and 0 < value < math.inf else "a positive number"
