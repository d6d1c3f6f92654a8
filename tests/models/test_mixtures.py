"""Mixtures of experts against what transformers computes with the same tiny folder."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.config import LoRAConfig
from lora_jax.models import experts
from lora_jax.models.decoder import Decoder
from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.models.expert_config import ExpertConfig
from lora_jax.models.families import FAMILIES
from lora_jax.models.generate import generate
from lora_jax.models.load import load_base, param_shapes
from lora_jax.models.save import save_model
from lora_jax.nn.adapt import adapt
from lora_jax.tree.paths import flatten
from tests.laws import equations, normal
from tests.models.golden import GOLDEN
from tests.reference import assert_close

UNIFORM = ("qwen3_moe", "mixtral", "olmoe", "gpt_oss")
MIXTURES = (*UNIFORM, "qwen3_moe_mixed", "gemma4_moe")
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}


def read(name):
    return dict(np.load(GOLDEN / name / "reference.npz", allow_pickle=False))


@pytest.fixture(scope="module")
def models():
    """Loads each folder once."""
    known = {}

    def load(name, **options):
        key = (name, *sorted(options.items()))
        if key not in known:
            known[key] = load_base(GOLDEN / name, **options)
        return known[key]

    return load


@pytest.mark.parametrize(
    ("name", "scan_layers"),
    [*((name, False) for name in MIXTURES), *((name, True) for name in UNIFORM)],
)
def test_logits_are_those_of_transformers(name, scan_layers, models):
    loaded, golden = models(name, scan_layers=scan_layers), read(name)
    assert ("layers" in loaded.params) == scan_layers
    logits = jax.jit(loaded.module.apply)(
        loaded.variables, jnp.int32(golden["input_ids"])
    )
    np.testing.assert_allclose(logits, golden["logits"], **TOLERANCE)


@pytest.mark.parametrize("name", MIXTURES)
def test_every_parameter_has_its_own_tensor_name(name, models):
    loaded = models(name, scan_layers=False)
    family = loaded.family
    names = [family.tensor_name(path) for path in param_shapes(family, loaded.module)]
    assert len(set(names)) == len(names)
    assert [family.bare_name(family.prefix + name) for name in names] == names


@pytest.mark.parametrize("name", UNIFORM)
def test_cached_generation_is_that_of_transformers(name, models):
    loaded, golden = models(name, scan_layers=False), read(name)
    prompts = [golden[f"prompt_{i}"].tolist() for i in range(2)]
    found = generate(loaded.module, loaded.variables, prompts, max_new_tokens=8)
    assert found == [golden[f"greedy_{i}"].tolist() for i in range(2)]


@pytest.mark.parametrize("name", UNIFORM)
def test_a_saved_model_has_the_tensors_of_its_source(name, models, tmp_path):
    loaded = models(name, scan_layers=True)
    save_model(tmp_path / "out", loaded.params, loaded.path)
    wanted = load_file(GOLDEN / name / "model.safetensors")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got.keys() == wanted.keys()
    assert all(np.array_equal(got[key], wanted[key]) for key in wanted)


def test_all_linear_covers_the_experts_and_not_the_router(models):
    loaded = models("qwen3_moe", scan_layers=True)
    adapted = adapt(loaded.module, LoRAConfig(rank=3, alpha=5), *loaded.inputs)
    rows = {t.path: t for t in adapted.targets(loaded.params)}
    both, down = (rows[f"layers/mlp/experts/{name}"] for name in ("gate_up", "down"))
    assert (both.kind, down.kind) == ("experts", "experts")
    assert both.factor_shapes == ((2, 5, 20, 3), (2, 5, 3, 14))
    assert down.factor_shapes == ((2, 5, 7, 3), (2, 5, 3, 20))
    assert "layers/mlp/router" not in rows
    named = LoRAConfig(rank=3, targets=["router"])
    routers = adapt(loaded.module, named, *loaded.inputs).targets(loaded.params)
    assert [row.path for row in routers] == ["layers/mlp/router"]


def test_experts_that_stay_frozen_are_said_to(models):
    loaded = models("qwen3_moe_mixed", scan_layers=False)

    def notes(**options):
        config = LoRAConfig(rank=2, **options)
        return adapt(loaded.module, config, *loaded.inputs).frozen_notes(loaded.params)

    assert notes() == []
    assert notes(targets=["query", "experts/gate_up"]) == [
        "experts: not adapted: layer_1/mlp/experts/down, 700 parameters. They stay "
        "frozen unless targets name them: experts/down."
    ]
    (line,) = notes(exclude=["experts/down", "experts/gate_up"])
    assert "experts/gate_up, layer_1/mlp/experts/down, 2,100 parameters" in line


def adapted_with(models, train=(), **changes):
    loaded = models("qwen3_moe", scan_layers=True)
    module = loaded.module.clone(**changes)
    config = LoRAConfig(rank=3, alpha=5, train=train)
    adapted = adapt(module, config, *loaded.inputs)
    return adapted, adapted.attach(loaded.params, jax.random.key(0))


def test_gradients_of_an_adapted_mixture_do_not_depend_on_what_is_kept(
    models, monkeypatch
):
    golden, found = read("qwen3_moe"), {}
    for remat in ("none", "lora", "block"):
        if remat == "block":  # and there, from where the experts are read
            monkeypatch.setattr(experts, "target_platform", lambda: "tpu")
        adapted, variables = adapted_with(models, remat=remat)

        def loss(lora, adapted=adapted, variables=variables):
            logits = adapted.apply({**variables, "lora": lora}, golden["input_ids"])
            return jnp.mean(jnp.sin(logits)), logits

        gradient = jax.jit(jax.grad(loss, has_aux=True))
        found[remat], logits = gradient(variables["lora"])
        np.testing.assert_allclose(logits, golden["logits"], **TOLERANCE)
    for path, leaf in flatten(found["none"]).items():
        assert leaf.any() == path.endswith("lora_b"), path
        for remat in ("lora", "block"):
            assert_close(flatten(found[remat])[path], leaf)


@pytest.mark.parametrize(
    ("platform", "train", "is_read"),
    [
        ("tpu", (), True),
        ("gpu", (), True),
        ("cpu", (), False),
        ("tpu", ("down",), True),
    ],
)
def test_scanned_experts_are_read_in_their_stack_where_slices_are_copied(
    platform, train, is_read, models, monkeypatch
):
    monkeypatch.setattr(experts, "target_platform", lambda: platform)
    adapted, variables = adapted_with(models, train)
    frozen = variables.pop("frozen")

    def loss(trained, frozen, ids):
        return jnp.sum(adapted.apply({**trained, "frozen": frozen}, ids))

    ids = read("qwen3_moe")["input_ids"]
    traced = jax.make_jaxpr(jax.grad(loss))(variables, frozen, ids)
    shapes = shapes_of_matrices(traced)
    trained = variables.get("params", frozen)
    stack = trained["layers"]["mlp"]["experts"]["down"]["kernel"].shape
    assert (stack in shapes) == is_read
    assert (stack[1:] in shapes) != is_read
    made = (var.aval for e in equations(traced.jaxpr) for var in e.outvars)
    assert not any(getattr(aval, "shape", ())[1:] == stack for aval in made)


def shapes_of_matrices(traced):
    products = [e for e in equations(traced.jaxpr) if e.primitive.name == "grouped_dot"]
    return {e.invars[1].aval.shape for e in products}


def test_layers_that_repeat_have_a_stack_each(monkeypatch):
    changes = [(("num_kv_heads", 1),), (("num_kv_heads", 2),)]
    sizes = {"vocab_size": 11, "hidden_size": 8, "mlp_size": 4, "max_positions": 8}
    heads = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 4, "num_layers": 4}
    mixture = ExpertConfig(num_experts=3, num_chosen=2, size=5)
    config = DecoderConfig(
        **sizes, **heads, experts=mixture, layer_changes=tuple(2 * changes)
    )
    module, ids = Decoder(config, scan_layers=True), jnp.arange(6)[None]
    shapes = jax.eval_shape(module.init, jax.random.key(0), ids)
    variables = jax.tree.map(lambda leaf: normal(leaf.shape, seed=1), shapes)
    wanted = jax.jit(module.apply)(variables, ids)
    monkeypatch.setattr(experts, "target_platform", lambda: "tpu")
    read_in_stacks = jax.jit(lambda *args: module.apply(*args)).trace(variables, ids)
    assert shapes_of_matrices(read_in_stacks.jaxpr) == {(2, 3, 8, 10), (2, 3, 5, 8)}
    assert_close(read_in_stacks.lower().compile()(variables, ids), wanted)


def test_a_merged_mixture_computes_what_the_adapted_one_does(models):
    ids = read("qwen3_moe")["input_ids"]
    adapted, variables = adapted_with(models)
    variables["lora"] = jax.tree.map(lambda a: 0.1 + a, variables["lora"])
    logits = jax.jit(adapted.apply)(variables, ids)
    assert np.abs(logits - read("qwen3_moe")["logits"]).max() > 1e-2
    merged = adapted.merge(variables, check=False)
    again = jax.jit(adapted.model.apply)({"params": merged}, ids)
    assert_close(again, logits)


def test_layers_that_differ_can_not_be_scanned():
    with pytest.raises(ValueError, match="scan_layers must be False where some layers"):
        load_base(GOLDEN / "qwen3_moe_mixed", scan_layers=True)


def test_experts_whose_shapes_disagree_are_listed_together(tmp_path):
    folder = shutil.copytree(GOLDEN / "qwen3_moe", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    layer = "model.layers.1.mlp.experts"
    tensors[f"{layer}.3.up_proj.weight"] = np.zeros((6, 20), np.float32)
    tensors[f"{layer}.0.down_proj.weight"] = np.zeros((7, 20), np.float32)
    del tensors[f"{layer}.4.gate_proj.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        load_base(folder)
    text = str(error.value)
    assert f"missing: {layer[6:]}.4.gate_proj.weight" in text
    assert f"{layer}.3.up_proj.weight must be [7, 20]; got [6, 20]" in text
    assert f"{layer}.0.down_proj.weight must be [20, 7]; got [7, 20]" in text


def as_whole(tensors):
    """Experts as Qwen3.5's folders have them: one tensor ``[e, out, in]`` a layer."""
    found = dict(tensors)
    for i in range(2):
        layer = f"model.layers.{i}.mlp.experts"
        gate, up, down = (
            np.stack([found.pop(f"{layer}.{e}.{part}_proj.weight") for e in range(5)])
            for part in ("gate", "up", "down")
        )
        found[f"{layer}.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        found[f"{layer}.down_proj"] = down
    return found


@pytest.mark.parametrize("scan_layers", [False, True])
def test_experts_that_a_file_has_as_one_tensor(scan_layers, models, tmp_path):
    others = shutil.ignore_patterns("peft_*", "*.npz")
    folder = shutil.copytree(GOLDEN / "qwen3_moe", tmp_path / "model", ignore=others)
    whole = as_whole(load_file(folder / "model.safetensors"))
    save_file(whole, folder / "model.safetensors")
    loaded = load_base(folder, scan_layers=scan_layers)
    wanted = flatten(models("qwen3_moe", scan_layers=scan_layers).params)
    got = flatten(loaded.params)
    assert got.keys() == wanted.keys()
    assert all(np.array_equal(got[path], wanted[path]) for path in wanted)
    save_model(tmp_path / "out", loaded.params, folder)
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert again.keys() == whole.keys()
    assert all(np.array_equal(again[key], whole[key]) for key in whole)
    del whole["model.layers.1.mlp.experts.down_proj"]
    save_file(whole, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: layers.1.mlp.experts.down_proj"):
        load_base(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 6}, "num_chosen must be at most num_experts = 5"),
        ({"num_local_experts": 0}, "num_experts must be a positive integer; got 0"),
        ({"num_local_experts": 10**6}, "must be at most 4096; got 1000000"),
        ({"mlp_only_layers": "all"}, "mlp_only_layers must be integers; got 'all'"),
    ],
)
def test_a_config_that_does_not_fit_is_an_error(changes, message):
    settings = json.loads((GOLDEN / "qwen3_moe" / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        FAMILIES["qwen3_moe"].read_config(settings | changes)
