import copy
import dataclasses
import json
import math
import pickle

import pytest

from lora_jax import LoRAConfig
from lora_jax.config import layer_index, matches

QUERY = "encoder/layer_3/attention/query"


@pytest.mark.parametrize(
    ("patterns", "path", "expected"),
    [
        (["query"], QUERY, True),
        (["attention/query"], QUERY, True),
        (["query"], "query", True),
        (["query"], "encoder/subquery", False),
        (["quer"], QUERY, False),
        (["que.*"], QUERY, False),  # in a list a dot is a dot
        ([], QUERY, False),
        (".*query", QUERY, True),
        ("query", QUERY, False),  # a regex has to match the whole path
        (r".*layer_[0-3]/.*", QUERY, True),
    ],
)
def test_lists_hold_suffixes_and_a_string_is_a_regex(patterns, path, expected):
    assert matches(patterns, path) is expected


@pytest.mark.parametrize(
    ("path", "index"),
    [
        (QUERY, 3),
        ("layer_3/expert_7/up", 3),
        ("blocks/12/up", 12),
        ("block12/up", None),
        ("conv2d/kernel", None),
        ("layer_3x/up", None),
        ("0", 0),
    ],
)
def test_the_layer_index_is_the_first_number_that_ends_a_segment(path, index):
    assert layer_index(path) == index


def test_rank_and_alpha_are_looked_up_apart_and_the_first_match_wins():
    config = LoRAConfig(
        rank=8,
        alpha=12,
        rank_pattern={"layer_0/.*": 2, "attention/query": 4, "query": 5},
        alpha_pattern={"query": 3},
    )
    paths = ("layer_0/attention/query", "layer_1/attention/query", "query", "key")
    assert [config.rank_for(p) for p in paths] == [2, 4, 5, 8]
    assert [config.alpha_for(p) for p in paths] == [3, 3, 3, 12]
    assert config.scaling_for(paths[0]) == 3 / 2
    assert config.rank_for("subquery") == 8


def test_a_pattern_with_alternatives_stays_whole():
    config = LoRAConfig(rank_pattern={"query|key": 2})
    assert [config.rank_for(p) for p in ("a/query", "a/key", "a/monkey")] == [2, 2, 8]


def test_rslora_divides_by_the_root():
    assert LoRAConfig(rank=9, alpha=6, rslora=True).scaling_for("x") == 2.0
    assert LoRAConfig(rank=9, alpha=6).scaling_for("x") == 6 / 9


def test_exclude_train_and_layers_beat_targets():
    config = LoRAConfig(
        targets=["query", "up"],
        exclude=["layer_1/query"],
        train=["head/up"],
        layers=[1],
    )
    assert config.is_target("layer_1/up")
    assert not config.is_target("layer_1/query")
    assert not config.is_target("layer_2/up")
    assert not config.is_target("layer_1/head/up")
    assert not config.is_target("up")  # it has no index, and indices were asked for


def test_layer_1_is_not_layer_11():
    config = LoRAConfig(layers=[1])
    assert config.is_target("enc/layer_1/mlp/up")
    assert not config.is_target("enc/layer_11/mlp/up")


def test_all_linear_takes_linear_layers_only():
    assert LoRAConfig().is_target("embed", is_linear=True)
    assert not LoRAConfig().is_target("embed", is_linear=False)
    assert LoRAConfig(targets=["embed"]).is_target("embed", is_linear=False)


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_train_names_leaves_or_modules_whatever_the_biases(bias):
    config = LoRAConfig(targets=["query"], train=["head", "norm/scale"], bias=bias)
    for path in ("head/kernel", "head/bias", "head/inner/bias", "layer_0/norm/scale"):
        assert config.is_trained(path, is_adapted=False)
    assert not config.is_trained("layer_0/query/kernel", is_adapted=True)
    query, norm = "layer_0/query/bias", "layer_0/norm/bias"
    assert config.is_trained(query, is_adapted=True) == (bias != "none")
    assert config.is_trained(norm, is_adapted=False) == (bias == "all")


def test_a_config_survives_json_and_is_hashable():
    config = LoRAConfig(
        rank=4,
        targets=["query", "value"],
        rank_pattern={"value": 2},
        alpha_pattern=[("a", 1.5), ("b", 2)],
        layers=range(3),
        train="head.*",
    )
    again = LoRAConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)
    assert config.layers == (0, 1, 2)


