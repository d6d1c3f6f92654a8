"""Names of variable collections, leaves and mesh axes.

This library keeps its variables in three collections::

    {"frozen": W0 (every base weight),
     "lora":   lora_a, lora_b (and DoRA's magnitude), at the paths of the kernels,
     "params": ordinary parameters trained in full (a new head, say, or rows of
               tokens)}

Some methods add a fourth, ``"fixed"``: leaves of the adapter that aren't trained.
"""

FROZEN = "frozen"
LORA = "lora"
PARAMS = "params"
FIXED = "fixed"
TRAINABLE = (LORA, PARAMS)
ADAPTER = (LORA, FIXED)  # an adapter's leaves
SAVED = (LORA, PARAMS, FIXED)  # what a file of an adapter holds

LORA_A = "lora_a"
LORA_B = "lora_b"
MAGNITUDE = "magnitude"
START_A, START_B = "start_a", "start_b"  # A and B where training starts from W0
VERA_D, VERA_B = "vera_d", "vera_b"  # what VeRA trains: factors of B's rows and columns
ADAPTER_LEAVES = (LORA_A, LORA_B, MAGNITUDE, START_A, START_B, VERA_D, VERA_B)
TOKEN_ROWS = "token_rows"  # in ``params``, beside a table: rows trained in place of its

KERNEL = "kernel"
BIAS = "bias"
SCALE = "scale"  # a norm's
EMBEDDING = "embedding"

# Modules of the built-in models. A decoder's blocks are ``layer_{i}`` or one `nn.scan`.
EMBED = "embed"  # a decoder's token embedding, also its output head where tied
WORD_EMBEDDING = "encoder/embeddings/word"  # an encoder's
HEAD = "head"  # a decoder's output head
LM_HEAD = "lm_head"  # Hugging Face's name for it
LAYERS = "layers"  # a decoder's scanned blocks: leaves have a leading layer axis
EXPERTS, ROUTER = "experts", "router"  # of a mixture, inside its MLP
ROUTED = "routed"  # the collection of a router's scores, kept only where asked for
CLASSIFIER = "classifier"  # an encoder's head
POOLER = "pooler"  # BERT's layer below the head, and the pooling that uses it

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"  # mesh axes, see `parallel.mesh`
MESH_AXES = (DATA, FSDP, TENSOR)
BATCH_AXES = (DATA, FSDP)  # the axes a batch is sharded over
EXPERT = "expert"  # a mesh axis beside these, where experts are sharded
SEQUENCE = "sequence"  # a mesh axis beside these, where rows of tokens are split
TOKEN_AXES = (*BATCH_AXES, SEQUENCE)  # all axes that tokens are split over

MEMBER = "member"  # the mesh axis that the runs of a sweep are split over

OWNER = "adapter"  # of a line of data, and of a batch: whose example it is

DROPOUT = "dropout"  # the PRNG stream for adapter dropout
KEEP = "dropout_keep"  # beside A: the layer's own 1 - dropout_rate, where it is traced

# Checkpoint names (`jax.ad_checkpoint.checkpoint_name`) for rematerialisation policies.
X_A = "x_a"  # x A, of rank width
LINEAR = "linear"  # the output of a linear layer, adapter included
ATTENDED = "attended"  # the output of attention
