"""Numbers as people read them; what a result depends on."""

import importlib.metadata
import math
import os

import pytest

from lora_jax.cli.console import Console
from lora_jax.finetune.formatting import arithmetic, perplexity, size
from lora_jax.finetune.report import versions


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1.5e6, "1.5 MB"),
        (999e6, "999 MB"),
        (2.5e12, "2,500 GB"),
    ],
)
def test_bytes(count, shown):
    assert size(count) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(2e6, "2 MFLOP"), (4.27e13, "42.7 TFLOP"), (4e18, "4,000 PFLOP")],
)
def test_arithmetic(count, shown):
    assert arithmetic(count) == shown


def test_a_checkout_that_is_not_installed_has_no_version_and_no_error(monkeypatch):
    installed = importlib.metadata.version

    def version(name):
        if name == "lora_jax":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert "lora_jax" not in versions()
    assert versions()["jax"] == installed("jax")


def test_perplexity_of_a_loss_that_is_too_large_is_infinite():
    assert perplexity(0.0) == 1
    assert perplexity(1000.0) == math.inf


def test_a_reader_that_goes_away_does_not_end_what_is_under_way():
    console, (read, write) = Console(), os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as pipe:
        console._rich.file = pipe
        console.say("x" * 100_000)
        console.say("y")


@pytest.mark.parametrize("width", [20, 60, 80])
def test_no_word_of_a_table_is_broken_however_narrow_the_terminal(width, capsys):
    console = Console()
    console._rich.width = width
    name = "encoder/layer_{0..29}/attention/query_and_key_and_value"
    columns = ("layer", "count", "kernel", "largest singular value")
    console.table(columns, [(name, 1234567, "1024 x 4096", 0.5), ("b", 1, "2", 1.0)])
    words = capsys.readouterr().out.split()
    for word in (name, "1,234,567", "1024", "4096", "largest", "singular", "value"):
        assert word in words
