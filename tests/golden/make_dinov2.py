"""Writes what else transformers computes with DINOv2: other image sizes, the gated MLP.

Run in an environment with torch, transformers 5 and PEFT, after ``make_models.py``::

    python -m tests.golden.make_dinov2

``dinov2/resized.npz`` holds images of another size than the model's, and its logits:
the position table is resized, up along one axis and down along the other.
``dinov2_gated`` is a model with ``use_swiglu_ffn``, no bias of query, key and value,
and patches and images given as lists, with its ``reference.npz``, and PEFT's adapters
on it: transformers has gate and up in two, its files have them in one.
"""

import torch
import transformers

from tests.golden.make_models import HERE, adapted, build, logits_of, seed, write
from tests.golden.model_families import FAMILIES


def main():
    cls = transformers.Dinov2ForImageClassification
    model = cls.from_pretrained(HERE / "dinov2", attn_implementation="eager").eval()
    seed("dinov2", "resized")
    batch = {"pixel_values": torch.randn(2, 3, 20, 8)}
    arrays = batch | {"logits": logits_of(model, batch)}
    write(HERE / "dinov2" / "resized.npz", arrays)

    seed("dinov2_gated", "weights")
    changes = {"use_swiglu_ffn": True, "qkv_bias": False, "patch_size": [4, 4]}
    gated = build(FAMILIES["dinov2"], **changes, image_size=[12, 12])
    batch = {"pixel_values": torch.randn(2, 3, 12, 12)}
    logits = logits_of(gated, batch)
    home = HERE / "dinov2_gated"
    gated.save_pretrained(home)
    kinds, family = ("plain", "dora"), FAMILIES["dinov2"]
    found = adapted("dinov2_gated", family, batch, logits, kinds)
    arrays = batch | {"logits": logits} | found
    write(home / "reference.npz", arrays)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
