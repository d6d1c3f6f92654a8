import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.tree.combine_trained import combine_trained

BASE = {"norm": {"scale": jnp.float32([1.0, 2.0])}, "head": {"bias": jnp.zeros(2)}}


def test_changes_of_the_base_add_up_and_new_heads_are_averaged():
    one = {"norm": {"scale": jnp.float32([2.0, 2.5])}, "head": {"bias": jnp.ones(2)}}
    two = {"head": {"bias": jnp.float32([4.0, 7.0])}}
    found = combine_trained([one, two], [0.5, 2.0], BASE, absent=["head/bias"])
    np.testing.assert_allclose(found["norm"]["scale"], [1.5, 2.25])
    np.testing.assert_allclose(found["head"]["bias"], [3.4, 5.8], rtol=1e-6)
    same = combine_trained([one], [1.0], BASE)
    np.testing.assert_array_equal(same["norm"]["scale"], one["norm"]["scale"])
    none = combine_trained([one, one], [1.0, -1.0], BASE)
    np.testing.assert_array_equal(none["norm"]["scale"], BASE["norm"]["scale"])


def test_all_that_can_not_be_added_up_is_told():
    one, wide = {"norm": {"scale": jnp.ones(3)}}, {"head": {"bias": jnp.ones(2)}}
    with pytest.raises(
        ValueError,
        match=r"norm/scale has shapes \[\[2\], \[3\]\]; the base has no head/bias, and",
    ):
        combine_trained([one, wide, wide], [1, 1, -1], BASE, absent=["head/bias"])
