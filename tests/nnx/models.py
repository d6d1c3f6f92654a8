"""NNX models in the styles of other people's, none of which knows LoRA."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lora_jax.nnx as lnnx


class Case(NamedTuple):
    """A model, its inputs and the layers that a test adapts."""

    make: Callable[[Any], nnx.Module]
    inputs: jax.Array
    targets: list[str]
    count: int  # of adapted layers


class Einsum(nnx.Module):
    """As in tunix: the weight is ``w``, the equation an attribute."""

    def __init__(self, einsum_str, shape, *, rngs, param_dtype):
        self.einsum_str, self.shape = einsum_str, shape
        self.w = nnx.Param(0.3 * rngs.params.normal(shape, param_dtype))

    @jax.named_scope("einsum")
    def __call__(self, x):
        return jnp.einsum(self.einsum_str, x, self.w[...])


class Embedder(nnx.Module):
    """As in tunix's Gemma: scaled rows, and the tied head."""

    def __init__(self, vocab_size, embed_dim, *, rngs, param_dtype):
        shape = (vocab_size, embed_dim)
        self.input_embedding = nnx.Param(rngs.params.normal(shape, param_dtype))

    def encode(self, x):
        x = self.input_embedding[(x,)]
        return x * jnp.sqrt(x.shape[-1]).astype(x.dtype)

    def decode(self, x):
        return jnp.dot(x, self.input_embedding[...].T)


class RMSNorm(nnx.Module):
    def __init__(self, dim, *, rngs, param_dtype):
        self.scale = nnx.Param(nnx.initializers.zeros_init()(rngs.params(), dim))

    def __call__(self, x):
        wide = x.astype(jnp.float32)
        var = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        y = wide * jax.lax.rsqrt(var + 1e-6) * (1 + self.scale[...])
        return y.astype(x.dtype)


class GemmaAttention(nnx.Module):
    def __init__(self, d, n, k, h, **kinds):
        self.q_einsum = Einsum("BTD,NDH->BTNH", (n, d, h), **kinds)
        self.kv_einsum = Einsum("BSD,CKDH->CBSKH", (2, k, d, h), **kinds)
        self.attn_vec_einsum = Einsum("BTNH,NHD->BTD", (n, h, d), **kinds)

    def __call__(self, x):
        key, value = self.kv_einsum(x)
        y = jax.nn.dot_product_attention(self.q_einsum(x), key, value, is_causal=True)
        return self.attn_vec_einsum(y)


class GemmaBlock(nnx.Module):
    def __init__(self, d, **kinds):
        self.pre_attention_norm = RMSNorm((d,), **kinds)
        self.attn = GemmaAttention(d, 3, 1, 4, **kinds)
        self.pre_ffw_norm = RMSNorm((d,), **kinds)
        self.gate_proj, self.up_proj = (
            nnx.Linear(d, 10, use_bias=False, **kinds) for _ in range(2)
        )
        self.down_proj = nnx.Linear(10, d, use_bias=False, **kinds)

    def __call__(self, x):
        x = x + self.attn(self.pre_attention_norm(x))
        y = self.pre_ffw_norm(x)
        return x + self.down_proj(nnx.gelu(self.gate_proj(y)) * self.up_proj(y))


class Gemma(nnx.Module):
    def __init__(self, kinds):
        self.embedder = Embedder(11, 6, **kinds)
        self.layers = nnx.List([GemmaBlock(6, **kinds) for _ in range(2)])
        self.final_norm = RMSNorm((6,), **kinds)

    def __call__(self, ids):
        x = self.embedder.encode(ids)
        for layer in self.layers:
            x = nnx.remat(lambda layer, x: layer(x))(layer, x)
        return self.embedder.decode(self.final_norm(x))


