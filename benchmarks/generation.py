"""Generation speed with a KV cache: unmerged and merged adapters, and PEFT.

The first decoder of `benchmarks.contenders` continues prompts greedily. Times include
the prefill; PEFT uses transformers' `generate`. Blocks are unrolled, the default of
`load_model`; with `nn.scan`, weights are copied out of their stack for each token.
"""

import importlib.util
from typing import Any

import jax
import numpy as np

from benchmarks import contenders, torch_peft
from benchmarks.harness import Contender, alternate
from lora_jax import LoRAConfig, adapt, generate
from lora_jax.models.decoder import Decoder
from lora_jax.models.decoder_config import DecoderConfig

PROMPT, NEW, BATCHES = 64, 64, (1, 8)


def main(quick: bool) -> list[dict[str, Any]]:
    """Times all batch sizes.

    Args:
      quick: fewer samples.

    Returns:
      One row per batch size.
    """
    return [_compare(rows, 3 if quick else 9) for rows in BATCHES]


def _compare(rows: int, rounds: int) -> dict[str, Any]:
    config = contenders.decoder_specs()[0].config
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (rows, PROMPT))
    timed = {}
    for scan_layers, what in ((False, ""), (True, ", scanned blocks")):
        model = Decoder(config, dtype=contenders.dtype(), scan_layers=scan_layers)
        adapted = adapt(model, LoRAConfig(contenders.RANK, contenders.ALPHA), ids)
        variables = adapted.attach(contenders.init(model, ids), jax.random.key(1))
        timed[f"lora_jax{what}"] = _ours(adapted, variables, ids)
        if not scan_layers:
            merged = {"params": adapted.merge(variables)}
            timed["lora_jax, merged"] = _ours(model, merged, ids)
    if importlib.util.find_spec("peft") and importlib.util.find_spec("torch"):
        timed["PEFT on torch"] = _theirs(config, ids)
    model = contenders.decoder_specs()[0].name
    return {"model": model, "batch": rows, **alternate(timed, rounds)}


def _ours(module: Any, variables: Any, ids: np.ndarray) -> Contender:
    prompts = ids.tolist()

    def run() -> list[list[int]]:
        return generate(module, variables, prompts, max_new_tokens=NEW)

    found = run()
    assert [len(tokens) for tokens in found] == [NEW] * len(ids)
    return Contender(run, 0.0, None, None, {})


def _theirs(config: DecoderConfig, ids: np.ndarray) -> Contender:
    import peft
    import torch

    model, _, _, targets = torch_peft.llama(config, ids)
    lora = peft.LoraConfig(**contenders.PEFT_LORA, target_modules=targets)
    model = peft.get_peft_model(model, lora).eval()
    tokens = torch_peft.tensor(ids)
    options = {"attention_mask": torch.ones_like(tokens), "do_sample": False}
    options |= {"max_new_tokens": NEW, "min_new_tokens": NEW, "use_cache": True}

    @torch.no_grad()
    def run() -> Any:
        with torch_peft.computing():
            return model.generate(input_ids=tokens, pad_token_id=0, **options)

    assert run().shape == (len(ids), PROMPT + NEW)
    return Contender(run, 0.0, None, None, {})


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    lines = [
        f"{rows[0]['model']}, prompts of {PROMPT} tokens, {NEW} new ones:\n",
        "| prompts | with | ms (quartiles) | new tokens per second | lora_jax / it |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        for name, found in row.items():
            if not isinstance(found, dict):
                continue
            low, high = found["quartiles_ms"]
            speed = row["batch"] * NEW / found["median_ms"] * 1e3
            lines.append(
                f"| {row['batch']} | {name} | {found['median_ms']:.0f} "
                f"({low:.0f}–{high:.0f}) | {speed:.0f} | "
                f"{row['lora_jax']['median_ms'] / found['median_ms']:.2f} |"
            )
    return "\n".join(lines)
