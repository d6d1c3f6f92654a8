"""Loading is strict, and says everything that is wrong at once."""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments import fetch
from experiments.vader import load_vader
from lora_jax.config import LoRAConfig
from lora_jax.files.adapter import save_adapter
from lora_jax.files.arrays import empty_aligned
from lora_jax.interop.pretrained import load_model
from lora_jax.models.families import FAMILIES
from lora_jax.models.families.bert import read_config
from lora_jax.models.load import param_shapes
from lora_jax.tree.fingerprint import fingerprint
from lora_jax.tree.paths import flatten

GOLDEN = Path(__file__).parents[1] / "golden" / "bert"


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(GOLDEN, tmp_path / "bert"))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {k: v for k, v in config.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))


def equal(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_kernels_are_transposed_and_every_leaf_is_an_array_of_the_file():
    loaded = load_model(GOLDEN)
    tensors = load_file(GOLDEN / "model.safetensors")
    query = loaded.params["encoder"]["layer_1"]["attention"]["query"]
    name = "bert.encoder.layer.1.attention.self.query"
    assert (query["kernel"] == tensors[f"{name}.weight"].T).all()
    assert (query["bias"] == tensors[f"{name}.bias"]).all()
    assert loaded.path == GOLDEN
    assert loaded.tokenizer is None
    assert loaded.new == loaded.unused == ()
    assert len(jax.tree.leaves(loaded.params)) == len(tensors)


def test_bare_names_and_old_layer_norm_words_load_the_same(folder):
    def rename(tensors):
        renamed = {k.removeprefix("bert."): v for k, v in tensors.items()}
        return {
            k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): v
            for k, v in renamed.items()
        }

    edit_tensors(folder, rename)
    assert equal(load_model(folder).params, load_model(GOLDEN).params)


def test_shards_load_like_one_file(folder):
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({n: tensors[n] for n in part}, folder / file)
    (folder / "model.safetensors").unlink()
    weight_map = {n: file for file, part in shards.items() for n in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert equal(load_model(folder).params, load_model(GOLDEN).params)


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16], ids=["own", "bfloat16"])
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_read_some_rows_at_a_time_it_is_the_same_model(name, dtype, monkeypatch):
    whole = load_model(GOLDEN.parent / name, param_dtype=dtype).params
    monkeypatch.setattr("lora_jax.files.safetensors.PIECE", 100)
    assert equal(load_model(GOLDEN.parent / name, param_dtype=dtype).params, whole)


def test_layers_read_into_one_array_are_the_layers(monkeypatch):
    monkeypatch.setattr("lora_jax.files.safetensors.PIECE", 100)
    folder = GOLDEN.parent / "llama"
    stacked = load_model(folder, scan_layers=True, param_dtype=jnp.bfloat16).params
    single = load_model(folder).params["layer_1"]
    second = jax.tree.map(lambda a: a[1], stacked["layers"])
    assert equal(second, jax.tree.map(lambda a: a.astype(jnp.bfloat16), single))


def test_on_cpu_a_model_is_not_copied_after_it_was_read(monkeypatch):
    filled = set()

    def watched(shape, dtype):
        array = empty_aligned(shape, dtype)
        filled.add(array.ctypes.data)
        return array

    monkeypatch.setattr("lora_jax.models.load.empty_aligned", watched)
    leaves = jax.tree.leaves(load_model(GOLDEN).params)
    assert {leaf.unsafe_buffer_pointer() for leaf in leaves} == filled


def test_a_float64_file_loads_as_the_float32_that_jax_computes_in(folder):
    edit_tensors(folder, lambda t: {k: v.astype("f8") for k, v in t.items()})
    assert equal(load_model(folder).params, load_model(GOLDEN).params)


def test_a_bfloat16_file_stays_bfloat16(folder):
    edit_tensors(folder, lambda t: {k: v.astype(jnp.bfloat16) for k, v in t.items()})
    params = load_model(folder).params
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


def test_one_error_lists_missing_unexpected_mis_shaped_and_not_finite(folder):
    def spoil(tensors):
        del tensors["bert.embeddings.LayerNorm.bias"]
        tensors["bert.encoder.layer.2.output.dense.bias"] = np.zeros(21, np.float32)
        name = "bert.encoder.layer.0.intermediate.dense.weight"
        tensors[name] = np.zeros((21, 37), np.float32)
        tensors["bert.encoder.layer.0.output.dense.bias"][3:5] = np.nan
        tensors["bert.encoder.layer.1.output.dense.bias"] = np.zeros(21, np.int32)

    edit_tensors(folder, spoil)
    with pytest.raises(ValueError, match=r"5 faults in .*nothing was loaded") as error:
        load_model(folder)
    message = str(error.value)
    assert "missing: embeddings.LayerNorm.bias" in message
    assert "unexpected: bert.encoder.layer.2.output.dense.bias [21]" in message
    assert "layer.0.intermediate.dense.weight must be [37, 21]; got [21, 37]" in message
    assert "not finite: bert.encoder.layer.0.output.dense.bias, 2 of 21" in message
    assert "layer.1.output.dense.bias must be floats; got int32" in message


