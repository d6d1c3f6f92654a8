"""Writes the folders of hybrids: tiny random models, and PEFT's adapters.

Run as ``make_models.py``, whose helpers it takes::

    python -m tests.golden.make_hybrids                # all of them
    python -m tests.golden.make_hybrids lfm2           # these only

The layout of a folder is that of ``make_models.py``; ``padded.npz`` has rows that are
padded on the left, and their logits.
"""

import json
import sys
import warnings

import torch
import transformers

from tests.golden import make_mixtures, make_models
from tests.golden.hybrid_families import DENSE_HYBRIDS, LINEARS, MIXTURE_HYBRIDS

HERE = make_models.HERE
PADDED = ("qwen3_5_text",)


@torch.no_grad()
def make_padded(name: str):
    """Rows of 5, 9 and 13 tokens, the shorter ones padded on the left."""
    make_models.seed(name, "padded")
    cls = getattr(transformers, DENSE_HYBRIDS[name].model)
    model = cls.from_pretrained(HERE / name, attn_implementation="eager").eval()
    ids = torch.randint(3, 43, (3, 13))
    mask = torch.ones_like(ids)
    for row, count in enumerate((5, 9)):
        mask[row, : 13 - count] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    logits = model(**batch).logits * mask[..., None]  # float64 gives padding NaN
    arrays = {**batch, "logits": logits}
    make_models.write(HERE / name / "padded.npz", arrays)


def main(names: list[str]):
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    hybrids = DENSE_HYBRIDS | MIXTURE_HYBRIDS
    make_models.TOWERS.update(  # their batches have no token of an image
        {name: f for name, f in hybrids.items() if "text_config" in f.config}
    )
    make_mixtures.ADAPTERS["text"] = {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": LINEARS,
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    for name in names or hybrids:
        if name in DENSE_HYBRIDS:
            make_models.make(name, DENSE_HYBRIDS[name])
        else:
            make_mixtures.make(name, MIXTURE_HYBRIDS[name])
        if name in PADDED:
            make_padded(name)
    versions = make_models.versions("tests/golden/make_hybrids.py")
    (HERE / "hybrids_versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
