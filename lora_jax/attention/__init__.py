"""Attention kernels: masked, causal and blockwise. Independent of LoRA."""
