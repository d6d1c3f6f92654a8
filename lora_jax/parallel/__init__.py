"""Many devices: meshes, sharding rules, batches; on JAX's own engine."""
