"""Optimizers: state, clip and decay for trainables only; schedule; LoRA+."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax.train.optimizer import (
    adapter_labels,
    adapter_mask,
    adapters_only,
    decay_mask,
    learning_rate_schedule,
    lora_optimizer,
)


@pytest.fixture
def mixed():
    """One tree with base and adapter; the base is 1000 times larger."""
    return {
        "block": {
            "query": {
                "kernel": jnp.ones((40, 60)),
                "bias": jnp.ones(60),
                "lora_a": jnp.ones((40, 2)),
                "lora_b": jnp.ones((2, 60)),
            },
            "norm": {"scale": jnp.ones(60)},
        },
        "head": {"kernel": jnp.ones((60, 2)), "bias": jnp.zeros(2)},
    }


def sizes(state):
    return sum(x.size for x in jax.tree.leaves(state) if jnp.ndim(x))


def run(tx, params, grads, steps=1):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def test_mask_and_labels_cover_the_whole_tree(mixed):
    assert adapter_mask(mixed, train=["head"]) == {
        "block": {
            "query": {"kernel": False, "bias": False, "lora_a": True, "lora_b": True},
            "norm": {"scale": False},
        },
        "head": {"kernel": True, "bias": True},
    }
    assert adapter_labels(mixed)["block"]["query"] == {
        "kernel": "rest",
        "bias": "rest",
        "lora_a": "adapter",
        "lora_b": "adapter",
    }


def test_names_that_only_look_like_adapters_are_not():
    tree = {"lora_b": 1, "lora_bias": 1, "my_lora_a": 1, "lora_a_norm": {"scale": 1}}
    mask = jax.tree.leaves_with_path(adapter_mask(tree))
    assert [jax.tree_util.keystr(path) for path, m in mask if m] == ["['lora_b']"]


@pytest.mark.parametrize(
    ("wrap", "copies"),
    [
        (optax.adam(0.1), 2),
        (optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(), 3),
        (lora_optimizer(0.1, total_steps=9, weight_decay=0.1, lora_b_ratio=4), 2),
        (optax.adamw(optax.cosine_decay_schedule(0.1, 9), weight_decay=0.1), 2),
        (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, 0.9)), 1),
    ],
    ids=["adam", "multi_steps", "lora_optimizer", "adamw", "clip_sgd"],
)
def test_state_is_for_adapters_and_the_base_stays_bit_identical(mixed, wrap, copies):
    grads = jax.tree.map(lambda x: 3 * jnp.ones_like(x), mixed)
    params, state = run(adapters_only(wrap), mixed, grads, steps=4)
    assert sizes(state) == copies * (40 * 2 + 2 * 60)
    for path, mask in jax.tree.leaves_with_path(adapter_mask(mixed)):
        before, after = mixed, params
        for key in path:
            before, after = before[key.key], after[key.key]
        assert bool((before == after).all()) != mask, path


def test_clipping_sees_adapters_only(mixed):
    grads = jax.tree.map(lambda x: 1e6 * jnp.ones_like(x), mixed)
    grads["block"]["query"]["lora_a"] = jnp.full((40, 2), 0.01)
    grads["block"]["query"]["lora_b"] = jnp.full((2, 60), 0.01)
    clip = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    params, _ = run(adapters_only(clip), mixed, grads)
    np.testing.assert_allclose(params["block"]["query"]["lora_a"], 0.99, rtol=1e-6)


def test_the_bases_gradient_is_never_computed(mixed):
    x = jnp.ones((7, 40))

    def loss(p):
        q = p["block"]["query"]
        return jnp.sum((x @ q["kernel"] + x @ q["lora_a"] @ q["lora_b"]) ** 2)

    tx = adapters_only(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)))

    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    hlo = jax.jit(step).lower(mixed, tx.init(mixed)).compile().as_text()
    assert not [
        line for line in hlo.splitlines() if "= f32[40,60]" in line and "dot" in line
    ]


def test_extra_leaves_are_trained_and_a_wrong_pattern_is_an_error(mixed):
    grads = jax.tree.map(jnp.ones_like, mixed)
    tx = adapters_only(optax.adam(0.1), train=["head", "norm/scale"])
    params, state = run(tx, mixed, grads)
    assert (params["head"]["kernel"] != 1).all()
    assert (params["block"]["norm"]["scale"] != 1).all()
    assert sizes(state) == 2 * (200 + 122 + 60)
    with pytest.raises(ValueError, match=r"'haed' matched 0 of 7.*mean: head"):
        adapters_only(optax.adam(0.1), train=["head", "haed"]).init(mixed)
    assert adapter_mask(mixed, train="head/.*")["head"] == {
        "kernel": True,
        "bias": True,
    }
    with pytest.raises(ValueError, match=r"'tail.*' matched 0 of 7 leaves"):
        adapter_mask(mixed, train="tail.*")


def test_a_tree_without_adapters_is_an_error():
    with pytest.raises(ValueError, match=r"lora_a or lora_b; got 0 among 1 leaves"):
        adapters_only(optax.adam(0.1)).init({"kernel": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"lora_b_ratio needs.*got 0 among 1 leaves"):
        lora_optimizer(0.1, total_steps=1, lora_b_ratio=4).init({"kernel": jnp.ones(3)})


def test_decay_applies_to_b_and_kernels_but_not_a_or_vectors():
    params = {
        "lora": {
            "q": {
                "lora_a": jnp.ones((3, 2)),
                "lora_b": jnp.ones((2, 3)),
                "magnitude": jnp.ones((4, 3)),  # scanned: two dimensions
            }
        },
        "params": {
            "head": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)},
            "layers": {"bias": jnp.ones((4, 2)), "scale": jnp.ones((4, 2))},  # scanned
        },
    }
    assert decay_mask(params) == {
        "lora": {"q": {"lora_a": False, "lora_b": True, "magnitude": False}},
        "params": {
            "head": {"kernel": True, "bias": False},
            "layers": {"bias": False, "scale": False},
        },
    }
    tx = lora_optimizer(0.5, total_steps=1, schedule="constant", weight_decay=0.2)
    after, _ = run(tx, params, jax.tree.map(jnp.zeros_like, params))
    assert {float(x.min()) for x in jax.tree.leaves(after["lora"]["q"]["lora_a"])} == {
        1
    }
    np.testing.assert_allclose(after["lora"]["q"]["lora_b"], 0.9, rtol=1e-6)
    np.testing.assert_array_equal(after["lora"]["q"]["magnitude"], 1)
    np.testing.assert_allclose(after["params"]["head"]["kernel"], 0.9, rtol=1e-6)
    np.testing.assert_array_equal(after["params"]["head"]["bias"], 1)


def test_lora_plus_scales_only_the_rate_of_b():
    params = {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.ones((2, 3))}
    tx = lora_optimizer(0.01, total_steps=1, schedule="constant", lora_b_ratio=16)
    after, _ = run(tx, params, jax.tree.map(jnp.ones_like, params))
    np.testing.assert_allclose(1 - after["lora_a"], 0.01, rtol=1e-4)
    np.testing.assert_allclose(1 - after["lora_b"], 0.16, rtol=1e-4)


def test_lora_optimizer_matches_adamw_with_equal_decay():
    params = {"lora_b": jnp.linspace(-1, 1, 6).reshape(2, 3)}
    grads = {"lora_b": jnp.linspace(0.3, -0.1, 6).reshape(2, 3)}
    ours = lora_optimizer(
        0.1, total_steps=9, schedule="constant", clip_norm=None, weight_decay=0.3
    )
    a, _ = run(ours, params, grads, steps=3)
    b, _ = run(optax.adamw(0.1, weight_decay=0.3), params, grads, steps=3)
    np.testing.assert_allclose(a["lora_b"], b["lora_b"], rtol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25, 0]),
        ("cosine", [0.5, 1, 1, 0.853553, 0.5, 0.146447, 0]),
    ],
)
def test_schedules_rise_and_fall(schedule, expected):
    rate = learning_rate_schedule(1, total_steps=6, warmup_steps=2, schedule=schedule)
    np.testing.assert_allclose([rate(t) for t in range(7)], expected, atol=1e-6)


def test_all_invalid_arguments_are_listed():
    with pytest.raises(ValueError, match="learning_rate must be above 0; got -1") as e:
        lora_optimizer(-1, total_steps=0, warmup_steps=5, schedule="step")
    for part in (
        "total_steps must be at least 1; got 0",
        r"warmup_steps must be in [0, total_steps] = [0, 0]; got 5",
        "schedule must be one of ('linear', 'cosine', 'constant'); got 'step'",
    ):
        assert part in str(e.value)
    with pytest.raises(ValueError, match="clip_norm must be above 0; got 0") as e:
        lora_optimizer(
            1, total_steps=1, clip_norm=0, weight_decay=-1, b1=1, eps=0, lora_b_ratio=0
        )
    for part in ("weight_decay", "b1 must be in [0, 1); got 1", "eps", "lora_b_ratio"):
        assert part in str(e.value)
