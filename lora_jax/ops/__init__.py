"""The mathematics of LoRA as pure functions of arrays."""

from lora_jax.ops.contraction import DENSE as DENSE
from lora_jax.ops.contraction import Contraction as Contraction
from lora_jax.ops.conv import lora_conv as lora_conv
from lora_jax.ops.dense import lora_dense as lora_dense
from lora_jax.ops.dora import column_norm as column_norm
from lora_jax.ops.dora import merge_dora as merge_dora
from lora_jax.ops.einsum import lora_einsum as lora_einsum
from lora_jax.ops.embed import lora_attend as lora_attend
from lora_jax.ops.embed import lora_embed as lora_embed
from lora_jax.ops.experts import lora_experts as lora_experts
from lora_jax.ops.init import init_adapter as init_adapter
from lora_jax.ops.init import path_key as path_key
from lora_jax.ops.merge import delta_kernel as delta_kernel
from lora_jax.ops.merge import merge_kernel as merge_kernel
from lora_jax.ops.shared import shared_hidden as shared_hidden
