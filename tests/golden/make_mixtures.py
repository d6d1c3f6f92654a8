"""Writes the folders of mixtures of experts: tiny random models, and PEFT's adapters.

Run as ``make_models.py``, whose helpers it takes::

    python -m tests.golden.make_mixtures                 # all of them
    python -m tests.golden.make_mixtures qwen3_moe       # these only

Experts are computed one by one (``experts_implementation="eager"``): transformers'
grouped products refuse odd sizes. The layout of a folder is that of ``make_models.py``.
"""

import json
import pathlib
import shutil
import sys
import warnings

import peft
import torch
import transformers
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from tests.golden import make_models
from tests.golden.model_families import DECODER, SQUARE, Family, rope, without
from tests.golden.tower_families import GEMMA4_TEXT

HERE = pathlib.Path(__file__).parent
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
QWEN3_MOE = {
    **DECODER,
    "head_dim": 8,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 7,
    "norm_topk_prob": True,
    "rope_parameters": rope(100.0),
    "experts_implementation": "eager",
}
FAMILIES = {
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        QWEN3_MOE,
        ({"norm_topk_prob": False}, {"num_experts_per_tok": 3}),
        extra=("parameters", "down", "linear"),
        greedy=True,
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        {
            **without(DECODER, "intermediate_size"),
            "intermediate_size": 9,
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "sliding_window": 5,
            "swiglu_limit": 1.5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "beta_fast": 4.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 16,
            },
            "experts_implementation": "eager",
        },
        (
            {"sliding_window": 6},
            {"swiglu_limit": 7.0},
            {"swiglu_alpha": 1.0},
            {"num_experts_per_tok": 2},
        ),
        extra=("parameters",),
        greedy=True,
        silent=r".*\.k_proj\.bias$",
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        {
            **without(DECODER, "intermediate_size"),
            "intermediate_size": 9,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "sliding_window": 5,
            "rope_parameters": rope(100.0),
            "experts_implementation": "eager",
        },
        ({"sliding_window": None}, {"num_experts_per_tok": 3}),
        extra=("parameters", "linear"),
        greedy=True,
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        {
            **without(SQUARE, "intermediate_size"),
            "intermediate_size": 7,
            "num_experts": 5,
            "num_experts_per_tok": 3,
            "rope_parameters": rope(100.0),
            "experts_implementation": "eager",
        },
        ({"norm_topk_prob": True}, {"num_experts_per_tok": 2}),
        extra=("parameters",),
        greedy=True,
    ),
    # As the 26B-A4B: experts beside the MLP, values that are keys.
    "gemma4_moe": Family(
        "Gemma4ForCausalLM",
        {
            **GEMMA4_TEXT,
            "enable_moe_block": True,
            "num_experts": 5,
            "top_k_experts": 2,
            "moe_intermediate_size": 7,
            "experts_implementation": "eager",
        },
        ({"top_k_experts": 3}, {"sliding_window": 4}),
        extra=("parameters",),
    ),
    "qwen3_moe_mixed": Family(
        "Qwen3MoeForCausalLM",
        {
            **QWEN3_MOE,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
        },
        ({"norm_topk_prob": True},),
    ),
}
ADAPTERS = {
    # Both parameters: PEFT wraps the wrapper of the first, whose factors are then under
    # `base_layer`.
    "parameters": {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["q_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "rank_pattern": {"experts.down_proj": 2},
    },
    # One of them, under its own name.
    "down": {
        "r": 2,
        "lora_alpha": 3,
        "use_rslora": True,
        "target_modules": ["v_proj"],
        "target_parameters": ["mlp.experts.down_proj"],
    },
    # Becomes target_parameters, twice the rank for gate and up, and the router.
    "linear": {"r": 2, "lora_alpha": 3, "target_modules": "all-linear"},
}


def adapted(name: str, family: Family, batch, base: torch.Tensor) -> dict:
    """Saves the adapters that PEFT makes of `ADAPTERS`, and what it computes."""
    cls, arrays = getattr(transformers, family.model), {}
    for kind in family.extra:
        make_models.seed(name, kind)
        folder = HERE / name / f"peft_{kind}"
        config = {**ADAPTERS[kind], "task_type": "CAUSAL_LM"}
        if name == "gemma4_moe" and kind == "parameters":  # not in the MLP
            names = config["target_parameters"]
            config["target_parameters"] = [n.removeprefix("mlp.") for n in names]
        model = cls.from_pretrained(HERE / name, **EAGER)
        make_models.save_adapter(folder, model, name, config)
        file = folder / "adapter_config.json"
        written = json.loads(file.read_text())
        (written["target_parameters"] or []).sort()  # a set's order changes
        file.write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
        model = cls.from_pretrained(HERE / name, **EAGER)
        loaded = peft.PeftModel.from_pretrained(model, folder).eval()
        logits = make_models.logits_of(loaded, batch)
        make_models.check_shows(f"{name} peft_{kind}", base, logits)
        arrays[f"logits_{kind}"] = logits
    return arrays


def make(name: str, family: Family):
    make_models.seed(name, "weights")
    home = HERE / name
    shutil.rmtree(home, ignore_errors=True)
    model = make_models.build(family)
    batch = make_models.make_batch(name, family)
    logits = make_models.logits_of(model, batch)
    make_models.check_sensitive(family, model, batch, logits)
    arrays = {**batch, "logits": logits}
    model.save_pretrained(home)
    (home / "generation_config.json").unlink(missing_ok=True)
    loaded = type(model).from_pretrained(home, **EAGER).eval()
    torch.testing.assert_close(
        make_models.logits_of(loaded, batch), logits, rtol=0, atol=0
    )
    if family.greedy:
        arrays |= make_models.greedy(loaded, name)
    arrays |= adapted(name, family, batch, logits)
    make_models.write(home / "reference.npz", arrays)


def make_mxfp4():
    """Random MXFP4 blocks and what transformers unpacks of them."""
    make_models.seed("mxfp4")
    blocks = torch.randint(0, 256, (2, 5, 3, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (2, 5, 3), dtype=torch.uint8)
    unpacked = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    arrays = {"blocks": blocks, "scales": scales, "unpacked": unpacked}
    make_models.write(HERE / "mxfp4.npz", arrays)


def main(names: list[str]):
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for name in names or [*FAMILIES, "mxfp4"]:
        if name == "mxfp4":
            make_mxfp4()
        else:
            make(name, FAMILIES[name])
    versions = make_models.versions("tests/golden/make_mixtures.py")
    (HERE / "mixtures_versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
