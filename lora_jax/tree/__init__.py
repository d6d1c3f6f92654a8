"""Parameter trees: paths, targets, collections, merging. Depends only on JAX."""
