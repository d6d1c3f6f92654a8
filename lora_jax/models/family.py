"""`Family`: how Hugging Face names a model's config keys and tensors.

To add a family, write a small file in `families` (which config keys mean what, and
which tensor each leaf of the module's tree comes from) and add a line to `FAMILIES`.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from lora_jax.names import BIAS, HEAD, KERNEL

Shape = tuple[int, ...]
_MISSING = object()
MAX_LAYERS = 1000  # a config.json may ask for anything
LEAST, MOST = 1e-20, 1e20  # of a number that is not 0 and not a size
MAX_SIZE = 2**24  # of an axis, a vocabulary or a context
# Bare names of what a multimodal model has beside its language model.
OTHER_MODALITIES = (
    r"(vision|audio)_tower\.",
    r"vision_model\.",
    r"visual\.",
    r"multi_modal_projector\.",
    r"embed_(vision|audio)\.",
)


@dataclasses.dataclass(frozen=True)
class Family:
    """One ``model_type`` of Hugging Face.

    Attributes:
      read_config: from a parsed ``config.json`` to the module's config.
      module: builds the module from the config and keyword options.
      inputs: from the config to the shapes of ``module.init``'s inputs.
      modules: from a module's (or a leaf's) path in our tree, with ``{i}`` for a
        layer's number, to its Hugging Face name.
      prefix: of names in files saved from a model with a head, and in adapters.
      prefixes: others that names in files and adapters may have.
      is_tower: whether it is the language model of a multimodal folder, whose other
        tensors are left alone.
      unused: expressions for the start of names that a file may hold and the module
        doesn't use.
      head: paths of the classification head's modules, which are made anew where a
        file has none; empty for a model that predicts tokens.
      head_pooling: the pooling below a head that transformers trained.
      head_class: end of the name of transformers' class with that head.
      renames: expressions in a file's module names and what transformers 5, and so
        an adapter of today, has in their place. Files of either kind are read.
      is_transposed: whether kernels are stored ``[out, in]``.
    """

    read_config: Callable[[Mapping[str, Any]], Any]
    module: Callable[..., nn.Module]
    inputs: Callable[[Any], tuple[Any, ...]]
    modules: Mapping[str, str]
    prefix: str
    prefixes: tuple[str, ...] = ()
    is_tower: bool = False
    unused: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    head_pooling: str = "pooler"
    head_class: str = "ForSequenceClassification"
    renames: tuple[tuple[str, str], ...] = ()
    is_transposed: bool = True

    def tensor_name(self, path: str) -> str:
        """The bare Hugging Face name of the leaf at ``path``.

        Args:
          path: the leaf's path in the module's parameter tree.

        Returns:
          Its name without the family's prefix.

        Raises:
          ValueError: if the family has no name for it.
        """
        if (name := self.module_name(path)) is not None:
            return name
        module, _, leaf = path.rpartition("/")
        if (name := self.module_name(module)) is None:
            raise ValueError(
                f"parameter {path} must belong to a module that has a Hugging Face "
                f"name; those are {sorted(self.modules)}."
            )
        return f"{name}.{BIAS if leaf == BIAS else 'weight'}"

    @property
    def file_prefixes(self) -> tuple[str, ...]:
        """Prefixes that names in a model's files may have, the longest first."""
        known = (self.prefix, *(self.prefixes if self.is_tower else ()))
        return tuple(sorted(known, key=len, reverse=True))

    def is_unused(self, name: str) -> bool:
        """Whether a file may hold a tensor of this bare name that is not used."""
        return any(re.match(pattern, name) for pattern in self.unused)

    def module_name(self, path: str) -> str | None:
        """The bare Hugging Face name of the module at ``path``, None if it has none."""
        number = re.search(r"layer_(\d+)", path)
        template = self.modules.get(re.sub(r"layer_\d+", "layer_{i}", path))
        return template and template.replace("{i}", number[1] if number else "")

    def is_head(self, name: str) -> bool:
        """Whether a tensor of this bare name belongs to the classification head."""
        return any(name.startswith(f"{self.modules[path]}.") for path in self.head)

    def bare_name(self, name: str) -> str:
        """A tensor's name in a file, as `tensor_name` has it.

        Args:
          name: with or without the prefix, as any version of transformers has it.

        Returns:
          The name without prefix, with today's names of LayerNorm's weights and the
          checkpoints' names of modules.
        """
        found = (p for p in self.file_prefixes if name.startswith(p))
        bare = name.removeprefix(next(found, ""))
        if old := re.fullmatch(r"(.*LayerNorm\.)(gamma|beta)", bare):
            return old[1] + {"gamma": "weight", "beta": "bias"}[old[2]]
        for module in self.modules.values() if self.renames else ():
            pattern = re.escape(self.renamed(module)).replace(r"\{i\}", r"(\d+)")
            if found := re.fullmatch(rf"{pattern}(\.weight|\.bias)", bare):
                number, leaf = found.groups() if "{i}" in module else ("", found[1])
                return module.replace("{i}", number) + leaf
        return bare

    def renamed(self, name: str) -> str:
        """A file's module name as transformers 5 has it."""
        for old, new in self.renames:
            name = re.sub(old, new, name)
        return name

    def from_file(self, path: str, array: np.ndarray) -> np.ndarray:
        """A file's ``[out, in, *k]`` array as Flax stores it, ``[*k, in, out]``.

        Args:
          path: of the leaf; arrays that are not kernels stay as they are.
          array: as the file has it.

        Returns:
          A view of it.
        """
        if not self._is_turned(path):
            return array
        return array.transpose(self.axes(array.ndim))

    def to_file(self, path: str, array: np.ndarray) -> np.ndarray:
        """`from_file` undone."""
        if not self._is_turned(path):
            return array
        return array.transpose(np.argsort(self.axes(array.ndim)))

    def file_shape(self, path: str, shape: Shape) -> Shape:
        """The shape that a file has for a leaf of ``shape``."""
        if not self._is_turned(path):
            return shape
        return tuple(shape[axis] for axis in np.argsort(self.axes(len(shape))))

    def _is_turned(self, path: str) -> bool:
        is_turned = self.is_transposed or path == f"{HEAD}/{KERNEL}"  # never a Conv1D
        return is_turned and path.rpartition("/")[2] == KERNEL

    @staticmethod
    def axes(ndim: int) -> tuple[int, ...]:
        """Order of a PyTorch kernel's axes in Flax: spatial, in, out."""
        return (*range(2, ndim), 1, 0)


