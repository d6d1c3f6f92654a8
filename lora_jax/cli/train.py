"""`lora-jax train`: from a config to an adapter and honest numbers about it."""

import argparse
import errno
import shlex
from typing import Any

from lora_jax.cli.console import Console
from lora_jax.finetune.devices import join
from lora_jax.finetune.errors import UserError
from lora_jax.finetune.run_folder import RunFolder
from lora_jax.finetune.session import Session
from lora_jax.finetune.settings import load_settings
from lora_jax.parallel.processes import (
    check_same,
    is_first,
    is_lost_peer,
    shut_down,
    together,
)


def run(args: argparse.Namespace, out: Console) -> dict[str, Any]:
    """Trains.

    Args:
      args: ``config``, ``overrides``, ``resume``, ``overwrite``.
      out: where to print.

    Returns:
      What summary.json holds.
    """
    join(args, out)
    with together():
        settings = load_settings(args.config, args.overrides)
        folder = RunFolder(settings.output.dir, is_writer=is_first())
        if folder.is_writer:
            folder.check(settings, resume=args.resume, overwrite=args.overwrite)
    session = Session(settings, folder, out, again=_again(args))
    try:
        with together():
            check_same("the settings", [settings.to_dict(), args.resume])
            session.prepare()
            if not args.resume:
                folder.create(settings, overwrite=args.overwrite)
        summary = session.train()
        shut_down()
        return summary
    except KeyboardInterrupt:
        said = f"interrupted. {session.how_to_resume()}"
        if session.is_stopped:
            shut_down()
        raise UserError(said, code=130) from None
    except Exception as error:
        if is_lost_peer(error):
            raise UserError(
                "another process of this run has ended, and the others can't go on "
                f"without it (its own message says why). {session.how_to_resume()}\n"
                f"JAX saw: {str(error).splitlines()[0][:200]}",
                code=1,
            ) from error
        if isinstance(error, OSError) and (
            error.errno == errno.ENOSPC or "disk" in str(error)
        ):
            said = f"{error}\n{session.how_to_resume()}"
            raise UserError(said, code=1) from error
        if session.checkpoints and session.checkpoints.latest_step() is not None:
            out.say(session.how_to_resume())
        raise


def _again(args: argparse.Namespace) -> str:
    words = ["lora-jax", "train", args.config, *args.overrides, "--resume"]
    words += ["--distributed"] * args.distributed
    if args.coordinator is not None:
        words += ["--coordinator", args.coordinator]
        words += ["--processes", str(args.processes)]
        words += ["--process-id", str(args.process_id)]
    return shlex.join(words)
