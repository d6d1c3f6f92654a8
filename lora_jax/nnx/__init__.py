"""LoRA for Flax NNX: ``import lora_jax.nnx as lnnx``.

The config, the ops and the files are those of the Linen side. `adapt` needs no example
input. Train what the filter `Trained` selects, in any loop of flax or JAX:

>>> import jax.numpy as jnp, optax
>>> from flax import nnx
>>> from lora_jax import LoRAConfig
>>> base, x = nnx.Linear(3, 4, rngs=nnx.Rngs(0)), jnp.ones((2, 3))
>>> model = adapt(base, LoRAConfig(rank=2, targets=".*"), rngs=nnx.Rngs(1))
>>> optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=Trained)
>>> @nnx.jit
... def step(model, optimizer):
...     grad = nnx.grad(lambda model: model(x).sum(), argnums=nnx.DiffState(0, Trained))
...     optimizer.update(model, grad(model))
>>> step(model, optimizer)
>>> merged = merge(model, x)  # with an example, both are compared on it

The default filter of `flax.nnx.Optimizer` and `flax.nnx.grad`, ``nnx.Param``, would
train the base: a layer with an adapter raises where a gradient of its W0 is taken. What
a layer can't see is a weight that the model reads past it (``x @ embedding.T``): that
read has no update, and `merge` with an example tells. `functional` gives a model as
pure functions, for `lora_jax.make_train_step`, `lora_jax.fit` and `Checkpoints`.
"""

from lora_jax.nnx.adapt import (
    Trained,
    TrainedParam,
    adapt,
    find_targets,
    lora_targets,
)
from lora_jax.nnx.attention import LoRAAttention
from lora_jax.nnx.data_start import eva_init, lora_ga_init
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
    "eva_init",
    "export_adapter",
    "find_targets",
    "functional",
    "load_adapter",
    "load_factors",
    "load_peft",
    "lora_ga_init",
    "lora_targets",
    "merge",
    "merge_errors",
    "register_layer",
    "save_adapter",
    "unmerge",
    "update",
]
