"""T5 and its kin against what transformers computes with the same tiny folders."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Literal
from safetensors.numpy import load_file, save_file

from lora_jax.interop.pretrained import load_model
from lora_jax.models.encoder_decoder import EncoderDecoder
from lora_jax.models.encoder_decoder_config import EncoderDecoderConfig
from lora_jax.models.families import FAMILIES
from lora_jax.models.families.t5 import read_t5
from lora_jax.models.generate import generate
from lora_jax.models.load import load_base, param_shapes
from lora_jax.models.save import save_model
from lora_jax.plan.flops import pair_step_flops, traced_flops
from lora_jax.train.causal_lm import make_lm_loss
from lora_jax.train.pairs import INPUTS
from lora_jax.tree.paths import flatten, unflatten
from tests.models.golden import GOLDEN

NAMES = ("t5", "t5_flan", "mt5", "umt5")
PLAIN = GOLDEN / "t5" / "peft_plain"
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}
every_model = pytest.mark.parametrize("name", NAMES)


@functools.cache
def loaded(name):
    return load_base(GOLDEN / name)


def golden(name):
    return dict(np.load(GOLDEN / name / "reference.npz", allow_pickle=False))


def batch_of(arrays):
    """A training step's batch; `-100` of Hugging Face is no target."""
    labels = arrays["labels"]
    return {
        **{key: jnp.int32(arrays[key]) for key in INPUTS},
        "labels": jnp.int32(np.where(labels < 0, 0, labels)),
        "weights": jnp.float32(labels >= 0),
    }


@pytest.fixture
def copy(tmp_path):
    """Copies T5's golden folder, with its tensors or config changed."""

    def make(tensors=dict, **config):
        folder = Path(shutil.copytree(GOLDEN / "t5", tmp_path / "t5"))
        file = folder / "model.safetensors"
        save_file(tensors(load_file(file)), file)
        settings = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(settings))
        return folder

    return make


@every_model
def test_hidden_states_loss_and_logits_are_those_of_transformers(name):
    model, want = loaded(name), golden(name)
    batch, scale = batch_of(want), model.config.logit_scale

    @jax.jit
    def run(variables):
        apply = functools.partial(model.module.apply, variables)
        inputs = [batch[key] for key in INPUTS]
        source = apply(*inputs[:2], method="read")
        hidden = apply(*inputs, method="hidden")
        return source, hidden, apply(*inputs), apply(hidden, method="logits")

    source, hidden, logits, again = run(model.variables)
    real = want["attention_mask"] == 1  # with padding on the right and on the left
    assert not real[1, -1]
    assert not real[2, 0]
    np.testing.assert_allclose(source[real], want["encoder_hidden"][real], **TOLERANCE)
    np.testing.assert_allclose(hidden / scale, want["decoder_hidden"], **TOLERANCE)
    np.testing.assert_allclose(logits, want["logits"], **TOLERANCE)
    np.testing.assert_array_equal(logits, again)
    loss = make_lm_loss(model.module, is_tied=model.config.is_tied, inputs=INPUTS)
    total, weight, _ = jax.jit(loss)(model.variables, batch, {})
    np.testing.assert_allclose(total / weight, want["loss"], rtol=1e-5)


@every_model
def test_a_cache_gives_the_greedy_answers_of_transformers(name):
    model, want = loaded(name), golden(name)
    prompts = [want[f"prompt_{i}"].tolist() for i in range(2)]
    answers = generate(model.module, model.variables, prompts, max_new_tokens=8)
    assert answers == [want[f"greedy_{i}"].tolist() for i in range(2)]


def test_a_cache_gives_the_hidden_states_of_the_whole_target():
    model, want = loaded("umt5"), golden("umt5")
    source, mask, target = (jnp.int32(want[key]) for key in INPUTS)

    @jax.jit
    def run(variables):
        apply = functools.partial(model.module.apply, variables)
        whole = apply(source, mask, target, method="hidden")
        first, cache = apply(source, mask, 16, method="prefill")
        rest, places = target[:, 1:], 1 + jnp.arange(target.shape[1] - 1)
        more, _ = apply(rest, places + 0 * rest, cache, method="decode")
        return jnp.concatenate([first, more], axis=1), whole

    np.testing.assert_allclose(*run(model.variables), **TOLERANCE)


