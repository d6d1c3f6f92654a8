"""Losses: sums and weights against NumPy float64, masks, chunks, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.train.causal_lm import causal_lm
from lora_jax.train.losses import (
    contrastive,
    softmax_cross_entropy,
    squared_error,
)

RNG = np.random.default_rng(0)


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def arrays(*shapes):
    return [jnp.asarray(RNG.normal(size=s), jnp.float32) for s in shapes]


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("class_weights", [None, [1.0, 0.5, 3.0]])
def test_cross_entropy_matches_the_formula(smoothing, class_weights):
    (logits,) = arrays((2, 5, 3))
    labels, w = RNG.integers(0, 3, (2, 5)), RNG.uniform(size=(2, 5))
    c = np.ones(3) if class_weights is None else np.array(class_weights)
    log_p = log_softmax(logits)
    own = np.take_along_axis(c * log_p, labels[..., None], -1)[..., 0]
    expected = -(1 - smoothing) * own - smoothing * (c * log_p).mean(-1)
    loss, weight = jax.jit(
        lambda *a: softmax_cross_entropy(
            a[0],
            a[1],
            weights=a[2],
            label_smoothing=smoothing,
            class_weights=None if class_weights is None else jnp.array(class_weights),
        )
    )(logits, labels, w)
    np.testing.assert_allclose(loss, (w * expected).sum(), rtol=1e-5)
    np.testing.assert_allclose(weight, (w * c[labels]).sum(), rtol=1e-5)
    assert loss.dtype == weight.dtype == jnp.float32


def test_rows_of_weight_zero_are_ignored_whatever_their_contents():
    (logits,) = arrays((4, 3))
    labels = jnp.array([0, 2, -100, 77])
    mask = jnp.array([True, True, False, False])
    grad, part = (
        jax.value_and_grad(lambda x, y, m: softmax_cross_entropy(x, y, weights=m)[0])(
            logits[:n], labels[:n], mask[:n]
        )
        for n in (4, 2)
    )
    assert grad[0] == part[0]
    np.testing.assert_array_equal(grad[1][:2], part[1])
    np.testing.assert_array_equal(grad[1][2:], 0)


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_out_of_range_makes_the_loss_nan(label):
    assert jnp.isnan(softmax_cross_entropy(jnp.zeros((1, 3)), jnp.array([label]))[0])
    hidden, kernel = jnp.ones((1, 1, 2)), jnp.ones((2, 3))
    assert jnp.isnan(causal_lm(hidden, kernel, jnp.array([[label]]))[0])


def test_bfloat16_logits_are_summed_in_float32():
    logits = jnp.full((4096, 2), 0.5, jnp.bfloat16)
    loss, weight = softmax_cross_entropy(logits, jnp.zeros(4096, int))
    np.testing.assert_allclose(loss / weight, np.log(2), rtol=1e-6)


def test_squared_error_broadcasts_weights_over_features():
    p, t = arrays((4, 3), (4, 3))
    w = jnp.array([1.0, 0.0, 2.0, 1.0])
    loss, weight = squared_error(p, t.at[1].set(jnp.nan), weights=w)
    expected = np.asarray(w)[:, None] * (np.float64(p) - np.float64(t)) ** 2
    np.testing.assert_allclose(loss, expected.sum(), rtol=1e-5)
    assert weight == 12


def test_contrastive_is_symmetric_and_masks_its_negatives():
    q, k = arrays((5, 4), (5, 4))
    w = jnp.array([1.0, 1.0, 1.0, 0.0, 0.0])
    loss, weight = contrastive(q, k, weights=w, temperature=0.1)

    def norm(x):
        return np.float64(x) / np.linalg.norm(x, axis=-1, keepdims=True)

    s = (norm(q) @ norm(k).T / 0.1)[:3, :3]
    expected = -np.trace(log_softmax(s) + log_softmax(s.T)) / 2
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert weight == 3
    np.testing.assert_allclose(
        contrastive(k, q, weights=w, temperature=0.1)[0], loss, rtol=1e-6
    )


def test_contrastive_with_negatives_is_its_definition():
    rng = np.random.default_rng(3)
    q, k, n = rng.normal(size=(3, 4, 5)).astype(np.float32)
    w = np.array([1, 1, 0, 1], np.float32)
    units = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k, n)]
    scores, others = (units[0] @ x.T / 0.1 for x in units[1:])
    real = w != 0
    want = sum(
        np.log(np.exp(scores[i, real]).sum() + np.exp(others[i, real]).sum())
        + np.log(np.exp(scores[real, i]).sum())
        - 2 * scores[i, i]
        for i in np.flatnonzero(real)
    )
    q, k, n = map(jnp.asarray, (q, k, n))
    loss, weight = contrastive(
        q, k, negatives=n, weights=jnp.asarray(w), temperature=0.1
    )
    np.testing.assert_allclose(loss, want / 2, rtol=1e-5)
    assert weight == 3
    with pytest.raises(ValueError, match=r"negatives must be .* = \(4, 5\); got \(3"):
        contrastive(q, k, negatives=n[:3])


def test_contrastive_gradient_is_finite_for_zero_rows():
    q, k = jnp.zeros((3, 4)), jnp.ones((3, 4))
    grad = jax.grad(lambda q: contrastive(q, k, weights=jnp.array([1, 1, 0]))[0])(q)
    assert jnp.isfinite(grad).all()


def full_lm(hidden, kernel, labels, weights):
    logits = (hidden @ kernel.astype(hidden.dtype)).astype(jnp.float32)
    log_p = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    return jnp.sum(weights * nll)


@pytest.mark.parametrize("chunk", [1, 4, 5, 15, 1000])
def test_chunked_lm_equals_the_full_one_in_value_and_gradients(chunk):
    hidden, kernel = arrays((3, 5, 4), (4, 11))
    labels = jnp.asarray(RNG.integers(0, 11, (3, 5)))
    weights = jnp.asarray(RNG.uniform(size=(3, 5)) * (RNG.random((3, 5)) > 0.3))

    def chunked(h, k, w):
        return 3 * causal_lm(h, k, labels, w, chunk=chunk)[0]

    def full(h, k, w):
        return 3 * full_lm(h, k, labels, w)

    everything = (0, 1, 2)
    loss, grads = jax.jit(jax.value_and_grad(full, everything))(hidden, kernel, weights)
    for argnums in (*everything, everything):
        got = jax.jit(jax.value_and_grad(chunked, argnums))(hidden, kernel, weights)
        want = loss, grads if argnums == everything else grads[argnums]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            got,
            want,
        )
    assert causal_lm(hidden, kernel, labels, weights)[1] == weights.sum()


def test_chunked_lm_materialises_neither_all_logits_nor_a_frozen_heads_gradient():
    b, t, d, v, chunk = 4, 64, 8, 512, 16
    hidden, kernel = arrays((b, t, d), (d, v))
    labels = jnp.zeros((b, t), jnp.int32)

    def loss(h, k):
        return causal_lm(h, k, labels, chunk=chunk)[0]

    step = jax.jit(jax.grad(loss)).lower(hidden, kernel).compile()
    temporary = step.memory_analysis().temp_size_in_bytes
    assert temporary < 4 * (6 * chunk * v + 8 * b * t * d)
    assert temporary < 4 * b * t * v / 2
    frozen, trained = (
        jax.jit(jax.grad(loss, a)).lower(hidden, kernel).as_text().count("dot_general")
        for a in (0, (0, 1))
    )
    assert (frozen, trained) == (2, 3)
    primal = jax.jit(loss).lower(hidden, kernel).as_text()
    assert primal.count("dot_general") == 1


def test_chunked_lm_keeps_the_dtypes_of_hidden_and_kernel():
    hidden, kernel = (x.astype(jnp.bfloat16) for x in arrays((2, 3, 4), (4, 7)))
    labels = jnp.ones((2, 3), jnp.int32)

    def loss(h, k):
        return causal_lm(h, k, labels)[0]

    value, (dh, dk) = jax.value_and_grad(loss, (0, 1))(hidden, kernel)
    assert (value.dtype, dh.dtype, dk.dtype) == (
        jnp.float32,
        jnp.bfloat16,
        jnp.bfloat16,
    )
    want = jax.grad(lambda h: full_lm(h, kernel, labels, jnp.ones((2, 3))))(hidden)
    np.testing.assert_allclose(
        dh.astype(jnp.float32), want.astype(jnp.float32), rtol=2e-2, atol=1e-2
    )


def test_masked_positions_do_not_affect_the_result():
    hidden, kernel = arrays((2, 4, 3), (3, 5))
    mask = jnp.array([[0, 0, 1, 1], [0, 1, 1, 0]])
    a = causal_lm(hidden, kernel, jnp.zeros((2, 4), int), mask)
    b = causal_lm(hidden, kernel, jnp.where(mask, 0, 4), mask)
    assert a == b


FLOATS = jnp.zeros((4, 3))
LABELS = jnp.zeros(4, int)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: softmax_cross_entropy(FLOATS, jnp.zeros((4, 3), int)),
            ValueError,
            r"labels must have the leading dimensions of logits, \(4,\); got \(4, 3\)",
        ),
        (
            lambda: softmax_cross_entropy(FLOATS, jnp.zeros(4)),
            TypeError,
            "labels must be integers.*float32",
        ),
        (
            lambda: softmax_cross_entropy(FLOATS.astype(int), LABELS),
            TypeError,
            "logits must be floating-point; got logits int32",
        ),
        (
            lambda: softmax_cross_entropy(FLOATS, LABELS, weights=jnp.ones(3)),
            ValueError,
            r"weights must have the shape of labels, \(4,\); got \(3,\)",
        ),
        (
            lambda: softmax_cross_entropy(FLOATS, LABELS, label_smoothing=1.0),
            ValueError,
            r"label_smoothing must be in \[0, 1\); got 1.0",
        ),
        (
            lambda: softmax_cross_entropy(FLOATS, LABELS, class_weights=jnp.ones(2)),
            ValueError,
            r"class_weights must be \[v\] = \[3\].*got \(2,\)",
        ),
        (
            lambda: squared_error(jnp.zeros((4, 1)), jnp.zeros(4)),
            ValueError,
            r"same shape; got \(4, 1\) and \(4,\)",
        ),
        (
            lambda: squared_error(FLOATS, FLOATS, weights=jnp.ones(3)),
            ValueError,
            r"leading dimensions of the targets, \(4, 3\); got \(3,\)",
        ),
        (
            lambda: contrastive(FLOATS[:1], FLOATS[:1]),
            ValueError,
            r"b >= 2; got \(1, 3\) and \(1, 3\)",
        ),
        (
            lambda: contrastive(FLOATS, FLOATS, temperature=0.0),
            ValueError,
            "temperature must be above 0; got 0.0",
        ),
        (
            lambda: contrastive(FLOATS, FLOATS, weights=jnp.ones(3)),
            ValueError,
            r"weights must be \[b\] = \[4\]; got \(3,\)",
        ),
        (
            lambda: causal_lm(FLOATS[None], jnp.zeros((7, 3)), LABELS[None]),
            ValueError,
            r"\[d, v\] = \[3, v\].*got \(7, 3\)",
        ),
        (
            lambda: causal_lm(FLOATS[None], FLOATS.T, LABELS[None], chunk=0),
            ValueError,
            "chunk must be at least 1 token; got 0",
        ),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
