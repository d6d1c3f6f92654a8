"""`fine_tune`: from a config to an adapter with its metrics."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lora_jax.finetune.errors import (
    DivergedError,
    Interrupted,
    UserError,
    disk_fault,
)
from lora_jax.finetune.reporter import Reporter
from lora_jax.interop.adapter_folder import RUN_ADAPTERS
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
    """A finished run.

    Attributes:
      path: the run folder; its ``adapter/`` is the best adapter, its ``adapters/`` the
        best of each name if the data has several.
      settings: settings of the run.
      summary: the contents of ``summary.json``: metrics of the best adapter
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

    def load(self, name: str | None = None, **options: Any) -> LoadedModel:
        """Loads the base with the run's adapter.

        Args:
          name: which adapter, if the run has several.
          **options: options of `load_model`.

        Returns:
          The model; call ``loaded.module.apply(loaded.variables, ...)``.
        """
        folder = self.path if name is None else self.path / RUN_ADAPTERS / name
        return load_model(self.settings.model.path, folder, **options)


def fine_tune(
    config: "str | os.PathLike[str] | Mapping[str, Any] | RunSettings",
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Run:
    """Fine-tunes a pretrained model as configured, like `lora-jax train`.

    An encoder is trained to classify, a decoder to generate text. The run folder,
    ``output.dir``, contains the resolved config, the best adapter, checkpoints, metrics
    and a summary. The first Ctrl-C (or SIGTERM) stops after the current steps and saves
    a checkpoint; the second stops immediately.

    If the lines of the data name their ``adapter``, one run trains an adapter for each
    name over one frozen base. Batches mix the lines; an adapter's gradient is that of
    its own lines, and an adapter without any in a batch is not touched: neither its
    weights (by weight decay) nor its moments, nor its place in the schedule. Each has
    its own validation and best step. ``summary["adapters"][NAME]`` has its metrics and
    ``folder``, ``adapters/NAME`` in the run folder, which `load_model` takes.

    Args:
      config: a YAML file, a run folder, a nested dictionary of the same sections, or
        `RunSettings`. Requires the packages of ``lora_jax[train]``.
      overrides: settings to change, each ``"section.key=value"`` in YAML.
      resume: whether to resume from the last checkpoint in the run folder.
      overwrite: whether to delete an existing run in the folder.
      reporter: receives progress and messages; None discards them.

    Returns:
      The finished run. In a multi-process job (`jax.distributed`) all processes call
      this with the same arguments, and all get it.

    Raises:
      FileNotFoundError: if a file or the model is missing.
      ValueError: listing all errors in the settings; if data or model can't be read; if
        both ``resume`` and ``overwrite`` are set.
      UserError: if the run folder is in use, the disk is full, or the step does not fit
        the device.
      DivergedError: a `UserError`, if the loss is no longer finite.
      Interrupted: a `KeyboardInterrupt` that tells how to resume.
    """
    from lora_jax.finetune.mixed_data import names_adapters
    from lora_jax.finetune.mixed_session import MixedSession
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
        kind = MixedSession if names_adapters(settings.data) else Session
        session = kind(settings, folder, reporter or Reporter())
        with _explained(session):
            with fail_together():
                check_same("the settings", [settings.to_dict(), resume])
                session.prepare()
                if not resume:
                    folder.create(settings, overwrite=overwrite)
            summary = session.train()
        prompt = session.job.prompt
        return Run(folder.path, settings, summary, folder.metrics(), prompt)


@contextlib.contextmanager
def _explained(session: "Session") -> Iterator[None]:
    """Adds to errors what is saved and how to resume."""
    try:
        yield
    except KeyboardInterrupt:
        message = f"interrupted. {session.how_to_resume()}"
        raise Interrupted(message, is_orderly=session.is_stopped) from None
    except Exception as error:
        if is_lost_peer(error):
            raise UserError(
                "another process of this run has ended, and the others can't continue "
                f"without it (see its own message). {session.how_to_resume()}\n"
                f"JAX reported: {str(error).splitlines()[0][:200]}",
                code=1,
            ) from error
        if fault := disk_fault(error, session.folder.path):
            message = f"{fault}\n{session.how_to_resume()}"
            raise UserError(message, code=1) from error
        is_saved = session.checkpoints and session.checkpoints.latest_step() is not None
        if is_saved and not isinstance(error, DivergedError):
            error.add_note(session.how_to_resume())
        raise
