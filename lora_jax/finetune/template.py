"""A commented config.yaml to start from, with every setting and its default.

The comments are from the docstrings of the settings' dataclasses.
"""

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from lora_jax.config import LoRAConfig
from lora_jax.finetune.settings import SECTIONS

WIDTH = 88
EXAMPLES = {  # settings without default
    ("model", "path"): "my-model",
    ("data", "train"): "my-data.jsonl",
    ("output", "dir"): "my-run",
}
HEADING = """\
Settings of a run: every key with its default. Replace model.path, data.train and
output.dir by your own; all others may be omitted. `lora-jax plan`, `train` and `eval`
take this file, followed by any `section.key=value` to change settings.
"""


def config_template() -> str:
    """Returns a config.yaml with every setting under a comment that explains it."""
    lines = _comment(HEADING)
    for section, kind in SECTIONS.items():
        summary, meanings = documentation(kind)
        lines += ["", *_comment(summary), f"{section}:"]
        for field in dataclasses.fields(kind):
            choices = _choices(get_type_hints(kind)[field.name])
            value = _in_yaml(EXAMPLES.get((section, field.name), _default(kind, field)))
            lines += _comment(meanings[field.name], indent="  ")
            tail = f"  # {' | '.join(choices)}" if choices else ""
            lines.append(f"  {field.name}: {value}{tail}")
    return "\n".join(lines) + "\n"


def documentation(kind: type) -> tuple[str, dict[str, str]]:
    """Parses a dataclass's docstring.

    Args:
      kind: the class; its docstring has an ``Attributes:`` section.

    Returns:
      The summary (with the paragraph before the attributes if there is one), and the
      description of each attribute.

    Example:
      >>> from lora_jax.finetune.sections import OutputSettings
      >>> documentation(OutputSettings)[0]
      "The run's output."
    """
    before, _, after = inspect.cleandoc(kind.__doc__ or "").partition("Attributes:\n")
    first, *_, last = ("", *before.strip().split("\n\n"))[-3:]
    summary = " ".join(dict.fromkeys(filter(None, (first, last))))
    block = re.split(r"\n(?=\S)", after)[0]
    entries = re.findall(r"^  (\w+): (.*(?:\n    .*)*)", block, re.MULTILINE)
    return _plain(summary), {name: _plain(text) for name, text in entries}


def _plain(text: str) -> str:
    """Returns a docstring's text with YAML's notation."""
    text = " ".join(text.split()).replace("``", "`").replace("None", "null")
    return re.sub(r'`"([\w-]+)"`', r"`\1`", text)


def _default(kind: type, field: dataclasses.Field[Any]) -> Any:
    if kind is LoRAConfig:
        return LoRAConfig().to_dict()[field.name]
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _choices(hint: Any) -> Sequence[str]:
    """Returns the values of a setting's ``Literal`` type, if it has one."""
    literals = [h for h in (hint, *get_args(hint)) if get_origin(h) is Literal]
    return [str(value) for literal in literals for value in get_args(literal)]


def _in_yaml(value: Any) -> str:
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump([value], default_flow_style=True).strip()[1:-1]


def _comment(text: str, indent: str = "") -> list[str]:
    mark = f"{indent}# "
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=mark,
        subsequent_indent=mark,
        break_on_hyphens=False,
        break_long_words=False,
    )
