"""Heads, names, images and adapters of every encoder."""

import functools
import json
import re
import shutil
from pathlib import Path

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_jax.config import LoRAConfig
from lora_jax.files.adapter import save_adapter
from lora_jax.interop.pretrained import load_model
from lora_jax.models.disentangled import log_buckets
from lora_jax.models.embeddings import cubic_matrix, token_positions
from lora_jax.models.families import FAMILIES
from lora_jax.models.load import load_base
from lora_jax.models.relative import relative_buckets
from lora_jax.models.save import save_model
from lora_jax.nn.adapt import adapt
from lora_jax.plan.flops import traced_flops
from lora_jax.tree.fingerprint import fingerprint
from tests.models.golden import GOLDEN

POOLINGS = {
    "bert": "pooler",
    "roberta": "pooler",
    "xlm-roberta": "pooler",
    "electra": "pooler",
    "mpnet": "pooler",
    "modernbert": "pooler",
    "deberta": "pooler",
    "deberta_conv": "pooler",
    "distilbert": "pooler",
    "vit": "cls",
    "dinov2": "cls_mean",
    "dinov2_gated": "cls_mean",
}
every_encoder = pytest.mark.parametrize("name", POOLINGS)
every_new_encoder = pytest.mark.parametrize("name", list(POOLINGS)[1:])


@pytest.fixture
def copy(tmp_path):
    """Copies a golden folder, with its tensors or config changed."""

    def make(name, tensors=dict, **config):
        folder = Path(shutil.copytree(GOLDEN / name, tmp_path / name))
        file = folder / "model.safetensors"
        save_file(tensors(load_file(file)), file)
        settings = json.loads((folder / "config.json").read_text()) | config
        (folder / "config.json").write_text(json.dumps(settings))
        return folder

    return make


def arguments(name):
    golden = np.load(GOLDEN / name / "reference.npz", allow_pickle=False)
    if "pixel_values" in golden:
        return (jnp.asarray(golden["pixel_values"]),)
    return tuple(jnp.int32(golden[key]) for key in ("input_ids", "attention_mask"))


def flat(tree):
    return flax.traverse_util.flatten_dict(tree, sep="/")


def random_like(tree):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: jnp.float32(0.1 * rng.standard_normal(a.shape)), tree)


def assert_equal(a, b):
    assert flat(a).keys() == flat(b).keys()
    for path, array in flat(a).items():
        np.testing.assert_array_equal(array, flat(b)[path], err_msg=path)


@every_encoder
def test_saving_what_was_loaded_gives_the_tensors_of_the_folder(name, tmp_path):
    loaded = load_base(GOLDEN / name)
    assert (loaded.module.pooling, loaded.module.num_labels) == (POOLINGS[name], 4)
    save_model(tmp_path / "out", loaded.params, GOLDEN / name)
    again = load_base(tmp_path / "out")
    assert_equal(again.params, loaded.params)
    assert again.module == loaded.module
    written, original = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "out", GOLDEN / name)
    )
    assert_equal(written, original)


@every_encoder
def test_a_new_head_of_other_classes_keeps_what_the_file_has(name, tmp_path):
    loaded = load_base(GOLDEN / name, num_labels=3, key=jax.random.key(0))
    assert loaded.new == ("classifier/bias", "classifier/kernel")
    assert loaded.module.pooling == POOLINGS[name]
    assert 0.01 < float(loaded.params["classifier"]["kernel"].std()) < 0.03
    save_model(tmp_path / "out", loaded.params, GOLDEN / name)
    assert_equal(load_base(tmp_path / "out").params, loaded.params)


