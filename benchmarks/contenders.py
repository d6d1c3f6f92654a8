"""One LoRA step of a Llama-shaped decoder: this library, and others, turn by turn.

Same sizes, batch, dtype, rank and targets; Adam on the adapters. A contender that isn't
installed is left out, with a note. Ours are scanned blocks, as `lora-jax train` has
them. qwix and plain autodiff run on this library's own decoder, with its attention;
nnx.LoRA on the same decoder written for NNX, PEFT on transformers' Llama,
eager and compiled.
"""

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.harness import Contender, alternate, measured
from lora_jax import (
    LoRAConfig,
    TrainState,
    adapt,
    make_lm_loss,
    make_train_step,
    softmax_cross_entropy,
)
from lora_jax.models.decoder import Decoder
from lora_jax.models.decoder_config import DecoderConfig, Rope

CONFIG = DecoderConfig(
    vocab_size=8192,
    hidden_size=512,
    num_layers=8,
    num_heads=8,
    num_kv_heads=8,
    head_dim=64,
    mlp_size=1408,
    max_positions=2048,
    ropes=(Rope(10000.0, 64),),
    layer_ropes=(0,) * 8,
)
RANK, ALPHA, BATCH, LENGTH, RATE = 8, 16, 4, 256, 1e-3
TARGETS = ("query", "key", "value", "output", "gate", "up", "down")
OURS = "lora_jax"


def main(quick: bool) -> list[dict[str, Any]]:
    """Runs all contenders that are installed.

    Args:
      quick: fewer samples.

    Returns:
      One row: the samples of each contender, and who is missing.
    """
    ids = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (BATCH, LENGTH + 1))
    batch = {
        "input_ids": jnp.asarray(ids[:, :-1], jnp.int32),
        "labels": jnp.asarray(ids[:, 1:], jnp.int32),
        "weights": jnp.ones((BATCH, LENGTH)),
    }
    model = Decoder(CONFIG)
    params = init(model, batch)
    makers: dict[str, Callable[[], Contender]] = {
        OURS: lambda: ours(CONFIG, "lora", batch),
        f"{OURS}, remat none": lambda: ours(CONFIG, "none", batch),
        f"{OURS}, remat block": lambda: ours(CONFIG, "block", batch),
        "full fine-tuning": lambda: _full(batch),
        "plain autodiff": lambda: plain(model, params, batch),
        "flax nnx.LoRA": lambda: _nnx(batch),
    }
    missing = []
    if importlib.util.find_spec("qwix"):
        makers["qwix LoraProvider"] = lambda: _qwix(model, params, batch)
    else:
        missing.append("qwix")
    if importlib.util.find_spec("peft") and importlib.util.find_spec("torch"):
        makers["PEFT on torch, eager"] = lambda: _peft(ids)
        if not quick:  # its compiler takes minutes
            makers["PEFT on torch, compiled"] = lambda: _peft(ids, compiles=True)
    else:
        missing.append("peft")
    contenders = {name: make() for name, make in makers.items()}
    rows = alternate(contenders, rounds=5 if quick else 15)
    return [{"shape": "Llama-shaped, d 512, 8 layers", **rows, "missing": missing}]


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    lines = []
    for row in rows:
        ours = row[OURS]
        lines += [
            f"{row['shape']}, {BATCH} x {LENGTH} tokens, rank {RANK} on all linears, "
            "float32:\n",
            "| contender | ms a step (quartiles) | lora_jax / it | temporaries | "
            "trained |",
            "|---|---|---|---|---|",
        ]
        for name, found in row.items():
            if not isinstance(found, dict):
                continue
            low, high = found["quartiles_ms"]
            bytes_ = found["temp_bytes"]
            lines.append(
                f"| {name} | {found['median_ms']:.0f} ({low:.0f}–{high:.0f}) | "
                f"{ours['median_ms'] / found['median_ms']:.2f} | "
                f"{f'{bytes_ / 1e6:.0f} MB' if bytes_ else '–'} | "
                f"{found['trained']:,} |"
            )
        if row["missing"]:
            lines.append(f"\nNot installed, left out: {', '.join(row['missing'])}.")
    return "\n".join(lines)


def _count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _stepper(step: Any, state: Any, *rest: Any, **facts: Any) -> Contender:
    """A contender that is a jitted ``(state, ...) -> (state, loss)``."""
    lowered, holder = step.lower(state, *rest), [state]

    def run() -> Any:
        holder[0], loss = step(holder[0], *rest)
        return loss

    return measured(lowered, run, **facts)


def ours(config: DecoderConfig, remat: str, batch: Any, **options: Any) -> Contender:
    """This library's step on scanned blocks; ``options`` are `measured`'s."""
    model = Decoder(config, is_scanned=True, remat=remat)
    adapted = adapt(model, LoRAConfig(rank=RANK, alpha=ALPHA), batch["input_ids"])
    variables = adapted.attach(init(model, batch), jax.random.key(1))
    return _trained(adapted, variables, batch, **options)


