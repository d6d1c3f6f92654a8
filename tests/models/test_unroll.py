"""When scanned blocks are compiled one by one."""

import jax
import jax.numpy as jnp
import pytest

from lora_jax.finetune.sections import ModelSettings
from lora_jax.models import decoder
from lora_jax.models.decoder import MAX_UNROLLED, Decoder
from lora_jax.models.decoder_config import DecoderConfig

IDS = jnp.zeros((1, 4), jnp.int32)


def unrolled(model):
    """Returns how many layers the scan of a model compiles in one pass."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), IDS)
    jaxpr = jax.make_jaxpr(model.apply)(shapes, IDS).jaxpr
    (scan,) = (each for each in jaxpr.eqns if each.primitive.name == "scan")
    return scan.params["unroll"]


@pytest.mark.parametrize(
    ("platform", "remat", "layers", "wanted"),
    [
        ("tpu", "none", 2, 2),
        ("tpu", "none", MAX_UNROLLED + 1, 1),
        ("tpu", "lora", 2, 1),
        ("gpu", "lora", 2, 2),
        ("gpu", "block", 2, 1),
        ("cpu", "none", 2, 1),
    ],
)
def test_few_layers_are_not_a_loop_where_that_is_faster(
    monkeypatch, platform, remat, layers, wanted
):
    monkeypatch.setattr(decoder, "target_platform", lambda: platform)
    config = DecoderConfig(
        vocab_size=8,
        hidden_size=4,
        num_layers=layers,
        num_heads=1,
        num_kv_heads=1,
        head_dim=4,
        mlp_size=8,
        max_positions=8,
    )
    model = Decoder(config, scan_layers=True, remat=remat)
    assert unrolled(model) == wanted


def test_the_first_policy_is_the_fastest_on_the_platform():
    auto, asked = ModelSettings("model"), ModelSettings("model", remat="block")
    assert [auto.first_remat(name) for name in ("tpu", "gpu")] == ["none", "lora"]
    assert asked.first_remat("tpu") == "block"
