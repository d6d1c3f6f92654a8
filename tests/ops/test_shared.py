"""``x A`` of several layers at once: the same values, reading x once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.ops import lora_einsum, shared_hidden
from tests.laws import normal
from tests.reference import assert_close

SCALINGS = (0.5, 2.0)


def test_layers_that_share_hidden_match_separate_layers():
    x = normal((2, 5, 6))
    kernels = [normal((6, 4, 2), 1), normal((6, 2, 2), 2)]
    factors = [
        (normal((6, 3), 3), normal((3, 4, 2), 4)),
        (normal((6, 1), 5), normal((1, 2, 2), 6)),
    ]

    def layers(x, factors, hidden):
        return [
            lora_einsum("...d,dnh->...nh", x, w, a, b, scaling=s, hidden=h)
            for w, (a, b), s, h in zip(
                kernels, factors, (0.5, 2.0), hidden, strict=True
            )
        ]

    def shared(x, factors):
        return layers(x, factors, shared_hidden(x, [a for a, _ in factors]))

    def separate(x, factors):
        return layers(x, factors, (None, None))

    def both(f):
        y, pull = jax.vjp(f, x, factors)
        return y, pull(jax.tree.map(jnp.cos, y))

    jax.tree.map(assert_close, jax.jit(both, static_argnums=0)(shared), both(separate))


def test_x_is_read_once():
    x, a = normal((2, 5, 6)), normal((6, 3))
    hlo = jax.jit(lambda x: shared_hidden(x, [a] * 3)).lower(x).as_text()
    assert hlo.count("tensor<2x5x6xf32>, tensor<6x9xf32>") == 1


def test_one_dropout_mask_serves_all():
    x, a = normal((2, 5, 6)), normal((6, 3))
    key = jax.random.key(0)
    first, second = shared_hidden(x, [a, a], dropout_rate=0.5, dropout_key=key)
    assert np.array_equal(first, second)
    assert not np.allclose(first, x @ a)


def test_every_layer_with_a_wrong_shape_is_listed():
    x, a = normal((2, 6)), normal((6, 3))
    with pytest.raises(ValueError, match=r"in = 6; got \(5, 3\)") as error:
        shared_hidden(x, [a[:5], a, a[0]])
    assert "lora_a[2] must be" in str(error.value)
    assert "lora_a[1]" not in str(error.value)
    assert shared_hidden(x, []) == []
