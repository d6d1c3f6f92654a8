"""Fine-tuning runs, and evaluating and using the resulting models.

`run.fine_tune` starts a run; `evaluation`, `encode`, `score` and `inspection` use it.
Nothing here prints: output goes to a `Reporter`.
"""
