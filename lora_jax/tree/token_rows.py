"""Rows of tokens that are trained in place of a table's own.

They are one leaf of ``params``, ``token_rows`` ``[n, d]`` in float32, beside the table
or the head's kernel, which stays frozen as it is.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from lora_jax.config import ALL_LINEAR, LoRAConfig, matches
from lora_jax.names import FROZEN, KERNEL, PARAMS, TOKEN_ROWS
from lora_jax.ops.contraction import DENSE, Shape
from lora_jax.ops.token_rows import write_rows
from lora_jax.tree.merge import leaf_faults, not_finite
from lora_jax.tree.partition import join
from lora_jax.tree.paths import flatten, nearest, unflatten
from lora_jax.tree.target import Site, child


class TokenRows(NamedTuple):
    """The trained rows of one layer.

    Attributes:
      path: path of the layer.
      weight: name of its table (or kernel).
      kernel_shape: the shape of that, ``[v, d]`` or ``[d, v]``.
      tokens: their ids.
    """

    path: str
    weight: str
    kernel_shape: Shape
    tokens: tuple[int, ...]

    @property
    def axis(self) -> int:
        """The table's axis of tokens."""
        return int(self.weight == KERNEL)

    @property
    def weight_path(self) -> str:
        """Path of the table."""
        return child(self.path, self.weight)

    @property
    def leaf_path(self) -> str:
        """Path of the rows."""
        return child(self.path, TOKEN_ROWS)

    @property
    def shape(self) -> Shape:
        """The shape of the rows, ``[n, d]``."""
        return len(self.tokens), self.kernel_shape[1 - self.axis]

    def init(self, table: Any) -> Any:
        """Returns the table's own rows, in float32."""
        rows = jnp.take(jnp.asarray(table), jnp.asarray(self.tokens), self.axis)
        return (rows.T if self.axis else rows).astype(jnp.float32)


def select_token_rows(sites: Sequence[Site], config: LoRAConfig) -> list[TokenRows]:
    """Returns the rows that ``config.tokens`` names.

    Args:
      sites: every layer that can be adapted.
      config: the adapter config.

    Raises:
      ValueError: listing every layer that doesn't exist, isn't an embedding or linear
        layer, or is adapted or trained in full too, and every token that isn't an id of
        its table.
    """
    found, faults = [], []
    for name, tokens in config.tokens_by_layer.items():
        named = [site for site in sites if name and matches([name], site.path)]
        if not named:
            faults.append(_unmatched(name, sites))
        for site in named:
            ids = tuple(token for token in tokens if isinstance(token, int))
            rows = TokenRows(site.path, site.weight, site.kernel_shape, ids)
            wrong = _faults(site, rows, config)
            if texts := [token for token in tokens if isinstance(token, str)]:
                wrong.append(
                    f"{texts} must be ids here; `load_model` and runs find them in the "
                    "model's tokenizer"
                )
            faults += wrong
            if not wrong:
                found.append(rows)
    if faults:
        raise ValueError(f"tokens: {'; '.join(faults)}.")
    return found


def init_token_rows(
    params: Mapping[str, Any], every: Iterable[TokenRows]
) -> dict[str, Any]:
    """Returns a tree of new rows, which equal those of the base ``params``."""
    flat = flatten(params)
    return unflatten({r.leaf_path: r.init(flat[r.weight_path]) for r in every})


def base_of(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the base as a plain tree: without adapters and rows of tokens."""
    return join(*(_trained(variables, is_rows=False, of=c) for c in (FROZEN, PARAMS)))


def token_rows_of(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tree of the trained rows; empty if there are none."""
    return _trained(variables, is_rows=True, of=PARAMS)


def full_of(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tree of the weights trained in full: ``params`` without the rows."""
    return _trained(variables, is_rows=False, of=PARAMS)


def merge_token_rows(
    params: Mapping[str, Any], rows: Mapping[str, Any], every: Iterable[TokenRows]
) -> dict[str, Any]:
    """Returns base parameters with the trained rows written into their tables.

    Args:
      params: the base, a plain tree; only the tables are copied.
      rows: the trained rows, from `token_rows_of`.
      every: from `select_token_rows`.

    Raises:
      ValueError: listing every leaf that is missing, unexpected, of the wrong shape or
        not finite.
    """
    every = list(every)
    flat, given = flatten(params), flatten(rows)
    wanted = {r.leaf_path: r.shape for r in every}
    faults = leaf_faults(given, wanted, "has no tokens") + not_finite(given, wanted)
    if faults:
        raise ValueError(f"rows of tokens don't fit: {'; '.join(faults)}.")
    for r in every:
        table = jnp.asarray(flat[r.weight_path])
        leaf = jnp.asarray(given[r.leaf_path])
        flat[r.weight_path] = write_rows(table, leaf, r.tokens, axis=r.axis)
    return unflatten(flat)


def is_token_rows(path: str) -> bool:
    """Returns whether a leaf of ``params`` is trained rows."""
    return path.rpartition("/")[2] == TOKEN_ROWS


def _trained(variables: Mapping[str, Any], *, is_rows: bool, of: str) -> dict[str, Any]:
    flat = flatten(variables.get(of, {}))
    return unflatten({p: x for p, x in flat.items() if is_token_rows(p) == is_rows})


def _unmatched(name: str, sites: Sequence[Site]) -> str:
    tables = [site.path for site in sites if site.kind == "embed"]
    if not name:
        return (
            "a list must be given with the layer that has the rows, as "
            f"{{{(tables or ['embed'])[0]!r}: [...]}}; the embeddings are "
            f"{', '.join(tables) or 'none'}"
        )
    hint = nearest(name, tables)
    return f"{name!r} matched 0 of {len(sites)} layers" + (
        f". Did you mean: {hint}?" if hint else ""
    )


def _faults(site: Site, rows: TokenRows, config: LoRAConfig) -> list[str]:
    path, faults = site.path, []
    if site.contraction != DENSE or len(site.kernel_shape) != 2:
        return [
            f"{path!r} must be an embedding, or a linear layer with one kernel [d, v]; "
            f"it is of the kind {site.kind!r}, with shape {list(site.kernel_shape)}"
        ]
    if not site.is_plain:
        faults.append(f"{path!r} transforms its {site.weight} before it is used")
    if config.targets != ALL_LINEAR and matches(config.targets, path):
        faults.append(f"{path!r} must not be among the targets too")
    if config.is_trained(site.weight_path, is_adapted=False):
        faults.append(f"{path!r} must not be in `train` too")
    size = site.kernel_shape[rows.axis]
    if large := [token for token in rows.tokens if token >= size]:
        faults.append(f"{large} must be below {size}, the rows of {path!r}")
    return faults
