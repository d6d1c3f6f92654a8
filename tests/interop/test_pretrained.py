"""`load_model` finds the base that an adapter names, or says that it needs a path."""

import json
import shutil

import jax
import numpy as np
import pytest

from lora_jax.config import LoRAConfig
from lora_jax.files.adapter import save_adapter
from lora_jax.interop.peft import read_peft
from lora_jax.interop.pretrained import load_model
from lora_jax.names import FROZEN
from lora_jax.tree.fingerprint import fingerprint
from tests.interop.peft_cases import adapter_of
from tests.models.golden import GOLDEN

LLAMA = GOLDEN / "llama"
ONE = LoRAConfig(rank=1, targets=["query"])


def save(folder, extra):
    model = load_model(LLAMA, lora=ONE, key=jax.random.key(0))
    base = fingerprint(model.variables[FROZEN])
    save_adapter(folder, model.variables, ONE, base, extra=extra)
    return folder


def equal(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_the_base_is_the_one_that_the_adapter_names(tmp_path):
    extra = {"model": str(LLAMA), "labels": [1]}
    adapter = save(tmp_path, extra)
    found = load_model(adapter=adapter)
    assert equal(found.variables, load_model(LLAMA, adapter).variables)
    assert found.extra == extra
    assert load_model(LLAMA).extra is None


def test_an_adapter_that_names_no_base_needs_a_path(tmp_path):
    adapter = save(tmp_path, {})
    with pytest.raises(ValueError, match=r"path must name the base of .*doesn't say"):
        load_model(adapter=adapter)
    with pytest.raises(ValueError, match=r"path must name a model .* got None"):
        load_model()


@pytest.mark.parametrize("named", ["gone/llama", None, 3])
def test_another_tools_base_must_be_a_folder_here(tmp_path, named):
    folder = shutil.copytree(adapter_of("llama", "rslora"), tmp_path / "adapter")
    file = folder / "adapter_config.json"
    settings = json.loads(file.read_text())

    def name(base):
        file.write_text(json.dumps({**settings, "base_model_name_or_path": base}))

    name(str(LLAMA))
    found = load_model(adapter=folder)
    assert equal(found.variables, load_model(LLAMA, folder).variables)
    assert found.extra == {}
    name(named)
    with pytest.raises(ValueError, match=r"path must name the base of .*is not a fol"):
        load_model(adapter=read_peft(folder))
