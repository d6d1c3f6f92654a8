"""Targets are selected by patterns, and a pattern without a match is an error."""

import jax
import jax.numpy as jnp
import pytest

from lora_jax import Contraction, LoRAConfig
from lora_jax.tree.targets import Site, UnsupportedWeight, select_targets

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")
SITES = [
    Site(f"block_{i}/attn/{name}", "dense", "kernel", (16, 12), Contraction())
    for i in range(6)
    for name in NAMES
]
STACKED = Site(
    "layers/up", "dense", "kernel", (4, 3, 5), Contraction((0,), (1,), (2,)), (0,), (0,)
)


def message(config, sites=SITES, **more):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - returned, matched there
        select_targets(sites, config, **more)
    return str(caught.value)


def test_the_table_has_rank_alpha_scaling_and_count():
    config = LoRAConfig(rank=2, alpha=8, targets=["q_proj"], rank_pattern={"q_proj": 4})
    rows = select_targets(SITES, config)
    assert [row.path for row in rows] == [f"block_{i}/attn/q_proj" for i in range(6)]
    row = rows[0]
    assert (row.kind, row.kernel_shape, row.rank) == ("dense", (16, 12), 4)
    assert (row.alpha, row.scaling, row.trainable) == (8.0, 2.0, 4 * (16 + 12))


def test_a_typo_names_the_nearest_path():
    assert message(LoRAConfig(targets=["q_prj"])) == (
        'targets=["q_prj"] matched 0 of 24 kernels. '
        "Did you mean: block_0/attn/q_proj (+5)?"
    )


@pytest.mark.parametrize("field", ["exclude", "train"])
def test_other_patterns_without_a_match_are_errors_too(field):
    text = message(LoRAConfig(**{field: ["hed"]}), weights=["head/kernel"])
    assert f'{field}=["hed"] matched 0 of' in text
    assert "Did you mean" in text


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_value_pattern_without_a_match_is_an_error(field):
    assert f'{field}="block_9/.*" matched 0' in message(
        LoRAConfig(**{field: {"block_9/.*": 4}})
    )


def test_all_errors_are_raised_together():
    text = message(LoRAConfig(targets=["q_prj", "v_proj"], exclude=["nothing"]))
    assert "q_prj" in text
    assert "nothing" in text
    assert "'v_proj'" not in text


def test_selecting_no_layer_is_an_error():
    assert "leave 0 of 24 kernels" in message(LoRAConfig(exclude=".*"))


def test_a_named_layer_that_cannot_be_adapted_is_an_error():
    unknown = {
        "block_0/attn/rel/table": UnsupportedWeight("RelativePosition", False, "")
    }
    text = message(LoRAConfig(targets=["rel"]), unsupported=unknown)
    assert "RelativePosition" in text
    assert "can't be adapted" in text


def test_a_model_of_other_layers_alone_is_told_which():
    unknown = {
        f"cell_{i}/{name}/kernel": UnsupportedWeight("DenseParams", False, "")
        for i in range(2)
        for name in "if"
    }
    text = message(LoRAConfig(targets="all-linear"), [], unsupported=unknown)
    assert "0 of 0 kernels" in text
    assert "can't adapt cell_0/i/kernel (DenseParams), and 3 more like these." in text


def test_layers_cannot_select_within_a_stack():
    assert "stacked in one array" in message(LoRAConfig(layers=[1]), [STACKED])


def test_init_depends_only_on_the_path():
    few, all_ = (
        select_targets(SITES, LoRAConfig(targets=t)) for t in (["v_proj"], "all-linear")
    )
    one = next(t for t in all_ if t.path == few[0].path)
    a, b, again, other = (
        target.init(jax.random.key(3), jnp.ones(target.kernel_shape))[name]
        for target, name in (
            *((few[0], "lora_a"), (few[0], "lora_b")),
            *((one, "lora_a"), (few[1], "lora_a")),
        )
    )
    assert jnp.array_equal(a, again)
    assert not jnp.array_equal(a, other)
    assert not b.any()


def test_stacked_layers_have_independent_initial_values():
    (target,) = select_targets([STACKED], LoRAConfig(rank=2))
    a, b = target.init(jax.random.key(0), jnp.ones((4, 3, 5))).values()
    assert a.shape == (4, 3, 2)
    assert b.shape == (4, 2, 5)
    assert not jnp.array_equal(a[0], a[1])
