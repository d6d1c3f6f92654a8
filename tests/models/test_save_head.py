"""A bare encoder that got a head is saved as transformers saves one with a head."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax.interop.pretrained import load_model
from lora_jax.models.save import save_model
from tests.golden.make_exports import BARE, HERE, adapted, inputs, make_base


@pytest.mark.parametrize("family", sorted(BARE))
def test_its_class_and_names_are_those_of_transformers(family, tmp_path):
    base = make_base(family, "trained", tmp_path / "base")
    model = adapted(family, "trained", base)
    merged, own = model.module.merge(model.variables), model.module.model
    save_model(tmp_path / "out", merged, base, pooling=own.pooling)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    theirs = json.loads((HERE / family / "config.json").read_text())
    assert config["architectures"] == theirs["architectures"]
    named = load_file(HERE / family / "model.safetensors").keys()
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == named
    again = load_model(tmp_path / "out")
    assert again.module.num_labels == 3
    np.testing.assert_allclose(
        jax.jit(again.module.apply)(again.variables, *inputs(family).values()),
        jax.jit(model.module.apply)(model.variables, *inputs(family).values()),
        atol=2e-6,
        rtol=1e-5,
    )


def test_a_head_that_transformers_would_compute_otherwise_stays_beside_the_base(
    tmp_path,
):
    base = make_base("bert", "trained", tmp_path / "base")
    key = jax.random.key(0)
    model = load_model(base, num_labels=3, pooling="mean", key=key)
    with pytest.warns(UserWarning, match="'mean' pooling.*feeds it 'pooler'"):
        save_model(tmp_path / "out", model.params, base, pooling="mean")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["BertModel"]
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert "embeddings.word_embeddings.weight" in names
    assert load_model(tmp_path / "out").module.pooling == "mean"


def test_a_bare_encoder_without_a_head_stays_bare(tmp_path):
    base = make_base("dinov2", "bare", tmp_path / "base")
    save_model(tmp_path / "out", load_model(base).params, base)
    wanted = load_file(base / "model.safetensors").keys()
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == wanted
