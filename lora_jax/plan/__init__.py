"""What a training step needs, known before it runs: memory, arithmetic, what fits.

Stands apart from `parallel`, because it compiles whole steps of `train`, which itself
builds on `parallel`. `step` prices a step, `topology` a decoder's on a TPU slice that
need not be there; `fit` searches among prices.
"""
