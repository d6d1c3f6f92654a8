import flax.linen as nn
import jax.numpy as jnp
import pytest

from lora_jax.ops import lora_conv, merge_kernel
from lora_jax.ops.conv import conv_contraction
from tests.laws import normal
from tests.reference import assert_close

X, KERNEL, A, B = (
    normal(shape, seed)
    for seed, shape in enumerate([(2, 8, 7, 4), (3, 2, 4, 6), (3, 2, 4, 3), (3, 6)])
)


def check_like_flax(x, kernel, a, b, groups=1, **window):
    """Compares with `nn.Conv` on the merged kernel."""
    spatial = kernel.ndim - 2
    contraction = conv_contraction(spatial, groups)
    merged = merge_kernel(kernel, a, b, scaling=0.7, contraction=contraction)
    bias = normal(kernel.shape[-1:], 9)
    conv = nn.Conv(
        kernel.shape[-1], kernel.shape[:-2], feature_group_count=groups, **window
    )
    want = conv.apply({"params": {"kernel": merged, "bias": bias}}, x)
    got = lora_conv(x, kernel, a, b, scaling=0.7, bias=bias, groups=groups, **window)
    assert_close(got, want)


@pytest.mark.parametrize(
    "padding",
    [
        "SAME",
        "same",
        "VALID",
        "Same_Lower",
        "CIRCULAR",
        "REFLECT",
        1,
        (1, 2),
        ((0, 1), (2, 0)),
    ],
    ids=str,
)
def test_paddings_match_flax(padding):
    check_like_flax(X, KERNEL, A, B, padding=padding, kernel_dilation=(2, 1))


def test_causal_padding_matches_flax():
    x, kernel, a, b = normal((2, 9, 4)), KERNEL[:, 0], A[:, 0], B
    check_like_flax(x, kernel, a, b, padding="CAUSAL", kernel_dilation=2)


def test_input_dilation_matches_flax():
    check_like_flax(X, KERNEL, A, B, input_dilation=2, padding=1)


def test_one_stride_for_all_axes():
    check_like_flax(X, KERNEL, A, B, strides=2)


def test_a_depthwise_convolution():
    x, kernel, a, b = (
        normal(shape, seed)
        for seed, shape in enumerate([(2, 9, 4), (3, 1, 8), (4, 3, 1, 2), (4, 2, 2)])
    )
    check_like_flax(x, kernel, a, b, groups=4)


@pytest.mark.parametrize("leading", [(), (0,), (2, 3)])
def test_any_leading_dims(leading):
    check_like_flax(normal((*leading, 8, 7, 4)), KERNEL, A, B)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"x": normal((4,))},
            ValueError,
            r"with 1 to 3 spatial axes; got \(4,\), \(3, 2, 4, 6\)",
        ),
        (
            {"x": X[..., :3]},
            ValueError,
            r"got 3 inputs for a kernel of shape \(3, 2, 4",
        ),
        ({"groups": 0}, ValueError, "groups must be at least 1; got 0"),
        (
            {"groups": 2},
            ValueError,
            r"2 x i/groups and a multiple of 2 channels; got 4",
        ),
        ({"lora_a": A[0]}, ValueError, r"= \[3, 2, 4, 3\], \[3, 6\] for a kernel"),
        ({"bias": jnp.ones(1)}, ValueError, r"bias must be \[out\] = \[6\]"),
        ({"padding": "SMAE"}, ValueError, "or numbers; got 'SMAE'"),
        (
            {"padding": "CAUSAL"},
            ValueError,
            "CAUSAL padding needs 1 spatial axis; got 2",
        ),
        ({"strides": (1, 1, 1)}, ValueError, r"one value or 2, .* got \(1, 1, 1\)"),
        ({"x": X.astype(int)}, TypeError, "x must be floating-point; got x int32"),
        ({"dropout_rate": 0.1}, ValueError, "dropout_key must be a PRNG key"),
    ],
)
def test_bad_arguments(arguments, error, message):
    good = {"x": X, "kernel": KERNEL, "lora_a": A, "lora_b": B, "scaling": 0.7}
    with pytest.raises(error, match=message):
        lora_conv(**(good | arguments))
