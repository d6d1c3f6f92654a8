"""Methods against PEFT: the same start, the same output, the same file."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax import (
    LoRAConfig,
    eva_init,
    export_adapter,
    load_model,
    lora_fa_projection,
    lora_ga_init,
)
from lora_jax.interop.peft import read_peft
from lora_jax.interop.portable import rewrite_peft
from lora_jax.ops.merge import delta_kernel
from lora_jax.tree.partition import adapter_of
from lora_jax.tree.paths import flatten, unflatten
from tests.interop.peft_cases import logits_of, reference
from tests.models.golden import GOLDEN
from tests.reference import assert_close

METHODS = GOLDEN / "methods"
FILE, CONFIG = "adapter_model.safetensors", "adapter_config.json"
OURS = {"self_attn.q_proj": "attention/query", "mlp.down_proj": "mlp/down"}
FIELDS = {"pissa": {}, "olora": {"rslora": True}, "lora_ga": {}, "eva": {}}
by_method = pytest.mark.parametrize("method", ["pissa", "olora", "lora_ga"])


def golden(method: str) -> dict[str, np.ndarray]:
    with np.load(METHODS / f"{method}.npz") as arrays:
        return dict(arrays)


def fresh(method: str):
    targets = [path.rpartition("/")[2] for path in OURS.values()]
    config = LoRAConfig(rank=2, alpha=3, targets=targets, init=method, **FIELDS[method])
    return load_model(GOLDEN / "llama", lora=config, key=jax.random.key(0))


def in_our_names(arrays, prefix: str, model) -> dict[str, np.ndarray]:
    """PEFT's factors by the paths of our leaves, in their shapes."""
    found = {}
    for name, value in arrays.items():
        if not name.startswith(f"{prefix}/"):
            continue
        _, _, layer, *module, letter, _, _ = name.split("/", 1)[1].split(".")
        path = f"layer_{layer}/{OURS['.'.join(module)]}/{letter.lower()}"
        shape = flatten(adapter_of(model.variables))[path].shape
        found[path] = value.T.reshape(shape)
    return found


def test_lora_ga_takes_the_directions_that_peft_does():
    model, arrays = fresh("lora_ga"), golden("lora_ga")
    tokens = jnp.asarray(reference("llama")["input_ids"])

    def loss(variables, batch, rngs):
        logits = jax.nn.log_softmax(model.module.apply(variables, batch, rngs=rngs))
        picked = jnp.take_along_axis(logits[:, :-1], batch[:, 1:, None], axis=-1)
        return -jnp.sum(picked), jnp.ones(()), {}

    found = lora_ga_init(model.module, model.variables, loss, [tokens])
    theirs, ours = in_our_names(arrays, "start", model), flatten(found["lora"])
    assert theirs.keys() == ours.keys()
    for path, leaf in ours.items():  # A [i, r] and B [r, o], B's outputs in heads
        pair = [np.asarray(x, np.float64) for x in (leaf, theirs[path])]
        rows = [x.T if path.endswith("a") else x.reshape(2, -1) for x in pair]
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in rows]
        np.testing.assert_allclose(abs(np.sum(unit[0] * unit[1], axis=1)), 1, atol=1e-5)


def test_eva_finds_the_components_and_the_ranks_that_peft_does():
    model, arrays = fresh("eva"), golden("eva")
    tokens = jnp.asarray(reference("llama")["input_ids"])

    def loss(variables, batch, rngs):
        logits = model.module.apply(variables, batch, rngs=rngs)
        return jnp.sum(logits), jnp.ones(()), {}

    made, found = eva_init(model.module, model.variables, loss, [tokens])
    ranks = {target.path: target.rank for target in made.targets(model.params)}
    ours = flatten(found["lora"])
    for name, theirs in arrays.items():
        if ".lora_A." not in name:
            continue
        _, _, layer, *module, _, _, _ = name.split("/", 1)[1].split(".")
        path = f"layer_{layer}/{OURS['.'.join(module)]}"
        a = np.asarray(ours[f"{path}/lora_a"], np.float64)
        assert ranks.pop(path) == len(theirs) == a.shape[-1]
        # PEFT's are of an incremental, randomized SVD.
        np.testing.assert_allclose(abs(np.sum(a.T * theirs, axis=1)), 1, atol=1e-4)
    assert not ranks


