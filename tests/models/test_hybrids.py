"""Hybrids against what transformers computes with the same tiny folder."""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.config import LoRAConfig
from lora_jax.interop.export import export_adapter
from lora_jax.interop.pretrained import load_model
from lora_jax.models.families import FAMILIES
from lora_jax.models.generate import generate
from lora_jax.models.load import load_base, param_shapes
from lora_jax.models.save import save_model
from lora_jax.models.stacking import can_scan, unscan
from lora_jax.nn.adapt import adapt
from lora_jax.tree.paths import flatten
from tests.models.golden import GOLDEN

ALONE = ("qwen3_5_text", "qwen3_5_moe_text", "lfm2")
HYBRIDS = (*ALONE, "qwen3_5", "qwen3_5_moe")
TOLERANCE = {"rtol": 1e-5, "atol": 6e-5}  # transformers has the state in float32


def read(name, file="reference.npz"):
    return dict(np.load(GOLDEN / name / file, allow_pickle=False))


@functools.cache
def model(name, **options):
    return load_base(GOLDEN / name, **options)


@functools.cache
def logits_function(name, **options):
    return jax.jit(model(name, **options).module.apply)


@pytest.mark.parametrize(
    ("name", "options"),
    [*((name, {}) for name in HYBRIDS), ("qwen3_5_text", {"scan_layers": True})],
)
def test_logits_are_those_of_transformers(name, options):
    golden, loaded = read(name), model(name, **options)
    assert ("layers" in loaded.params) == bool(options)
    logits = logits_function(name, **options)(loaded.variables, golden["input_ids"])
    np.testing.assert_allclose(logits, golden["logits"], **TOLERANCE)


def test_layers_are_scanned_by_what_repeats():
    loaded, golden = model("qwen3_5_text", scan_layers=True), read("qwen3_5_text")
    assert set(loaded.params["layers"]) == {"0_of_2", "1_of_2"}
    assert (loaded.config.scan_period, model("lfm2").config.scan_period) == (2, None)
    with pytest.raises(ValueError, match=r"differ in shape and don't repeat; got True"):
        load_base(GOLDEN / "lfm2", scan_layers=True)
    assert can_scan(LoRAConfig(targets=["qkv", "attention/query"]), loaded.config)
    one = LoRAConfig(targets=["layer_2/delta_net/qkv"])
    assert not can_scan(one, loaded.config)
    prompts = [golden[f"prompt_{i}"].tolist() for i in range(2)]
    greedy = [golden[f"greedy_{i}"].tolist() for i in range(2)]
    found = generate(loaded.module, loaded.variables, prompts, max_new_tokens=8)
    assert found == greedy
    for path, leaf in flatten(unscan(loaded).params).items():
        assert np.array_equal(leaf, flatten(model("qwen3_5_text").params)[path]), path


@pytest.mark.parametrize("name", HYBRIDS)
def test_every_parameter_has_its_own_tensor_name(name):
    family = model(name).family
    shapes = param_shapes(family, model(name).module)
    names = [family.tensor_name(path) for path in shapes]
    assert len(set(names)) == len(names)
    assert [family.bare_name(family.prefix + name) for name in names] == names


@pytest.mark.parametrize("name", ALONE)
def test_cached_generation_is_that_of_transformers_in_one_padded_batch(name):
    loaded, golden = model(name), read(name)
    prompts = [golden[f"prompt_{i}"].tolist() for i in range(2)]
    assert len(prompts[0]) != len(prompts[1])
    found = generate(loaded.module, loaded.variables, prompts, max_new_tokens=8)
    assert found == [golden[f"greedy_{i}"].tolist() for i in range(2)]


@pytest.mark.parametrize("name", ["qwen3_5_moe_text", "lfm2"])
def test_reading_in_parts_gives_the_logits_of_the_whole(name):
    loaded, golden = model(name), read(name)
    ids, variables = jnp.asarray(golden["input_ids"]), loaded.variables
    lengths = jnp.array([3, 5, 4])  # the rest of each prompt is padding

    @jax.jit
    def prefill(variables):
        return loaded.module.apply(
            variables, ids[:, :6], 16, lengths=lengths, method="prefill"
        )

    @functools.partial(jax.jit, static_argnums=3)
    def decode(variables, at, cache, width):
        places = at[:, None] + jnp.arange(width)
        new = jnp.take_along_axis(ids, places, axis=1)
        hidden, cache = loaded.module.apply(
            variables, new, places, cache, method="decode"
        )
        return loaded.module.apply(variables, hidden, method="logits"), cache

    _, cache = prefill(variables)
    for done, width in ((0, 5), (5, 1), (6, 1)):
        at = lengths + done
        logits, cache = decode(variables, at, cache, width)
        for row, start in enumerate(at.tolist()):
            want = golden["logits"][row, start : start + width]
            np.testing.assert_allclose(logits[row], want, rtol=1e-4, atol=2e-4)


