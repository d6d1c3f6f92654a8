"""The benchmarks' own tools: a regression shows, and what is too large isn't run."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import compare, harness, headline, lengths, plots


def record(path, **medians):
    row = {"shape": "small", "rank": 8}
    row |= {k: {"median_ms": ms, "temp_bytes": 100} for k, ms in medians.items()}
    facts = {"comparison": "steps", "commit": "c", "device": "cpu", "date": "today"}
    path.write_text(json.dumps({**facts, "rows": [row]}))
    return path


def test_two_results_files_side_by_side(tmp_path, capsys):
    old = record(tmp_path / "old.json", ours=10.0, gone=1.0)
    slower = record(tmp_path / "slower.json", ours=12.0)
    assert not compare.main(old, slower)
    shown = capsys.readouterr().out
    assert "| small, 8 | ours | median_ms | 10 | 12 | 1.20 **worse** |" in shown
    assert "| small, 8 | ours | temp_bytes | 100 | 100 | 1.00 |" in shown
    assert "only in the old file: small, 8: gone" in shown
    assert compare.main(slower, old)


def test_files_of_different_comparisons_are_refused(tmp_path):
    old, new = (record(tmp_path / name, ours=1.0) for name in ("a.json", "b.json"))
    new.write_text(new.read_text().replace("steps", "loading"))
    with pytest.raises(ValueError, match=r"is from 'steps', .* from 'loading'"):
        compare.main(old, new)


@pytest.mark.parametrize("name", ["contenders", "lengths", "overhead"])
def test_a_results_file_has_its_picture(name, tmp_path):
    rows = json.loads((harness.RESULTS / f"{name}-cpu.json").read_text())["rows"]
    plots.draw(name, rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert not plots.plt.get_fignums()


def test_the_compiled_contenders_have_their_picture(tmp_path):
    rows = json.loads((harness.RESULTS / "compiled.json").read_text())["rows"]
    plots.draw("compiled", rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_what_takes_more_than_its_limit_is_compiled_and_not_run():
    step = jax.jit(lambda x: jnp.sort(x @ x.T, axis=0) @ x)
    x = jnp.ones((64, 64))
    calls = []

    def run():
        calls.append(1)
        return step(x)

    small, large = (
        harness.measured(step.lower(x), run, limit=limit) for limit in (None, 1)
    )
    assert large.run is None
    assert large.temp_bytes == small.temp_bytes > 1
    timed = harness.alternate({"small": small, "large": large}, rounds=3)
    assert len(calls) == 2 + 3
    assert len(timed["small"]["ms"]) == 3
    assert timed["large"]["median_ms"] is None


def test_a_quick_run_leaves_the_full_results_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    full, quick = (harness.save("steps", [], quick=quick) for quick in (False, True))
    assert [full.name, quick.name] == ["steps-cpu.json", "steps-cpu-quick.json"]
    assert json.loads(full.read_text())["command"] == "python -m benchmarks steps"
    assert json.loads(quick.read_text())["command"].endswith("steps --quick")


def test_a_length_that_ran_out_of_memory_is_said(tmp_path):
    rows = json.loads((harness.RESULTS / "lengths-cpu.json").read_text())["rows"]
    rows[-1][lengths.PLAIN] |= {"median_ms": None, "temp_bytes": None}
    assert lengths.table(rows).endswith("| out of memory | – | – |")
    plots.draw("lengths", rows, tmp_path / "picture.png")


def test_flops_are_not_told_where_xla_does_not_count_them_all(monkeypatch):
    step, x = jax.jit(lambda x: x @ x), jnp.ones((4, 4))
    lowered = step.lower(x)
    assert harness.measured(lowered, lambda: step(x)).flops >= 2 * 4**3
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert harness.measured(lowered, lambda: step(x)).flops is None


def test_the_readmes_table_is_that_of_the_results_files(tmp_path, monkeypatch):
    wanted = headline.PAGE.read_text()
    monkeypatch.setattr(headline, "PAGE", tmp_path / "headline.md")
    headline.main()
    assert headline.PAGE.read_text() == wanted
    assert headline._ratios({"ms": 3, "temp_bytes": 1}, None, "ms") == "–"