def test_lora_fa_takes_the_steps_of_b_that_peft_s_optimizer_does():
    targets = [path.rpartition("/")[2] for path in OURS.values()]
    config = LoRAConfig(rank=2, alpha=3, targets=targets, lora_fa=True)
    model = load_model(GOLDEN / "llama", lora=config, key=jax.random.key(0))
    arrays = golden("lora_fa")
    parts = {
        name: {
            path: leaf
            for path, leaf in in_our_names(arrays, name, model).items()
            if path.endswith("lora_b") or name == "start"
        }
        for name in ("start", "gradient0", "step0", "gradient1", "step1")
    }
    fixed = {p: v for p, v in parts["start"].items() if p.endswith("lora_a")}
    variables = {"fixed": unflatten(fixed)}
    rows = model.module.targets(model.params)
    tx = lora_fa_projection(variables, rows)
    b, first, second = (dict.fromkeys(parts["gradient0"], 0.0) for _ in range(3))
    for step in (1, 2):
        gradients = {"lora": unflatten(parts[f"gradient{step - 1}"])}
        found = flatten(tx.update(gradients, tx.init(gradients))[0]["lora"])
        for path, g in found.items():  # PEFT's Adam adds its epsilon before correcting
            first[path] = 0.9 * first[path] + 0.1 * g
            second[path] = 0.999 * second[path] + 0.001 * g**2
            rate = 0.1 * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
            b[path] -= rate * first[path] / (second[path] ** 0.5 + 1e-6)
            assert_close(b[path], parts[f"step{step - 1}"][path])


def vera_of_peft():
    """A model of ours with PEFT's frozen A and B, and its trained vectors."""
    targets = [path.rpartition("/")[2] for path in OURS.values()]
    config = LoRAConfig(rank=5, alpha=5, targets=targets, vera=True, vera_seed=3)
    model = load_model(GOLDEN / "llama", lora=config, key=jax.random.key(0))
    theirs = load_file(METHODS / "vera" / FILE)
    lora, fixed = (flatten(model.variables[name]) for name in ("lora", "fixed"))
    for name, value in theirs.items():
        if ".vera_lambda_" not in name:
            continue
        _, _, _, _, layer, *module, letter = name.split(".")
        path = f"layer_{layer}/{OURS['.'.join(module)]}"
        leaf = f"{path}/vera_{letter[-1]}"
        lora[leaf] = value.reshape(lora[leaf].shape)
        a, b = (fixed[f"{path}/lora_{c}"].shape for c in "ab")
        wide, high = theirs["base_model.vera_A"].T, theirs["base_model.vera_B"]
        fixed[f"{path}/lora_a"] = wide[: np.prod(a[:-1])].reshape(a)
        fixed[f"{path}/lora_b"] = high[: np.prod(b[1:])].T.reshape(b)
    return model._replace(
        variables={
            **model.variables,
            "lora": unflatten(lora),
            "fixed": unflatten(fixed),
        }
    )


def test_vera_computes_reads_and_writes_what_peft_does(tmp_path):
    model, arrays = vera_of_peft(), golden("vera")
    variables, config = model.variables, model.module.config
    assert_close(logits_of(model.module, variables, "llama"), arrays["logits"])
    folder = export_adapter(tmp_path, variables, config, model, format="vera")
    written, wanted = load_file(folder / FILE), load_file(METHODS / "vera" / FILE)
    assert written.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    settings = [
        json.loads((f / CONFIG).read_text()) for f in (folder, METHODS / "vera")
    ]
    for key in ("peft_type", "r", "projection_prng_key", "bias", "save_projection"):
        assert settings[0][key] == settings[1][key]
    assert len({frozenset(own["target_modules"]) for own in settings}) == 1
    for scanned in (False, True):
        again = load_model(GOLDEN / "llama", adapter=folder, scan_layers=scanned)
        got = logits_of(again.module, again.variables, "llama")
        assert_close(got, arrays["logits"])
    assert again.module.config.rank == 5


