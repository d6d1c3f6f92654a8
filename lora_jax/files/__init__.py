"""Files of models and runs: safetensors, GGUF, tokenizers, adapters, checkpoints."""
