"""Writes ``tests/golden/variants``: configs that change what a golden model computes.

Run in an environment with torch and transformers 5, after ``make_models.py``::

    python -m tests.golden.make_variants

``<name>.json`` is the golden model's config with the change, ``reference.npz`` holds
transformers' logits with it, in float64, for the model's own inputs and (``short``) for
the first tokens of them.
"""

import json
import shutil

import numpy as np
import torch
import transformers

from tests.golden.make_exports import inputs
from tests.golden.make_models import HERE, logits_of

EAGER = {"experts_implementation": "eager"}  # as in make_mixtures.py
TARGET = HERE / "variants"
SHORT = 6
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.5, 2.0],
    "long_factor": [2.0, 4.0, 7.0],
    "original_max_position_embeddings": 8,
    "factor": 8.0,
}
CASES = {
    "gpt2_layers": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "phi3_longrope": ("phi3", {"rope_parameters": LONGROPE}),
    "olmoe_clip": ("olmoe", {"clip_qkv": 0.7}),
}


def main():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    shutil.rmtree(TARGET, ignore_errors=True)
    TARGET.mkdir()
    arrays = {}
    for name, (golden, changes) in CASES.items():
        settings = json.loads((HERE / golden / "config.json").read_text()) | changes
        if "rope_parameters" in changes:
            settings["original_max_position_embeddings"] = 8
        (TARGET / f"{name}.json").write_text(json.dumps(settings, indent=2) + "\n")
        config = transformers.AutoConfig.for_model(**settings)
        options = EAGER if "num_experts" in settings else {}
        model = transformers.AutoModelForCausalLM.from_pretrained(
            HERE / golden, config=config, attn_implementation="eager", **options
        ).eval()
        batch = {key: torch.from_numpy(value) for key, value in inputs(golden).items()}
        arrays[name] = logits_of(model, batch)
        batch = {key: value[:, :SHORT] for key, value in batch.items()}
        arrays[f"{name}_short"] = logits_of(model, batch)
    versions = {
        "script": "tests/golden/make_variants.py",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    arrays = {key: value.numpy() for key, value in arrays.items()}
    arrays["metadata"] = np.array(json.dumps(versions))
    np.savez_compressed(TARGET / "reference.npz", **arrays)


if __name__ == "__main__":
    main()
