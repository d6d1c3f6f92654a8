"""The training step: W0 untouched, accumulation, skipping, donation, compilations."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax.train.optimizer import lora_optimizer
from lora_jax.train.state import TrainState
from lora_jax.train.step import make_eval_step, make_train_step

IN, OUT, R, B = 48, 80, 3, 12  # with distinct products


def make_variables(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(1), 3)
    return {
        "frozen": {"up": {"kernel": jax.random.normal(keys[0], (IN, OUT), dtype)}},
        "lora": {
            "up": {
                "lora_a": jax.random.normal(keys[1], (IN, R)) / 7,
                "lora_b": jax.random.normal(keys[2], (R, OUT)) / 9,
            }
        },
        "params": {"head": {"kernel": jnp.ones((OUT, 2)) / 5, "bias": jnp.zeros(2)}},
    }


def make_batch(seed=0, rows=B):
    rng = np.random.default_rng(seed)
    return {
        "x": rng.normal(size=(rows, IN)).astype(np.float32),
        "y": rng.normal(size=(rows, 2)).astype(np.float32),
        "w": (rng.uniform(size=rows) * (np.arange(rows) % 5 != 0)).astype(np.float32),
    }


def loss_fn(variables, batch, rngs):
    up, head = variables["lora"]["up"], variables["params"]["head"]
    x = batch["x"]
    if rngs:
        keep = jax.random.bernoulli(rngs["dropout"], 1.0, x.shape)
        x = x * keep
    kernel = variables["frozen"]["up"]["kernel"]
    h = jnp.tanh(x @ kernel.astype(x.dtype) + 2 * (x @ up["lora_a"]) @ up["lora_b"])
    error = jnp.sum((h @ head["kernel"] + head["bias"] - batch["y"]) ** 2, -1)
    w = batch["w"]
    return jnp.sum(w * error), jnp.sum(w), {"hits": jnp.sum(w * (error < 1))}


def make_tx(**kwargs):
    return lora_optimizer(
        1e-2, total_steps=100, clip_norm=0.5, weight_decay=0.1, **kwargs
    )


def start(tx=None, variables=None):
    tx = tx or make_tx()
    variables = variables or make_variables()
    return TrainState.create(variables, tx, jax.random.key(0))


def host(tree):
    """Copies to the host: the buffers may be donated later."""
    return jax.tree.map(lambda x: np.array(x), tree)


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_base_is_bit_identical_usable_and_the_same_buffer(dtype, accumulate):
    variables = make_variables(dtype)
    before = host(variables)
    state, step = (
        start(variables=variables),
        make_train_step(loss_fn, make_tx(), accumulate),
    )
    for seed in range(5):
        state, _ = step(state, make_batch(seed))
    kernel = state.frozen["frozen"]["up"]["kernel"]
    assert kernel is variables["frozen"]["up"]["kernel"]
    np.testing.assert_array_equal(kernel, before["frozen"]["up"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, host(variables), before)  # all usable
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()),
        host(state.trainable),
        {k: before[k] for k in ("lora", "params")},
    )
    assert all(jax.tree.leaves(moved))
    assert int(state.step) == 5
    assert {x.dtype for x in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}


@pytest.mark.optimized
@pytest.mark.parametrize("accumulate", [1, 3])
def test_compiled_step_has_no_gradient_copy_or_constant_of_the_base(accumulate):
    state, step = start(), make_train_step(loss_fn, make_tx(), accumulate)
    lowered = step.lower(state, make_batch())
    w0 = f"{IN}x{OUT}xf32"
    made = [
        x for x in lowered.as_text().splitlines() if re.search(rf"-> tensor<{w0}>", x)
    ]
    assert not [x for x in made if "dot" in x or "transpose" in x], made
    constants = [x for x in lowered.as_text().splitlines() if "stablehlo.constant" in x]
    assert not [x for x in constants if w0 in x]
    compiled = lowered.compile()
    hlo = compiled.as_text().splitlines()
    assert not [
        x for x in hlo if re.search(rf"= f32\[{IN},{OUT}\]\S* (dot|copy|fus)", x)
    ]
    # Every output but the metrics aliases a donated input.
    memory = compiled.memory_analysis()
    own = sum(x.nbytes for x in jax.tree.leaves(state.changing) if jnp.ndim(x))
    assert memory.alias_size_in_bytes >= own
    assert memory.output_size_in_bytes < own + 512


def test_flops_stay_within_the_factored_bound():
    state, step = start(), make_train_step(loss_fn, make_tx())
    flops = step.lower(state, make_batch()).compile().cost_analysis()["flops"]
    # Forward x W0; A and B forward and backward; head; the rest is elementwise.
    base, adapter, head = 2 * B * IN * OUT, 2 * B * R * (IN + OUT), 2 * B * OUT * 2
    trained = IN * R + R * OUT + OUT * 2 + 2
    assert flops <= base + 3 * adapter + 3 * head + 30 * trained + 40 * B * OUT


@pytest.mark.optimized
@pytest.mark.parametrize("accumulate", [2, 3, 4, 12])
def test_gradient_accumulation_equals_the_big_batch(accumulate):
    one, many = start(), start()
    step = make_train_step(loss_fn, make_tx())
    steps = make_train_step(loss_fn, make_tx(), accumulate)
    for seed in range(3):
        one, a = step(one, make_batch(seed))
        many, b = steps(many, make_batch(seed))
        assert_close(a, b, rtol=1e-4)
    assert_close(host(one.trainable), host(many.trainable), rtol=1e-4, atol=1e-6)


def test_metrics_are_weighted_means_on_the_device():
    state, step = start(), make_train_step(loss_fn, make_tx(), accumulate=3)
    loss, weight, sums = loss_fn(state.variables, make_batch(), {})
    with jax.transfer_guard_device_to_host("disallow"):
        _, metrics = step(state, make_batch())
    assert all(isinstance(x, jax.Array) and x.shape == () for x in metrics.values())
    assert sorted(metrics) == ["grad_norm", "hits", "is_skipped", "loss", "weight"]
    np.testing.assert_allclose(metrics["loss"], loss / weight, rtol=1e-5)
    np.testing.assert_allclose(metrics["weight"], weight, rtol=1e-6)
    np.testing.assert_allclose(metrics["hits"], sums["hits"] / weight, rtol=1e-6)


@pytest.mark.parametrize("where", ["loss", "gradient", "weight"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_nonfinite_step_changes_nothing_and_is_counted(where, accumulate):
    def poisoned(variables, batch, rngs):
        loss, weight, metrics = loss_fn(variables, batch, rngs)
        bad = jnp.any(batch["bad"])
        if where == "loss":
            loss = jnp.where(bad, jnp.nan, loss)
        if where == "gradient":  # sqrt(0) is finite, its derivative is not
            b = variables["lora"]["up"]["lora_b"]
            loss += jnp.sqrt(jnp.where(bad, 0.0, 1.0) * jnp.sum(b**2))
        if where == "weight":
            loss, weight = jnp.where(bad, 0, loss), jnp.where(bad, 0, weight)
        return loss, weight, metrics

    step = make_train_step(poisoned, make_tx(), accumulate)

    def batch(seed, bad):
        return make_batch(seed) | {"bad": np.full(B, bad)}

    state, metrics = step(start(), batch(0, False))
    assert metrics["is_skipped"] == 0
    before = host((state.trainable, state.opt_state))
    state, metrics = step(state, batch(1, True))
    jax.tree.map(
        np.testing.assert_array_equal, host((state.trainable, state.opt_state)), before
    )
    assert (int(metrics["is_skipped"]), int(state.skipped), int(state.step)) == (
        1,
        1,
        2,
    )
    state, metrics = step(state, batch(2, False))
    assert (int(metrics["is_skipped"]), int(state.skipped), int(state.step)) == (
        0,
        1,
        3,
    )
    assert jnp.isfinite(metrics["loss"])


def test_a_second_call_of_the_same_shapes_compiles_nothing():
    traces = []

    def counted(variables, batch, rngs):
        traces.append(batch["x"].shape)
        return loss_fn(variables, batch, rngs)

    tx = make_tx(lora_b_ratio=4)
    step = make_train_step(counted, tx, accumulate=2)
    variables = make_variables()
    variables["lora"]["up"]["lora_b"] = np.zeros((R, OUT), np.float32)
    variables["params"]["scale"] = 1.0  # weakly typed
    state = TrainState.create(variables, tx, jax.random.key(0))
    for seed in range(4):
        state, _ = step(state, make_batch(seed))
    assert step.update._cache_size() == 1
    seen = len(traces)
    state, _ = step(state, make_batch(0, rows=6))
    assert step.update._cache_size() == 2
    assert len(traces) > seen
    step(start(tx, variables), make_batch(9))
    assert step.update._cache_size() == 2


def test_dropout_keys_differ_by_step_and_microbatch():
    def noise(variables, batch, rngs):
        bit = jax.random.uniform(rngs["dropout"])
        loss = jnp.sum(variables["lora"]["b"] * 0)
        return loss, jnp.float32(1), {"noise": bit, "square": bit**2}

    variables = {"lora": {"b": jnp.ones(2)}}
    tx = optax.sgd(0.1)
    draws = []
    step = make_train_step(noise, tx, accumulate=2)
    state = TrainState.create(variables, tx, jax.random.key(0))
    for _ in range(3):
        state, metrics = step(state, np.zeros(2))
        mean, square = float(metrics["noise"]), float(metrics["square"])
        assert square - mean**2 > 1e-6  # two microbatches, two draws
        draws.append(mean)
    assert len(set(draws)) == 3


@pytest.mark.optimized
def test_the_same_seed_gives_the_same_bits():
    finals = []
    for _ in range(2):
        state, step = start(), make_train_step(loss_fn, make_tx(), accumulate=2)
        for seed in range(3):
            state, _ = step(state, make_batch(seed))
        finals.append(host(state.trainable))
    jax.tree.map(np.testing.assert_array_equal, *finals)


def test_bfloat16_trainables_and_multi_steps_keep_their_dtypes():
    tx = optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation()
    variables = make_variables()
    variables["params"] = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16), variables["params"]
    )
    state, step = start(tx, variables), make_train_step(loss_fn, tx)
    before = [(x.shape, x.dtype) for x in jax.tree.leaves(state)]
    for seed in range(3):
        state, _ = step(state, make_batch(seed))
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(state)] == before
    assert step.update._cache_size() == 1


def test_no_warning_about_donated_buffers():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state, step = start(), make_train_step(loss_fn, make_tx(), 2)
        state, _ = step(state, make_batch())
        state, _ = step(state, make_batch())


def test_raw_keys_work():
    tx = make_tx()
    state = TrainState.create(make_variables(), tx, jax.random.PRNGKey(0))
    state, metrics = make_train_step(loss_fn, tx)(state, make_batch())
    assert jnp.isfinite(metrics["loss"])


def test_eval_returns_sums_and_gives_no_keys():
    def checked(variables, batch, rngs):
        assert rngs == {}
        return loss_fn(variables, batch, rngs)

    variables = make_variables()
    whole = make_eval_step(checked)(variables, make_batch())
    halves = [
        make_eval_step(checked)(variables, {k: x[i] for k, x in make_batch().items()})
        for i in (slice(0, 6), slice(6, 12))
    ]
    assert sorted(whole) == ["hits", "loss", "weight"]
    assert_close(whole, jax.tree.map(jnp.add, *halves), rtol=1e-5)


def returning(result):
    return lambda variables, batch, rngs: result


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (returning(jnp.float32(1)), TypeError, "tuple of 3, .*; got"),
        (returning((jnp.float32(1), 1.0)), TypeError, "got tuple of 2"),
        (returning((jnp.float32(1), 1.0, [1])), TypeError, "mapping .*; got list"),
        (
            returning((jnp.ones(3), jnp.ones(4), {"acc": jnp.ones(5)})),
            ValueError,
            r"loss_sum has shape \(3,\).*weight has shape \(4,\).*acc has shape \(5,\)",
        ),
        (returning((1, 1.0, {})), ValueError, "loss_sum has dtype int32"),
        (
            returning((jnp.float32(1), 1.0, {"loss": 1.0, "grad_norm": 1.0})),
            ValueError,
            "loss is reserved; grad_norm is reserved",
        ),
    ],
)
def test_an_invalid_loss_function_is_rejected(loss, error, message):
    with pytest.raises(error, match=message):
        make_train_step(loss, make_tx())(start(), make_batch())


def test_indivisible_batches_are_listed():
    step = make_train_step(loss_fn, make_tx(), accumulate=5)
    with pytest.raises(
        ValueError, match=r"accumulate = 5 .*; got 12 rows. Take .* 10 or 15"
    ):
        step(start(), make_batch())
    ragged = make_batch() | {"w": np.ones(5, np.float32)}
    with pytest.raises(ValueError, match=r"share their first.*'w': \(5,\)"):
        step(start(), ragged)
    with pytest.raises(ValueError, match="accumulate must be at least 1; got 0"):
        make_train_step(loss_fn, make_tx(), 0)
    with pytest.raises(TypeError, match=r"accumulate must be an integer; got 2.0"):
        make_train_step(loss_fn, make_tx(), 2.0)
