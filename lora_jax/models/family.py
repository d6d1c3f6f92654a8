"""`Family`: how Hugging Face names a model's config keys and tensors.

To add a family, write a small file in `families` (what the config keys mean, and which
tensor each leaf of the module's tree comes from) and add a line to `FAMILIES`.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.names import BIAS, EXPERTS, HEAD, KERNEL

Shape = tuple[int, ...]
Kind = Literal["decoder", "encoder", "encoder-decoder"]
# Bare names of a multimodal model's parts other than the language model.
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
      read_config: maps a parsed ``config.json`` to the module's config.
      module: builds the module from the config and keyword options.
      inputs: maps the config to the shapes of ``module.init``'s inputs.
      modules: Hugging Face's name for a module's (or a leaf's) path in our tree, with
        ``{i}`` for the layer number.
      prefix: of names in files saved from a model with a head, and in adapters.
      prefixes: other prefixes that names in files and adapters may have.
      is_multimodal: whether it is the language model of a multimodal folder, whose
        other tensors are ignored.
      has_source: whether an encoder reads a source text and a decoder writes another.
      copies: other names of tensors that a file may have, instead or beside them.
      unused: patterns for the start of names that a file may hold and the module
        doesn't use.
      head: paths of the classification head's modules, which are initialised if a file
        has none; empty for a model that predicts tokens.
      head_pooling: the pooling below a head that transformers trained.
      head_class: suffix of the transformers class with that head.
      renames: patterns in a file's module names, and their replacements in
        transformers 5 and in adapters made with it. Either is read.
      is_transposed: whether kernels are stored ``[out, in]``.
      experts: from the path of the kernels of a layer's experts, one array here, to
        the names of what each expert has in a file, in the order of their outputs.
        ``modules`` has their names there under ``experts/expert_{e}/NAME``.
      is_served_whole: whether vLLM takes adapters of all experts as one, even where a
        file has each expert by itself.
      has_whole_experts: whether the file at hand has all experts of a layer as one
        tensor all the same.
      has_outputs_first: whether experts that a file has as one tensor are ``[e, out,
        in]``, else ``[e, in, out]``.
    """

    read_config: Callable[[Mapping[str, Any]], Any]
    module: Callable[..., nn.Module]
    inputs: Callable[[Any], tuple[Any, ...]]
    modules: Mapping[str, str]
    prefix: str
    prefixes: tuple[str, ...] = ()
    is_multimodal: bool = False
    has_source: bool = False
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unused: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    head_pooling: str = "pooler"
    head_class: str = "ForSequenceClassification"
    renames: tuple[tuple[str, str], ...] = ()
    is_transposed: bool = True
    experts: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    is_served_whole: bool = False
    has_whole_experts: bool = False
    has_outputs_first: bool = False

    @property
    def kind(self) -> Kind:
        """What its models do: go on with a text, read one, or answer one."""
        if self.head:
            return "encoder"
        return "encoder-decoder" if self.has_source else "decoder"

    @property
    def task(self) -> str | None:
        """PEFT's name of what its models are trained for; None if it depends."""
        tasks = {"decoder": "CAUSAL_LM", "encoder-decoder": "SEQ_2_SEQ_LM"}
        return tasks.get(self.kind)

    def tensor_name(self, path: str) -> str:
        """Returns the Hugging Face name, without prefix, of the leaf at ``path``.

        Raises:
          ValueError: if the family has no name for it.
        """
        if (name := self.module_name(path)) is not None:
            return name
        module, _, leaf = path.rpartition("/")
        if (name := self.module_name(module)) is None:
            raise ValueError(
                f"parameter {path} must belong to a module with a Hugging Face name: "
                f"one of {sorted(self.modules)}."
            )
        return f"{name}.{BIAS if leaf == BIAS else 'weight'}"

    @property
    def file_prefixes(self) -> tuple[str, ...]:
        """Prefixes that names in a model's files may have, the longest first."""
        known = (self.prefix, *(self.prefixes if self.is_multimodal else ()))
        return tuple(sorted(known, key=len, reverse=True))

    def is_unused(self, name: str) -> bool:
        """Returns whether the module ignores a file's tensor of this bare name."""
        return name in self.copies or any(
            re.match(pattern, name) for pattern in self.unused
        )

    def module_name(self, path: str) -> str | None:
        """Returns the bare Hugging Face name of the module at ``path``, or None."""
        template, numbers = self.modules.get(_template(path)), {}
        for letter, word in (("{i}", "layer"), ("{e}", "expert")):
            number = re.search(rf"{word}_(\d+)", path)
            numbers[letter] = number[1] if number else ""
        for letter, number in numbers.items():
            template = template and template.replace(letter, number)
        return template

    def whole_path(self, path: str) -> str:
        """The path of the kernel of all experts that a part of one is in, or ``path``.

        Args:
          path: one of ``modules``.
        """
        for whole, names in self.experts.items():
            parent = whole.rpartition("/")[0]
            if path in (f"{parent}/expert_{{e}}/{name}" for name in names):
                return whole
        return path

    def as_stored(self, names: Iterable[str]) -> "Family":
        """Returns the family for a file that may have all experts as one tensor.

        Args:
          names: bare names of the file's tensors.

        Returns:
          The family itself, or with ``has_whole_experts``: those of Qwen3.5 and 3.6
          are ``[e, out, in]`` in their first folders, and apart where transformers
          saved them.
        """
        wholes = {path: self.modules[path] for path in self.experts}
        pattern = "|".join(re.escape(n) for n in wholes.values())
        pattern = pattern.replace(r"\{i\}", r"\d+")
        if not wholes or not any(re.fullmatch(pattern, name) for name in names):
            return self
        kernels = {f"{path}/{KERNEL}": name for path, name in wholes.items()}
        return dataclasses.replace(
            self,
            modules={**self.modules, **kernels},
            has_whole_experts=True,
            has_outputs_first=True,
        )

    def expert_parts(self, path: str) -> tuple[str, ...]:
        """Returns a file's tensors per expert at ``path``; none if all are one."""
        return self.experts.get(_template(path), ())

    def is_head(self, name: str) -> bool:
        """Returns whether a tensor of this bare name is the classification head's."""
        return any(name.startswith(f"{self.modules[path]}.") for path in self.head)

    def bare_name(self, name: str) -> str:
        """Normalises a tensor's name in a file, of any transformers version.

        The result has no prefix, current names for LayerNorm's weights and the names of
        checkpoints for modules, like `tensor_name`'s.
        """
        found = (p for p in self.file_prefixes if name.startswith(p))
        bare = name.removeprefix(next(found, ""))
        if old := re.fullmatch(r"(.*LayerNorm\.)(gamma|beta)", bare):
            return old[1] + {"gamma": "weight", "beta": "bias"}[old[2]]
        for module in self.modules.values() if self.renames else ():
            pattern = re.escape(self.renamed(module))
            for letter in "ie":
                pattern = pattern.replace(rf"\{{{letter}\}}", rf"(?P<{letter}>\d+)")
            if found := re.fullmatch(rf"{pattern}(?P<leaf>\.weight|\.bias)", bare):
                numbers = found.groupdict()
                leaf = numbers.pop("leaf")
                for letter, number in numbers.items():
                    module = module.replace(f"{{{letter}}}", number)
                return module + leaf
        return bare

    def renamed(self, name: str) -> str:
        """Returns transformers 5's name for a file's module name."""
        for old, new in self.renames:
            name = re.sub(old, new, name)
        return name

    def from_file(self, path: str, array: np.ndarray) -> np.ndarray:
        """Returns a view of a file's ``[out, in, *k]`` kernel as ``[*k, in, out]``.

        Arrays that are not kernels stay as they are.
        """
        return array.transpose(self._axes(path, array.ndim))

    def to_file(self, path: str, array: np.ndarray) -> np.ndarray:
        """Inverts `from_file`."""
        return array.transpose(np.argsort(self._axes(path, array.ndim)))

    def file_shape(self, path: str, shape: Shape) -> Shape:
        """Returns the shape that a file has for a leaf of ``shape``."""
        return tuple(shape[axis] for axis in np.argsort(self._axes(path, len(shape))))

    def _axes(self, path: str, ndim: int) -> tuple[int, ...]:
        """Returns the order of a file's axes here: a kernel's spatial ones, in, out."""
        is_kernel, is_expert = path.rpartition("/")[2] == KERNEL, f"/{EXPERTS}/" in path
        is_turned = self.is_transposed or path == f"{HEAD}/{KERNEL}"  # never a Conv1D
        if is_expert and _template(path) in self.modules:
            is_turned = self.has_outputs_first
        if not (is_kernel and is_turned):
            return tuple(range(ndim))
        return (0, 2, 1) if is_expert and ndim == 3 else (*range(2, ndim), 1, 0)


def _template(path: str) -> str:
    """Returns a path with ``{i}`` and ``{e}`` for the numbers of layer and expert."""
    path = re.sub(r"layer_\d+", "layer_{i}", path)
    return re.sub(r"expert_\d+", "expert_{e}", path)


def architecture(settings: Mapping[str, Any]) -> str:
    """Returns the class that a ``config.json`` names; empty if it doesn't."""
    names = settings.get("architectures")
    first = names[0] if isinstance(names, list) and names else ""
    return first if isinstance(first, str) else ""


def token_inputs(count: int) -> tuple[Any, ...]:
    """Returns the shapes of ``count`` arrays of token ids, for `Family.inputs`."""
    return (jax.ShapeDtypeStruct((1, 1), jnp.int32),) * count


def config_of(module: Any) -> Any:
    """Returns the config of a family's model, with adapters or without."""
    return getattr(module, "model", module).config
