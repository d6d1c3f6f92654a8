"""The loss of a decoder's step, against full logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import LoRAConfig
from lora_jax.interop.pretrained import load_model
from lora_jax.parallel.device_kind import kind_named
from lora_jax.train import causal_lm as lm
from lora_jax.train.causal_lm import causal_lm, chunk_tokens, make_lm_loss
from tests.models.golden import GOLDEN


def written_out(module, variables, batch):
    logits = module.apply(
        variables,
        batch["input_ids"],
        batch.get("positions"),
        batch.get("segment_ids"),
    )
    log_p = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(log_p, batch["labels"][..., None], -1)[..., 0]
    return -jnp.sum(batch["weights"] * picked)


def make_batch(vocab):
    ids = np.random.default_rng(0).integers(0, vocab, (2, 10))
    weights = np.ones((2, 9), np.float32)
    weights[0, :3] = 0
    return {
        "input_ids": jnp.asarray(ids[:, :-1]),
        "labels": jnp.asarray(ids[:, 1:]),
        "weights": jnp.asarray(weights),
        "positions": jnp.broadcast_to(jnp.arange(9), (2, 9)),
        "segment_ids": jnp.ones((2, 9), jnp.int32),
    }


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_loss_and_gradient_equal_the_full_logits(name):
    model = load_model(GOLDEN / name, lora=LoRAConfig(rank=2), key=jax.random.key(0))
    config, base = model.config, model.module.model.config
    assert config == base
    moved = jax.tree.map(lambda x: x + 0.1, model.variables["lora"])
    batch = make_batch(config.vocab_size)
    loss_fn = make_lm_loss(
        model.module, is_tied=config.is_tied, softcap=config.final_softcap
    )

    def ours(lora):
        loss, weight, _ = loss_fn({**model.variables, "lora": lora}, batch, {})
        assert weight.shape == ()
        return loss

    def full(lora):
        return written_out(model.module, {**model.variables, "lora": lora}, batch)

    (a, d_a), (b, d_b) = (jax.jit(jax.value_and_grad(f))(moved) for f in (ours, full))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), d_a, d_b
    )


def test_an_adapted_or_fully_trained_head_is_used():
    batch = make_batch(43)
    for targets, train in ((["head"], []), (["query"], ["head"])):
        lora = LoRAConfig(rank=2, targets=targets, train=train)
        model = load_model(GOLDEN / "llama", lora=lora, key=jax.random.key(0))
        trained = {
            k: model.variables[k] for k in ("lora", "params") if k in model.variables
        }
        trained = jax.tree.map(lambda x: x + 0.1, trained)
        variables = {**model.variables, **trained}
        loss_fn = make_lm_loss(model.module, is_tied=False)
        a = jax.jit(loss_fn)(variables, batch, {})[0]
        b = jax.jit(written_out, static_argnums=0)(model.module, variables, batch)
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_packed_examples_do_not_see_each_other():
    model = load_model(GOLDEN / "gemma3")
    ids = jnp.asarray(np.random.default_rng(1).integers(0, 43, (1, 12)))
    positions = jnp.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]])
    segments = jnp.array([[1] * 5 + [2] * 7])
    apply = jax.jit(model.module.apply)
    packed = apply(model.variables, ids, positions, segments)
    for part in (slice(0, 5), slice(5, 12)):
        alone = apply(model.variables, ids[:, part])
        np.testing.assert_allclose(packed[:, part], alone, rtol=1e-4, atol=1e-5)


def test_the_softcap_applies_to_values_and_gradients():
    hidden = 3 * jax.random.normal(jax.random.key(0), (1, 5, 4))
    kernel = jax.random.normal(jax.random.key(1), (4, 7))
    labels = jnp.array([[0, 6, 2, 3, 3]])

    def full(h, k):
        logits = 2.0 * jnp.tanh(h @ k / 2.0)
        log_p = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(log_p, labels[..., None], -1).sum()

    def ours(h, k):
        return causal_lm(h, k, labels, softcap=2.0, chunk=2)[0]

    for f, g in zip(
        *(
            jax.tree.leaves(jax.jit(jax.value_and_grad(f, (0, 1)))(hidden, kernel))
            for f in (ours, full)
        ),
        strict=True,
    ):
        np.testing.assert_allclose(f, g, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 4, 6, 100])
def test_chunks_without_weight_are_skipped_and_change_nothing(chunk):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (3, 7, 4))
    kernel = jax.random.normal(keys[1], (4, 9))
    labels = jax.random.randint(keys[2], (3, 7), 0, 9)
    weights = jnp.zeros((3, 7)).at[0, 5:].set(0.5).at[2, 0].set(2.0)

    def full(h, k, w):
        log_p = jax.nn.log_softmax(h @ k)
        return -(w * jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0]).sum()

    def ours(h, k, w):
        return causal_lm(h, k, labels, w, chunk=chunk)[0]

    for wrt in ((0,), (0, 1), (0, 1, 2)):  # a weight's gradient is its token's loss
        got, wanted = (
            jax.jit(jax.value_and_grad(f, wrt))(hidden, kernel, weights)
            for f in (ours, full)
        )
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        ("TPU v5 lite", (512, 512)),
        ("TPU v5", (256, 256)),
        ("NVIDIA H100 80GB HBM3", (2048, 2048)),
        ("not listed", (512, 2048)),
    ],
)
def test_an_accelerators_chunks_hide_the_heads_bytes(monkeypatch, kind, tokens):
    platform = "tpu" if kind.startswith("TPU") else "gpu"
    monkeypatch.setattr(lm, "target_platform", lambda: platform)
    monkeypatch.setattr(lm, "target_kind", lambda: kind_named(kind))
    assert (chunk_tokens(128_256), chunk_tokens(32_000)) == tokens
    for count in tokens:  # arithmetic on a chunk against reading the head
        assert count > 1.5 * kind_named(kind).intensity


def test_a_cpus_chunks_stay_in_its_caches():
    assert (chunk_tokens(128_256), chunk_tokens(1000)) == (128, 4194)


def test_prompt_tokens_cost_no_logits():
    hidden, kernel = jnp.ones((1, 8, 4)), jnp.ones((4, 9))
    labels, spoilt = jnp.zeros((1, 8), int), hidden.at[0, :6].set(jnp.nan)
    answer = jnp.zeros((1, 8)).at[0, 6:].set(1)
    gradient = jax.grad(lambda h: causal_lm(h, kernel, labels, answer, chunk=2)[0])
    assert not gradient(spoilt)[0, :6].any()  # a computed NaN would propagate


def test_all_linear_excludes_the_output_head_unless_named():
    def targets(**options):
        lora = LoRAConfig(rank=2, **options)
        model = load_model(GOLDEN / "llama", lora=lora, key=jax.random.key(0))
        return [t.path for t in model.module.targets(model.params)]

    assert len(targets()) == 14
    assert "head" not in targets()
    assert targets(targets=["head"]) == ["head"]