def test_remat_changes_no_gradient_and_the_flops_are_those_traced():
    batch, full = batch_of(golden("umt5")), loaded("umt5")
    config = dataclasses.replace(full.config, num_layers=1, num_decoder_layers=1)
    flat = {p: leaf for p, leaf in flatten(full.params).items() if "layer_1" not in p}
    params, found = unflatten(flat), {}
    for remat in ("none", "lora"):
        module = EncoderDecoder(config, remat=remat)
        loss = make_lm_loss(module, is_tied=True, inputs=INPUTS)

        def total(params, loss=loss):
            return loss({"frozen": {}, "params": params}, batch, {})[0]

        step = jax.grad(total)
        found[remat] = jax.jit(step)(params)
        counted = traced_flops(jax.make_jaxpr(step)(params).jaxpr)
        shapes = *batch["input_ids"].shape, batch["labels"].shape[1]
        named = pair_step_flops(config, params, (), *shapes, remat).full
        assert counted == pytest.approx(named, rel=1e-6), remat
    same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(same, found["lora"], found["none"])


def test_every_adapter_of_both_stacks_gets_a_gradient():
    model, batch = load_model(GOLDEN / "t5", PLAIN), batch_of(golden("t5"))
    assert len(model.module.targets(model.params)) == 2 * 6 + 3 * 10
    loss = make_lm_loss(model.module, is_tied=True, inputs=INPUTS)

    def total(lora):
        return loss({**model.variables, "lora": lora}, batch, {})[0]

    traced = jax.make_jaxpr(jax.grad(total))(model.variables["lora"]).jaxpr
    made = {out: equation for equation in traced.eqns for out in equation.outvars}
    assert len(traced.outvars) == 2 * 42
    for leaf in traced.outvars:  # zeros, where the loss doesn't depend on it
        inputs = made[leaf].invars if leaf in made else [leaf]
        assert not all(isinstance(i, Literal) for i in inputs)


@every_model
def test_every_parameter_has_its_own_tensor_name(name):
    model, family = loaded(name), loaded(name).family
    names = [family.tensor_name(path) for path in param_shapes(family, model.module)]
    assert sorted(names) == sorted(load_file(GOLDEN / name / "model.safetensors"))


def test_an_encoder_alone_is_loaded_and_encodes(copy):
    def without_decoder(tensors):
        kept = {n: t for n, t in tensors.items() if not n.startswith("decoder")}
        return kept | {"encoder.embed_tokens.weight": kept.pop("shared.weight")}

    model = load_base(copy(without_decoder, architectures=["T5EncoderModel"]))
    want = golden("t5")
    inputs = [jnp.int32(want[key]) for key in INPUTS[:2]]
    hidden = jax.jit(model.module.apply)(model.variables, *inputs)
    real = want["attention_mask"] == 1
    np.testing.assert_allclose(hidden[real], want["encoder_hidden"][real], **TOLERANCE)
    encode = functools.partial(model.module.apply, method="encode")
    pooled = jax.jit(encode)(model.variables, *inputs)
    np.testing.assert_allclose(
        pooled[2], want["encoder_hidden"][2, real[2]].mean(axis=0), **TOLERANCE
    )
    with pytest.raises(ValueError, match="must have a decoder to write tokens"):
        generate(model.module, model.variables, [[4]], max_new_tokens=1)


def test_a_folder_of_sentence_transformers_pools_and_projects(copy):
    """As sentence-t5 does: mean, a dense layer, length 1; checked with NumPy."""
    folder, rng = copy(architectures=["T5EncoderModel"]), np.random.default_rng(0)
    file = folder / "model.safetensors"
    kept = {n: t for n, t in load_file(file).items() if not n.startswith("decoder")}
    save_file(kept, file)
    kinds = ("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense")
    listed = [
        {"path": path, "type": f"sentence_transformers.models.{kind}"}
        for path, kind in (*kinds, ("3_Normalize", "Normalize"))
    ]
    (folder / "modules.json").write_text(json.dumps(listed))
    sizes = {"in_features": 10, "out_features": 6, "bias": False}
    sizes["activation_function"] = "torch.nn.modules.linear.Identity"
    for name, settings in (("1_Pooling", {}), ("2_Dense", sizes)):
        (folder / name).mkdir()
        mean = {"pooling_mode_mean_tokens": True, "word_embedding_dimension": 10}
        (folder / name / "config.json").write_text(json.dumps(settings or mean))
    weight = rng.standard_normal((6, 10)).astype(np.float32)
    save_file({"linear.weight": weight}, folder / "2_Dense" / "model.safetensors")
    model, want = load_base(folder), golden("t5")
    inputs = [jnp.int32(want[key]) for key in INPUTS[:2]]
    encode = functools.partial(model.module.apply, method="encode")
    found = jax.jit(encode)(model.variables, *inputs)
    mask = want["attention_mask"][..., None]
    mean = (want["encoder_hidden"] * mask).sum(axis=1) / mask.sum(axis=1)
    projected = mean @ weight.T
    length = np.linalg.norm(projected, axis=1, keepdims=True)
    np.testing.assert_allclose(found, projected / length, **TOLERANCE)


