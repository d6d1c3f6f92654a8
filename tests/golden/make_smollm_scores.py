"""Writes tests/golden/smollm_scores.json: what transformers thinks of real prose.

Run once, in an environment with torch, transformers 5 and regex:

    python -m tests.golden.make_smollm_scores SmolLM2-135M-Instruct.Q4_1.gguf

For each of the first editorials of VADER's New York Times domain: how many tokens it
has, and the sum of the log-probabilities of all but the first, in float32. Ids are
those of `make_smollm_tokens`. The texts themselves are third parties': not kept here.
"""

import json
import sys
from pathlib import Path

import gguf
import torch
import transformers

from experiments.vader import load_editorials
from tests.golden.make_smollm_tokens import SlowBPE

COUNT = 3


@torch.no_grad()
def main(path):
    path = Path(path)
    tokenizer = SlowBPE(gguf.GGUFReader(path).fields)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    )
    scores = []
    for text in load_editorials()[:COUNT]:
        ids = torch.tensor([tokenizer.encode(text)])
        found = torch.log_softmax(model(ids).logits[0, :-1], dim=-1)
        total = found.gather(1, ids[0, 1:, None]).sum().item()
        scores.append({"tokens": ids.shape[1], "sum": round(total, 4)})
    names = {"transformers": transformers, "torch": torch}
    golden = {
        "versions": {name: module.__version__ for name, module in names.items()},
        "scores": scores,
    }
    out = Path(__file__).parent / "smollm_scores.json"
    out.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
