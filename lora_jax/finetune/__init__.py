"""Fine-tuning runs: settings, tasks, data, the run folder. Usable without the CLI."""
