"""LoRA for JAX and Flax."""
