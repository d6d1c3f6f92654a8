"""Every family against what transformers computes with the same tiny folder."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import LoRAConfig
from lora_jax.attention.causal import causal_attention
from lora_jax.models.decoder import REMATS
from lora_jax.models.families import FAMILIES
from lora_jax.models.load import load_base, param_shapes
from lora_jax.models.stacking import can_scan
from lora_jax.train.causal_lm import make_lm_loss
from tests.models.golden import GOLDEN

DECODERS = (
    *("llama", "llama3", "mistral", "qwen2", "qwen3", "smollm3"),
    *("gemma2", "gemma3", "phi3", "phi3_partial", "olmo2", "gpt2"),
    *("gemma3_tower", "mistral3", "qwen2_5_vl", "qwen3_vl"),
    *("olmo3", "ministral3", "glm4", "granite", "cohere2"),
    *("gemma4", "gemma4_tower"),
)
# The layers of some differ in shape; of others, all are alike and nothing is new.
UNROLLED = (
    *("gemma4", "gemma4_tower", "mistral3", "qwen2_5_vl", "qwen3_vl"),
    *("ministral3", "glm4", "granite"),
)
LAYOUTS = [
    *((name, False) for name in DECODERS),
    *((name, True) for name in DECODERS if name not in UNROLLED),
]
ENCODERS = (
    *("roberta", "xlm-roberta", "electra", "mpnet", "distilbert"),
    *("modernbert", "modernbert_bias", "deberta", "deberta_conv"),
    *("vit", "dinov2", "dinov2_gated"),
)
OLD_CONFIGS = (
    *("llama3", "qwen2", "smollm3", "gemma3", "phi3_partial"),
    *("gemma3_tower", "qwen2_5_vl", "olmo3", "glm4", "granite", "cohere2"),
    "gemma4",
)
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}


def read(name, file="reference.npz"):
    return dict(np.load(GOLDEN / name / file, allow_pickle=False))


def inputs(arrays):
    """The arguments of an encoder's call."""
    if "pixel_values" in arrays:
        return (jnp.asarray(arrays["pixel_values"]),)
    return tuple(jnp.int32(arrays[name]) for name in ("input_ids", "attention_mask"))


def settings_of(name, file="config.json"):
    return json.loads((GOLDEN / name / file).read_text())


@pytest.mark.parametrize(("name", "scan_layers"), LAYOUTS)
def test_a_decoder_gives_the_logits_of_transformers(name, scan_layers):
    loaded, golden = load_base(GOLDEN / name, scan_layers=scan_layers), read(name)
    assert ("layers" in loaded.params) == scan_layers
    logits = jax.jit(loaded.module.apply)(
        loaded.variables, jnp.int32(golden["input_ids"])
    )
    np.testing.assert_allclose(logits, golden["logits"], **TOLERANCE)


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_gives_the_hidden_states_and_logits_of_transformers(name):
    loaded, golden = load_base(GOLDEN / name), read(name)

    def both(module, *arguments):
        return module.encoder(*arguments), module(*arguments)

    @jax.jit
    def run(variables, *arguments):
        return loaded.module.apply(variables, *arguments, method=both)

    hidden, logits = run(loaded.variables, *inputs(golden))
    np.testing.assert_allclose(logits, golden["logits"], **TOLERANCE)
    if "last_hidden_state" in golden:
        want = golden["last_hidden_state"]
        cfg = loaded.config
        if any(cfg.layer_windows) or cfg.disentangled:  # what padding sees differs
            real = golden["attention_mask"] == 1
            hidden, want = hidden[real], want[real]
        np.testing.assert_allclose(hidden, want, **TOLERANCE)


@pytest.mark.parametrize("name", OLD_CONFIGS)
def test_the_keys_of_transformers_4_give_the_same_config(name):
    new, old = settings_of(name), settings_of(name, "config_v4.json")
    assert old.keys() != new.keys()
    read_config = FAMILIES[new["model_type"]].read_config
    assert read_config(old) == read_config(new)


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_every_parameter_has_its_own_tensor_name(name):
    loaded = load_base(GOLDEN / name)
    family = FAMILIES[settings_of(name)["model_type"]]
    names = [family.tensor_name(path) for path in param_shapes(family, loaded.module)]
    assert len(set(names)) == len(names)
    assert [family.bare_name(family.prefix + name) for name in names] == names