def test_padding_on_the_left_is_an_example_of_its_own():
    name, golden = "qwen3_5_text", read("qwen3_5_text", "padded.npz")
    mask = golden["attention_mask"]
    logits = logits_function(name)(
        model(name).variables,
        golden["input_ids"],
        golden["position_ids"],
        jnp.asarray(mask),
    )
    want = golden["logits"]
    np.testing.assert_allclose(logits[mask == 1], want[mask == 1], **TOLERANCE)


@pytest.mark.parametrize("name", ["qwen3_5_text", "lfm2"])
def test_packed_examples_do_not_see_each_other(name):
    golden = read(name)
    ids, sizes = golden["input_ids"], (2, 7, 4)
    parts = [ids[row, :size] for row, size in enumerate(sizes)]
    packed = jnp.concatenate(parts)[None]
    positions = jnp.concatenate([jnp.arange(size) for size in sizes])[None]
    segments = jnp.repeat(jnp.array([4, 1, 2]), jnp.array(sizes))[None]
    logits = logits_function(name)(model(name).variables, packed, positions, segments)
    want = [golden["logits"][row, :size] for row, size in enumerate(sizes)]
    np.testing.assert_allclose(logits[0], np.concatenate(want), **TOLERANCE)


@pytest.mark.parametrize(
    ("name", "other", "options"),
    [("qwen3_5_text", "block", {"scan_layers": True}), ("lfm2", "lora", {})],
)
def test_gradients_of_adapters_do_not_depend_on_what_is_kept(name, other, options):
    golden, found = read(name), {}
    loaded = model(name, **options)
    for remat in ("none", other):
        module = loaded.module.clone(remat=remat)
        adapted = adapt(module, LoRAConfig(rank=3, alpha=5), *loaded.inputs)
        variables = adapted.attach(loaded.params, jax.random.key(0))

        def loss(lora, adapted=adapted, variables=variables):
            logits = adapted.apply({**variables, "lora": lora}, golden["input_ids"])
            return jnp.mean(jnp.sin(logits)), logits

        gradient = jax.jit(jax.grad(loss, has_aux=True))
        found[remat], logits = gradient(variables["lora"])
        np.testing.assert_allclose(logits, golden["logits"], **TOLERANCE)
    for path, leaf in flatten(found["none"]).items():
        assert leaf.any() == path.endswith("lora_b"), path
        got, largest = flatten(found[other])[path], np.abs(leaf).max()
        np.testing.assert_allclose(got, leaf, rtol=1e-5, atol=1e-5 * largest)


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_saved_model_has_the_tensors_of_its_source(name, tmp_path):
    loaded = model(name)
    save_model(tmp_path / "out", loaded.params, loaded.path)
    wanted = load_file(GOLDEN / name / "model.safetensors")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == wanted.keys()
    assert all(np.array_equal(got[key], wanted[key]) for key in wanted)


