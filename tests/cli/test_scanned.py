"""An adapter that was trained on blocks under one `nn.scan`, through the commands."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.cli.pretrained import load_decoder
from lora_jax.config import LoRAConfig
from lora_jax.files.adapter import _digest, save_adapter
from lora_jax.finetune.report import layer_count, target_rows
from lora_jax.interop.pretrained import load_model
from lora_jax.names import FROZEN, LORA
from lora_jax.tree.fingerprint import fingerprint
from tests.models.golden import GOLDEN

LLAMA = GOLDEN / "llama"
IDS = jnp.array([[5, 6, 7]])


@pytest.fixture(scope="module")
def trained():
    lora = LoRAConfig(rank=2, alpha=3, targets=["query", "up"])
    model = load_model(LLAMA, lora=lora, key=jax.random.key(0), scan_layers=True)
    rng = np.random.default_rng(0)
    model.variables[LORA] = jax.tree.map(
        lambda a: jnp.float32(rng.standard_normal(a.shape)), model.variables[LORA]
    )
    return model


@pytest.fixture(scope="module")
def adapter(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    base = fingerprint(trained.variables[FROZEN])
    save_adapter(folder, trained.variables, trained.module.config, base)
    return folder


def test_it_loads_as_it_was_trained(trained, adapter):
    wanted = jax.jit(trained.module.apply)(trained.variables, IDS)
    found = load_model(LLAMA, adapter)
    assert (jax.jit(found.module.apply)(found.variables, IDS) == wanted).all()


def test_it_loads_block_by_block(trained, adapter):
    found = load_model(LLAMA, adapter, scan_layers=False)
    wanted = jax.jit(trained.module.apply)(trained.variables, IDS)
    got = jax.jit(found.module.apply)(found.variables, IDS)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert "layer_1" in found.variables[LORA]


def test_one_of_single_blocks_does_not_become_a_stack(tmp_path):
    model = load_model(LLAMA, lora=LoRAConfig(rank=1), key=jax.random.key(0))
    base = fingerprint(model.variables[FROZEN])
    save_adapter(tmp_path, model.variables, model.module.config, base)
    with pytest.raises(ValueError, match=r"must be False or None .* got True"):
        load_model(LLAMA, tmp_path, scan_layers=True)


@pytest.mark.parametrize("asked", [None, True, False])
def test_a_command_has_its_blocks_as_it_asks(adapter, asked):
    found = load_decoder(str(LLAMA), str(adapter), scan_layers=asked)
    assert found.module.model.scan_layers == (asked is not False)


def test_it_is_merged_as_plain_layers(trained, adapter, tmp_path, call):
    words = ("--model", LLAMA, "--adapter", adapter, "--out", tmp_path / "m")
    code, _, said = call("merge", *words)
    assert code == 0, said
    merged = load_model(tmp_path / "m")
    np.testing.assert_allclose(
        jax.jit(merged.module.apply)(merged.variables, IDS),
        jax.jit(trained.module.apply)(trained.variables, IDS),
        rtol=1e-5,
        atol=1e-5,
    )


def test_inspect_shows_each_of_its_layers(trained, adapter, call):
    code, out, _ = call("inspect", adapter, "--json")
    assert code == 0
    rows = json.loads(out)["layers"]
    names = [
        f"layer_{i}/{end}" for i in (0, 1) for end in ("attention/query", "mlp/up")
    ]
    assert [row["path"] for row in rows] == names
    leaves = trained.variables[LORA]["layers"]["mlp"]["up"]
    product = 1.5 * (leaves["lora_a"][1] @ leaves["lora_b"][1])
    assert rows[3]["norm"] == pytest.approx(float(jnp.linalg.norm(product)), rel=1e-5)


def test_ranks_that_the_config_lies_about_allocate_nothing(adapter, tmp_path, call):
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    meta = json.loads((tmp_path / "adapter_config.json").read_text())
    meta["lora"]["rank"] = 2**20
    meta["config_sha256"] = _digest(meta)
    (tmp_path / "adapter_config.json").write_text(json.dumps(meta))
    code, _, said = call(
        "merge", *("--model", LLAMA, "--adapter", tmp_path, "--out", tmp_path / "m")
    )
    assert code == 2
    assert "has shape (2, 20, 2), expected (2, 20, 1048576)" in said


def test_a_stack_counts_as_the_layers_that_it_holds(trained, adapter, tmp_path, call):
    targets = trained.module.targets(trained.params)
    assert len(targets) == 2  # each a stack of two blocks
    assert layer_count(targets) == 4
    rows = target_rows(targets)
    assert [row[:4] for row in rows] == [
        ("layers/attention/query", 2, "dense", "20 x 24"),
        ("layers/mlp/up", 2, "dense", "20 x 28"),
    ]
    assert sum(row[-1] for row in rows) == sum(t.trainable for t in targets)
    words = ["--model", LLAMA, "--adapter", adapter, "--out", tmp_path / "merged"]
    code, out, shown = call("merge", *words, "--json")
    assert code == 0, shown
    assert json.loads(out)["layers"] == 4
