"""A saved folder is the source's folder with other values in it."""

import json
import shutil
from pathlib import Path

import flax.traverse_util
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.interop.pretrained import load_model
from lora_jax.models.save import save_model
from tests.files.test_gguf import V, write
from tests.tiny_decoder import make_decoder

GOLDEN = Path(__file__).parents[1] / "golden" / "bert"


def test_saving_what_was_loaded_gives_the_file_that_transformers_wrote(tmp_path):
    loaded = load_model(GOLDEN)
    save_model(tmp_path / "out", loaded.params, GOLDEN, pooling="pooler")
    written = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(GOLDEN / "model.safetensors")
    assert written.keys() == original.keys()
    for name, tensor in original.items():
        assert written[name].dtype == tensor.dtype
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    original = json.loads((GOLDEN / "config.json").read_text())
    assert config == original | {"lora_jax": {"pooling": "pooler"}}


def test_changed_values_and_a_new_head_come_back(tmp_path):
    loaded = load_model(GOLDEN, num_labels=2, pooling="mean", key=jax.random.key(0))
    params = jax.tree.map(lambda x: 2 * x, loaded.params)
    with pytest.warns(UserWarning, match="'mean' pooling"):
        save_model(tmp_path / "out", params, loaded.path)
    again = load_model(tmp_path / "out")
    assert (again.module.num_labels, again.module.pooling) == (2, "mean")
    assert jax.tree.all(jax.tree.map(np.array_equal, params, again.params))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}
    # The pooler was not loaded, and is still in the folder.
    assert "bert.pooler.dense.weight" in again.unused


def test_a_folder_keeps_its_dtypes_whatever_it_was_loaded_in(tmp_path):
    source = Path(shutil.copytree(GOLDEN, tmp_path / "source"))
    tensors = {
        name: tensor.astype(ml_dtypes.bfloat16 if "word" in name else np.float16)
        for name, tensor in load_file(source / "model.safetensors").items()
    }
    save_file(tensors, source / "model.safetensors")
    params = load_model(source, param_dtype="float32").params
    save_model(tmp_path / "out", params, source, pooling="pooler")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert written[name].dtype == tensor.dtype, name
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    params["encoder"]["layer_0"]["mlp"]["up"]["bias"] += 1e5  # more than float16 holds
    with pytest.raises(ValueError, match="not finite: encoder/layer_0/mlp/up/bias"):
        save_model(tmp_path / "more", params, source)


def test_without_a_head_the_files_old_head_is_left_out(tmp_path):
    loaded = load_model(GOLDEN, pooling="mean")
    save_model(tmp_path / "out", loaded.params, loaded.path)
    assert load_model(tmp_path / "out").module.num_labels is None


def test_all_files_but_weights_go_along(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name, source)
    kept = (
        *("vocab.txt", "vocab.json", "merges.txt", "tokenizer.model", "README.md"),
        *("additional_chat_templates/tool_use.jinja", "1_Pooling/config.json"),
        "modeling_own.py",  # copied, never run
    )
    left = (
        *("pytorch_model.bin", "model.onnx", "tf_model.h5", ".gitattributes"),
        *("adapter_config.json", "model.safetensors.index.json"),
        *("checkpoint-5/config.json", "checkpoint-5/optimizer.pt"),
    )
    for name in (*kept, *left):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("raise SystemExit\n")
    (source / "model.safetensors.index.json").unlink()  # it would be the model
    (tmp_path / "secret").write_text("mine")
    (source / "link").symlink_to(tmp_path / "secret")
    (source / "folder").symlink_to(tmp_path)
    (source / "own").symlink_to("vocab.txt")
    (source / "out" / "1_Pooling").mkdir(parents=True)  # an older result is replaced
    loaded = load_model(GOLDEN)
    out = save_model(source / "out", loaded.params, source, pooling="pooler")
    found = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert found == {"config.json", "model.safetensors", "own", *kept}
    assert not (out / "own").is_symlink()


def test_a_folder_of_the_hubs_cache_links_to_its_blobs(tmp_path):
    cache = tmp_path / "models--me--bert"
    source, blobs = cache / "snapshots" / "abc", cache / "blobs"
    source.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(GOLDEN / name, source)
    (blobs / "1").write_text("[PAD]")
    (source / "vocab.txt").symlink_to("../../blobs/1")
    out = save_model(tmp_path / "out", load_model(GOLDEN).params, source)
    assert (out / "vocab.txt").read_text() == "[PAD]"


