"""`lora-jax plan --topology` from a config.json alone; this machine plays the slice."""

import json

import jax
import pytest

from lora_jax.cli.plan import read_mesh
from lora_jax.finetune import pricing
from lora_jax.finetune.settings import load_settings
from lora_jax.models.load import load_base
from lora_jax.plan import slices, topology
from lora_jax.plan.flops import pair_step_flops
from lora_jax.plan.step import StepPlan
from lora_jax.tree.paths import flatten
from tests.models.golden import GOLDEN


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(pricing, "open_slice", lambda name: jax.devices()[:1])
    folder = tmp_path / "model"
    folder.mkdir()
    text = (GOLDEN / "llama" / "config.json").read_text()
    (folder / "config.json").write_text(text)  # and no weights
    file = tmp_path / "plan.yaml"
    file.write_text(
        f"model: {{path: {folder}, dtype: bfloat16}}\n"
        f"data: {{train: {tmp_path}/none.jsonl, max_length: 16}}\n"
        f"output: {{dir: {tmp_path}/run}}\ntrain: {{batch_size: 2}}\n"
    )
    return file


def test_a_step_is_planned_without_weights_or_data(config, call):
    words = ["plan", config, "--topology", "v5e:4x4", "--json", "lora.tokens=[1, 2]"]
    code, out, shown = call(*words)
    assert code == 0, shown
    plan = json.loads(out)
    assert plan["step"]["batch"] == 2
    assert plan["step"]["tokens"] == 16
    assert plan["step"]["fits"]
    assert plan["step"]["total"] < 2**30
    assert plan["remat"] == "none"  # the first that fits
    assert "frozen base" in shown


@pytest.mark.parametrize(
    ("name", "steps"),
    [("t5", "PairSteps"), ("sentence/embeddinggemma", "TextPairSteps")],
)
def test_other_models_are_planned_by_their_own_loss(name, steps, config, monkeypatch):
    folder, model = GOLDEN / name, config.parent / "model"
    for file in folder.rglob("*.json"):
        if "peft" not in str(file) and file.name != "tokenizer.json":
            place = model / file.relative_to(folder)
            place.parent.mkdir(exist_ok=True)
            place.write_text(file.read_text())
    made = pricing.slice_steps(load_settings(config), "v5e:4x4", read_mesh(None), None)
    assert type(made).__name__ == steps
    is_decoder = steps == "TextPairSteps"
    loaded = load_base(folder, scan_layers=True if is_decoder else None)
    wanted = {path: leaf.shape for path, leaf in flatten(loaded.params).items()}
    assert {p: leaf.shape for p, leaf in flatten(made.params).items()} == wanted

    def traced(loss_fn, tx, variables, batch, rows, **options):
        batch = {
            name: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype)
            for name, leaf in batch.items()
        }
        loss, weight, _ = jax.eval_shape(loss_fn, variables, batch, {})
        assert loss.shape == weight.shape == ()
        assert {leaf.shape[:2] for leaf in batch.values()} <= {(4, 16), (4,)}
        return "a plan"

    monkeypatch.setattr(topology, "price_training", traced)
    assert made.price(4) == "a plan"
    plan = StepPlan(1, 4, 16, "none", 0, 0, 0, 0, 0, 0, True, 9e9, 0)
    flops = made.flops(plan)
    if not is_decoder:
        targets = made._adapted().targets(made.params)
        shape = (4, 16, 16, "none")
        assert flops == pair_step_flops(loaded.config, made.params, targets, *shape)
    else:
        assert flops == (9e9, 0)


def test_a_sweep_is_planned_with_its_runs_split_over_the_chips(config, call):
    words = ["plan", config, "--topology", "v5e:2x2", "--json", "--together"]
    code, out, shown = call(*words, "8")
    assert code == 0, shown
    plan = json.loads(out)
    assert plan["together"]["each"] == 2
    assert "8 runs of 2 x 16 tokens, 2 on each of v5e:2x2's 4 chips" in shown
    code, out, _ = call(*words, "4")
    one = json.loads(out)["together"]
    assert one["each"] == 1
    assert plan["together"]["base"] == one["base"]
    assert plan["together"]["trained"] == 2 * one["trained"]


