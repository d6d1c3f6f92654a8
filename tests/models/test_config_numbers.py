"""A size of zero or below is refused with words, whichever key has it."""

import json

import pytest

from lora_jax.models.families import FAMILIES
from tests.models.golden import GOLDEN

CONFIGS = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))


@pytest.mark.parametrize("name", CONFIGS)
def test_sizes_below_one_raise_nothing_but_value_errors(name):
    config = json.loads((GOLDEN / name / "config.json").read_text())
    family, refused = FAMILIES[config["model_type"]], 0
    inner = config.get("text_config", config)
    for key, value in inner.items():
        for other in (0, -1, -3) if type(value) is int else ():
            changed = {**inner, key: other}
            if inner is not config:
                changed = {**config, "text_config": changed}
            try:
                family.read_config(changed)
            except ValueError:
                refused += 1
    assert refused >= 12


@pytest.mark.parametrize("kind", [["x"], {}, None, 3])
def test_a_text_model_s_type_that_is_no_word_is_refused(kind):
    config = json.loads((GOLDEN / "mistral3" / "config.json").read_text())
    config["text_config"] = {**config["text_config"], "model_type": kind}
    with pytest.raises(ValueError, match="text_config"):
        FAMILIES[config["model_type"]].read_config(config)
