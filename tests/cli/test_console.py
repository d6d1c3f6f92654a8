"""Numbers as people read them; what a result depends on."""

import importlib.metadata

import pytest

from lora_jax.cli.console import arithmetic, size
from lora_jax.cli.report import versions


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
