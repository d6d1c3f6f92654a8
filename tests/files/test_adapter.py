"""Adapter folders: exact, small, strict; nothing half-loaded."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lora_jax.config import LoRAConfig
from lora_jax.files.adapter import load_adapter, read_adapter_config, save_adapter
from lora_jax.files.safetensors import write_tensors

CONFIG = LoRAConfig(
    rank=2, alpha=6, rank_pattern={"value": 3}, targets=["query", "value"]
)


def make_variables():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "frozen": {"block": {"query": {"kernel": draw(40, 50)}}},
        "lora": {
            "block": {
                "query": {"lora_a": draw(40, 2), "lora_b": draw(2, 50)},
                "value": {"lora_a": draw(40, 3), "lora_b": draw(3, 50)},
            }
        },
        "params": {"classifier": {"kernel": draw(50, 2), "bias": draw(2)}},
    }


@pytest.fixture
def folder(tmp_path):
    save_adapter(
        tmp_path / "adapter", make_variables(), CONFIG, "1-abc", extra={"n": [1]}
    )
    return tmp_path / "adapter"


def rewrite(folder, change):
    """Writes the folder anew with other tensors, as a faulty tool would."""
    from lora_jax.files.adapter import _digest, sha256
    from lora_jax.files.safetensors import open_tensors

    reader = open_tensors(folder / "adapter.safetensors")
    tensors = {path: reader[path] for path in reader.shapes}
    change(tensors)
    write_tensors(folder / "adapter.safetensors", tensors)
    meta = json.loads((folder / "adapter_config.json").read_text())
    meta["sha256"] = sha256(folder / "adapter.safetensors")
    meta["config_sha256"] = _digest(meta)
    (folder / "adapter_config.json").write_text(json.dumps(meta))


def test_what_is_saved_is_loaded_bit_for_bit(folder):
    variables = make_variables()
    adapter = load_adapter(folder, expected=variables, fingerprint="1-abc")
    del variables["frozen"]
    assert jax.tree.structure(adapter.variables) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, adapter.variables, variables)
    assert adapter.config == CONFIG
    assert adapter.fingerprint == "1-abc"
    assert adapter.extra == {"n": [1]}


def test_the_file_holds_the_trained_numbers_and_no_base(folder):
    trained = 2 * (40 + 50) + 3 * (40 + 50) + 50 * 2 + 2
    assert read_adapter_config(folder)["trainable"] == trained
    size = (folder / "adapter.safetensors").stat().st_size
    header = int.from_bytes((folder / "adapter.safetensors").read_bytes()[:8], "little")
    assert size == 4 * trained + 8 + header
    assert b"frozen" not in (folder / "adapter.safetensors").read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter.safetensors",
        "adapter_config.json",
    ]


def test_an_adapter_stays_whole_where_the_next_one_cannot_be_written(
    folder, monkeypatch
):
    def full(*_, **__):  # once the tensors are written
        raise OSError(28, "No space left on device")

    newer = jax.tree.map(lambda x: x + 1, make_variables())
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space left"):
            save_adapter(folder, newer, CONFIG, "1-new")
    assert len(list(folder.iterdir())) == 2
    older = load_adapter(folder, expected=make_variables(), fingerprint="1-abc")
    lora = make_variables()["lora"]
    jax.tree.map(np.testing.assert_array_equal, older.variables["lora"], lora)
    save_adapter(folder, newer, CONFIG, "1-new")
    assert load_adapter(folder).fingerprint == "1-new"


def test_bfloat16_and_abstract_expectations_work(tmp_path):
    lora = {"q": {"lora_a": jnp.ones((3, 1), jnp.bfloat16), "lora_b": jnp.ones((1, 2))}}
    save_adapter(tmp_path, {"lora": lora}, CONFIG, "f")
    expected = jax.eval_shape(lambda: {"lora": lora})
    loaded = load_adapter(tmp_path, expected=expected)
    assert loaded.variables["lora"]["q"]["lora_a"].dtype == jnp.bfloat16
    assert "params" not in loaded.variables


def test_every_bad_tensor_is_named_in_one_error(folder):
    def spoil(tensors):
        del tensors["lora/block/query/lora_b"]
        tensors["lora/block/extra/lora_a"] = np.ones((4, 2), np.float32)
        tensors["frozen/block/query/kernel"] = np.ones((4, 2), np.float32)
        tensors["lora/block/value/lora_a"] = np.ones((40, 4), np.float32)
        tensors["params/classifier/bias"] = np.ones(2, ml_dtypes.bfloat16)
        tensors["params/classifier/kernel"][1] = np.nan
        tensors["lora/block/value/lora_b"][0, 0] = np.inf

    rewrite(folder, spoil)
    with pytest.raises(
        ValueError, match=r"has 8 faults: .*Nothing was loaded"
    ) as error:
        load_adapter(folder, expected=make_variables())
    for fault in (
        "lora/block/query/lora_b is missing",
        "lora/block/extra/lora_a is unexpected",
        "frozen/block/query/kernel is outside lora, params and fixed",
        "frozen/block/query/kernel is unexpected",
        "lora/block/value/lora_a has shape (40, 4), expected (40, 3)",
        "params/classifier/bias has dtype bfloat16, expected float32",
        "params/classifier/kernel has 2 of 100 values NaN or infinite",
        "lora/block/value/lora_b has 1 of 150 values NaN or infinite",
    ):
        assert fault in str(error.value)


def test_another_base_is_refused_by_name(folder):
    with pytest.raises(ValueError, match="on the base 1-abc; this base is 1-def"):
        load_adapter(folder, fingerprint="1-def")


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_a_damaged_file_is_noticed(folder, damage):
    file = folder / "adapter.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "truncate":
        del content[-10:]
    else:
        content[-10] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="its SHA-256 differs"):
        load_adapter(folder)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda m: m.update(format="peft"), ValueError, "'lora_jax'; got 'peft'"),
        (lambda m: m.update(version=3), ValueError, "version 1 or 2; got 3"),
        (lambda m: m["lora"].update(alpha=7), ValueError, "its checksum differs"),
        (lambda m: m["lora"].update(rslora=True), ValueError, "its checksum differs"),
        (lambda m: m.update(base="1-abd"), ValueError, "its checksum differs"),
        (lambda m: m["extra"].update(n=[2]), ValueError, "its checksum differs"),
        (lambda m: m.pop("config_sha256"), ValueError, r"lacks \['config_sha256'\]"),
        (lambda m: m.pop("base"), ValueError, r"lacks \['base'\]"),
        (
            lambda m: m["lora"].update(rank=0),
            ValueError,
            "rank must be at least 1; got 0",
        ),
        (lambda m: m["lora"].update(rnk=1), ValueError, "no field rnk"),
        (lambda m: m["lora"].update(rank="2"), ValueError, "rank must be an integer"),
        (lambda m: m.update(lora=5, extra=[]), ValueError, "lora, extra must be JSON"),
        (lambda m: m.update(sha256=5), ValueError, "sha256 must be str; got 5"),
    ],
)
def test_a_wrong_config_is_named(folder, edit, error, message):
    meta = json.loads((folder / "adapter_config.json").read_text())
    edit(meta)
    (folder / "adapter_config.json").write_text(json.dumps(meta))
    with pytest.raises(error, match=message):
        load_adapter(folder)


def test_an_adapter_of_version_1_has_no_checksum_of_its_config(folder):
    meta = json.loads((folder / "adapter_config.json").read_text())
    del meta["config_sha256"]
    meta["version"] = 1
    (folder / "adapter_config.json").write_text(json.dumps(meta))
    assert load_adapter(folder).config == CONFIG


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("lora", (2, 2), "lora is outside lora, params and fixed"),
        ("k/x", (2, 2), "k/x is outside lora, params and fixed"),
        ("lora//x", (2, 2), "lora//x is outside"),
        ("params/", (2, 2), "params/ is outside"),
        ("params/classifier", (2, 2), "kernel is inside the tensor params/classifier"),
        ("params/classifier/kernel", (), r"kernel has shape \(\), expected 2 axes"),
        ("lora/block/query/lora_a", (80,), r"lora_a has shape \(80,\), expected 2"),
    ],
)
def test_names_and_shapes_of_no_adapter_are_faults(folder, name, shape, message):
    rewrite(folder, lambda tensors: tensors.update({name: np.ones(shape, np.float32)}))
    with pytest.raises(ValueError, match=message):
        load_adapter(folder)


def test_missing_and_unreadable_files_are_named(folder):
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json must be JSON"):
        load_adapter(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no adapter_config\.json"):
        load_adapter(folder)
    with pytest.raises(
        FileNotFoundError, match=r"no adapter\.safetensors and no adapter_config\.json"
    ):
        load_adapter(folder / "nowhere")


def test_what_must_not_be_saved_is_refused(tmp_path):
    variables = make_variables()
    with pytest.raises(ValueError, match=r"leaves in 'lora' to save; got 2 leaves"):
        save_adapter(tmp_path, variables | {"lora": {}}, CONFIG, "f")
    variables["params"]["classifier"]["bias"] = jnp.array([1.0, jnp.nan])
    with pytest.raises(ValueError, match="classifier/bias has 1 of 2 values NaN"):
        save_adapter(tmp_path, variables, CONFIG, "f")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"can't be saved to .*file/adapter"):
        save_adapter(tmp_path / "file" / "adapter", make_variables(), CONFIG, "f")
