"""The command line: one file a command, started by `lora_jax.cli.main`."""
