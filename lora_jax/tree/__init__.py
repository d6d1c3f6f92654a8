"""Parameter trees: paths, targets, collections, merging. Needs JAX alone."""