def config_of(module: Any) -> Any:
    """Returns the config of a family's model, with adapters or without."""
    return getattr(module, "model", module).config


def is_extreme(value: Any) -> bool:
    """Says whether a number is NaN, infinite, or so small or large that sums would be.

    Args:
      value: a number; anything else is not extreme.

    Returns:
      True for such a number.
    """
    return (
        isinstance(value, (int, float))
        and value != 0
        and not LEAST <= abs(value) <= MOST
    )


class Fields:
    """Reads a ``config.json``, collecting wrong types and missing keys.

    Args:
      config: the parsed file.
      what: kind of model, for the error.
    """

    def __init__(self, config: Mapping[str, Any], what: str):
        self.config, self.what = config, what
        self.faults: list[str] = []

    def integer(self, key: str, default: Any = _MISSING) -> Any:
        """A bounded integer; a key that is absent or null has the default."""
        return self._bounded(key, default, MAX_SIZE)

    def layers(self, key: str, default: Any = _MISSING) -> int:
        """A number of layers, at most `MAX_LAYERS`."""
        return self._bounded(key, default, MAX_LAYERS)

    def number(self, key: str, default: Any = _MISSING) -> Any:
        """A number that float32 can compute with: 0, or neither tiny nor huge."""
        value = self._get(key, default, (int, float), "a number")
        if is_extreme(value):
            is_finite = abs(value) < math.inf  # of integers of any size
            wanted = f"0 or {LEAST:g} to {MOST:g}" if is_finite else "finite"
            self.faults.append(f"{key} must be {wanted}; got {value!r}"[:200])
            return 1.0
        return value

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        return self._get(key, default, (bool,), "true or false")

    def text(self, key: str, default: Any = _MISSING) -> Any:
        """A string."""
        return self._get(key, default, (str,), "a string")

    def sequence(self, key: str, length: int) -> list[Any] | None:
        """A list of ``length`` entries, or None where the key is absent or null."""
        value = self._get(key, None, (list,), "a list")
        if value is not None and len(value) != length:
            self.faults.append(
                f"{key} must have {length} entries, one a layer; got {len(value)}"
            )
            return None
        return value

    def mapping(self, key: str) -> dict[str, Any] | None:
        """A JSON object, or None."""
        return self._get(key, None, (dict,), "an object")

    def only(self, key: str, value: Any) -> None:
        """Refuses every value of ``key`` but one: with others it's another model."""
        got = self.config.get(key)
        if got is not None and got != value:
            self.faults.append(f"{key} must be {value!r} here; got {got!r}")

    def check(self) -> None:
        """Raises one error with every fault.

        Raises:
          ValueError: if there is any.
        """
        if self.faults:
            faults = "; ".join(dict.fromkeys(self.faults))
            raise ValueError(f"config.json doesn't fit a {self.what}: {faults}.")

    def _bounded(self, key: str, default: Any, most: int) -> Any:
        value = self._get(key, default, (int,), "an integer")
        if isinstance(value, int) and value > most:
            self.faults.append(f"{key} must be at most {most}; got {value}")
            return 1
        return value

    def _get(self, key: str, default: Any, types: tuple[type, ...], kind: str) -> Any:
        value = self.config.get(key)
        if value is None:
            if default is _MISSING:
                self.faults.append(f"{key} is missing")
                return 1 if int in types else ""
            return default
        is_bool = isinstance(value, bool) and bool not in types
        if is_bool or not isinstance(value, types):
            self.faults.append(f"{key} must be {kind}; got {value!r}"[:200])
            return 1 if default is _MISSING else default
        return value
