"""YAML as people mean it: ``1e-3`` is a number, and a repeated key is an error."""

import re
from collections.abc import Hashable
from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node, deep=False):
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # <<: *base
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} can't be a key", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def parse_yaml(text: str | bytes, where: str) -> Any:
    """Parses YAML, safely.

    Args:
      text: the YAML, or the bytes of a file of it, UTF-8.
      where: what to call it in an error.

    Returns:
      Mappings, lists and scalars.

    Raises:
      ValueError: if it isn't YAML, or a mapping has a key twice.

    Example:
      >>> parse_yaml("lr: 1e-3", "config.yaml")
      {'lr': 0.001}
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not valid YAML: {error}") from error