class ViT(nnx.Module):
    def __init__(self, kinds):
        self.patches = nnx.Conv(3, 6, (2, 2), strides=(2, 2), padding="VALID", **kinds)
        self.position = nnx.Param(jnp.ones((1, 4, 6), kinds["param_dtype"]))
        attend = {"decode": False, "dropout_rate": 0.1, **kinds}
        self.attention = nnx.MultiHeadAttention(2, 6, **attend)
        self.norm = nnx.LayerNorm(6, **kinds)
        mlp = (nnx.Linear(6, 9, **kinds), nnx.gelu, nnx.Linear(9, 6, **kinds))
        self.mlp = nnx.Sequential(*mlp)
        self.head = nnx.Linear(6, 5, **kinds)

    def __call__(self, images):
        x = self.patches(images)
        x = x.reshape(len(x), -1, x.shape[-1]) + self.position[...]
        x = x + self.attention(self.norm(x))
        return self.head((x + self.mlp(x)).mean(1))


class MlpBlock(nnx.Module):
    def __init__(self, rngs, param_dtype):
        self.up = nnx.Linear(6, 9, param_dtype=param_dtype, rngs=rngs)
        self.down = nnx.Linear(9, 6, param_dtype=param_dtype, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(self.down(nnx.gelu(self.up(x))))


class ScannedMlp(nnx.Module):
    """Three blocks in one, made by `nnx.vmap` and run by `nnx.scan` over remat."""

    def __init__(self, kinds):
        make = nnx.vmap(lambda rngs: MlpBlock(rngs, kinds["param_dtype"]))
        self.blocks = nnx.split_rngs(splits=3)(make)(kinds["rngs"])

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def run(x, block):
            return block(x)

        return run(x, self.blocks)


class BatchNormNet(nnx.Module):
    def __init__(self, kinds):
        self.conv = nnx.Conv(3, 9, (3,), feature_group_count=3, **kinds)
        self.norm = nnx.BatchNorm(9, **kinds)
        self.head = nnx.Linear(9, 5, **kinds)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean(1))


class Shared(nnx.Module):
    """One layer under two names, used many times, and a tied head."""

    def __init__(self, kinds):
        self.embed = nnx.Embed(11, 6, **kinds)
        self.block = nnx.Linear(6, 6, **kinds)
        self.again = self.block

    def __call__(self, ids):
        x = self.embed(ids)
        for layer in (self.block, self.again, self.block):
            x = x + nnx.gelu(layer(x))
        return self.embed.attend(x)


class Containers(nnx.Module):
    def __init__(self, kinds):
        self.experts = nnx.Einsum("bei,eio->beo", (2, 6, 5), (2, 5), **kinds)
        self.layers = nnx.List([nnx.Linear(6, 6, **kinds) for _ in range(2)])
        general = nnx.LinearGeneral(6, (2, 3), **kinds)
        self.heads = nnx.Dict(a=general, b=nnx.data([nnx.Linear(6, 6, **kinds)]))

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.gelu(layer(x))
        y = self.heads["a"](x).reshape(x.shape) + self.heads["b"][0](x)
        return self.experts(jnp.stack([x, y], axis=-2))


class Experts(nnx.Module):
    """Rows sorted by expert, each multiplied by the matrix of its own."""

    def __init__(self, i, o, *, rngs, param_dtype):
        self.w = nnx.Param(rngs.params.normal((3, i, o), param_dtype))

    def __call__(self, x, sizes):
        return jax.lax.ragged_dot(x, self.w[...], sizes)


lnnx.register_layer(Experts, "mi,eio->mo", weight="w")


class TurnedExperts(nnx.Module):
    """The same, stored transposed."""

    def __init__(self, i, o, *, rngs, param_dtype):
        self.w = nnx.Param(rngs.params.normal((3, o, i), param_dtype))

    def __call__(self, x, sizes):
        return jax.lax.ragged_dot(x, self.w[...].swapaxes(1, 2), sizes)


lnnx.register_layer(TurnedExperts, "mi,eoi->mo", weight="w")


