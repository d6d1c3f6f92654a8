"""The PEFT contender of `benchmarks.contenders`, on torch."""

import contextlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.harness import Contender, is_on_cpu
from benchmarks.specs import EncoderSpec
from lora_jax.models.decoder_config import DecoderConfig

Loss = Callable[[Any], Any]


def llama(config: DecoderConfig, ids: np.ndarray) -> tuple[Any, ...]:
    """Returns transformers' model of the same sizes, its inputs, loss and targets."""
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
    with placed():
        model = transformers.LlamaForCausalLM(sizes)
    return model, {"input_ids": ids[:, :-1]}, _classes(ids[:, 1:]), "all-linear"


def bert(spec: EncoderSpec, ids: np.ndarray, labels: np.ndarray) -> tuple[Any, ...]:
    """Like `llama`, but with BERT's first-token pooler, where ours takes the mean."""
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
    with placed():
        model = transformers.BertForSequenceClassification(sizes)
    inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    targets = r".*encoder\.layer\..*(query|key|value|dense)"
    return model, inputs, _classes(labels), targets


def layer(width: int, x: np.ndarray, y: np.ndarray) -> tuple[Any, ...]:
    """Like `llama`, for one `torch.nn.Linear` and the squared error."""
    import torch

    with placed():
        model = torch.nn.Sequential(torch.nn.Linear(width, width, bias=False))
    wanted = tensor(y)

    def loss(output: Any) -> Any:
        return torch.nn.functional.mse_loss(output.float(), wanted)

    return model, {"input": x}, loss, ["0"]


def contender(
    model: Any,
    inputs: Mapping[str, np.ndarray],
    loss: Loss,
    targets: Any,
    *,
    lora: Mapping[str, int],
    rate: float,
    compiles: bool = False,
) -> Contender:
    """A step of Adam on the adapters, optionally with `torch.compile`.

    On a GPU the base is bfloat16 and computation uses autocast, as in transformers'
    Trainer; temporaries are the peak of torch's allocator above persistent memory.

    Args:
      model: the model, modified in place.
      inputs: arguments of its call.
      loss: maps its outputs to the loss.
      targets: PEFT's ``target_modules``.
      lora: ``r`` and ``lora_alpha``.
      rate: Adam's learning rate.
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
    tensors = {name: tensor(array) for name, array in inputs.items()}
    call = torch.compile(model) if compiles else model

    def run() -> float:
        with computing():
            value = loss(call(**tensors))
        tx.zero_grad(set_to_none=True)
        value.backward()
        tx.step()
        return value.item()

    start = time.perf_counter()
    run()
    seconds = time.perf_counter() - start
    facts = {"trained": sum(p.numel() for p in trained)}
    return Contender(run, seconds, None, _peak(run), facts)


def tensor(array: np.ndarray) -> Any:
    """Returns an array on the benchmarked device."""
    import torch

    return torch.tensor(array, device="cpu" if is_on_cpu() else "cuda")


@contextlib.contextmanager
def placed():
    """Creates modules on the benchmarked device, in its dtype."""
    import torch

    if is_on_cpu():
        yield
        return
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def computing() -> contextlib.AbstractContextManager[Any]:
    """Returns the context of a forward pass: bfloat16 autocast on a GPU."""
    import torch

    if is_on_cpu():
        return contextlib.nullcontext()
    return torch.autocast("cuda", dtype=torch.bfloat16)


def _classes(labels: np.ndarray) -> Loss:
    """Returns the cross-entropy of flattened logits."""
    import torch

    wanted = tensor(labels).reshape(-1)

    def loss(output: Any) -> Any:
        flat = output.logits.reshape(-1, output.logits.shape[-1])
        return torch.nn.functional.cross_entropy(flat, wanted)

    return loss


def _peak(run: Callable[[], Any]) -> int | None:
    """Returns the increase of torch's memory during a step on a GPU; None on a CPU."""
    import torch

    if is_on_cpu():
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held
