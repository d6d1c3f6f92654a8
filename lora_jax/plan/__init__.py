"""Planning: the memory and FLOPs of a training step before it runs, and what fits.

`step` estimates a step by compiling it, `topology` does so for a decoder on a TPU slice
that need not exist here, and `fit` searches for the settings that fit.
"""
