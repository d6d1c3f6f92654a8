"""A real language model, through the commands."""

import json

import pytest

from experiments.fetch import FetchError, smollm2
from experiments.vader import load_editorials
from tests.models.golden import GOLDEN


@pytest.fixture(scope="module")
def smollm():
    try:
        return smollm2()
    except FetchError as error:
        pytest.skip(f"real weights can't be fetched: {error}")


@pytest.fixture(scope="module")
def editorials():
    try:
        return load_editorials()
    except FetchError as error:
        pytest.skip(f"real data can't be fetched: {error}")


@pytest.mark.real
@pytest.mark.slow
def test_editorials_have_the_log_probabilities_of_transformers(
    smollm, editorials, tmp_path, call
):
    golden = json.loads((GOLDEN / "smollm_scores.json").read_text())["scores"]
    data, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"text": text} for text in editorials[: len(golden)]]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, said = call("score", "--model", smollm, "--data", data, "--out", out)
    assert code == 0, said
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["tokens"] for line in lines] == [row["tokens"] for row in golden]
    for line, row in zip(lines, golden, strict=True):
        mean = row["sum"] / (row["tokens"] - 1)
        assert line["sum"] / (row["tokens"] - 1) == pytest.approx(mean, abs=2e-4)


@pytest.mark.real
@pytest.mark.slow
def test_the_capital_of_france_is_paris(smollm, call):
    words = ("--prompt", "The capital of France is", "--max-new-tokens", 2, "--json")
    code, out, said = call("generate", "--model", smollm, *words)
    assert code == 0, said
    assert json.loads(out)["results"][0]["text"] == " Paris."
