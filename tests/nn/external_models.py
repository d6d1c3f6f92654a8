"""The models of `tests.nn.external_modules` and what `adapt` must find in them.

`MODELS` lists them with example inputs, the config that adapts them, and the expected
paths.
"""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import LoRAConfig, register_layer
from tests.nn.external_modules import (
    Albert,
    Boxed,
    BroadcastScan,
    EinsumMoE,
    EncoderDecoder,
    Inner,
    Jitted,
    NestedScan,
    Odds,
    RaggedLinear,
    RaggedMoE,
    ResNet,
    ScannedDecoder,
    TransposedLinear,
    ViT,
    VmappedExperts,
)

register_layer(RaggedLinear, "mi,eio->mo", weight="w")
register_layer(TransposedLinear, "mi,eoi->mo", weight="w")


class External(NamedTuple):
    name: str
    model: nn.Module
    args: tuple[Any, ...]
    paths: tuple[str, ...]
    targets: Any = "all-linear"
    kwargs: dict[str, Any] = {}  # noqa: RUF012 - never changed
    rank: int = 2
    is_told: bool = True  # whether its parameters tell its input

    def config(self, **fields) -> LoRAConfig:
        return LoRAConfig(**{**self.defaults(), **fields})

    def defaults(self) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": 3 * self.rank, "targets": self.targets}

    def variables(self) -> dict[str, Any]:
        """Returns weights as if trained elsewhere: NumPy arrays without zeros."""
        rng = np.random.default_rng(0)

        def fill(leaf: jax.ShapeDtypeStruct) -> jax.Array:
            size = max(1, math.prod(leaf.shape[-2:-1])) ** -0.5
            values = rng.normal(0.1, size, leaf.shape)
            return jnp.asarray(abs(values) + 0.1 if leaf.ndim == 1 else values, "f4")

        init = functools.partial(self.model.init, **self.kwargs)
        made = nn.meta.unbox(jax.eval_shape(init, jax.random.key(0), *self.args))
        made.pop("intermediates", None)
        return jax.tree.map(fill, made)


def _floats(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(3), shape)


def _ids(*shape: int) -> jax.Array:
    return jax.random.randint(jax.random.key(4), shape, 0, 11)


def _attention(prefix: str) -> tuple[str, ...]:
    return tuple(f"{prefix}/{name}" for name in ("query", "key", "value", "out"))


_BLOCK = (*_attention("attn"), "up", "down")
_MHA = "MultiHeadDotProductAttention_0"

MODELS = [
    External(
        "resnet",
        ResNet(),
        (_floats(2, 8, 8, 3),),
        (
            "conv_init",
            *(f"ResNetBlock_{i}/Conv_{j}" for i in (0, 1) for j in (0, 1)),
            "ResNetBlock_1/proj",
            "head",
        ),
        targets=r".*(conv_init|Conv_\d|proj|head)",
        kwargs={"train": False},
        is_told=False,
    ),
    External(
        "vit",
        ViT(),
        (_floats(2, 8, 8, 3),),
        (
            *tuple(
                f"block_{i}/{name}"
                for i in range(2)
                for name in (*_attention(_MHA), "Dense_0", "Dense_1")
            ),
            "head",
        ),
        is_told=False,
    ),
    External(
        "scanned",
        ScannedDecoder(),
        (_ids(2, 5),),
        (*(f"layers/{name}" for name in _BLOCK), "lm_head"),
        rank=4,  # as many as layers and heads
    ),
    External(
        "scanned_axis_1",
        ScannedDecoder(axis=1),
        (_ids(2, 5),),
        tuple(f"layers/{name}" for name in _BLOCK),
        targets=["query", "key", "value", "out", "up", "down"],
        rank=4,
    ),
    External(
        "nested_scan",
        NestedScan(),
        (_floats(2, 6),),
        ("outer/inner/heads",),
        is_told=False,
    ),
    External(
        "vmapped_experts",
        VmappedExperts(),
        (_floats(2, 6),),
        ("router", "experts/up", "experts/down"),
        rank=3,  # as many as experts
    ),
    External(
        "einsum_moe",
        EinsumMoE(),
        (_floats(2, 5, 6),),
        ("router", "up", "down"),
        rank=3,
    ),
    External(
        "ragged_moe",
        RaggedMoE(),
        (_floats(2, 5, 6),),
        ("router", "wi", "wo"),
        rank=3,
    ),
    External(
        "encoder_decoder",
        EncoderDecoder(),
        (_ids(2, 5), _ids(2, 5)),
        (
            "shared",
            "encoder_0",
            "encoder_1",
            *_attention("self_attn"),
            *_attention("cross_attn"),
            "mlp/layers_0",
            "mlp/layers_2",
        ),
        targets=r".+",
        is_told=False,
    ),
    External("albert", Albert(), (_floats(2, 6),), ("block/up", "block/down", "twice")),
    # 16 rows: XLA:CPU compiles a loop of less than a kilobyte (the base's alone, were
    # there 2) into a single kernel, in which a product sums in another order.
    External(
        "broadcast_scan",
        BroadcastScan(),
        (_floats(16, 6),),
        ("block/heads",),
    ),
    External("child_model", Inner(), (_floats(2, 6),), ("model/up", "model/down")),
    External("boxed", Boxed(), (_floats(2, 6),), ("up", "down")),
    External("jitted", Jitted(), (_floats(2, 6),), ("block/up", "block/down", "out")),
    External(
        "odds",
        Odds(),
        (_floats(2, 4, 6),),
        ("general", "scaled", "conv", "rematted", "einsum"),
        targets=["general", "scaled", "conv", "rematted", "einsum"],
        is_told=False,
    ),
    External(
        "attention_alone",
        nn.MultiHeadDotProductAttention(num_heads=4),
        (_floats(2, 5, 16),),
        ("query", "key", "value", "out"),
    ),
]


def trained(variables: dict[str, Any]) -> dict[str, Any]:
    """Returns the variables with nonzero B, as after training."""
    rng = np.random.default_rng(1)

    def move(leaf: jax.Array) -> jax.Array:
        return jnp.asarray(leaf + 0.2 * rng.standard_normal(leaf.shape, np.float32))

    return {**variables, "lora": jax.tree.map(move, variables["lora"])}


def assert_same_tree(got: Any, wanted: Any) -> None:
    """Asserts equal structure, dtypes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        assert jnp.asarray(a).dtype == jnp.asarray(b).dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
