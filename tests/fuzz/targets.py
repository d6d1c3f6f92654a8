"""The readers to fuzz: how their inputs are written and read."""

import contextlib
import hashlib
import io
import json
import logging
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save

from lora_jax.config import LoRAConfig
from lora_jax.files.adapter import load_adapter, save_adapter
from lora_jax.files.chat import ChatTemplate
from lora_jax.files.gguf import GGUFReader
from lora_jax.files.images import load_processor
from lora_jax.files.json_file import parse_json
from lora_jax.files.safetensors import open_tensors
from lora_jax.files.tokenizer import Tokenizer
from lora_jax.finetune.settings import load_settings
from lora_jax.interop.loralib import read_loralib
from lora_jax.interop.mlx import read_mlx
from lora_jax.interop.peft import read_peft
from lora_jax.models.families import FAMILIES
from lora_jax.models.source import read_config, read_settings
from lora_jax.train.examples import read_jsonl
from lora_jax.train.text import read_text_examples
from tests.fuzz.mutate import (
    NASTY,
    damage_bytes,
    damage_gguf,
    damage_json,
    damage_json_file,
    damage_safetensors,
    to_json,
)
from tests.fuzz.samples import (
    CHECKPOINT,
    GGUF,
    IMAGES,
    NPZ,
    NPZ_MEMBERS,
    PIECES,
    STATE,
    TOKENIZER,
    open_checkpoints,
)

GOLDEN = Path(__file__).parents[1] / "golden"
CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]


class Target(NamedTuple):
    """A reader.

    Attributes:
      name: its name.
      write: writes a damaged input to a folder.
      read: reads it; may raise a `ValueError` or `OSError`.
      weight: how often it is chosen, relative to the others.
      names_file: whether its errors must name the file.
    """

    name: str
    write: Callable[[Random, Path], None]
    read: Callable[[Path], Any]
    weight: int
    names_file: bool = True


def _yaml(rng: Random, folder: Path) -> None:
    text = (
        b"model: {path: m}\ndata: {train: t.jsonl, max_length: 64}\noutput: {dir: r}\n"
    )
    text += b"lora: {rank: 4, alpha: 8, targets: [query], rank_pattern: {a: 2}}\n"
    text += b"train: {epochs: 2, batch_size: 8, learning_rate: 1e-3, seed: 3}\n"
    text += b"x: &a [1, 'b', \"c\\n\", {<<: &b {k: v}}]\ny: [*a, *b, *a]\n"
    if rng.random() < 0.3:
        import yaml

        text = to_json(damage_json(rng, yaml.safe_load(text)))
    elif rng.random() < 0.1:
        bomb = [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9)]
        text = ("a0: &a0 [1]\n" + "\n".join(bomb)).encode() + text
    (folder / "config.yaml").write_bytes(damage_bytes(rng, text))


def _read_yaml(folder: Path) -> None:
    load_settings(folder / "config.yaml")


