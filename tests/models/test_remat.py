"""What the policies keep of a block, and what they compute again."""

import math

import jax
import jax.numpy as jnp
import pytest

from lora_jax import LoRAConfig, adapt
from lora_jax.models.decoder import Decoder
from lora_jax.models.decoder_config import DecoderConfig

CONFIG = DecoderConfig(
    vocab_size=8,
    hidden_size=4,
    num_layers=3,
    num_heads=1,
    num_kv_heads=1,
    head_dim=4,
    mlp_size=8,
    max_positions=16,
)
IDS = jnp.zeros((1, 16), jnp.int32)


def gradient(*, dora):
    """Returns the traced gradient of a scanned decoder's adapters."""
    model = Decoder(CONFIG, scan_layers=True, remat="lora")
    adapted = adapt(model, LoRAConfig(rank=2, alpha=4, dora=dora), IDS)

    def loss(lora, frozen):
        return jnp.sum(adapted.apply({"frozen": frozen, "lora": lora}, IDS))

    params = jax.eval_shape(model.init, jax.random.key(0), IDS)["params"]
    shapes = jax.eval_shape(adapted.attach, params, jax.random.key(1))
    return jax.jit(jax.grad(loss)).trace(shapes["lora"], shapes["frozen"])


def kept(traced):
    """Returns the numbers that the forward pass keeps of all blocks."""
    scans = (each for each in traced.jaxpr.eqns if each.primitive.name == "scan")
    forward = next(scans)
    stacked = forward.outvars[forward.params["num_carry"] :]
    return sum(math.prod(each.aval.shape) for each in stacked)


@pytest.fixture(scope="module")
def dora():
    return gradient(dora=True)


def test_dora_keeps_its_norms_and_each_output_once(dora):
    d = CONFIG.hidden_size
    norms = 5 * d + 2 * CONFIG.mlp_size  # of q, k, v, o and down; of gate and up
    down = IDS.size * d  # an output that nothing else needs
    extra = kept(dora) - kept(gradient(dora=False))
    assert extra == CONFIG.num_layers * (norms + down)


def test_the_norms_of_dora_are_not_computed_again(dora):
    lines = dora.lower().compile().as_text().splitlines()
    squares = [line for line in lines if "jit(_squares)" in line]
    assert squares
    assert not [line for line in squares if "rematted_computation" in line]
