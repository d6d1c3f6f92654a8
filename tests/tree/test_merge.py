"""Merging a tree: rounded once, rejected for NaN, undone bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import Contraction, LoRAConfig
from lora_jax.tree.merge import merge_errors, merge_params, unmerge_params
from lora_jax.tree.targets import Site, select_targets
from tests.reference import assert_close

TARGETS = select_targets(
    [Site("up", "dense", "kernel", (6, 5), Contraction())], LoRAConfig(rank=2, alpha=6)
)


def trees(dtype=jnp.float32, size=1.0):
    k = jax.random.split(jax.random.key(0), 4)
    params = {
        "up": {
            "kernel": jax.random.normal(k[0], (6, 5)).astype(dtype),
            "bias": jax.random.normal(k[1], (5,)).astype(dtype),
        }
    }
    a, b = jax.random.normal(k[2], (6, 2)), size * jax.random.normal(k[3], (2, 5))
    return params, {"up": {"lora_a": a, "lora_b": b}}


def test_merged_is_base_plus_update():
    params, lora = trees()
    merged = merge_params(params, lora, TARGETS)["up"]
    kernel, a, b = (
        np.asarray(x, np.float64)
        for x in (params["up"]["kernel"], *lora["up"].values())
    )
    assert_close(merged["kernel"], kernel + 3.0 * a @ b)
    assert merged["bias"] is params["up"]["bias"]


def test_unmerge_is_bit_exact_where_subtraction_is_not():
    params, lora = trees(jnp.bfloat16, size=0.3)
    kept = np.asarray(params["up"]["kernel"]).copy()
    merged = merge_params(params, lora, TARGETS)
    back = unmerge_params(merged, params, TARGETS)
    assert np.array_equal(np.asarray(back["up"]["kernel"]), kept)
    assert np.array_equal(np.asarray(params["up"]["kernel"]), kept)
    delta = 3.0 * lora["up"]["lora_a"] @ lora["up"]["lora_b"]
    subtracted = (merged["up"]["kernel"] - delta).astype(jnp.bfloat16)
    assert not np.array_equal(np.asarray(subtracted), kept)


def test_the_error_report_measures_bfloat16_rounding():
    rows = {}
    for dtype in (jnp.float32, jnp.bfloat16):
        params, lora = trees(dtype, size=0.01)
        merged = merge_params(params, lora, TARGETS)
        (rows[dtype],) = merge_errors(params, merged, lora, TARGETS)
    assert rows[jnp.float32].relative < 1e-5
    assert rows[jnp.bfloat16].relative > 1e-2
    assert rows[jnp.bfloat16].path == "up"


def test_an_invalid_adapter_is_rejected_and_the_base_unchanged():
    params, lora = trees()
    lora["up"]["lora_b"] = lora["up"]["lora_b"].at[0, 0].set(jnp.nan)
    del lora["up"]["lora_a"]
    lora["down"] = {"lora_a": jnp.ones(2)}
    with pytest.raises(ValueError, match="does not fit the model") as caught:
        merge_params(params, lora, TARGETS)
    for part in ("up/lora_a", "down/lora_a", "up/lora_b"):
        assert part in str(caught.value)


def test_merging_works_under_jit():
    params, lora = trees()
    eager = merge_params(params, lora, TARGETS)["up"]["kernel"]
    jitted = jax.jit(lambda p, ab: merge_params(p, ab, TARGETS))(params, lora)
    assert_close(jitted["up"]["kernel"], np.asarray(eager, np.float64))
