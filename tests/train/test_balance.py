"""The load-balancing loss, against transformers' training loss of the same folders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.config import LoRAConfig
from lora_jax.models.load import load_base
from lora_jax.nn.adapt import adapt
from lora_jax.train.balance import balance_loss
from lora_jax.train.causal_lm import make_lm_loss
from lora_jax.train.step import make_eval_step
from tests.models.golden import GOLDEN
from tests.reference import assert_close

WANTED = dict(np.load(GOLDEN / "balance.npz"))
COEFFICIENT = float(WANTED["coefficient"])


def batch_of(name):
    ids = np.load(GOLDEN / name / "reference.npz")["input_ids"]
    place = np.arange(ids.shape[1])
    weights = place < WANTED["lengths"][:, None] - 1
    return {
        "input_ids": jnp.asarray(ids, jnp.int32),
        "labels": jnp.asarray(np.roll(ids, -1, axis=1), jnp.int32),
        "weights": jnp.asarray(weights, jnp.float32),
        "segment_ids": jnp.asarray(place < WANTED["lengths"][:, None], jnp.int32),
    }


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3_moe", {"scan_layers": True, "remat": "lora"}),
        ("qwen3_moe_mixed", {"scan_layers": False}),
        ("gpt_oss", {"scan_layers": True, "remat": "block"}),
    ],
)
def test_loss_and_gradient_are_those_of_transformers(name, options):
    loaded = load_base(GOLDEN / name, **options)
    loss_fn = make_lm_loss(
        loaded.module,
        is_tied=loaded.config.is_tied,
        router_aux_loss_coef=COEFFICIENT,
    )
    batch, kept = batch_of(name), loaded.params

    def loss(params):
        total, weight, metrics = loss_fn({"params": params}, batch, {})
        return total / weight, metrics["router_aux_loss"] / weight

    (total, aux), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(kept)
    assert_close(total, WANTED[f"{name}_loss"])
    assert_close(aux, WANTED[f"{name}_aux"])
    if options["scan_layers"]:
        router = gradient["layers"]["mlp"]["router"]["kernel"][-1]
    else:
        routers = [own["mlp"].get("router") for own in _layers(gradient)]
        router = next(own for own in reversed(routers) if own is not None)["kernel"]
    np.testing.assert_allclose(router.T, WANTED[f"{name}_router"], atol=2e-6)


def _layers(tree):
    return [tree[f"layer_{i}"] for i in range(sum("layer_" in key for key in tree))]


def test_an_adapted_model_has_it_too_and_an_evaluation_its_mean():
    loaded = load_base(GOLDEN / "qwen3_moe", scan_layers=True)
    adapted = adapt(loaded.module, LoRAConfig(rank=2), *loaded.inputs)
    variables = adapted.attach(loaded.params, jax.random.key(0))
    step = make_eval_step(
        make_lm_loss(adapted, is_tied=False, router_aux_loss_coef=COEFFICIENT)
    )
    sums = step(variables, batch_of("qwen3_moe"))
    assert_close(sums["router_aux_loss"] / sums["weight"], WANTED["qwen3_moe_aux"])
    plain = make_lm_loss(adapted, is_tied=False)(variables, batch_of("qwen3_moe"), {})
    assert plain[2] == {}
    assert_close(plain[0] + COEFFICIENT * sums["router_aux_loss"], sums["loss"])


def test_nothing_is_computed_for_it_unless_it_is_asked_for():
    loaded = load_base(GOLDEN / "qwen3_moe", scan_layers=True)
    batch = batch_of("qwen3_moe")

    def loss(**options):
        function = make_lm_loss(loaded.module, is_tied=False, **options)
        return str(jax.make_jaxpr(function)({"params": loaded.params}, batch, {}))

    assert loss() == loss(router_aux_loss_coef=0.0)
    assert loss().count(" exp ") < loss(router_aux_loss_coef=0.1).count(" exp ")


def test_even_routing_costs_the_number_of_chosen_experts_and_uneven_more():
    scores = jnp.zeros((2, 1, 4, 4))
    even = jnp.array([[0, 1], [2, 3], [0, 1], [2, 3]])[None, None].repeat(2, 0)
    assert balance_loss({"scores": (scores,), "chosen": (even,)}) == 2
    sure = 9.0 * jax.nn.one_hot(jnp.zeros((2, 1, 4), int), 4)
    same = jnp.zeros((2, 1, 4, 1), int)
    assert balance_loss({"a": {"scores": (sure,), "chosen": (same,)}}) > 3.9


def test_a_model_without_experts_is_an_error():
    loaded = load_base(GOLDEN / "llama")
    loss = make_lm_loss(loaded.module, is_tied=False, router_aux_loss_coef=0.1)
    ids = jnp.ones((1, 3), jnp.int32)
    batch = {"input_ids": ids, "labels": ids, "weights": jnp.ones((1, 3))}
    with pytest.raises(ValueError, match="must be 0 for a model without experts"):
        loss({"params": loaded.params}, batch, {})
    with pytest.raises(ValueError, match=r"must be at least 0; got -0\.1"):
        make_lm_loss(loaded.module, is_tied=False, router_aux_loss_coef=-0.1)
