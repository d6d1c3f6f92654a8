"""Adapters of a decoder with tied embeddings.

Here a tied table has one adapter, which acts in both places. PEFT wraps a module, not
its weight: an adapter (or a fully trained copy) of ``embed_tokens`` alone leaves the
head unchanged, and one of ``lm_head`` alone leaves the lookup unchanged. Such an
adapter is attached to a model with a separate head, initialised from the embedding.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lora_jax.interop.external import ExternalAdapter, ExternalFactors
from lora_jax.models.family import Family
from lora_jax.models.stacking import LayerSlice
from lora_jax.names import EMBED, HEAD, LM_HEAD

TokenRows = tuple[list[int], np.ndarray]  # token ids, and a row for each


def needs_own_head(adapter: ExternalAdapter, family: Family) -> bool:
    """Returns whether an adapter changes the two sides of a tied table differently."""
    if family.head or adapter.is_tied_once:
        return False
    table = family.module_name(EMBED)

    def sides(named: Mapping) -> list:
        ends = (f".{table}", f".{LM_HEAD}")
        return [
            next((v for name, v in named.items() if f".{name}".endswith(end)), None)
            for end in ends
        ]

    def differ(named: Mapping, are_alike: Callable[[Any, Any], bool]) -> bool:
        lookup, head = sides(named)
        if lookup is None or head is None:
            return lookup is not head
        return not are_alike(lookup, head)

    weights = {
        name.removesuffix(".weight"): array for name, array in adapter.full.items()
    }
    lookup, head = sides(adapter.tokens)
    return (
        differ(weights, np.array_equal)
        or differ(adapter.modules, are_tied)
        or (head is not None and not are_same_rows(lookup, head))
    )


def are_same_rows(one: TokenRows | None, other: TokenRows) -> bool:
    """Returns whether the trained rows of two modules are of the same tokens, alike."""
    if one is None or one[0] != other[0]:
        return False
    return np.array_equal(one[1], other[1])


def are_tied(embed: ExternalFactors, head: ExternalFactors) -> bool:
    """Returns whether two adapters are one, seen from the lookup and from the head."""
    same = head.scaling == embed.scaling and embed.magnitude is None
    pairs = ((head.a, embed.b.T), (head.b, embed.a.T))
    return same and all(np.array_equal(x, y) for x, y in pairs)


def place_tied(
    found: dict[str, ExternalFactors],
    kernels: Mapping[str, LayerSlice],
    *,
    is_tied_once: bool,
) -> list[str]:
    """Merges the two adapters of a tied embedding in ``found``; returns problems.

    They must be equal; with ``is_tied_once``, one of the two is enough.
    """
    if HEAD in kernels or EMBED not in kernels or not {EMBED, HEAD} & set(found):
        return []
    head, embed = found.pop(HEAD, None), found.get(EMBED)
    if head is not None and embed is not None:
        if are_tied(embed, head):
            return []
        present = "both, which differ"
    elif is_tied_once:
        if embed is None and head is not None:
            found[EMBED] = head._replace(a=head.b.T, b=head.a.T, is_embedding=True)
        return []
    else:
        present = "one"
    return [
        "unexpected: the head of this model is its embedding (tied), so adapters of "
        "embed_tokens and lm_head must both be present, each the other's transpose; "
        f"got {present}. Other tools change that side alone: load the base and the "
        "adapter together (`load_model(path, adapter=...)`), which unties the head"
    ]


def check_one_table(family: Family) -> None:
    """Raises if another tool can't hold a change of the embedding.

    Transformers looks tokens up in each stack's own module, of which a family with
    ``copies`` has several; an adapter of one of these would act there alone.
    """
    if family.copies:
        raise ValueError(
            "a change of the embedding can't be exported for an encoder–decoder: "
            f"transformers has it as several modules, {', '.join(family.copies)}. "
            "Merge it into its base."
        )


def tied_factors(embed: ExternalFactors) -> ExternalFactors:
    """Returns the adapter of a tied head for that of its embedding.

    Raises:
      ValueError: if it has a magnitude.
    """
    if embed.magnitude is not None:
        raise ValueError(
            "a DoRA adapter of a tied embedding can't be exported: no other tool "
            "scales both sides alike. Merge it into its base."
        )
    return embed._replace(a=embed.b.T, b=embed.a.T, is_embedding=False)