def test_layers_of_different_shapes_share_keys_under_remat_and_are_not_scanned():
    with pytest.raises(ValueError, match=r"scan_layers must be False .* got True"):
        load_base(GOLDEN / "gemma4", scan_layers=True)
    loaded, golden = load_base(GOLDEN / "gemma4", remat="block"), read("gemma4")
    assert not can_scan(LoRAConfig(), loaded.config)

    def loss(params):
        logits = loaded.module.apply({"params": params}, golden["input_ids"])
        return jnp.sum(jnp.sin(logits)), logits

    gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(loaded.params)
    np.testing.assert_allclose(logits, golden["logits"], **TOLERANCE)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_the_training_loss_is_that_of_scaled_logits():
    loaded, golden = load_base(GOLDEN / "granite"), read("granite")
    labels = np.roll(golden["input_ids"], -1, axis=1)
    batch = {
        "input_ids": jnp.int32(golden["input_ids"]),
        "labels": jnp.int32(labels),
        "weights": jnp.ones(labels.shape),
    }
    loss = make_lm_loss(loaded.module, is_tied=loaded.config.is_tied)
    total, weight, _ = jax.jit(loss)(loaded.variables, batch, {})
    logits = golden["logits"].astype(np.float64)
    own = np.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    want = np.log(np.exp(logits).sum(axis=-1)) - own
    np.testing.assert_allclose(total / weight, want.mean(), rtol=1e-5)


@pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
def test_remat_changes_neither_logits_nor_gradients(scan_layers):
    golden, results, products = read("llama"), {}, {}
    for remat in REMATS:
        loaded = load_base(GOLDEN / "llama", scan_layers=scan_layers, remat=remat)

        def loss(params, ids, module=loaded.module):
            logits = module.apply({"params": params}, ids)
            return jnp.mean(jnp.sin(logits)), logits

        gradient = jax.grad(loss, has_aux=True)
        arguments = loaded.params, jnp.int32(golden["input_ids"])
        text = str(jax.make_jaxpr(gradient)(*arguments))
        products[remat] = text.count(" dot_general[")
        results[remat], logits = jax.jit(gradient)(*arguments)
        np.testing.assert_allclose(logits, golden["logits"], **TOLERANCE)
    for remat in ("lora", "block"):
        pairs = zip(
            *map(jax.tree.leaves, (results[remat], results["none"])), strict=True
        )
        for got, want in pairs:
            largest = np.abs(want).max()
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * largest)
    # "lora" does no product twice; "block" all of a block's but the last.
    blocks = 1 if scan_layers else loaded.config.num_layers
    assert products["lora"] == products["none"]
    assert products["block"] == products["none"] + blocks * (6 + 2)


@pytest.mark.parametrize("remat", REMATS)
def test_unrolled_layers_leave_out_what_their_window_does(remat, monkeypatch):
    windows = []

    def watched(*arrays, window, **options):
        windows.append(window)
        return causal_attention(*arrays, window=window, **options)

    monkeypatch.setattr("lora_jax.models.decoder_block.causal_attention", watched)
    loaded, golden = load_base(GOLDEN / "gemma3", remat=remat), read("gemma3")
    logits = jax.jit(loaded.module.apply)(
        loaded.variables, jnp.int32(golden["input_ids"])
    )
    assert all(window is None or isinstance(window, int) for window in windows)
    assert set(windows) == {5, None}
    np.testing.assert_allclose(logits, golden["logits"], **TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "dinov2", "roberta"])
def test_bfloat16_computes_in_bfloat16(name):
    loaded, golden = load_base(GOLDEN / name, dtype=jnp.bfloat16), read(name)
    arguments = inputs(golden) if "last_hidden_state" in golden else ()
    arguments = arguments or (jnp.int32(golden["input_ids"]),)
    logits = jax.jit(loaded.module.apply)(loaded.variables, *arguments)
    assert logits.dtype == jnp.float32
    assert {p.dtype for p in jax.tree.leaves(loaded.params)} == {jnp.dtype("float32")}
    want = golden["logits"]
    error = np.abs(logits - want)
    assert error.max() > 1e-4  # it is not float32 after all
    assert error.mean() < 2e-2 * np.abs(want).mean()


@pytest.mark.usefixtures("unchecked")
def test_tokens_of_a_wrong_kind_are_named():
    module = load_base(GOLDEN / "llama").module
    ids, longest = jnp.ones((2, 3), jnp.int32), module.config.max_positions

    def trace(*arrays, **options):
        jax.eval_shape(lambda: module.init(jax.random.key(0), *arrays, **options))

    with pytest.raises(TypeError, match=r"input_ids must be integers.*float32"):
        trace(ids.astype(jnp.float32))
    with pytest.raises(ValueError, match=r"\(2, 3\), segment_ids \(2, 2\)"):
        trace(ids, segment_ids=ids[:, :2])
    with pytest.raises(ValueError, match="batch dimension"):
        trace(ids[0])
    with pytest.raises(ValueError, match=rf"max_positions = {longest} .*\(1, "):
        trace(jnp.ones((1, longest + 1), jnp.int32))
