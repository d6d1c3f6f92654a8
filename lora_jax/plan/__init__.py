"""What a training step needs, known before it runs: memory, arithmetic, what fits.

Stands apart from `parallel`, because it compiles whole steps of `train`, which itself
builds on `parallel`. Every step, of this machine (`local`) or of a TPU slice that need
not be there (`topology`), is priced by `step.price_step`; `fit` searches among prices.
"""
