import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.ops import Contraction, init_adapter, path_key


@pytest.mark.parametrize(
    ("kernel", "contraction", "fan_in"),
    [
        pytest.param((400, 50), Contraction(), 400, id="dense"),
        pytest.param((12, 300, 40), Contraction((0,), (1,), (2,)), 300, id="scanned"),
        pytest.param((8, 300, 40), Contraction((0,), (1,), (2,)), 300, id="experts"),
        pytest.param((8, 40, 100), Contraction((), (0, 1), (2,)), 320, id="heads"),
        pytest.param(
            (6, 4, 8, 40, 100), Contraction((0, 1), (2, 3), (4,)), 320, id="all-three"
        ),
    ],
)
def test_variance_depends_only_on_the_inputs(kernel, contraction, fan_in, key):
    a, _ = init_adapter(key, kernel, 8, contraction=contraction)
    assert float(a.std()) * fan_in**0.5 == pytest.approx(3**-0.5, rel=0.03)
    elements = np.asarray(a).reshape(-1, fan_in, 8)
    spread = elements.std(axis=(1, 2)) * fan_in**0.5  # of each layer or expert
    np.testing.assert_allclose(spread, 3**-0.5, rtol=0.1)
    assert len({element.tobytes() for element in elements}) == len(elements)


def test_gaussian_has_standard_deviation_one_over_rank(key):
    a, b = init_adapter(key, (400, 50), 8, init="gaussian")
    assert float(a.std()) == pytest.approx(1 / 8, rel=0.05)
    assert not b.any()


def test_an_embedding_has_the_roles_swapped(key):
    a, b = init_adapter(key, (50, 400), 8, one_hot=True)
    assert not a.any()
    assert float(b.std()) * 400**0.5 == pytest.approx(3**-0.5, rel=0.05)
    a, b = init_adapter(key, (50, 400), 8, init="gaussian", one_hot=True)
    assert not a.any()
    assert float(b.std()) == pytest.approx(1 / 8, rel=0.05)


def test_both_factors_have_the_requested_dtype(key):
    a, b = init_adapter(key, (10, 8), 3, dtype=jnp.bfloat16)
    assert a.dtype == b.dtype == jnp.bfloat16


def test_every_path_has_its_own_stable_key(key):
    paths = [f"layer_{i}/{name}" for i in range(99) for name in ("query", "value")]
    keys = {jax.random.key_data(path_key(key, path)).tobytes() for path in paths}
    assert len(keys) == len(paths)
    again = path_key(key, paths[0])
    assert (again == path_key(key, "layer_0/query")).all()
    assert not (again == path_key(jax.random.key(8), paths[0])).all()


def test_the_key_of_a_path_is_the_same_in_every_process():
    key = path_key(jax.random.key(0), "encoder/layer_0/attention/query")
    assert jax.random.key_data(key).tolist() == [629896662, 2381131757]


def test_old_style_keys_work():
    old, new = jax.random.PRNGKey(7), jax.random.key(7)
    a, _ = init_adapter(path_key(old, "q"), (10, 8), 3)
    b, _ = init_adapter(path_key(new, "q"), (10, 8), 3)
    assert np.array_equal(a, b)


def test_a_rank_above_the_smaller_side_warns(key):
    with pytest.warns(
        UserWarning,
        match=r"rank 9 exceeds the smaller side of a kernel of shape \(10, 8\) "
        r"\(10 inputs, 8 outputs\)",
    ):
        init_adapter(key, (10, 8), 9)
    init_adapter(key, (10, 8), 8)


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments(key):
    with pytest.raises(ValueError, match="rank must be at least 1; got 0"):
        init_adapter(key, (10, 8), 0)
    with pytest.raises(ValueError, match="'uniform' or 'gaussian'; got 'zeros'"):
        init_adapter(key, (10, 8), 3, init="zeros")
    with pytest.raises(ValueError, match=r"kernel must have 2 axes.*got shape \(3, 10"):
        init_adapter(key, (3, 10, 8), 3)
