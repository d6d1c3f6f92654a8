"""LoRA-FA's projection of B's gradient, against its definition in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import LoRAConfig, adapt, lora_fa_projection
from lora_jax.tree.paths import flatten, unflatten
from tests.laws import normal
from tests.nn.external_models import MODELS
from tests.reference import assert_close


def test_each_layer_s_gradient_is_multiplied_by_its_own_inverse():
    (case,) = (case for case in MODELS if case.name == "scanned_axis_1")
    adapted = adapt(case.model, case.config(lora_fa=True), *case.args)
    base = case.variables()["params"]
    variables = jax.eval_shape(adapted.attach, base, jax.random.key(1))
    drawn = jax.tree.map(lambda leaf: normal(leaf.shape, seed=leaf.size), variables)
    targets = adapted.targets(base)
    gradients = {"lora": drawn["lora"], "params": {"head": {"bias": jnp.ones(3)}}}
    tx = lora_fa_projection(drawn, targets)
    updates, _ = tx.update(gradients, tx.init(gradients))
    assert updates["params"]["head"]["bias"] is gradients["params"]["head"]["bias"]
    got, given = flatten(updates["lora"]), flatten(gradients["lora"])
    fixed, checked = flatten(drawn["fixed"]), 0
    for target in targets:
        a, g = fixed[f"{target.path}/lora_a"], given[f"{target.path}/lora_b"]
        found = np.moveaxis(got[f"{target.path}/lora_b"], target.scanned_b, [0])
        a = np.moveaxis(np.asarray(a, np.float64), target.scanned_a, [0])
        g = np.moveaxis(np.asarray(g, np.float64), target.scanned_b, [0])
        for own, grad, new in zip(a, g, found, strict=True):
            rows = own.reshape(-1, target.rank)
            wanted = np.linalg.inv(rows.T @ rows) @ grad.reshape(target.rank, -1)
            wanted = wanted.reshape(new.shape) / target.scaling**2
            assert_close(new, wanted, rtol=1e-4)  # a Gram matrix squares the condition
            checked += 1
    assert checked > len(targets)


def test_adapters_whose_a_is_trained_are_refused():
    model = MODELS[0].model
    config = LoRAConfig(rank=2, targets=".*")
    targets = adapt(model, config, *MODELS[0].args).targets()
    with pytest.raises(ValueError, match="'fixed' and train B, as lora_fa=True"):
        lora_fa_projection({"lora": unflatten({})}, targets)
