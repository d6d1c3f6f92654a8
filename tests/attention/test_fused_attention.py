"""cuDNN's fused attention against blockwise attention in float32."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import LoRAConfig, adapt, make_lm_loss
from lora_jax.attention.causal import bidirectional_attention, causal_attention
from lora_jax.models.decoder import Decoder
from lora_jax.models.decoder_config import DecoderConfig, Rope

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "gpu", reason="needs an NVIDIA GPU (JAX_PLATFORMS=cuda)"
)
T = 96
SEGMENTS = np.repeat(np.arange(3), T // 3)[None].repeat(2, 0)
CONFIG = DecoderConfig(
    vocab_size=50,
    hidden_size=64,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=32,
    mlp_size=96,
    max_positions=64,
    ropes=(Rope(10000.0, 32),),
    layer_ropes=(0, 0),
)


def heads(key, n, k, h):
    keys = jax.random.split(key, 4)
    shapes = ((2, T, n, h), (2, T, k, h), (2, T, k, h), (2, T, n, h))
    return [
        jax.random.normal(key, shape, jnp.bfloat16)
        for key, shape in zip(keys, shapes, strict=True)
    ]


def results(function, arrays):
    """Returns the result and its gradients in float32."""

    @jax.jit
    def both(arrays, weights):
        y, pull = jax.vjp(function, *arrays)
        return y, *pull(weights.astype(y.dtype))

    return [np.asarray(x, np.float32) for x in both(arrays[:-1], arrays[-1])]


def check(function, mask, scale, arrays):
    """Compares with attention that forms all scores, in float32."""
    assert "fmha" in jax.jit(function).lower(*arrays[:3]).compile().as_text()

    def whole(query, key, value):
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, scale=scale, implementation="xla"
        )

    wanted = results(whole, [x.astype(jnp.float32) for x in arrays])
    for one, other in zip(results(function, arrays), wanted, strict=True):
        assert np.linalg.norm(one - other) < 1e-2 * np.linalg.norm(other)


@pytest.mark.parametrize(
    ("n", "k", "h", "options"),
    [
        (4, 4, 64, {}),
        (4, 2, 64, {"scale": 0.3}),
        (4, 1, 128, {"window": 10}),
        (2, 2, 256, {}),
        (4, 2, 64, {"segment_ids": SEGMENTS}),
        (4, 2, 64, {"segment_ids": SEGMENTS, "window": 10}),
    ],
    ids=["plain", "grouped", "window", "wide", "packed", "packed window"],
)
def test_causal(key, n, k, h, options):
    distance = jnp.arange(T)[:, None] - jnp.arange(T)
    mask = (distance >= 0) & (distance < options.get("window", T))
    if "segment_ids" in options:
        mask = mask & (SEGMENTS[:, :, None] == SEGMENTS[:, None])
    check(
        functools.partial(causal_attention, **options),
        jnp.broadcast_to(mask, (2, T, T))[:, None],
        options.get("scale", h**-0.5),
        heads(key, n, k, h),
    )


def test_bidirectional_with_padding(key):
    mask = jnp.arange(T)[None] < jnp.asarray([[T], [40]])
    check(
        functools.partial(bidirectional_attention, mask=mask),
        mask[:, None, None],
        32**-0.5,
        heads(key, 4, 4, 32),
    )


@pytest.mark.parametrize(
    ("remat", "forwards"), [("none", 1), ("lora", 1), ("block", 2)]
)
def test_remat_lora_saves_the_kernels_output(key, remat, forwards):
    ids = jnp.ones((2, 64), jnp.int32)
    model = Decoder(CONFIG, dtype=jnp.bfloat16, scan_layers=True, remat=remat)
    adapted = adapt(model, LoRAConfig(rank=2, alpha=2), ids)
    params = jax.jit(Decoder(CONFIG, scan_layers=True).init)(key, ids)["params"]
    variables = adapted.attach(params, key)
    loss = make_lm_loss(adapted, is_tied=False)
    batch = {"input_ids": ids, "labels": ids, "weights": jnp.ones(ids.shape)}

    def total(lora):
        return loss({**variables, "lora": lora}, batch, {})[0]

    text = jax.jit(jax.grad(total)).lower(variables["lora"]).compile().as_text()
    kernels = re.findall(r'custom_call_target="(__cudnn\$fmha\w*)"', text)
    names = [name for name in kernels if "backward" not in name.lower()]
    assert len(names) == forwards
    assert len(kernels) == forwards + 1
