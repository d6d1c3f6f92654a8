"""`lora-jax init`: writes a commented config.yaml to start from."""

import argparse
from pathlib import Path
from typing import Any

from lora_jax.cli.console import Console
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.template import config_template


def run(args: argparse.Namespace, out: Console) -> dict[str, Any]:
    """Writes the file and returns its name; an existing file is a `UserError`."""
    file = Path(args.file)
    try:
        with file.open("x", encoding="utf-8") as opened:
            opened.write(config_template())
    except FileExistsError:
        raise UserError(
            f"{file} already exists; it was not changed. Name another file."
        ) from None
    out.say(f"{file} has every setting. Next: fill in your model, data and run folder,")
    out.say(f"then `lora-jax plan {file}` and `lora-jax train {file}`.")
    return {"config": str(file)}
