"""What every test runs under: the CPU, and shapes checked in the pure functions.

``JAX_PLATFORMS=cuda pytest tests/ops/test_fused_attention.py`` runs a file on a GPU,
with float32 that is float32. Tests that hold XLA:CPU's bits or its programs fail there.
"""

import os
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] != "cpu":
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # many share the device
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"

import hypothesis
import jax
import pytest
from jaxtyping import config, install_import_hook

# Before anything imports lora_jax.ops: its annotations are then checked on every call.
install_import_hook("lora_jax.ops", "beartype.beartype")

hypothesis.settings.register_profile(
    "repeatable", deadline=None, derandomize=True, database=None, max_examples=25
)
hypothesis.settings.load_profile("repeatable")


@pytest.fixture(scope="module", autouse=True)
def _forget_compilations():
    """Frees a file's compiled programs: XLA aborts where they use up memory maps."""
    yield
    jax.clear_caches()


@pytest.fixture
def quick_compilation() -> Iterator[None]:
    """Leaves XLA's costly optimisations out: much compiled here, little run."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def unchecked():
    """Switches the shape checker off, to see the library's own errors."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(7)
