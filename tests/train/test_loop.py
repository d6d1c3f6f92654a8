import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax.train.loop import evaluate, fit
from lora_jax.train.probe import fit_probe, probe_accuracy
from lora_jax.train.state import TrainState
from lora_jax.train.step import make_eval_step, make_train_step


def loss_fn(variables, batch, rngs):
    error = jnp.sum((batch - variables["lora"]["a"]) ** 2)
    return error, jnp.float32(len(batch)), {"error": jnp.sum(jnp.abs(batch))}


TX = optax.sgd(0.1)
STEP = make_train_step(loss_fn, TX)


def start():
    variables = {"lora": {"a": jnp.zeros(())}, "frozen": {"w": jnp.ones(3)}}
    return TrainState.create(variables, TX, jax.random.key(0))


def batch_at(step):
    return np.full(4, step + 1.0, np.float32)


def test_logs_cover_every_step_once():
    logs, steps = [], []
    fitted = fit(
        start(),
        STEP,
        batch_at,
        total_steps=7,
        log_every=3,
        on_log=logs.append,
        on_step=steps.append,
    )
    assert [log.step for log in logs] == [3, 6, 7]
    assert steps == [1, 2, 3, 4, 5, 6, 7]
    assert [log.examples for log in logs] == [12, 12, 4]
    assert [log.metrics["error"] for log in logs] == [2.0, 5.0, 7.0]
    assert int(fitted.state.step) == 7
    assert not fitted.is_stopped


def test_callbacks_run_at_their_periods_and_once_after_the_last():
    seen = []
    calls = [
        (3, lambda state: seen.append(("a", int(state.step)))),
        (2, lambda state: seen.append(("b", int(state.step)))),
    ]
    fit(start(), STEP, batch_at, total_steps=5, every=calls)
    assert seen == [("b", 2), ("a", 3), ("b", 4), ("a", 5), ("b", 5)]


def test_a_batch_is_made_while_the_device_works_on_the_one_before():
    made, seen = [], []

    def recorded(step):
        made.append(step)
        return batch_at(step)

    fit(
        start(),
        STEP,
        recorded,
        total_steps=4,
        every=[(1, lambda state: seen.append((int(state.step), max(made))))],
    )
    assert seen == [(1, 1), (2, 2), (3, 3), (4, 3)]
    assert made == [0, 1, 2, 3]


def test_a_batch_that_fails_loses_no_callback_of_the_step_before():
    seen = []

    def broken(step):
        if step == 2:
            raise OSError("row 7 is damaged")
        return batch_at(step)

    saves = [(1, lambda state: seen.append(int(state.step)))]
    with pytest.raises(OSError, match="row 7"):
        fit(start(), STEP, broken, total_steps=4, every=saves)
    assert seen == [1, 2]


def test_a_stop_ends_after_the_steps_in_flight_and_due_callbacks():
    seen, asked = [], iter([False, False, False, True])
    fitted = fit(
        start(),
        STEP,
        batch_at,
        total_steps=9,
        every=[(4, lambda state: seen.append(int(state.step)))],
        should_stop=lambda: next(asked),
    )
    assert fitted.is_stopped
    assert int(fitted.state.step) == 4
    assert seen == [4]


def test_resuming_is_bitwise_equal_to_never_stopping():
    whole = fit(start(), STEP, batch_at, total_steps=9).state
    part = fit(start(), STEP, batch_at, total_steps=4).state
    rest = fit(part, STEP, batch_at, total_steps=9).state
    assert np.array_equal(whole.trainable["lora"]["a"], rest.trainable["lora"]["a"])


def test_skipped_steps_are_counted_but_excluded_from_the_means():
    logs = []
    poisoned = lambda step: batch_at(step) * (np.nan if step == 1 else 1)  # noqa: E731
    fit(
        start(),
        STEP,
        poisoned,
        total_steps=3,
        log_every=3,
        on_log=logs.append,
    )
    assert logs[0].skipped == 1
    assert logs[0].metrics["error"] == 2.0  # of steps 1 and 3
    assert logs[0].examples == 12


def test_a_finished_run_does_nothing():
    done = fit(start(), STEP, batch_at, total_steps=2).state
    fitted = fit(done, STEP, batch_at, total_steps=2, on_log=pytest.fail)
    assert int(fitted.state.step) == 2


def test_a_period_below_one_is_rejected():
    with pytest.raises(ValueError, match=r"at least 1 step; got \[0, -2\]"):
        fit(start(), STEP, batch_at, total_steps=2, log_every=0, every=[(-2, print)])


def test_an_evaluation_is_a_mean_over_examples_not_over_batches():
    batches = [np.full(3, 1.0, np.float32), np.full(1, 5.0, np.float32)]
    means = evaluate(make_eval_step(loss_fn), start().variables, batches)
    assert means == {"loss": (3 + 25) / 4, "error": 2.0, "weight": 4.0}


def test_an_evaluation_without_weight_is_rejected():
    with pytest.raises(ValueError, match="got weight 0"):
        evaluate(make_eval_step(loss_fn), start().variables, [])


def test_the_probe_separates_linearly_separable_data():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((300, 5)) * [1, 10, 0.1, 1, 1] + 3
    y = (x @ [1, 0.1, 10, 0, 0] > 34).astype(int)
    probe = fit_probe(x[:200], y[:200], (x[200:], y[200:]), num_labels=2)
    assert probe.accuracy == probe_accuracy(probe, x[200:], y[200:])
    assert probe.accuracy >= 0.95


def test_the_probe_matches_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal((90, 4)), rng.integers(0, 3, 90)
    x = (x - x.mean(0)) / x.std(0)
    probe = fit_probe(x, y, (x, y), num_labels=3, penalties=[0.1])
    theirs = linear_model.LogisticRegression(C=1 / (0.1 * 90), tol=1e-10).fit(x, y)
    centred = probe.kernel - probe.kernel.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(centred.T, theirs.coef_, atol=2e-4)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.ones((3, 2)), r"n = 2 labels, at least 1; got \(3, 2\)"),
        (np.full((2, 2), np.nan), "must be finite"),
    ],
)
def test_invalid_features_are_rejected(x, message):
    with pytest.raises(ValueError, match=message):
        fit_probe(x, np.array([0, 1]), (x, np.array([0, 1])), num_labels=2)


@pytest.mark.parametrize("labels", [[0, 2], [-1, 1]])
def test_labels_of_a_probe_must_be_class_indices(labels):
    x, good, bad = np.ones((2, 1)), np.array([0, 1]), np.array(labels)
    for pair, name in (((bad, good), "labels"), ((good, bad), "validation")):
        wanted = rf"{name} must be .* \[0, 2\); got {min(labels)} to {max(labels)}"
        with pytest.raises(ValueError, match=wanted):
            fit_probe(x, pair[0], (x, pair[1]), num_labels=2)
