"""The chunked gated delta rule is its recurrence, token by token; so are gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from lora_jax.attention.gated_delta import causal_conv, gated_delta_rule
from tests.reference import assert_close

SEGMENTS = np.array([[0] * 11, [3, 3, 3, 3, 5, 7, 7, 7, 7, 0, 0]])


def drawn(dtype=np.float64):
    """Inputs of 11 tokens, 2 key heads of width 3 and 4 value heads of width 5."""
    random = np.random.default_rng(0)
    query, key = random.normal(size=(2, 2, 11, 2, 3))
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    value = random.normal(size=(2, 11, 4, 5))
    log_decay = -random.exponential(size=(2, 11, 4))
    beta, state = random.uniform(size=(2, 11, 4)), random.normal(size=(2, 4, 3, 5))
    arrays = (query, key, value, log_decay, beta, state)
    return [array.astype(dtype) for array in arrays]


def recurrence(query, key, value, log_decay, beta, state, segments=None):
    """The first formula of `gated_delta_rule`, a token and a head at a time."""
    found = np.zeros(value.shape)
    last = np.zeros(state.shape)
    for b, n in np.ndindex(*state.shape[:2]):
        own = state[b, n]
        for t in range(value.shape[1]):
            if segments is not None and t and segments[b, t] != segments[b, t - 1]:
                own = np.zeros_like(own)
            q, k = query[b, t, n // 2], key[b, t, n // 2]
            own = np.exp(log_decay[b, t, n]) * own
            own = own + beta[b, t, n] * np.outer(k, value[b, t, n] - own.T @ k)
            found[b, t, n] = own.T @ q
        last[b, n] = own
    return found, last


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["plain", "packed"])
def test_chunks_give_the_recurrence(chunk, segments):
    arrays = drawn(np.float32)
    want = recurrence(*(x.astype(np.float64) for x in arrays), segments)
    *inputs, state = arrays
    got = jax.jit(
        lambda *x: gated_delta_rule(
            *x[:-1],
            state=x[-1],
            segment_ids=None if segments is None else jnp.asarray(segments),
            chunk=chunk,
        )
    )(*inputs, state)
    for found, wanted in zip(got, want, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("segments", [None, SEGMENTS], ids=["plain", "packed"])
def test_gradients_are_those_of_the_recurrence_in_float64(segments):
    with jax.enable_x64():
        inputs = [jnp.asarray(x) for x in drawn()]

        def by_token(*x):
            *_, state = x
            outs = []
            for t in range(x[2].shape[1]):
                if segments is not None and t:
                    is_same = segments[:, t] == segments[:, t - 1]
                    state = state * is_same[:, None, None, None]
                q, k, v, g, beta = (y[:, t] for y in x[:-1])
                q, k = (jnp.repeat(y, 2, axis=1) for y in (q, k))
                state = state * jnp.exp(g)[..., None, None]
                write = v - jnp.einsum("bnhu,bnh->bnu", state, k)
                write = beta[..., None] * write
                state = state + k[..., None] * write[..., None, :]
                outs.append(jnp.einsum("bnhu,bnh->bnu", state, q))
            return jnp.stack(outs, axis=1), state

        def by_chunk(*x):
            ids = None if segments is None else jnp.asarray(segments)
            *inputs, state = x
            return gated_delta_rule(*inputs, state=state, segment_ids=ids, chunk=4)

        def total(function):
            def scalar(*x):
                out, state = function(*x)
                return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(state))

            return jax.jit(jax.value_and_grad(scalar, argnums=tuple(range(6))))

        (value, found), (wanted_value, wanted) = (
            total(f)(*inputs) for f in (by_chunk, by_token)
        )
        np.testing.assert_allclose(value, wanted_value, rtol=1e-12)
        for got, want in zip(found, wanted, strict=True):
            assert got.dtype == np.float64
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def test_no_array_is_as_large_as_tokens_by_tokens():
    *inputs, _ = (jnp.asarray(x, jnp.float32) for x in drawn())
    long = [jnp.tile(x, (1, 100, *[1] * (x.ndim - 2))) for x in inputs]

    def largest(jaxpr):
        found = [v.aval.size for e in jaxpr.eqns for v in e.outvars]
        inner = [j for e in jaxpr.eqns for j in jaxprs_in_params(e.params)]
        return max([*found, *map(largest, inner)])

    def loss(*x):
        return jnp.sum(gated_delta_rule(*x, chunk=16)[0])

    traced = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2, 3, 4)))(*long)
    rows = 2 * 4 * (1100 + 16)
    assert largest(traced.jaxpr) <= rows * 16 < rows * 1100


def test_a_convolution_sees_its_example_only_and_goes_on_from_the_past():
    random = np.random.default_rng(1)
    x, kernel = random.normal(size=(2, 11, 3)), random.normal(size=(4, 3))
    x, kernel = x.astype(np.float32), kernel.astype(np.float32)
    whole = causal_conv(jnp.asarray(x), jnp.asarray(kernel))
    packed = causal_conv(
        jnp.asarray(x), jnp.asarray(kernel), segment_ids=jnp.asarray(SEGMENTS)
    )
    for b, t, c in np.ndindex(*x.shape):
        near = [(j, t - 3 + j) for j in range(4) if t - 3 + j >= 0]
        want = sum(kernel[j, c] * x[b, s, c] for j, s in near)
        assert_close(whole[b, t, c], want)
        own = [(j, s) for j, s in near if (SEGMENTS[b, s:t] == SEGMENTS[b, t]).all()]
        want = sum(kernel[j, c] * x[b, s, c] for j, s in own)
        assert_close(packed[b, t, c], want)
    rest = causal_conv(
        jnp.asarray(x[:, 7:]), jnp.asarray(kernel), past=jnp.asarray(x[:, 4:7])
    )
    assert_close(rest, whole[:, 7:])
