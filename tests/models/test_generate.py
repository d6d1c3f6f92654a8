"""Generation: what transformers generates, whoever the neighbours are."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import LoRAConfig
from lora_jax.interop.pretrained import load_model
from lora_jax.models.generate import generate, sample
from tests.models.golden import GOLDEN


@pytest.fixture(scope="module")
def llama():
    return load_model(GOLDEN / "llama")


def prompts_of(name: str):
    arrays = np.load(GOLDEN / name / "reference.npz")
    prompts = [arrays[f"prompt_{i}"].ravel().tolist() for i in range(2)]
    return prompts, [arrays[f"greedy_{i}"].ravel().tolist()[-8:] for i in range(2)]


@pytest.mark.parametrize(
    ("name", "scan_layers"),
    [
        *(("llama", False), ("gemma2", False), ("gpt2", False), ("gemma4", False)),
        *(("llama", True), ("gemma2", True), ("gpt2", True), ("gemma3_tower", True)),
    ],
)
def test_greedy_text_is_that_of_transformers_in_one_padded_batch(name, scan_layers):
    model = load_model(GOLDEN / name, scan_layers=scan_layers)
    prompts, greedy = prompts_of(name)
    assert len(prompts[0]) != len(prompts[1])
    assert generate(model.module, model.variables, prompts, max_new_tokens=8) == greedy


@pytest.mark.parametrize(
    "name", ["gemma3", "smollm3", "qwen2_5_vl", "ministral3", "cohere2"]
)
def test_reading_token_by_token_gives_the_logits_of_the_whole(name):
    model = load_model(GOLDEN / name)
    arrays = np.load(GOLDEN / name / "reference.npz")
    ids = jnp.asarray(arrays["input_ids"])
    apply = jax.jit(model.module.apply, static_argnames="method")
    prefill = functools.partial(model.module.apply, method="prefill")
    hidden, cache = jax.jit(prefill, static_argnums=2)(model.variables, ids[:, :5], 16)
    for at, width in ((5, 4), (9, 1), (10, 1)):
        places = jnp.broadcast_to(jnp.arange(at, at + width), (len(ids), width))
        new, cache = apply(
            model.variables, ids[:, at : at + width], places, cache, method="decode"
        )
        hidden = jnp.concatenate([hidden, new], axis=1)
    logits = apply(model.variables, hidden, method="logits")
    np.testing.assert_allclose(logits, arrays["logits"][:, :11], rtol=1e-4, atol=2e-4)


def test_an_adapted_model_generates_with_its_adapters(llama):
    prompts, greedy = prompts_of("llama")
    adapted = load_model(
        GOLDEN / "llama",
        lora=LoRAConfig(rank=2, dropout_rate=0.5),
        key=jax.random.key(0),
    )
    texts = generate(adapted.module, adapted.variables, prompts, max_new_tokens=8)
    assert texts == greedy  # silent at init, dropout off
    moved = jax.tree.map(lambda x: x + 0.5, adapted.variables["lora"])
    variables = {**adapted.variables, "lora": moved}
    merged = {"params": adapted.module.merge(variables)}
    texts = generate(adapted.module, variables, prompts, max_new_tokens=8)
    assert texts != greedy
    assert texts == generate(llama.module, merged, prompts, max_new_tokens=8)


def test_a_row_ends_at_a_stop_token_and_where_the_caller_says(llama):
    prompts, greedy = prompts_of("llama")
    stop = greedy[0][2]
    seen = []

    def on_token(row, text):
        seen.append((row, list(text)))
        return row == 1 and len(text) == 4

    texts = generate(
        llama.module,
        llama.variables,
        prompts,
        max_new_tokens=8,
        stop_ids=[stop],
        on_token=on_token,
    )
    assert texts[0] == greedy[0][:2]
    assert stop not in greedy[1][:4]
    assert texts[1] == greedy[1][:4]
    assert [text for row, text in seen if row == 1] == [
        greedy[1][: i + 1] for i in range(4)
    ]


def test_a_sampled_row_does_not_depend_on_its_neighbours(llama):
    prompts, _ = prompts_of("llama")
    options = {"max_new_tokens": 6, "temperature": 1.0, "key": jax.random.key(3)}
    alone = generate(llama.module, llama.variables, prompts[:1], **options)
    both = generate(llama.module, llama.variables, prompts, **options)
    assert alone[0] == both[0]
    other = {**options, "key": jax.random.key(4)}
    assert generate(llama.module, llama.variables, prompts, **other) != both


def test_sampling_draws_from_the_top_in_its_proportions():
    logits = jnp.log(jnp.array([0.1, 0.4, 0.2, 0.3]))

    def drawn(temperature, top_p, top_k):
        keys = jax.random.split(jax.random.key(0), 4000)
        draw = jax.vmap(lambda key: sample(logits, key, temperature, top_p, top_k))
        return np.bincount(draw(keys), minlength=4) / 4000

    def close(found, wanted):  # 4 standard errors of 4,000 draws
        np.testing.assert_allclose(found, wanted, atol=4 * 0.5 / 4000**0.5)

    close(drawn(1.0, 1.0, 0), [0.1, 0.4, 0.2, 0.3])
    close(drawn(0.5, 1.0, 0), np.array([1, 16, 4, 9]) / 30)
    close(drawn(1.0, 0.69, 0), np.array([0, 4, 0, 3]) / 7)
    close(drawn(1.0, 1.0, 3), np.array([0, 4, 2, 3]) / 9)
    assert drawn(1.0, 1e-6, 0)[1] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0; got -1.0"),
        ({"top_p": 0.0}, "top_p must be in (0, 1]; got 0.0"),
        ({"top_k": -1}, "top_k must be at least 0, 0 for all tokens; got -1"),
        ({"temperature": 1.0}, "key must be a PRNG key"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
        ({"prompts": []}, "at least one prompt; got none"),
        ({"prompts": [[1], []]}, "prompt 1 has no token"),
        ({"prompts": [[1, 10**6]]}, "ids must be in [0, 43); got 1 to 1000000"),
        ({"max_new_tokens": 10**6}, "exceed the model's context of"),
    ],
)
def test_what_cannot_be_generated_is_an_error(llama, options, message):
    options = {"prompts": [[1, 2]], "max_new_tokens": 2, **options}
    with pytest.raises(ValueError, match=re.escape(message)):
        generate(llama.module, llama.variables, **options)


def test_more_tokens_and_longer_prompts_of_the_same_size_compile_nothing(llama):
    generate(llama.module, llama.variables, [[1, 2]], max_new_tokens=2)
    with jax.log_compiles(False):
        count = []
        jax.monitoring.register_event_duration_secs_listener(
            lambda name, *_, **__: (
                count.append(name)
                if name == "/jax/core/compile/backend_compile_duration"
                else None
            )
        )
        try:
            generate(llama.module, llama.variables, [[5, 6, 7]], max_new_tokens=5)
        finally:
            jax.monitoring.clear_event_listeners()
    assert count == []


@pytest.mark.parametrize("rows", [1, 2])
def test_a_token_updates_the_cache_in_place(llama, rows):
    ids = jnp.ones((rows, 3), jnp.int32)
    apply = functools.partial(llama.module.apply, llama.variables)
    cache = jax.eval_shape(lambda: apply(ids, 64, method="prefill"))[1]

    def step(cache):
        return apply(ids[:, :1], jnp.full((rows, 1), 3), cache, method="decode")

    text = jax.jit(step, donate_argnums=0).lower(cache).compile().as_text()
    entry = text[text.index("\nENTRY") :]
    sizes = "x".join(map(str, sorted(cache.layers[0].keys.shape)))
    made = [
        (name, kind)
        for name, shape, kind in re.findall(
            r"%(\S+) = f32\[([\d,]+)\]\S* ([\w-]+)\(", entry
        )
        if "x".join(map(str, sorted(map(int, shape.split(","))))) == sizes
    ]
    written = [name for name, kind in made if kind not in ("parameter", "bitcast")]
    assert len(written) == 2 * llama.config.num_layers, made
