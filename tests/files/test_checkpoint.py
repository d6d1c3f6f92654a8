"""Checkpoints: bit-equal resume after a kill, damage, mismatch, full disks."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lora_jax.files.checkpoint import Checkpoints
from lora_jax.train.optimizer import lora_optimizer
from lora_jax.train.state import TrainState

RUN = Path(__file__).with_name("resumable_run.py")


def make_state(step=0, value=1.0, tx=None, rank=2, raw_key=False):
    variables = {
        "frozen": {"kernel": jnp.ones((30, 40))},
        "lora": {
            "q": {
                "lora_a": jnp.full((30, rank), float(value)),
                "lora_b": jnp.ones((rank, 40)),
            }
        },
        "params": {"bias": jnp.ones(40, jnp.bfloat16)},
    }
    tx = tx or lora_optimizer(0.1, total_steps=5, weight_decay=0.1, lora_b_ratio=4)
    key = jax.random.PRNGKey(3) if raw_key else jax.random.key(3)
    state = TrainState.create(variables, tx, key)
    return state.replace(step=jnp.int32(step), skipped=jnp.int32(2))


def open_in(directory, config=None, fingerprint="1-abc", **kwargs):
    return Checkpoints(
        directory, config=config or {"rank": 2}, fingerprint=fingerprint, **kwargs
    )


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)

    def as_numpy(x):
        return np.asarray(
            jax.random.key_data(x)
            if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
            else x
        )

    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert as_numpy(x).tobytes() == as_numpy(y).tobytes()


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"raw_key": True},
        {"tx": optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation()},
        {"tx": optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(9)), optax.sgd(1))},
    ],
    ids=["lora_optimizer", "raw_key", "multi_steps", "key_in_optimizer"],
)
def test_a_restored_state_is_the_saved_one_in_bits_and_types(tmp_path, kwargs):
    state = make_state(step=4, value=0.1, **kwargs)
    with open_in(tmp_path) as checkpoints:
        checkpoints.save(state)
    fresh = make_state(**kwargs)
    with open_in(tmp_path) as checkpoints:
        restored = checkpoints.restore(fresh)
    assert_same_bits(restored, state)
    assert restored.frozen is fresh.frozen


def test_no_base_array_is_in_a_checkpoint(tmp_path):
    base = jnp.asarray(np.random.default_rng(0).normal(size=(300, 400)), jnp.float32)
    state = make_state(step=1).replace(frozen={"frozen": {"kernel": base}})
    with open_in(tmp_path) as checkpoints:
        checkpoints.save(state)
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < base.nbytes / 10
    assert not [f for f in files if b"kernel" in f.read_bytes()]


def test_saving_copies_before_it_returns(tmp_path):
    state = make_state(step=1, value=0.5)
    expected = np.array(state.trainable["lora"]["q"]["lora_a"])
    overwrite = jax.jit(
        lambda t: jax.tree.map(lambda x: x * 0 - 7, t), donate_argnums=0
    )
    with open_in(tmp_path) as checkpoints:
        checkpoints.save(state)
        overwrite(state.trainable)
        checkpoints.wait()
        restored = checkpoints.restore(make_state())
    np.testing.assert_array_equal(restored.trainable["lora"]["q"]["lora_a"], expected)


@pytest.mark.parametrize(("mode", "best"), [("min", 2), ("max", 3)], ids=["min", "max"])
def test_the_last_two_and_the_best_are_kept(tmp_path, mode, best):
    losses = {1: 5.0, 2: 1.0, 3: 9.0, 4: None, 5: 4.0, 6: float("nan"), 7: None}
    options = {"keep": 2, "best_metric": "loss", "best_mode": mode}
    with open_in(tmp_path, **options) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(make_state(step), None if loss is None else {"loss": loss})
    with open_in(tmp_path, **options) as checkpoints:
        assert checkpoints.all_steps() == [best, 6, 7]
        assert checkpoints.best_step() == best
        restored = checkpoints.restore(make_state(), step=checkpoints.best_step())
        assert int(restored.step) == best
        checkpoints.save(make_state(8))
        checkpoints.wait()
        assert checkpoints.all_steps() == [best, 7, 8]


def test_saving_a_step_twice_keeps_the_first_and_going_back_is_an_error(tmp_path):
    with open_in(tmp_path) as checkpoints:
        checkpoints.save(make_state(3, value=1.0))
        checkpoints.save(make_state(3, value=2.0))
        with pytest.raises(ValueError, match="got step 2 after step 3"):
            checkpoints.save(make_state(2))
        restored = checkpoints.restore(make_state())
    assert float(restored.trainable["lora"]["q"]["lora_a"][0, 0]) == 1.0


def test_another_config_base_or_data_is_refused_and_both_sides_are_named(tmp_path):
    config = {"lora": {"rank": 2, "targets": ("query",)}, "seed": 0}
    with open_in(tmp_path, config, data={"seed": 1}) as checkpoints:
        checkpoints.save(make_state(1))
    with open_in(tmp_path, config, data={"seed": 1}) as checkpoints:
        checkpoints.restore(make_state())
    other = {"lora": {"rank": 4, "targets": ["query"]}, "seed": 0}
    with (
        open_in(tmp_path, other, "1-def", data={"seed": 2}) as checkpoints,
        pytest.raises(ValueError, match="is from a different run") as error,
    ):
        checkpoints.restore(make_state(rank=4))
    for fault in (
        "config/lora/rank is 4 here, 2 in the checkpoint",
        "fingerprint is '1-def' here, '1-abc' in the checkpoint",
        "data/seed is 2 here, 1 in the checkpoint",
        "trainable/lora/q/lora_a is [[30, 4], 'float32'] here, [[30, 2], 'float32'] in",
    ):
        assert fault in str(error.value)
    assert "targets" not in str(error.value)


def files_of(directory, part):
    return [f for f in (directory / part).rglob("*") if f.is_file()]


OTHER_METADATA = {
    "metadata a list": ("", [1]),
    "metadata of words": ("leaves", "words"),
    "metadata of numbers": ("leaves", {"lora/q/lora_a": 3}),
    "metadata of other metrics": ("metrics", {"loss": "low"}),
}


# Orbax reads leaves side by side; when one fails, it closes its event loop under the
# others, whose callbacks then have nowhere to go. Nothing of ours is lost by it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(
    "damage", ["empty", "flip", "gone", "metadata", *OTHER_METADATA]
)
def test_a_damaged_latest_falls_back_and_says_so(tmp_path, caplog, damage):
    with open_in(tmp_path) as checkpoints:
        for step in (1, 2):
            checkpoints.save(make_state(step, value=step))
    part = "2/meta/metadata" if damage == "metadata" else "2/state"
    targets = [tmp_path / part] if damage == "metadata" else files_of(tmp_path, part)
    if damage.startswith("metadata "):
        targets = []
        file = tmp_path / "2/meta/metadata"
        meta = json.loads(file.read_text())
        key, value = OTHER_METADATA[damage]
        file.write_text(json.dumps(meta | {key: value} if key else value))
    for file in targets:
        if file.name == "commit_success.txt":
            continue
        if damage == "gone":
            file.unlink()
            continue
        content = bytearray(file.read_bytes())
        if damage == "flip":
            content[len(content) // 2] ^= 0x55
        file.write_bytes(content if damage == "flip" else content[: len(content) // 2])
    with open_in(tmp_path) as checkpoints:
        restored = checkpoints.restore(make_state())
        assert int(restored.step) == 1
        assert "checkpoint of step 2" in caplog.text
        assert "using the one before it" in caplog.text
        checkpoints.save(make_state(2, value=7))  # the step can be saved again
        checkpoints.wait()
        assert checkpoints.all_steps() == [1, 2]
        again = checkpoints.restore(make_state())
    assert float(again.trainable["lora"]["q"]["lora_a"][0, 0]) == 7
    assert (tmp_path / "damaged-2").is_dir()


def test_a_value_changed_on_disk_is_noticed_by_its_checksum(tmp_path, monkeypatch):
    from lora_jax.files import checkpoint

    honest = checkpoint.leaf_summary
    with open_in(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoint, "leaf_summary", lambda x: [*honest(x)[:2], 1])
        checkpoints.save(make_state(1))
        monkeypatch.undo()
        with pytest.raises(ValueError, match=r"no checkpoint in .* is intact: step 1:"):
            checkpoints.restore(make_state())


def test_damaged_bookkeeping_of_a_step_is_named(tmp_path):
    with open_in(tmp_path) as checkpoints:
        checkpoints.save(make_state(3))
    file = tmp_path / "3" / "_CHECKPOINT_METADATA"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"init_timestamp_nsecs": {}})
    )
    with pytest.raises(
        ValueError, match=rf"checkpoints in {tmp_path} .* of the steps \['3'\]"
    ):
        open_in(tmp_path)


@pytest.mark.parametrize("value", [10**400, True, "1"])
def test_a_metric_that_is_no_number_makes_a_checkpoint_damaged(tmp_path, value):
    with open_in(tmp_path, best_metric="loss") as checkpoints:
        checkpoints.save(make_state(3), {"loss": 1.0})
    file = tmp_path / "3" / "meta" / "metadata"
    kept = json.loads(file.read_text()) | {"metrics": {"loss": value}}
    file.write_text(json.dumps(kept))
    with open_in(tmp_path, best_metric="loss") as checkpoints:
        assert checkpoints.best_step() is None
        with pytest.raises(ValueError, match="its metadata is not"):
            checkpoints.restore(make_state())


def test_no_checkpoint_is_an_error_of_its_own(tmp_path):
    with open_in(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
        assert checkpoints.best_step() is None
        with pytest.raises(FileNotFoundError, match=r"a checkpoint; .* steps \[\]"):
            checkpoints.restore(make_state())
        checkpoints.save(make_state(1))
        with pytest.raises(FileNotFoundError, match=r"of step 9; .* steps \[1\]"):
            checkpoints.restore(make_state(), step=9)


def test_a_path_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"can't be written to .*file/checkpoints"):
        open_in(tmp_path / "file" / "checkpoints")


FULL_DISK = """
import resource, sys
import jax, jax.numpy as jnp, optax
from lora_jax.files.checkpoint import Checkpoints
from lora_jax.train.state import TrainState