@every_encoder
def test_a_head_on_the_mean_comes_back_and_replaces_the_files(name, tmp_path):
    loaded = load_base(GOLDEN / name, num_labels=4, pooling="mean")
    width = loaded.config.hidden_size
    assert loaded.params["classifier"]["kernel"].shape == (width, 4)
    assert "pooler" not in loaded.params
    with pytest.warns(UserWarning, match="'mean' pooling"):
        save_model(tmp_path / "out", loaded.params, GOLDEN / name, pooling="mean")
    again = load_base(tmp_path / "out")
    family = again.family
    assert not any(family.is_head(family.bare_name(old)) for old in again.unused)
    assert again.module == loaded.module
    assert_equal(again.params, loaded.params)


@pytest.mark.parametrize(
    ("name", "absent"),
    [
        ("roberta", {"classifier", "pooler"}),
        ("xlm-roberta", {"classifier", "pooler"}),
        ("electra", {"classifier", "pooler"}),
        ("mpnet", {"classifier", "pooler"}),
        ("deberta", {"classifier", "pooler"}),
        ("distilbert", {"classifier", "pooler"}),
        ("modernbert", {"classifier", "pooler", "pooler_norm"}),
    ],
)
def test_a_file_without_a_head_gets_all_of_it_anew(name, absent, copy):
    family = load_base(GOLDEN / name).family

    def bare(tensors):
        names = {name: family.bare_name(name) for name in tensors}
        return {b: tensors[n] for n, b in names.items() if not family.is_head(b)}

    folder = copy(name, bare)
    assert load_base(folder).module.num_labels is None
    key = jax.random.key(0)
    width = load_base(folder).config.hidden_size
    loaded = load_base(folder, num_labels=width, pooling="pooler", key=key)
    assert {path.split("/")[0] for path in loaded.new} == absent
    if "pooler_norm" in absent:
        assert (loaded.params["pooler_norm"]["scale"] == 1).all()
    kernels = [loaded.params[m]["kernel"] for m in ("classifier", "pooler")]
    assert not (kernels[0] == kernels[1]).any()
    with pytest.raises(ValueError, match=r"missing: ((pre_)?classifier|head|pooler).*"):
        load_base(folder, pooling="pooler")


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov2_gated"])
def test_files_with_the_module_names_of_transformers_5_load_the_same(name, copy):
    renamed = []

    def rename(tensors):
        for old in list(tensors):
            new = old
            if name == "vit":
                new = new.replace("encoder.layer.", "layers.")
                new = new.replace("intermediate.dense", "mlp.fc1")
            new = re.sub(r"attention\.attention\.(q|k|v)\w+", r"attention.\1_proj", new)
            new = new.replace("attention.output.dense", "attention.o_proj")
            if name == "vit":
                new = new.replace("output.dense", "mlp.fc2")
            tensors[new] = tensors.pop(old)
            renamed.append(new != old)
        return tensors

    folder = copy(name, rename)
    assert sum(renamed) >= 10
    assert_equal(load_base(folder).params, load_base(GOLDEN / name).params)


@pytest.mark.parametrize(
    ("name", "stray"),
    [
        ("roberta", ("roberta.embeddings.position_ids", "lm_head.dense.weight")),
        ("roberta", ("roberta.pooler.dense.weight",)),
        ("xlm-roberta", ("roberta.pooler.dense.weight",)),
        ("electra", ("discriminator_predictions.dense.weight",)),
        ("electra", ("generator_lm_head.bias", "generator_predictions.dense.bias")),
        ("mpnet", ("mpnet.pooler.dense.weight", "lm_head.bias")),
        ("modernbert", ("decoder.bias", "decoder.weight")),
        ("deberta", ("mask_predictions.dense.bias", "lm_predictions.lm_head.bias")),
        ("deberta", ("deberta.embeddings.position_embeddings.weight",)),
        ("distilbert", ("vocab_transform.weight", "vocab_layer_norm.bias")),
        ("vit", ("vit.pooler.dense.bias",)),
    ],
)
def test_tensors_of_other_heads_are_left(name, stray, copy):
    zeros = {key: np.zeros(3, np.float32) for key in stray}
    loaded = load_base(copy(name, lambda tensors: tensors | zeros))
    assert set(stray) == set(loaded.unused)


