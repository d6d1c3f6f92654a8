"""mlx-lm folders: read strictly, and written as its own loader wants them."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.interop.external import (
    ADAPTER_CONFIG,
    ExternalAdapter,
    ExternalFactors,
)
from lora_jax.interop.mlx import TENSORS, read_mlx, write_mlx

NAME = "model.layers.3.self_attn.q_proj"


def factors(rank, scaling, seed=0):
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(s).astype(np.float32) for s in ((rank, 5), (4, rank)))
    return ExternalFactors(a, b, scaling, scaling * rank)


@pytest.fixture
def folder(tmp_path):
    adapter = ExternalAdapter({NAME: factors(2, 1.5)}, {}, {}, {}, dropout_rate=0.1)
    return write_mlx(tmp_path / "a", adapter, num_layers=6)


def configure(folder, **changes):
    config = json.loads((folder / ADAPTER_CONFIG).read_text()) | changes
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))


def test_names_shapes_and_config_are_those_of_mlx_lm(folder):
    tensors = load_file(folder / TENSORS)
    shapes = {name: x.shape for name, x in tensors.items()}
    assert shapes == {f"{NAME}.lora_a": (5, 2), f"{NAME}.lora_b": (2, 4)}
    assert json.loads((folder / ADAPTER_CONFIG).read_text()) == {
        "fine_tune_type": "lora",
        "num_layers": 3,  # 3, 4 and 5 of six
        "lora_parameters": {
            "rank": 2,
            "scale": 1.5,
            "dropout": 0.1,
            "keys": ["self_attn.q_proj"],
        },
    }


def test_reading_undoes_writing(folder):
    found = read_mlx(folder)
    (back,) = found.modules.values()
    wanted = factors(2, 1.5)
    assert list(found.modules) == [NAME.removeprefix("model.")]
    assert (back.scaling, back.alpha, back.rank) == (1.5, 3.0, 2)
    np.testing.assert_array_equal(back.a, wanted.a)
    np.testing.assert_array_equal(back.b, wanted.b)
    assert found.dropout_rate == 0.1


def test_other_ranks_and_scalings_become_the_commonest(tmp_path):
    modules = {
        NAME: factors(1, 2.0),
        NAME.replace("q_", "k_"): factors(3, 0.5, seed=1),
        NAME.replace("q_", "v_"): factors(3, 0.5, seed=2),
    }
    adapter = ExternalAdapter(modules, {}, {}, {})
    found = read_mlx(write_mlx(tmp_path, adapter, num_layers=4))
    assert {(f.rank, f.scaling) for f in found.modules.values()} == {(3, 0.5)}
    for name, part in modules.items():
        back = found.modules[name.removeprefix("model.")]
        np.testing.assert_allclose(
            back.scaling * back.b @ back.a, part.scaling * part.b @ part.a, rtol=1e-5
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fine_tune_type": "full"}, "fine_tune_type must be one of"),
        ({"lora_parameters": [1]}, "lora_parameters must be an object"),
        ({"lora_parameters": {"rank": 2}}, "scale must be a number above 0; got None"),
        (
            {"lora_parameters": {"rank": True, "scale": -1, "dropout": 3}},
            "3 faults: rank must be an integer .* scale must be .* dropout must be",
        ),
        (
            {"lora_parameters": {"rank": 3, "scale": 1.0}},
            r"must be \[in, 3\], \[3, out\]; got \[5, 2\], \[2, 4\]",
        ),
        (
            {"lora_parameters": {"rank": 2**31, "scale": 1e39, "dropout": 1e999}},
            "3 faults: rank must be an integer .* scale must be .* dropout must be",
        ),
        (
            {"lora_parameters": {"rank": 10**400, "scale": 10**400}},
            "2 faults: rank must be an integer .*inf; scale must be a number .*inf",
        ),
        ({"fine_tune_type": "dora"}, f"missing: {NAME}.m"),
    ],
)
def test_a_config_that_does_not_fit_is_an_error(changes, message, folder):
    configure(folder, **changes)
    with pytest.raises(ValueError, match=message):
        read_mlx(folder)


def test_all_faults_of_the_tensors_are_in_one_error(folder):
    tensors = load_file(folder / TENSORS)
    tensors[f"{NAME}.lora_a"][0, 0] = np.inf
    tensors["model.norm.weight"] = np.ones(3, np.float32)
    tensors["model.layers.4.mlp.up_proj.lora_a"] = np.ones((5, 2), np.float32)
    save_file(tensors, folder / TENSORS)
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        read_mlx(folder)
    for line in (
        "unexpected: model.norm.weight doesn't end with one of",
        f"not finite: {NAME}.lora_a, 1 of 10 values",
        "missing: model.layers.4.mlp.up_proj.lora_b",
    ):
        assert line in str(error.value)


def test_what_the_format_of_mlx_lm_can_not_hold_is_an_error(tmp_path):
    embed = factors(1, 1.0)._replace(is_embedding=True, magnitude=np.ones(4))
    conv = factors(1, 1.0)._replace(a=np.ones((1, 3, 2, 2)))
    full = {"lm_head.weight": np.ones((2, 2))}
    adapter = ExternalAdapter({"e": embed, "c": conv}, full, {}, {})
    with pytest.raises(
        ValueError, match=r"lm_head.weight is trained .* c is a conv.* e is"
    ):
        write_mlx(tmp_path / "out", adapter, num_layers=1)
    assert not (tmp_path / "out").exists()


def test_an_adapter_stays_whole_where_the_next_one_cannot_be_written(
    folder, monkeypatch
):
    def full(*_, **__):  # once the tensors are written
        raise OSError(28, "No space left on device")

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    adapter = ExternalAdapter({NAME: factors(3, 0.5)}, {}, {}, {})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            write_mlx(folder, adapter, num_layers=6)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    write_mlx(folder, adapter, num_layers=6)
    assert list(read_mlx(folder).modules) == [NAME.removeprefix("model.")]
