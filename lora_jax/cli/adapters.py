"""`--adapter NAME=DIR ...`: several adapters, chosen line by line."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.array_types import PyTree
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.formatting import listed
from lora_jax.finetune.lines import Choose
from lora_jax.interop.bank import load_bank
from lora_jax.models.loaded import LoadedModel
from lora_jax.names import OWNER
from lora_jax.train.data import read_jsonl
from lora_jax.tree.paths import nearest

Check = Callable[[dict[str, Any]], str]


def parse_adapters(given: Sequence[str] | None) -> str | dict[str, str] | None:
    """Returns one folder, or folders by name if they are named.

    Raises:
      UserError: if several folders are given without names, or a name twice.
    """
    if not given:
        return None
    if len(given) == 1 and ("=" not in given[0] or Path(given[0]).exists()):
        return given[0]
    pairs = [text.partition("=") for text in given]
    if bad := ["".join(pair) for pair in pairs if not (pair[0] and pair[2])]:
        raise UserError(
            f"several adapters need names: --adapter NAME=DIR; got {', '.join(bad)}."
        )
    names = [name for name, _, _ in pairs]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UserError(f"names of adapters must differ; got {', '.join(twice)} twice.")
    return {name: folder for name, _, folder in pairs}


def with_adapter(check: Check, adapters: str | Mapping[str, str] | None) -> Check:
    """Extends the check of a line by its field `OWNER`, which names an adapter."""

    def check_both(record: dict[str, Any]) -> str:
        if OWNER not in record:
            return check(record)
        name = record[OWNER]
        if not isinstance(adapters, Mapping):
            return f"{OWNER!r} needs named adapters, --adapter NAME=DIR; got {name!r}"
        if name is not None and (not isinstance(name, str) or name not in adapters):
            hint = nearest(str(name), list(adapters))
            known = f"{', '.join(adapters)}, or null for the base"
            meant = f". Did you mean {hint}?" if hint else ""
            return f"{OWNER!r} must be one of {known}; got {name!r}{meant}"[:300]
        return check({key: record[key] for key in record if key != OWNER})

    return check_both


def load_lines(
    args: argparse.Namespace,
    check: Check,
    load_one: Callable[..., LoadedModel],
    **options: Any,
) -> tuple[list[dict[str, Any]], LoadedModel, Choose | None]:
    """Reads lines that may name their adapters, and loads the model for them.

    Args:
      args: ``data``, ``model``, ``adapter``.
      check: says what is wrong with a line.
      load_one: loads a model with one adapter or none.
      **options: of ``load_one``.

    Returns:
      The lines, without these names; the model; and a function that returns the
      variables of a batch of lines, each row with its own adapter; None where all lines
      are the model's own.

    Raises:
      UserError: listing the lines without an adapter, if only adapters have a head.
    """
    adapters = parse_adapters(args.adapter)
    check = with_adapter(check, adapters)
    records = read_jsonl(args.data, fields={}, check=check)
    names: list[str | None] = [record.pop(OWNER, None) for record in records]
    if not isinstance(adapters, Mapping):
        return records, load_one(args.model, adapters, **options), None
    base, bank = load_bank(args.model, adapters)
    bare = [f"{line}" for line, name in enumerate(names, start=1) if name is None]
    if base.new and bare:
        raise UserError(
            f"lines {listed(bare)} must name an adapter: the base has no "
            f"{', '.join(base.new)} of its own."
        )

    def choose(lines: Sequence[int], rows: int) -> PyTree:
        chosen = [names[line] for line in lines]
        return bank.variables(chosen + chosen[:1] * (rows - len(chosen)))

    return records, base._replace(module=bank.module, extra={}), choose
