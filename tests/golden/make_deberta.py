"""Writes ``tests/golden/deberta/buckets.npz``: transformers' buckets of distances.

Run in an environment with torch and transformers 5, after ``make_models deberta``::

    python tests/golden/make_deberta.py
"""

import pathlib

import numpy as np
import torch
from transformers.models.deberta_v2 import modeling_deberta_v2

FILE = pathlib.Path(__file__).parent / "deberta" / "buckets.npz"
SIZES = ((256, 512), (7, 40))  # DeBERTa v3's, and odd ones

if __name__ == "__main__":
    distances = torch.arange(-600, 601)
    np.savez_compressed(
        FILE,
        **{
            f"of_{size}_{most}": modeling_deberta_v2.make_log_bucket_position(
                distances, size, most
            )
            .to(torch.int16)
            .numpy()
            for size, most in SIZES
        },
    )
