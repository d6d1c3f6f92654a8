"""Linen models written without LoRA in mind."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp


class ResNetBlock(nn.Module):
    filters: int
    strides: int = 1

    @nn.compact
    def __call__(self, x, train: bool):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        y = nn.Conv(self.filters, (3, 3), self.strides, use_bias=False)(x)
        y = nn.relu(norm()(y))
        y = nn.Conv(self.filters, (3, 3), use_bias=False)(y)
        y = norm()(y)
        if x.shape != y.shape:
            x = nn.Conv(self.filters, (1, 1), self.strides, name="proj")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.Conv(8, (3, 3), name="conv_init")(x)
        x = ResNetBlock(8)(x, train)
        x = ResNetBlock(12, strides=2)(x, train)
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class ViTBlock(nn.Module):
    dropout_rate: float = 0.1

    @nn.compact
    def __call__(self, x, *, deterministic: bool):
        y = nn.LayerNorm()(x)
        y = nn.MultiHeadDotProductAttention(
            num_heads=4, dropout_rate=self.dropout_rate, deterministic=deterministic
        )(y, y)
        x = x + nn.Dropout(self.dropout_rate)(y, deterministic=deterministic)
        y = nn.gelu(nn.Dense(32)(nn.LayerNorm()(x)))
        y = nn.Dense(x.shape[-1])(y)
        return x + nn.Dropout(self.dropout_rate)(y, deterministic=deterministic)


class ViT(nn.Module):
    @nn.compact
    def __call__(self, images, *, deterministic: bool = True):
        x = nn.Conv(16, (4, 4), strides=4, padding="VALID", name="patches")(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        cls = self.param("cls", nn.initializers.zeros, (1, 1, 16))
        x = jnp.concatenate([jnp.tile(cls, (x.shape[0], 1, 1)), x], axis=1)
        position = self.param(
            "pos_embedding", nn.initializers.normal(0.02), (1, x.shape[1], 16)
        )
        x = x + position
        for i in range(2):
            x = ViTBlock(name=f"block_{i}")(x, deterministic=deterministic)
        return nn.Dense(3, name="head")(x[:, 0])


class DecoderBlock(nn.Module):
    """A block with the signature for a scan: carry in, carry out."""

    @nn.compact
    def __call__(self, x, _):
        y = nn.RMSNorm()(x)
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        y = nn.MultiHeadDotProductAttention(num_heads=4, name="attn")(y, y, mask=mask)
        x = x + y
        y = nn.Dense(24, use_bias=False, name="up")(nn.RMSNorm()(x))
        return x + nn.Dense(x.shape[-1], use_bias=False, name="down")(nn.silu(y)), None


class ScannedDecoder(nn.Module):
    axis: int = 0
    layers: int = 4

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(11, 16, name="embed")(ids)
        x, _ = nn.scan(
            nn.remat(DecoderBlock, prevent_cse=False),
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=self.layers,
        )(name="layers")(x, None)
        return nn.Dense(11, name="lm_head")(x)


class Residual(nn.Module):
    """A light block to scan."""

    @nn.compact
    def __call__(self, x, _):
        return x + nn.DenseGeneral((2, 3), name="heads")(x).sum(-2) @ jnp.ones(
            (3, 6)
        ), 1


class Pair(nn.Module):
    """A scan to be scanned."""

    @nn.compact
    def __call__(self, x, _):
        return nn.scan(
            Residual, variable_axes={"params": 0}, split_rngs={"params": True},
            length=2,
        )(name="inner")(x, None)  # fmt: skip


class NestedScan(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.scan(
            Pair, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )(name="outer")(x, None)[0]


class Expert(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.Dense(12, name="up")(x)
        return nn.Dense(x.shape[-1], name="down")(nn.relu(y))


class VmappedExperts(nn.Module):
    @nn.compact
    def __call__(self, x):
        gates = nn.softmax(nn.Dense(3, name="router")(x))
        experts = nn.vmap(
            Expert, in_axes=None, out_axes=0, axis_size=3,
            variable_axes={"params": 0}, split_rngs={"params": True},
        )  # fmt: skip
        return jnp.einsum("ebd,be->bd", experts(name="experts")(x), gates)


class EinsumMoE(nn.Module):
    @nn.compact
    def __call__(self, x):
        gates = nn.softmax(nn.Dense(3, name="router")(x))  # [b, t, e]
        x = jnp.einsum("btd,bte->betd", x, gates)
        x = nn.Einsum((3, 6, 10), "betd,edf->betf", name="up")(x)
        x = nn.Einsum(
            (3, 10, 6), einsum_str="b e t f, e f d -> b e t d", use_bias=False,
            name="down",
        )(nn.relu(x))  # fmt: skip
        return x.sum(1)


class RaggedLinear(nn.Module):
    """As in MaxText: kernels of all experts made by hand, for rows sorted by expert."""

    features: int
    is_transposed: bool = False

    @nn.compact
    def __call__(self, inputs, group_sizes):
        shape = (len(group_sizes), inputs.shape[-1], self.features)
        shape = (shape[0], *shape[:0:-1]) if self.is_transposed else shape
        w = self.param("w", nn.initializers.lecun_normal(batch_axis=0), shape)
        w = w.swapaxes(1, 2) if self.is_transposed else w
        return jax.lax.ragged_dot(inputs, w.astype(inputs.dtype), group_sizes)


class TransposedLinear(RaggedLinear):
    """The same, as PyTorch stores kernels."""

    is_transposed: bool = True


class RaggedMoE(nn.Module):
    @nn.compact
    def __call__(self, x):
        b, t, d = x.shape
        gates = nn.softmax(nn.Dense(3, name="router")(x).reshape(b * t, 3))
        weights, chosen = jax.lax.top_k(gates, 2)
        order = jnp.argsort(chosen.reshape(-1), stable=True)
        rows = x.reshape(b * t, d)[order // 2]
        sizes = jnp.bincount(chosen.reshape(-1), length=3)
        rows = nn.relu(RaggedLinear(10, name="wi")(rows, sizes))
        rows = TransposedLinear(d, name="wo")(rows, group_sizes=sizes)
        rows = rows[jnp.argsort(order)].reshape(b * t, 2, d)
        return jnp.einsum("nk,nkd->nd", weights, rows).reshape(b, t, d)


class EncoderDecoder(nn.Module):
    """In setup style, with additional methods and cross-attention."""

    def setup(self):
        self.shared = nn.Embed(13, 16)
        self.encoder = [nn.Dense(16), nn.Dense(16)]
        self.self_attn = nn.MultiHeadDotProductAttention(num_heads=2)
        self.cross_attn = nn.MultiHeadDotProductAttention(num_heads=2)
        self.mlp = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(16)])

    def encode(self, ids):
        x = self.shared(ids)
        for layer in self.encoder:
            x = nn.relu(layer(x))
        return x

    def decode(self, ids, memory):
        x = self.shared(ids)
        x = x + self.self_attn(x)
        x = x + self.cross_attn(x, memory)
        return self.shared.attend(self.mlp(x))

    def __call__(self, source, target):
        return self.decode(target, self.encode(source))


class Albert(nn.Module):
    """One block used three times, and one Dense called on two inputs."""

    @nn.compact
    def __call__(self, x):
        block = Expert(name="block")
        for _ in range(3):
            x = x + block(x)
        twice = nn.Dense(6, name="twice")
        return twice(x) + twice(-2 * x)


class BroadcastScan(nn.Module):
    """ALBERT by nn.scan: the parameters are broadcast, not stacked."""

    @nn.compact
    def __call__(self, x):
        return nn.scan(
            Residual, variable_broadcast="params", split_rngs={"params": False},
            length=3,
        )(name="block")(x, None)[0]  # fmt: skip


class Inner(nn.Module):
    """Has a child called ``model``, as ports from PyTorch do."""

    def setup(self):
        self.model = Expert()
        self.config = {"hidden": 6}

    def __call__(self, x):
        y = self.model(x)
        self.sow("intermediates", "hidden", y)
        return y


class Boxed(nn.Module):
    @nn.compact
    def __call__(self, x):
        init = nn.with_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp"))
        x = nn.Dense(8, kernel_init=init, name="up")(x)
        return nn.Dense(4, name="down")(x)


class Jitted(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.jit(Expert)(name="block")(x)
        return nn.jit(nn.Dense)(4, name="out")(x)


class Scaled(nn.Dense):
    """A subclass that runs the layer it extends, then its own arithmetic."""

    @nn.compact
    def __call__(self, inputs):
        return 2.0 * super().__call__(inputs)


class Odds(nn.Module):
    """Axes out of order, arguments by name, lifted layers, a group convolution."""

    @nn.compact
    def __call__(self, x):  # [b, 4, 6]
        y = nn.DenseGeneral((2, 4), axis=(-1, 1), name="general")(x)  # [b, 2, 4]
        y = Scaled(8, name="scaled")(inputs=y)
        y = nn.Conv(4, 3, feature_group_count=2, name="conv")(y)
        y = nn.remat(nn.Dense)(3, name="rematted")(y)
        return nn.Einsum((3, 5), name="einsum")(einsum_str="btd,df->btf", inputs=y)
