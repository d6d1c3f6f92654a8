"""A decoder's config.json: what it means, and what is refused at once."""

import json
import math
import shutil
import time

import numpy as np
import pytest

from lora_jax.interop.pretrained import load_model
from lora_jax.models.families import FAMILIES
from tests.models.golden import GOLDEN

SIZES = {
    "vocab_size": 9,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 4096,
}
SHORT, LONG = [1 + 0.1 * i for i in range(8)], [2.0 + i for i in range(8)]
YARN = {"rope_type": "yarn", "rope_theta": 50000.0, "factor": 8.0}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500000.0}


def read(family="llama", **changes):
    return FAMILIES[family].read_config({**SIZES, **changes})


@pytest.mark.parametrize(
    ("rope", "frequencies", "attention_factor"),
    [
        (
            {"rope_type": "linear", "rope_theta": 10000.0, "factor": 8.0},
            [0.125, 0.03952847, 0.0125, 0.003952847, 0.00125, 0.000395285],
            1.0,
        ),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "original_max_position_embeddings": 512,
                **LLAMA3,
            },
            [1.0, 0.193922758, 0.027344134, 0.000911583, 0.000176777, 3.4281e-05],
            1.0,
        ),
        (
            {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 1024,
            },
            [1.0, 0.316227764, 0.081250004, 0.019764237, 0.004375, 0.000790569],
            1.138629436111989,
        ),
        (
            {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 1024,
                "truncate": False,
            },
            [1.0, 0.316227764, 0.085398637, 0.019126777, 0.003556971, 0.000790569],
            1.138629436111989,
        ),
        (
            {
                **YARN,
                "original_max_position_embeddings": 512,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
            },
            [1.0, 0.258600146, 0.037616644, 0.002161704, 0.000559017, 0.000144562],
            1.094179988101349,
        ),
    ],
    ids=["linear", "llama3", "yarn", "yarn-untruncated", "yarn-mscale"],
)
def test_frequencies_are_those_of_transformers(rope, frequencies, attention_factor):
    """Values: `ROPE_INIT_FUNCTIONS` of transformers 5.24.0, the first six of eight."""
    theta = rope.pop("rope_theta")
    old = read(rope_scaling=rope, rope_theta=theta).ropes[0]
    new = read(rope_parameters={**rope, "rope_theta": theta}).ropes[0]
    assert old == new
    # yarn and llama3 are given to nine digits
    np.testing.assert_allclose(new.frequencies()[:6], frequencies, rtol=2e-6)
    assert new.attention_factor == pytest.approx(attention_factor)


def test_longrope_has_factors_for_short_and_for_long_contexts():
    rope = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG}
    config = read("phi3", original_max_position_embeddings=1024, rope_scaling=rope)
    wanted = [1.0, 0.287479758, 0.083333336, 0.024325214, 0.007142857, 0.002108185]
    np.testing.assert_allclose(config.ropes[0].frequencies()[:6], wanted, rtol=1e-6)
    assert config.ropes[0].attention_factor == pytest.approx(1.0954451150103321)
    assert config.max_positions == 4096
    assert config.original_positions == 1024


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**12}, "num_hidden_layers must be at most 1000"),
        ({"hidden_size": "big"}, "hidden_size must be an integer; got 'big'"),
        ({"hidden_size": True}, "hidden_size must be an integer; got True"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"num_attention_heads": 0}, "num_heads must be a positive integer; got 0"),
        ({"num_key_value_heads": 3}, "num_kv_heads must divide num_heads = 4; got 3"),
        ({"rms_norm_eps": -1.0}, "norm_eps must be above 0; got -1.0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be finite; got nan"),
        ({"hidden_act": "tanhh"}, "activation must be one of"),
        (
            {"tie_word_embeddings": 1},
            "tie_word_embeddings must be true or false; got 1",
        ),
        ({"rope_scaling": [1]}, "rope_scaling must be an object; got [1]"),
        ({"rope_scaling": {"type": "spiral"}}, "rope_type must be one of"),
        ({"rope_scaling": {"type": "linear"}}, "rope factor must be a positive number"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "truncate": "no"}},
            "rope truncate must be true or false; got 'no'",
        ),
        ({"rope_theta": -5.0}, "rope theta must be a positive number; got -5.0"),
        ({"head_dim": 15}, "rotary_dim must be even"),
        ({"rms_norm_eps": 1e39}, "rms_norm_eps must be 0 or 1e-20 to 1e+20; got 1e+39"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be"),
        (
            {"rope_theta": 1e300},
            "rope theta must be a positive number from 1e-20",
        ),
        ({"rope_theta": math.inf}, "rope theta must be a positive number"),
        (
            {"rope_scaling": {"type": "linear", "factor": 1e-300}},
            "rope factor must be a positive number from 1e-20 to 1e+20; got 1e-300",
        ),
        (
            {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
            "rope high_freq_factor must be above 1.0; got 1.0",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": "x"}},
            "rope mscale must be a positive number; got 'x'",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 1e99}},
            "rope attention_factor must be a positive number from",
        ),
        (
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": "8"}},
            "original_max_position_embeddings must be an integer; got '8'",
        ),
        (
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 2**31}},
            "original_max_position_embeddings must be at most",
        ),
    ],
)
def test_bad_configs_are_refused_by_name(changes, message):
    start = time.monotonic()
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared
        read(**changes)
    assert message in str(error.value)
    assert time.monotonic() - start < 5


