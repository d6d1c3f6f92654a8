"""`LoRAConfig`: all adapter options, validated together.

One config serves a whole model: each layer uses its own path
(``"encoder/layer_0/attention/query"``) to look up whether it is a target and its rank,
alpha and scaling. Nothing else in the library decides this.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from lora_jax.config_errors import ALL_LINEAR as ALL_LINEAR
from lora_jax.config_errors import LEAST as LEAST
from lora_jax.config_errors import MAX_RANK as MAX_RANK
from lora_jax.config_errors import MOST as MOST
from lora_jax.config_errors import as_tuples, find_errors, report, unknown_fields
from lora_jax.names import (
    FIXED,
    LORA,
    LORA_A,
    LORA_B,
    MAGNITUDE,
    START_A,
    START_B,
    VERA_B,
    VERA_D,
)

Patterns = str | Sequence[str]
PatternValues = Mapping[str, Any] | Sequence[tuple[str, Any]]
Tokens = Sequence[int | str] | Mapping[str, Sequence[int | str]]


@dataclasses.dataclass(frozen=True)
class LoRAConfig:
    """Which layers of a model to adapt, and how.

    Immutable and hashable (lists and mappings become tuples), so it can be an attribute
    of a Linen module.

    A *path* locates a module in the parameter tree, joined by ``/``. ``targets``,
    ``exclude`` and ``train`` take either a list of suffixes (``"query"`` matches
    ``"query"`` and ``"block_0/attn/query"``, not ``"subquery"``) or one regular
    expression for the full path. ``exclude``, ``train`` and ``tokens`` override
    ``targets``.

    Attributes:
      rank: ``r``, the inner dimension of ``A B``; at least 1.
      alpha: numerator of the scaling; above 0.
      targets: layers to adapt; ``"all-linear"`` is every ``Dense``, ``DenseGeneral``
        and ``Einsum`` that is neither excluded nor trained in full.
      exclude: layers never adapted.
      rank_pattern: ``{pattern: rank}`` overrides; a pattern is a regular expression for
        the end of a path, and the first match wins.
      alpha_pattern: ``{pattern: alpha}``, looked up independently of the rank.
      layers: indices of the layers to adapt, or None for all; a layer's index is the
        first number that ends a segment of its path (``3`` in ``"layer_3/mlp/up"``).
      dropout_rate: probability of zeroing an element of the adapter's input.
      rslora: scale by ``alpha / sqrt(rank)`` instead of ``alpha / rank``.
      dora: also train a magnitude for each output, see `lora_jax.ops.dora`.
      lora_fa: train B alone; A stays as it was drawn, and the layer's input needn't be
        kept for the backward pass.
      vera: train two vectors alone, ``d`` and ``b`` of ``A diag(d) B diag(b)``; A and B
        are random and the same in layers of the same size. ``rank`` can be in the
        hundreds; ``alpha = rank`` is the paper's scaling.
      vera_seed: seed of VeRA's A and B.
      init: A and B at the start. ``"uniform"``: A is U(±1/√fan_in); ``"gaussian"``:
        N(0, 1/rank²); B is zero (for an embedding A is zero, and B is drawn).
        ``"orthogonal"``: both drawn, with ``A B = 0``. ``"pissa"`` (exact SVD),
        ``"pissa_niter_4"`` (randomized, 4 iterations) and ``"olora"``: factors of W0,
        see `lora_jax.ops.start`; what is trained is ``A B - A0 B0``. ``"lora_ga"``:
        likewise, of its first gradient, for which `lora_ga_init` needs data.
        ``"eva"``: A from the inputs of the layers, and ranks too, by `eva_init`.
      train: layers or leaves of the base that are trained in full, in the ``params``
        collection (a new head, for example).
      bias: biases trained in full: ``"none"``, those of adapted layers
        (``"lora_only"``), or ``"all"``.
      tokens: tokens whose rows of the embedding (and so of a tied head) are trained,
        and no others: ids, or tokens as the tokenizer has them. ``{layer: tokens}``
        names the table, such as ``embed``, or ``head`` for the rows of a head that is
        not tied; `adapt` needs that form, and ids.

    Raises:
      ValueError: lists every field that is out of range.
      TypeError: lists every field that has the wrong type.

    Example:
      >>> config = LoRAConfig(rank=8, alpha=16, rank_pattern={"layer_0/.*": 4})
      >>> config.scaling_for("layer_1/query"), config.scaling_for("layer_0/query")
      (2.0, 4.0)

    References:
      Hu et al., https://arxiv.org/abs/2106.09685, sections 4.1 and 4.2;
      rsLoRA: Kalajdzievski, https://arxiv.org/abs/2312.03732, section 4;
      DoRA: Liu et al., https://arxiv.org/abs/2402.09353, section 4; the methods:
      ``lora_jax/ops/README.md``.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: Patterns = ALL_LINEAR
    exclude: Patterns = ()
    rank_pattern: PatternValues = ()
    alpha_pattern: PatternValues = ()
    layers: Sequence[int] | None = None
    dropout_rate: float = 0.0
    rslora: bool = False
    dora: bool = False
    lora_fa: bool = False
    vera: bool = False
    vera_seed: int = 0
    init: str = "uniform"
    train: Patterns = ()
    bias: Literal["none", "lora_only", "all"] = "none"
    tokens: Any = ()  # `Tokens`; with names as pairs

    def __new__(cls, *args: Any, **fields: Any) -> "LoRAConfig":
        """Rejects unknown fields, translating PEFT's names in the error."""
        del args
        if unknown := [name for name in fields if name not in cls.__dataclass_fields__]:
            raise TypeError(unknown_fields(unknown, cls.__dataclass_fields__))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in ("targets", "exclude", "train", "layers"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple, range)):
                object.__setattr__(self, name, tuple(value))
        for name in ("rank_pattern", "alpha_pattern"):
            value = getattr(self, name)
            pairs = value.items() if isinstance(value, Mapping) else value
            if not isinstance(pairs, Iterable) or not all(
                isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs
            ):
                raise TypeError(
                    f"{name} must map patterns to values, like {{'query': 4}}; "
                    f"got {value!r}."
                )
            object.__setattr__(self, name, tuple((k, v) for k, v in pairs))
        object.__setattr__(self, "tokens", as_tuples(self.tokens))
        type_errors, value_errors = find_errors(self)
        if type_errors:
            raise TypeError(report(type_errors + value_errors))
        if value_errors:
            raise ValueError(report(value_errors))

    @classmethod
    def for_layers(
        cls, ranks: Mapping[str, int], alphas: Mapping[str, float], **fields: Any
    ) -> "LoRAConfig":
        """Builds a config that adapts exactly these layers, each with its own numbers.

        Args:
          ranks: rank by path.
          alphas: alpha by path.
          **fields: the others.

        Returns:
          The config: the most common rank and alpha, and a pattern for each other one.
        """
        rank = Counter(ranks.values()).most_common(1)[0][0]
        alpha = Counter(alphas.values()).most_common(1)[0][0]
        return cls(
            rank=rank,
            alpha=alpha,
            targets=".*" if "" in ranks else sorted(ranks),  # a model that is a layer
            rank_pattern={path: r for path, r in ranks.items() if r != rank},
            alpha_pattern={path: a for path, a in alphas.items() if a != alpha},
            **fields,
        )

    def rank_for(self, path: str) -> int:
        """Returns the rank of the layer at ``path``."""
        return _first_match(self.rank_pattern, path, self.rank)

    def alpha_for(self, path: str) -> float:
        """Returns alpha for the layer at ``path``."""
        return float(_first_match(self.alpha_pattern, path, self.alpha))

    def scaling_for(self, path: str) -> float:
        """Returns the factor of ``A B``: ``alpha / rank`` or ``alpha / √rank``."""
        rank = self.rank_for(path)
        return self.alpha_for(path) / (rank**0.5 if self.rslora else rank)

    @property
    def starts_from_base(self) -> bool:
        """Whether A and B start from factors of W0, so that ``A0 B0`` is subtracted."""
        return self.init.startswith("pissa") or self.init in ("olora", "lora_ga")

    @property
    def start(self) -> str:
        """How A and B are made; see `lora_jax.ops.start.init_factors`."""
        return f"vera_seed_{self.vera_seed}" if self.vera else self.init

    @property
    def leaves(self) -> dict[str, str]:
        """The names of an adapter's leaves, and the collection of each."""
        found = {
            LORA_A: FIXED if self.lora_fa or self.vera else LORA,
            LORA_B: FIXED if self.vera else LORA,
        }
        if self.dora:
            found[MAGNITUDE] = LORA
        if self.vera:
            found |= {VERA_D: LORA, VERA_B: LORA}
        if self.starts_from_base:
            found |= {START_A: FIXED, START_B: FIXED}
        return found

    @property
    def fixes_leaves(self) -> bool:
        """Whether an adapter has leaves that aren't trained."""
        return FIXED in self.leaves.values()

    @property
    def tokens_by_layer(self) -> dict[str, tuple[int | str, ...]]:
        """The tokens by the name of their layer; by ``""`` if it is not named."""
        if self.tokens and not isinstance(self.tokens[0], tuple):
            return {"": self.tokens}
        return dict(self.tokens)

    def tokens_for(self, path: str) -> tuple[Any, ...]:
        """Returns the tokens whose rows are trained in the layer at ``path``."""
        named = self.tokens_by_layer.items()
        return next((ids for name, ids in named if matches([name], path)), ())

    @property
    def patterns(self) -> tuple[Patterns, ...]:
        """Every pattern of the config, each in the form that `matches` takes."""
        ends = [key for key, _ in (*self.rank_pattern, *self.alpha_pattern)]
        found: list[Patterns] = [f"(.*/)?({end})" for end in ends]
        for given in (self.targets, self.exclude, self.train):
            found += [given] if isinstance(given, str) else [[name] for name in given]
        return tuple(found)

    def is_target(self, path: str, *, is_linear: bool = True) -> bool:
        """Returns whether the layer at ``path`` gets an adapter.

        Args:
          path: the layer's path in the parameter tree.
          is_linear: whether ``"all-linear"`` covers it (embeddings and convolutions
            must be named).

        Returns:
          True if a target pattern matches, its layer index is among ``layers``, and
          none of ``exclude``, ``train`` and ``tokens`` matches.
        """
        named = is_linear if self.targets == ALL_LINEAR else matches(self.targets, path)
        return (
            named
            and not matches(self.exclude, path)
            and not self._trains(path)
            and not self.tokens_for(path)
            and (self.layers is None or layer_index(path) in self.layers)
        )

    def is_trained(self, path: str, *, is_adapted: bool) -> bool:
        """Returns whether the base leaf at ``path`` is trained in full.

        Args:
          path: the leaf's path, ``"classifier/kernel"``; ``train`` may name the leaf
            itself or any module above it.
          is_adapted: whether the module that owns the leaf has an adapter.

        Returns:
          True for leaves that ``train`` names and biases that ``bias`` selects.
        """
        is_bias = path.rpartition("/")[2] == "bias"
        wanted = self.bias == "all" or (self.bias == "lora_only" and is_adapted)
        return (is_bias and wanted) or self._trains(path)

    def _trains(self, path: str) -> bool:
        """Returns whether ``train`` names ``path`` or a module above it."""
        parts = path.split("/")
        return any(
            matches(self.train, "/".join(parts[: i + 1])) for i in range(len(parts))
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain JSON values; `from_dict` takes them back."""
        fields = dataclasses.asdict(self)
        for name in ("rank_pattern", "alpha_pattern"):
            fields[name] = dict(fields[name])
        if (tokens := self.tokens_by_layer) and "" not in tokens:
            fields["tokens"] = {name: list(ids) for name, ids in tokens.items()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "LoRAConfig":
        """Builds a config from `to_dict`'s result.

        Args:
          fields: values by field name; missing fields keep their defaults.

        Returns:
          The config.

        Raises:
          ValueError: lists every key that is not a field.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(fields) - set(known)):
            raise ValueError(unknown_fields(unknown, known))
        return cls(**fields)


def matches(patterns: Patterns, path: str) -> bool:
    """Returns whether ``path`` ends with a listed suffix, or fully matches a regex.

    Args:
      patterns: a list of suffixes of whole path segments, or one regular expression.
      path: a ``/``-joined path.

    Returns:
      True if any suffix or the expression matches.
    """
    if isinstance(patterns, str):
        return re.fullmatch(patterns, path) is not None
    return any(path == p or path.endswith("/" + p) for p in patterns)


def layer_index(path: str) -> int | None:
    """Returns the first number that ends a segment of ``path``, or None."""
    found = re.search(r"(?:^|[/_])(\d+)(?=/|$)", path)
    return int(found.group(1)) if found else None


def _first_match(pattern: PatternValues, path: str, default: Any) -> Any:
    for key, value in pattern:
        if re.match(rf"(.*/)?({key})$", path):
            return value
    return default