def test_unknown_fields_are_all_named():
    with pytest.raises(ValueError, match=r"has no field aplha, r; its fields are rank"):
        LoRAConfig.from_dict({"r": 8, "aplha": 16, "rank": 8})


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be at least 1; got 0"),
        ({"rank": 8.0}, TypeError, r"rank must be an integer; got 8\.0"),
        ({"rank": True}, TypeError, "rank must be an integer; got True"),
        ({"alpha": 0}, ValueError, "alpha must be above 0; got 0"),
        ({"alpha": math.nan}, ValueError, "alpha must be above 0; got nan"),
        ({"alpha": math.inf}, ValueError, "alpha must be above 0; got inf"),
        (
            {"alpha": 1e39},
            ValueError,
            r"must be from 1e-30 to 1e\+30; got 1e\+39",
        ),
        ({"alpha": 1e-300}, ValueError, "alpha must be from 1e-30 to .*; got 1e-300"),
        ({"alpha": 10**5000}, ValueError, "alpha must be .* got an integer of 16610 b"),
        ({"rank": 2**31}, ValueError, "rank must be at most 1048576; got 2147483648"),
        ({"rank": 10**5000}, ValueError, "rank must be at most .* got an integer of"),
        ({"alpha": "16"}, TypeError, "alpha must be a number; got '16'"),
        ({"targets": []}, ValueError, "targets must name at least one layer"),
        ({"targets": ""}, ValueError, "targets must not be the empty string"),
        (
            {"targets": ["a", ""]},
            ValueError,
            r"must not contain the empty string; got \['a",
        ),
        ({"targets": [1]}, TypeError, r"a string or a list of strings; got \(1,\)"),
        ({"targets": "("}, ValueError, r"targets is not a regular expression: '\('"),
        ({"exclude": None}, TypeError, "exclude must be a string or a list"),
        ({"layers": 3}, TypeError, "layers must be a list of integers; got 3"),
        ({"layers": []}, ValueError, r"non-negative indices; got \[\]"),
        (
            {"layers": [0, -1]},
            ValueError,
            r"non-negative indices; got \[0, -1\]",
        ),
        ({"dropout_rate": 1.5}, ValueError, r"must be in \[0, 1\]; got 1\.5"),
        ({"dropout_rate": math.nan}, ValueError, r"must be in \[0, 1\]; got nan"),
        ({"rslora": 1}, TypeError, "rslora must be true or false; got 1"),
        ({"dora": "yes"}, TypeError, "dora must be true or false; got 'yes'"),
        (
            {"init": "zeros"},
            ValueError,
            "one of .*'pissa', 'olora'.*, or pissa_niter_N; got 'zeros'",
        ),
        ({"init": 3}, ValueError, "init must be one of .*; got 3"),
        ({"vera": 1}, TypeError, "vera must be true or false; got 1"),
        ({"vera_seed": 2}, ValueError, "vera_seed must be 0 unless vera=True; got 2"),
        ({"vera": True, "vera_seed": -1}, ValueError, r"from 0 to 2\*\*32 - 1; got -1"),
        (
            {"vera": True, "lora_fa": True, "init": "pissa"},
            ValueError,
            "init must be 'uniform' for vera=True.*'pissa'; lora_fa must be False",
        ),
        ({"init": "pissa_niter_x"}, ValueError, "got 'pissa_niter_x'"),
        (
            {"init": "orthogonal", "rank": 4, "rank_pattern": {"q": 3}},
            ValueError,
            "rank must be even for init='orthogonal', which splits it in two; got 3",
        ),
        (
            {"bias": True},
            ValueError,
            r"one of \('none', 'lora_only', 'all'\); got True",
        ),
        ({"exclude": "all-linear"}, ValueError, "exclude must name layers; got 'all-l"),
        ({"train": "all-linear"}, ValueError, "stands alone, as targets='all-linear'"),
        ({"targets": ["all-linear", "head"]}, ValueError, "targets must name layers"),
        ({"rank_pattern": "query"}, TypeError, "rank_pattern must map patterns to val"),
        ({"rank_pattern": None}, TypeError, "rank_pattern must map.*; got None"),
        ({"alpha_pattern": 5}, TypeError, "alpha_pattern must map.*; got 5"),
        ({"rank_pattern": {"q": 0}}, ValueError, r"\['q'\] must be at least 1; got 0"),
        ({"alpha_pattern": {"q": -1}}, ValueError, r"\['q'\] must be above 0; got -1"),
        ({"rank_pattern": {"(": 1}}, ValueError, r"is not a regular expression: '\('"),
        ({"rank_pattern": {1: 1}}, ValueError, "have strings as patterns; got 1"),
        (
            {"rank_pattern": [("q", 1), ("q", 2)]},
            ValueError,
            "rank_pattern must name each pattern once; got 'q' again",
        ),
    ],
)
def test_bad_fields(fields, error, message):
    with pytest.raises(error, match=message):
        LoRAConfig(**fields)


