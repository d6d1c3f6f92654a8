"""GGUF files read as a Hugging Face model: names, rows, config, and nothing hostile."""

import itertools

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.fetch import FetchError, smollm2
from lora_jax.files.gguf import GGUFReader, rotate_half_rows
from lora_jax.interop.adapter_folder import find_adapter

D, HEADS, KV, F, V = 32, 4, 2, 64, 40


def fields(writer, **changes):
    values = {
        "context_length": 128,
        "embedding_length": D,
        "feed_forward_length": F,
        "block_count": 1,
        "head_count": HEADS,
        "head_count_kv": KV,
        "layer_norm_rms_eps": 1e-5,
        "rope_freq_base": 1e5,
    } | changes
    for name, value in values.items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)


def tensors(*, head_dim=D // HEADS, seed=0):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    return {
        "token_embd.weight": draw(V, D),
        "output_norm.weight": draw(D),
        "blk.0.attn_norm.weight": draw(D),
        "blk.0.attn_q.weight": draw(HEADS * head_dim, D),
        "blk.0.attn_k.weight": draw(KV * head_dim, D),
        "blk.0.attn_v.weight": draw(KV * head_dim, D),
        "blk.0.attn_output.weight": draw(D, HEADS * head_dim),
        "blk.0.ffn_norm.weight": draw(D),
        "blk.0.ffn_gate.weight": draw(F, D),
        "blk.0.ffn_up.weight": draw(F, D),
        "blk.0.ffn_down.weight": draw(D, F),
    }


