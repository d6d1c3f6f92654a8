"""Writes ``tests/golden/bert``: a tiny random BERT and what transformers makes of it.

Run once, in an environment with torch and transformers (not needed by the tests)::

    python tests/golden/make_bert.py

Odd sizes, so that a wrong axis can't fit; norms and biases far from 1 and 0, so that
leaving one out shows. `reference.npz` holds, for each activation, the hidden states
and the logits of ``BertForSequenceClassification``.
"""

import json
import pathlib
import platform

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent / "bert"
SIZES = {
    "vocab_size": 53,
    "hidden_size": 21,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 37,
    "max_position_embeddings": 19,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-5,
    "num_labels": 4,
    "attn_implementation": "eager",
}


def main():
    torch.manual_seed(0)
    ids = torch.randint(1, SIZES["vocab_size"], (3, 11))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    mask[2, 1:] = 0
    types = (torch.arange(11)[None] > torch.tensor([[4], [2], [11]])).long()
    arrays = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    state = None
    for activation in ("gelu", "gelu_new", "relu"):
        config = transformers.BertConfig(hidden_act=activation, **SIZES)
        model = transformers.BertForSequenceClassification(config).eval()
        if state is None:
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.4)
            for name, parameter in model.named_parameters():
                if name.endswith("LayerNorm.weight"):
                    parameter.data += 1
            model.save_pretrained(HERE)
            state = model.state_dict()
        model.load_state_dict(state)
        with torch.no_grad():
            for suffix, extra in (("", {"token_type_ids": types}), ("_no_types", {})):
                batch = {"input_ids": ids, "attention_mask": mask, **extra}
                out = model(**batch, output_hidden_states=True)
                arrays[f"hidden_{activation}{suffix}"] = out.hidden_states[-1]
                arrays[f"logits_{activation}{suffix}"] = out.logits
    versions = {
        "script": "tests/golden/make_bert.py",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    arrays = {k: v.numpy() for k, v in arrays.items()}
    arrays["metadata"] = np.array(json.dumps(versions))
    np.savez_compressed(HERE / "reference.npz", **arrays)


if __name__ == "__main__":
    main()
