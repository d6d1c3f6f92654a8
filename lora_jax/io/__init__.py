"""Files at the library's borders: weights, checkpoints, tokenizers, packages, data."""
