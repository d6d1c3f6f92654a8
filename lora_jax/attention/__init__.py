"""Attention kernels: masked, causal and blockwise; LoRA has no part in them."""
