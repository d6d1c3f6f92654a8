"""Hugging Face's names of modules stand for the paths here."""

import jax
import pytest

from lora_jax import LoRAConfig
from lora_jax.interop.pretrained import load_model
from lora_jax.models.families import FAMILIES
from lora_jax.models.source import open_source
from lora_jax.models.target_names import translate_names
from tests.models.golden import GOLDEN

ATTENTION, MLP = "attention", "mlp"


@pytest.mark.parametrize(
    ("family", "name", "paths"),
    [
        ("llama", "q_proj", ["attention/query"]),
        ("llama", "k_proj", ["attention/key"]),
        ("llama", "v_proj", ["attention/value"]),
        ("llama", "o_proj", ["attention/output"]),
        ("llama", "gate_proj", ["mlp/gate"]),
        ("llama", "up_proj", ["mlp/up"]),
        ("llama", "down_proj", ["mlp/down"]),
        ("llama", "self_attn.q_proj", ["attention/query"]),
        ("llama", "model.layers.3.mlp.up_proj", ["layer_3/mlp/up"]),
        ("llama", "layers.3.mlp.up_proj", ["layer_3/mlp/up"]),
        ("llama", "embed_tokens", ["embed"]),
        ("llama", "lm_head", ["head"]),
        ("phi3", "qkv_proj", ["attention/qkv"]),
        ("gpt2", "c_attn", ["attention/qkv"]),
        ("gpt2", "c_proj", ["attention/output", "mlp/down"]),
        ("gpt2", "mlp.c_proj", ["mlp/down"]),
        ("gpt2", "h.1.attn.c_proj", ["layer_1/attention/output"]),
        ("bert", "query", ["query"]),
        ("bert", "output.dense", ["attention/output", "mlp/down"]),
        ("bert", "attention.self.key", ["attention/key"]),
        ("bert", "encoder.layer.1.intermediate.dense", ["encoder/layer_1/mlp/up"]),
        ("distilbert", "q_lin", ["attention/query"]),
        ("vit", "q_proj", ["attention/query"]),
        ("vit", "attention.attention.query", ["attention/query"]),
        ("vit", "fc1", ["mlp/up"]),
        ("dinov2", "fc2", ["mlp/down"]),
        ("llama", "mlp/up", ["mlp/up"]),
        ("llama", "q_prj", ["q_prj"]),
        ("llama", "proj", ["proj"]),
    ],
)
def test_a_name_of_theirs_is_a_path_here(family, name, paths):
    config = translate_names(
        LoRAConfig(targets=[name], exclude=[name]), FAMILIES[family]
    )
    assert config.targets == config.exclude == tuple(paths)


GATE_UP, DOWN = "mlp/experts/gate_up", "mlp/experts/down"


@pytest.mark.parametrize(
    ("folder", "name", "paths"),
    [
        ("qwen3_moe", "gate_proj", [GATE_UP]),
        ("qwen3_moe", "up_proj", [GATE_UP]),
        ("qwen3_moe", "down_proj", [DOWN]),
        ("qwen3_moe", "gate_up_proj", [GATE_UP]),
        ("qwen3_moe", "mlp.experts.gate_up_proj", [GATE_UP]),
        ("qwen3_moe", "gate", ["mlp/router"]),
        ("qwen3_moe", "mlp.gate.weight", ["mlp/router"]),
        ("qwen3_moe", "model.layers.1.mlp.experts.down_proj", [f"layer_1/{DOWN}"]),
        ("qwen3_moe_mixed", "gate_proj", ["mlp/gate", GATE_UP]),
        ("qwen3_moe_mixed", "down_proj", ["mlp/down", DOWN]),
        ("mixtral", "down_proj", [DOWN]),
        ("mixtral", "w2", [DOWN]),
        ("olmoe", "up_proj", [GATE_UP]),
        ("gemma4_moe", "down_proj", ["mlp/down", "mixture/experts/down"]),
        ("gemma4_moe", "router.proj", ["mixture/router"]),
        ("gemma4", "down_proj", ["mlp/down"]),
        ("gpt_oss", "gate_up_proj", [GATE_UP]),
        ("gpt_oss", "experts.down_proj", [DOWN]),
        ("gpt_oss", "mlp.router.weight", ["mlp/router"]),
    ],
)
def test_names_in_a_mixture_are_of_what_the_model_has(folder, name, paths):
    source = open_source(GOLDEN / folder)
    lora = LoRAConfig(targets=[name])
    assert translate_names(lora, source.family, source.config).targets == tuple(paths)


@pytest.mark.parametrize("scan", [False, True])
def test_a_mixture_is_adapted_by_the_names_of_peft(scan):
    names = ["q_proj", "gate_proj", "up_proj", "down_proj"]
    model = load_model(
        GOLDEN / "qwen3_moe",
        lora=LoRAConfig(rank=2, targets=names, rank_pattern={"down_proj": 3}),
        key=jax.random.key(0),
        scan_layers=scan,
    )
    rows = {row.path.partition("/")[2]: row.rank for row in model.module.targets()}
    assert rows == {"attention/query": 2, GATE_UP: 2, DOWN: 3}


def test_regular_expressions_stay_and_patterns_that_are_names_do_not():
    config = LoRAConfig(
        targets=".*query",
        rank_pattern={"k_proj": 3, ".*v_proj": 4},
        alpha_pattern={"down_proj": 5.0},
        train="q_proj",
    )
    own = translate_names(config, FAMILIES["llama"])
    assert (own.targets, own.train) == (".*query", "q_proj")
    assert own.rank_pattern == (("attention/key", 3), (".*v_proj", 4))
    assert own.alpha_pattern == (("mlp/down", 5.0),)


@pytest.mark.parametrize("scan", [False, True])
def test_a_model_is_adapted_by_the_names_of_peft(scan):
    config = LoRAConfig(rank=2, targets=["k_proj"], rank_pattern={"k_proj": 3})
    model = load_model(
        GOLDEN / "llama", lora=config, key=jax.random.key(0), scan_layers=scan
    )
    rows = {row.path.partition("/")[2]: row.rank for row in model.module.targets()}
    assert rows == {"attention/key": 3}
    bad = LoRAConfig(targets=["kproj"])
    with pytest.raises(ValueError, match=r'targets=\["kproj"\] matched 0'):
        load_model(GOLDEN / "llama", lora=bad, key=jax.random.key(0))
