"""`lora-jax train` with rows split over devices, and what is refused."""

import json

import numpy as np
import pytest

from lora_jax.cli.main import main
from lora_jax.files.adapter import load_adapter
from lora_jax.finetune.checks import check_sequence
from lora_jax.finetune.errors import UserError
from lora_jax.tree.paths import flatten
from tests.cli.test_mesh import eight_devices
from tests.tiny_decoder import make_decoder


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A run's YAML: packed rows of 16 tokens."""
    place = tmp_path_factory.mktemp("sequence")
    folder = make_decoder(place / "llama")
    draw = np.random.default_rng(0)
    rows = [
        {"input_ids": draw.integers(3, 9, size).tolist()}
        for size in draw.integers(3, 15, 24)
    ]
    (place / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = place / "config.yaml"
    file.write_text(
        f"""
model: {{path: {folder}}}
data: {{train: {place}/train.jsonl, max_length: 16, packing: true}}
lora: {{rank: 2, alpha: 6}}
train: {{max_steps: 3, batch_size: 2, log_every: 1, baseline: false}}
output: {{dir: {place}/one}}
"""
    )
    return file


@pytest.mark.slow
def test_three_steps_on_split_rows_are_those_of_one_device(language):
    one, split = language.parent / "one", language.parent / "split"
    assert main(["train", str(language)]) == 0
    words = [f"output.dir={split}", "mesh.tensor=2", "mesh.sequence=4"]
    words += ["mesh.uneven=replicate"]
    done = eight_devices("train", language, *words)
    assert done.returncode == 0, done.stderr
    assert "data 1 x fsdp 1 x tensor 2 x sequence 4" in done.stdout
    losses = [
        [
            json.loads(line).get("loss")
            for line in (run / "metrics.jsonl").read_text().splitlines()
        ]
        for run in (one, split)
    ]
    assert len([loss for loss in losses[0] if loss]) >= 3
    np.testing.assert_allclose(*(np.array(x, float) for x in losses), rtol=1e-5)
    wanted, found = (
        flatten(load_adapter(run / "adapter").variables) for run in (one, split)
    )
    for path, leaf in wanted.items():
        np.testing.assert_allclose(leaf, found[path], atol=1e-5, err_msg=path)


def test_encoders_are_refused(config, tmp_path, call):
    message = "mesh.sequence must be 1 for an encoder; got 4."
    with pytest.raises(UserError, match=message):
        check_sequence("encoder", None, 4)
    check_sequence("encoder", None, 1)
