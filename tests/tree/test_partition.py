"""Trees to paths and back, one tree to three collections and back."""

import numpy as np
import pytest

from lora_jax import LoRAConfig, count, join, partition
from lora_jax.tree.paths import flatten, nearest, unflatten

TREE = {
    "up": {"kernel": np.ones((2, 3)), "lora_a": np.ones((2, 1)), "bias": np.ones(3)},
    "head": {"kernel": np.ones((3, 1))},
}


def test_flatten_and_unflatten_are_inverse():
    assert list(flatten(TREE)) == ["up/kernel", "up/lora_a", "up/bias", "head/kernel"]
    assert unflatten(flatten(TREE)) == TREE
    assert flatten({"a": {}}, "root") == {}


def test_partition_and_join_are_inverse_and_copy_nothing():
    parts = partition(TREE, LoRAConfig(train=["head"], bias="all"))
    assert list(flatten(parts["frozen"])) == ["up/kernel"]
    assert list(flatten(parts["params"])) == ["up/bias", "head/kernel"]
    assert list(flatten(parts["lora"])) == ["up/lora_a"]
    joined = flatten(join(*parts.values()))
    assert joined.keys() == flatten(TREE).keys()
    assert all(joined[path] is leaf for path, leaf in flatten(TREE).items())


def test_biases_beside_an_adapter_belong_to_adapted_layers():
    tree = {**TREE, "norm": {"scale": np.ones(3), "bias": np.ones(3)}}
    config = LoRAConfig(bias="lora_only")
    assert list(flatten(partition(tree, config)["params"])) == ["up/bias"]
    plain = {"up": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}}
    with pytest.raises(ValueError, match=r"must have 'lora_a' .* got 1 biases and no"):
        partition(plain, config)


def test_a_magnitude_is_an_adapters_only_beside_an_adapter():
    tree = {
        "up": {"kernel": 1, "lora_a": 2, "lora_b": 3, "magnitude": 4},
        "gauge": {"magnitude": 5},
    }
    parts = partition(tree, LoRAConfig(dora=True))
    assert flatten(parts["frozen"]) == {"up/kernel": 1, "gauge/magnitude": 5}
    assert list(flatten(parts["lora"])) == ["up/lora_a", "up/lora_b", "up/magnitude"]


def test_join_lists_leaves_that_two_trees_share():
    with pytest.raises(ValueError, match=r"same leaves: \['head/kernel'\]"):
        join(TREE, {"head": {"kernel": 1}})


def test_count_adds_up_elements():
    assert count(TREE) == 6 + 2 + 3 + 3


def test_nearest_counts_other_paths_with_the_same_ending():
    paths = ["block_0/q", "block_1/q", "block_0/mlp"]
    assert nearest("qq", paths) == "block_0/q (+1)"
    assert nearest("x", []) == ""
