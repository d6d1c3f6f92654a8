"""Numbers of trained parameters that papers and other libraries report, exactly."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from lora_jax import LoRAConfig, LoRADense, count, find_targets

GPT3_WIDTH = 12288


class Stack(nn.Module):
    """Named dense layers ``{name: (in, out)}``, a block a layer."""

    layers: int
    sizes: tuple[tuple[str, int, int], ...]

    @nn.compact
    def __call__(self, inputs):
        for layer in range(self.layers):
            for name, i, o in self.sizes:
                nn.Dense(o, use_bias=False, name=f"layer_{layer}_{name}")(inputs[i])


def square(width):
    return tuple((name, width, width) for name in ("q", "k", "v", "o"))


def llama(width, kv, mlp):
    return (
        ("q", width, width),
        ("k", width, kv),
        ("v", width, kv),
        ("o", width, width),
        ("gate", width, mlp),
        ("up", width, mlp),
        ("down", mlp, width),
    )


QV = r".*_(q|v)"
CASES = {
    "GPT-2 medium": (24, square(1024), QV, 4, 393_216),
    "GPT-2 large": (36, square(1280), QV, 4, 737_280),
    "RoBERTa-base": (12, square(768), QV, 8, 294_912),
    "RoBERTa-large": (24, square(1024), QV, 8, 786_432),
    "DeBERTa-XXL": (48, square(1536), QV, 16, 4_718_592),
    "GPT-3 r1": (96, square(GPT3_WIDTH), QV, 1, 4_718_592),
    "GPT-3 r4": (96, square(GPT3_WIDTH), QV, 4, 18_874_368),
    "GPT-3 r8": (96, square(GPT3_WIDTH), QV, 8, 37_748_736),
    "GPT-3 r64": (96, square(GPT3_WIDTH), QV, 64, 301_989_888),
    "LLaMA-7B qv": (32, llama(4096, 4096, 11008), QV, 8, 4_194_304),
    "LLaMA-7B all": (32, llama(4096, 4096, 11008), "all-linear", 64, 159_907_840),
    "Llama-3.1-8B": (32, llama(4096, 1024, 14336), "all-linear", 16, 41_943_040),
    "Llama-3.2-3B": (28, llama(3072, 1024, 8192), QV, 32, 9_175_040),
    "Qwen2.5-3B": (36, llama(2048, 256, 11008), QV, 16, 3_686_400),
}


@pytest.mark.parametrize("name", CASES)
def test_published_counts(name):
    layers, sizes, targets, rank, wanted = CASES[name]
    inputs = {
        i: jax.ShapeDtypeStruct((1, i), jnp.float32) for _, i, _ in sizes
    }  # shapes only: GPT-3 takes no memory
    config = LoRAConfig(rank=rank, targets=targets)
    found = find_targets(Stack(layers, sizes), config, inputs)
    assert sum(target.trainable for target in found) == wanted


def test_dora_adds_an_output_sized_magnitude_a_layer():
    layers, sizes, targets, rank, plain = CASES["Llama-3.2-3B"]
    x = {i: jax.ShapeDtypeStruct((1, i), jnp.float32) for _, i, _ in sizes}
    config = LoRAConfig(rank=rank, targets=targets, dora=True)
    found = find_targets(Stack(layers, sizes), config, x)
    trained = sum(target.trainable for target in found)
    assert trained == plain + 28 * (3072 + 1024) == 9_289_728


def test_a_10_to_8_layer_trains_54_of_80():
    layer = LoRADense(8, use_bias=False, lora=LoRAConfig(rank=3))
    variables = layer.init(jax.random.key(0), jnp.ones((1, 10)))
    assert count(variables["frozen"]) == 80
    assert count(variables["lora"]) == 54
