"""The contender of `benchmarks.contenders` that others run: PEFT on torch."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.harness import Contender
from benchmarks.specs import EncoderSpec
from lora_jax.models.decoder_config import DecoderConfig


def llama(config: DecoderConfig, ids: np.ndarray) -> tuple[Any, ...]:
    """transformers' model of the same sizes, its inputs, labels and linears."""
    import transformers

    sizes = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        intermediate_size=config.mlp_size,
        max_position_embeddings=config.max_positions,
        tie_word_embeddings=False,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(sizes)
    return model, {"input_ids": ids[:, :-1]}, ids[:, 1:], "all-linear"


def bert(spec: EncoderSpec, ids: np.ndarray, labels: np.ndarray) -> tuple[Any, ...]:
    """As `llama`; with BERT's pooler on the first token, where ours takes the mean."""
    import transformers

    config = spec.config
    sizes = transformers.BertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        intermediate_size=config.mlp_size,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertForSequenceClassification(sizes)
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    return model, inputs, labels, r".*encoder\.layer\..*(query|key|value|dense)"


def contender(
    model: Any,
    inputs: Mapping[str, np.ndarray],
    labels: np.ndarray,
    targets: str,
    *,
    lora: Mapping[str, int],
    rate: float,
    compiles: bool = False,
) -> Contender:
    """A step of Adam on the adapters; what is called "compiled" is `torch.compile`'s.

    Args:
      model: of transformers; it is changed.
      inputs: of its call.
      labels: of the flattened rows of its logits.
      targets: which linears, as PEFT takes them.
      lora: ``r`` and ``lora_alpha``.
      rate: Adam's.
      compiles: whether to compile.

    Returns:
      The contender.
    """
    import peft
    import torch

    config = peft.LoraConfig(**lora, target_modules=targets)
    model = peft.get_peft_model(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    tx = torch.optim.Adam(trained, lr=rate)
    tensors = {name: torch.tensor(array) for name, array in inputs.items()}
    wanted = torch.tensor(labels).reshape(-1)
    if compiles:
        model = torch.compile(model)

    def run() -> float:
        logits = model(**tensors).logits
        flat = logits.reshape(-1, logits.shape[-1])
        loss = torch.nn.functional.cross_entropy(flat, wanted)
        tx.zero_grad(set_to_none=True)
        loss.backward()
        tx.step()
        return loss.item()

    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    facts = {"trained": sum(p.numel() for p in trained)}
    return Contender(run, seconds, None, None, facts)
