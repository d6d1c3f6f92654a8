"""Every adapted layer runs the public ops; none has its own arithmetic.

Each op is replaced by one that records its call and shifts the base's output, which
must show in every adapted layer.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import LoRAAttention, LoRAConfig, adapt, load_model
from lora_jax.nn import attention, layer_rules
from tests.models.golden import GOLDEN
from tests.nn.tools import key, normal

SHIFT = 3.0
X, IDS = normal((2, 4, 6)), jnp.array([[1, 4, 2]])
EVERYTHING = LoRAConfig(rank=2, alpha=6, targets=".*")
LAYERS = {
    "dense": ("lora_dense", nn.Dense, (5,), X),
    "general": ("lora_einsum", nn.DenseGeneral, ((5, 2),), X),
    "einsum": ("lora_einsum", nn.Einsum, ((6, 5), "btd,do->bto"), X),
    "embed": ("lora_embed", nn.Embed, (7, 5), IDS),
    "conv": ("lora_conv", nn.Conv, (5, (3,)), X),
}


@pytest.fixture
def watched(monkeypatch):
    """Replaces every op that layers call; returns the names of the called ops."""
    called = []

    def replace(module, name):
        def op(*args, base_output, **options):
            called.append(name)
            return base_output + SHIFT

        monkeypatch.setattr(module, name, op)

    for name in ("lora_dense", "lora_einsum", "lora_embed", "lora_attend", "lora_conv"):
        assert getattr(layer_rules, name) is getattr(lora_jax, name)
        replace(layer_rules, name)
    assert attention.lora_einsum is lora_jax.lora_einsum
    replace(attention, "lora_einsum")
    return called


@pytest.mark.parametrize("name", LAYERS)
def test_every_adapted_layer_runs_its_public_op(name, watched):
    op, layer, args, x = LAYERS[name]
    plain = layer(*args)
    params = plain.init(key(0), x)["params"]
    wanted = plain.apply({"params": params}, x) + SHIFT
    adapted = adapt(plain, EVERYTHING, x)
    got = adapted.apply(adapted.attach(params, key(1)), x)
    np.testing.assert_array_equal(got, wanted)

    own = getattr(lora_jax, f"LoRA{layer.__name__}")(*args, lora=EVERYTHING)
    variables = {**own.init(key(2), x), "frozen": params}
    np.testing.assert_array_equal(own.apply(variables, x), wanted)
    assert set(watched) == {op}


def test_a_tied_head_runs_its_public_op(watched):
    plain = nn.Embed(7, 6)
    adapted = adapt(plain, EVERYTHING, IDS)
    params = plain.init(key(0), IDS)["params"]
    variables = adapted.attach(params, key(1))
    got = adapted.apply(variables, X, method="attend")
    wanted = plain.apply({"params": params}, X, method="attend") + SHIFT
    np.testing.assert_array_equal(got, wanted)
    assert watched == ["lora_attend"]


def test_attention_runs_the_public_op_for_every_projection(watched):
    layer = LoRAAttention(num_heads=2, lora=EVERYTHING)
    layer.init(key(0), X)
    assert watched == ["lora_einsum"] * 4  # query, key, value, out


def test_every_target_of_a_decoder_runs_a_public_op(watched):
    model = load_model(GOLDEN / "llama").module
    adapted = adapt(model, LoRAConfig(rank=2, alpha=6), IDS)
    variables = jax.eval_shape(adapted.init, key(0), IDS)
    watched.clear()
    jax.eval_shape(adapted.apply, variables, IDS)
    assert watched == ["lora_dense"] * len(adapted.targets())
