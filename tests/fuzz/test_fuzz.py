"""A short run of the fuzzer; README.md has the figures of a long one."""

import time

import pytest

from lora_jax.plan.slices import uncached
from tests.fuzz import runner
from tests.fuzz.runner import make_input, run
from tests.fuzz.targets import TARGETS, Target

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")


@pytest.fixture(autouse=True)
def _uncached():
    """JAX's cache of programs, which other tests switch on, writes files too."""
    with uncached():
        yield


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_hostile_inputs_are_read_or_refused_with_words(target):
    report = run(7, seconds=20, targets=[target], most=6 if target.weight == 1 else 60)
    assert report.findings == []
    assert report.counts.total() > 1


def test_an_input_is_made_again_from_its_number(tmp_path):
    written = []
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        make_input(TARGETS[0], 7, 3, folder)
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert written[0] == written[1]


def test_the_runner_finds_what_it_looks_for(monkeypatch, tmp_path):
    def loop(_):
        while True:
            time.sleep(0.01)

    def leak(_):
        raise MemoryError

    def escape(_):
        (tmp_path / "outside").write_text("")

    def crash(_):
        raise KeyError("k")

    def mumble(_):
        raise ValueError("no")

    monkeypatch.setattr(runner, "SECONDS", 1)
    wanted = {
        loop: "slow",
        leak: "memory",
        escape: "writes outside",
        crash: "KeyError at crash",
        mumble: "unnamed at mumble",
    }
    for read, what in wanted.items():
        target = Target("t", lambda _, folder: (folder / "f").touch(), read, 1)
        [finding] = run(0, seconds=60, targets=[target], most=2).findings
        assert finding.what.endswith(what)
        assert (finding.target, finding.number) == ("t", 0)
