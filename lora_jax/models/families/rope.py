"""Reading rotary embeddings from a ``config.json``, under old and new keys."""

import math
from collections.abc import Mapping
from typing import Any

from lora_jax.models.decoder_config import KINDS, Rope
from lora_jax.models.fields import LEAST, MOST, Fields, is_extreme

POSITIONS = "original_max_position_embeddings"
_RANGE = f"from {LEAST:g} to {MOST:g}"


def read_rope(
    fields: Fields,
    rotary_dim: int,
    settings: Mapping[str, Any] | None = None,
) -> Rope:
    """Reads one table of rotary frequencies, collecting faults in ``fields``.

    Args:
      fields: the config.
      rotary_dim: dimensions of a head that are rotated.
      settings: the table's own parameters; by default the config's, where
        ``rope_scaling`` (older files) wins over ``rope_parameters``.
    """
    config = fields.config
    if settings is None:
        old = fields.mapping("rope_scaling")
        settings = old or fields.mapping("rope_parameters") or {}
    theta = config.get("rope_theta") or fields.defaults.get("rope_theta", 10000.0)
    kind = settings.get("rope_type", settings.get("type", "default"))
    table: dict[str, Any] = {
        "theta": settings.get("rope_theta", theta),
        "rotary_dim": rotary_dim,
        "kind": kind,
    }
    if kind not in KINDS:
        fields.faults.append(f"rope_type must be one of {KINDS}; got {kind!r}")
        return Rope(10000.0, rotary_dim)
    original, turned = original_positions(fields, settings), 0
    factor: Any = settings.get("factor")
    if kind == "longrope" and factor is None and original:
        factor = fields.integer("max_position_embeddings", original) / original
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
    if kind == "proportional":
        part = settings.get("partial_rotary_factor", 1.0)
        if not _is_usable(part) or part > 1:
            fields.faults.append(
                f"rope partial_rotary_factor must be a number up to 1; got {part!r}"
            )
            part = 1.0
        table |= {"factor": settings.get("factor", 1.0)}
        turned = int(part * rotary_dim // 2)
    if kind == "longrope":
        table["divisors"] = settings.get("short_factor")
        table["long_divisors"] = settings.get("long_factor")
    optional = ("attention_factor", "mscale", "mscale_all_dim")
    checked = table | {k: settings[k] for k in optional if settings.get(k)}
    wrong = [
        f"rope {name} must be {wanted}; got {value!r}"[:200]
        for name, value in checked.items()
        if (wanted := _fault(name, value))
    ]
    if kind == "llama3" and not wrong:
        low, high = table["low_freq_factor"], table["high_freq_factor"]
        if not low < high:
            wrong.append(f"rope high_freq_factor must be above {low}; got {high}")
    if kind == "longrope" and not wrong and original < 2:
        wrong.append(f"rope {POSITIONS} must be at least 2; got {original}")
    if wrong:
        fields.faults += wrong
        return Rope(10000.0, rotary_dim)
    if kind == "longrope":
        table["divisors"] = tuple(settings["short_factor"])
        table["long_divisors"] = tuple(settings["long_factor"])
    if kind in ("yarn", "longrope"):
        table["attention_factor"] = _attention_factor(
            kind, settings, table["factor"], original
        )
    return Rope(**table, turned=turned)


def read_ropes(
    fields: Fields, rotary_dim: int, *, theta: float, local_theta: float
) -> tuple[Rope, Rope]:
    """Reads the tables of layers with full attention, and of those with a window.

    Args:
      fields: the config; collects the faults.
      rotary_dim: dimensions of a head that are rotated.
      theta: of full attention, where ``rope_parameters`` doesn't tell the two apart.
      local_theta: of windows, there; ``rope_scaling`` is for full attention.

    Returns:
      The two tables.
    """
    new = fields.mapping("rope_parameters") or {}
    full, local = (new.get(k) for k in ("full_attention", "sliding_attention"))
    if not isinstance(full, dict) or not isinstance(local, dict):
        scaling = fields.mapping("rope_scaling") or {}
        full, local = {"rope_theta": theta, **scaling}, {"rope_theta": local_theta}
    return read_rope(fields, rotary_dim, full), read_rope(fields, rotary_dim, local)


def rotated_dim(fields: Fields, head_dim: int, default: float) -> int:
    """How many dimensions of a head are rotated, ``partial_rotary_factor`` of them.

    Args:
      fields: the config; collects the faults.
      head_dim: width of a head.
      default: the factor where the file has none.

    Returns:
      The number.
    """
    newer = fields.nested(fields.mapping("rope_parameters") or {})
    default = newer.number("partial_rotary_factor", default)
    return int(head_dim * fields.number("partial_rotary_factor", default))


def original_positions(fields: Fields, settings: Mapping[str, Any]) -> int:
    """Returns the context length before it was stretched."""
    for config in (fields.config, settings):
        if config.get(POSITIONS):
            return fields.nested(config).integer(POSITIONS)
    return fields.integer("max_position_embeddings", 1)


def _attention_factor(
    kind: str, settings: Mapping[str, Any], factor: float, original: int
) -> float:
    if given := settings.get("attention_factor"):
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
    """Describes what ``value`` must be; empty if it is valid."""
    if name == "kind":
        return ""
    if name == "truncate":
        return "" if isinstance(value, bool) else "true or false"
    if name in ("divisors", "long_divisors"):
        is_list = isinstance(value, list) and all(map(_is_usable, value))
        return "" if is_list else f"a list of numbers {_RANGE}"
    if _is_usable(value):
        return ""
    return f"a positive number {_RANGE}" if is_extreme(value) else "a positive number"


def _is_usable(value: Any) -> bool:
    return type(value) in (int, float) and value > 0 and not is_extreme(value)
