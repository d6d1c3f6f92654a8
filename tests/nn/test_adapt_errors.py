"""Errors of `adapt` and their messages."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lora_jax import LoRAConfig, LoRADense, adapt, find_targets
from tests.nn.external_models import MODELS, External
from tests.nn.external_modules import Expert
from tests.nn.tools import key, normal

CASES: dict[str, External] = {case.name: case for case in MODELS}
X = normal((2, 6))
EXPERT = {
    "up": {"kernel": normal((6, 12)), "bias": normal((12,))},
    "down": {"kernel": normal((12, 6)), "bias": normal((6,))},
}


def expert(**fields):
    config = LoRAConfig(**{"rank": 2, "alpha": 6, **fields})
    return adapt(Expert(), config, X)


class OwnArithmetic(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.initializers.lecun_normal()
        wq, wk = (self.param(name, init, (6, 4)) for name in ("wq", "wk"))
        y = x @ jnp.concatenate([wq, wk], axis=1)
        return nn.Dense(3, name="out")(y)


class TiedDense(nn.Dense):
    @nn.compact
    def __call__(self, inputs):
        shape = (self.features, inputs.shape[-1])
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape)
        return inputs @ kernel.T


class Unparsable(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="out")(
            nn.Einsum((6, 4), "bi,io->b", name="sum")(x)[None]
        )


class TwoWays(nn.Module):
    """Multiplies by a kernel, then by its transpose."""

    back: str = "bo,io->bi"

    @nn.compact
    def __call__(self, x):
        both = nn.Einsum((6, 6), use_bias=False, name="both")
        y = both(both(both(x, "bi,io->bo"), self.back), "bi,io->bo")
        return nn.Dense(3, name="out")(y)


def test_an_unmatched_pattern_suggests_the_nearest_path():
    config = LoRAConfig(targets=["dwon"], exclude=["upp"])
    with pytest.raises(ValueError, match="dwon") as error:
        find_targets(Expert(), config, params=EXPERT)
    assert str(error.value) == (
        'targets=["dwon"] matched 0 of 2 kernels. Did you mean: down? '
        'exclude=["upp"] matched 0 of 2 kernels. Did you mean: up?'
    )
    with pytest.raises(ValueError, match=r"matched 0 of 2 kernels"):
        expert(targets=["dwon"]).init(key(0), X)


def test_a_layer_that_cannot_be_adapted_is_named():
    for model, target, named in (
        (OwnArithmetic(), ["wq"], "'wq', a weight of OwnArithmetic, which"),
        (TiedDense(3), ".*", "'kernel', a weight of TiedDense, which"),
        (Unparsable(), "all-linear", "'sum/kernel', a weight of Einsum, which"),
        (TwoWays(), "all-linear", "'both/kernel', a weight of Einsum, .*: its calls"),
    ):
        with pytest.raises(ValueError, match=named):
            find_targets(model, LoRAConfig(targets=target), X)
    with pytest.warns(UserWarning, match=r"does not adapt wq \(OwnArithmetic, and 1"):
        chosen = find_targets(OwnArithmetic(), LoRAConfig(), X)
    assert [target.path for target in chosen] == ["out"]
    chosen = find_targets(TwoWays(back="xy,yz->xz"), LoRAConfig(), X)
    assert [target.path for target in chosen] == ["both", "out"]
    excluded = LoRAConfig(exclude=["sum"])
    assert [t.path for t in find_targets(Unparsable(), excluded, X)] == ["out"]


def test_layers_must_exist_and_not_be_stacked():
    case = CASES["vit"]
    rows = find_targets(case.model, case.config(layers=[1]), *case.args)
    assert {row.path.split("/")[0] for row in rows} == {"block_1"}
    with pytest.raises(
        ValueError, match=r"layers=\[7\] matched 0 of the layers \[0, 1"
    ):
        find_targets(case.model, case.config(layers=[1, 7]), *case.args)
    case = CASES["scanned"]
    with pytest.raises(ValueError, match="stacked in one array"):
        find_targets(case.model, case.config(layers=[0]), *case.args)


def test_params_of_another_model_are_listed_leaf_by_leaf():
    wrong = {
        "up": {"kernel": jnp.ones((6, 13)), "bias": jnp.ones(12)},
        "left": {"b": X},
    }
    with pytest.raises(ValueError, match="params do not match the model") as error:
        expert().attach(wrong, key(0))
    for fault in (
        "down/kernel is missing",
        "left/b is not in the model",
        "up/kernel must be (6, 12); got (6, 13)",
    ):
        assert fault in str(error.value)


@pytest.mark.parametrize("module", [np, jnp], ids=["numpy", "jax"])
def test_kernels_must_be_finite_floats(module):
    def with_kernel(kernel):
        return {**EXPERT, "up": {**EXPERT["up"], "kernel": kernel}}

    with pytest.raises(ValueError, match=r"kernels must be finite; up/kernel contain"):
        expert().attach(with_kernel(module.full((6, 12), np.nan, "f4")), key(0))
    with pytest.raises(TypeError, match="must be floating-point; up/kernel is int8"):
        expert().attach(with_kernel(module.ones((6, 12), "i1")), key(0))


def test_adapters_of_another_config_are_rejected():
    variables = expert().attach(EXPERT, key(1))
    with pytest.raises(
        ValueError, match=r"must be \(6, 3\), \(3, 12\) for rank 3 and a kernel"
    ):
        expert(rank=3).apply(variables, X)
    with pytest.raises(ValueError, match="no adapter for a target"):
        expert().apply({"frozen": EXPERT}, X)
    with pytest.raises(ValueError, match="an extra adapter"):
        expert(targets=["up"]).apply(variables, X)


def test_a_rank_above_the_smaller_side_warns():
    with pytest.warns(UserWarning, match=r"rank 7 exceeds the smaller side"):
        expert(rank=7).attach(EXPERT, key(1))


def test_a_model_with_lora_layers_is_rejected():
    for example in ((X,), ()):
        adapted = adapt(LoRADense(3, lora=LoRAConfig(rank=2)), LoRAConfig(), *example)
        with pytest.raises(ValueError, match="already has LoRA layers"):
            adapted.targets({"kernel": normal((6, 3)), "bias": normal((3,))})


def test_wrong_types_are_errors():
    with pytest.raises(TypeError, match=r"model must be a flax.linen Module; got int"):
        adapt(3, LoRAConfig())
    with pytest.raises(TypeError, match=r"Linear, a flax.nnx one: use `lora_jax.nnx"):
        adapt(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), LoRAConfig())  # pyright: ignore[reportArgumentType] - refused
    with pytest.raises(TypeError, match=r"config must be a LoRAConfig; got dict"):
        adapt(Expert(), {"rank": 3})