noise = jax.random.normal(jax.random.key(0), (1000, 300))
state = TrainState.create({"lora": {"b": noise}}, optax.adam(1), jax.random.key(0))
checkpoints = Checkpoints(sys.argv[1], config={}, fingerprint="1-abc")
checkpoints.save(state.replace(step=jnp.int32(1)))
checkpoints.wait()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # writes fail from here
checkpoints.save(state.replace(step=jnp.int32(2)))
checkpoints.wait()
"""


@pytest.mark.slow
def test_a_write_that_fails_is_a_clear_error_and_earlier_checkpoints_stay(tmp_path):
    done = start_python("-c", FULL_DISK, tmp_path)
    assert done.returncode == 1
    assert f"OSError: a checkpoint can't be written to {tmp_path}" in done.stderr
    assert "Free some disk space and resume" in done.stderr
    noise = jax.random.normal(jax.random.key(0), (1000, 300))
    variables = {"lora": {"b": jnp.zeros_like(noise)}}
    state = TrainState.create(variables, optax.adam(1), jax.random.key(0))
    with Checkpoints(tmp_path, config={}, fingerprint="1-abc") as checkpoints:
        assert checkpoints.all_steps() == [1]
        restored = checkpoints.restore(state)
    np.testing.assert_array_equal(restored.trainable["lora"]["b"], noise)


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    with open_in(tmp_path) as checkpoints:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(OSError, match=r"of step 1 \(\d+ bytes\) .*only 100 bytes"):
            checkpoints.save(make_state(1))
        monkeypatch.undo()
        assert checkpoints.all_steps() == []


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="keep = 0, best_mode = 'low'"):
        open_in(tmp_path, keep=0, best_mode="low")
    with (
        open_in(tmp_path, best_metric="accuracy") as checkpoints,
        pytest.raises(ValueError, match=r"'accuracy'.*got \['loss'\]"),
    ):
        checkpoints.save(make_state(1), {"loss": 1.0})


def start_python(*args):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=300
    )


@pytest.fixture(scope="module")
def train():
    """The run's main function, and what it gives if nobody kills it."""
    spec = importlib.util.spec_from_file_location("resumable_run", RUN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def uninterrupted(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("uninterrupted"), 13)[1]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["after-save", "mid-save"])
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, train, uninterrupted, how):
    killed = start_python(RUN, tmp_path, 13, 7, how)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed_at, digest = train(tmp_path, 13)
    assert resumed_at in (6, 8)  # the save under way at the kill may be lost
    assert digest == uninterrupted
