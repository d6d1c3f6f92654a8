"""LoRA in Flax: modules written for it, and `adapt` for models that were not."""
