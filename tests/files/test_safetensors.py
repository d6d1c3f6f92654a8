"""Safetensors files are read strictly and written whole or not at all."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from lora_jax.files.safetensors import open_tensors, write_tensors


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32"])
def test_what_is_written_is_read_bit_equal(tmp_path, dtype):
    wide = jnp.arange(6).reshape(2, 3).astype(dtype)
    tensors = {"a": wide, "b": np.asarray(wide).T, "c": jnp.zeros((), dtype)}
    size = write_tensors(tmp_path / "t.safetensors", tensors, metadata={"k": "v"})
    assert size == (tmp_path / "t.safetensors").stat().st_size
    reader = open_tensors(tmp_path / "t.safetensors")
    assert reader.shapes == {"a": (2, 3), "b": (3, 2), "c": ()}
    with safe_open(tmp_path / "t.safetensors", framework="np") as file:
        assert file.metadata() == {"k": "v"}
    for name, tensor in tensors.items():
        assert reader[name].dtype == tensor.dtype
        np.testing.assert_array_equal(reader[name], tensor)


def test_a_failed_write_leaves_the_older_file(tmp_path, monkeypatch):
    import safetensors.numpy

    file = tmp_path / "t.safetensors"
    write_tensors(file, {"a": np.ones(3, np.float32)})
    before = file.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    with pytest.raises(OSError, match=r"\(20 bytes\).*No space left on device"):
        write_tensors(file, {"a": np.ones(5, np.float32)})
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.safetensors"]


def test_a_tensor_that_is_not_there_is_named(tmp_path):
    write_tensors(tmp_path / "t.safetensors", {"a": np.ones(3)})
    with pytest.raises(
        ValueError, match=r"'b' must be one of the 1 in .*t.safetensors"
    ):
        open_tensors(tmp_path / "t.safetensors")["b"]


def test_a_name_without_measure_is_not_printed_whole(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"w" * 10**6: np.zeros(2)})
    with pytest.raises(ValueError, match="at most 1000 characters") as error:
        open_tensors(path)
    assert len(str(error.value)) < 300


def test_a_file_of_anything_else_is_called_damaged(tmp_path):
    file = tmp_path / "t.safetensors"
    file.write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"\(5 bytes\) must be a safetensors file"):
        open_tensors(file)


def test_a_folder_without_safetensors_says_what_it_holds(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"'pytorch_model.bin'.*not supported"):
        open_tensors(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is neither"):
        open_tensors(tmp_path / "nowhere")


def write_index(folder, weight_map):
    text = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "d/x", "..", 3])
def test_an_index_that_points_outside_its_folder_is_refused(tmp_path, name):
    write_index(tmp_path, {"a": name})
    with pytest.raises(ValueError, match=r"files in its own folder; got \["):
        open_tensors(tmp_path)


def test_missing_shards_are_counted_and_named(tmp_path):
    write_tensors(tmp_path / "1.safetensors", {"a": np.ones(3)})
    write_index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    with pytest.raises(FileNotFoundError, match=r"the 2 shards .*: 2.safetensors\."):
        open_tensors(tmp_path)


def test_shards_that_lack_an_indexed_tensor_or_share_one_are_an_error(tmp_path):
    write_tensors(tmp_path / "1.safetensors", {"a": np.ones(3)})
    write_index(tmp_path, {"a": "1.safetensors", "b": "1.safetensors"})
    assert set(open_tensors(tmp_path).shapes) == {"a"}  # the model's check names "b"
    write_tensors(tmp_path / "2.safetensors", {"a": np.ones(3), "b": np.ones(2)})
    write_index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    with pytest.raises(ValueError, match=r"2.safetensors: tensor 'a' .* 1.safetensors"):
        open_tensors(tmp_path)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{", "JSON"),
        ("[" * 100_000, "JSON"),
        ("[]", "a JSON object"),
        ("{}", "JSON with a weight_map"),
        ('{"weight_map": 3}', "JSON with a weight_map"),
    ],
)
def test_an_index_that_is_none_is_named(tmp_path, text, wanted):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=rf"index.json must be {wanted}"):
        open_tensors(tmp_path)


def test_a_dtype_that_numpy_has_not_is_named(tmp_path):
    header = json.dumps(
        {"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}
    )
    file = tmp_path / "t.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + b"\0\0")
    with pytest.raises(ValueError, match=r"tensor 'a' of .* dtype .* got F8_E4M3"):
        open_tensors(file)["a"]


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    write_tensors(tmp_path / "t.safetensors", {"a": np.ones(3)})
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r'pip install "lora_jax\[train\]"'):
        open_tensors(tmp_path / "t.safetensors")


def test_importing_the_models_imports_no_optional_package():
    code = (
        "import sys, lora_jax.models.load, lora_jax.models.save\n"
        "print({'safetensors', 'tokenizers', 'huggingface_hub'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
