"""Makes ``gemma_peft.safetensors``: a tree of gemma.peft, and its model's output.

``pip install --no-deps gemma==3.3.0 kauldron==1.4.2 einops==0.8.2``, then
``python -m tests.golden.make_gemma_peft``. gemma draws A; B, zero at first, is changed
here.
"""

from importlib.metadata import version
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from gemma import peft  # pyright: ignore[reportMissingImports] - only to make the file
from safetensors.numpy import save_file

from lora_jax.tree.paths import flatten

EINSUMS = {
    "q_einsum": ("BTD,NDH->BTNH", (3, 6, 2)),
    "experts": ("BTD,EDH->BTEH", (2, 5, 4)),
    "each": ("BTEH,EHD->BTED", (2, 4, 3)),
}


class Projections(nn.Module):
    """The model of that name in `tests.nnx.models`, with gemma's wrappers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns ``[b, t, e, d]``."""

        def einsum(name: str, x: jax.Array) -> jax.Array:
            labels, shape = EINSUMS[name]
            layer = nn.Einsum(shape, labels, use_bias=False, name=name)
            return peft.LoRAEinsum(rank=2, wrapped=layer)(x)

        x = einsum("q_einsum", x)
        out = nn.DenseGeneral(5, axis=(-2, -1), name="out")
        x = peft.LoRADenseGeneral(rank=2, wrapped=out)(x)
        return einsum("each", einsum("experts", x))


def main() -> None:
    """Writes the file."""
    x = np.random.default_rng(0).standard_normal((1, 3, 6), np.float32)
    params = Projections().init(jax.random.key(0), x)["params"]
    base, lora = peft.split_params(params)
    lora = jax.tree.map(
        lambda v: v + 0.1 * jnp.cos(jnp.arange(v.size)).reshape(v.shape), lora
    )
    y = Projections().apply({"params": peft.merge_params(base, lora)}, x)
    arrays = {"x": x, "y": np.asarray(y)}
    for name, tree in (("base", base), ("lora", lora)):
        arrays |= {f"{name}/{path}": np.asarray(a) for path, a in flatten(tree).items()}
    file = Path(__file__).parent / "gemma_peft.safetensors"
    save_file(arrays, file, {name: version(name) for name in ("gemma", "flax")})


if __name__ == "__main__":
    main()
