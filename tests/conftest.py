"""What every test runs under: the CPU, and shapes checked in the pure functions.

``JAX_PLATFORMS=cuda pytest tests/attention/test_fused_attention.py`` runs a file on a
GPU, with float32 that is float32. Tests that hold XLA:CPU's bits or its programs fail
there.
"""

import gc
import importlib.metadata
import os
from collections.abc import Iterator

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Most tests compile much and run it once: the costly optimisations of machine code
    # are left out, here and in the processes started here, but for tests marked
    # "optimized". JAX_DISABLE_MOST_OPTIMIZATIONS=0 has them everywhere.
    is_quick = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1"
    # XLA's older emitters of machine code take a third of the time to compile, and one
    # LLVM module a program less than many in parallel, as every core has a test anyway.
    # A jaxlib that doesn't know the flags aborts, so only those that do get them.
    if is_quick and importlib.metadata.version("jaxlib").startswith("0.10."):
        quick = "--xla_cpu_use_fusion_emitters=false"
        quick += " --xla_cpu_parallel_codegen_split_count=1"
        os.environ["XLA_FLAGS"] = f"{quick} {os.environ.get('XLA_FLAGS', '')}"
else:
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # many share the device
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"

import hypothesis
import jax
import pytest
from jax._src import compiler
from jaxtyping import config, install_import_hook

# Before anything imports lora_jax.ops: its annotations are then checked on every call.
install_import_hook(["lora_jax.ops", "lora_jax.attention"], "beartype.beartype")

hypothesis.settings.register_profile(
    "repeatable", deadline=None, derandomize=True, database=None, max_examples=25
)
hypothesis.settings.load_profile("repeatable")


# Tracing makes many objects and little garbage: looking for it after every 700 of them,
# as Python does, takes a twentieth of the suite's time.
gc.set_threshold(50_000, 20, 50)


@pytest.fixture(scope="module", autouse=True)
def _forget_compilations():
    """Frees a file's compiled programs: XLA aborts where they use up memory maps."""
    yield
    jax.clear_caches()


def _default_emitters(*args, options_of=compiler.get_compile_options, **kwargs):
    """Overrides the flags set above for one program; JAX has no public way."""
    options = options_of(*args, **kwargs)
    options.env_option_overrides += [
        ("xla_cpu_use_fusion_emitters", True),
        ("xla_cpu_parallel_codegen_split_count", 32),  # XLA's default
    ]
    return options


@pytest.fixture(autouse=True)
def _optimized(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Compiles what is marked "optimized" as it is compiled for users."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    if before and request.node.get_closest_marker("optimized"):
        jax.config.update(name, False)
        if "fusion_emitters=false" in os.environ.get("XLA_FLAGS", ""):
            monkeypatch.setattr(compiler, "get_compile_options", _default_emitters)
    yield
    jax.config.update(name, before)


@pytest.fixture
def unchecked():
    """Switches the shape checker off, to see the library's own errors."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(7)