class Mixture(nnx.Module):
    def __init__(self, kinds):
        self.router = nnx.Linear(6, 3, **kinds)
        self.up, self.down = Experts(6, 5, **kinds), TurnedExperts(5, 6, **kinds)

    def __call__(self, x):
        expert = jnp.argmax(self.router(x), axis=-1)
        order, sizes = jnp.argsort(expert), jnp.bincount(expert, length=3)
        y = self.down(nnx.gelu(self.up(x[order], sizes=sizes)), sizes)
        return x + y[jnp.argsort(order)]


class Projections(nnx.Module):
    """One layer of each kind that qwix and gemma.peft adapt, without activations."""

    def __init__(self):
        kinds = {"rngs": nnx.Rngs(0), "param_dtype": jnp.float32}
        self.q_einsum = Einsum("BTD,NDH->BTNH", (3, 6, 2), **kinds)
        self.out = nnx.LinearGeneral((3, 2), 5, axis=(-2, -1), rngs=nnx.Rngs(1))
        self.experts = Einsum("BTD,EDH->BTEH", (2, 5, 4), **kinds)
        self.each = Einsum("BTEH,EHD->BTED", (2, 4, 3), **kinds)

    def __call__(self, x):
        return self.each(self.experts(self.out(self.q_einsum(x))))


def _normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(7), shape)


_IDS = jnp.arange(10).reshape(2, 5) % 11
_GEMMA = ["embedder", "q_einsum", "kv_einsum", "attn_vec_einsum", "gate_proj"]
_LISTED = ["experts", "layers/1", "a", "b/0"]
CASES = {
    "gemma": Case(Gemma, _IDS, [*_GEMMA, "down_proj"], 11),
    "vit": Case(ViT, _normal(2, 4, 4, 3), ["patches", "query", "value", "out", "0"], 5),
    "scanned": Case(ScannedMlp, _normal(4, 6), ["up", "down"], 2),
    "batchnorm": Case(BatchNormNet, _normal(2, 7, 3), ["conv", "head"], 2),
    "shared": Case(Shared, _IDS, ["block", "embed"], 2),
    "containers": Case(Containers, _normal(4, 6), _LISTED, 4),
    "mixture": Case(Mixture, _normal(7, 6), ["up", "down"], 2),
}


def build(name: str, dtype: Any = jnp.float32) -> Any:
    """Returns a model of `CASES` in inference mode, with weights drawn by NumPy."""
    kinds = {"param_dtype": dtype}
    abstract = nnx.eval_shape(lambda: CASES[name].make({"rngs": nnx.Rngs(0), **kinds}))
    graphdef, state = nnx.split(abstract)
    draw = np.random.default_rng(0)

    def filled(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            keys = np.zeros((*leaf.shape, 2), np.uint32)
            return jax.random.wrap_key_data(jnp.asarray(keys))
        value = 1 + draw.standard_normal(leaf.shape) / 3
        return jnp.asarray(value if leaf.ndim < 2 else value - 1, leaf.dtype)

    model: Any = nnx.merge(graphdef, jax.tree.map(filled, state))
    model.eval()
    return model


def train_a_little(model: Any) -> Any:
    """Returns a copy whose A, B and magnitudes are changed, so none is silent."""
    graphdef, trained, frozen = nnx.split(model, nnx.LoRAParam, ...)

    def changed(x):
        shift = 0.2 * np.cos(np.arange(x.size)).reshape(x.shape)
        return jnp.asarray(np.asarray(x) + shift, jnp.float32)

    return nnx.merge(graphdef, jax.tree.map(changed, trained), frozen)


def forward(model: Any) -> Any:
    """Returns ``state, *inputs -> output``, compiled, with all weights as arguments."""
    graphdef = nnx.graphdef(model)
    return jax.jit(lambda state, *x: nnx.merge(graphdef, state, copy=True)(*x))