def test_our_own_vera_is_exported_with_one_a_and_b(tmp_path):
    targets = [path.rpartition("/")[2] for path in OURS.values()]
    config = LoRAConfig(rank=3, alpha=2, targets=targets, vera=True)
    model = load_model(
        GOLDEN / "llama", lora=config, key=jax.random.key(0), scan_layers=True
    )
    lora = jax.tree.map(lambda leaf: leaf + 0.3, model.variables["lora"])
    variables = {**model.variables, "lora": lora}
    folder = export_adapter(tmp_path / "vera", variables, config, model, format="vera")
    assert len(load_file(folder / FILE)) == 2 + 2 * 4
    again = load_model(GOLDEN / "llama", adapter=folder)
    wanted = logits_of(model.module, variables, "llama")
    assert_close(logits_of(again.module, again.variables, "llama"), wanted)
    with pytest.raises(ValueError, match="an adapter without vera=True; got 'vera'"):
        export_adapter(
            tmp_path, variables, LoRAConfig(targets=targets), model, format="vera"
        )
    with pytest.raises(ValueError, match="VeRA's, whose file doesn't say how many"):
        rewrite_peft(tmp_path / "again", read_peft(folder), portable=True)
    config = dataclasses.replace(config, rank_pattern={"down": 2})
    uneven = load_model(GOLDEN / "llama", lora=config, key=jax.random.key(0))
    with pytest.raises(ValueError, match="can't hold this: its layers have several"):
        export_adapter(tmp_path, uneven.variables, config, uneven, format="vera")


def test_a_vera_file_with_faults_is_refused(tmp_path):
    theirs = load_file(METHODS / "vera" / FILE)
    for number, (change, why) in enumerate(
        (
            ({"base_model.vera_A": None}, "must hold base_model.vera_A.*save_proj"),
            ({"base_model.vera_B": np.ones((24, 4))}, r"\[28\]|\[5, 28\], \[24, 4\]"),
            (
                {"base_model.model.model.layers.0.mlp.down_proj.vera_lambda_d": None},
                r"lambda_d, lambda_b of .*0.mlp.down_proj must be \[5\] .*got None",
            ),
        )
    ):
        folder = shutil.copytree(METHODS / "vera", tmp_path / str(number))
        tensors = {k: v for k, v in (theirs | change).items() if v is not None}
        save_file(tensors, folder / FILE)
        with pytest.raises(ValueError, match=why):
            read_peft(folder)


@pytest.mark.parametrize("method", ["pissa", "olora"])
def test_the_start_is_peft_s(method):
    model, arrays = fresh(method), golden(method)
    theirs = in_our_names(arrays, "start", model)
    ours, fixed = (flatten(model.variables[name]) for name in ("lora", "fixed"))
    assert theirs.keys() == ours.keys()
    for target in model.module.targets(model.params):
        products = []
        for leaves in (theirs, ours):  # singular vectors have no sign of their own
            a, b = (jnp.asarray(leaves[f"{target.path}/lora_{c}"]) for c in "ab")
            options = {"scaling": 1.0, "contraction": target.contraction}
            products.append(delta_kernel(a, b, target.kernel_shape, **options))
        np.testing.assert_allclose(*products, rtol=1e-4, atol=1e-5)
    for path, leaf in fixed.items():
        np.testing.assert_array_equal(leaf, ours[path.replace("start_", "lora_")])


@by_method
def test_trained_factors_compute_and_export_what_peft_does(method, tmp_path):
    model, arrays = fresh(method), golden(method)
    lora = unflatten(in_our_names(arrays, "changed", model))
    start = in_our_names(arrays, "start", model)
    fixed = {path.replace("lora_", "start_"): leaf for path, leaf in start.items()}
    variables = {**model.variables, "lora": lora, "fixed": unflatten(fixed)}
    model = model._replace(variables=variables)
    assert_close(logits_of(model.module, model.variables, "llama"), arrays["logits"])
    folder = export_adapter(tmp_path, variables, model.module.config, model)
    # [A A0] [B; -B0], as PEFT converts it.
    written, wanted = load_file(folder / FILE), load_file(METHODS / method / FILE)
    assert written.keys() == wanted.keys()
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    for path in (METHODS / method, folder):
        again = load_model(GOLDEN / "llama", adapter=path)
        assert_close(
            logits_of(again.module, again.variables, "llama"), arrays["logits"]
        )
        assert again.module.config.rank == 4
