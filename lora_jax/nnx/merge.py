"""Merging the adapters of an NNX model into its base, and unmerging them.

Both return a model of the plain classes and leave the adapted one as it is. Unmerging
takes W0 from it, bit for bit; nothing is subtracted.
"""

from typing import Any

from flax import nnx

from lora_jax.array_types import PyTree
from lora_jax.names import ADAPTER_LEAVES
from lora_jax.nnx.adapt import TrainedParam, lora_targets
from lora_jax.nnx.exactness import check_merged
from lora_jax.nnx.factors import STREAM
from lora_jax.nnx.find import params_of, rebuild, shared_weights
from lora_jax.nnx.layers import LoRALayer, base_class, on_auto_axes, set_class
from lora_jax.tree.merge import MergeError, merge_params
from lora_jax.tree.merge import merge_errors as errors_of
from lora_jax.tree.paths import flatten, unflatten
from lora_jax.tree.targets import Target, child


def merge(model: nnx.Module, *example_args: Any, **example_kwargs: Any) -> Any:
    """Returns the plain model with the adapters merged into its kernels.

    Each kernel ``W0 + scaling * A B`` is computed in float32 and rounded once to its
    own dtype. Works under `flax.nnx.jit`, but without the check for NaN.

    Args:
      model: a model with adapters; not changed.
      *example_args: arguments of a call of the model, to compare the merged model with
        the adapted one. This detects adapted weights that the model also reads
        directly, such as a tied head written as ``x @ embedding.T``.
      **example_kwargs: keyword arguments of the call.

    Returns:
      A model of the classes that were adapted, with the other Variables of ``model``;
      weights trained in full are `flax.nnx.Param` in the dtype they were trained in.

    Raises:
      ValueError: if there is no adapter, an adapter or a merged kernel is not finite,
        or an adapted kernel is also another module's; or if the merged model's output
        for the example differs from the adapted model's.

    Example:
      >>> import jax.numpy as jnp
      >>> from lora_jax import LoRAConfig
      >>> from lora_jax.nnx import adapt
      >>> config = LoRAConfig(rank=2, alpha=4, targets=".*")
      >>> model = adapt(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
      >>> x = jnp.ones((2, 3))
      >>> type(merge(model)).__name__, bool((merge(model)(x) == model(x)).all())
      ('Linear', True)
    """
    targets = lora_targets(model)
    weights = params_of(model)
    _check_unshared(model, targets)
    merged = _plain(model, weights, _merged(weights, targets))
    if example_args or example_kwargs:
        base, example = unmerge(merged, model), (example_args, example_kwargs)
        check_merged(model, base, merged, example)
    return merged


def unmerge(merged: nnx.Module, model: nnx.Module) -> Any:
    """Undoes `merge`, restoring W0 bit for bit.

    Args:
      merged: the result of `merge`, or a plain model of the same structure.
      model: the model that it was made from.

    Returns:
      A model like ``merged`` with the kernels of ``model`` without their adapters.
    """
    base = params_of(model)
    weights = params_of(merged)
    paths = [target.weight_path for target in lora_targets(model)]
    replaced = {id(weights[path]): base[path] for path in paths}
    return rebuild(merged, replaced, lambda path, module: None)


def merge_errors(model: nnx.Module) -> list[MergeError]:
    """Measures the error of merging due to rounding to the base's dtype.

    Args:
      model: a model with adapters.

    Returns:
      One row per adapted layer.
    """
    targets, weights = lora_targets(model), params_of(model)
    base, adapters = _arrays(weights, targets)
    return errors_of(base, merge_params(base, adapters, targets), adapters, targets)


def _arrays(
    weights: dict[str, nnx.Param], targets: list[Target]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the trees of the base and of the adapters."""
    leaves = [child(t.path, name) for t in targets for name in t.leaf_shapes]
    adapters = {path: weights[path][...] for path in leaves}
    base = {t.weight_path: weights[t.weight_path][...] for t in targets}
    return unflatten(base), unflatten(adapters)


def _merged(weights: dict[str, nnx.Param], targets: list[Target]) -> dict[str, Any]:
    base, adapters = _arrays(weights, targets)

    def merged(base: PyTree, adapters: PyTree) -> PyTree:
        return merge_params(base, adapters, targets)

    return flatten(on_auto_axes(merged, base, base, adapters))


def _plain(
    model: nnx.Module, weights: dict[str, nnx.Param], kernels: dict[str, Any]
) -> Any:
    """Returns the model with plain classes, plain Params, and new kernels."""
    replaced: dict[int, nnx.Variable] = {
        id(weight): nnx.Param(
            kernels.get(path, weight.get_value()), **weight.get_metadata()
        )
        for path, weight in weights.items()
        if path in kernels or isinstance(weight, TrainedParam)
    }

    def change(path: str, module: Any) -> None:
        del path
        if not isinstance(module, LoRALayer):
            return
        own = (*ADAPTER_LEAVES, STREAM, "lora")
        if STREAM in vars(module):
            own = (*own, "deterministic")
        for name in own:
            if name in vars(module):
                delattr(module, name)
        set_class(module, base_class(type(module)))

    return rebuild(model, replaced, change)


def _check_unshared(model: nnx.Module, targets: list[Target]) -> None:
    """Raises if an adapted kernel is another module's too."""
    adapted = {target.weight_path for target in targets}
    groups = [group for group in shared_weights(model) if adapted & {*group}]
    if shared := [" and ".join(group) for group in groups]:
        raise ValueError(
            f"{'; '.join(shared)} are one array, which can't be merged for each of its "
            "modules. Use the model unmerged."
        )