def test_what_nothing_changed_is_the_same_bytes_whatever_it_was_loaded_in(tmp_path):
    params = load_model(GOLDEN, param_dtype="bfloat16").params
    kernel = params["encoder"]["layer_0"]["mlp"]["up"]["kernel"]
    params["encoder"]["layer_0"]["mlp"]["up"]["kernel"] = kernel + 1
    out = save_model(tmp_path / "out", params, GOLDEN, pooling="pooler")
    written = load_file(out / "model.safetensors")
    changed = [
        name
        for name, tensor in load_file(GOLDEN / "model.safetensors").items()
        if tensor.tobytes() != written[name].tobytes()
    ]
    assert changed == ["bert.encoder.layer.0.intermediate.dense.weight"]


def test_the_chat_template_and_where_generation_stops_are_copied(tmp_path):
    source = make_decoder(tmp_path / "source")
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    loaded = load_model(source)
    save_model(tmp_path / "out", loaded.params, source)
    assert loaded.tokenizer.special.stop_ids == (1, 7)
    special = load_model(tmp_path / "out").tokenizer.special
    file = tmp_path / "out" / loaded.tokenizer.special.template_file.name
    assert special == loaded.tokenizer.special._replace(template_file=file)


def test_a_folder_appears_once_all_of_it_is_written(tmp_path, monkeypatch):
    loaded = load_model(GOLDEN)

    def fail(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr("lora_jax.models.save.write_text", fail)
    for target in (tmp_path / "new", tmp_path / "there"):
        (tmp_path / "there").mkdir(exist_ok=True)
        with pytest.raises(OSError, match="disk is full"):
            save_model(target, loaded.params, GOLDEN, pooling="pooler")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert not any((tmp_path / "there").iterdir())


def test_a_second_copy_of_a_tied_embedding_is_not_written_beside_it(tmp_path):
    source = Path(shutil.copytree(GOLDEN.parent / "qwen2", tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    copy = {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}
    save_file(tensors | copy, source / "model.safetensors")
    params = jax.tree.map(lambda x: 2 * x, load_model(source).params)
    save_model(tmp_path / "out", params, source)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()
    assert jax.tree.all(
        jax.tree.map(np.array_equal, load_model(tmp_path / "out").params, params)
    )


def test_one_error_lists_all_tensors_that_dont_fit_and_nothing_is_written(tmp_path):
    flat = flax.traverse_util.flatten_dict(load_model(GOLDEN).params)
    flat = dict(flat)
    layer = ("encoder", "layer_0")
    del flat[(*layer, "mlp", "up", "bias")]
    flat[(*layer, "mlp", "down", "kernel")] = np.zeros((21, 37), np.float32)
    flat[(*layer, "mlp_norm", "scale")] = np.full(21, np.inf, np.float32)
    flat[("encoder", "layer_2", "mlp_norm", "scale")] = np.ones(21, np.float32)
    params = flax.traverse_util.unflatten_dict(flat)
    with pytest.raises(ValueError, match="4 tensors don't") as error:
        save_model(tmp_path / "out", params, GOLDEN)
    message = str(error.value)
    assert "missing: encoder.layer.0.intermediate.dense.bias" in message
    assert "encoder.layer.0.output.dense.weight must be [21, 37]; got [37, 21]" in (
        message
    )
    assert "not finite: encoder/layer_0/mlp_norm/scale" in message
    assert "unexpected: encoder/layer_2/mlp_norm/scale" in message
    assert not (tmp_path / "out").exists()


def test_the_source_folder_is_never_overwritten(tmp_path):
    source = Path(shutil.copytree(GOLDEN, tmp_path / "source"))
    loaded = load_model(source)
    with pytest.raises(ValueError, match=r"must differ from the source"):
        save_model(source, loaded.params, source)


def test_a_gguf_file_becomes_a_folder_tokenizer_and_template_included(tmp_path):
    vocabulary = [*"abc", "</s>"] + [f"w{i}" for i in range(V - 4)]

    def add(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(vocabulary)
        writer.add_token_merges(["a b"])
        writer.add_token_types([1, 1, 1, 3] + [1] * (V - 4))
        writer.add_eos_token_id(3)
        writer.add_chat_template("{{ messages[0].content }}")

    vocabulary[4] = "ab"
    source = write(tmp_path / "m.gguf", add=add)
    loaded = load_model(source)
    save_model(tmp_path / "out", loaded.params, source)
    again = load_model(tmp_path / "out")
    assert again.config == loaded.config
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded.params, again.params))
    texts = ["abcab", "cab", "c"]
    file = tmp_path / "out" / "tokenizer_config.json"
    assert again.tokenizer.special == loaded.tokenizer.special._replace(
        template_file=file
    )
    assert [again.tokenizer.encode_text(text).ids for text in texts] == [
        loaded.tokenizer.encode_text(text).ids for text in texts
    ]
    assert again.tokenizer.encode_text("ab").ids == [4]
    said = [{"role": "user", "content": "cab"}]
    assert again.tokenizer.render_chat(said) == "cab"
