"""The TPU kernel, interpreted as plain JAX, against blockwise attention."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.attention import causal, splash
from lora_jax.attention.causal import causal_attention
from lora_jax.attention.splash import can_splash, splash_attention
from lora_jax.parallel.activation_sharding import on_mesh_of
from lora_jax.parallel.mesh import make_mesh

B, N, K, H = 2, 4, 2, 16


def arrays(t):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(B, t, N, H), (B, t, K, H), (B, t, K, H), (B, t, N, H)]
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def both(run, query, key, value, direction):
    """Returns the result, and the gradients of its product with a direction."""

    def loss(query, key, value):
        out = run(query, key, value)
        return jnp.sum(out * direction), out

    grads, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(query, key, value)
    return [out, *grads]


@pytest.mark.parametrize(
    ("t", "options"),
    [
        (128, {}),
        (200, {}),
        (256, {"window": 40}),
        (256, {"softcap": 3.0, "scale": 0.5}),
        (200, {"segment_ids": True, "window": 70}),
    ],
    ids=["plain", "uneven", "window", "softcap", "packed"],
)
def test_the_kernel_matches_blockwise_attention(t, options):
    *qkv, direction = arrays(t)
    options = dict(options)
    if options.pop("segment_ids", False):
        options["segment_ids"] = jnp.repeat(jnp.arange(4), t // 4)[None].repeat(B, 0)
    given = {"scale": H**-0.5, **options}
    window = given.pop("window", None)
    found = both(
        lambda *x: splash_attention(
            *x, windows=(window,), is_interpreted=True, **given
        ),
        *qkv,
        direction,
    )
    wanted = both(lambda *x: causal_attention(*x, **options), *qkv, direction)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.fixture
def on_a_tpu(monkeypatch):
    """Pretends to run on a TPU, with interpreted kernels."""
    monkeypatch.setattr(splash, "target_platform", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    asked = []

    def interpreted(*args, **options):
        asked.append(options["windows"])
        return splash_attention(*args, **options, is_interpreted=True)

    monkeypatch.setattr(causal, "splash_attention", interpreted)
    return asked


@pytest.mark.parametrize("window", [40, 2**30])
def test_a_traced_window_selects_a_kernel(window, on_a_tpu):
    *qkv, _ = arrays(128)

    @jax.jit
    def run(window, *qkv):
        return causal_attention(*qkv, window=window, windows=(40, 2**30))

    found = run(jnp.int32(window), *qkv)
    assert on_a_tpu == [(40, 2**30)]
    wanted = both(
        lambda *x: splash_attention(
            *x, scale=H**-0.5, windows=(window,), is_interpreted=True
        ),
        *qkv,
        jnp.ones_like(qkv[0]),
    )[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_traced_window_of_unknown_values_uses_no_kernel(on_a_tpu):
    *qkv, _ = arrays(128)
    jax.jit(lambda w, *x: causal_attention(*x, window=w))(jnp.int32(40), *qkv)
    assert on_a_tpu == []


def test_the_kernel_supports_shapes_divisible_over_the_mesh(monkeypatch):
    query, key, *_ = arrays(128)
    assert not can_splash(query, key)  # no TPU
    monkeypatch.setattr(splash, "target_platform", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert can_splash(query, key)
    assert not can_splash(query[:, :64], key[:, :64])
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert not can_splash(query, key)  # several devices without a mesh
    with on_mesh_of(make_mesh(devices=jax.devices()[:1])):
        assert can_splash(query, key)
        monkeypatch.setattr(splash, "num_row_shards", lambda: 3)
        assert not can_splash(query, key)