@pytest.fixture(scope="module")
def as_on_the_hub(tmp_path_factory):
    """The golden mixture with a layer's experts as one tensor, and an MTP layer."""
    name = "qwen3_5_moe"
    folder = shutil.copytree(GOLDEN / name, tmp_path_factory.mktemp("hub") / name)
    tensors = load_file(folder / "model.safetensors")
    layers = sorted({n.split(".experts.")[0] for n in tensors if ".experts." in n})
    for layer in layers:
        parts = {
            part: np.stack(
                [tensors.pop(f"{layer}.experts.{e}.{part}.weight") for e in range(5)]
            )
            for part in ("gate_proj", "up_proj", "down_proj")
        }
        both = [parts["gate_proj"], parts["up_proj"]]
        tensors[f"{layer}.experts.gate_up_proj"] = np.concatenate(both, axis=1)
        tensors[f"{layer}.experts.down_proj"] = parts["down_proj"]
    tensors["mtp.fc.weight"] = np.ones((2, 3), np.float32)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_experts_in_one_tensor_are_the_same_model(as_on_the_hub, tmp_path):
    loaded = load_base(as_on_the_hub)
    assert "mtp.fc.weight" in loaded.unused
    wanted = flatten(model("qwen3_5_moe").params)
    for path, leaf in flatten(loaded.params).items():
        assert np.array_equal(leaf, wanted[path]), path
    save_model(tmp_path / "out", loaded.params, loaded.path)
    before = load_file(as_on_the_hub / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == before.keys()
    assert all(np.array_equal(after[key], before[key]) for key in before)


def test_a_portable_adapter_has_the_experts_as_vllm_takes_them(as_on_the_hub, tmp_path):
    for folder in (as_on_the_hub, GOLDEN / "qwen3_5_moe"):
        loaded = load_model(folder, GOLDEN / "qwen3_5_moe" / "peft_text")
        out, config = tmp_path / folder.parent.name, loaded.module.config
        export_adapter(out, loaded.variables, config, loaded, portable=True)
        names = load_file(out / "adapter_model.safetensors")
        layer = "base_model.model.model.language_model.layers.0"
        assert f"{layer}.mlp.experts.base_layer.lora_A.weight" in names
        assert f"{layer}.linear_attn.in_proj_qkv.lora_B.weight" in names
        assert not any(".experts.0." in name for name in names)
    again = load_model(folder, out)
    found, wanted = (
        flatten(m.module.merge(m.variables, check=False)) for m in (again, loaded)
    )
    for path, leaf in found.items():
        np.testing.assert_allclose(leaf, wanted[path], rtol=1e-5, atol=1e-6)


def test_all_linear_covers_mixers_and_experts_and_no_score_of_an_expert():
    def covered(name):
        loaded = model(name)
        adapted = adapt(loaded.module, LoRAConfig(rank=1), *loaded.inputs)
        rows = (row.path for row in adapted.targets(loaded.params))
        return sorted(p.removeprefix("layer_0/") for p in rows if "layer_0" in p)

    experts = [f"mlp/experts/{name}" for name in ("down", "gate_up")]
    assert covered("qwen3_5_moe_text") == [
        *(f"delta_net/{n}" for n in ("beta", "decay", "gate", "output", "qkv")),
        *experts,
        *(f"mlp/shared/{name}" for name in ("down", "gate", "up")),
    ]
    assert covered("lfm2") == [
        *(f"mlp/{name}" for name in ("down", "gate", "up")),
        *(f"short_conv/{name}" for name in ("input", "output")),
    ]


# As on the hub, what does not matter here left out; counted by transformers, of the
# first with four of its 40 layers.
HUB = {
    "Qwen/Qwen3.6-35B-A3B": (
        {
            "model_type": "qwen3_5_moe",
            "text_config": {
                "attn_output_gate": True,
                "full_attention_interval": 4,
                "head_dim": 256,
                "hidden_size": 2048,
                "linear_conv_kernel_dim": 4,
                "linear_key_head_dim": 128,
                "linear_num_key_heads": 16,
                "linear_num_value_heads": 32,
                "linear_value_head_dim": 128,
                "max_position_embeddings": 262144,
                "model_type": "qwen3_5_moe_text",
                "moe_intermediate_size": 512,
                "mtp_num_hidden_layers": 1,
                "num_attention_heads": 16,
                "num_experts": 256,
                "num_experts_per_tok": 8,
                "num_hidden_layers": 4,
                "num_key_value_heads": 2,
                "rope_parameters": {
                    "mrope_interleaved": True,
                    "mrope_section": [11, 11, 10],
                    "partial_rotary_factor": 0.25,
                    "rope_theta": 10000000,
                    "rope_type": "default",
                },
                "shared_expert_intermediate_size": 512,
                "tie_word_embeddings": False,
                "vocab_size": 248320,
            },
        },
        4_381_469_760,
    ),
    "LiquidAI/LFM2-1.2B": (
        {
            "model_type": "lfm2",
            "block_auto_adjust_ff_dim": True,
            "block_ff_dim": 12288,
            "block_ffn_dim_multiplier": 1.0,
            "block_multiple_of": 256,
            "conv_L_cache": 3,
            "conv_bias": False,
            "full_attn_idxs": [2, 5, 8, 10, 12, 14],
            "hidden_size": 2048,
            "max_position_embeddings": 128000,
            "norm_eps": 1e-05,
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "rope_theta": 1000000.0,
            "tie_embedding": True,
            "vocab_size": 65536,
        },
        1_170_340_608,
    ),
}


@pytest.mark.parametrize("name", HUB)
def test_the_configs_of_real_checkpoints_give_their_sizes(name):
    settings, count = HUB[name]
    family = FAMILIES[settings["model_type"]]
    config = family.read_config(settings)
    shapes = param_shapes(family, family.module(config))
    assert sum(map(np.prod, shapes.values())) == count


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "qwen3_5_text",
            {"layer_types": ["linear_attention", "full_attention"] + ["mamba"] * 2},
            r"layer_types must be of \('full_attention', 'linear_attention'\); got "
            r"\['mamba'\]",
        ),
        ("lfm2", {"layer_types": ["conv"]}, "layer_types must have 3 entries"),
        (
            "qwen3_5_text",
            {"linear_num_key_heads": 3, "linear_key_head_dim": 5},
            "num_key_heads must divide num_heads = 4; got 3",
        ),
        (
            "qwen3_5_moe_text",
            {"shared_expert_intermediate_size": 0, "linear_conv_kernel_dim": -1},
            "shared_size must be a positive integer; got 0.*conv_size must be a pos",
        ),
        ("qwen3_5_text", {"attn_output_gate": False}, "attn_output_gate must be True"),
    ],
)
def test_a_config_that_does_not_fit_is_an_error(name, changes, message):
    settings = json.loads((GOLDEN / name / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        FAMILIES[name].read_config(settings | changes)
