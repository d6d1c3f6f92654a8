"""LoRAConfig: look-ups by path, and every fault named at once."""

import json

import pytest

from lora_jax import LoRAConfig
from lora_jax.config import layer_index, matches


def test_rank_and_alpha_are_looked_up_independently_and_the_first_match_wins():
    config = LoRAConfig(
        rank=8,
        alpha=16,
        rank_pattern={"layer_0/.*": 4, ".*/query": 2},
        alpha_pattern={"query": 32},
    )
    assert config.rank_for("enc/layer_0/query") == 4
    assert config.rank_for("enc/layer_1/query") == 2
    assert config.rank_for("enc/layer_1/value") == 8
    assert config.alpha_for("enc/layer_0/query") == 32
    assert config.scaling_for("enc/layer_0/query") == 8
    assert config.scaling_for("enc/layer_1/value") == 2


def test_rslora_scales_by_the_root_of_the_rank():
    assert LoRAConfig(rank=16, alpha=8, rslora=True).scaling_for("x") == 2
    assert LoRAConfig(rank=16, alpha=8).scaling_for("x") == 0.5


@pytest.mark.parametrize(
    ("patterns", "path", "wanted"),
    [
        (["query"], "block_0/attn/query", True),
        (["query"], "query", True),
        (["query"], "block_0/subquery", False),
        (["attn/query"], "block_0/attn/query", True),
        (r".*/(query|value)", "block_0/attn/value", True),
        (r"(query|value)", "block_0/attn/value", False),
    ],
)
def test_a_list_matches_whole_segments_and_a_string_is_a_regex(patterns, path, wanted):
    assert matches(patterns, path) is wanted


def test_exclude_and_train_win_over_targets():
    config = LoRAConfig(targets=["query", "head"], exclude=["a/query"], train=["head"])
    assert config.is_target("b/query")
    assert not config.is_target("a/query")
    assert not config.is_target("head")
    assert config.is_trained("head/kernel")
    assert not config.is_trained("b/query/kernel")


def test_all_linear_leaves_out_what_is_not_linear_until_it_is_named():
    assert not LoRAConfig().is_target("embed", is_linear=False)
    assert LoRAConfig(targets=["embed"]).is_target("embed", is_linear=False)


def test_layers_choose_by_the_first_number_that_ends_a_segment():
    config = LoRAConfig(layers=[1])
    assert config.is_target("enc/layer_1/mlp/up")
    assert not config.is_target("enc/layer_11/mlp/up")
    assert layer_index("layers/3/Dense_0") == 3
    assert layer_index("head") is None


@pytest.mark.parametrize(
    ("bias", "trained"),
    [("none", []), ("lora_only", ["query"]), ("all", ["query", "norm"])],
)
def test_bias_says_which_biases_are_trained(bias, trained):
    config = LoRAConfig(targets=["query"], bias=bias)
    paths = ["query", "norm"]
    assert [p for p in paths if config.is_trained(f"{p}/bias")] == trained


def test_every_value_fault_is_named_at_once():
    with pytest.raises(ValueError, match="rank must be at least 1; got 0") as caught:
        LoRAConfig(rank=0, alpha=-1, targets=[], dropout_rate=1.5, layers=[-1])
    for part in (
        "alpha must be above 0; got -1",
        "targets must name at least one layer",
        "dropout_rate must be in [0, 1]; got 1.5",
        "indices from 0, at least one; got [-1]",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 2.5}, "rank must be an integer; got 2.5"),
        ({"rank": True}, "rank must be an integer; got True"),
        ({"alpha": "16"}, "alpha must be a number; got '16'"),
        ({"targets": 3}, "targets must be a string or a list of strings; got 3"),
        ({"rank_pattern": "query"}, "rank_pattern must map patterns to values"),
        ({"rslora": 1}, "rslora must be true or false; got 1"),
    ],
)
def test_wrong_types_are_type_errors(fields, message):
    with pytest.raises(TypeError, match=message.replace("(", r"\(")):
        LoRAConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": "("}, "targets is not a regular expression"),
        ({"rank_pattern": {"[": 4}}, "rank_pattern is not a regular expression"),
        ({"rank_pattern": {"a": 0}}, "must be at least 1; got 0"),
        ({"init": "pissa"}, "init must be one of"),
        ({"bias": "some"}, "bias must be one of"),
    ],
)
def test_wrong_values_are_value_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**fields)


def test_it_hashes_and_survives_json():
    config = LoRAConfig(targets=["q"], rank_pattern={"q": 4}, layers=[0, 2])
    assert LoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(LoRAConfig(**config.to_dict()))


def test_from_dict_names_unknown_fields():
    with pytest.raises(ValueError, match="no field lora_alpha, r; its fields are rank"):
        LoRAConfig.from_dict({"r": 8, "lora_alpha": 16})
