import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax import AdapterBank, LoRAConfig, adapt, generate, load_model
from lora_jax.names import LORA
from lora_jax.nn.rows import SLOTS
from tests.interop.peft_cases import adapter_of, inputs
from tests.models.golden import GOLDEN
from tests.nn.external_models import trained


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="down")(nn.relu(nn.Dense(7, name="up")(x)))


X = jax.random.normal(jax.random.key(3), (4, 5, 6))
PARAMS = Net().init(jax.random.key(0), X)["params"]


def member(seed, **fields):
    adapted = adapt(Net(), LoRAConfig(**{"rank": 2, "alpha": 3, **fields}), X)
    variables = trained(adapted.attach(PARAMS, jax.random.key(seed)))
    return adapted, variables, (variables[LORA], adapted.targets(PARAMS))


def heads(seed, **fields):
    """A member with a head of its own, trained in full."""
    config = LoRAConfig(**{"rank": 2, "alpha": 3, "targets": ["up"], **fields})
    adapted = adapt(Net(), dataclasses.replace(config, train=("down",)), X)
    variables = trained(adapted.attach(PARAMS, jax.random.key(seed)))
    own = jax.tree.map(lambda leaf: seed * (leaf + 0.1), variables["params"])
    variables = {**variables, "params": own}
    member = variables[LORA], adapted.targets(PARAMS), own
    return adapted, variables, member


def of(*members, **options):
    named = {f"m{i}": row for i, (*_, row) in enumerate(members)}
    return AdapterBank(Net(), PARAMS, named, X, **options)


def test_each_row_is_its_adapter_alone():
    several = (
        member(1),
        member(2, rank=3, alpha=7, rslora=True, targets=["up"]),
        member(3, rank=1, alpha=2, rank_pattern={"up": 2}),
    )
    bank = of(*several)
    names = ["m2", None, "m0", "m1"]
    got = bank.module.apply(bank.variables(names), X)
    for row, name in enumerate(names):
        if name is None:
            wanted = Net().apply({"params": PARAMS}, X[row])
        else:
            adapted, variables, _ = several[int(name[1])]
            wanted = adapted.apply(variables, X[row])
        np.testing.assert_allclose(got[row], wanted, rtol=1e-5, atol=1e-6)
    assert np.abs(got[0] - Net().apply({"params": PARAMS}, X[0])).max() > 0.01


def test_dora_rows_too_and_none_is_the_base():
    """Also beside LoRA, and where they adapt other layers."""
    several = (
        member(1, dora=True, targets=["down"]),
        member(2, dora=True, alpha=5, targets=["up"]),
        member(3, rank=1),
    )
    bank = of(*several)
    got = bank.module.apply(bank.variables(["m1", "m0", None, "m2"]), X)
    for row, index in ((0, 1), (1, 0), (3, 2)):
        adapted, variables, _ = several[index]
        wanted = adapted.apply(variables, X[row])
        np.testing.assert_allclose(got[row], wanted, rtol=1e-5, atol=1e-6)
    base = Net().apply({"params": PARAMS}, X[2])
    np.testing.assert_allclose(got[2], base, rtol=1e-5, atol=1e-6)


def test_the_base_is_multiplied_once_for_all_rows():
    bank = of(member(1), member(2))

    def run(variables, x):
        return bank.module.apply(variables, x)

    variables = bank.variables(["m0", "m1", None, "m0"])
    text = jax.jit(run).lower(variables, X).as_text()
    dots = [line for line in text.splitlines() if "stablehlo.dot_general" in line]
    of_base = [line for line in dots if "tensor<6x7xf32>" in line]
    assert len(of_base) == 1
    assert "batching_dims" not in of_base[0]


