"""Names of variable collections, leaves and mesh axes, each written once.

A variables dictionary of this library has three collections::

    {"frozen": W0 (every base weight),
     "lora":   lora_a, lora_b (and DoRA's magnitude), at the paths of the kernels,
     "params": ordinary parameters trained in full (a new head, say)}
"""

FROZEN = "frozen"
LORA = "lora"
PARAMS = "params"
TRAINABLE = (LORA, PARAMS)

LORA_A = "lora_a"
LORA_B = "lora_b"
MAGNITUDE = "magnitude"
ADAPTER_LEAVES = (LORA_A, LORA_B, MAGNITUDE)

KERNEL = "kernel"
BIAS = "bias"
SCALE = "scale"  # of a norm
EMBEDDING = "embedding"

# Modules of the models here. A decoder's blocks are ``layer_{i}``, or one `nn.scan`.
EMBED = "embed"  # a decoder's token embedding, and its head too where they are tied
HEAD = "head"  # a decoder's output head
LM_HEAD = "lm_head"  # Hugging Face's name of it
LAYERS = "layers"  # a decoder's scanned blocks: leaves have a leading axis of layers
CLASSIFIER = "classifier"  # an encoder's head
POOLER = "pooler"  # BERT's layer below the head, and the pooling that uses it

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"  # axes of a mesh, see `parallel.mesh`
MESH_AXES = (DATA, FSDP, TENSOR)
BATCH_AXES = (DATA, FSDP)  # a batch is split over these

DROPOUT = "dropout"  # the PRNG stream that adapter dropout draws from

# Values a rematerialisation policy may keep: `jax.ad_checkpoint.checkpoint_name`s.
X_A = "x_a"  # the thin product of a layer's input with A
LINEAR = "linear"  # the output of a model's linear layer, adapter included
ATTENDED = "attended"  # the output of attention
