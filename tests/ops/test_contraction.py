import math

import jax
import pytest

from lora_jax import LoRAConfig
from lora_jax.ops import DENSE, Contraction, init_adapter
from lora_jax.ops.contraction import check_bias, check_factors

D, FFN = 4096, 11008


@pytest.mark.parametrize(
    ("kernels", "rank", "trainable"),
    [
        pytest.param([(10, 8)], 3, 54, id="one-layer"),
        pytest.param([(1024, 1024)] * 2 * 24, 4, 393_216, id="gpt2-medium"),
        pytest.param([(1280, 1280)] * 2 * 36, 4, 737_280, id="gpt2-large"),
        pytest.param([(768, 768)] * 2 * 12, 8, 294_912, id="roberta-base"),
        pytest.param([(1024, 1024)] * 2 * 24, 8, 786_432, id="roberta-large"),
        pytest.param([(1536, 1536)] * 2 * 48, 16, 4_718_592, id="deberta-xxl"),
        pytest.param([(12288, 12288)] * 2 * 96, 1, 4_718_592, id="gpt3-r1"),
        pytest.param([(12288, 12288)] * 2 * 96, 4, 18_874_368, id="gpt3-r4"),
        pytest.param([(12288, 12288)] * 2 * 96, 8, 37_748_736, id="gpt3-r8"),
        pytest.param([(12288, 12288)] * 2 * 96, 64, 301_989_888, id="gpt3-r64"),
        pytest.param([(4096, 4096)] * 2 * 32, 8, 4_194_304, id="llama-7b-qv"),
        pytest.param(
            ([(D, D)] * 4 + [(D, FFN), (D, FFN), (FFN, D)]) * 32,
            *(64, 159_907_840),
            id="llama-7b-all",
        ),
        pytest.param(
            ([(D, D), (D, 1024)] * 2 + [(D, 14336), (D, 14336), (14336, D)]) * 32,
            *(16, 41_943_040),
            id="llama-3.1-8b-all",
        ),
        pytest.param(
            [(3072, 3072), (3072, 1024)] * 28, 32, 9_175_040, id="llama-3.2-3b-qv"
        ),
        pytest.param(
            [(2048, 2048), (2048, 256)] * 36, 16, 3_686_400, id="qwen2.5-3b-qv"
        ),
    ],
)
def test_trainable_counts_are_the_published_ones(kernels, rank, trainable):
    shapes = [s for k in kernels for s in DENSE.factor_shapes(k, rank)]
    assert sum(math.prod(shape) for shape in shapes) == trainable
    distinct = {k: kernels.count(k) for k in kernels}

    def adapters(key):
        return {k: init_adapter(key, k, rank) for k in distinct}

    abstract = jax.eval_shape(adapters, jax.random.key(0))  # takes no memory
    sizes = {k: a.size + b.size for k, (a, b) in abstract.items()}
    assert sum(n * sizes[k] for k, n in distinct.items()) == trainable


def test_rank_equal_to_heads_layers_or_experts_is_not_ambiguous():
    kernel = (3, 3, 3, 3)  # [layers, in, heads, head dim], rank 3
    scanned_heads = Contraction((0,), (1,), (2, 3))
    assert scanned_heads.factor_shapes(kernel, 3) == ((3, 3, 3), (3, 3, 3, 3))
    assert scanned_heads.matrix_size(kernel) == (3, 9)


def test_stacking_shifts_every_axis():
    heads_out = Contraction((), (0, 1), (2,))
    assert heads_out.stacked((0,)) == Contraction((0,), (1, 2), (3,))
    assert heads_out.stacked((1,)) == Contraction((1,), (0, 2), (3,))
    assert heads_out.stacked((0, 2)) == Contraction((0, 2), (1, 3), (4,))


def test_groups_are_the_last_batch():
    grouped = Contraction((), (0, 1), (2,), groups=2)
    assert grouped.factor_shapes((3, 2, 10), 4) == ((2, 3, 2, 4), (2, 4, 5))


@pytest.mark.parametrize(
    ("contraction", "shape", "message"),
    [
        (DENSE, (2, 3, 4), r"kernel must have 2 axes for .*; got shape \(2, 3, 4\)"),
        (Contraction((), (0,), (0,)), (2, 3), "kernel must have 2 axes"),
        (
            Contraction((), (0,), (1,), groups=2),
            (4, 5),
            r"groups must divide the 5 outputs of a kernel of shape \(4, 5\); got 2",
        ),
    ],
)
def test_a_kernel_with_other_axes_is_an_error(contraction, shape, message):
    with pytest.raises(ValueError, match=message):
        contraction.split(shape)


def test_transposed_factors_get_their_own_hint():
    with pytest.raises(
        ValueError,
        match=r"lora_a, lora_b must be \[in, rank\], \[rank, out\] = \[10, 10\], "
        r"\[10, 8\] for a kernel of shape \(10, 8\); got \(3, 10\), \(8, 3\)\. "
        r"PyTorch stores these transposed: pass `weight\.T`",
    ):
        check_factors((10, 8), (3, 10), (8, 3))
    with pytest.raises(
        ValueError,
        match=r"\[10, 3\], \[3, 8\].*got \(10, 3\), \(4, 8\)\. The last axis",
    ):
        check_factors((10, 8), (10, 3), (4, 8))
    with pytest.raises(ValueError, match=r"= \[2, 7, 3\], \[2, 3, 5\] for a kernel"):
        check_factors((2, 7, 5), (7, 3), (3, 5), Contraction((0,), (1,), (2,)))


@pytest.mark.parametrize("a_shape", [(), (0,), (10, 0)])
def test_a_rank_of_zero_is_an_error(a_shape):
    with pytest.raises(ValueError, match="lora_a, lora_b must be"):
        check_factors((10, 8), a_shape, (0, 8))


def test_a_bias_has_an_element_for_each_output(key):
    check_bias(None, (3, 4))
    check_bias(jax.random.normal(key, (4,)), (3, 4))
    with pytest.raises(ValueError, match=r"bias must be \[out\] = \[4\].*got \(1,\)"):
        check_bias(jax.random.normal(key, (1,)), (3, 4))


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling_uses_alpha_over_rank_with_patterns_apart(rslora):
    config = LoRAConfig(
        rank=4,
        alpha=6,
        rank_pattern={"up": 9},
        alpha_pattern={"down": 5},
        rslora=rslora,
    )
    root = (lambda r: r**0.5) if rslora else float
    assert config.scaling_for("mlp/up") == 6 / root(9)
    assert config.scaling_for("mlp/down") == 5 / root(4)
