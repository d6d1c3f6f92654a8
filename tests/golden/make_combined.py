"""Writes `combined.npz`: what PEFT makes of the golden Llama adapters together.

Run in an environment with torch, transformers and peft (the extra ``bench``):
``python -m tests.golden.make_combined``.
"""

from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

GOLDEN = Path(__file__).parent
CASES = {  # name: method of PEFT, weights of plain and rslora, options
    "cat": ("cat", (1.0, -0.5), {}),
    "svd": ("svd", (0.75, 0.5), {"svd_rank": 2}),
    "ties": ("ties_svd", (0.75, 0.5), {"svd_rank": 3, "density": 0.5}),
}


def main() -> None:
    """Makes the file."""
    folder = GOLDEN / "llama"
    with np.load(folder / "reference.npz") as arrays:
        tokens = torch.tensor(arrays["input_ids"]).long()
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, folder / "peft_plain", adapter_name="a")
    model.load_adapter(folder / "peft_rslora", adapter_name="b")
    found = {}
    for name, (method, weights, options) in CASES.items():
        model.add_weighted_adapter(
            ["a", "b"], list(weights), name, combination_type=method, **options
        )
        model.set_adapter(name)
        with torch.no_grad():
            found[name] = model.eval()(tokens).logits.numpy().astype(np.float32)
    np.savez_compressed(GOLDEN / "combined.npz", **found)


if __name__ == "__main__":
    main()
