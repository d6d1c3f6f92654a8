"""LoRA for JAX and Flax: ``y = x W0 + scaling * (x A) B``, with W0 frozen.

Three ways in: pure functions (`lora_dense` and its kin), Linen modules (`LoRADense`,
`LoRAAttention`), and `adapt` for a model that was written without LoRA.

The public names are in ``__init__.pyi``, grouped by purpose. Each is imported when it
is first used, so that ``import lora_jax`` loads no JAX.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
