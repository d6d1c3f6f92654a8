"""Many devices, on JAX's own engine: meshes, sharding rules, batches, processes.

**A mesh.** ``lora-jax train`` takes every device of the machine. A ``mesh`` section of
the settings, or `make_mesh` in Python, says what the devices split; the sizes multiply
to their number, and one of them may be -1 for the devices that are left::

    mesh: {data: -1, fsdp: 4, tensor: 1}   # the default is data: -1, the others 1

====== ======================================== ====================================
axis   splits                                   each layer sends
====== ======================================== ====================================
data   the batch; each group has a whole model  the adapters' gradients
fsdp   the batch, and every base kernel         its kernel, gathered when it is used
tensor the layers' outputs, and the inputs of   its activations, summed
       the layers after them
====== ======================================== ====================================

A is sharded like its kernel's input axes, B like its output axes, the optimizer's state
like both. A weight's axis that doesn't divide is an error, or stays whole on every
device with ``uneven: replicate``; ``rules: {"mlp/up/kernel": [fsdp, null]}`` overrides
the built-in rules. ``train.batch_size`` must divide by data x fsdp x
``train.accumulate``.

**Several processes** start the same command, on one host or on many:

- anywhere, process I of N: ``lora-jax train my.yaml --coordinator HOST:1234 --processes
  N --process-id I``, where process 0 runs on HOST;
- SLURM, one task a GPU: ``srun lora-jax train my.yaml --distributed``;
- Kubernetes: ``lora-jax train my.yaml --distributed`` in the pods of an indexed Job or
  a JobSet with a headless service; the image has ``jax[k8s]``, and the service account
  may read pods, jobs and services;
- a TPU pod: ``gcloud compute tpus tpu-vm ssh NAME --worker=all --command="lora-jax
  train my.yaml --distributed"``.

``--distributed`` asks the cluster through `jax.distributed.initialize`, which knows
SLURM, Open MPI, Kubernetes and TPU pods. Every process reads the whole model and the
data, and forms its own rows of a batch. ``output.dir`` must be on a file system that
all of them see: the first process prints and writes, and checkpoints hold what all of
them have.

If a process dies, the others end with status 1 and print the command that continues
(JAX itself aborts them if it was process 0, or after 100 s without a sign of life).
``--resume`` continues bit for bit, or on another mesh up to rounding. Ctrl-C or SIGTERM
at one process stops all of them in good order at the next log step.

**From Python**, ``load_model(path, lora=config, key=key,
sharding=make_sharding(mesh))`` puts each tensor straight into its shards;
`shard_variables` does it for a tree in memory, and `partitioned_rules` reads the rules
of a model that has its own ``nn.with_partitioning``. `TrainState`, `make_train_step`
and `Checkpoints` need nothing more: the state stays in its shards, and a checkpoint
restores on another mesh. Eight devices and two processes give the losses and the
adapters of one, and the compiled step gathers no weight but FSDP's, a layer at a time
(``tests/parallel``, ``tests/cli/test_processes.py``).

Several processes have run on one machine only (CPU, gloo), and SLURM's detection from
its variables there; no GPU cluster, Kubernetes job or TPU pod was tried. ``eval`` and
``plan`` are one process, and take one device where the run's mesh doesn't fit.

Example:
  >>> import numpy as np
  >>> from lora_jax import make_mesh, shard_batch
  >>> mesh = make_mesh(data=-1, fsdp=1, tensor=1)
  >>> batch = shard_batch({"input_ids": np.ones((8, 16), np.int32)}, mesh)
  >>> batch["input_ids"].shape
  (8, 16)
"""