def test_all_faults_of_a_config_are_named_at_once():
    with pytest.raises(
        ValueError, match=r"hidden_size .*intermediate_size .*rope_type"
    ):
        read(hidden_size="8", intermediate_size=2.5, rope_scaling={"type": "x"})


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("smollm3", {"no_rope_layers": [1]}, "2 entries, one per layer; got 1"),
        ("gemma2", {"layer_types": ["full_attention", "x"]}, "layer_types must be of"),
        (
            "gemma2",
            {"use_bidirectional_attention": True},
            "must be False here; got True",
        ),
        ("mistral", {"sliding_window": 0}, "a window must be at least 1 token; got 0"),
        ("gpt2", {"scale_attn_weights": False}, "must be True here; got False"),
        ("gpt2", {"n_head": 5}, "n_head must divide n_embd = 768; got 5"),
        ("phi3", {"partial_rotary_factor": 0.35}, "rotary_dim must be even"),
        ("gemma4_text", {"enable_moe_block": True}, "top_k_experts is missing"),
        (
            "gemma4_text",
            {"use_bidirectional_attention": "all"},
            "use_bidirectional_attention must not be 'all' here",
        ),
        (
            "gemma4_text",
            {"num_kv_shared_layers": 2},
            "num_kv_shared_layers must leave a layer of each kind",
        ),
        (
            "gemma4_text",
            {"rope_parameters": {"rope_theta": 9.0}},
            "rope_parameters must have full_attention and sliding_attention",
        ),
        (
            "gemma4_text",
            {
                "rope_parameters": {
                    "full_attention": {
                        "rope_type": "proportional",
                        "partial_rotary_factor": 2,
                    },
                    "sliding_attention": {},
                }
            },
            "rope partial_rotary_factor must be a number up to 1; got 2",
        ),
        ("granite", {"logits_scaling": 0}, "logits_scaling must be above 0; got 0"),
        ("granite", {"residual_multiplier": -1}, "residual_scale must be above 0"),
        ("olmo3", {"layer_types": ["full_attention", "x"]}, "layer_types must be of"),
        (
            "ministral3",
            {"rope_parameters": {"rope_theta": 9.0, "llama_4_scaling_beta": "x"}},
            "llama_4_scaling_beta must be a number; got 'x'",
        ),
    ],
)
def test_what_a_family_does_not_compute_is_refused(family, changes, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared
        read(family, **changes)
    assert message in str(error.value)


def test_a_config_that_asks_for_more_than_the_file_has_loads_nothing(tmp_path):
    folder = tmp_path / "llama"
    shutil.copytree(GOLDEN / "llama", folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_hidden_layers": 3, "intermediate_size": 10**7}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"nothing was\s+loaded") as error:
        load_model(folder)
    assert "missing: layers.2.mlp.up_proj.weight" in str(error.value)
    assert "must be [10000000, 20]" in str(error.value)
