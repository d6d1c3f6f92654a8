"""What can't be loaded is called by its name."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import LoRAConfig
from lora_jax.files.adapter import save_adapter
from lora_jax.interop.pretrained import load_model
from tests.models.golden import GOLDEN


def folder(family, target, change=lambda tensors: tensors, **settings):
    target.mkdir()
    config = json.loads((GOLDEN / family / "config.json").read_text()) | settings
    (target / "config.json").write_text(json.dumps(config))
    tensors = change(load_file(GOLDEN / family / "model.safetensors"))
    save_file(tensors, target / "model.safetensors")
    return target


def resized(rows):
    def change(tensors):
        return {
            name: np.resize(t, (rows, t.shape[1]))
            if name.endswith(("embed_tokens.weight", "word_embeddings.weight"))
            else t
            for name, t in tensors.items()
        }

    return change


@pytest.mark.parametrize(
    ("family", "architecture", "kinds"),
    [
        ("bert", "BertForTokenClassification", "Model and ForSequenceClassification"),
        ("bert", "BertForMultipleChoice", "Model and ForSequenceClassification"),
        ("roberta", "RobertaForQuestionAnswering", "ForSequenceClassification"),
        ("llama", "LlamaForSequenceClassification", "ForCausalLM"),
        ("gpt2", "GPT2ForTokenClassification", "ForCausalLM"),
        ("gpt2", "GPT2DoubleHeadsModel", "ForCausalLM"),
    ],
)
def test_other_heads_are_unsupported_architectures(
    family, architecture, kinds, tmp_path
):
    path = folder(family, tmp_path / "m", architectures=[architecture])
    with pytest.raises(ValueError, match=rf"{architecture} is unsupported; .*{kinds}"):
        load_model(path)


def test_an_encoder_with_another_head_loads_without_it(tmp_path):
    architectures = ["BertForTokenClassification"]
    path = folder("bert", tmp_path / "m", architectures=architectures)
    model = load_model(path, pooling="mean")
    assert not model.has_head
    wanted = load_model(GOLDEN / "bert", pooling="mean")
    assert jax.tree.all(jax.tree.map(np.array_equal, model.params, wanted.params))


def test_a_quantised_folder_says_so(tmp_path):
    def change(tensors):
        name = "model.layers.0.self_attn.q_proj."
        packed = tensors.pop(f"{name}weight")
        return tensors | {
            f"{name}qweight": packed.astype(np.int32),
            f"{name}scales": np.ones((1, 24), np.float16),
        }

    quantised = {"quant_method": "gptq", "bits": 4}
    path = folder("llama", tmp_path / "m", change, quantization_config=quantised)
    with pytest.raises(ValueError, match=r"The model is quantised \(gptq\), which"):
        load_model(path)


def test_a_config_left_from_quantising_does_no_harm(tmp_path):
    left = {"quant_method": "bitsandbytes"}
    load_model(folder("llama", tmp_path / "m", quantization_config=left))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_resized_vocabulary_is_told_by_its_shapes(family, tmp_path):
    path = folder(family, tmp_path / "m", resized(60))
    size = json.loads((path / "config.json").read_text())["vocab_size"]
    wanted = rf"vocabulary was resized: .* has 60 tokens, vocab_size .* is {size}"
    with pytest.raises(ValueError, match=wanted):
        load_model(path)


def test_an_encoders_adapter_on_a_decoder_is_called_that(tmp_path):
    config = LoRAConfig(rank=2, targets=["query"], train=["classifier"])
    model = load_model(GOLDEN / "bert", lora=config, key=jax.random.key(0))
    extra = {"pooling": "pooler"}
    save_adapter(tmp_path / "a", model.variables, config, "1-0", extra=extra)
    with pytest.raises(
        ValueError, match=r"must be attached to the encoder .* is a decoder"
    ):
        load_model(GOLDEN / "llama", tmp_path / "a")
