"""Gradients of a mixture of experts on meshes of eight devices, against one device.

The loss includes that of load balancing. The meshes read the experts where a TPU does.
Run by test_eight_experts.py in a process of its own. Prints, for each mesh, the largest
relative error, and the shape of the experts' kernel on one device.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.config import LoRAConfig
from lora_jax.models import experts
from lora_jax.models.decoder import Decoder
from lora_jax.models.decoder_config import DecoderConfig, Rope
from lora_jax.models.expert_config import ExpertConfig
from lora_jax.names import ROUTED
from lora_jax.nn.adapt import adapt
from lora_jax.parallel.activation_sharding import on_mesh_of
from lora_jax.parallel.mesh import make_mesh, shard_batch
from lora_jax.parallel.rules import make_sharding, shard_variables
from lora_jax.train.balance import balance_loss

MESHES = {
    "data": {},
    "data, fsdp, tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "data, expert": {"expert": 4},
    "fsdp, tensor, expert": {"data": 1, "fsdp": 2, "tensor": 2, "expert": 2},
}
CONFIG = DecoderConfig(
    vocab_size=32,
    hidden_size=16,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_size=8,
    max_positions=32,
    ropes=(Rope(1e4, 4),),
    layer_ropes=(0, 0),
    experts=ExpertConfig(8, 3, 8, has_bias=True, has_router_bias=True),
)


def main():
    module, key = Decoder(CONFIG, scan_layers=True), jax.random.key
    ids = np.random.default_rng(0).integers(0, 32, (8, 6), np.int32)
    adapted = adapt(module, LoRAConfig(rank=2, alpha=3), ids)
    params = jax.jit(module.init)(key(1), ids)["params"]
    variables = jax.jit(adapted.attach)(params, key(2))
    variables["lora"] = jax.tree.map(lambda a: a + 0.1, variables["lora"])

    def loss(lora, variables, ids):
        logits, kept = adapted.apply(
            {**variables, "lora": lora}, ids, deterministic=True, mutable=[ROUTED]
        )
        return jnp.mean(jnp.sin(logits)) + 0.1 * balance_loss(kept[ROUTED])

    gradient = jax.value_and_grad(loss)
    wanted = jax.tree.leaves(jax.jit(gradient)(variables["lora"], variables, ids))
    report = {}
    experts.target_platform = lambda: "tpu"
    for name, sizes in MESHES.items():
        mesh = make_mesh(**sizes)
        sharding = make_sharding(mesh)
        placed = shard_variables(variables, sharding, adapted.targets(params))

        @jax.jit
        def run(lora, variables, ids, mesh=mesh):
            with on_mesh_of(mesh):
                return gradient(lora, variables, ids)

        rows = shard_batch({"ids": ids}, mesh)["ids"]
        got = jax.tree.leaves(run(placed["lora"], placed, rows))
        errors = [
            np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(b)).max()
            for a, b in zip(got, wanted, strict=True)
        ]
        frozen = placed["frozen"]["layers"]["mlp"]["experts"]
        kernel = frozen["gate_up"]["kernel"].addressable_shards[0].data
        lora = placed["lora"]["layers"]["mlp"]["experts"]
        parts = [
            lora[module][leaf].addressable_shards[0].data.shape
            for module, leaf in (("gate_up", "lora_b"), ("down", "lora_a"))
        ]
        report[name] = [float(max(errors)), kernel.shape, parts]
    print(json.dumps(report))  # noqa: T201 - read by the test


if __name__ == "__main__":
    main()
