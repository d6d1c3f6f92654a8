"""Writes ``tests/golden/images``: three small images as transformers processes them.

Run in an environment with Pillow and transformers 5 (not needed by the tests)::

    python tests/golden/make_images.py

A folder ``vit`` and a folder ``bit`` hold the processors as transformers saves them,
`reference.npz` the pixels they make of each image, as ``<processor>_<image>``.
"""

import pathlib

import numpy as np
import PIL.Image
from transformers.image_utils import load_image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

HERE = pathlib.Path(__file__).parent / "images"
PROCESSORS = {
    "vit": ViTImageProcessorPil(size={"height": 12, "width": 16}),
    "bit": BitImageProcessorPil(
        size={"shortest_edge": 17},
        crop_size={"height": 12, "width": 14},
        image_mean=[0.4, 0.5, 0.6],
        image_std=[0.2, 0.3, 0.25],
    ),
}


def main():
    HERE.mkdir(exist_ok=True)
    noise = np.random.default_rng(0).normal(128, 60, (9, 7, 3))
    colour = PIL.Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8))
    turned = PIL.Image.Exif()
    turned[0x0112] = 6  # orientation: the camera was held upright
    colour.resize((30, 25), 3).save(HERE / "colour.png")
    colour.convert("L").resize((21, 32), 3).save(HERE / "grey.png")
    colour.resize((23, 30), 3).convert("RGBA").save(HERE / "turned.png", exif=turned)
    arrays = {}
    for name, processor in PROCESSORS.items():
        processor.save_pretrained(HERE / name)
        for file in sorted(HERE.glob("*.png")):
            batch = processor(load_image(str(file)), return_tensors="np")
            arrays[f"{name}_{file.stem}"] = batch["pixel_values"][0]
    np.savez_compressed(HERE / "reference.npz", **arrays)


if __name__ == "__main__":
    main()