def _lines(rng: Random, folder: Path) -> None:
    records: list[Any] = [
        {"text": "a b", "label": 1},
        {"messages": CHAT},
        {"prompt": "a", "completion": "b"},
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
        {"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1]},
    ]
    record = rng.choice(records)
    lines = [to_json(damage_json(rng, record)) for _ in range(rng.choice([1, 3]))]
    data = b"\n".join(lines)
    if rng.random() < 0.3:
        data = damage_bytes(rng, data)
    (folder / "data.jsonl").write_bytes(data)


def _read_lines(folder: Path) -> None:
    with contextlib.suppress(ValueError):
        read_jsonl(folder / "data.jsonl")
    read_text_examples(folder / "data.jsonl", _coder())


_CODERS: list[Tokenizer] = []


def _coder() -> Tokenizer:
    if not _CODERS:
        folder = Path(tempfile.mkdtemp())
        (folder / "tokenizer.json").write_bytes(TOKENIZER)
        chat = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
        config = {"eos_token": "<e>", "chat_template": chat}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        _CODERS.append(Tokenizer(folder / "tokenizer.json"))
    return _CODERS[0]


def _tokenizer(rng: Random, folder: Path) -> None:
    file = damage_json_file(rng, TOKENIZER) if rng.random() < 0.6 else TOKENIZER
    (folder / "tokenizer.json").write_bytes(file)
    config = {"eos_token": "<e>", "unk_token": {"content": "a"}, "bos_token": "<e>"}
    config["chat_template"] = "{{ messages[0].content }}"
    others = {"eos_token_id": [1, 2], "bos_token_id": 0, "pad_token_id": 3}
    for name, values in (("tokenizer_config", config), ("generation_config", others)):
        data = to_json(damage_json(rng, values)) if rng.random() < 0.5 else to_json({})
        (folder / f"{name}.json").write_bytes(data)


def _read_tokenizer(folder: Path) -> None:
    _use(Tokenizer(folder / "tokenizer.json"))


def _use(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_text("ab cab é😀").ids
    tokenizer.encode(["a b", ""], max_length=8)
    tokenizer.decode(ids)
    stream = tokenizer.stream()
    for token in ids:
        stream.push(token)


def _template(rng: Random, folder: Path) -> None:
    source = "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 9)))
    closing = source.count("{% for ") - source.count("{% endfor")
    if rng.random() < 0.7:
        source += "{% endfor %}" * max(closing, 0)
    (folder / "source").write_bytes(source.encode("utf-8", "surrogatepass"))


def _read_template(folder: Path) -> None:
    source = (folder / "source").read_bytes().decode("utf-8", "surrogatepass")
    template = ChatTemplate(source, {"bos_token": "<s>"})
    template.render(CHAT, add_generation_prompt=True)
    template.mark_assistant(CHAT)


WEIGHTS = save({"a.weight": np.ones((3, 4), np.float32), "b": np.ones(2, np.float16)})


def _tensors(rng: Random, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(damage_safetensors(rng, WEIGHTS))
    if rng.random() < 0.2:
        index = {"weight_map": {"a.weight": "model.safetensors"}}
        data = to_json(damage_json(rng, index))
        (folder / "model.safetensors.index.json").write_bytes(data)


def _read_tensors(folder: Path) -> None:
    reader = open_tensors(folder)
    for name in reader.shapes:
        list(reader.pieces(name))


def _golden(folder: str, tensors: str) -> tuple[bytes, bytes]:
    path = GOLDEN / folder
    return (path / "adapter_config.json").read_bytes(), (path / tensors).read_bytes()


PEFT = _golden("llama/peft_plain", "adapter_model.safetensors")


def _peft(rng: Random, folder: Path) -> None:
    config, tensors = PEFT
    if rng.random() < 0.7:
        config = damage_json_file(rng, config)
    else:
        tensors = damage_safetensors(rng, tensors)
    (folder / "adapter_config.json").write_bytes(config)
    (folder / "adapter_model.safetensors").write_bytes(tensors)


def _read_peft(folder: Path) -> None:
    adapter = read_peft(folder)
    for factors in adapter.modules.values():
        assert np.isfinite(factors.scaling)


def _mlx(rng: Random, folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    shapes = {"lora_a": (5, 2), "lora_b": (2, 4), "m": (4,)}
    tensors = {f"{name}.{k}": np.ones(s, np.float32) for k, s in shapes.items()}
    config: Any = {"fine_tune_type": "dora", "num_layers": 1}
    config["lora_parameters"] = {"rank": 2, "scale": 2.0, "dropout": 0.1, "keys": ["q"]}
    data, values = save(tensors), to_json(config)
    if rng.random() < 0.6:
        values = damage_json_file(rng, values)
    else:
        data = damage_safetensors(rng, data)
    (folder / "adapter_config.json").write_bytes(values)
    (folder / "adapters.safetensors").write_bytes(data)


def _own_sample() -> tuple[bytes, bytes]:
    factors = {"lora_a": np.ones((3, 2)), "lora_b": np.ones((2, 4))}
    head = {"kernel": np.ones((4, 2), np.float32)}
    with tempfile.TemporaryDirectory() as folder:
        variables = {"lora": {"q": factors}, "params": {"classifier": head}}
        save_adapter(
            folder, variables, LoRAConfig(rank=2), "f", extra={"labels": ["a"]}
        )
        path = Path(folder)
        return (
            (path / "adapter_config.json").read_bytes(),
            (path / "adapter.safetensors").read_bytes(),
        )


OWN = _own_sample()


def _own(rng: Random, folder: Path) -> None:
    """Most inputs have correct checksums; otherwise they would all fail there."""
    config, tensors = OWN
    values: Any = json.loads(config)
    if rng.random() < 0.5:
        tensors = damage_safetensors(rng, tensors)
    else:
        values = damage_json(rng, values)
    if isinstance(values, dict) and rng.random() < 0.9:
        values["sha256"] = hashlib.sha256(tensors).hexdigest()
        values.pop("config_sha256", None)
        read = parse_json(json.dumps(values))
        text = json.dumps(read, sort_keys=True).encode()
        values["config_sha256"] = hashlib.sha256(text).hexdigest()
    (folder / "adapter_config.json").write_bytes(to_json(values))
    (folder / "adapter.safetensors").write_bytes(tensors)


def _npz(rng: Random, folder: Path) -> None:
    """Half of the archives have correct checksums."""
    if rng.random() < 0.5:
        data = damage_bytes(rng, NPZ)
    else:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as new:
            for name, content in NPZ_MEMBERS.items():
                new.writestr(name, damage_bytes(rng, content))
        data = buffer.getvalue()
    (folder / "lora.npz").write_bytes(data)


def _read_npz(folder: Path) -> None:
    read_loralib(folder / "lora.npz", alpha=4.0)


CONFIGS = [json.loads(p.read_bytes()) for p in sorted(GOLDEN.glob("*/config.json"))]
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    | {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.0] * 8}
    | {"original_max_position_embeddings": 64},
]


def _config(rng: Random, folder: Path) -> None:
    config = dict(rng.choice(CONFIGS))
    if rng.random() < 0.4:
        config["rope_scaling"] = rng.choice(SCALINGS)
    if rng.random() < 0.3:
        config[rng.choice(sorted(config))] = rng.choice(NASTY)
    (folder / "config.json").write_bytes(to_json(damage_json(rng, config)))


def _read_config(folder: Path) -> None:
    settings = read_settings(folder)
    config = read_config(FAMILIES[settings["model_type"]], settings, folder)
    for rope in getattr(config, "ropes", ()):
        if rope.rotary_dim < 1 << 16:
            assert np.isfinite(rope.frequencies()).all()
        assert np.isfinite(np.float32(rope.attention_factor))
    for name in ("attention_softcap", "final_softcap", "attention_scale", "norm_eps"):
        value = getattr(config, name, None)
        assert value is None or np.isfinite(np.float32(value))


def _gguf(rng: Random, folder: Path) -> None:
    fields, tensors = GGUF
    if rng.random() < 0.3:
        fields = fields | {"tokenizer.ggml.model": "llama"}
    (folder / "m.gguf").write_bytes(damage_gguf(rng, fields, tensors))


def _read_gguf(folder: Path) -> None:
    reader = GGUFReader(folder / "m.gguf")
    for name in reader.shapes:
        _ = reader[name]
    with contextlib.suppress(ValueError):  # fuzzed separately
        FAMILIES[reader.config["model_type"]].read_config(reader.config)
    _use(Tokenizer(folder / "m.gguf"))


PROCESSORS = [json.loads(p.read_bytes()) for p in GOLDEN.glob("images/*/*.json")]


def _image(rng: Random, folder: Path) -> None:
    image, settings = rng.choice(list(IMAGES.values())), rng.choice(PROCESSORS)
    if rng.random() < 0.7:
        image = damage_bytes(rng, image)
    if rng.random() < 0.5:
        settings = damage_json(rng, settings)
    (folder / "picture").write_bytes(image)
    (folder / "preprocessor_config.json").write_bytes(to_json(settings))


def _read_image(folder: Path) -> None:
    pixels = load_processor(folder).read(folder / "picture")
    assert np.isfinite(pixels).all()


def _checkpoint(rng: Random, folder: Path) -> None:
    """Damages some files of one step or of both, or takes them away."""
    damaged = set(rng.sample(sorted(CHECKPOINT), rng.choice([1, 1, 1, 2, 4])))
    for name, data in CHECKPOINT.items():
        path = folder / "checkpoints" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name in damaged:
            if rng.random() < 0.1:
                continue
            is_json = data.startswith(b"{")
            data = (damage_json_file if is_json else damage_bytes)(rng, data)
        path.write_bytes(data)


def _read_checkpoint(folder: Path) -> None:
    """What is restored has the bits that were saved, at either step."""
    logging.disable(logging.CRITICAL)
    try:
        with open_checkpoints(folder / "checkpoints") as checkpoints:
            found = checkpoints.restore(STATE)
    finally:
        logging.disable(logging.NOTSET)
    assert int(found.step) in (1, 2)
    for name in ("a", "b"):
        leaves = [s.variables["lora"]["q"][f"lora_{name}"] for s in (found, STATE)]
        np.testing.assert_array_equal(*leaves)


_coder()  # writes its files before writes are monitored
TARGETS = [
    Target("yaml", _yaml, _read_yaml, 10),
    Target("jsonl", _lines, _read_lines, 20),
    Target("safetensors", _tensors, _read_tensors, 20),
    Target("gguf", _gguf, _read_gguf, 15),
    Target("tokenizer", _tokenizer, _read_tokenizer, 15),
    Target("chat", _template, _read_template, 1, names_file=False),
    Target("peft", _peft, _read_peft, 15),
    Target("mlx", _mlx, read_mlx, 15),
    Target("adapter", _own, load_adapter, 15),
    Target("npz", _npz, _read_npz, 10),
    Target("image", _image, _read_image, 15),
    Target("checkpoint", _checkpoint, _read_checkpoint, 1),
    Target("config", _config, _read_config, 20),
]
