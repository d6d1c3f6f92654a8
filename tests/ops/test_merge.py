import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.ops import column_norm, delta_kernel, merge_dora, merge_kernel
from tests import reference
from tests.laws import normal
from tests.reference import assert_close

KERNEL, A, B = (
    normal(shape, seed) for seed, shape in enumerate([(40, 32), (40, 3), (3, 32)])
)


def test_a_bfloat16_kernel_is_rounded_once():
    kernel = KERNEL.astype("bfloat16")
    merged = merge_kernel(kernel, A, B, scaling=0.01)
    exact = reference.merge(kernel, A, B, 0.01).astype(np.float32)
    assert merged.dtype == jnp.bfloat16
    same = np.asarray(merged) == exact.astype(jnp.bfloat16)
    assert same.mean() > 0.99  # the rest are ties in float32's last bit
    twice = kernel + (0.01 * A @ B).astype("bfloat16")
    assert (np.asarray(merged) != np.asarray(twice)).mean() > 0.01


def test_the_base_is_unchanged():
    before = np.asarray(KERNEL).copy()
    merge_kernel(KERNEL, A, B, scaling=0.7)
    assert np.asarray(KERNEL).tobytes() == before.tobytes()


def test_a_fresh_adapter_merges_to_the_same_bits():
    for dtype in ("float32", "bfloat16"):
        kernel = KERNEL.astype(dtype)
        merged = merge_kernel(kernel, A, 0 * B, scaling=0.7)
        assert np.asarray(merged).tobytes() == np.asarray(kernel).tobytes()


def test_a_float64_kernel_is_not_rounded_to_float32():
    with jax.enable_x64(True):
        kernel = jnp.asarray(np.random.default_rng(0).normal(size=(40, 32)))
        fresh = merge_kernel(kernel, A, 0 * B, scaling=0.7)
        magnitude = column_norm(kernel)
        scaled = merge_dora(kernel, A, 0 * B, magnitude, scaling=0.7)
        merged = merge_kernel(kernel, A, B, scaling=0.7)
        assert fresh.dtype == merged.dtype == jnp.float64
    np.testing.assert_array_equal(fresh, kernel)
    np.testing.assert_array_equal(scaled, kernel)
    assert_close(merged, reference.merge(kernel, A, B, 0.7))


def test_bfloat16_factors_give_a_float32_change():
    a, b = A.astype("bfloat16"), B.astype("bfloat16")
    delta = delta_kernel(a, b, (40, 32), scaling=0.7)
    assert delta.dtype == jnp.float32
    assert_close(delta, reference.merge(np.zeros((40, 32)), a, b, 0.7))


def test_merging_under_vmap_stacks_the_kernels():
    stacked = [jnp.stack([array, 2 * array]) for array in (KERNEL, A, B)]
    merge = jax.vmap(lambda w, a, b: merge_kernel(w, a, b, scaling=0.7))
    merged = merge(*stacked)
    assert_close(merged[1], reference.merge(2 * KERNEL, 2 * A, 2 * B, 0.7))


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments():
    with pytest.raises(ValueError, match=r"got \(3, 40\), \(32, 3\)\. PyTorch stores"):
        merge_kernel(KERNEL, A.T, B.T, scaling=0.7)
    with pytest.raises(
        TypeError, match="kernel must be floating-point; got kernel int32"
    ):
        merge_kernel(KERNEL.astype(int), A, B, scaling=0.7)
    with pytest.raises(
        TypeError, match="lora_a must be floating-point; got lora_a int32"
    ):
        merge_kernel(KERNEL, A.astype(int), B, scaling=0.7)
    with pytest.raises(TypeError, match="lora_b must be arrays; got lora_b list"):
        merge_kernel(KERNEL, A, [[1.0]], scaling=0.7)


def test_the_source_of_a_nan_is_named():
    with pytest.raises(ValueError, match=r"must be finite; .* from kernel, lora_b\."):
        merge_kernel(KERNEL.at[0, 0].set(jnp.nan), A, B / 0, scaling=0.7)
    with pytest.raises(ValueError, match=r"from a sum too large for float16\."):
        merge_kernel(KERNEL.astype("float16"), A, B, scaling=1e6)
    merge = jax.jit(merge_kernel)
    assert jnp.isnan(merge(KERNEL, A, B, scaling=jnp.nan)).all()
