"""Names of TPU slices, and compiling for one where libtpu is installed."""

import importlib.util
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from lora_jax.config import LoRAConfig
from lora_jax.models.decoder import Decoder
from lora_jax.models.decoder_config import DecoderConfig, Rope
from lora_jax.parallel.mesh import make_mesh
from lora_jax.parallel.rules import make_sharding
from lora_jax.plan.slices import (
    CHIPS,
    GIB,
    check_topology,
    chips_of,
    open_slice,
    slices_like,
    uncached,
)
from lora_jax.plan.topology import DecoderSteps

TINY = DecoderConfig(
    vocab_size=512,
    hidden_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    mlp_size=512,
    max_positions=128,
    ropes=(Rope(1e4, 64),),
    layer_ropes=(0, 0),
)


def test_every_slice_is_named_by_its_shape():
    for kind, chip in CHIPS.items():
        counts = [chips_of(f"{kind}:{shape}") for shape in chip.slices]
        assert counts == sorted(counts)
        for shape in chip.slices:
            assert check_topology(f"{kind}:{shape}") is chip


def test_a_shape_that_does_not_exist_names_the_nearest():
    with pytest.raises(
        ValueError, match=r"no slice '4x5'.*nearest are v5e:4x4, v5e:4x8"
    ):
        check_topology("v5e:4x5")
    with pytest.raises(ValueError, match=r"no slice ''.*nearest are v5p:2x2x1"):
        check_topology("v5p")


def test_a_chip_that_does_not_exist_names_the_nearest():
    with pytest.raises(ValueError, match=r"like 'v5e:4x4'; there is no chip 'v5x'"):
        check_topology("v5x:4x4")


def test_slices_of_a_chip_are_listed_smallest_first():
    names = slices_like("v5p:4x4x4")
    assert names[0] == "v5p:2x2x1"
    assert "v5p:4x4x4" in names
    assert [chips_of(name) for name in names] == sorted(map(chips_of, names))


def test_programs_are_kept_out_of_an_active_cache(tmp_path):
    options = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: jax.config.values[name] for name in options}

    def cached(number):
        """Compiles a new program; counts the files in the cache."""
        jax.jit(lambda x: x * number).lower(1.0).compile()
        return len(list(tmp_path.iterdir()))

    try:
        for name, value in options.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        count = cached(2.5)
        assert count > 0
        with uncached():
            assert cached(3.5) == count
        assert cached(4.5) > count
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def test_without_libtpu_the_error_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"lora_jax\[tpu-plan\]") as error:
        open_slice("v5e:2x2")
    assert error.value.name == "libtpu"


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='libtpu is not installed: pip install "lora_jax[tpu-plan]"',
)
def test_a_step_is_compiled_for_an_absent_slice():
    devices = open_slice("v5e:2x2")
    assert len(devices) == 4
    sharding = make_sharding(make_mesh(data=1, fsdp=4, devices=devices))
    lora = LoRAConfig(rank=4, alpha=8)
    steps = DecoderSteps(
        Decoder(TINY, dtype=jnp.bfloat16, scan_layers=True, remat="block"),
        lora,
        128,
        sharding,
        16 * GIB,
    )
    plan = steps.price(4)
    assert plan.fits
    assert plan.temporaries
    assert plan.total < 100e6
    assert jax.default_backend() == "cpu"
