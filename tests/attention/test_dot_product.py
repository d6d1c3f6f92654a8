"""Dot-product attention with any mask and any batch dimensions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive

from lora_jax.attention import dot_product as ops
from lora_jax.attention.dot_product import attention, choose_implementation
from tests.reference import assert_close

GENERATOR = np.random.default_rng(0)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(GENERATOR.normal(size=shape), jnp.float32)


def reference(q, k, v, bias=None, mask=None):
    """Softmax attention in NumPy float64, head by head."""
    q, k, v = (np.asarray(array, np.float64) for array in (q, k, v))
    batch, (t, n, h), s = q.shape[:-3], q.shape[-3:], k.shape[-3]
    group = n // k.shape[-2]
    bias = np.broadcast_to(0.0 if bias is None else bias, (*batch, n, t, s))
    mask = np.broadcast_to(True if mask is None else mask, (*batch, n, t, s))
    y = np.zeros(q.shape)
    for b in np.ndindex(*batch):
        for head in range(n):
            logits = q[b][:, head] @ k[b][:, head // group].T / np.sqrt(h)
            logits = np.where(mask[b][head], logits + bias[b][head], -1e300)
            weights = np.exp(logits - logits.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            y[b][:, head] = weights @ v[b][:, head // group]
    return y


def heads(batch=(2,), t=4, s=5, n=4, k=2, h=3):
    return normal(*batch, t, n, h), normal(*batch, s, k, h), normal(*batch, s, k, h)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_matches_the_formula(batch, kv_heads):
    arrays = heads(batch, k=kv_heads)
    bias = normal(*batch, 4, 4, 5)
    mask = GENERATOR.random((*(1 for _ in batch), 1, 4, 5)) > 0.4
    got = jax.jit(lambda *a: attention(*a, bias=bias, mask=jnp.asarray(mask)))(*arrays)
    assert_close(got, reference(*arrays, bias, mask))


def test_causal_attention_is_a_triangular_mask():
    arrays = heads(t=5)
    got = attention(*arrays, is_causal=True)
    assert_close(got, reference(*arrays, mask=np.tri(5, dtype=bool)))


@pytest.mark.parametrize(
    "dtype", [bool, jnp.float32, jnp.int32], ids=lambda d: d.__name__
)
def test_a_mask_may_be_of_any_dtype(dtype):
    arrays = heads()
    padding = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    mask = jnp.asarray(padding, dtype)[:, None, None, :]
    got = attention(*arrays, mask=mask)
    assert_close(got, reference(*arrays, mask=padding[:, None, None, :] > 0))


def test_a_fully_masked_query_gets_the_mean_of_all_values():
    q, k, v = heads()
    got = attention(q, k, v, mask=jnp.zeros((2, 1, 1, 5), bool))
    wanted = np.repeat(np.asarray(v).mean(1, keepdims=True), 2, axis=2)
    assert_close(got, np.broadcast_to(wanted, got.shape))


def test_attention_lists_every_array_of_the_wrong_shape():
    q, k, v = heads()
    with pytest.raises(ValueError, match=r"the 3 key and value heads .* 4 query heads"):
        attention(q, normal(2, 5, 3, 3), normal(2, 5, 3, 3))
    with pytest.raises(ValueError, match=r"is_causal .* got 4 and 5") as error:
        attention(q, k, v, mask=jnp.ones((2, 5)), bias=k, is_causal=True)
    assert "mask must be broadcastable to [*b, n, t, s] = [2, 4, 4, 5]" in str(
        error.value
    )
    assert "got (2, 5). For padding pass mask[..., None, None, :]." in str(error.value)
    assert "bias must be broadcastable" in str(error.value)
    with pytest.raises(
        ValueError, match=r"h = 3 .* got \(2, 5, 2, 7\), \(2, 5, 2, 3\)"
    ):
        attention(q, normal(2, 5, 2, 7), v)
    with pytest.raises(ValueError, match=r"must be \[\*b, t, n, h\].* got \(4, 3\)"):
        attention(q[0, 0], k[0, 0], v[0, 0])


def test_attention_rejects_integers_and_unknown_implementations(unchecked):
    q, k, v = heads()
    with pytest.raises(TypeError, match=r"query must be floating-point; got .* int32"):
        attention(q.astype(jnp.int32), k, v)
    with pytest.raises(ValueError, match="'xla', 'cudnn' or None; got 'flash'"):
        attention(q, k, v, implementation="flash")


def test_cudnn_is_chosen_if_it_supports_the_arrays(monkeypatch):
    def chosen(t=4, s=4, h=64, dtype=jnp.bfloat16, **options):
        q, k = (jnp.zeros((2, length, 4, h), dtype) for length in (t, s))
        return choose_implementation(q, k, **options)

    mask = jnp.ones((1, 1, 1, 4), bool)
    if jax.default_backend() != "gpu":
        assert chosen() == "xla"
    monkeypatch.setattr(ops, "_widest_fused_head", lambda: 128)
    assert chosen() == chosen(mask=mask) == chosen(dtype=jnp.float16) == "cudnn"
    assert chosen(dtype=jnp.float32) == chosen(h=68) == chosen(h=136) == "xla"
    assert chosen(bias=jnp.zeros((1, 1, 4, 4))) == "xla"
    assert chosen(t=3) == "cudnn"
    monkeypatch.setattr(ops, "_widest_fused_head", lambda: 256)
    assert chosen(h=136) == "cudnn"
    assert chosen(t=3, mask=mask) == chosen(s=5, mask=mask) == "xla"


def test_the_remat_policy_saves_cudnns_forward_pass():
    kept = [
        name
        for name in ("dot_product_attention_fwd_wrapper", "dot_general", "exp")
        if ops.is_fused_attention(Primitive(name), jnp.ones(1), scale=1.0)
    ]
    assert kept == ["dot_product_attention_fwd_wrapper"]
