"""Methods other than LoRA on NNX models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax import LoRAConfig, make_lm_loss
from lora_jax.interop.peft import read_peft
from lora_jax.nnx import (
    Trained,
    adapt,
    eva_init,
    export_adapter,
    functional,
    load_adapter,
    lora_ga_init,
    lora_targets,
    merge,
    register_layer,
    save_adapter,
    update,
)
from lora_jax.ops.vera import vera_factors
from tests.laws import normal
from tests.reference import assert_close


def test_pissa_starts_silent_merges_and_survives_files(tmp_path):
    model = nnx.Sequential(nnx.Linear(5, 6, rngs=nnx.Rngs(0)), jnp.tanh)
    x = jax.random.normal(jax.random.key(2), (4, 5))
    config = LoRAConfig(rank=2, alpha=3, init="pissa", dora=True)
    adapted = adapt(model, config, rngs=nnx.Rngs(1))
    assert_close(adapted(x), model(x))
    trained = functional(adapted)[1]
    assert sorted(trained) == ["fixed", "frozen", "lora"]
    assert len(jax.tree.leaves(nnx.state(adapted, nnx.LoRAParam))) == 3
    trained["lora"] = jax.tree.map(lambda leaf: leaf + 0.1, trained["lora"])
    update(adapted, trained)
    got = adapted(x)
    assert abs(got - model(x)).max() > 1e-3
    assert_close(merge(adapted)(x), got)
    save_adapter(tmp_path / "ours", adapted)
    np.testing.assert_array_equal(load_adapter(tmp_path / "ours", model)(x), got)
    (factors,) = read_peft(export_adapter(tmp_path / "peft", adapted)).modules.values()
    (target,) = lora_targets(adapted)
    assert factors.rank == 2 * target.rank
    assert factors.scaling == target.scaling


def test_vera_is_that_of_the_linen_side_and_survives_files(tmp_path):
    model = nnx.Linear(5, 6, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(2), (4, 5))
    config = LoRAConfig(rank=3, alpha=2, vera=True, vera_seed=4, targets=".*")
    adapted = adapt(model, config, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(adapted(x), model(x))
    trained = functional(adapted)[1]
    drawn = vera_factors((5, 6), 3, seed=4)
    np.testing.assert_array_equal(trained["fixed"]["lora_b"], drawn.lora_b)
    assert sorted(trained["lora"]) == ["vera_b", "vera_d"]
    assert len(jax.tree.leaves(nnx.state(adapted, Trained))) == 2
    trained["lora"] = jax.tree.map(lambda leaf: leaf + 0.2, trained["lora"])
    update(adapted, trained)
    own = 2 / 3 * drawn.lora_a @ (0.3 * drawn.lora_b * 0.2)
    assert_close(adapted(x), model(x) + x @ own)
    assert_close(merge(adapted)(x), adapted(x))
    save_adapter(tmp_path, adapted)
    np.testing.assert_array_equal(load_adapter(tmp_path, model)(x), adapted(x))


class TwoLayers(nnx.Module):
    """Two linear layers with dropout between, and one under another name too."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.wide = nnx.LinearGeneral(7, (3, 2), rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.out = nnx.LinearGeneral((3, 2), 5, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        return self.out(self.drop(jnp.tanh(self.wide(x))))


def hidden_of(model, x):
    kernel, bias = model.wide.kernel[...], model.wide.bias[...]
    return np.tanh(np.einsum("ti,inh->tnh", x, kernel) + np.asarray(bias))


def test_lora_ga_starts_from_the_gradient_of_w0():
    model, config = TwoLayers(), LoRAConfig(rank=2, alpha=3, init="lora_ga", dora=True)
    batches = [normal((9, 7), seed=i) for i in range(2)]

    def loss(model, batch):
        return jnp.sum(model(batch) ** 2)

    adapted = lora_ga_init(model, config, loss, batches, rngs=nnx.Rngs(1))
    model.eval(), adapted.eval()
    gradient = 0.0  # of the second layer, by hand
    for x in batches:
        y, hidden = model(x), hidden_of(model, x)
        gradient += np.einsum("tnh,to->nho", np.float64(hidden), 2 * np.float64(y))
    u, _, vt = np.linalg.svd(gradient.reshape(6, 5), full_matrices=False)
    c = 5**0.25 / 16**0.5
    layer = adapted.out
    got = np.asarray(layer.lora_a[...]).reshape(6, 2)
    np.testing.assert_allclose(abs(got), abs(c * u[:, :2]), atol=1e-5)
    got = np.asarray(layer.lora_b[...])
    np.testing.assert_allclose(abs(got), abs(c * vt[2:4]), atol=1e-5)
    np.testing.assert_array_equal(layer.start_a[...], layer.lora_a[...])
    assert_close(adapted(batches[0]), model(batches[0]))
    with pytest.raises(ValueError, match="at least one batch; got none"):
        lora_ga_init(model, config, loss, [], rngs=nnx.Rngs(1))