def test_a_tied_decoders_second_copy_of_its_embedding_is_one_or_an_error(tmp_path):
    folder = Path(shutil.copytree(GOLDEN.parent / "qwen2", tmp_path / "qwen2"))
    wanted, embed = load_model(folder), "model.embed_tokens.weight"
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t[embed].copy()}))
    found = load_model(folder)
    assert found.unused == ("lm_head.weight",)
    assert equal(found.params, wanted.params)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": 2 * t[embed]}))
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_"):
        load_model(folder)
    edit_config(folder, tie_word_embeddings=False)
    head = load_model(folder).params["head"]["kernel"]
    np.testing.assert_array_equal(head, 2 * wanted.params["embed"]["embedding"].T)
    edit_config(folder, tie_word_embeddings=True)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t[embed][1:]}))
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_"):
        load_model(folder)


def test_a_tensor_under_two_names_is_an_error(folder):
    def double(tensors):
        tensors["embeddings.LayerNorm.bias"] = np.zeros(21, np.float32)

    edit_tensors(folder, double)
    with pytest.raises(
        ValueError,
        match=r"both bert.embeddings.LayerNorm.bias and embeddings.LayerNorm.bias",
    ):
        load_model(folder)


@pytest.mark.parametrize("keep", [4, 100, 40_000], ids=lambda n: f"{n}_bytes")
def test_a_truncated_file_is_called_damaged(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=rf"\({keep} bytes\).*truncated"):
        load_model(folder)


def test_an_unknown_model_type_lists_the_known_ones(folder):
    edit_config(folder, model_type="mamba")
    with pytest.raises(
        ValueError, match=r"one of \['bert', .*'smollm3'.*; got 'mamba'"
    ):
        load_model(folder)
    edit_config(folder, model_type=None)
    with pytest.raises(ValueError, match=r"'smollm3'.*; got None"):
        load_model(folder)


def test_unbounded_sizes_in_a_config_are_named(folder):
    edit_config(folder, vocab_size=10**15, num_hidden_layers=10**12)
    with pytest.raises(
        ValueError, match=r"num_hidden_layers must be at most 1000;"
    ) as e:
        load_model(folder)
    assert f"vocab_size must be at most {2**24}; got {10**15}" in str(e.value)


def test_a_model_type_that_is_not_a_name_is_shown(folder):
    edit_config(folder, model_type={"a": 1})
    with pytest.raises(
        ValueError, match=r"model_type must be one of .* got \{'a': 1\}"
    ):
        load_model(folder)


