"""The public names of `lora_jax`, by purpose, and the module that defines each."""

# Every choice about an adapter.
from .config import LoRAConfig as LoRAConfig

# Pure functions: arrays in, arrays out.
from .ops import Contraction as Contraction
from .ops import init_adapter as init_adapter
from .ops import lora_attend as lora_attend
from .ops import lora_conv as lora_conv
from .ops import lora_dense as lora_dense
from .ops import lora_einsum as lora_einsum
from .ops import lora_embed as lora_embed
from .ops import lora_experts as lora_experts
from .ops import merge_kernel as merge_kernel

# Linen modules.
from .nn.attention import LoRAAttention as LoRAAttention
from .nn.lora_layers import LoRAConv as LoRAConv
from .nn.lora_layers import LoRADense as LoRADense
from .nn.lora_layers import LoRADenseGeneral as LoRADenseGeneral
from .nn.lora_layers import LoRAEinsum as LoRAEinsum
from .nn.lora_layers import LoRAEmbed as LoRAEmbed
from .nn.merge import lora_layer_targets as lora_layer_targets
from .nn.merge import merge_lora_layers as merge_lora_layers
from .nn.merge import merge_twins as merge_twins
from .nn.merge import twin_targets as twin_targets

# LoRA on a model that was written without it.
from .nn.adapt import Adapted as Adapted
from .nn.adapt import adapt as adapt
from .nn.find_targets import find_targets as find_targets
from .nn.data_start import lora_ga_init as lora_ga_init
from .nn.eva import eva_init as eva_init
from .nn.bank import AdapterBank as AdapterBank
from .nn.layer_rules import register_layer as register_layer
from .tree.targets import Target as Target

# Training.
from .train.loop import evaluate as evaluate
from .train.loop import fit as fit
from .train.lora_fa import lora_fa_projection as lora_fa_projection
from .train.optimizer import adapter_labels as adapter_labels
from .train.optimizer import adapter_mask as adapter_mask
from .train.optimizer import adapters_only as adapters_only
from .train.optimizer import lora_optimizer as lora_optimizer
from .train.probe import fit_probe as fit_probe
from .train.probe import probe_accuracy as probe_accuracy
from .train.state import TrainState as TrainState
from .train.step import make_eval_step as make_eval_step
from .train.step import make_train_step as make_train_step

# Losses.
from .train.balance import balance_loss as balance_loss
from .train.causal_lm import causal_lm as causal_lm
from .train.causal_lm import make_lm_loss as make_lm_loss
from .train.classification import classification_loss as classification_loss
from .train.embedding import embedding_loss as embedding_loss
from .train.losses import contrastive as contrastive
from .train.losses import softmax_cross_entropy as softmax_cross_entropy
from .train.losses import squared_error as squared_error

# Data.
from .train.data import Batches as Batches
from .train.data import TextBatches as TextBatches

# Whole runs: a config in, a run folder out.
from .finetune.run import fine_tune as fine_tune
from .finetune.sweep import sweep as sweep

# Pretrained models.
from .interop.bank import load_bank as load_bank
from .interop.pretrained import load_model as load_model
from .models.generate import generate as generate
from .models.loaded import LoadedModel as LoadedModel
from .models.save import save_model as save_model
from .models.stacking import unscan as unscan

# Files: adapters, checkpoints, other tools' formats.
from .files.adapter import load_adapter as load_adapter
from .files.adapter import save_adapter as save_adapter
from .files.checkpoint import Checkpoints as Checkpoints
from .interop.export import export_adapter as export_adapter
from .interop.loralib import read_loralib as read_loralib

# Many devices.
from .parallel.mesh import make_mesh as make_mesh
from .parallel.mesh import process_rows as process_rows
from .parallel.mesh import shard_batch as shard_batch
from .parallel.rules import make_sharding as make_sharding
from .parallel.rules import partitioned_rules as partitioned_rules
from .parallel.rules import shard_variables as shard_variables

# Arithmetic on trees of adapters and of parameters.
from .tree.arithmetic import fit_adapter as fit_adapter
from .tree.combine import Combined as Combined
from .tree.combine import combine_adapters as combine_adapters
from .tree.combine import extract_adapter as extract_adapter
from .tree.fingerprint import fingerprint as fingerprint
from .tree.merge import MergeError as MergeError
from .tree.merge import merge_errors as merge_errors
from .tree.merge import merge_params as merge_params
from .tree.merge import unmerge_params as unmerge_params
from .tree.partition import count as count
from .tree.partition import join as join
from .tree.partition import partition as partition
