"""LoRA for Flax NNX: ``import lora_jax.nnx as lnnx``.

The config, the ops and the files are those of the Linen side.
"""

from lora_jax.nnx.adapt import (
    Trained,
    TrainedParam,
    adapt,
    find_targets,
    lora_targets,
)
from lora_jax.nnx.attention import LoRAAttention
from lora_jax.nnx.files import (
    export_adapter,
    load_adapter,
    load_factors,
    load_peft,
    save_adapter,
)
from lora_jax.nnx.functional import Functional, functional, update
from lora_jax.nnx.layers import (
    LoRAConv,
    LoRAEinsum,
    LoRAEmbed,
    LoRALinear,
    LoRALinearGeneral,
)
from lora_jax.nnx.merge import merge, merge_errors, unmerge
from lora_jax.nnx.rules import register_layer

__all__ = [
    "Functional",
    "LoRAAttention",
    "LoRAConv",
    "LoRAEinsum",
    "LoRAEmbed",
    "LoRALinear",
    "LoRALinearGeneral",
    "Trained",
    "TrainedParam",
    "adapt",
    "export_adapter",
    "find_targets",
    "functional",
    "load_adapter",
    "load_factors",
    "load_peft",
    "lora_targets",
    "merge",
    "merge_errors",
    "register_layer",
    "save_adapter",
    "unmerge",
    "update",
]
