"""Grouped products, on a CPU in blocks, against JAX's own and NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from lora_jax.ops import grouped, grouped_lowerings
from tests.laws import normal
from tests.reference import assert_close

SIZES = {
    "even": (6, 6, 6),
    "empty": (0, 17, 0),
    "spare": (3, 1, 5),  # 9 rows are of no group
    "none": (0, 0, 0),
    "first": (18, 0, 0),
}
ROWS, INPUTS, OUTPUTS = 18, 7, 5
SPARE, WHOLE = jnp.array((5, 0, 9)), jnp.array((5, 4, 9))


def looped(x, matrices, sizes):
    y, ends = np.zeros((len(x), matrices.shape[2])), np.cumsum(sizes)
    for matrix, start, stop in zip(matrices, ends - sizes, ends, strict=True):
        y[start:stop] = x[start:stop] @ matrix
    return y


@pytest.fixture(scope="module")
def arrays():
    return normal((ROWS, INPUTS), seed=1), normal((3, INPUTS, OUTPUTS), seed=2)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_row_is_multiplied_by_the_matrix_of_its_group(arrays, sizes):
    x, matrices = arrays
    wanted = looped(np.asarray(x, np.float64), np.asarray(matrices, np.float64), sizes)
    sizes = jnp.array(sizes)
    assert_close(grouped.grouped_dot(x, matrices, sizes), wanted)
    turned = matrices.swapaxes(1, 2)
    assert_close(grouped.grouped_dot(x, turned, sizes, is_transposed=True), wanted)
    assert_close(jax.lax.ragged_dot(x, matrices, sizes), wanted)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_the_outer_product_sums_over_the_rows_of_a_group(arrays, sizes):
    x, y = arrays[0], normal((ROWS, OUTPUTS), seed=3)
    ends = np.cumsum(sizes)
    wanted = np.stack(
        [x[b - n : b].T @ y[b - n : b] for n, b in zip(sizes, ends, strict=True)]
    )
    assert_close(grouped.grouped_outer(x, y, jnp.array(sizes), jnp.float32), wanted)


@pytest.mark.parametrize("sizes", [SPARE, WHOLE], ids=["spare", "whole"])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_blocks_compute_what_other_devices_compute(arrays, is_transposed, sizes):
    """The functions of both platforms, run on this one."""
    x, matrices = arrays
    matrices = matrices.swapaxes(1, 2) if is_transposed else matrices
    options = {"is_transposed": is_transposed, "precision": None}
    options["is_whole"] = sizes is WHOLE
    wanted = grouped_lowerings.ragged_dot(x, matrices, sizes, **options)
    assert_close(grouped_lowerings.dot_in_blocks(x, matrices, sizes, **options), wanted)


@pytest.mark.parametrize("shards", [1, 3])
def test_rows_are_masked_only_if_the_groups_are_in_several_shards(arrays, shards):
    x, matrices = arrays
    rows = jnp.broadcast_to(x, (1, shards, *x.shape))
    args = rows, matrices, WHOLE.reshape(1, shards, -1)
    assert f"is_whole={shards == 1}" in str(jax.make_jaxpr(grouped.grouped_dot)(*args))
    for_tpu = (
        jax.jit(grouped.grouped_dot).trace(*args).lower(lowering_platforms=("tpu",))
    )
    assert ("stablehlo.select" in for_tpu.as_text()) == (shards > 1)


@pytest.mark.parametrize("batch_bytes", [1, 2**28], ids=["one by one", "at once"])
@pytest.mark.parametrize("sizes", [SPARE, WHOLE], ids=["spare", "whole"])
def test_a_gpu_takes_batches_of_blocks(arrays, sizes, batch_bytes, monkeypatch):
    monkeypatch.setattr(grouped_lowerings, "_BATCH_BYTES", batch_bytes)
    (x, matrices), y = arrays, normal((ROWS, OUTPUTS), seed=3)
    options = {"is_transposed": False, "is_whole": sizes is WHOLE, "precision": None}
    wanted = grouped_lowerings.ragged_dot(x, matrices, sizes, **options)
    got = grouped_lowerings.dot_in_batches(x, matrices, sizes, **options)
    assert_close(got, wanted)
    options = {"dtype": jnp.dtype("float32"), "precision": None}
    wanted = grouped_lowerings.ragged_outer(x, y, sizes, **options)
    assert_close(grouped_lowerings.outer_in_batches(x, y, sizes, **options), wanted)


def test_a_gpus_program_multiplies_no_row_by_every_matrix():
    args = jnp.zeros((512, 64)), jnp.zeros((64, 64, 32)), jnp.zeros(64, int)
    traced = jax.jit(grouped.grouped_dot).trace(*args)
    for platform in ("cuda", "cpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        # XLA:GPU multiplies every row in a `ragged_dot`; on a CPU JAX does.
        assert "ragged_dot" not in text
        assert "64x512x64xf32" not in text


@pytest.mark.parametrize("is_transposed", [False, True])
def test_matrices_are_those_of_one_layer_of_a_stack(arrays, is_transposed):
    x, matrices = arrays
    stack = jnp.stack([0 * matrices, matrices, matrices[::-1]])
    turned = stack.swapaxes(2, 3) if is_transposed else stack
    options = {"is_transposed": is_transposed}
    for layer, own in enumerate(stack):
        wanted = grouped.grouped_dot(x, own, SPARE)
        got = jax.jit(grouped.grouped_dot, static_argnames="is_transposed")(
            x, turned, SPARE, layer=layer, **options
        )
        assert_close(got, wanted)
        for compute in (grouped_lowerings.dot_in_batches, grouped_lowerings.ragged_dot):
            plain = {"is_whole": False, "precision": None, **options}
            assert_close(compute(x, turned, SPARE, layer, **plain), wanted)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_tpus_kernel_reads_the_stack(is_transposed):
    x = normal((150, 24), seed=1)
    stack = normal((3, 4, 24, 130), seed=2)
    sizes = jnp.array((30, 0, 101, 7))
    wanted = looped(np.float64(x), np.float64(stack[2]), np.asarray(sizes))
    stack = stack.swapaxes(2, 3) if is_transposed else stack
    options = {"is_transposed": is_transposed, "is_whole": False, "interpret": True}
    assert_close(grouped_lowerings.megablox(x, stack, sizes, 2, **options), wanted)


@pytest.mark.parametrize("shards", [(2, 2), (1, 1)], ids=["split", "whole"])
def test_on_a_mesh_a_tpus_kernel_reads_its_own_part_of_the_stack(shards):
    """XLA can't partition a kernel: rows that the mesh does not split have a slice."""
    mesh = AbstractMesh((2, 1, 1, 2), ("data", "fsdp", "tensor", "expert"))
    x, stack = jnp.zeros((*shards, 256, 128)), jnp.zeros((3, 4, 128, 256))
    sizes = jnp.zeros((*shards, 4 // shards[1]), int)
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(grouped.grouped_dot).trace(x, stack, sizes, layer=1)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert ("tpu_custom_call" in text) == (shards == (2, 2))
    assert ("ragged_dot" in text) == (shards == (1, 1))


def test_matrices_that_have_to_be_cast_are_a_slice_on_a_tpu():
    x, stack = jnp.zeros((256, 128)), jnp.zeros((3, 4, 128, 256))
    dot = jax.jit(functools.partial(grouped.grouped_dot, layer=1))
    for dtype in (x.dtype, jnp.bfloat16):
        traced = dot.trace(x.astype(dtype), stack, jnp.zeros(4, int))
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
        assert ("ragged_dot" in text) == (dtype == jnp.bfloat16)


def test_the_gradient_of_a_stack_is_that_of_its_layer(arrays):
    x, matrices = arrays
    stack = jnp.stack([matrices[::-1], matrices])

    def of_stack(x, stack):
        return jnp.sum(jnp.sin(grouped.grouped_dot(x, stack, SPARE, layer=1)))

    def alone(x, matrices):
        return jnp.sum(jnp.sin(grouped.grouped_dot(x, matrices, SPARE)))

    dx, d_stack = jax.jit(jax.grad(of_stack, (0, 1)))(x, stack)
    wanted = jax.jit(jax.grad(alone, (0, 1)))(x, matrices)
    assert_close(dx, wanted[0])
    assert_close(d_stack[1], wanted[1])
    assert not d_stack[0].any()


def test_blocks_sum_what_other_devices_sum(arrays):
    x, y = arrays[0], normal((ROWS, OUTPUTS), seed=3)
    options = {"dtype": jnp.dtype("float32"), "precision": None}
    wanted = grouped_lowerings.ragged_outer(x, y, SPARE, **options)
    assert_close(grouped_lowerings.outer_in_blocks(x, y, SPARE, **options), wanted)


@pytest.mark.parametrize("batched", [(0, 0, 0), (0, None, None), (None, 1, None)])
def test_any_of_the_arrays_may_be_batched(arrays, batched):
    stacks = [
        whole if axis is None else jnp.stack([whole, whole[::-1]], axis)
        for whole, axis in zip((*arrays, SPARE), batched, strict=True)
    ]
    got = jax.vmap(grouped.grouped_dot, batched)(*stacks)
    for i in range(2):
        own = [
            whole if axis is None else jnp.take(whole, i, axis)
            for whole, axis in zip(stacks, batched, strict=True)
        ]
        assert_close(got[i], grouped.grouped_dot(*own))


@pytest.mark.parametrize("rows", [1, 5, 700])
def test_blocks_are_of_any_number_of_rows(rows):
    x, matrices = normal((rows, 3), seed=1), normal((4, 3, 2), seed=2)
    sizes = np.array([rows // 2, 0, rows - rows // 2 - rows // 3, rows // 3])
    wanted = looped(np.asarray(x, np.float64), np.asarray(matrices, np.float64), sizes)
    assert_close(grouped.grouped_dot(x, matrices, jnp.array(sizes)), wanted)


def test_no_rows_give_none():
    x, matrices = jnp.zeros((0, 3)), jnp.ones((2, 3, 4))
    assert grouped.grouped_dot(x, matrices, jnp.zeros(2, int)).shape == (0, 4)
    outer = grouped.grouped_outer(x, jnp.zeros((0, 4)), jnp.zeros(2, int), jnp.float32)
    assert not outer.any()


def test_rows_of_no_group_may_be_anything(arrays):
    x, matrices = arrays
    sizes = jnp.array((4, 0, 3))
    bad = x.at[7:].set(jnp.nan)
    got = grouped.grouped_dot(bad, matrices, sizes)
    assert_close(got, grouped.grouped_dot(x.at[7:].set(0), matrices, sizes))
    y = normal((ROWS, OUTPUTS), seed=3)
    outer = grouped.grouped_outer(bad, y, sizes, jnp.float32)
    assert np.isfinite(outer).all()
