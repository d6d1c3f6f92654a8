"""Tokens by their text, in a model's own vocabulary."""

import pytest

from lora_jax import LoRAConfig, load_model
from lora_jax.models.tokens import localize, name_tokens
from tests.models.golden import GOLDEN
from tests.tiny_decoder import make_decoder


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load_model(make_decoder(tmp_path_factory.mktemp("tokens") / "llama"))


def test_a_list_is_of_the_embedding_and_text_becomes_ids(loaded):
    config = localize(LoRAConfig(tokens=["sky", 5, "</s>"]), loaded)
    assert config.tokens_by_layer == {"embed": (12, 5, 1)}


def test_layers_may_have_hugging_face_s_names(loaded):
    tokens = {"model.embed_tokens": ["sky"], "lm_head": ["sea", 3]}
    config = localize(LoRAConfig(tokens=tokens), loaded)
    assert config.tokens_by_layer == {"embed": (12,), "head": (14, 3)}


def test_an_encoder_s_list_is_of_its_words():
    config = localize(LoRAConfig(tokens=[3, 4]), load_model(GOLDEN / "bert"))
    assert config.tokens_by_layer == {"encoder/embeddings/word": (3, 4)}


def test_every_fault_is_in_one_error(loaded):
    tokens = {"embed": ["sky", 12, "skies", "</t>", 43], "head": [99]}
    with pytest.raises(ValueError, match="tokens: ") as error:
        localize(LoRAConfig(tokens=tokens), loaded)
    for part in (
        "12 and 'sky' are one token, 12",
        "'skies' is not a token of ",
        "tokenizer.json. Did you mean: </s>?",
        "43 must have a row in the table of 43",
        "99 must have a row",
    ):
        assert part in str(error.value)


def test_text_needs_a_tokenizer():
    config = LoRAConfig(tokens={"embed": ["sky", 3]})
    with pytest.raises(ValueError, match="'sky' must be an id: the model has no token"):
        name_tokens(config, None, 43)
