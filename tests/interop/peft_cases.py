"""The golden adapters: which there are, and what PEFT computes with them."""

import functools

import jax
import numpy as np

from tests.models.golden import GOLDEN

INPUTS = (
    *("input_ids", "attention_mask", "token_type_ids", "pixel_values"),
    "decoder_input_ids",
)
CASES = sorted(
    (folder.parent.name, folder.name.removeprefix("peft_"))
    for folder in GOLDEN.glob("*/peft_*/")
)

# transformers keeps the recurrent state in float32, and here a rounded one grows: each
# is up to 9e-5 from what both compute in float64, where they differ by 4e-7.
ROUNDED = {("qwen3_5_text", "dora"): 2e-4}


def adapter_of(family: str, kind: str):
    return GOLDEN / family / f"peft_{kind}"


@functools.cache
def reference(family: str):
    name = "peft_reference.npz" if family == "bert" else "reference.npz"
    with np.load(GOLDEN / family / name) as arrays:
        return {key: arrays[key] for key in arrays.files}


def inputs(family: str):
    arrays = reference(family)
    return [arrays[name] for name in INPUTS if name in arrays]


def logits_of(module, variables, family: str):
    return np.asarray(jax.jit(module.apply)(variables, *inputs(family)))


def merged_logits_of(module, variables, family: str):
    def run(variables, *arrays):
        return module.model.apply({"params": module.merge(variables)}, *arrays)

    return np.asarray(jax.jit(run)(variables, *inputs(family)))


def assert_peft(logits, family: str, kind: str):
    wanted = reference(family)[f"logits_{kind}"]
    assert logits.shape == wanted.shape
    atol = ROUNDED.get((family, kind), 6e-5)
    np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=atol)
