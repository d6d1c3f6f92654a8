"""The fingerprint distinguishes bases by nothing but their contents."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lora_jax.tree.fingerprint import fingerprint


def make_base():
    rng = np.random.default_rng(0)
    return {
        "b": {"kernel": rng.normal(size=(64, 64)).astype(np.float32)},
        "a": {"bias": np.zeros(3, np.float32)},
    }


def test_it_is_fixed_across_versions_of_this_library():
    tree = {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}
    assert fingerprint(tree) == "1-6654512fb9ad35cd9a9289e9f73c5b7e"


def test_container_order_and_device_do_not_matter():
    base = make_base()
    other = dict(reversed(jax.tree.map(jnp.asarray, base).items()))
    assert fingerprint(base) == fingerprint(other)
    half = {"k": jnp.ones((3, 5), jnp.bfloat16)}
    assert fingerprint(half) == fingerprint({"k": np.ones((3, 5), ml_dtypes.bfloat16)})


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["b"]["kernel"].__iadd__(1e-3),
        lambda t: t["b"]["kernel"].__setitem__((slice(None), 5), 0),
        lambda t: t["b"].update(kernel=t["b"]["kernel"].T),
        lambda t: t["b"].update(kernel=t["b"]["kernel"].reshape(32, 128)),
        lambda t: t["b"].update(kernel=t["b"]["kernel"].astype(ml_dtypes.bfloat16)),
        lambda t: t["b"].update(name=t["b"].pop("kernel")),
        lambda t: t["a"].update(bias=np.ones(3, np.float32)),
        lambda t: t["a"].update(scale=np.ones(3, np.float32)),
    ],
    ids=["values", "column", "transposed", "shape", "dtype", "path", "small", "more"],
)
def test_every_kind_of_change_changes_it(change):
    changed = make_base()
    change(changed)
    assert fingerprint(changed) != fingerprint(make_base())


def test_an_empty_tree_is_an_error():
    with pytest.raises(ValueError, match="at least 1 leaf; got 0"):
        fingerprint({})
