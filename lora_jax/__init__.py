"""LoRA for JAX and Flax: ``y = x W0 + scaling * (x A) B``, with W0 frozen.

Three ways in: pure functions (`lora_dense` and its kin), Linen modules (`LoRADense`,
`LoRAAttention`), and `adapt` for a model that was written without LoRA.
"""

from lora_jax.config import LoRAConfig as LoRAConfig
from lora_jax.nn.adapt import Adapted as Adapted
from lora_jax.nn.adapt import adapt as adapt
from lora_jax.nn.adapt import find_targets as find_targets
from lora_jax.nn.dense import LoRAConv as LoRAConv
from lora_jax.nn.dense import LoRADense as LoRADense
from lora_jax.nn.dense import LoRADenseGeneral as LoRADenseGeneral
from lora_jax.nn.dense import LoRAEinsum as LoRAEinsum
from lora_jax.nn.dense import LoRAEmbed as LoRAEmbed
from lora_jax.nn.layers import register_layer as register_layer
from lora_jax.ops import lora_attend as lora_attend
from lora_jax.ops import lora_conv as lora_conv
from lora_jax.ops import lora_dense as lora_dense
from lora_jax.ops import lora_einsum as lora_einsum
from lora_jax.ops import lora_embed as lora_embed
from lora_jax.ops import merge_kernel as merge_kernel
