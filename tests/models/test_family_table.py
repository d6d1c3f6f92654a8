"""The table of families says what is so, and every family in it trains."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Literal

from lora_jax import LoRAConfig
from lora_jax.interop.pretrained import load_model
from lora_jax.models.decoder import Decoder
from lora_jax.models.families import FAMILIES
from lora_jax.train.causal_lm import make_lm_loss
from lora_jax.tree.paths import flatten
from tests.models.family_table import COLUMNS, FILE, cells, golden_folders, text
from tests.models.golden import GOLDEN

DECODERS = [kind for kind, family in FAMILIES.items() if family.module is Decoder]
LORA = LoRAConfig(rank=1, targets="all-linear")


@functools.cache
def adapted(kind):
    folder = golden_folders()[kind][0]
    return load_model(GOLDEN / folder, lora=LORA, key=jax.random.key(0))


def test_the_table_is_that_of_the_registry():
    again = "python -m tests.models.family_table"
    assert FILE.read_text(encoding="utf-8") == text(), f"write it again: {again}"


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_loads_trains_and_exchanges_adapters(kind):
    found = dict(zip(COLUMNS, cells(kind), strict=True))
    found.pop("GGUF in")
    assert found.pop("generates") == (not FAMILIES[kind].head)
    assert all(found.values()), found


@pytest.mark.parametrize("kind", DECODERS)
def test_every_adapter_of_a_decoder_gets_a_gradient(kind):
    model = adapted(kind)
    loss = make_lm_loss(model.module, is_tied=model.config.is_tied)
    ids = jnp.ones((1, 3), jnp.int32)
    batch = {"input_ids": ids, "labels": ids, "weights": jnp.ones((1, 3))}

    def total(lora):
        return loss({**model.variables, "lora": lora}, batch, {})[0]

    traced = jax.make_jaxpr(jax.grad(total))(model.variables["lora"]).jaxpr
    made = {out: equation for equation in traced.eqns for out in equation.outvars}
    assert len(traced.outvars) == len(flatten(model.variables["lora"]))
    for leaf in traced.outvars:  # zeros, where the loss doesn't depend on it
        inputs = made[leaf].invars if leaf in made else [leaf]
        assert not all(isinstance(i, Literal) for i in inputs)


@pytest.mark.parametrize("kind", DECODERS)
def test_every_decoder_goes_on_from_its_cache(kind):
    model, ids = adapted(kind), jnp.ones((1, 3), jnp.int32)

    def run(variables):
        apply = functools.partial(model.module.apply, variables)
        _, cache = apply(ids, 8, method="prefill")
        hidden, _ = apply(ids[:, :1], 3 + 0 * ids[:, :1], cache, method="decode")
        return apply(hidden, method="logits")

    logits = jax.eval_shape(run, model.variables)
    assert logits.shape == (1, 1, model.config.vocab_size)
