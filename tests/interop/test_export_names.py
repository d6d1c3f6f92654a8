"""An exported adapter has the names of the class that the base opens as in PEFT."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax.interop.export import export_adapter
from lora_jax.interop.pretrained import load_model
from tests.golden.make_exports import CASES, EXPORTS, adapted, inputs, make_base
from tests.models.golden import GOLDEN

FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_peft_computes_what_we_do_with_what_we_export(family, kind, tmp_path):
    base = make_base(family, kind, tmp_path / "base")
    model = adapted(family, kind, base)
    config = model.module.config
    out = export_adapter(
        tmp_path / "out", model.variables, config, model, base_model="base"
    )
    golden = EXPORTS / f"{family}_{kind}"  # what PEFT was given
    assert (out / CONFIG).read_text() == (golden / CONFIG).read_text()
    written, wanted = load_file(out / FILE), load_file(golden / FILE)
    assert written.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)

    again = load_model(base, adapter=out)
    method = "embed" if kind == "bare" else "__call__"
    run = jax.jit(
        lambda variables, *arrays: again.module.apply(
            variables, *arrays, method=method
        ),
    )
    found = np.asarray(run(again.variables, *inputs(family).values()))
    with np.load(EXPORTS / "reference.npz") as reference:
        np.testing.assert_allclose(
            found, reference[f"{family}_{kind}"], rtol=1e-5, atol=6e-5
        )


def test_a_config_without_architectures_opens_as_the_bare_model(tmp_path):
    base = make_base("bert", "bare", tmp_path / "base")
    settings = json.loads((base / "config.json").read_text())
    del settings["architectures"]
    (base / "config.json").write_text(json.dumps(settings))
    model = adapted("bert", "bare", base)
    out = export_adapter(
        tmp_path / "out", model.variables, model.module.config, base
    )  # from the names alone, with no model in memory
    name = "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight"
    assert name in load_file(out / FILE)
    assert json.loads((out / CONFIG).read_text())["auto_mapping"] is None


def test_a_model_type_with_a_hyphen_names_a_module_of_python(tmp_path):
    adapter = GOLDEN / "xlm-roberta" / "peft_plain"
    model = load_model(GOLDEN / "xlm-roberta", adapter=adapter)
    out = export_adapter(tmp_path, model.variables, model.module.config, model)
    assert json.loads((out / CONFIG).read_text())["auto_mapping"] == {
        "base_model_class": "XLMRobertaForSequenceClassification",
        "parent_library": "transformers.models.xlm_roberta.modeling_xlm_roberta",
    }
    written, original = (load_file(folder / FILE) for folder in (out, adapter))
    assert written.keys() == original.keys()


def test_a_head_left_out_leaves_the_names_of_the_bare_model(tmp_path):
    base = make_base("vit", "trained", tmp_path / "base")
    model = adapted("vit", "trained", base)
    out = export_adapter(
        tmp_path / "out", model.variables, model.module.config, model, skip_head=True
    )
    assert all(
        name.startswith("base_model.model.layers.") for name in load_file(out / FILE)
    )
