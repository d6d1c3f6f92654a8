"""Hugging Face's names for the modules of a model in memory, in every spelling.

A module has one path here and several names there: with or without the family's prefix
(files of a bare model have none), with that of an enclosing multimodal model, and in
transformers 4's or 5's spelling (checkpoints keep the old names, new adapters have the
new ones).
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax.models.family import Family
from lora_jax.names import EMBED, HEAD, LM_HEAD


class Fusion(NamedTuple):
    """Projections that one family stores as one kernel and another as several.

    Attributes:
      whole: end of the fused kernel's path; its outputs are in the order of ``parts``.
      parts: ends of the separate kernels' paths.
      names: ends of their Hugging Face names, the fused one first.
      prefix: prefix of the layer's path.
      is_split: whether transformers 5 splits the kernel that files, and models here,
        fuse.
    """

    whole: str
    parts: tuple[str, ...]
    names: tuple[str, ...]
    prefix: str = ""
    is_split: bool = False


FUSIONS = (
    Fusion(
        "attention/qkv",
        ("attention/query", "attention/key", "attention/value"),
        tuple(f"layers.{{i}}.self_attn.{p}_proj" for p in ("qkv", "q", "k", "v")),
    ),
    Fusion(
        "mlp/gate_up",
        ("mlp/gate", "mlp/up"),
        tuple(f"layers.{{i}}.mlp.{p}_proj" for p in ("gate_up", "gate", "up")),
    ),
    Fusion(  # DINOv2's gated MLP
        "mlp/gate_up",
        ("mlp/gate", "mlp/up"),
        tuple(
            f"encoder.layer.{{i}}.mlp.{p}"
            for p in ("weights_in", "gate_proj", "up_proj")
        ),
        prefix="encoder/",
        is_split=True,
    ),
)

WRAPPED = "language_model.model."  # a tower's prefix in mlx-lm and older transformers
Style = tuple[str, bool]  # the prefix; as in transformers 5 or 4


class Names:
    """The names that a model's modules and tensors may have in another tool's file.

    Args:
      family: the model's.
      modules: paths of its adaptable modules.
      leaves: paths of its parameters.
      has_prefix: whether names are written with the family's prefix; either is read.
    """

    def __init__(
        self,
        family: Family,
        modules: Sequence[str],
        leaves: Iterable[str],
        *,
        has_prefix: bool = True,
    ):
        self.family = family
        self.style: Style = (family.prefix if has_prefix else "", True)
        prefixes = dict.fromkeys((family.prefix, "", *family.prefixes))
        self._styles = [(p, is_new) for p in prefixes for is_new in (True, False)]
        self._bare = {path: str(family.module_name(path)) for path in modules}
        self._tensors = {path: family.tensor_name(path) for path in leaves}
        layers = {m[0] for p in modules if (m := re.match(r"(.*/)?layer_\d+", p))}
        self._others = {}  # modules that this model has fused or split
        for layer in layers:
            number = layer.rpartition("_")[2]
            for fusion in FUSIONS:
                if layer.rpartition("layer_")[0] != fusion.prefix:
                    continue
                ends = (fusion.whole, *fusion.parts)
                for end, name in zip(ends, fusion.names, strict=True):
                    self._others[f"{layer}/{end}"] = name.replace("{i}", number)
        if HEAD not in modules and EMBED in modules:
            self._others[HEAD] = LM_HEAD

    def modules(self) -> dict[str, str]:
        """Returns module paths by every accepted name."""
        return self._paths({**self._others, **self._bare}, self._spell)

    def tensors(self) -> dict[str, str]:
        """Returns parameter paths by every accepted name."""
        return self._paths(self._tensors, self._spell_tensor)

    def spelled_as(self, names: Iterable[str]) -> "Spelling":
        """Returns the spelling used by a file with these module names."""
        given = set(names)

        def hits(style: Style) -> int:
            return len(given & {self._spell(b, style) for b in self._bare.values()})

        return self.spelling(max(self._styles, key=hits))

    def spelling(self, style: Style | None = None) -> "Spelling":
        """Returns all names in a style; by default the one used for writing."""
        style = style or self.style
        return Spelling(
            {path: self._spell(bare, style) for path, bare in self._bare.items()},
            {p: self._spell_tensor(bare, style) for p, bare in self._tensors.items()},
        )

    def split_names(self, path: str) -> list[str]:
        """Returns transformers 5's names for a module's parts, in output order.

        Empty if transformers 5 has the module unsplit too.
        """
        for fusion in FUSIONS:
            layer = path.removesuffix(f"/{fusion.whole}")
            if not fusion.is_split or layer == path or path not in self._bare:
                continue
            own = fusion.names[0].replace("{i}", layer.rpartition("_")[2])
            if own == self._bare[path]:
                bare = (self._others[f"{layer}/{part}"] for part in fusion.parts)
                return [self._spell(name, self.style) for name in bare]
        return []

    def expert_names(self, path: str, number: int, part: str) -> list[str]:
        """Returns the names of a part of one expert, as files have them first.

        Args:
          path: of the kernel of all experts.
          number: of the expert.
          part: one of `Family.expert_parts`.
        """
        parent = path.rpartition("/")[0]
        bare = str(self.family.module_name(f"{parent}/expert_{number}/{part}"))
        own = self.style[0]
        styles = sorted(self._styles, key=lambda style: (style[1], style[0] != own))
        return list(dict.fromkeys(self._spell(bare, style) for style in styles))

    def full_name(self, bare: str, *, is_new: bool = True) -> str:
        """Returns a module's name in the style that is written, or as in files."""
        return self._spell(bare, (self.style[0], is_new))

    def _paths(
        self, names: Mapping[str, str], spell: Callable[[str, Style], str]
    ) -> dict[str, str]:
        paths: dict[str, str] = {}
        for style in self._styles:
            for path, bare in names.items():
                paths.setdefault(spell(bare, style), path)
        return paths

    def _spell(self, bare: str, style: Style) -> str:
        prefix, is_new = style
        if bare == LM_HEAD:  # outside the model, in its wrapper if there is one
            return f"language_model.{bare}" if prefix == WRAPPED else bare
        has_none = self.family.is_head(f"{bare}.")
        bare = self.family.renamed(bare) if is_new else bare
        return bare if has_none else prefix + bare

    def _spell_tensor(self, bare: str, style: Style) -> str:
        module, dot, leaf = bare.rpartition(".")
        return self._spell(module, style) + dot + leaf


class Spelling(NamedTuple):
    """Names in one style.

    Attributes:
      modules: by module path.
      tensors: by parameter path.
    """

    modules: Mapping[str, str]
    tensors: Mapping[str, Any]
