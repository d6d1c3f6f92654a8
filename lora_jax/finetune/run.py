"""`fine_tune`: from a config to an adapter and honest numbers about it."""

import contextlib
import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lora_jax.finetune.errors import DivergedError, Interrupted, UserError
from lora_jax.finetune.reporter import Reporter
from lora_jax.interop.pretrained import load_model
from lora_jax.models.load import LoadedModel
from lora_jax.parallel.processes import (
    check_same,
    fail_together,
    is_first,
    is_lost_peer,
)

if TYPE_CHECKING:
    from lora_jax.finetune.session import Session
    from lora_jax.finetune.settings import RunSettings


class Run(NamedTuple):
    """A run that is finished.

    Attributes:
      path: the run folder; its ``adapter/`` holds the best adapter.
      settings: of the run.
      summary: what ``summary.json`` holds: the metrics of the best adapter
        (``"validation"``, ``"test"``) and of the frozen base (``"baseline"``), counts
        of parameters, memory, seconds, versions.
      metrics: the lines of ``metrics.jsonl``: training, validations, samples.
      prompt: what the model continues, ``"text"`` or a ``"chat"``; None if it
        classifies, or has no tokenizer.
    """

    path: Path
    settings: "RunSettings"
    summary: dict[str, Any]
    metrics: list[dict[str, Any]]
    prompt: Literal["text", "chat"] | None = None

    def load(self, **options: Any) -> LoadedModel:
        """Loads the base with the run's adapter on it.

        Args:
          **options: as for `load_model`.

        Returns:
          The model; ``loaded.module.apply(loaded.variables, ...)``.
        """
        return load_model(self.settings.model.path, self.path, **options)


def fine_tune(
    config: "str | os.PathLike[str] | Mapping[str, Any] | RunSettings",
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Run:
    """Fine-tunes a pretrained model as a config says; what `lora-jax train` does.

    An encoder learns to classify, a decoder to write. The run folder,
    ``output.dir``, holds the resolved config, the best adapter, checkpoints, metrics
    and a summary. The first Ctrl-C (or SIGTERM) stops after the steps under way and
    saves a checkpoint; the second stops at once.

    Args:
      config: a YAML file or a run folder, a nested dictionary of the same sections, or
        `RunSettings`. Needs the packages of ``lora_jax[train]``.
      overrides: settings to change, each ``"section.key=value"`` in YAML.
      resume: whether to go on from the last checkpoint in the run folder.
      overwrite: whether a run that is in the folder is deleted.
      reporter: takes in what is said meanwhile; None says nothing.

    Returns:
      The finished run. Where several processes train (`jax.distributed`), all of them
      call this with the same arguments, and all get it.

    Raises:
      FileNotFoundError: if a file or the model is missing.
      ValueError: naming every fault of the settings; if data or model can't be read; if
        both ``resume`` and ``overwrite`` are set.
      UserError: if the run folder is taken, the disk is full, or the step does not fit
        the device.
      DivergedError: a `UserError` of a run whose loss is no longer a number.
      Interrupted: a `KeyboardInterrupt` that says how to go on.
    """
    from lora_jax.finetune.run_folder import RunFolder
    from lora_jax.finetune.session import Session
    from lora_jax.finetune.settings import load_settings

    if resume and overwrite:
        raise ValueError("resume and overwrite must not both be set; choose one.")
    with contextlib.ExitStack() as stack:
        with fail_together():
            settings = load_settings(config, overrides)
            folder = RunFolder(settings.output.dir, is_writer=is_first())
            stack.callback(folder.release)
            if folder.is_writer:
                folder.check(settings, resume=resume, overwrite=overwrite)
        session = Session(settings, folder, reporter or Reporter())
        with _telling_how_to_resume(session):
            with fail_together():
                check_same("the settings", [settings.to_dict(), resume])
                session.prepare()
                if not resume:
                    folder.create(settings, overwrite=overwrite)
            summary = session.train()
        prompt = session.job.prompt
        return Run(folder.path, settings, summary, folder.metrics(), prompt)


@contextlib.contextmanager
def _telling_how_to_resume(session: "Session") -> Iterator[None]:
    """Adds to an error what is saved and how to go on from there."""
    try:
        yield
    except KeyboardInterrupt:
        said = f"interrupted. {session.how_to_resume()}"
        raise Interrupted(said, is_orderly=session.is_stopped) from None
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
        is_saved = session.checkpoints and session.checkpoints.latest_step() is not None
        if is_saved and not isinstance(error, DivergedError):
            error.add_note(session.how_to_resume())
        raise
