"""Makes ``qwix_nnx.safetensors``: an adapter of qwix on an NNX model, and its output.

``pip install --no-deps qwix==0.1.8``, then ``python -m tests.golden.make_qwix``. qwix
draws A; B, zero at first, is changed here.
"""

from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import qwix  # pyright: ignore[reportMissingImports] - only to make the file
from flax import nnx
from safetensors.numpy import save_file

from tests.nnx.models import Projections


def main() -> None:
    """Writes the file."""
    x = np.random.default_rng(0).standard_normal((1, 3, 6), np.float32)
    rule = qwix.LoraRule(module_path=".*", rank=2, alpha=6.0)
    base, provider = Projections(), qwix.LoraProvider([rule])
    model = qwix.apply_lora_to_model(base, provider, x, rngs=nnx.Rngs(2))
    lora = jax.tree.map(
        lambda v: v + 0.1 * jnp.cos(jnp.arange(v.size)).reshape(v.shape),
        nnx.state(model, nnx.LoRAParam),
    )
    nnx.update(model, lora)
    arrays = {"x": x, "y": np.asarray(model(x))}
    for name, state in (("base", nnx.state(base)), ("lora", lora)):
        for path, leaf in nnx.to_flat_state(state):
            arrays["/".join((name, *path))] = np.asarray(leaf[...], np.float32)
    file = Path(__file__).parent / "qwix_nnx.safetensors"
    save_file(arrays, file, {"qwix": version("qwix"), "flax": version("flax")})


if __name__ == "__main__":
    main()