def test_copies_of_the_embedding_must_be_equal_and_are_not_saved(copy, tmp_path):
    def doubled(tensors):
        table = tensors["shared.weight"]
        return tensors | {"decoder.embed_tokens.weight": 1 * table}

    folder = copy(doubled)
    model = load_base(folder)
    assert model.unused == ("decoder.embed_tokens.weight",)
    save_model(tmp_path / "out", model.params, folder)
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert saved.keys() == load_file(GOLDEN / "t5" / "model.safetensors").keys()
    shutil.rmtree(folder)
    folder = copy(lambda t: t | {"encoder.embed_tokens.weight": 2 * t["shared.weight"]})
    with pytest.raises(ValueError, match=r"encoder.embed_tokens.weight differs from s"):
        load_base(folder)


def test_a_head_of_its_own_is_kept_whatever_the_config_says(copy, tmp_path):
    folder = copy(lambda t: t | {"lm_head.weight": 2 * t["shared.weight"]})
    model = load_base(folder)
    assert not model.config.is_tied
    assert model.config.logit_scale == pytest.approx(10**-0.5)
    save_model(tmp_path / "out", model.params, folder)
    again = load_base(tmp_path / "out")
    assert again.config == model.config


def test_the_tokenizer_is_that_of_transformers():
    tokens = json.loads((GOLDEN / "t5" / "tokens.json").read_text())
    tokenizer = loaded("t5").tokenizer
    assert tokenizer.encode(tokens["texts"]).ids == tokens["ids"]
    assert [tokenizer.decode(ids) for ids in tokens["ids"]] == tokens["decoded"]
    assert tokenizer.special.eos_id == 1
    for text, ids in zip(tokens["texts"], tokens["ids"], strict=True):
        assert [*tokenizer.encode_text(text).ids, 1] == ids


def test_configs_say_how_the_head_is_scaled():
    settings = json.loads((GOLDEN / "t5" / "config.json").read_text())
    del settings["scale_decoder_outputs"], settings["tie_word_embeddings"]
    scale = 10**-0.5
    assert read_t5(settings).logit_scale == pytest.approx(scale)
    assert read_t5(settings | {"tie_word_embeddings": False}).logit_scale == 1
    both = {"tie_word_embeddings": False, "scale_decoder_outputs": True}
    assert read_t5(settings | both).logit_scale == pytest.approx(scale)
    assert FAMILIES["mt5"].read_config(settings | both).logit_scale == 1
    old = {key: settings[key] for key in ("vocab_size", "d_model", "d_kv", "d_ff")}
    old |= {"num_layers": 2, "num_heads": 4}
    config = read_t5(old)
    assert (config.num_decoder_layers, config.activation, config.start_id) == (
        *(2, "relu"),
        0,
    )


def test_bad_configs_name_every_fault():
    wrong = {"num_layers": 2, "feed_forward_proj": "wide-gelu", "d_model": "x"}
    with pytest.raises(ValueError, match="T5 encoder–decoder: d_model must be") as e:
        read_t5(wrong)
    wanted = "feed_forward_proj must be an activation's name or 'gated-' and one"
    for fault in ("vocab_size is missing", "d_kv is missing", wanted):
        assert fault in str(e.value)
    sizes: dict[str, Any] = {"vocab_size": 9, "hidden_size": 4, "num_heads": 1}
    sizes |= {"num_layers": 1, "num_decoder_layers": 1, "mlp_size": 3, "head_dim": 2}
    with pytest.raises(ValueError, match=r"activation must be .* got 'x'; norm_eps mu"):
        EncoderDecoderConfig(**sizes, activation="x", norm_eps=-1.0)
    with pytest.raises(ValueError, match="num_buckets must be even; got 7"):
        EncoderDecoderConfig(**sizes, num_buckets=7)
    with pytest.raises(ValueError, match=r"max_distance must be above .* = 16; got 9"):
        EncoderDecoderConfig(**sizes, max_distance=9)
    with pytest.raises(
        ValueError, match="start_id must be below vocab_size = 9; got 9"
    ):
        EncoderDecoderConfig(**sizes, start_id=9)


def test_a_target_must_be_given():
    model = loaded("t5")
    ids = jnp.ones((1, 2), jnp.int32)
    with pytest.raises(
        ValueError, match=r"decoder_input_ids must be the target's .* 0"
    ):
        model.module.apply(model.variables, ids, ids)
    with pytest.raises(ValueError, match="attention_mask must share one shape"):
        model.module.apply(model.variables, ids, ids[:, :1], ids)