def test_options_that_mean_nothing_alone_and_bad_names_are_refused(config, call):
    code, _, shown = call("plan", config, "--batch", "4")
    assert code == 2
    assert "--batch requires --topology" in shown
    code, _, shown = call("plan", config, "--topology", "v5e:4x5")
    assert code == 2
    assert "v5e:4x4, v5e:4x8" in shown
    code, _, shown = call("plan", config, "--topology", "v5e:4x4", "--mesh", "dta=2")
    assert code == 2
    assert "'dta=2'" in shown
    code, _, shown = call("plan", config, "--topology", "v5e:4x4", "--mesh", "tensor=3")
    assert code == 2
    assert "nearest that works" in shown


def test_a_step_that_does_not_fit_names_the_next_slice_that_it_fits(
    config, call, monkeypatch
):
    small, large = slices.Chip(999, ("2x2",)), slices.Chip(2**40, ("2x2", "2x4"))
    monkeypatch.setitem(slices.CHIPS, "v5e", large)
    chips = {"v5e:2x2": small, "v5e:2x4": large}
    monkeypatch.setattr(pricing, "check_topology", chips.__getitem__)
    code, _, shown = call("plan", config, "--topology", "v5e:2x2")
    assert code == 2
    shown = " ".join(shown.split())
    assert "a step of 2 x 16 tokens needs at least" in shown
    assert "a v5e chip has 999 B" in shown
    assert "--topology v5e:2x4 --batch 2" in shown


def test_where_no_slice_is_large_enough_the_error_says_what_else_helps(
    config, call, monkeypatch
):
    chip = slices.Chip(999, ("2x2", "2x4"))
    monkeypatch.setitem(slices.CHIPS, "v5e", chip)
    code, _, shown = call("plan", config, "--topology", "v5e:2x2")
    assert code == 2
    assert "No larger slice of that chip fits either" in " ".join(shown.split())


def test_a_mesh_is_all_fsdp_but_for_what_is_said():
    assert read_mesh(None) == {"data": 1, "fsdp": -1, "tensor": 1}
    assert read_mesh("tensor=2") == {"data": 1, "fsdp": -1, "tensor": 2}
    assert read_mesh("data=-1,tensor=2") == {"data": -1, "fsdp": 1, "tensor": 2}


def test_the_settings_of_mesh_and_model_are_planned_with(config, call):
    words = ["plan", config, "--topology", "v5e:4x4", "train.accumulate=2"]
    code, _, shown = call(*words, "--batch", "3")
    assert code == 2
    assert "data x fsdp x accumulate = 1 x 1 x 2 = 2; got batch 3" in shown
    overrides = ["mesh.uneven=replicate", "mesh.rules={up/kernel: [fsdp]}"]
    settings = load_settings(config, [*overrides, "model.scan=false"])
    steps = pricing.slice_steps(settings, "v5e:4x4", read_mesh(None), None)
    assert steps.sharding.uneven == "replicate"
    assert [(path, tuple(spec)) for path, spec in steps.sharding.rules] == [
        ("up/kernel", ("fsdp",))
    ]
    assert not steps.decoder.scan_layers


def test_the_policy_that_fits_is_named_and_the_slice_too(config, call, monkeypatch):
    words = ["plan", config, "--topology", "v5e:2x2", "--json"]
    needed = {}
    for remat in ("none", "lora"):
        code, out, _ = call(*words, f"model.remat={remat}")
        needed[remat] = json.loads(out)["step"]["total"]
    assert needed["lora"] < needed["none"]
    monkeypatch.setitem(
        slices.CHIPS, "v5e", slices.Chip(needed["none"] - 1, ("1x1", "2x2"))
    )
    options = ["model.remat=none", "--largest-batch", "--smallest-slice"]
    code, out, shown = call(*words, *options)
    assert code == 0, shown
    plan = json.loads(out)
    assert plan["remat"] == plan["step"]["remat"] == "lora"
    assert [tried["remat"] for tried in plan["tried"]] == ["none"]
    assert plan["largest_batch"] >= 2
    assert plan["smallest_slice"] == "v5e:1x1"
    assert list(plan["slices"]) == ["v5e:1x1"]
    assert "with remat lora: set model.remat=lora" in shown
