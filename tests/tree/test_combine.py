import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import LoRAConfig, adapt, combine_adapters, extract_adapter
from tests.nn.external_models import MODELS, trained

CASES = {case.name: case for case in MODELS}
LAYOUTS = ["vmapped_experts", "scanned_axis_1", "odds"]


def members(case, *options):
    """Returns the base, and adapters with their merged kernels."""
    params = case.variables()["params"]
    found = []
    for seed, fields in enumerate(options):
        adapted = adapt(case.model, case.config(**fields), *case.args)
        variables = trained(adapted.attach(params, jax.random.key(seed)))
        found.append((adapted, variables))
    return params, found


def merged(case, params, combined):
    adapted = adapt(case.model, combined.config, *case.args)
    return adapted.merge({"frozen": params, "lora": combined.lora})


def pairs(found):
    return [(v["lora"], adapted.targets()) for adapted, v in found]


def assert_close(got, wanted, atol=2e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=atol), got, wanted
    )


OPTIONS = (
    {"rank": 1, "alpha": 6},
    {"rank": 2, "alpha": 5, "rslora": True},
)


@pytest.mark.parametrize("name", LAYOUTS)
def test_cat_is_the_weighted_sum_of_the_changes(name):
    case = CASES[name]
    params, found = members(case, *OPTIONS)
    combined = combine_adapters(pairs(found), [0.5, -2.0])
    changes = [
        jax.tree.map(jnp.subtract, adapted.merge(variables), params)
        for adapted, variables in found
    ]
    wanted = jax.tree.map(lambda w, a, b: w + 0.5 * a - 2 * b, params, *changes)
    assert_close(merged(case, params, combined), wanted, atol=5e-6)
    assert not any(combined.errors.values())
    ranks = {combined.config.rank_for(path) for path in combined.errors}
    assert ranks == {3}


@pytest.mark.parametrize("name", LAYOUTS)
def test_svd_at_the_full_rank_is_the_sum_too(name):
    case = CASES[name]
    params, found = members(case, *OPTIONS)
    cat = combine_adapters(pairs(found), [0.5, -2.0])
    svd = combine_adapters(pairs(found), [0.5, -2.0], method="svd", rank=3)
    wanted = merged(case, params, cat)
    assert_close(merged(case, params, svd), wanted, atol=5e-6)
    assert max(svd.errors.values()) < 1e-6


@pytest.mark.parametrize(
    "fields",
    [
        {"rank": 2, "alpha": 6},
        {"rank": 2, "alpha": 5, "rslora": True},
        {"rank": 2, "alpha": 3, "rank_pattern": {"router": 1}},
        {"rank": 2, "alpha": 3, "alpha_pattern": {"router": 7}},
        {"rank": 2, "alpha": 3, "dora": True},
    ],
    ids=["plain", "rslora", "ranks", "alphas", "dora"],
)
def test_one_adapter_with_weight_1_is_itself(fields):
    case = CASES["vmapped_experts"]
    params, found = members(case, fields)
    combined = combine_adapters(pairs(found), [1.0])
    adapted, variables = found[0]
    jax.tree.map(np.testing.assert_array_equal, combined.lora, variables["lora"])
    assert_close(merged(case, params, combined), adapted.merge(variables))


def test_an_adapter_minus_itself_is_nothing():
    case = CASES["vmapped_experts"]
    params, found = members(case, OPTIONS[1], OPTIONS[1])
    same = [pairs(found)[0]] * 2
    assert_close(merged(case, params, combine_adapters(same, [1.0, -1.0])), params)


def test_a_cut_is_the_best_one_and_its_error_is_true():
    model, x = nn.Dense(5), jnp.ones((1, 7))
    config = LoRAConfig(rank=4, alpha=8, targets=".*")
    adapted = adapt(model, config, x)
    params = {"kernel": jnp.zeros((7, 5)), "bias": jnp.zeros(5)}
    variables = trained(adapted.attach(params, jax.random.key(0)))
    small = combine_adapters(
        [(variables["lora"], adapted.targets())], [1.0], method="svd", rank=2
    )
    delta = np.asarray(adapted.merge(variables)["kernel"], np.float64)
    u, s, vt = np.linalg.svd(delta)
    best = (u[:, :2] * s[:2]) @ vt[:2]
    got = np.asarray(small.lora["lora_a"]) @ np.asarray(small.lora["lora_b"])
    np.testing.assert_allclose(got, best, rtol=1e-5, atol=1e-5)
    lost = np.linalg.norm(s[2:]) / np.linalg.norm(s)
    assert small.errors[""] == pytest.approx(lost, rel=1e-5)
    assert lost > 0.05


def test_dora_becomes_lora_of_its_whole_change():
    case = CASES["vmapped_experts"]
    params, found = members(case, {"rank": 2, "alpha": 3, "dora": True})
    whole = max(max(t.kernel_shape[-2:]) for t in found[0][0].targets())
    lora = combine_adapters(
        pairs(found), [1.0], method="svd", rank=whole, params=params
    )
    assert not lora.config.dora
    wanted = found[0][0].merge(found[0][1])
    assert_close(merged(case, params, lora), wanted, atol=5e-6)


