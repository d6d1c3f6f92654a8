import errno
import subprocess
import sys
import warnings

import pytest

from lora_jax.cli import inspect
from lora_jax.cli import main as cli
from lora_jax.cli.parser import COMMANDS, parse


def test_help_imports_none_of_the_optional_packages():
    heavy = ["pydantic", "orbax", "safetensors", "tokenizers", "matplotlib"]
    code = (
        "import sys; from lora_jax.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        f"print([m for m in {heavy} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip() == "[]"
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tran", "x"], "invalid choice: 'tran'"),
        (["train"], "required: config\n"),
        (["train", "c.yaml", "--resum"], "unknown argument '--resum'"),
        (["train", "c.yaml", "--resume", "--overwrite"], "not allowed with"),
        (["merge", "--adapter", "a"], "--out"),
        (["encode", "--data", "a", "--out", "b", "--batch-size", "0"], "at least 1"),
    ],
)
def test_a_wrong_command_line_exits_with_2_and_says_why(words, message, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_overrides_may_stand_behind_options():
    args = parse(["train", "c.yaml", "a.b=1", "--resume", "c.d=2"])
    assert args.overrides == ["a.b=1", "c.d=2"]
    assert args.resume


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("rank must be"), 2, "lora-jax inspect: rank must be"),
        (FileNotFoundError("no file x"), 2, "no file x"),
        (OSError(errno.ENOSPC, "No space", "/x/y"), 1, "the disk is full (/x/y)"),
        (ModuleNotFoundError("No", name="yaml"), 1, 'install "lora_jax[train]"'),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."),
            1,
            "out of memory: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.",
        ),
        (KeyError("a"), 1, "This is a bug in lora_jax"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_a_message_and_an_exit_code(
    error, code, message, monkeypatch, capsys
):
    def fail(args):
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["inspect", "x"]) == code
    shown = capsys.readouterr().err
    assert message in shown
    assert "Traceback" not in shown


def test_what_was_noted_about_an_error_is_shown(monkeypatch, capsys):
    def fail(args):
        error = ValueError("no such file")
        error.add_note("The checkpoint of step 3 is saved.")
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    assert cli.main(["inspect", "x"]) == 2
    shown = capsys.readouterr().err
    assert shown.endswith("no such file\nThe checkpoint of step 3 is saved.\n")


def test_warnings_are_shown_without_the_code_behind_them(monkeypatch, capsys):
    def run(args, out):
        warnings.warn("rank 9 is more than it needs", UserWarning, stacklevel=1)
        return {}

    monkeypatch.setattr(inspect, "run", run)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert cli.main(["inspect", "x"]) == 0
    shown = capsys.readouterr().err
    assert shown == "lora-jax inspect: warning: rank 9 is more than it needs\n"


def test_debug_shows_the_traceback(capsys):
    assert cli.main(["inspect", "/nowhere", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
