"""Strict YAML for configs: ``1e-3`` is a number, and a repeated key is an error.

Tags and dates are not supported, and keys must be strings or integers. Values are
counted before they are constructed, with every alias (``*name``) expanded, since a few
hundred bytes of nested aliases can fill any memory.
"""

import re
from typing import Any

import yaml

from lora_jax.config import LEAST, MOST

MAX_BYTES = 1 << 16
MAX_NODES = 10_000
MAX_DEPTH = 20
_DATE = "tag:yaml.org,2002:timestamp"


class _Loader(yaml.SafeLoader):
    _depth = 0

    def get_event(self):
        event = super().get_event()
        self._depth += isinstance(event, yaml.CollectionStartEvent)
        self._depth -= isinstance(event, yaml.CollectionEndEvent)
        if self._depth > MAX_DEPTH:
            _fail(f"it nests deeper than {MAX_DEPTH} levels", event.start_mark)
        if getattr(event, "tag", None) is not None:
            _fail(f"the tag {event.tag!r} is not supported", event.start_mark)
        return event

    def construct_yaml_int(self, node):
        value = super().construct_yaml_int(node)
        if abs(value) >= 1 << 31:
            _fail(f"{node.value[:40]} must be below 2^31", node.start_mark)
        return value

    def construct_yaml_float(self, node):
        value = super().construct_yaml_float(node)
        if value and not LEAST <= abs(value) <= MOST:
            wanted = f"0 or from {LEAST:g} to {MOST:g}, for float32"
            _fail(f"{node.value[:40]} must be {wanted}", node.start_mark)
        return value

    def construct_mapping(self, node, deep=False):
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # <<: *base
                continue
            key = self.construct_object(key_node, deep=True)
            if type(key) not in (str, int):
                _fail(f"{key!r} can't be a key; put it in quotes", key_node.start_mark)
            if key in seen:
                _fail(f"the key {key!r} appears twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _DATE]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str | bytes, where: str) -> Any:
    """Parses untrusted YAML.

    Args:
      text: the YAML, or UTF-8 bytes of it; at most 64 KiB.
      where: its name in error messages.

    Returns:
      Mappings, lists and scalars.

    Raises:
      ValueError: if it isn't YAML, a mapping has a key twice, or it is too large or too
        deep with aliases expanded.

    Example:
      >>> parse_yaml("lr: 1e-3", "config.yaml")
      {'lr': 0.001}
    """
    if len(text) > MAX_BYTES:
        raise ValueError(
            f"{where} must have at most {MAX_BYTES:,} bytes; it has {len(text):,}."
        )
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count(node, {}, 1)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        # ValueErrors are from numbers without digits or with too many, such as 0x_.
        raise ValueError(f"{where} is not valid YAML: {error}") from error


def _count(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Counts a node and its descendants, with aliases expanded."""
    if depth > MAX_DEPTH:  # with aliases
        _fail(f"it nests deeper than {MAX_DEPTH} levels", node.start_mark)
    if isinstance(node, yaml.ScalarNode):
        if re.search("[\ud800-\udfff]", node.value):
            _fail("it contains a lone surrogate", node.start_mark)
        return 1
    if id(node) not in known:
        known[id(node)] = MAX_NODES  # for a node inside itself
        children = [
            child
            for entry in node.value
            for child in (entry if isinstance(entry, tuple) else (entry,))
        ]
        known[id(node)] = 1 + sum(_count(c, known, depth + 1) for c in children)
    if known[id(node)] > MAX_NODES:
        _fail(f"it has over {MAX_NODES:,} values, including aliases", node.start_mark)
    return known[id(node)]


def _fail(problem: str, mark: Any) -> None:
    raise yaml.constructor.ConstructorError(None, None, problem, mark)