def ties(deltas, weights, density):
    """The paper's three steps, an element at a time."""
    kept = []
    for delta in deltas:
        size = int(density * delta.size)
        least = np.sort(np.abs(delta), axis=None)[-size]
        kept.append(np.where(np.abs(delta) >= least, delta, 0))
    total = np.zeros_like(deltas[0])
    for at in np.ndindex(total.shape):
        sign = 1 if sum(d[at] for d in kept) >= 0 else -1
        same = [
            w * d[at] for w, d in zip(weights, kept, strict=True) if d[at] * sign > 0
        ]
        total[at] = sum(same) / max(len(same), 1)
    return total


def test_ties_is_the_papers():
    model, x = nn.Dense(5), jnp.ones((1, 7))
    params = {"kernel": jnp.zeros((7, 5)), "bias": jnp.zeros(5)}
    found, deltas = [], []
    for seed, rank in enumerate((2, 3)):
        adapted = adapt(model, LoRAConfig(rank=rank, alpha=4, targets=".*"), x)
        variables = trained(adapted.attach(params, jax.random.key(seed)))
        found.append((variables["lora"], adapted.targets()))
        deltas.append(np.asarray(adapted.merge(variables)["kernel"], np.float64))
    both = combine_adapters(found, [1.0, 0.5], method="ties", rank=5, density=0.4)
    got = np.asarray(both.lora["lora_a"]) @ np.asarray(both.lora["lora_b"])
    np.testing.assert_allclose(got, ties(deltas, [1.0, 0.5], 0.4), atol=1e-5)


def test_dare_keeps_a_share_and_its_expectation():
    model, x = nn.Dense(40), jnp.ones((1, 40))
    params = {"kernel": jnp.zeros((40, 40)), "bias": jnp.zeros(40)}
    adapted = adapt(model, LoRAConfig(rank=3, alpha=4, targets=".*"), x)
    variables = trained(adapted.attach(params, jax.random.key(0)))
    delta = np.asarray(adapted.merge(variables)["kernel"], np.float64)
    one = [(variables["lora"], adapted.targets())]

    def dare(seed):
        made = combine_adapters(
            one, [2.0], method="dare", rank=40, density=0.3, seed=seed
        )
        return np.asarray(made.lora["lora_a"]) @ np.asarray(made.lora["lora_b"])

    first = dare(0)
    kept = np.abs(first) > 1e-4 * np.abs(delta)
    assert kept.mean() == pytest.approx(0.3, abs=0.05)
    np.testing.assert_allclose(
        first[kept], (2 * delta / 0.3)[kept], rtol=1e-3, atol=1e-5
    )
    mean = np.mean([dare(seed) for seed in range(60)], axis=0)
    assert np.linalg.norm(mean - 2 * delta) < 0.3 * np.linalg.norm(2 * delta)
    np.testing.assert_array_equal(first, dare(0))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_full_fine_tuning_of_low_rank_is_extracted(name):
    case = CASES[name]
    params, found = members(case, {"rank": 2, "alpha": 6})
    adapted, variables = found[0]
    tuned = adapted.merge(variables)
    extracted = extract_adapter(params, tuned, adapted.targets())
    assert_close(merged(case, params, extracted), tuned, atol=5e-6)
    assert max(extracted.errors.values()) < 1e-4


def test_a_large_matrix_is_cut_about_as_well_as_can_be(monkeypatch):
    from lora_jax.ops import low_rank

    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.standard_normal((n, 60)))[0] for n in (90, 70))
    matrix = (u * 0.8 ** np.arange(60)) @ v.T
    exact = low_rank.best_factors(matrix, 4)
    monkeypatch.setattr(low_rank, "EXACT", 10)
    quick = low_rank.best_factors(matrix, 4)
    assert quick.error == pytest.approx(exact.error, rel=1e-4)
    real = np.linalg.norm(matrix - quick.a @ quick.b) / np.linalg.norm(matrix)
    assert quick.error == pytest.approx(real)


def test_all_faults_are_told_at_once():
    case = CASES["vmapped_experts"]
    _, found = members(case, OPTIONS[0], {"rank": 2, "alpha": 3, "dora": True})
    with pytest.raises(
        ValueError,
        match=r"2 adapters and 1 weights; weights must be finite; got \[nan\]; density "
        r"must be above 0 and at most 1; got 0; seed must be at least 0; got -1; "
        r"adapters \[1\] are DoRA",
    ):
        combine_adapters(pairs(found), [float("nan")], density=0, seed=-1)
    with pytest.raises(ValueError, match="'svd' needs a rank of at least 1; got None"):
        combine_adapters(pairs(found)[:1], [1.0], method="svd")
    with pytest.raises(ValueError, match=r"method must be one of .*; got 'mean'"):
        combine_adapters(pairs(found)[:1], [1.0], method="mean", rank=1)
    with pytest.raises(
        ValueError, match="keeps all ranks, so rank must be None; got 2"
    ):
        combine_adapters(pairs(found)[:1], [1.0], rank=2)
    lora, rows = pairs(found)[0]
    other = [dataclasses.replace(row, kernel_shape=(2, 3)) for row in rows]
    with pytest.raises(ValueError, match="router must be the same layer in all; got k"):
        combine_adapters([(lora, rows), (lora, other)], [1.0, 1.0])


def test_models_that_differ_in_shape_give_no_adapter():
    case = CASES["vmapped_experts"]
    params, found = members(case, OPTIONS[0])
    tuned = {**params, "router": {**params["router"], "kernel": jnp.ones((2, 2))}}
    with pytest.raises(ValueError, match=r"router/kernel must be \(.*\); got \(2, 2\)"):
        extract_adapter(params, tuned, found[0][0].targets())
