"""Small valid inputs to be damaged."""

import io
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
import tokenizers

from lora_jax.files.checkpoint import Checkpoints
from lora_jax.train.state import TrainState

PIECES = [
    *("{{ bos_token }}", "{{ m }}", "{% for m in messages %}", "{% endfor %}", "text"),
    *("{% if x %}", "{% endif %}", "{{ ns.x }}", "{% set ns = namespace(x='a') %}"),
    *("{% set ns.x = ns.x ~ ns.x %}", "{% set ns.x = ns.x * 99 %}", "{% break %}"),
    *("{% for i in range(9999) %}", "{{ lipsum(n=999) }}", "{{ '{5}'.format(1) }}"),
    *("{{ '%(x)s' % {} }}", "{{ '%99999999d' % 1 }}", "{{ 1e999 | int }}", "{{ "),
    *("{{ cycler() }}", "{% macro f(a) %}", "{% endmacro %}", "{{ f(f(f(1))) }}"),
    *("{% generation %}", "{% endgeneration %}", "{{ 9 ** 9 ** 9 }}", "{{ self }}"),
    *("{{ messages | tojson(indent=9999) }}", "{{ [1] * 99999999 }}", "\x00", "{#"),
    *(
        "{{ ''.__class__.__mro__ }}",
        "{{ messages | slice(99999) | list }}",
        "{% raw %}",
    ),
    *(
        "{{ strftime_now('%Y') }}",
        "{{ raise_exception('x' * 99) }}",
        "{{ (((((1))))) }}",
    ),
    *("{{ 'a' | center(9999999) }}", "{% include 'x' %}", "{% import 'x' as y %}"),
    *("{{ dict(a=1).items() | list }}", "{{ joiner('x')() }}", "{{ '\ud800' }}"),
]


def _tokenizer_file() -> bytes:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pairs = [("a", "b"), ("b", "c")]
    tokens = [*alphabet, *map("".join, pairs)]
    model = tokenizers.models.BPE({t: i for i, t in enumerate(tokens)}, pairs)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.NFC(), tokenizers.normalizers.Replace(" ", "_")]
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<e> $A", special_tokens=[("<e>", 0)]
    )
    tokenizer.add_special_tokens(["<e>"])
    return tokenizer.to_str().encode()


TOKENIZER = _tokenizer_file()


def _npz_sample() -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer, **{"q.lora_A": np.ones((2, 3)), "q.lora_B": np.ones((4, 2))}
    )
    return buffer.getvalue()


NPZ = _npz_sample()
with zipfile.ZipFile(io.BytesIO(NPZ)) as _archive:
    NPZ_MEMBERS = {name: _archive.read(name) for name in _archive.namelist()}


def _gguf_sample() -> tuple[dict[str, Any], dict[str, tuple[list[int], int, bytes]]]:
    d, v = 32, 20
    shapes = {"token_embd.weight": [v, d], "output_norm.weight": [d]}
    block = {"attn_norm": [d], "ffn_norm": [d], "attn_q": [d, d], "attn_k": [d, d]}
    block |= {"attn_v": [d, d], "attn_output": [d, d], "ffn_gate": [64, d]}
    block |= {"ffn_up": [64, d], "ffn_down": [d, 64]}
    shapes |= {f"blk.0.{name}.weight": shape for name, shape in block.items()}
    tensors = {
        name: (shape, 0, bytes(4 * int(np.prod(shape))))
        for name, shape in shapes.items()
    }
    fields: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.context_length": 128,
        "llama.embedding_length": d,
        "llama.feed_forward_length": 64,
        "llama.block_count": 1,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 1e5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "</s>"]
        + [f"w{i}" for i in range(16)],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": [1, 1, 1, 3] + [1] * 16,
        "tokenizer.ggml.scores": [0.0] * 20,
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{{ messages }}",
    }
    return fields, tensors


GGUF = _gguf_sample()


def _image_samples() -> dict[str, bytes]:
    """A picture in each format that is read."""
    rng = np.random.default_rng(0)
    picture = PIL.Image.fromarray(rng.integers(0, 255, (9, 12, 3), np.uint8))
    samples = {}
    for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000"):
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        samples[kind] = buffer.getvalue()
    return samples


IMAGES = _image_samples()


def _checkpoint_sample() -> tuple[Any, dict[str, bytes]]:
    """A state, and the files of a folder with its checkpoints of two steps."""
    adapter = {"lora_a": jnp.ones((3, 2)), "lora_b": jnp.full((2, 4), 2.0)}
    variables = {"frozen": {"k": jnp.ones((3, 4))}, "lora": {"q": adapter}}
    state = TrainState.create(variables, optax.sgd(0.1), jax.random.key(3))
    with tempfile.TemporaryDirectory() as folder:
        with open_checkpoints(folder) as checkpoints:
            for step in (1, 2):
                state = state.replace(step=jnp.int32(step))
                checkpoints.save(state, {"loss": 1.0 / step})
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return state, {
            str(path.relative_to(folder)): path.read_bytes() for path in sorted(files)
        }


def open_checkpoints(folder: str | Path) -> Checkpoints:
    """Opens those of one run."""
    return Checkpoints(
        folder, config={"rank": 2}, fingerprint="1-a", best_metric="loss"
    )


STATE, CHECKPOINT = _checkpoint_sample()
