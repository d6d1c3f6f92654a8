"""Fine-tuning runs, and what is done with the models that come of them.

`run.fine_tune` starts one; `evaluation`, `encode`, `score` and `inspection` take it on.
Nothing here prints: what there is to say goes to a `Reporter`.
"""