def test_images_of_another_size_have_resized_positions():
    loaded = load_base(GOLDEN / "dinov2")
    golden = np.load(GOLDEN / "dinov2" / "resized.npz", allow_pickle=False)
    assert golden["pixel_values"].shape[2:] != (12, 12)
    logits = jax.jit(loaded.module.apply)(loaded.variables, golden["pixel_values"])
    np.testing.assert_allclose(logits, golden["logits"], rtol=1e-5, atol=2e-5)


def test_a_cubic_matrix_keeps_constants_and_the_same_size():
    np.testing.assert_array_equal(cubic_matrix(5, 5), np.eye(5))
    for wanted in (1, 3, 8):
        np.testing.assert_allclose(cubic_matrix(5, wanted).sum(axis=1), 1, rtol=1e-6)


def test_positions_of_roberta_skip_padding_wherever_it_stands():
    ids = jnp.array([[1, 5, 1, 5, 5], [5, 5, 1, 1, 1]])
    assert token_positions(ids, 1).tolist() == [[1, 2, 1, 3, 4], [2, 3, 1, 1, 1]]
    assert load_base(GOLDEN / "roberta").config.max_positions == 19 - 2


def test_windows_and_padding_leave_a_row_as_it_is_alone():
    loaded = load_base(GOLDEN / "modernbert", pooling="mean")
    run = jax.jit(lambda *x: loaded.module.apply(*x, method="embed"))
    ids, mask = arguments("modernbert")
    padded = run(loaded.variables, ids, mask)
    for row, length in enumerate(mask.sum(axis=1)):
        alone = run(loaded.variables, ids[row : row + 1, :length], mask[:1, :length])
        np.testing.assert_allclose(alone[0], padded[row], rtol=1e-5, atol=2e-5)
    last = jnp.roll(ids, 13 - 2, axis=1), jnp.roll(mask, 13 - 2, axis=1)
    left = run(loaded.variables, *last)[2]  # padding on the left
    np.testing.assert_allclose(left, padded[2], rtol=1e-5, atol=2e-5)


def test_distances_fall_into_the_buckets_of_transformers():
    starts = [0, *range(1, 9), 12, 16, 23, 32, 46, 64, 91]  # of each bucket
    distances = np.arange(600)
    want = np.searchsorted(starts, distances, side="right") - 1
    np.testing.assert_array_equal(relative_buckets(-distances, 32), want)
    later = relative_buckets(distances[1:], 32)
    np.testing.assert_array_equal(later, want[1:] + 16)


def test_distances_of_deberta_fall_into_the_buckets_of_transformers():
    golden, distances = np.load(GOLDEN / "deberta" / "buckets.npz"), range(-600, 601)
    for name, want in golden.items():
        size, most = map(int, name.split("_")[1:])
        np.testing.assert_array_equal(
            log_buckets(np.array(distances), size, most), want
        )


def test_embeddings_average_every_token_of_an_image():
    loaded = load_base(GOLDEN / "vit")
    golden = np.load(GOLDEN / "vit" / "reference.npz", allow_pickle=False)
    embed = jax.jit(functools.partial(loaded.module.apply, method="embed"))
    got = embed(loaded.variables, *arguments("vit"))
    want = golden["last_hidden_state"].mean(axis=1)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)


@pytest.fixture(scope="module")
def lora():
    return LoRAConfig(rank=2, alpha=3, targets="all-linear", train=["classifier"])


