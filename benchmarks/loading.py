"""Peak memory of loading a model, relative to the model's size.

Each case runs in its own process.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.memory import anonymous_bytes, peak_watched
from experiments.fetch import smollm2

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 2816,
    "tie_word_embeddings": False,
}


def main(quick: bool) -> list[dict[str, Any]]:
    """Runs all cases.

    Args:
      quick: a smaller Llama.

    Returns:
      One row per case.
    """
    layers = 4 if quick else LLAMA["num_hidden_layers"]
    with tempfile.TemporaryDirectory() as folder:
        write_llama(Path(folder), layers)
        shape = f"Llama of {layers} layers, d 1024, float32"
        cases = (
            (f"{shape}, 4 safetensors shards", folder, {}),
            (f"{shape}, layers stacked for nn.scan", folder, {"scan_layers": True}),
            (f"{shape}, to bfloat16", folder, {"param_dtype": "bfloat16"}),
            ("SmolLM2-135M, GGUF Q4_1 to float32", str(smollm2()), {}),
        )
        return [{"case": name, **_measure(path, o)} for name, path, o in cases]


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    lines = [
        "| case | parameters in memory | peak while loading | peak / parameters |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row['case']} | {row['param_bytes'] / 1e6:,.0f} MB | "
        f"{row['peak_bytes'] / 1e6:,.0f} MB | "
        f"{row['peak_bytes'] / row['param_bytes']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def write_llama(folder: Path, layers: int) -> None:
    """Writes a random model in four shards, with an index."""
    import numpy as np
    from safetensors.numpy import save_file

    from lora_jax.models.families import FAMILIES
    from lora_jax.models.load import param_shapes

    settings = {**LLAMA, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(settings))
    family = FAMILIES["llama"]
    shapes = param_shapes(family, family.module(family.read_config(settings)))
    leaves, rng, where = list(shapes.items()), np.random.default_rng(0), {}
    for shard in range(4):
        tensors = {
            f"model.{family.tensor_name(leaf)}".replace(
                "model.lm_head", "lm_head"
            ): rng.standard_normal(family.file_shape(leaf, shape), np.float32)
            for leaf, shape in leaves[shard::4]
        }
        file = f"model-{shard}.safetensors"
        save_file(tensors, folder / file)
        where |= dict.fromkeys(tensors, file)
    index = json.dumps({"weight_map": where})
    (folder / "model.safetensors.index.json").write_text(index)


def _measure(path: str, options: dict[str, Any]) -> dict[str, Any]:
    words = [sys.executable, "-m", "benchmarks.loading", path, json.dumps(options)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _load_and_print(path: str, options: dict[str, Any]) -> None:
    """Loads one model while a thread samples the memory every millisecond."""
    import jax
    import jax.numpy as jnp

    from lora_jax import load_model

    if "param_dtype" in options:
        options["param_dtype"] = jnp.dtype(options["param_dtype"])
    jnp.zeros(8).block_until_ready()  # exclude the backend's own memory
    before = anonymous_bytes()
    start = time.perf_counter()
    with peak_watched() as peak:
        params = load_model(path, **options).params
        jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    found = {
        "param_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(params)),
        "peak_bytes": peak[0] - before,
        "seconds": round(seconds, 2),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Loads one model; prints its peak.")
    parser.add_argument("path")
    parser.add_argument("options", type=json.loads)
    arguments = parser.parse_args()
    _load_and_print(arguments.path, arguments.options)
