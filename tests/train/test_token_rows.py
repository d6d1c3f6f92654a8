"""The loss of a model whose rows of tokens are trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import LoRAConfig, load_model
from lora_jax.ops.token_rows import lookup_rows, row_deltas
from lora_jax.train.causal_lm import causal_lm, make_lm_loss
from tests.models.golden import GOLDEN
from tests.nn.tools import key, normal
from tests.reference import assert_close

LABELS = jnp.array([[3, 7, 1, 12, 5], [2, 7, 0, 3, 9]])
BATCH = {
    "input_ids": jnp.array([[7, 3, 7, 1, 12], [4, 2, 7, 3, 3]]),
    "labels": LABELS,
    "weights": jnp.array([[1, 1, 0, 1, 0.5], [0, 0, 1, 0, 1]]),
    "positions": jnp.array([[0, 1, 2, 0, 1], [0, 1, 2, 3, 4]]),
    "segment_ids": jnp.array([[1, 1, 1, 2, 2], [1, 1, 1, 1, 1]]),
}


@pytest.mark.parametrize(
    ("golden", "tokens", "scan_layers"),
    [
        ("qwen2", [3, 7, 12], True),
        ("llama", {"embed_tokens": [7], "lm_head": [12, 3]}, False),
    ],
    ids=["tied", "untied"],
)
def test_loss_and_gradients_of_packed_rows_are_those_of_the_merged_table(
    golden, tokens, scan_layers
):
    lora = LoRAConfig(rank=2, targets=["q_proj"], tokens=tokens)
    options = {"lora": lora, "key": key(0), "scan_layers": scan_layers}
    model = load_model(GOLDEN / golden, **options)
    adapted, trained = model.module, model.variables["params"]
    trained = {
        owner: {"token_rows": normal(tree["token_rows"].shape)}
        for owner, tree in trained.items()
    }
    variables = {**model.variables, "params": trained}
    is_tied = model.config.is_tied
    # Three chunks, of which the last has no weight in the second row.
    loss = make_lm_loss(adapted, is_tied=is_tied, chunk=4)
    plain = make_lm_loss(adapted.model, is_tied=is_tied, chunk=4)
    merged = adapted.merge(variables, check=False)

    @jax.jit
    @jax.value_and_grad
    def of_rows(trained):
        return loss({**variables, "params": trained}, BATCH, {})[0]

    @jax.jit
    @jax.value_and_grad
    def of_all(params):
        return plain({"params": params}, BATCH, {})[0]

    (found, rows), (wanted, tables) = of_rows(trained), of_all(merged)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    for owner, tree in rows.items():
        ids = jnp.array(adapted.config.tokens_for(owner))
        [table] = tables[owner].values()
        own = table[ids] if owner == "embed" else table[:, ids].T
        np.testing.assert_allclose(tree["token_rows"], own, rtol=1e-4, atol=2e-5)


def test_bfloat16_and_softcap_take_the_deltas_too():
    hidden, table, rows = normal((2, 5, 6)), normal((13, 6), 1), normal((2, 6), 2)
    written = table.at[jnp.array([12, 3])].set(rows)
    options = {"chunk": 3, "softcap": 2.0}
    deltas = row_deltas(rows, table, [12, 3])
    found = causal_lm(hidden, table.T, LABELS, deltas=deltas, tokens=[12, 3], **options)
    assert_close(found[0], causal_lm(hidden, written.T, LABELS, **options)[0])
    half = causal_lm(
        *(hidden.astype("bfloat16"), table.T.astype("bfloat16"), LABELS),
        **{"deltas": deltas, "tokens": (12, 3), **options},
    )
    np.testing.assert_allclose(half[0], found[0], rtol=2e-2)


def test_no_gradient_or_copy_of_the_table_is_made():
    table = jax.ShapeDtypeStruct((20011, 24), jnp.float32)
    rows = jax.ShapeDtypeStruct((3, 24), jnp.float32)
    ids = jnp.arange(8).reshape(1, 8)

    def step(rows, table):
        def loss(rows):
            x, taught = table[ids], {}
            if rows is not None:
                x = lookup_rows(x, ids, rows, (1, 2, 9))
                deltas = row_deltas(rows, table, (1, 2, 9))
                taught = {"deltas": deltas, "tokens": (1, 2, 9)}
            return causal_lm(x, table.T, ids, chunk=2, **taught)[0]

        return jax.grad(loss)(rows) if rows is not None else loss(rows)

    def temporaries(rows):
        compiled = jax.jit(step).lower(rows, table).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 2 * 4 * table.shape[0]
    assert temporaries(rows) - temporaries(None) < 4 * logits < 4 * 24 * table.shape[0]