def test_a_config_that_is_missing_or_not_json_is_named(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json must be JSON"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"it has no config.json"):
        load_model(folder)


def test_a_config_of_another_bert_names_every_key():
    config = {"is_decoder": True, "position_embedding_type": "relative_key"}
    with pytest.raises(ValueError, match="vocab_size is missing") as error:
        read_config(config)
    for text in (
        "intermediate_size is missing",
        "is_decoder must be False here; got True",
        "position_embedding_type must be 'absolute' here; got 'relative_key'",
    ):
        assert text in str(error.value)


def test_the_files_head_is_used_for_its_pooling_and_number_of_labels():
    loaded = load_model(GOLDEN)
    assert (loaded.module.num_labels, loaded.module.pooling) == (4, "pooler")
    other = load_model(GOLDEN, num_labels=4, pooling="mean")
    assert other.new == ("classifier/bias", "classifier/kernel")
    assert "classifier.weight" in other.unused
    assert not other.params["classifier"]["kernel"].any()
    fewer = load_model(GOLDEN, num_labels=2)
    assert fewer.params["classifier"]["kernel"].shape == (21, 2)
    assert load_model(GOLDEN, pooling="cls").module.num_labels is None


def test_a_key_draws_a_new_head_and_the_same_key_the_same():
    first, same, other = (
        load_model(GOLDEN, num_labels=2, key=jax.random.key(seed)).params["classifier"]
        for seed in (0, 0, 1)
    )
    assert (first["kernel"] == same["kernel"]).all()
    assert not (first["kernel"] == other["kernel"]).any()
    assert 0.01 < float(first["kernel"].std()) < 0.03
    assert not first["bias"].any()


def test_every_parameter_has_its_own_tensor_name():
    loaded = load_model(GOLDEN)
    bert = FAMILIES["bert"]
    names = [bert.tensor_name(p) for p in param_shapes(bert, loaded.module)]
    assert len(set(names)) == len(names)
    with pytest.raises(ValueError, match=r"encoder/typo/kernel"):
        bert.tensor_name("encoder/typo/kernel")


@pytest.fixture(scope="module")
def minilm():
    try:
        return load_model(fetch.minilm())
    except fetch.FetchError as error:
        pytest.skip(f"real weights can't be fetched: {error}")


@pytest.mark.real
@pytest.mark.parametrize(
    ("end", "cosine"), [(".", 0.75534), ("", 0.73785)], ids=["stops", "no_stops"]
)
def test_minilm_gives_the_cosine_that_transformers_gives(minilm, end, cosine):
    # Expected values: transformers 5.23.0 and torch 2.13.0 on the same files.
    texts = [f"A man is eating food{end}", f"A man is eating a piece of bread{end}"]
    ids, truncated = minilm.tokenizer.encode(texts)
    assert truncated == 0
    length = max(map(len, ids))
    batch = jnp.array([x + [0] * (length - len(x)) for x in ids])
    mask = jnp.array([[1] * len(x) + [0] * (length - len(x)) for x in ids])
    variables = {"params": minilm.params}
    embed = jax.jit(functools.partial(minilm.module.apply, method="embed"))
    a, b = embed(variables, batch, mask)
    got = a @ b / jnp.linalg.norm(a) / jnp.linalg.norm(b)
    assert float(got) == pytest.approx(cosine, abs=2e-5)


@pytest.mark.real
def test_minilm_has_its_known_size_and_leaves_only_the_pooler(minilm):
    sizes = sum(p.size for p in jax.tree.leaves(minilm.params))
    assert sizes == 22_713_216 - 384 * 385  # all of BertModel's but the pooler
    assert minilm.unused == (
        "embeddings.position_ids",
        "pooler.dense.bias",
        "pooler.dense.weight",
    )


@pytest.mark.real
def test_vader_movies_fit_the_models_positions(minilm):
    try:
        texts = [e["text"] for e in load_vader(seed=0).validation]
    except fetch.FetchError as error:
        pytest.skip(f"real data can't be fetched: {error}")
    ids, truncated = minilm.tokenizer.encode(texts, max_length=64)
    assert max(map(len, ids)) <= 64
    full, _ = minilm.tokenizer.encode(texts)
    assert truncated == sum(len(x) > 64 for x in full) > 0


HALF = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_what_is_trained_in_full_is_float32_on_a_bfloat16_base(name, tmp_path):
    folder = GOLDEN.parent / name
    head = {} if name == "llama" else {"num_labels": 2, "key": jax.random.key(0)}
    base = load_model(folder, **HALF, **head)
    assert all(
        leaf.dtype == (jnp.float32 if path.startswith("classifier") else jnp.bfloat16)
        for path, leaf in flatten(base.params).items()
    )
    lora = LoRAConfig(rank=2, train=r"(.*/)?\w*norm" + r"|classifier" * bool(head))
    loaded = load_model(folder, lora=lora, **HALF, **{"key": jax.random.key(0), **head})
    variables = loaded.variables
    leaves = jax.tree.leaves(variables["params"])
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    inputs = [jnp.ones(x.shape, x.dtype) for x in base.inputs]
    wanted = jax.jit(base.module.apply)(base.variables, *inputs)
    assert equal(jax.jit(loaded.module.apply)(variables, *inputs), wanted)

    moved = jax.tree.map(lambda leaf: leaf + 1e-3, variables["params"])
    variables = {**variables, "params": moved}
    save_adapter(tmp_path, variables, lora, fingerprint(variables["frozen"]))
    again = load_model(folder, adapter=tmp_path, **HALF, **head)
    assert equal(again.variables, variables)
    merged = loaded.module.merge(variables)
    apply = jax.jit(base.module.apply)
    got = jax.jit(loaded.module.apply)(variables, *inputs)
    assert equal(apply({"params": merged}, *inputs), got)
    assert not equal(got, wanted)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"num_key_value_heads": 3}, r": DecoderConfig: num_kv_heads must"),
        ("llama", {"hidden_act": "x"}, r": DecoderConfig: activation must"),
        ("bert", {"hidden_size": "x"}, r" doesn't fit a BERT encoder: hidden_size"),
    ],
)
def test_an_error_of_a_config_names_its_file(family, changes, message, tmp_path):
    folder = Path(shutil.copytree(GOLDEN.parent / family, tmp_path / "m"))
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=f"^{folder / 'config.json'}{message}"):
        load_model(folder)
