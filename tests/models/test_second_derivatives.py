"""Forward over reverse, the usual Hessian-vector product, of the built-in models."""

import jax
import jax.numpy as jnp

from lora_jax import LoRAConfig, load_model, make_lm_loss
from lora_jax.names import LORA
from lora_jax.train.causal_lm import DECODER_INPUTS
from tests.models.golden import GOLDEN

IDS = jnp.arange(3, 15, dtype=jnp.int32).reshape(2, 6)


def test_a_hessian_vector_product_of_the_loss_can_be_lowered():
    model = load_model(GOLDEN / "llama", lora=LoRAConfig(rank=2), key=jax.random.key(0))
    loss_fn = make_lm_loss(model.module, is_tied=False)
    batch = dict.fromkeys((*DECODER_INPUTS, "labels"), IDS)
    batch |= {"weights": jnp.ones(IDS.shape)}

    def product(lora):
        def loss(lora):
            return loss_fn({**model.variables, LORA: lora}, batch, {})[0]

        return jax.jvp(jax.grad(loss), (lora,), (lora,))[1]

    lora = model.variables[LORA]
    lowered = jax.jit(product).lower(lora)  # raises for a `custom_vjp` in a VJP's rules
    got = jax.tree.map(lambda leaf: leaf.shape, lowered.out_info)
    assert got == jax.tree.map(jnp.shape, lora)