@every_new_encoder
def test_all_linears_of_an_encoder_are_adapted_and_merge(name, lora):
    key = jax.random.key(0)
    loaded = load_model(GOLDEN / name, lora=lora, key=key)
    base, x = load_base(GOLDEN / name), arguments(name)
    targets = {target.path for target in loaded.module.targets(base.params)}
    layers = {path for path in targets if "layer_" in path}
    each = 4 if loaded.config.is_qkv_fused else 6
    each += 2 * (name == "deberta_conv")  # layers of distances
    assert len(layers) == each * loaded.config.num_layers
    assert targets - layers <= {"pooler", "encoder/embeddings/projection"}

    @jax.jit
    def run(variables):
        return loaded.module.apply(variables, *x)

    want = jax.jit(base.module.apply)(base.variables, *x)
    np.testing.assert_allclose(run(loaded.variables), want, rtol=1e-5, atol=1e-5)
    filled = loaded.variables | {"lora": random_like(loaded.variables["lora"])}
    changed = run(filled)
    assert np.abs(changed - want).max() > 1e-2
    merged = jax.jit(loaded.module.merge)(filled)
    merged = jax.jit(base.module.apply)({"params": merged}, *x)
    np.testing.assert_allclose(merged, changed, rtol=1e-4, atol=1e-4)


def test_the_patch_projection_is_adapted_when_it_is_named():
    base, x = load_base(GOLDEN / "dinov2"), arguments("dinov2")
    adapted = adapt(base.module, LoRAConfig(rank=2, alpha=3, targets=["patch"]), *x)
    (target,) = adapted.targets(base.params)
    assert (target.path, target.kind) == ("encoder/embeddings/patch", "conv")
    assert target.kernel_shape == (4, 4, 3, 21)
    variables = adapted.attach(base.params, jax.random.key(0))
    apply, want = jax.jit(adapted.apply), jax.jit(base.module.apply)(base.variables, *x)
    np.testing.assert_array_equal(apply(variables, *x), want)
    variables["lora"] = random_like(variables["lora"])
    assert np.abs(apply(variables, *x) - want).max() > 1e-2


def test_wrong_images_are_named():
    vit, dinov2 = (load_base(GOLDEN / name) for name in ("vit", "dinov2"))
    x = jnp.ones((1, 3, 12, 12))
    for model, image, message in (
        (vit, x[0], r"c = 3 and size \(12, 12\); got shape \(3, 12, 12\)"),
        (vit, x[..., :8], r"size \(12, 12\); got shape \(1, 3, 12, 8\)"),
        (dinov2, x[0, 0, 0], r"c = 3 .* got shape \(12,\)"),
        (vit, x.transpose(0, 2, 3, 1), r"c = 3 .* got shape \(1, 12, 12, 3\)"),
        (dinov2, x[..., :3], r"at least one patch; got shape \(1, 3, 12, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            model.module.apply(model.variables, image)
    with pytest.raises(TypeError, match=r"pixel_values must be floats .* uint8"):
        vit.module.apply(vit.variables, x.astype(jnp.uint8))


def test_a_model_without_token_types_or_pooler_refuses_them():
    loaded = load_base(GOLDEN / "distilbert")
    ids, mask = arguments("distilbert")
    with pytest.raises(ValueError, match="this model has no token types"):
        loaded.module.apply(loaded.variables, ids, mask, ids)
    with pytest.raises(ValueError, match=r"must not be 'pooler' .* without a pooler"):
        load_base(GOLDEN / "vit", pooling="pooler")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("roberta", {"pad_token_id": 18}, r"pad_token_id must be in \[0, .*18\)"),
        ("roberta", {"is_decoder": True}, "RoBERTa encoder: is_decoder must be False"),
        ("electra", {"embedding_size": 0}, "embedding_size must be at least 1"),
        ("electra", {"is_decoder": True}, "ELECTRA encoder: is_decoder must be False"),
        (
            "mpnet",
            {"relative_attention_num_buckets": 16, "max_position_embeddings": 2},
            r"num_buckets must be 32 here; got 16; max_position_embeddings .* 3.*got 2",
        ),
        (
            "modernbert",
            {
                "num_attention_heads": 6,
                "local_attention": -4,
                "layer_types": ["full_attention", "chunked", "full_attention"],
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            },
            "rope_scaling must be None .*must be even; got 18 / 6.*local_attention "
            "must be at least 0; got -4; layer_types must be .*'chunked'",
        ),
        ("modernbert", {"global_attn_every_n_layers": 0}, "at least 1; got 0"),
        ("modernbert", {"classifier_pooling": "last"}, "pooler_input must be one of"),
        (
            "deberta_conv",
            {
                "pos_att_type": ["p2p"],
                "conv_kernel_size": 4,
                "conv_groups": 2,
                "conv_act": "mish",
                "attention_head_size": 8,
                "embedding_size": 30,
            },
            "embedding_size must be 21 here; got 30; attention_head_size must be 7 .*"
            r"pos_att_type must be of \('c2p', 'p2c'\); got \['p2p'\]; "
            "conv_kernel_size must be odd; got 4; conv_groups must divide hidden_size"
            " = 21; got 2; conv_act must be one of .*'mish'",
        ),
        ("deberta", {"relative_attention": False}, "relative_attention must be True"),
        ("deberta", {"position_buckets": 40}, "under max_relative.* = 18; got 40"),
        ("distilbert", {"dim": "21"}, "DistilBERT encoder: dim must be an integer"),
        ("distilbert", {"n_heads": 4}, "num_heads must divide hidden_size = 21"),
        ("vit", {"image_size": [12]}, r"image_size must be an integer or two; got"),
        ("vit", {"patch_size": 13}, r"at least patch_height, .* 13, 13; got 12, 12"),
        ("dinov2", {"hidden_act": "mish"}, "activation must be one of .*'mish'"),
    ],
)
def test_a_config_that_does_not_fit_is_named(name, changes, message):
    settings = json.loads((GOLDEN / name / "config.json").read_text()) | changes
    with pytest.raises(ValueError, match=message):
        FAMILIES[settings["model_type"]].read_config(settings)


