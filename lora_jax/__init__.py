"""LoRA for JAX and Flax: ``y = x W0 + scaling * (x A) B``, with W0 frozen.

Three ways in: pure functions (`lora_dense` and its kin), Linen modules (`LoRADense`,
`LoRAAttention`), and `adapt` for a model that was written without LoRA.
"""

from lora_jax.config import LoRAConfig as LoRAConfig
from lora_jax.io.adapter import load_adapter as load_adapter
from lora_jax.io.adapter import save_adapter as save_adapter
from lora_jax.io.checkpoint import Checkpoints as Checkpoints
from lora_jax.io.vader import load_vader as load_vader
from lora_jax.models.pretrained import load_model as load_model
from lora_jax.models.save import save_model as save_model
from lora_jax.nn.adapt import Adapted as Adapted
from lora_jax.nn.adapt import adapt as adapt
from lora_jax.nn.adapt import find_targets as find_targets
from lora_jax.nn.attention import LoRAAttention as LoRAAttention
from lora_jax.nn.dense import LoRAConv as LoRAConv
from lora_jax.nn.dense import LoRADense as LoRADense
from lora_jax.nn.dense import LoRADenseGeneral as LoRADenseGeneral
from lora_jax.nn.dense import LoRAEinsum as LoRAEinsum
from lora_jax.nn.dense import LoRAEmbed as LoRAEmbed
from lora_jax.nn.layers import register_layer as register_layer
from lora_jax.ops import Contraction as Contraction
from lora_jax.ops import init_adapter as init_adapter
from lora_jax.ops import lora_attend as lora_attend
from lora_jax.ops import lora_conv as lora_conv
from lora_jax.ops import lora_dense as lora_dense
from lora_jax.ops import lora_einsum as lora_einsum
from lora_jax.ops import lora_embed as lora_embed
from lora_jax.ops import merge_kernel as merge_kernel
from lora_jax.train.data import Batches as Batches
from lora_jax.train.loop import evaluate as evaluate
from lora_jax.train.loop import fit as fit
from lora_jax.train.losses import causal_lm as causal_lm
from lora_jax.train.losses import contrastive as contrastive
from lora_jax.train.losses import softmax_cross_entropy as softmax_cross_entropy
from lora_jax.train.losses import squared_error as squared_error
from lora_jax.train.optimizer import adapter_labels as adapter_labels
from lora_jax.train.optimizer import adapter_mask as adapter_mask
from lora_jax.train.optimizer import adapters_only as adapters_only
from lora_jax.train.optimizer import lora_optimizer as lora_optimizer
from lora_jax.train.probe import fit_probe as fit_probe
from lora_jax.train.probe import probe_accuracy as probe_accuracy
from lora_jax.train.state import TrainState as TrainState
from lora_jax.train.step import make_eval_step as make_eval_step
from lora_jax.train.step import make_train_step as make_train_step
from lora_jax.tree.arithmetic import fit_adapter as fit_adapter
from lora_jax.tree.fingerprint import fingerprint as fingerprint
from lora_jax.tree.partition import count as count
from lora_jax.tree.partition import join as join
from lora_jax.tree.partition import partition as partition
from lora_jax.tree.targets import Target as Target
