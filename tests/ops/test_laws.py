"""Every law on every pure function; and that the laws can fail."""

import jax
import jax.numpy as jnp
import pytest

from tests import laws
from tests.cases import OP_CASES
from tests.laws import trials

BY_NAME = {case.name: case for case in OP_CASES}
DENSE = BY_NAME["dense"]
EXPERTS = BY_NAME["experts"]


@pytest.mark.parametrize(("law", "case"), trials(OP_CASES))
def test_law(law, case, key):
    law(case, key)


def _unscaled(x, kernel, a, b, scaling):
    return DENSE.apply(x, kernel, a, b, 1.0)


def _merging(x, kernel, a, b, scaling):
    return DENSE.base(x, DENSE.merge(kernel, a, b, scaling))


def _init(**changed):
    def init(key):
        arrays = DENSE.init(key)
        return arrays._replace(
            **{name: make(key, getattr(arrays, name)) for name, make in changed.items()}
        )

    return DENSE._replace(init=init)


def _he_uniform(key, a):
    return jax.nn.initializers.he_uniform()(key, a.shape)


def _random_b(key, b):
    return jax.random.normal(key, b.shape)


def _fresh_mask(x, kernel, a, b, scaling, dropout_rate=0.0, dropout_key=None):
    """Keeps the mask, as plain autodiff does."""
    keep = jnp.arange(x.size).reshape(x.shape) % 2 == 0
    return x @ kernel + scaling * (jnp.where(keep, 2 * x, 0) @ a) @ b


def _shared_b(x, kernel, a, b, scaling):
    return EXPERTS.apply(x, kernel, a, jnp.broadcast_to(b[:1], b.shape), scaling)


def _full_rank(kernel, a, b, scaling):
    return DENSE.merge(kernel, a, b, scaling) + 0.1 * jnp.eye(*kernel.shape)


def _wide(x, kernel, a, b, scaling):
    return DENSE.apply(x, kernel, a, b, scaling).astype(jnp.float32)


@pytest.mark.parametrize(
    ("law", "case"),
    [
        (laws.check_silent_at_init, _init(lora_b=_random_b)),
        (laws.check_first_gradient, _init(lora_b=_random_b)),
        (laws.check_variance_of_a, _init(lora_a=_he_uniform)),
        (laws.check_contraction, DENSE._replace(apply=_unscaled)),
        (laws.check_contraction, EXPERTS._replace(apply=_shared_b)),
        (laws.check_rank, DENSE._replace(merge=_full_rank)),
        (laws.check_linear_in_scaling, DENSE._replace(apply=_unscaled)),
        (laws.check_count, DENSE._replace(trainable=80)),
        (laws.check_gradients, DENSE._replace(apply=_unscaled)),
        (laws.check_gradients, EXPERTS._replace(apply=_shared_b)),
        (laws.check_no_base_gradient, DENSE._replace(apply=_merging)),
        (laws.check_second_derivatives, DENSE._replace(apply=_unscaled)),
        (laws.check_bfloat16_base, DENSE._replace(apply=_wide)),
        (laws.check_dropout, DENSE._replace(apply=_fresh_mask)),
        (laws.check_dropout_keeps_no_mask, DENSE._replace(apply=_fresh_mask)),
    ],
)
def test_a_broken_member_breaks_its_law(law, case, key):
    with pytest.raises(AssertionError):
        law(case, key)
