"""`lora-jax combine` and `extract`, on the adapters that PEFT wrote."""

import json

import numpy as np
import pytest

from lora_jax import load_model
from lora_jax.cli.main import main
from lora_jax.tree.paths import flatten
from tests.interop.peft_cases import adapter_of, logits_of
from tests.models.golden import GOLDEN

MODEL = str(GOLDEN / "llama")
PLAIN, RSLORA, DORA = (str(adapter_of("llama", n)) for n in ("plain", "rslora", "dora"))


def logits(adapter):
    loaded = load_model(MODEL, adapter)
    return logits_of(loaded.module, loaded.variables, "llama")


def combine(capsys, *args):
    assert main(["combine", *args, "--model", MODEL, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("cat", ["--weights", "1", "-0.5"]),
        ("svd", ["--weights", "0.75", "0.5", "--method", "svd", "--rank", "2"]),
        (
            "ties",
            ["--weights", "0.75", "0.5", "--method", "ties", "--rank", "3"],
        ),
    ],
)
def test_logits_are_those_of_pefts_combination(name, args, tmp_path, capsys):
    out = str(tmp_path / "both")
    result = combine(capsys, PLAIN, RSLORA, *args, "--out", out)
    with np.load(GOLDEN / "combined.npz") as arrays:
        wanted = arrays[name]
    np.testing.assert_allclose(logits(out), wanted, rtol=1e-5, atol=6e-5)
    assert (result["largest_error"] > 0.01) == (name != "cat")
    assert main(["export", "--adapter", out, "--out", str(tmp_path / "peft")]) == 0
    np.testing.assert_allclose(logits(tmp_path / "peft"), wanted, rtol=1e-5, atol=6e-5)


def test_one_adapter_is_itself_whatever_its_kind(tmp_path, capsys):
    for adapter in (RSLORA, DORA):
        out = str(tmp_path / adapter.rpartition("/")[2])
        combine(capsys, adapter, "--out", out)
        np.testing.assert_array_equal(logits(out), logits(adapter))


def test_dora_is_converted_for_loaders_without_it(tmp_path, capsys):
    out, peft = str(tmp_path / "lora"), str(tmp_path / "peft")
    args = ["--method", "svd", "--rank", "24", "--out", out]
    assert combine(capsys, DORA, *args)["largest_error"] < 1e-5
    np.testing.assert_allclose(logits(out), logits(DORA), rtol=1e-4, atol=6e-5)
    assert main(["export", "--adapter", out, "--portable", "--out", peft]) == 0


def test_a_merged_model_gives_its_adapter_back(tmp_path, capsys):
    tuned, out = str(tmp_path / "tuned"), str(tmp_path / "adapter")
    args = ["merge", "--model", MODEL, "--adapter", RSLORA, "--out", tuned]
    assert main(args) == 0
    capsys.readouterr()
    args = ["extract", "--model", MODEL, "--tuned", tuned, "--rank", "9", "--out", out]
    assert main([*args, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["left"] == []
    assert result["largest_error"] < 1e-4
    assert result["least_energy_kept"] > 1 - 1e-8
    np.testing.assert_allclose(logits(out), logits(RSLORA), rtol=1e-4, atol=6e-5)

    # At rank 1, each layer's energy is that of its largest singular value.
    args = ["--tuned", tuned, "--rank", "1", "--out", str(tmp_path / "one")]
    assert main(["extract", "--model", MODEL, *args, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    before, after = (
        flatten(load_model(folder, scan_layers=False).params)
        for folder in (MODEL, tuned)
    )
    kept = []
    for path, kernel in before.items():
        change = np.asarray(after[path] - kernel, np.float64)
        if np.abs(change).max() > 0:
            values = np.linalg.svd(change.reshape(len(change), -1), compute_uv=False)
            kept.append(values[0] ** 2 / (values**2).sum())
    assert result["layers"] > result["changed"] == len(kept)
    assert result["mean_energy_kept"] == pytest.approx(np.mean(kept), rel=1e-4)
    assert result["least_energy_kept"] == pytest.approx(min(kept), rel=1e-4)

    file = tmp_path / "tuned" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rms_norm_eps": 0.5}))
    assert main(["extract", "--model", MODEL, *args[:-1], str(tmp_path / "two")]) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "their configs differ: norm_eps = 0.5, not 0.02." in shown


def test_weights_of_one_adapter_in_full_stay_beside_the_sum(tmp_path, capsys):
    saved, out = str(adapter_of("llama", "saved")), str(tmp_path / "both")
    combine(capsys, PLAIN, saved, "--weights", "0", "1", "--out", out)
    np.testing.assert_allclose(logits(out), logits(saved), rtol=1e-5, atol=1e-5)
    none = str(tmp_path / "none")
    combine(capsys, saved, saved, "--weights", "1", "-1", "--out", none)
    base = load_model(MODEL)
    wanted = logits_of(base.module, base.variables, "llama")
    np.testing.assert_allclose(logits(none), wanted, rtol=1e-5, atol=1e-5)
    peft = str(tmp_path / "peft")
    assert main(["export", "--adapter", out, "--out", peft]) == 0
    np.testing.assert_allclose(logits(peft), logits(saved), rtol=1e-5, atol=1e-5)
