"""Scanned blocks and single ones: which may be scanned, and taking a stack apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.config import LoRAConfig
from lora_jax.interop.pretrained import load_model
from lora_jax.models.generate import generate
from lora_jax.models.loaded import LoadedModel
from lora_jax.models.source import open_source
from lora_jax.models.stacking import can_scan, unscan
from lora_jax.names import LORA, PARAMS
from lora_jax.tree.paths import flatten
from tests.models.golden import GOLDEN

IDS = jnp.array([[5, 6, 7, 8], [9, 2, 3, 1]])


def scanned(family: str, lora: LoRAConfig | None) -> LoadedModel:
    key = None if lora is None else jax.random.key(0)
    model = load_model(GOLDEN / family, lora=lora, key=key, scan_layers=True)
    rng = np.random.default_rng(0)
    for name in {LORA, PARAMS} & set(model.variables) if lora else ():
        model.variables[name] = jax.tree.map(
            lambda a: a + 0.1 * jnp.float32(rng.standard_normal(a.shape)),
            model.variables[name],
        )
    return model


CONFIGS = {
    "no adapter": None,
    "all linears": LoRAConfig(rank=2),
    "the stack by its name": LoRAConfig(targets=r"layers/attention/(query|output)"),
    "patterns of the stack": LoRAConfig(
        targets=["query", "up", "down"],
        exclude=r"layers/mlp/down",
        rank_pattern={"layers/mlp/up": 3},
        alpha_pattern={"layers/attention/.*": 5},
        rslora=True,
    ),
    "DoRA, norms and embedding in full": LoRAConfig(
        rank=2, dora=True, train=["attention_norm", "embed"]
    ),
    "biases": LoRAConfig(targets=["query"], bias="lora_only"),
}


@pytest.mark.parametrize(
    ("family", "name"),
    [("llama", name) for name in CONFIGS if name != "biases"]
    + [("qwen2", "biases"), ("gemma3", "all linears")],
)
def test_the_function_stays_the_same(family, name):
    lora = CONFIGS[name]
    before = scanned(family, lora)
    after = unscan(before)
    assert not any("layers/" in p for p in flatten(after.variables))
    assert any("layer_1/" in p for p in flatten(after.variables))
    sizes = [sum(a.size for a in jax.tree.leaves(m.variables)) for m in (before, after)]
    assert sizes[0] == sizes[1]
    np.testing.assert_allclose(
        *(jax.jit(m.module.apply)(m.variables, IDS) for m in (after, before)),
        rtol=1e-5,
        atol=1e-5,
    )
    if lora is not None:  # the collections are those that its own config makes
        wanted = jax.eval_shape(after.module.init, jax.random.key(0), IDS)
        assert jax.tree.map(jnp.shape, wanted) == jax.tree.map(
            jnp.shape, after.variables
        )


def test_it_writes_the_same_text():
    before = scanned("llama", LoRAConfig(rank=2))
    after = unscan(before)
    prompts = [[5, 6, 7], [8]]
    texts = [
        generate(m.module, m.variables, prompts, max_new_tokens=6)
        for m in (before, after)
    ]
    assert texts[0] == texts[1]


def test_the_arrays_lie_in_the_old_ones():
    before = load_model(GOLDEN / "llama", scan_layers=True, param_dtype=jnp.float32)
    after = unscan(before)
    stack = before.params["layers"]["mlp"]["up"]["kernel"]
    starts = [
        after.params[f"layer_{i}"]["mlp"]["up"]["kernel"].unsafe_buffer_pointer()
        for i in range(2)
    ]
    start, bytes_each = stack.unsafe_buffer_pointer(), stack[0].nbytes
    aligned = [i for i in range(2) if (start + i * bytes_each) % 64 == 0]
    assert aligned
    assert all(starts[i] == start + i * bytes_each for i in aligned)


def test_what_is_not_scanned_comes_back_as_it_is():
    model = load_model(GOLDEN / "bert")
    assert unscan(model) is model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"targets": ["query", "mlp/up"], "rank_pattern": {"down": 4}},
        {"targets": ["up", "fc1", "conv2d_3"], "exclude": ["h1"]},
        {"targets": r"(fc\d|.*/(query|value))", "alpha_pattern": {"w2": 3}},
        {"targets": r".*layers?(_\d+)?/mlp/(up|down)"},
        {"targets": ["layers/mlp/up"], "rank_pattern": {"layers/.*": 4}},
        {"train": ["attention_norm", "embed"], "bias": "all"},
    ],
    ids=str,
)
def test_blocks_that_a_config_treats_alike_can_be_scanned(options):
    assert can_scan(LoRAConfig(**options), open_source(GOLDEN / "llama").config)


@pytest.mark.parametrize(
    "options",
    [
        {"layers": [0]},
        {"layers": [0, 1]},
        {"targets": ["layer_0/attention/query"]},
        {"targets": ["layer_0/mlp/up", "layer_1/mlp/up"]},  # all, but not their stack
        {"targets": r".*_\d/mlp/up"},
        {"exclude": ["layer_0/mlp/up"]},
        {"rank_pattern": {"layer_1/.*": 4}},
        {"alpha_pattern": {r".*_1/mlp/up": 4}},
        {"train": ["layer_1"]},
        {"train": ["layer_1/mlp_norm/scale"]},
    ],
    ids=str,
)
def test_blocks_that_a_config_tells_apart_can_not_be_scanned(options):
    assert not can_scan(LoRAConfig(**options), open_source(GOLDEN / "llama").config)