def test_every_value_fault_is_named_at_once():
    with pytest.raises(ValueError, match="rank must be at least 1; got 0") as caught:
        LoRAConfig(rank=0, alpha=-1, targets=[], dropout_rate=1.5, layers=[-1])
    for part in (
        "alpha must be above 0; got -1",
        "targets must name at least one layer",
        "dropout_rate must be in [0, 1]; got 1.5",
        "non-negative indices; got [-1]",
    ):
        assert part in str(caught.value)


def test_faults_of_type_and_of_value_are_named_together():
    with pytest.raises(TypeError) as caught:
        LoRAConfig(rank=0, alpha="16", dropout_rate=2, init="zeros", layers=3)
    for name in ("rank", "alpha", "dropout_rate", "init", "layers"):
        assert f"{name} must be" in str(caught.value)


def test_a_config_can_not_be_changed():
    with pytest.raises(AttributeError):
        LoRAConfig().rank = 4


def test_every_pattern_can_be_matched_by_itself():
    config = LoRAConfig(
        targets=["query", "up"], exclude="a.*", rank_pattern={"up|down": 2}
    )
    found = config.patterns
    assert found == ("(.*/)?(up|down)", ["query"], ["up"], "a.*")
    assert [matches(p, "layer_0/mlp/up") for p in found] == [True, False, True, False]


def test_the_names_of_peft_are_told_in_ours():
    with pytest.raises(TypeError, match="r is rank here; target_modules is targets"):
        LoRAConfig(r=8, target_modules=["q"])  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match="lora_alpha is alpha here"):
        LoRAConfig.from_dict({"lora_alpha": 16})
    assert copy.deepcopy(LoRAConfig(rank=3)) == LoRAConfig(rank=3)
    assert pickle.loads(pickle.dumps(LoRAConfig(rank=3))) == LoRAConfig(rank=3)


def test_tokens_are_a_list_or_one_for_each_layer():
    for tokens in ([3, "<tool>"], {"embed": [3, "<tool>"], "head": [1]}):
        config = LoRAConfig(tokens=tokens)
        assert config.to_dict()["tokens"] == tokens
        assert LoRAConfig.from_dict(config.to_dict()) == config
        assert hash(config) == hash(dataclasses.replace(config))
    assert config.tokens_for("model/head") == (1,)
    assert not config.is_target("embed", is_linear=True)
    assert LoRAConfig(tokens=[1]).tokens_for("embed") == ()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (3, r"tokens must be a list of ids and strings, .* got 3"),
        ([1.5], r"tokens must be a list of ids and strings, .* got \(1\.5,\)"),
        ([True], "tokens must be a list of ids"),
        ({"embed": 3}, "tokens must be a list"),
        ({"embed": [3, None]}, "tokens of 'embed' must be a list"),
        ([-1, "", 1 << 31], r"from 0 up, or not empty; got \[-1, '', 2147483648\]"),
        ({"embed": [3, 3, "a", "a"]}, r"each token once; got \[3, 'a'\] again"),
        ({"embed": []}, "tokens of 'embed' must name a layer and at least one"),
    ],
)
def test_bad_tokens_are_errors(tokens, message):
    with pytest.raises((TypeError, ValueError), match=message):
        LoRAConfig(tokens=tokens)


def test_peft_s_name_of_tokens_is_told():
    with pytest.raises(TypeError, match="trainable_token_indices is tokens here"):
        LoRAConfig(trainable_token_indices=[1])
