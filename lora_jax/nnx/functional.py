"""An NNX model as pure functions of collections, as a Linen module is.

The training step, the losses, checkpoints and files of this library take a module's
``apply`` and its variables. `functional` gives both for an NNX model: the structure
once, outside the step, and the arrays in the collections ``frozen`` (W0), ``lora``,
``params`` (weights trained in full) and ``state`` (what isn't a `flax.nnx.Param`).
"""

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lora_jax.array_types import PyTree
from lora_jax.names import FIXED, FROZEN, LORA, PARAMS, SAVED
from lora_jax.nnx.adapt import TrainedParam
from lora_jax.nnx.factors import FixedParam
from lora_jax.nnx.find import as_path
from lora_jax.ops.init import path_key
from lora_jax.tree.merge import leaf_faults
from lora_jax.tree.paths import flatten, unflatten

STATE = "state"  # the collection of batch statistics, caches and random streams


class Functional:
    """An NNX model without its arrays; made by `functional`.

    Attributes:
      graphdef: its structure.
    """

    def __init__(self, model: nnx.Module) -> None:
        self.graphdef, state = nnx.split(model, graph=True)
        leaves, self._treedef = jax.tree.flatten_with_path(state, is_leaf=_is_variable)
        paths = [as_path(tuple(key.key for key in keys)) for keys, _ in leaves]
        found = [leaf for _, leaf in leaves]
        self._leaves = [
            (path, collection_of(leaf), _stream_of(leaf), jax.tree.structure(leaf))
            for path, leaf in zip(paths, found, strict=True)
        ]

    def bind(
        self,
        variables: Mapping[str, PyTree],
        *,
        rngs: Mapping[str, jax.Array] | None = None,
        deterministic: bool | None = None,
    ) -> Any:
        """Returns the model with the given arrays.

        Args:
          variables: the collections.
          rngs: a PRNG key for each stream to seed, ``{"dropout": key}``; the path of
            each stream is folded in.
          deterministic: disables (True) or enables (False) dropout; None disables it
            without ``rngs``, and otherwise leaves the model as it was. Where it is
            disabled, batch norms use their running averages.

        Returns:
          An NNX module. What it changes in its own Variables is not kept.

        Raises:
          KeyError: if an array is missing.
        """
        flat = {name: flatten(tree) for name, tree in variables.items()}
        leaves = []
        for path, collection, stream, structure in self._leaves:
            value = flat[collection][path]
            if rngs and stream is not None and stream in rngs:
                key = path_key(rngs[stream], path)
                value = jax.random.split(key, value.shape) if value.shape else key
            leaves.append(jax.tree.unflatten(structure, jax.tree.leaves(value)))
        state = jax.tree.unflatten(self._treedef, leaves)
        model: Any = nnx.merge(self.graphdef, state)
        if deterministic or (deterministic is None and not rngs):
            model.eval()
        elif deterministic is not None:
            model.set_attributes(deterministic=False, raise_if_not_found=False)
        return model

    def apply(
        self,
        variables: Mapping[str, PyTree],
        *args: Any,
        method: str = "__call__",
        rngs: Mapping[str, jax.Array] | None = None,
        deterministic: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Calls a method of the model, as `flax.linen.Module.apply` does.

        Args:
          variables: the collections.
          *args: arguments of the method.
          method: its name.
          rngs: as for `bind`.
          deterministic: as for `bind`; also passed on to a method that takes it.
          **kwargs: keyword arguments of the method.

        Returns:
          The method's result.

        Raises:
          ValueError: if it is given Linen's ``mutable``, as `make_lm_loss` does with
            a ``router_aux_loss_coef``.
        """
        model = self.bind(variables, rngs=rngs, deterministic=deterministic)
        function = getattr(model, method)
        if "mutable" in kwargs and not _takes(function, "mutable"):
            raise ValueError(
                f"mutable must not be given for an NNX model, which sows into its own "
                f"Variables; got mutable={kwargs['mutable']!r}. For a load-balancing "
                "loss set router_aux_loss_coef=0, and add `lora_jax.balance_loss` of "
                "the routers' scores in a loss of your own."
            )
        if deterministic is not None and _takes(function, "deterministic"):
            kwargs["deterministic"] = deterministic
        return function(*args, **kwargs)


def functional(model: nnx.Module) -> tuple[Functional, dict[str, PyTree]]:
    """Splits a model into its structure and its arrays, for training steps and files.

    Args:
      model: any NNX module, with or without adapters; its arrays are not copied.

    Returns:
      The structure, with ``apply`` and ``bind``, and the collections.

    Example:
      >>> from lora_jax import LoRAConfig
      >>> from lora_jax.nnx import adapt
      >>> config = LoRAConfig(rank=2, targets=".*")
      >>> model = adapt(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), config, rngs=nnx.Rngs(1))
      >>> module, variables = functional(model)
      >>> sorted(variables), sorted(variables["lora"])
      (['frozen', 'lora'], ['lora_a', 'lora_b'])
      >>> module.apply(variables, jnp.ones((2, 3))).shape
      (2, 4)
    """
    flat: dict[str, dict[str, Any]] = {FROZEN: {}, LORA: {}}
    for parts, leaf in nnx.to_flat_state(nnx.state(model, graph=True)):
        flat.setdefault(collection_of(leaf), {})[as_path(parts)] = leaf.get_value()
    return Functional(model), {name: unflatten(leaves) for name, leaves in flat.items()}


def update(model: nnx.Module, variables: Mapping[str, PyTree]) -> None:
    """Writes trained arrays into a model: ``lora``, ``params`` and ``fixed``.

    Args:
      model: the model with adapters that the variables are of.
      variables: collections, such as ``state.variables`` of a `TrainState`.

    Raises:
      ValueError: listing every array that is missing, unknown or of another shape; then
        nothing is written.
    """
    given = flatten({name: variables.get(name, {}) for name in SAVED})
    own = {}
    for parts, leaf in nnx.iter_graph(model, graph=True):
        if _is_variable(leaf) and (collection := collection_of(leaf)) in SAVED:
            own[f"{collection}/{as_path(parts)}"] = leaf
    shapes = {path: leaf.shape for path, leaf in own.items()}
    faults = leaf_faults(given, shapes, "is not in the model")
    if faults:
        raise ValueError(f"the variables don't fit the model: {'; '.join(faults)}.")
    for path, leaf in own.items():
        leaf.set_value(jnp.asarray(given[path]))


def collection_of(leaf: nnx.Variable) -> str:
    """Returns the collection of a Variable, by its type."""
    if isinstance(leaf, TrainedParam):
        return PARAMS
    if isinstance(leaf, nnx.LoRAParam):
        return LORA
    if isinstance(leaf, FixedParam):
        return FIXED
    return FROZEN if isinstance(leaf, nnx.Param) else STATE


def _stream_of(leaf: nnx.Variable) -> str | None:
    """Returns the name of the random stream whose key a Variable is."""
    return leaf.get_metadata().get("tag") if isinstance(leaf, nnx.RngKey) else None


def _is_variable(leaf: Any) -> bool:
    return isinstance(leaf, nnx.Variable)


def _takes(function: Any, name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters
