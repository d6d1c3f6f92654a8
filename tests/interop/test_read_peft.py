"""PEFT folders are read strictly, and nothing that they name is opened."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.interop.external import ExternalAdapter, ExternalFactors
from lora_jax.interop.peft import TENSORS, read_peft, write_peft
from lora_jax.interop.peft_config import ADAPTER_CONFIG, parse_config

GOLDEN = Path(__file__).parents[1] / "golden"
LAYER = "base_model.model.model.layers.1"
NAMED = {"peft_type": "LORA", "target_modules": ["q_proj"]}


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(GOLDEN / "llama" / "peft_rslora", tmp_path / "a"))


def edit(folder, change):
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


def configure(folder, **changes):
    config = json.loads((folder / ADAPTER_CONFIG).read_text()) | changes
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config))


def error_of(folder):
    with pytest.raises(ValueError, match=r"must|fault") as error:
        read_peft(folder)
    return str(error.value)


def test_ranks_alphas_and_scalings_are_the_patterns(folder):
    found = read_peft(folder)
    rows = {n: (f.rank, f.alpha, f.scaling) for n, f in found.modules.items()}
    assert rows == {
        "model.layers.1.mlp.down_proj": (1, 2.0, 2.0),
        "model.layers.1.self_attn.q_proj": (4, 3.0, 1.5),
        "model.layers.1.self_attn.v_proj": (2, 7.0, 7 / 2**0.5),
    }
    assert found.rslora
    assert not found.dora
    assert found.unknown == ()


def test_the_first_pattern_in_the_file_wins_and_rank_and_alpha_are_independent():
    config = parse_config(
        NAMED
        | {
            "rank_pattern": {r"layers\.0\..*": 3, "q_proj": 5},
            "alpha_pattern": {"q_proj": 7},
        },
        "file",
    )
    assert config.rank_for("model.layers.0.self_attn.q_proj") == 3
    assert config.rank_for("model.layers.1.self_attn.q_proj") == 5
    assert config.rank_for("model.layers.1.self_attn.eq_proj") == 8  # PEFT's default
    assert config.alpha_for("model.layers.0.self_attn.q_proj") == 7.0


@pytest.mark.parametrize(
    ("changes", "name", "wanted"),
    [
        ({}, "model.layers.0.self_attn.q_proj", True),
        ({}, "model.layers.0.self_attn.eq_proj", False),
        ({"exclude_modules": ["layers.0.self_attn.q_proj"]}, "m.layers.0.q_proj", True),
        ({"exclude_modules": r".*\.0\..*"}, "m.layers.0.q_proj", False),
        ({"layers_to_transform": 1}, "m.layers.0.q_proj", False),
        ({"layers_to_transform": [1]}, "m.layers.1.q_proj", True),
        ({"layers_to_transform": []}, "m.layers.0.q_proj", True),
        ({"layers_to_transform": [0]}, "m.layers.1.experts.0.q_proj", False),
        (
            {"layers_to_transform": [1], "layers_pattern": "h"},
            "m.layers.1.h.2.q_proj",
            False,
        ),
        (
            {"layers_to_transform": [2], "layers_pattern": ["h"]},
            "m.layers.1.h.2.q_proj",
            True,
        ),
        ({"target_modules": r".*\.(q|k)_proj"}, "m.k_proj", True),
        ({"target_modules": r"(q|k)_proj"}, "m.k_proj", False),
        ({"target_modules": "all-linear"}, "m.k_proj", None),
        ({"modules_to_save": ["head"]}, "head.q_proj", False),
        (
            {"target_modules": ["m.1.q_proj"], "layers_to_transform": [2]},
            "m.1.q_proj",
            True,
        ),
    ],
)
def test_targets_match_as_in_peft(changes, name, wanted):
    assert parse_config(NAMED | changes, "file").is_target(name) is wanted


def test_a_pattern_that_would_match_for_ever_is_an_error():
    config = parse_config(NAMED | {"target_modules": "(l|ll)+b"}, "a")
    with pytest.raises(ValueError, match=r"within a second.*repetition inside"):
        config.is_target("l" * 60 + "lab")


def test_unknown_keys_are_kept_and_reported(folder):
    configure(folder, zebra=1, lora_new_idea=None)
    found = read_peft(folder)
    assert found.unknown == ("lora_new_idea", "zebra")
    assert found.config["zebra"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alora_invocation_tokens": [1]}, "computes (activated LoRA, whose"),
        ({"lora_bias": True}, "missing: base_model.model.model.layers.1.mlp.down"),
        ({"lora_bias": 1}, "lora_bias must be true or false; got 1"),
        ({"target_parameters": ["experts"]}, "factors of experts, which target_param"),
        ({"trainable_token_indices": [1]}, "trainable_tokens_delta of the input"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices must be a list"),
        ({"use_qalora": True}, "use_qalora = True"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights = 'pissa' changes the base",
        ),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base"),
        ({"peft_type": "LOHA"}, "peft_type 'LORA' or 'VERA'; got 'LOHA'"),
        ({"r": 0}, "r must be an integer of at least 1; got 0"),
        ({"r": True}, "r must be an integer of at least 1; got True"),
        ({"r": "8"}, "r must be an integer"),
        ({"r": 2**31}, "r must be an integer of at least 1; got 2147483648"),
        ({"r": 10**400}, "r must be an integer of at least 1; got inf"),
        ({"lora_alpha": 10**400}, "lora_alpha must be a number above 0; got inf"),
        ({"lora_alpha": 1e39}, "lora_alpha must be a number above 0; got 1e+39"),
        ({"alpha_pattern": {"q": 1e-300}}, "alpha_pattern must be alphas"),
        ({"rank_pattern": {"q": 2**31}}, "rank_pattern must be ranks"),
        ({"lora_alpha": 0}, "lora_alpha must be a number above 0; got 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha must be a number above 0; got nan"),
        ({"target_modules": None}, "target_modules must name the adapted modules"),
        ({"target_modules": {"a": 1}}, "target_modules must be a list of names"),
        ({"target_modules": [1]}, "target_modules must be a list of names"),
        ({"target_modules": "("}, "target_modules must be a list of names"),
        ({"rank_pattern": {"(": 2}}, "rank_pattern must be ranks"),
        ({"rank_pattern": {"q": 2.5}}, "rank_pattern must be ranks"),
        ({"alpha_pattern": [2]}, "alpha_pattern must be alphas"),
        ({"bias": "some"}, "bias must be 'none', 'lora_only' or 'all'; got 'some'"),
        ({"lora_dropout": 2}, "lora_dropout must be in [0, 1]; got 2"),
        ({"use_dora": "yes"}, "use_dora must be true or false; got 'yes'"),
        ({"layers_to_transform": "all"}, "layers_to_transform must be an integer"),
    ],
)
def test_a_config_that_cannot_be_followed_is_an_error(changes, message, folder):
    configure(folder, **changes)
    assert message in error_of(folder)


def test_all_faults_of_a_config_are_in_one_error(folder):
    configure(folder, r=-1, use_qalora=True, bias=3)
    message = error_of(folder)
    assert "3 faults" in message
    assert all(word in message for word in ("r must", "use_qalora", "bias must"))


def test_all_faults_of_the_tensors_are_in_one_error(folder):
    def change(tensors):
        tensors[f"{LAYER}.mlp.down_proj.lora_A.weight"][0, 0] = np.nan
        del tensors[f"{LAYER}.self_attn.q_proj.lora_B.weight"]
        name = f"{LAYER}.self_attn.v_proj.lora_A.weight"
        tensors[name] = np.ones((3, 20), np.float32)
        tensors[f"{LAYER}.mlp.up_proj.lora_C.weight"] = np.ones(2, np.float32)
        tensors[f"{LAYER}.mlp.up_proj.lora_B.bias"] = np.ones(2, np.float32)
        tensors["stray.weight"] = np.ones(2, np.float32)
        tensors["base_model.model.step"] = np.ones(2, np.int32)

    edit(folder, change)
    message = error_of(folder)
    assert "8 faults; nothing was loaded" in message
    assert f"not finite: {LAYER}.mlp.down_proj.lora_A.weight, 1 of 28" in message
    assert f"missing: {LAYER}.self_attn.q_proj.lora_B" in message
    assert (
        "A of model.layers.1.self_attn.v_proj must be [2, in]; got [3, 20]" in message
    )
    assert f"{LAYER}.mlp.up_proj.lora_C.weight is of an unknown kind" in message
    assert f"missing: {LAYER}.mlp.up_proj.lora_A" in message  # of its lora_B.bias
    assert "stray.weight does not start with base_model.model." in message
    assert "base_model.model.step must be floats; got int32" in message


def test_magnitudes_must_be_there_if_and_only_if_dora_is_on(folder):
    configure(folder, use_dora=True)
    assert "missing: base_model.model.model.layers.1.mlp.down_proj.lora_magni" in (
        error_of(folder)
    )
    configure(folder, use_dora=False)

    def add(tensors):
        name = f"{LAYER}.mlp.down_proj.lora_magnitude_vector"
        tensors[name] = np.ones(20, np.float32)

    edit(folder, add)
    assert "magnitude of model.layers.1.mlp.down_proj with use_dora false" in (
        error_of(folder)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must be a JSON object; got list"),
        ("{", "must be JSON; it can't be read"),
        ("[" * 100_000, "must be JSON; it can't be read"),
        ('{"peft_type": 3}', "must have peft_type 'LORA' or 'VERA'; got 3"),
    ],
    ids=["list", "cut", "deep", "type"],
)
def test_a_file_that_is_no_config_is_an_error(text, message, folder):
    (folder / ADAPTER_CONFIG).write_text(text)
    assert message in error_of(folder)


def test_a_truncated_or_pickled_adapter_is_an_error(folder):
    content = (folder / TENSORS).read_bytes()
    (folder / TENSORS).write_bytes(content[: len(content) // 2])
    assert "must be a safetensors file" in error_of(folder)
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"Pickled adapters \(.bin\)"):
        read_peft(folder)


@pytest.mark.parametrize("place", ["../../secret", "/etc", "https://evil.example/x", 7])
def test_the_base_that_a_file_names_is_never_opened(place, folder, monkeypatch):
    configure(folder, base_model_name_or_path=place, revision="../x")
    opened = []
    real = Path.open

    def spy(self, *args, **kwargs):
        opened.append(self)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", spy)
    assert read_peft(folder).config["base_model_name_or_path"] == place
    assert {path.parent for path in opened} <= {folder}


def test_writing_what_was_read_gives_the_same_tensors(tmp_path):
    for kind in (
        "llama/peft_dora",
        "llama/peft_embed",
        "vit/peft_conv",
        "bert/peft_saved",
    ):
        source = GOLDEN / kind
        found = read_peft(source)
        write_peft(tmp_path / "out", found, {})
        written, original = (load_file(f / TENSORS) for f in (tmp_path / "out", source))
        assert written.keys() == original.keys()
        for name, tensor in original.items():
            np.testing.assert_array_equal(written[name], tensor, err_msg=name)


def test_patterns_are_written_only_where_modules_differ(tmp_path):
    def factors(rank, alpha):
        ones = np.ones((rank, 3), np.float32), np.ones((2, rank), np.float32)
        return ExternalFactors(*ones, alpha / rank, alpha)

    modules = {"a.q": factors(2, 4.0), "a.k": factors(2, 4.0), "b.q": factors(1, 3.5)}
    write_peft(tmp_path, ExternalAdapter(modules, {}, {}, {}), {})
    config = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    assert config["rank_pattern"] == {r"b\.q": 1}
    assert config["alpha_pattern"] == {r"b\.q": 3.5}
    assert config["init_lora_weights"] is True
    assert read_peft(tmp_path).modules["b.q"].scaling == 3.5


def test_an_adapter_that_is_not_finite_is_not_written(tmp_path):
    bad = ExternalFactors(
        np.full((1, 2), np.inf, np.float32), np.ones((2, 1)), 1.0, 1.0
    )
    with pytest.raises(ValueError, match=r"must be finite to be saved; m\.lora_A"):
        write_peft(tmp_path / "out", ExternalAdapter({"m": bad}, {}, {}, {}), {})
    assert not (tmp_path / "out").exists()


def test_an_adapter_stays_whole_where_the_next_one_cannot_be_written(
    folder, monkeypatch
):
    def full(*_, **__):  # once the tensors are written
        raise OSError(28, "No space left on device")

    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    adapter = ExternalAdapter(
        {"m": ExternalFactors(np.ones((2, 3)), np.ones((4, 2)), 1.0, 2.0)}, {}, {}, {}
    )
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            write_peft(folder, adapter, {})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    write_peft(folder, adapter, {})
    assert list(read_peft(folder).modules) == ["m"]
