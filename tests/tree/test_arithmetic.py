import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import LoRAConfig, adapt
from lora_jax.tree.arithmetic import fit_adapter
from lora_jax.tree.paths import flatten
from tests.nn.external_models import MODELS, trained

CASES = {case.name: case for case in MODELS}


@pytest.mark.parametrize("name", ["vmapped_experts", "scanned_axis_1", "odds"])
def test_a_fitted_adapter_is_the_same_change_of_every_kernel(name):
    case = CASES[name]
    small = adapt(case.model, case.config(rank=2, alpha=6), *case.args)
    large = adapt(case.model, case.config(rank=3, alpha=5, rslora=True), *case.args)
    params = case.variables()["params"]
    lora = trained(small.attach(params, jax.random.key(0)))["lora"]
    fitted = fit_adapter(lora, small.targets(), large.targets())
    shapes = {path: leaf.shape for path, leaf in flatten(fitted).items()}
    for target in large.targets():
        assert shapes[f"{target.path}/lora_a"] == target.factor_shapes[0]
        assert shapes[f"{target.path}/lora_b"] == target.factor_shapes[1]
    got = large.merge({"frozen": params, "lora": fitted})
    wanted = small.merge({"frozen": params, "lora": lora})
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, wanted
    )


def test_adapters_of_several_ranks_share_one_compilation():
    model, x = nn.Dense(8, name="up"), jnp.ones((2, 6))
    served = adapt(model, LoRAConfig(rank=4, alpha=8, targets=".*"), x)
    traces = []

    @jax.jit
    def run(variables):
        traces.append(1)
        return served.apply(variables, x)

    params = {"kernel": jnp.ones((6, 8)), "bias": jnp.zeros(8)}
    for rank, alpha in ((1, 2.0), (2, 7.0), (4, 8.0)):
        own = adapt(model, LoRAConfig(rank=rank, alpha=alpha, targets=".*"), x)
        variables = trained(own.attach(params, jax.random.key(rank)))
        fitted = fit_adapter(variables["lora"], own.targets(), served.targets())
        got = run({"frozen": params, "lora": fitted})
        np.testing.assert_allclose(got, own.apply(variables, x), rtol=1e-5)
    assert len(traces) == 1


def test_layers_without_an_adapter_get_no_update():
    case = CASES["vmapped_experts"]
    part = adapt(case.model, case.config(targets=["up"]), *case.args)
    whole = adapt(case.model, case.config(), *case.args)
    lora = part.attach(case.variables()["params"], jax.random.key(0))["lora"]
    fitted = flatten(fit_adapter(lora, part.targets(), whole.targets()))
    assert not fitted["router/lora_a"].any()
    assert not fitted["router/lora_b"].any()
    with pytest.raises(ValueError, match="experts/down is not a target; router is n"):
        fit_adapter(
            whole.attach(case.variables()["params"], jax.random.key(0))["lora"],
            sorted(whole.targets(), key=lambda row: row.path),
            part.targets(),
        )


def test_a_smaller_rank_is_rejected():
    case = CASES["vmapped_experts"]
    two, one = (adapt(case.model, case.config(rank=r), *case.args) for r in (2, 1))
    lora = two.attach(case.variables()["params"], jax.random.key(0))["lora"]
    with pytest.raises(
        ValueError, match="router must have a rank of at least 2; got 1"
    ):
        fit_adapter(lora, two.targets(), one.targets())