def _full(batch: Any) -> Contender:
    model = Decoder(CONFIG, is_scanned=True, remat="lora")
    return _trained(model, {"params": init(model, batch)}, batch)


def init(model: nn.Module, batch: Any) -> Any:
    """Draws the parameters of a model."""
    return jax.jit(model.init)(jax.random.key(0), batch["input_ids"])["params"]


def _trained(module: Any, variables: Any, batch: Any, **options: Any) -> Contender:
    tx = optax.adam(RATE)
    state = TrainState.create(variables, tx, jax.random.key(0))
    step = make_train_step(make_lm_loss(module, is_tied=False), tx)
    return _stepper(step, state, batch, trained=_count(state.trainable), **options)


def _by_autodiff(
    forward: Callable, adapters: Any, batch: Any, **options: Any
) -> Contender:
    """Adam on ``adapters`` for ``forward(adapters, ids) -> logits``, all by JAX."""
    tx = optax.adam(RATE)

    def loss(adapters):
        logits = forward(adapters, batch["input_ids"])
        total, weight = softmax_cross_entropy(logits, batch["labels"])
        return total / weight

    @jax.jit
    def step(state):
        adapters, opt_state = state
        value, gradient = jax.value_and_grad(loss)(adapters)
        updates, opt_state = tx.update(gradient, opt_state, adapters)
        return (optax.apply_updates(adapters, updates), opt_state), value

    state = (adapters, tx.init(adapters))
    return _stepper(step, state, trained=_count(adapters), **options)


def plain(model: nn.Module, params: Any, batch: Any, **options: Any) -> Contender:
    """``x W + s (x A) B`` as anyone would write it, differentiated by JAX."""
    adapted = adapt(model, LoRAConfig(rank=RANK, alpha=ALPHA), batch["input_ids"])
    adapters = adapted.attach(params, jax.random.key(1))["lora"]

    def forward(adapters, ids):
        def intercept(next_fun, args, kwargs, context):
            y, node = next_fun(*args, **kwargs), adapters
            if not isinstance(context.module, nn.Dense):
                return y
            for name in context.module.path:
                node = node.get(name, {})
            if not node:
                return y
            return y + ALPHA / RANK * (args[0] @ node["lora_a"]) @ node["lora_b"]

        with nn.intercept_methods(intercept):
            return model.apply({"params": params}, ids)

    return _by_autodiff(forward, adapters, batch, **options)


def _qwix(model: nn.Module, params: Any, batch: Any) -> Contender:
    import qwix

    rule = qwix.LoraRule(module_path=f".*({'|'.join(TARGETS)})", rank=RANK, alpha=ALPHA)
    provider = qwix.LoraProvider([rule])
    lora_model = qwix.apply_lora_to_model(model, provider)
    fresh = lora_model.init(jax.random.key(1), batch["input_ids"])["params"]
    is_adapter = jax.tree_util.tree_map_with_path(
        lambda path, _: "lora" in jax.tree_util.keystr(path), fresh
    )
    leaves, treedef = jax.tree.flatten(fresh)
    flags = jax.tree.leaves(is_adapter)
    adapters = [x for x, flag in zip(leaves, flags, strict=True) if flag]
    frozen = [x for x, flag in zip(leaves, flags, strict=True) if not flag]

    def forward(adapters, ids):
        moving, still = iter(adapters), iter(frozen)
        joined = [next(moving) if flag else next(still) for flag in flags]
        return lora_model.apply({"params": treedef.unflatten(joined)}, ids)

    return _by_autodiff(forward, adapters, batch)


def _nnx(batch: Any) -> Contender:
    from flax import nnx

    from benchmarks.nnx_decoder import NnxDecoder

    model = NnxDecoder(CONFIG, RANK, nnx.Rngs(0))
    graph, adapters, frozen = nnx.split(model, nnx.LoRAParam, ...)

    def forward(adapters, ids):
        return nnx.merge(graph, adapters, frozen)(ids)

    return _by_autodiff(forward, adapters, batch)


def _peft(ids: np.ndarray, compiles: bool = False) -> Contender:
    import peft
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.hidden_size,
        num_hidden_layers=CONFIG.num_layers,
        num_attention_heads=CONFIG.num_heads,
        num_key_value_heads=CONFIG.num_kv_heads,
        intermediate_size=CONFIG.mlp_size,
        max_position_embeddings=CONFIG.max_positions,
        tie_word_embeddings=False,
    )
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)
    trained = [p for p in model.parameters() if p.requires_grad]
    tx = torch.optim.Adam(trained, lr=RATE)
    tokens = torch.tensor(ids)
    if compiles:
        model = torch.compile(model)

    def run() -> float:
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        flat = logits.reshape(-1, logits.shape[-1])
        loss = torch.nn.functional.cross_entropy(flat, tokens[:, 1:].reshape(-1))
        tx.zero_grad(set_to_none=True)
        loss.backward()
        tx.step()
        return loss.item()

    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    facts = {"trained": sum(p.numel() for p in trained)}
    return Contender(run, seconds, None, None, facts)
