"""Other tools' adapters and model names: PEFT, mlx-lm, loralib; loading and export."""