def test_eva_starts_from_the_components_of_each_layer_s_inputs():
    model = TwoLayers()
    scale = jnp.array([1.0, 1.0, 1.0, 1.0, 1.0, 0.2, 0.1])
    batches = [
        {"x": normal((9, 7), seed=i) * scale, "mask": jnp.arange(9) != i}
        for i in range(2)
    ]
    given = {"wide": 3, "out": 1}
    config = LoRAConfig(
        rank=3, alpha=3, rank_pattern={"out": 1}, init="eva", rslora=True
    )

    def loss(model, batch):
        return jnp.sum(model(batch["x"]))

    def mask(batch):
        return batch["mask"]

    adapted = eva_init(model, config, loss, batches, rngs=nnx.Rngs(1), mask=mask)
    model.eval(), adapted.eval()
    kept = [np.asarray(b["x"])[np.asarray(b["mask"])] for b in batches]
    ratios, rows = {}, {}
    for name, parts in (
        ("wide", kept),
        ("out", [hidden_of(model, x).reshape(-1, 6) for x in kept]),
    ):
        stacked = np.concatenate(parts).astype(np.float64)
        _, s, rows[name] = np.linalg.svd(stacked - stacked.mean(0), full_matrices=False)
        ratios[name] = (s**2 / (s**2).sum())[: 2 * given[name]]  # rho = 2
    order = sorted(((-r, n) for n, own in ratios.items() for r in own))[:4]
    ranks = {name: [n for _, n in order].count(name) for name in rows}
    assert ranks != given  # they did move
    for target in lora_targets(adapted):
        assert target.rank == ranks.pop(target.path)
        assert target.scaling == pytest.approx(3 / given[target.path] ** 0.5)
        a = np.asarray(getattr(adapted, target.path).lora_a[...])
        wanted = rows[target.path][: target.rank].T
        got = a.reshape(-1, target.rank)
        np.testing.assert_allclose(abs(got), abs(wanted), atol=1e-4)  # of either sign
    assert not ranks
    assert_close(adapted(batches[0]["x"]), model(batches[0]["x"]))
    assert type(model.wide) is nnx.LinearGeneral  # the given model is as it was
    with pytest.raises(
        ValueError, match=r"rho be at least 1; got init='eva', rho=0\.5"
    ):
        eva_init(model, config, loss, batches, rngs=nnx.Rngs(1), rho=0.5)


class Square(nnx.Module):
    """A matrix that is multiplied from the right."""

    def __init__(self, rngs):
        self.w = nnx.Param(jax.random.normal(rngs.params(), (4, 4)))

    def __call__(self, x):
        return x @ self.w.T


def test_one_layer_of_a_registered_stack_is_compared_with_its_equation():
    class Wrong(Square):
        def __call__(self, x):
            return x @ self.w

    config = LoRAConfig(rank=2, targets=".*")
    for cls in (Square, Wrong):
        register_layer(cls, "...i,oi->...o", weight="w")
        stack = nnx.split_rngs(splits=3)(nnx.vmap(cls))(nnx.Rngs(0))
        if cls is Square:
            assert adapt(
                stack, config, rngs=nnx.Rngs(1), stack_axis=0
            ).lora_a.shape == (3, 4, 2)
            continue
        with pytest.raises(ValueError, match="equation does not reproduce its output"):
            adapt(stack, config, rngs=nnx.Rngs(1), stack_axis=0)


def test_a_balance_loss_with_an_nnx_model_is_refused():
    class Hidden(nnx.Linear):
        def hidden(self, x, deterministic):
            return self(x)

    module, variables = functional(Hidden(4, 4, rngs=nnx.Rngs(0)))
    options = {"inputs": ["x"], "router_aux_loss_coef": 0.1}
    loss = make_lm_loss(module, is_tied=False, **options)
    batch = {"x": jnp.ones((1, 4))}
    with pytest.raises(ValueError, match="mutable must not be given for an NNX model"):
        loss(variables, batch, {})


def test_adapt_says_what_starts_from_data():
    config = LoRAConfig(rank=2, init="lora_ga", targets=".*")
    with pytest.raises(ValueError, match=r"which has no data; .*nnx.lora_ga_init"):
        adapt(nnx.Linear(5, 6, rngs=nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