def test_replacing_adding_and_removing_compile_nothing():
    bank, traces = of(member(1), member(2), capacity=3), []

    @jax.jit
    def run(variables):
        traces.append(1)
        return bank.module.apply(variables, X)

    first = run(bank.variables(["m0", "m1", None, "m0"]))
    adapted, variables, row = member(9, rank=1, alpha=5)
    bank.add("m0", *row)
    bank.add("new", *member(8)[2])
    changed = run(bank.variables(["m0", "m1", None, "new"]))
    np.testing.assert_allclose(
        changed[0], adapted.apply(variables, X[0]), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(changed[1:3], first[1:3])
    bank.remove("m1")
    assert bank.names == ["m0", "new"]
    bank.add("last", *member(2)[2])
    again = run(bank.variables([None, "last", None, "new"]))
    np.testing.assert_array_equal(again[1], first[1])
    assert len(traces) == 1


@pytest.mark.parametrize("way", ["sort", "mask"])
def test_every_way_gives_what_gathering_does(way):
    several = member(1), member(2, rank=3, targets=["up"]), member(3, rank=1)
    bank = of(*several, capacity={2: 3, 3: 2})
    names = ["m2", None, "m0", "m1"]
    wanted = bank.module.apply(bank.variables(names), X)
    bank.way = way
    found = bank.module.apply(bank.variables(names), X)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    alone, variables, _ = several[1]
    np.testing.assert_allclose(
        found[3], alone.apply(variables, X[3]), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        found[1], Net().apply({"params": PARAMS}, X[1]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("way", ["auto", "gather", "sort", "mask"])
def test_each_row_has_the_head_of_its_adapter(way):
    several = heads(1), heads(2, rank=3), member(3, targets=["up"])
    bank, traces = of(*several, capacity={2: 3, 3: 2}), []
    bank.way = way
    several = {f"m{number}": one[:2] for number, one in enumerate(several)}
    several[None] = Net(), {"params": PARAMS}

    @jax.jit
    def run(variables):
        traces.append(1)
        return bank.module.apply(variables, X)

    def check(names):
        got = run(bank.variables(names))
        for row, name in enumerate(names):
            module, variables = several[name]
            wanted = module.apply(variables, X[row])
            np.testing.assert_allclose(got[row], wanted, rtol=1e-5, atol=1e-6)

    check(["m1", None, "m2", "m0"])
    one = bank.module.adapted.apply(bank.adapter("m1"), X[0])
    np.testing.assert_allclose(
        one, several["m1"][0].apply(several["m1"][1], X[0]), rtol=1e-5, atol=1e-6
    )
    for name, one in (("m0", heads(4)), ("m3", member(5, targets=["up"]))):
        bank.add(name, *one[2])
        several[name] = one[:2]
    bank.remove("m2")
    check(["m1", "m3", None, "m0"])
    assert len(traces) == 1


def test_rows_of_one_token_that_outnumber_the_adapters_take_the_mask():
    several, x = [member(1), member(2)], X.reshape(20, 6)
    bank = of(*several)
    names = ["m0", None, "m1", "m0"] * 5
    variables = bank.variables(names)
    assert SLOTS in variables
    assert SLOTS not in bank.variables(names[:4])
    got = jax.jit(bank.module.apply)(variables, x)
    for number, (adapted, own, _) in enumerate(several):
        rows = [row for row, name in enumerate(names) if name == f"m{number}"]
        wanted = jax.jit(adapted.apply)(own, x)
        np.testing.assert_allclose(
            got[np.array(rows)], wanted[np.array(rows)], rtol=1e-5, atol=1e-6
        )


class Heads(nn.Module):
    @nn.compact
    def __call__(self, x):
        heads = nn.DenseGeneral((2, 3), name="split")(x)
        mixed = nn.DenseGeneral(4, axis=(-2, -1), name="join")(jnp.tanh(heads))
        return nn.DenseGeneral(5, axis=1, name="tokens")(mixed)


def test_layers_of_heads_are_known_to_every_way_and_others_refused():
    params = Heads().init(jax.random.key(0), X)["params"]
    adapted = adapt(Heads(), LoRAConfig(2, 3, targets=["split", "join"]), X)
    rows = [
        (trained(adapted.attach(params, jax.random.key(seed)))[LORA],)
        for seed in (1, 2)
    ]
    members = {f"m{i}": (*row, adapted.targets(params)) for i, row in enumerate(rows)}
    bank = AdapterBank(Heads(), params, members, X)
    names = ["m1", None, "m0", "m1"]
    found = []
    for way in ("gather", "sort", "mask"):
        bank.way = way
        found.append(jax.jit(bank.module.apply)(bank.variables(names), X))
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-5, atol=1e-6)
    bank.way = "gather"
    adapted = adapt(Heads(), LoRAConfig(1, 3, targets=["tokens"]), X)
    variables = adapted.attach(params, jax.random.key(1))
    members = {"m": (variables[LORA], adapted.targets(params))}
    bank = AdapterBank(Heads(), params, members, X)
    wanted = jax.jit(adapted.apply)(variables, X)
    for way in ("auto", "mask"):
        bank.way = way
        shared = {**bank.variables(["m"] * 4), LORA: bank._lora}
        shared[SLOTS] = list(bank.slots(["m"] * 4))
        if way == "auto":  # which gathers where it must
            got = jax.jit(bank.module.apply)(shared, X)
            np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="'tokens' is not a layer that the way 'mask'"):
        bank.module.apply(shared, X)


@pytest.mark.parametrize("way", ["gather", "sort", "mask"])
def test_each_token_may_have_its_own_adapter(way):
    several = member(1), member(2, rank=3)
    bank = of(*several)
    bank.way = way
    names = [["m0", None, "m1", "m1", "m0"], ["m1"] * 5, [None] * 5, ["m0"] * 5]
    got = bank.module.apply(bank.variables(names), X)
    every = {None: Net().apply({"params": PARAMS}, X)}
    for number, (adapted, variables, _) in enumerate(several):
        every[f"m{number}"] = adapted.apply(variables, X)
    for row, own in enumerate(names):
        for token, name in enumerate(own):
            wanted = every[name][row, token]
            np.testing.assert_allclose(got[row, token], wanted, rtol=1e-5, atol=1e-6)


def test_the_fastest_way_is_measured_and_kept():
    bank = of(member(1), member(2))
    seconds = bank.choose(["m0", "m1", None, "m0"], X)
    assert [*seconds] == ["gather", "sort", "mask"]
    assert bank.way == bank.module.way == min(seconds, key=lambda way: seconds[way])
    assert [*of(member(1, dora=True)).choose(["m0"] * 4, X)] == ["gather"]


def test_an_adapter_goes_to_the_smallest_rank_class_and_compiles_nothing():
    bank, traces = of(member(1, rank=1), capacity={1: 2, 3: 1}), []
    for way in ("gather", "mask"):
        bank.way = way

        @jax.jit
        def run(variables):
            traces.append(1)
            return bank.module.apply(variables, X[:2])

        run(bank.variables(["m0", None]))
        bank.add("wide", *member(2, rank=3)[2])
        bank.add("m0", *member(3, rank=1)[2])
        adapted, variables, _ = member(2, rank=3)
        got = run(bank.variables(["m0", "wide"]))
        wanted = adapted.apply(variables, X[1])
        np.testing.assert_allclose(got[1], wanted, rtol=1e-5, atol=1e-6)
        with pytest.raises(
            ValueError, match=r"capacity = \{3: 1\}, and it holds wide\."
        ):
            bank.add("wider", *member(4, rank=2)[2])
        bank.add("wide", *member(4, rank=1)[2])  # and leaves its room to another
        bank.add("wider", *member(4, rank=2)[2])
        run(bank.variables(["wide", "wider"]))
        bank.remove("wide")
        bank.remove("wider")
    assert len(traces) == 2  # one for each way
    assert bank.names == ["m0"]


def test_gradients_of_a_mixed_batch_are_those_of_each_alone():
    several = member(1), member(2)
    bank = of(*several)
    names = ["m1", "m0", "m1", "m0"]

    def mixed(lora):
        rows = jax.tree.map(lambda leaf: leaf[bank.slots(names)[0]], lora)
        variables = {"frozen": PARAMS, "lora": rows}
        return jnp.sum(jnp.sin(bank.module.apply(variables, X)))

    got = jax.grad(mixed)(bank._lora[0])
    for index, rows in ((1, [0, 2]), (0, [1, 3])):
        adapted, variables, _ = several[index]

        def alone(lora, adapted=adapted, rows=rows):
            y = adapted.apply({"frozen": PARAMS, "lora": lora}, X[jnp.array(rows)])
            return jnp.sum(jnp.sin(y))

        slot = int(bank.slots([f"m{index}"])[0][0])
        wanted = jax.grad(alone)(variables[LORA])
        for layer, scaling in (("up", 1.5), ("down", 1.5)):
            np.testing.assert_allclose(  # the scaling is in the bank's B
                got[layer]["lora_b"][slot] * scaling,
                wanted[layer]["lora_b"],
                rtol=1e-4,
                atol=1e-6,
            )
            np.testing.assert_allclose(
                got[layer]["lora_a"][slot],
                wanted[layer]["lora_a"],
                rtol=1e-4,
                atol=1e-6,
            )


def test_a_mixed_batch_of_a_decoder_generates_what_each_adapter_does():
    model = str(GOLDEN / "llama")
    names = ["plain", "rslora"]
    loaded = {n: load_model(model, adapter_of("llama", n)) for n in names}
    base = load_model(model)
    members = {
        n: (one.variables[LORA], one.module.targets(one.params))
        for n, one in loaded.items()
    }
    bank = AdapterBank(base.module, base.params, members, *base.inputs)
    rows = ["rslora", "plain", None]
    prompts = [row[:5].tolist() for row in inputs("llama")[0]]
    got = generate(bank.module, bank.variables(rows), prompts, max_new_tokens=6)
    for name, prompt, text in zip(rows, prompts, got, strict=True):
        one = loaded.get(name, base)
        alone = generate(one.module, one.variables, [prompt], max_new_tokens=6)
        assert text == alone[0]


def test_experts_have_their_rows_adapter_too():
    base = load_model(str(GOLDEN / "qwen3_moe_mixed"))
    config = LoRAConfig(rank=2, alpha=5, targets=["query", "gate_up", "down"])
    adapted = adapt(base.module, config, *base.inputs)
    one = trained(adapted.attach(base.params, jax.random.key(0)))
    lora, rows = one[LORA], adapted.targets(base.params)
    assert {row.kind for row in rows} == {"dense", "experts"}
    alone = {"a": lora, "b": jax.tree.map(lambda x: -1.5 * x, lora)}
    members = {name: (tree, rows) for name, tree in alone.items()}
    bank = AdapterBank(base.module, base.params, members, *base.inputs)
    alone[None] = jax.tree.map(jnp.zeros_like, lora)
    ids, names = np.int32([[3, 4, 5], [5, 6, 7], [3, 4, 5]]), ["a", "b", None]
    got = jax.jit(bank.module.apply)(bank.variables(names), ids)
    apply = jax.jit(adapted.apply)
    for row, name in enumerate(names):
        wanted = apply({**one, LORA: alone[name]}, ids[row : row + 1])[0]
        np.testing.assert_allclose(got[row], wanted, rtol=1e-5, atol=1e-5)
    assert np.abs(got[0] - got[2]).max() > 0.01
    with pytest.raises(ValueError, match=r"not dense; got 'sort' for .*gate_up"):
        bank.way = "sort"


def test_weights_in_full_that_do_not_fit_are_told():
    lora, rows, full = heads(1)[2]
    wide = {"down": {"kernel": jnp.ones((7, 4)), "bias": jnp.ones(3)}}
    named = {"a": (lora, rows, full), "b": (lora, rows, wide)}
    said = r"down/kernel is \[7, 3\] of the base and a, \[7, 4\] of b. Make a bank for"
    with pytest.raises(ValueError, match=said):
        AdapterBank(Net(), PARAMS, named, X)
    absent = ["down/kernel", "down/bias"]
    bank = AdapterBank(Net(), PARAMS, {"a": named["a"]}, X, capacity=2, absent=absent)
    with pytest.raises(
        ValueError, match=r"'b' trains down/kernel \[7, 4\], not \[7, 3"
    ):
        bank.add("b", *named["b"])
    with pytest.raises(ValueError, match="'c' must have down/bias, down/kernel, which"):
        bank.add("c", lora, rows)
    with pytest.raises(ValueError, match="'d' trains up/bias, which no adapter"):
        bank.add("d", lora, rows, {"up": {"bias": jnp.ones(7)}})
    with pytest.raises(
        ValueError, match="without DoRA or weights trained in full; got"
    ):
        bank.variables([["a"] * 5] * 4)
    assert bank.names == ["a"]
    got = bank.module.apply(bank.variables(["a", None]), X[:2])
    assert np.isnan(got[1]).all()
    assert np.isfinite(got[0]).all()


def test_misuse_is_told():
    bank = of(member(1), member(2))
    with pytest.raises(ValueError, match=r"has no adapter 'm3'.*did you mean 'm"):
        bank.variables(["m0", "m3", None, "m1"])
    with pytest.raises(ValueError, match="capacity = 2, and it holds m0, m1"):
        bank.add("more", *member(3)[2])
    with pytest.raises(ValueError, match=r"adapter 'm0': .*rank of at least 3; got 2"):
        bank.add("m0", *member(3, rank=3)[2])
    with pytest.raises(ValueError, match=r"up must have dora=True; got False"):
        bank.add("m0", *member(2, dora=True)[2])
    with pytest.raises(ValueError, match="from 1 to capacity = 1 members; got 2"):
        of(member(1), member(2), capacity=1)
    with pytest.raises(ValueError, match=r"by rank, both at least 1.*got \{0: 3\}"):
        of(member(1), capacity={0: 3})
    with pytest.raises(ValueError, match=r"adapter 'm0': .*rank of at least 2; got 1"):
        of(member(1), capacity={1: 3})
    with pytest.raises(ValueError, match="capacity must be one number for DoRA"):
        of(member(1, dora=True), capacity={2: 3, 4: 1})
    with pytest.raises(ValueError, match=r"as tokens; got rows of \[1, 2\]"):
        bank.variables([["m0"], ["m0", "m1"]])
    with pytest.raises(ValueError, match="way must be one of auto, gather, sort, mask"):
        bank.way = "slow"
    with pytest.raises(ValueError, match="way must be 'gather' for DoRA"):
        of(member(1, dora=True)).way = "mask"
    for names in ("m0", [0, 1], [["m0", 1]]):
        with pytest.raises(TypeError, match=r"names must be a list .* got (\[|'m0')"):
            bank.variables(names)
    for names in ([], [[]], [[], []]):
        with pytest.raises(ValueError, match="names must be one for each row, or as"):
            bank.variables(names)
    with pytest.raises(ValueError, match="None is the base"):
        bank.remove(None)
    with pytest.raises(ValueError, match=r"inputs must have 2 rows.* got 4"):
        bank.module.apply(bank.variables(["m0", None]), X)
    for capacity in ("3", 1.5, {2: 1.5}, {"2": 1}):
        with pytest.raises(TypeError, match="capacity must consist of whole numbers"):
            of(member(1), capacity=capacity)