def test_absent_keys_have_the_defaults_of_transformers():
    vit, dinov2 = (FAMILIES[name].read_config({}) for name in ("vit", "dinov2"))
    assert (vit.hidden_size, vit.mlp_size, vit.patch_width) == (768, 3072, 16)
    assert (vit.norm_eps, vit.is_resizable, vit.has_qkv_bias) == (1e-12, False, True)
    assert (dinov2.mlp_size, dinov2.patch_height, dinov2.norm_eps) == (3072, 14, 1e-6)
    distilbert = FAMILIES["distilbert"].read_config({})
    assert (distilbert.vocab_size, distilbert.mlp_size) == (30522, 3072)


def test_biases_trained_beside_the_files_own_head_come_back(tmp_path):
    config = LoRAConfig(targets=["query"], bias="all")
    model = load_model(GOLDEN / "roberta", lora=config, key=jax.random.key(0))
    base = fingerprint(model.variables["frozen"])
    save_adapter(tmp_path, model.variables, config, base)
    again = load_model(GOLDEN / "roberta", adapter=tmp_path)
    assert set(again.params["classifier"]) == {"kernel", "bias"}
    assert set(again.variables["params"]["classifier"]) == {"bias"}
    assert jax.tree.all(jax.tree.map(np.array_equal, again.variables, model.variables))


def test_a_plan_counts_the_scores_of_distances_and_the_convolution():
    loaded, (ids, mask) = load_base(GOLDEN / "deberta_conv"), arguments("deberta_conv")
    traced = jax.make_jaxpr(loaded.module.apply)(loaded.variables, ids, mask)
    (b, t), d, f, layers, span = ids.shape, 21, 28, 2, 4
    rows = 2 * span  # 13 tokens are farther apart than the table's 4
    block = b * t * (4 * d * d + 2 * d * f)  # linear layers
    block += 2 * rows * d * d  # keys and queries of distances
    block += 2 * b * t * t * d  # contents, and what is read
    block += 2 * b * t * rows * d  # distances
    conv = 3 * b * t * d * d // 3  # of 3 tokens, in 3 groups
    head = b * (d * d + 4 * d)
    assert traced_flops(traced.jaxpr) == 2 * (layers * block + conv + head)
