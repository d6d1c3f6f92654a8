"""The guarantees of `adapt`, on every model of `tests.nn.external_models`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import adapt
from lora_jax.nn.trace import shapes_of
from lora_jax.tree.partition import count
from lora_jax.tree.paths import flatten
from tests.nn.external_models import MODELS, External, assert_same_tree, trained
from tests.nn.tools import key


class Ready:
    """A model with its base, adapters and outputs, shared by all its tests."""

    def __init__(self, case: External):
        self.case = case
        self.model = case.model
        self.base = case.variables()
        self.params = self.base["params"]
        self.rest = {k: v for k, v in self.base.items() if k != "params"}
        self.adapted = adapt(self.model, case.config(), *case.args, **case.kwargs)
        self.attached = self.adapted.attach(self.params, key(1))
        self.moved = trained(self.attached)
        self.apply = jax.jit(self.output)
        self.base_apply = jax.jit(
            lambda p: self.model.apply(
                {"params": p, **self.rest}, *case.args, **case.kwargs
            )
        )

    def output(self, variables):
        inputs = {**variables, **self.rest}
        return self.adapted.apply(inputs, *self.case.args, **self.case.kwargs)


@pytest.fixture(scope="module", params=MODELS, ids=lambda case: case.name)
def ready(request):
    return Ready(request.param)


def test_the_named_layers_are_found(ready):
    assert sorted(t.path for t in ready.adapted.targets()) == sorted(ready.case.paths)


def test_example_inputs_can_be_inferred_from_parameters(ready):
    told = adapt(ready.model, ready.case.config())
    if not ready.case.is_told:
        with pytest.raises(ValueError, match="needs example inputs"):
            told.targets(ready.params)
        return
    assert told.targets(ready.params) == ready.adapted.targets()
    shapes = jax.tree.map(
        lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), ready.params
    )
    assert told.targets(shapes) == ready.adapted.targets()


@pytest.mark.optimized
def test_bitwise_equal_to_the_base_at_init(ready):
    wanted = ready.base_apply(ready.params)
    np.testing.assert_array_equal(ready.apply(ready.attached), wanted)


@pytest.mark.optimized
def test_a_loop_of_two_rows_is_unchanged_at_init():
    """Else it makes one kernel of the base's, and sums in another order (XLA:CPU)."""
    (case,) = (case for case in MODELS if case.name == "broadcast_scan")
    tiny = Ready(case._replace(args=(case.args[0][:2],)))
    options = {"xla_disable_hlo_passes": "small-while-loop-hoisting"}

    def run(function, variables):
        return function.lower(variables).compile(options)(variables)

    wanted = run(tiny.base_apply, tiny.params)
    np.testing.assert_array_equal(run(tiny.apply, tiny.attached), wanted)


@pytest.mark.slow  # a second compilation of every model
@pytest.mark.optimized
def test_equal_to_the_base_at_init_in_bfloat16(ready):
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), ready.params)
    attached = ready.adapted.attach(half, key(1))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(attached["lora"]))
    got, wanted = ready.apply(attached), ready.base_apply(half)
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(got, wanted)


def test_a_trained_adapter_changes_the_output_and_merges_exactly(ready):
    got = ready.apply(ready.moved)
    base = ready.base_apply(ready.params)
    assert float(jnp.abs(got - base).max()) > 1e-2
    merged = ready.base_apply(ready.adapted.merge(ready.moved))
    scale = float(jnp.abs(got).max())
    np.testing.assert_allclose(merged, got, rtol=1e-5, atol=1e-5 * scale)


def test_unmerge_and_detach_give_the_base_back(ready):
    plain = ready.adapted.detach(ready.moved)
    for path, leaf in flatten(plain).items():
        assert leaf is flatten(ready.attached["frozen"])[path]  # no copy was made
    merged = ready.adapted.merge(ready.moved)
    assert jax.tree.structure(merged) == jax.tree.structure(plain)
    assert_same_tree(ready.adapted.unmerge(merged, ready.moved), plain)


def test_the_adapter_tree_mirrors_the_base(ready):
    frozen, lora = (flatten(ready.attached[name]) for name in ("frozen", "lora"))
    owners = {path.rpartition("/")[0] for path in lora}
    assert owners == set(ready.case.paths)
    assert owners <= {path.rpartition("/")[0] for path in frozen}
    targets = ready.adapted.targets()
    assert count(ready.attached["lora"]) == sum(t.trainable for t in targets)
    for target in targets:
        shapes = tuple(lora[f"{target.path}/{n}"].shape for n in ("lora_a", "lora_b"))
        assert shapes == target.factor_shapes


def test_init_makes_the_same_tree_as_attach(ready):
    made = jax.eval_shape(
        lambda key: ready.adapted.init(key, *ready.case.args, **ready.case.kwargs),
        jax.random.key(0),
    )
    for name in ("frozen", "lora"):
        assert shapes_of(made[name]) == shapes_of(ready.attached[name])


def test_the_first_gradient_reaches_only_b(ready):
    def loss(lora):
        return jnp.square(ready.output({**ready.attached, "lora": lora})).sum()

    grads = flatten(jax.jit(jax.grad(loss))(ready.attached["lora"]))
    for path, grad in grads.items():
        starts_at_zero = not jnp.any(flatten(ready.attached["lora"])[path])
        assert (float(jnp.abs(grad).max()) > 0) == starts_at_zero, path


def test_a_is_uniform_over_the_fan_in_and_no_two_matrices_are_alike(ready):
    lora = flatten(ready.attached["lora"])
    for target in ready.adapted.targets():
        a, b = target.batch_first(
            lora[f"{target.path}/lora_a"], lora[f"{target.path}/lora_b"]
        )
        if target.kind == "embed":  # the roles are swapped
            assert not a.any()
            a = b.T
        stacked = len(target.contraction.split(target.kernel_shape)[0])
        matrices = a.reshape(int(np.prod(a.shape[:stacked])), -1)
        fan_in = target.contraction.matrix_size(target.kernel_shape)[0]
        if target.kind == "embed":
            fan_in = target.kernel_shape[1]
        bound = 1 / np.sqrt(fan_in)
        assert float(jnp.abs(a).max()) <= bound
        if matrices.size > 200:
            assert float(a.std()) == pytest.approx(bound / 3**0.5, rel=0.15)
        assert len(np.unique(np.asarray(matrices[:, 0]))) == len(matrices)
