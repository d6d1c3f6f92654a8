"""LoRA for Flax Linen: LoRA layers, and `adapt` for models written without them."""
