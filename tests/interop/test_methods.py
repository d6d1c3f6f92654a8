"""Methods against PEFT: the same start, the same output, the same file."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from lora_jax import (
    LoRAConfig,
    eva_init,
    export_adapter,
    load_model,
    lora_ga_init,
)
from lora_jax.ops.merge import delta_kernel
from lora_jax.tree.paths import flatten, unflatten
from tests.interop.peft_cases import logits_of, reference
from tests.models.golden import GOLDEN
from tests.reference import assert_close

METHODS = GOLDEN / "methods"
FILE = "adapter_model.safetensors"
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
        shape = flatten(model.variables["lora"])[path].shape
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
