"""The loss of a model whose rows of tokens are trained."""

import jax
import jax.numpy as jnp
import numpy as np

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


def prepared(golden, tokens, **options):
    """A model with other rows than the table's, and the losses of it and its merge."""
    lora = LoRAConfig(rank=2, targets=["q_proj"], tokens=tokens)
    model = load_model(GOLDEN / golden, lora=lora, key=key(0), **options)
    adapted, trained = model.module, model.variables["params"]
    trained = {
        owner: {"token_rows": normal(tree["token_rows"].shape)}
        for owner, tree in trained.items()
    }
    variables = {**model.variables, "params": trained}
    # Three chunks, of which the last has no weight in the second row.
    settings = {"is_tied": model.config.is_tied, "chunk": 4}
    loss = make_lm_loss(adapted, **settings)
    plain = make_lm_loss(adapted.model, **settings)
    merged = adapted.merge(variables, check=False)

    def of_rows(trained):
        return loss({**variables, "params": trained}, BATCH, {})[0]

    def of_tables(tables):
        return plain({"params": {**merged, **tables}}, BATCH, {})[0]

    return trained, {name: merged[name] for name in trained}, of_rows, of_tables


def test_loss_and_gradients_of_packed_rows_are_those_of_the_merged_table():
    tokens = [3, 7, 12]
    rows, tables, *losses = prepared("qwen2", tokens, scan_layers=True)
    of_rows, of_tables = (jax.jit(jax.value_and_grad(loss)) for loss in losses)
    (found, rows), (wanted, tables) = of_rows(rows), of_tables(tables)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    own = tables["embed"]["embedding"][jnp.array(tokens)]
    np.testing.assert_allclose(rows["embed"]["token_rows"], own, rtol=1e-4, atol=2e-5)


def test_loss_of_an_untied_head_s_rows_is_that_of_the_merged_kernel():
    tokens = {"embed_tokens": [7], "lm_head": [12, 3]}
    rows, tables, of_rows, of_tables = prepared("llama", tokens)
    found, wanted = jax.jit(of_rows)(rows), jax.jit(of_tables)(tables)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_bfloat16_and_softcap_take_the_deltas_too():
    hidden, table, rows = normal((2, 5, 6)), normal((13, 6), 1), normal((2, 6), 2)
    written = table.at[jnp.array([12, 3])].set(rows)
    options = {"chunk": 3, "softcap": 2.0}

    @jax.jit
    def losses(hidden, table):
        more = {"deltas": row_deltas(rows, table, (12, 3)), "tokens": (12, 3)}
        found = causal_lm(hidden, table.T, LABELS, **more, **options)[0]
        half = [x.astype("bfloat16") for x in (hidden, table.T)]
        wanted = causal_lm(hidden, written.T, LABELS, **options)[0]
        return found, wanted, causal_lm(*half, LABELS, **more, **options)[0]

    found, wanted, half = losses(hidden, table)
    assert_close(found, wanted)
    np.testing.assert_allclose(half, found, rtol=2e-2)


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
