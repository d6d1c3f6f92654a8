"""Multi-device training with JAX sharding: meshes, rules, batches, processes.

**A mesh.** ``lora-jax train`` uses every device of the machine. The ``mesh`` section of
the settings, or `make_mesh` in Python, determines what the devices split; the product
of the sizes is the number of devices, and one size may be -1 for the rest::

    mesh: {data: -1, fsdp: 4, tensor: 1}   # the default is data: -1, the others 1
    mesh: {data: -1, expert: 4}            # a mixture of experts
    mesh: {fsdp: -1, sequence: 4}          # long rows

======== ======================================== ====================================
axis     splits                                   communication per layer
======== ======================================== ====================================
data     the batch; each group has a whole model  all-reduce of adapter gradients
fsdp     the batch, and every base kernel         all-gather of the kernel when used
tensor   the layers' outputs, and the inputs of   all-reduce of activations
         the layers after them
expert   the experts of a mixture; the rest is    all-reduce of the experts' outputs
         copied
sequence the tokens of each row; each device has  keys and values are passed around
         a whole model                            a ring of devices
======== ======================================== ====================================

A is sharded like its kernel's input axes, B like its output axes, the optimizer state
like both. A weight axis that is not divisible is an error, or is replicated with
``uneven: replicate``; ``rules: {"mlp/up/kernel": [fsdp, null]}`` overrides the built-in
rules. ``train.batch_size`` must be divisible by data x fsdp x ``train.accumulate``.
Adapter dropout draws the same masks on every mesh, except for experts and with
``sequence``.

**Long rows.** ``sequence`` is context parallelism: with 4 devices each has a quarter of
a row's tokens, activations and logits, and attention (`lora_jax.attention.ring`) is
exact, also for packed rows, windows and grouped heads. A row's length (with packing
``data.max_length``) must be divisible by 2 x sequence. Causal decoders only: layers
that carry a state from token to token (Gated DeltaNet, short convolutions), encoders
and encoder-decoders are refused. The ring consists of JAX's own loops and collectives:
no fused kernel takes part yet, so use it for rows that don't fit otherwise. It has run
on forced host devices only.

**Several processes** run the same command, on one host or many:

- anywhere, process I of N: ``lora-jax train my.yaml --coordinator HOST:1234 --processes
  N --process-id I``, where process 0 runs on HOST;
- SLURM, one task per GPU: ``srun lora-jax train my.yaml --distributed``;
- Kubernetes: ``lora-jax train my.yaml --distributed`` in the pods of an indexed Job or
  a JobSet with a headless service; the image needs ``jax[k8s]``, and the service
  account permission to read pods, jobs and services;
- a TPU pod: ``gcloud compute tpus tpu-vm ssh NAME --worker=all --command="lora-jax
  train my.yaml --distributed"``.

``--distributed`` uses `jax.distributed.initialize`, which detects SLURM, Open MPI,
Kubernetes and TPU pods. Every process reads the whole model and the data, and builds
its own rows of a batch. ``output.dir`` must be on a shared file system: the first
process prints and writes logs, and all processes write checkpoints.

If a process dies, the others exit with status 1 and print the command to resume (JAX
itself aborts them if it was process 0, or after 100 s without a heartbeat).
``--resume`` continues bit for bit, or up to rounding on another mesh. Ctrl-C or SIGTERM
in one process stops all of them gracefully at the next log step.

**From Python**, ``load_model(path, lora=config, key=key,
sharding=make_sharding(mesh))`` puts each tensor straight into its shards;
`shard_variables` shards a tree in memory, and `partitioned_rules` reads the rules of a
model that uses ``nn.with_partitioning``. `TrainState`, `make_train_step` and
`Checkpoints` need no further setup: the state keeps its shardings, and a checkpoint can
be restored on another mesh. Eight devices or two processes give the same losses and
adapters as one, and the compiled step gathers only FSDP weights, layer by layer
(``tests/parallel``, ``tests/cli/test_processes.py``).

Multiple processes have been tested on a single machine only (CPU, gloo), including
SLURM detection from its environment variables; GPU clusters, Kubernetes and TPU pods
are untested. ``eval`` and ``plan`` use one process, and a single device if the run's
mesh does not fit the machine.

Example:
  >>> import numpy as np
  >>> from lora_jax import make_mesh, shard_batch
  >>> mesh = make_mesh(data=-1, fsdp=1, tensor=1)
  >>> batch = shard_batch({"input_ids": np.ones((8, 16), np.int32)}, mesh)
  >>> batch["input_ids"].shape
  (8, 16)
"""
