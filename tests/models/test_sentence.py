"""Folders of sentence-transformers: embeddings, adapters and merges of their models."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.config import LoRAConfig
from lora_jax.finetune.encode import encode
from lora_jax.finetune.errors import UserError
from lora_jax.interop.export import export_adapter
from lora_jax.interop.pretrained import load_model
from lora_jax.models.load import as_stored, load_base
from lora_jax.models.pooling import SENTENCE_POOLINGS, sentence_pool
from lora_jax.models.save import save_model
from lora_jax.models.sentence_config import DenseStep, SentenceConfig, read_sentence
from lora_jax.train.losses import contrastive
from tests.models.golden import GOLDEN

HOME = GOLDEN / "sentence"
NAMES = ("qwen3_embedding", "embeddinggemma")
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}
ADAPTER = "adapter_model.safetensors"
by_model = pytest.mark.parametrize("name", NAMES)


@pytest.fixture
def copy(tmp_path):
    """Copies a golden folder, with changes of some of its JSON files."""

    def make(name, **changes):
        folder = Path(shutil.copytree(HOME / name, tmp_path / name))
        for file, change in changes.items():
            path = folder / f"{file.replace('__', '/')}.json"
            known = json.loads(path.read_text()) if path.is_file() else {}
            is_list = isinstance(known, list)
            path.write_text(json.dumps(change if is_list else known | change))
        return folder

    return make


def read(name):
    return dict(np.load(HOME / name / "reference.npz", allow_pickle=False))


def embeddings(loaded, name, **options):
    lines = [{"text": str(text)} for text in read(name)["texts"]]
    found = encode(loaded, lines, "data.jsonl", batch_size=3, **options).lines
    return np.array([line["embedding"] for line in found])


@by_model
def test_texts_have_the_embeddings_of_sentence_transformers(name):
    loaded, golden = load_base(HOME / name), read(name)
    np.testing.assert_allclose(
        embeddings(loaded, name), golden["embeddings"], **TOLERANCE
    )
    found = embeddings(loaded, name, prompt="query")
    np.testing.assert_allclose(found, golden["with_prompt"], **TOLERANCE)


@by_model
def test_an_adapter_of_peft_is_read_exported_and_merged(name, tmp_path):
    loaded, golden = (
        load_model(HOME / name, adapter=HOME / name / "peft_plain"),
        read(name),
    )
    found = embeddings(loaded, name)
    np.testing.assert_allclose(found, golden["with_adapter"], **TOLERANCE)

    for base in (loaded, HOME / name):
        variables, config = loaded.variables, loaded.module.config
        out = export_adapter(tmp_path / "peft", variables, config, base)
        written, original = (
            load_file(folder / ADAPTER) for folder in (out, HOME / name / "peft_plain")
        )
        assert written.keys() == original.keys()
        for key, tensor in original.items():
            np.testing.assert_allclose(written[key], tensor, rtol=1e-6)
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["task_type"] == "FEATURE_EXTRACTION"

    stored = as_stored(loaded)
    merged = stored.module.merge(stored.variables, check=False)
    save_model(tmp_path / "merged", merged, HOME / name)
    again = load_base(tmp_path / "merged")
    np.testing.assert_allclose(
        embeddings(again, name), golden["with_adapter"], **TOLERANCE
    )
    for file in (HOME / name).rglob("*.json"):
        if file.parent.name != "peft_plain" and file.parent != HOME / name:
            place = tmp_path / "merged" / file.relative_to(HOME / name)
            assert place.is_file() or "Dense" not in file.parent.name


def test_dense_layers_are_trained_when_named_and_written_to_their_folders(tmp_path):
    config = LoRAConfig(rank=2, alpha=3, train=["sentence_head/dense_1"])
    key = jax.random.key(0)
    loaded = load_model(HOME / "embeddinggemma", lora=config, key=key)
    assert not any("dense" in t.path for t in loaded.module.targets(loaded.params))
    ids = jnp.arange(3, 19).reshape(4, 4)

    @jax.jit
    def gradients(trained, frozen):
        def loss(trained):
            x = loaded.module.apply(
                trained | frozen, ids, jnp.ones_like(ids), method="encode"
            )
            total, weight = contrastive(x[:2], x[2:])
            return total / weight

        return jax.grad(loss)(trained)

    trained = {k: loaded.variables[k] for k in ("lora", "params")}
    found = gradients(trained, {"frozen": loaded.variables["frozen"]})
    dense = found["params"]["sentence_head"]["dense_1"]
    assert set(dense) == {"kernel", "bias"}
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(dense))
    b = [x for p, x in jax.tree.leaves_with_path(found["lora"]) if "lora_b" in str(p)]
    assert len(b) == 3 * 7
    assert all(jnp.abs(leaf).max() > 0 for leaf in b)

    params = jax.tree.map(lambda x: x, loaded.params)
    params["sentence_head"]["dense_1"]["bias"] += 1
    save_model(tmp_path / "out", params, HOME / "embeddinggemma")
    first, second = (
        load_file(tmp_path / "out" / f"{n}_Dense" / "model.safetensors") for n in (2, 3)
    )
    original = load_file(HOME / "embeddinggemma" / "3_Dense" / "model.safetensors")
    assert first.keys() == {"linear.weight"}
    np.testing.assert_allclose(second["linear.bias"], original["linear.bias"] + 1)


@pytest.mark.parametrize("mode", SENTENCE_POOLINGS)
def test_poolings_are_those_of_sentence_transformers(mode):
    golden = np.load(HOME / "poolings.npz")
    hidden, mask = jnp.asarray(golden["hidden"]), jnp.asarray(golden["mask"])
    found = sentence_pool(hidden, mask, mode)
    np.testing.assert_allclose(found, golden[mode], rtol=1e-5, atol=1e-6)


def test_the_flags_of_older_versions_and_two_poolings_are_read(copy):
    flags = {
        "pooling_mode": None,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_cls_token": True,
        "pooling_mode_max_tokens": False,
    }
    bert = {"max_seq_length": 7, "do_lower_case": True}
    folder = copy(
        "qwen3_embedding", **{"1_Pooling__config": flags, "sentence_bert_config": bert}
    )
    found = read_sentence(folder)
    assert (found.poolings, found.steps) == (("cls", "mean"), ("normalize",))
    assert (found.max_length, found.is_lower_case) == (7, True)
    loaded = load_base(folder)
    upper, lower = (
        encode(loaded, [{"text": text}], "data.jsonl").lines[0]["embedding"]
        for text in ("W3 W4", "w3 w4")
    )
    assert upper == lower
    assert len(lower) == 2 * 20


def test_an_encoders_folder_says_its_embedding_unless_a_pooling_is_given(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "bert", tmp_path / "bert"))
    tensors = load_file(folder / "model.safetensors")
    bare = {n: t for n, t in tensors.items() if not n.startswith("classifier")}
    save_file(bare, folder / "model.safetensors")
    ids = jnp.arange(1, 9).reshape(2, 4)
    mask = jnp.array([[1, 1, 1, 1], [1, 1, 0, 0]])

    def embed(**options):
        loaded = load_base(folder, **options)
        run = jax.jit(lambda v: loaded.module.apply(v, ids, mask, method="embed"))
        return np.asarray(run(loaded.variables)), loaded

    plain, loaded = embed()
    assert loaded.sentence is None
    modules = ["Transformer", "Pooling", "Normalize"]
    listed = [
        {"type": f"sentence_transformers.models.{kind}", "path": "1_P" * (i == 1)}
        for i, kind in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_P").mkdir()
    (folder / "1_P" / "config.json").write_text(json.dumps({"pooling_mode": "mean"}))
    unit, loaded = embed()
    assert loaded.sentence == SentenceConfig(steps=("normalize",))
    length = np.linalg.norm(plain, axis=1, keepdims=True)
    np.testing.assert_allclose(unit, plain / length, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        jax.jit(loaded.module.apply)(loaded.variables, ids, mask), unit
    )
    again, loaded = embed(pooling="mean")
    assert loaded.sentence is None
    np.testing.assert_array_equal(again, plain)


def test_faults_of_a_folder_are_told_at_once(copy):
    listed = [
        {"type": "a.Transformer", "path": ""},
        {"type": "a.Pooling", "path": "1_Pooling"},
        {"type": "a.LSTM", "path": "2_Dense"},
        {"type": "a.Dense", "path": "3_Dense"},
        {"type": "a.Normalize", "path": "../../etc"},
    ]
    folder = copy(
        "embeddinggemma",
        **{
            "modules": listed,
            "1_Pooling__config": {"pooling_mode": "median", "include_prompt": False},
            "3_Dense__config": {"activation_function": "torch.nn.Mish"},
            "config_sentence_transformers": {"default_prompt_name": "none"},
            "sentence_bert_config": {"max_seq_length": 0},
        },
    )
    with pytest.raises(ValueError, match="doesn't describe embeddings") as caught:
        load_base(folder)
    for message in (
        "a path in the folder; got {'type': 'a.Normalize', 'path': '../../etc'}",
        "include_prompt must be true",
        "pooling_mode must be of ('cls', 'max', 'mean'",
        "got ['median']",
        "module 2 must be a Transformer, then one Pooling, then any of Dense, "
        "Normalize and Dropout; got LSTM",
        "activation_function must be one of ['GELU', 'Identity'",
        "default_prompt_name must be one of ['document', 'query']; got 'none'",
        "max_seq_length must be at least 1; got 0",
    ):
        assert message in str(caught.value)


def test_pickled_dense_layers_and_unknown_prompts_are_refused(copy):
    folder = copy("embeddinggemma")
    loaded = load_base(folder)
    with pytest.raises(UserError, match=r"prompt must be one of .*'query'.*got 'q'"):
        embeddings(loaded, "embeddinggemma", prompt="q")
    with pytest.raises(UserError, match=r"has no prompts; got 'q'"):
        encode(load_base(GOLDEN / "bert"), [{"input_ids": [1]}], "d", prompt="q")
    file = folder / "2_Dense" / "model.safetensors"
    file.rename(file.with_name("pytorch_model.bin"))
    with pytest.raises(FileNotFoundError, match=r"Pickled weights .* not supported"):
        load_base(folder)
    assert (
        DenseStep("2_Dense", 27, has_bias=False, activation=None)
        == (loaded.sentence.denses[0])
    )


def test_a_model_that_scores_pairs_makes_no_embeddings(copy):
    listed = [{"type": "a.Transformer", "path": ""}, {"type": "a.LogitScore"}]
    tied = {"tie_word_embeddings": True}
    loaded = load_base(copy("qwen3_embedding", modules=listed, config=tied))
    assert loaded.sentence is None
    with pytest.raises(ValueError, match=r"folder needs a modules\.json"):
        loaded.module.apply(
            loaded.variables, *[jnp.ones((1, 2), int)] * 2, method="encode"
        )


def test_scanned_layers_read_both_sides_within_windows_and_no_padding():
    loaded = load_base(HOME / "embeddinggemma", scan_layers=True)
    assert loaded.config.layer_windows == (3, 3, None)
    ids = jnp.asarray(np.random.default_rng(0).integers(3, 43, (1, 12)))
    run = jax.jit(lambda v, *x: loaded.module.apply(v, *x, method="encode"))
    alone = run(loaded.variables, ids[:, :9], jnp.ones((1, 9), int))
    mask = jnp.asarray([[1] * 9 + [0] * 3])
    padded = run(loaded.variables, ids, mask)
    np.testing.assert_allclose(padded, alone, **TOLERANCE)
    last = run(loaded.variables, ids.at[0, 8].set(5), mask)
    assert jnp.abs(last - alone).max() > 1e-3
    with pytest.raises(ValueError, match="is_causal must be True to generate"):
        loaded.module.apply(loaded.variables, ids, 20, method="prefill")
