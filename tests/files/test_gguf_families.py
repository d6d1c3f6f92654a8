"""GGUF files of dense families are read as the folders that they were made from.

A golden folder is written as llama.cpp's converter does: tensors are named by the gguf
package's own table, and rows of queries and keys permuted where the converter permutes.
"""

import json
import re
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax.models.source import open_source
from tests.models.golden import GOLDEN

ARCH = gguf.MODEL_ARCH
# The folder, llama.cpp's architecture, and changes of the config to what it can say.
CASES = {
    "olmo2": (ARCH.OLMO2, {}),
    "olmo3": (ARCH.OLMO2, {"rope_parameters": None, "rope_theta": 500.0}),
    "granite": (ARCH.GRANITE, {}),
    "glm4": (ARCH.GLM4, {}),
    "cohere2": (ARCH.COHERE2, {"layer_types": ["sliding_attention"] * 3}),
    "qwen3_moe": (
        ARCH.QWEN3MOE,
        {  # stretched as in the model card
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 500.0,
                "factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mixtral": (ARCH.LLAMA, {"sliding_window": None}),
    "olmoe": (ARCH.OLMOE, {}),
    "gemma3": (  # as 4B and larger: full layers are stretched
        ARCH.GEMMA3,
        {
            "layer_types": ["sliding_attention"] * 3,
            "query_pre_attn_scalar": 6,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
                "full_attention": {
                    "rope_type": "linear",
                    "factor": 8.0,
                    "rope_theta": 500.0,
                },
            },
        },
    ),
}


def permuted(weight, heads):
    """What the converter does to queries and keys of a Llama."""
    pairs = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def stacked(tensors):
    """Puts the experts of a layer in one tensor, as the converter does."""
    found = {}
    for name, tensor in tensors.items():
        part = re.sub(r"(\.experts)\.\d+", r"\1", name)
        found.setdefault(part, []).append((name, tensor))
    order = {part: sorted(each, key=_expert) for part, each in found.items()}
    return {
        part: each[0][1] if part == each[0][0] else np.stack([t for _, t in each])
        for part, each in order.items()
    }


def _expert(item):
    number = re.search(r"\.experts\.(\d+)", item[0])
    return int(number[1]) if number else 0


def convert(folder, arch, path, add=lambda writer: None):
    """Writes a GGUF file of a folder, as the converter does."""
    config = json.loads((folder / "config.json").read_text())
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    kv = config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(path), gguf.MODEL_ARCH_NAMES[arch])
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_key_length(head_dim)
    ropes = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta")}
    rope = ropes.get("full_attention", ropes)
    writer.add_rope_freq_base(rope["rope_theta"])
    if "layer_norm_eps" in config:
        writer.add_layer_norm_eps(config["layer_norm_eps"])
    else:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if arch == ARCH.GRANITE:
        writer.add_rope_dimension_count(head_dim)
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    if arch == ARCH.COHERE2:
        writer.add_logit_scale(config["logit_scale"])
        writer.add_rope_dimension_count(head_dim)
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
    if arch == ARCH.GLM4:
        writer.add_rope_dimension_count(int(head_dim * rope["partial_rotary_factor"]))
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    count = config.get("num_local_experts") or config.get("num_experts")
    if count:
        writer.add_expert_count(count)
        writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    if config.get("sliding_window"):
        writer.add_sliding_window(config["sliding_window"])
        if arch == ARCH.OLMO2:
            kinds = config["layer_types"]
            writer.add_sliding_window_pattern([k == "sliding_attention" for k in kinds])
    add(writer)
    names = gguf.get_tensor_name_map(arch, layers)
    for name, tensor in stacked(load_file(folder / "model.safetensors")).items():
        if arch in (ARCH.GRANITE, ARCH.LLAMA) and (
            found := re.search(r"\.([qk])_proj\.", name)
        ):
            tensor = permuted(tensor, heads if found[1] == "q" else kv)
        if arch == ARCH.GEMMA3 and name.endswith("norm.weight"):
            tensor = tensor + 1
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert own is not None, name
        writer.add_tensor(own, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def changed(name, tmp_path, changes):
    folder = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_a_file_has_the_config_and_tensors_of_its_folder(name, tmp_path):
    arch, changes = CASES[name]
    folder = changed(name, tmp_path, changes)
    file = open_source(convert(folder, arch, tmp_path / "m.gguf"))
    source = open_source(folder)
    assert file.config == source.config
    assert file.settings["model_type"] == source.settings["model_type"]
    assert file.names.keys() == source.names.keys()
    for bare, own in source.names.items():
        got = file.tensors[file.names[bare]]
        # A Gemma's norms had 1 added and taken away in float32.
        np.testing.assert_allclose(got, source.tensors[own], rtol=0, atol=2e-7)


def test_what_such_files_may_hold_and_is_not_read_is_named(tmp_path):
    folder = changed("glm4", tmp_path, {})
    file = convert(
        folder,
        ARCH.GLM4,
        tmp_path / "m.gguf",
        lambda writer: writer.add_rope_dimension_sections([2, 2, 2, 0]),
    )
    with pytest.raises(ValueError, match=r"dimension_sections must be absent: M-RoPE"):
        open_source(file)
    folder = changed("olmo3", tmp_path, CASES["olmo3"][1])
    file = convert(
        folder,
        ARCH.OLMO2,
        tmp_path / "o.gguf",
        lambda writer: writer.add_sliding_window_pattern([True]),
    )
    with pytest.raises(ValueError, match=r"pattern must be 2 flags, one per layer"):
        open_source(file)