def write(path, arch="llama", stored=None, add=lambda writer: None, **changes):
    writer = gguf.GGUFWriter(str(path), arch)
    fields(writer, **changes)
    add(writer)
    for name, tensor in (tensors() if stored is None else stored).items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_llama_file_reads_as_hugging_faces(tmp_path):
    stored = tensors()
    reader = GGUFReader(write(tmp_path / "m.gguf", stored=stored))
    assert reader.files == (tmp_path / "m.gguf",)
    layer = "model.layers.0"
    assert reader.shapes == {
        "model.embed_tokens.weight": (V, D),
        "model.norm.weight": (D,),
        f"{layer}.input_layernorm.weight": (D,),
        f"{layer}.self_attn.q_proj.weight": (D, D),
        f"{layer}.self_attn.k_proj.weight": (D // 2, D),
        f"{layer}.self_attn.v_proj.weight": (D // 2, D),
        f"{layer}.self_attn.o_proj.weight": (D, D),
        f"{layer}.post_attention_layernorm.weight": (D,),
        f"{layer}.mlp.gate_proj.weight": (F, D),
        f"{layer}.mlp.up_proj.weight": (F, D),
        f"{layer}.mlp.down_proj.weight": (D, F),
    }
    assert reader.config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "num_hidden_layers": 1,
        "hidden_size": D,
        "intermediate_size": F,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV,
        "head_dim": D // HEADS,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e5,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "vocab_size": V,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    for ours, theirs in (("v_proj", "attn_v"), ("o_proj", "attn_output")):
        np.testing.assert_array_equal(
            reader[f"{layer}.self_attn.{ours}.weight"], stored[f"blk.0.{theirs}.weight"]
        )
    np.testing.assert_array_equal(
        reader[f"{layer}.input_layernorm.weight"], stored["blk.0.attn_norm.weight"]
    )


def interleaved(weight, heads):
    """llama.cpp's own permutation, as its converter writes it."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


@pytest.mark.parametrize(("arch", "permuted"), [("llama", True), ("qwen2", False)])
def test_llamas_q_and_k_alone_are_put_back_to_rotate_half(tmp_path, arch, permuted):
    stored, original = tensors(), tensors()
    stored["blk.0.attn_q.bias"] = np.arange(D, dtype=np.float32)
    original["blk.0.attn_q.bias"] = stored["blk.0.attn_q.bias"]
    if permuted:
        for name, heads in (("q.weight", HEADS), ("k.weight", KV), ("q.bias", HEADS)):
            name = f"blk.0.attn_{name}"
            stored[name] = interleaved(original[name], heads)
            assert (stored[name] != original[name]).any()
    reader = GGUFReader(write(tmp_path / "m.gguf", arch, stored))
    for ours, theirs in (("q_proj.weight", "q.weight"), ("k_proj.weight", "k.weight")):
        np.testing.assert_array_equal(
            reader[f"model.layers.0.self_attn.{ours}"],
            original[f"blk.0.attn_{theirs}"],
        )
    bias = reader["model.layers.0.self_attn.q_proj.bias"]
    np.testing.assert_array_equal(bias, np.arange(D))
    assert reader.config["attention_bias"]


def test_rotating_halves_is_the_inverse_of_the_converter():
    weight = np.arange(48.0).reshape(16, 3)
    for heads in (1, 2, 4):
        back = rotate_half_rows(interleaved(weight, heads), heads)
        np.testing.assert_array_equal(back, weight)


@pytest.mark.parametrize("arch", ["gemma2", "gemma3"])
def test_gemmas_norms_lose_the_one_that_was_added(tmp_path, arch):
    stored = tensors(head_dim=16)
    for name in ("post_attention_norm", "post_ffw_norm"):
        stored[f"blk.0.{name}.weight"] = np.full(D, 1.5, np.float32)
    if arch == "gemma3":
        stored["blk.0.attn_q_norm.weight"] = np.full(16, 1.25, np.float32)

    def add(writer):
        writer.add_key_length(16)
        writer.add_rope_dimension_count(16)
        writer.add_sliding_window(64)
        if arch == "gemma2":
            writer.add_attn_logit_softcapping(50.0)
            writer.add_final_logit_softcapping(30.0)

    reader = GGUFReader(write(tmp_path / "m.gguf", arch, stored, add, block_count=7))
    layer = "model.layers.0"
    np.testing.assert_array_equal(
        reader["model.norm.weight"], stored["output_norm.weight"] - np.float32(1)
    )
    assert reader[f"{layer}.post_feedforward_layernorm.weight"][0] == 0.5
    np.testing.assert_array_equal(
        reader[f"{layer}.pre_feedforward_layernorm.weight"],
        stored["blk.0.ffn_norm.weight"] - np.float32(1),
    )
    np.testing.assert_array_equal(
        reader[f"{layer}.self_attn.q_proj.weight"], stored["blk.0.attn_q.weight"]
    )
    config = reader.config
    assert config["hidden_activation"] == "gelu_pytorch_tanh"
    assert config["query_pre_attn_scalar"] == config["head_dim"] == 16
    kinds = [kind.removesuffix("_attention")[0] for kind in config["layer_types"]]
    if arch == "gemma2":
        assert config["attn_logit_softcapping"] == 50
        assert "".join(kinds) == "sfsfsfs"
    else:
        assert reader[f"{layer}.self_attn.q_norm.weight"][0] == 0.25
        assert "".join(kinds) == "sssssfs"
        assert config["rope_local_base_freq"] == 10_000


def test_phi3_keeps_its_fused_projections(tmp_path):
    stored = {
        n: t for n, t in tensors().items() if "attn_" not in n and "gate" not in n
    }
    stored["blk.0.attn_qkv.weight"] = np.ones((2 * D, D), np.float32)
    reader = GGUFReader(write(tmp_path / "m.gguf", "phi3", stored))
    assert reader.shapes["model.layers.0.self_attn.qkv_proj.weight"] == (2 * D, D)
    assert reader.shapes["model.layers.0.mlp.gate_up_proj.weight"] == (F, D)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3s_scaling_is_found_from_its_factors(tmp_path, factor):
    base, dim, old, low, high = 5e5, 64, 8192, 1.0, 4.0
    factors = []
    for i in range(0, dim, 2):  # as transformers writes it, by wave lengths
        wave = 2 * np.pi * base ** (i / dim)
        smooth = (old / wave - low) / (high - low)
        between = 1 / ((1 - smooth) / factor + smooth)
        short = wave < old / high
        factors.append(1.0 if short else factor if wave > old / low else between)
    stored = tensors(head_dim=dim) | {"rope_freqs.weight": np.float32(factors)}
    sizes = {"rope_dimension_count": dim, "rope_freq_base": base}
    reader = GGUFReader(write(tmp_path / "m.gguf", stored=stored, **sizes))
    assert reader.config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    stored["rope_freqs.weight"] *= 2
    with pytest.raises(ValueError, match=r"rope_freqs.weight must be Llama 3's"):
        GGUFReader(write(tmp_path / "m.gguf", stored=stored, **sizes))


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "Q4_K", "Q6_K", "F16", "BF16"])
def test_stored_types_are_dequantised_as_the_gguf_package_does(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    rng = np.random.default_rng(0)
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    rows = rng.integers(0, 60, (D, 256 // elements * size), np.uint8)
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    fields(writer, feed_forward_length=256)
    for name, tensor in tensors().items():
        if name != "blk.0.ffn_down.weight":
            writer.add_tensor(name, tensor)
    writer.add_tensor("blk.0.ffn_down.weight", rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = GGUFReader(path)["model.layers.0.mlp.down_proj.weight"]
    theirs = {t.name: t for t in gguf.GGUFReader(str(path)).tensors}
    expected = gguf.dequantize(theirs["blk.0.ffn_down.weight"].data, kind)
    assert found.shape == (D, 256)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected.astype(np.float32))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    def add(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(["a", "b", "ab"])
        writer.add_token_types([1, 1, 3])

    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    return write(path, add=add).read_bytes()


def test_metadata_is_what_the_gguf_package_reads(whole, tmp_path):
    (tmp_path / "m.gguf").write_bytes(whole)
    metadata = GGUFReader(tmp_path / "m.gguf").metadata
    theirs = gguf.GGUFReader(str(tmp_path / "m.gguf")).fields
    assert set(metadata) == {key for key in theirs if not key.startswith("GGUF.")}
    for key, value in metadata.items():
        found = value.tolist() if isinstance(value, np.ndarray) else value
        assert found == theirs[key].contents()


@given(st.data())
def test_a_cut_file_is_one_clear_error(tmp_path_factory, whole, data):
    path = tmp_path_factory.mktemp("cut") / "m.gguf"
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 33))])
    with pytest.raises(ValueError, match=r"m.gguf .* must be a complete GGUF file"):
        GGUFReader(path)


@given(st.data())
def test_a_changed_header_gives_a_model_or_a_value_error(tmp_path_factory, whole, data):
    changed = bytearray(whole)
    header = len(whole) - sum(t.nbytes for t in tensors().values())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, header - 8))
        value = data.draw(st.sampled_from([0, 1, 9, 255, 2**31, 2**63, 2**64 - 1]))
        width = data.draw(st.sampled_from([1, 4, 8]))
        changed[place : place + width] = (value % 256**width).to_bytes(width, "little")
    path = tmp_path_factory.mktemp("changed") / "m.gguf"
    path.write_bytes(changed)
    try:
        reader = GGUFReader(path)
        found = {name: reader[name].shape for name in reader.shapes}
    except ValueError as error:
        message = str(error)
    else:
        message = "m.gguf"
        assert found == reader.shapes
    assert "m.gguf" in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"\(0 bytes\) .* too short"),
        (b"{}", "too short"),
        (b"PK\x03\x04" + b"\0" * 60, "doesn't begin with 'GGUF'"),
        (b"GGUF" + b"\1\0\0\0" + b"\0" * 60, r"\(2, 3\), little-endian; got 1"),
        (b"GGUF\0\0\0\3" + b"\0" * 60, "little-endian; got 50331648"),
        (b"GGUF\3\0\0\0" + b"\xff" * 16, r"18446744073709551615 tensors can't fit"),
        (b"GGUF\3\0\0\0" + b"\0" * 8 + b"\xff" * 8, r"metadata fields can't fit"),
    ],
)
def test_other_files_are_named(tmp_path, content, message):
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=f"m.gguf.*{message}"):
        GGUFReader(tmp_path / "m.gguf")


def test_no_file_and_no_package_are_named(tmp_path, monkeypatch, whole):
    with pytest.raises(FileNotFoundError, match=r"none.gguf must be a GGUF file"):
        GGUFReader(tmp_path / "none.gguf")
    (tmp_path / "m.gguf").write_bytes(whole)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match=r'pip install "lora_jax\[train\]"'):
        GGUFReader(tmp_path / "m.gguf")


def test_what_is_not_known_is_an_error_that_lists_it(tmp_path):
    path = tmp_path / "m.gguf"
    with pytest.raises(ValueError, match=r"one of \['cohere2', .*; got 'mamba'"):
        GGUFReader(write(path, "mamba"))
    stored = tensors() | {"blk.0.ffn_gate_exps.weight": np.ones((2, 3), np.float32)}
    with pytest.raises(ValueError, match=r"1 of 12 are unknown: \['blk.0.ffn_gate_e"):
        GGUFReader(write(path, stored=stored))
    reader = GGUFReader(write(path))
    with pytest.raises(ValueError, match=r"'lm_head.weight' must be one of the 11 in"):
        reader["lm_head.weight"]


def test_all_faults_of_the_metadata_are_told_at_once(tmp_path):
    def add(writer):
        writer.add_expert_count(8)
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)

    wrong = {"embedding_length": None, "head_count_kv": 3, "rope_freq_base": -1.0}
    path = write(tmp_path / "m.gguf", "qwen2", add=add, **wrong)
    with pytest.raises(ValueError, match=r"of a qwen2 model; 5 faults") as error:
        GGUFReader(path)
    for fault in (
        "embedding_length is missing",
        "freq_base must be a positive float, got -1.0",
        "4 heads must be a multiple of 3",
        "none, linear or yarn, got 'longrope'",
        "expert_count must be 0: a qwen2 has no experts here",
    ):
        assert fault in str(error.value)


def mixture(count=3):
    """The tensors of a Qwen3-MoE's layer, its experts in Q8_0."""
    stored = {n: t for n, t in tensors().items() if "ffn_" not in n or "norm" in n}
    rng = np.random.default_rng(1)
    stored["blk.0.ffn_gate_inp.weight"] = np.ones((count, D), np.float32)
    for name, shape in (("gate", (F, D)), ("up", (F, D)), ("down", (D, F))):
        experts = rng.normal(size=(count, *shape)).astype(np.float32)
        stored[f"blk.0.ffn_{name}_exps.weight"] = experts
    return stored


def test_the_experts_of_a_quantised_tensor_are_its_parts(tmp_path):
    kind, path = gguf.GGMLQuantizationType.Q8_0, tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(str(path), "qwen3moe")
    fields(writer, expert_count=3, expert_used_count=2, expert_feed_forward_length=F)
    wanted = {}
    for name, tensor in mixture().items():
        if "exps" in name:
            rows = gguf.quantize(tensor, kind)
            wanted[name.split("_")[1]] = gguf.dequantize(rows, kind)
            writer.add_tensor(name, rows, raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader = GGUFReader(path)
    for i, name in itertools.product(range(3), ("gate", "up", "down")):
        found = reader[f"model.layers.0.mlp.experts.{i}.{name}_proj.weight"]
        np.testing.assert_array_equal(found, wanted[name][i])


def test_experts_and_yarn_that_are_not_read_are_errors(tmp_path):
    def add(writer):
        writer.add_expert_shared_count(1)
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_yarn_attn_factor(0.5)
        writer.add_rope_scaling_yarn_log_mul(0.1)

    path = tmp_path / "m.gguf"
    with pytest.raises(ValueError, match=r"of a qwen3moe model; 7 faults") as error:
        GGUFReader(write(path, "qwen3moe", mixture(), add))
    for fault in (
        "expert_count is missing",
        "expert_used_count is missing",
        "expert_feed_forward_length is missing",
        "expert_shared_count must be 0",
        "yarn_attn_factor must be 1, got 0.5",
        "yarn_log_multiplier must be absent",
        "original_context_length is missing",
    ):
        assert fault in str(error.value)
    many = mixture() | {"blk.0.ffn_up_exps.weight": np.ones((5000, 1), np.float32)}
    with pytest.raises(ValueError, match=r"must be of 4096 experts or less; got 5000"):
        GGUFReader(write(path, "qwen3moe", many))


def test_heads_that_the_tensors_have_not_are_an_error(tmp_path):
    path = write(tmp_path / "m.gguf", head_count_kv=4)
    with pytest.raises(
        ValueError, match=r"k must have 4 heads of 8 rows = 32, got \[16"
    ):
        GGUFReader(path)


@pytest.fixture(scope="module")
def smollm():
    try:
        return smollm2()
    except FetchError as error:
        pytest.skip(f"real weights can't be fetched: {error}")


@pytest.mark.real
def test_smollm2_has_the_shapes_it_is_known_for(smollm):
    reader = GGUFReader(smollm)
    config = reader.config
    sizes = (30, 576, 9, 3, 1536, 49152, 64, 1e5, 1e-5, True)
    assert sizes == tuple(
        config[key]
        for key in (
            *("num_hidden_layers", "hidden_size", "num_attention_heads"),
            *("num_key_value_heads", "intermediate_size", "vocab_size", "head_dim"),
            *("rope_theta", "rms_norm_eps", "tie_word_embeddings"),
        )
    )
    count = sum(int(np.prod(shape)) for shape in reader.shapes.values())
    assert count == 134_515_008
    kernel = reader["model.layers.29.self_attn.q_proj.weight"]
    assert np.isfinite(kernel).all()
    assert 0.01 < kernel.std() < 1


def split(folder, parts=3):
    """The tensors of `write`, one file after the other, as gguf-split writes them."""
    stored, files = tensors(), []
    names = list(stored)
    for i in range(parts):
        path = folder / f"m-{i + 1:05}-of-{parts:05}.gguf"

        def add(writer, number=i):
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", parts)
            writer.add_int32("split.tensors.count", len(stored))

        kept = {name: stored[name] for name in names[i::parts]}
        files.append(write(path, stored=kept, add=add))
    return stored, files


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_split_model_is_read_from_all_its_files(part, tmp_path):
    stored, files = split(tmp_path)
    whole = GGUFReader(write(tmp_path / "whole.gguf", stored=stored))
    reader = GGUFReader(files[part])
    assert reader.files == tuple(files)
    assert reader.config == whole.config
    assert reader.shapes.keys() == whole.shapes.keys()
    for name in whole.shapes:
        np.testing.assert_array_equal(reader[name], whole[name], err_msg=name)


def test_a_split_model_needs_all_its_files_under_their_names(tmp_path):
    _, files = split(tmp_path)
    whole = files[0].read_bytes()
    files[1].rename(tmp_path / "kept")
    with pytest.raises(FileNotFoundError, match=r"m-00002-of-00003\.gguf is not in"):
        GGUFReader(files[0])
    (tmp_path / "kept").rename(files[1])
    (tmp_path / "other.gguf").write_bytes(whole)
    with pytest.raises(ValueError, match=r"must be named NAME-00001-of-00003\.gguf"):
        GGUFReader(tmp_path / "other.gguf")
    files[2].write_bytes(files[1].read_bytes())
    with pytest.raises(ValueError, match=r"must be file 3 of 3 .* split.no is 1"):
        GGUFReader(files[0])


def test_a_gguf_adapter_is_called_that(tmp_path):
    def add(writer):
        writer.add_type("adapter")

    file = write(tmp_path / "lora.gguf", add=add)
    with pytest.raises(ValueError, match="it is a GGUF LoRA adapter"):
        GGUFReader(file)
    for path in (file, write(tmp_path / "model.gguf")):
        kind = "a LoRA adapter" if path == file else "a model"
        with pytest.raises(ValueError, match=f"must be a folder; .* of {kind}"):
            find_adapter(path)
