"""LoRA on a Linen model that was not written for it.

``adapt(model, config)`` wraps a model without touching it. Outside, its variables are
three collections; inside, the model sees the one ``params`` tree it was written for,
with ``lora_a`` and ``lora_b`` beside the kernels they adapt, so that its own
``nn.scan``, ``nn.remat`` or ``nn.vmap`` carry them along. Every call of a targeted
layer gets ``scaling * (x A) B`` added to its output (and is scaled, with DoRA).
"""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from lora_jax.array_types import PRNGKey, PyTree
from lora_jax.config import LoRAConfig
from lora_jax.names import FROZEN, LORA, LORA_A, LORA_B, MAGNITUDE, PARAMS
from lora_jax.nn.checks import check_kernels, check_shapes, is_deterministic
from lora_jax.nn.exactness import check_merged, is_concrete
from lora_jax.nn.intercept import make_interceptor
from lora_jax.nn.trace import (
    Example,
    Trace,
    bound_method,
    flag_scope,
    shapes_of,
    trace_model,
)
from lora_jax.tree.merge import MergeError, merge_errors, merge_params, unmerge_params
from lora_jax.tree.partition import join, partition, widened
from lora_jax.tree.paths import flatten, unflatten
from lora_jax.tree.targets import Target, child, left_out, select_targets

_MAPPED = (FROZEN, LORA, PARAMS)
Method = str | Callable[..., Any] | None


class Adapted(nn.Module):
    """A model with LoRA: the same calls, the variables in three collections.

    Made by `adapt`. A method of the model is called by name or function
    (``adapted.apply(variables, x, method="encode")``), and inside another module as a
    method of this one (``self.encoder.encode(x)``).

    Attributes:
      model: the wrapped model.
      config: what is adapted, and how.
      example: example inputs for finding the layers, or None.
      deterministic: switches adapter dropout off (True) or on (False). None takes it
        from each call: the method's argument ``deterministic`` (or ``train``,
        ``training``, ``is_training``, negated), given or by default; then the model's
        attribute of that name; then False. No PRNG key is needed where it is off.

    Variables: ``frozen`` (the base), ``lora`` (``lora_a``, ``lora_b`` and DoRA's
    ``magnitude`` at the paths of the adapted layers), ``params`` (base leaves that
    ``config.train`` and ``config.bias`` name).
    """

    model: nn.Module
    config: LoRAConfig
    example: Example | None = None
    deterministic: bool | None = None

    def setup(self) -> None:
        """Gives the model this module's scope, so that paths have no extra level."""
        nn.share_scope(self, self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model's ``__call__``."""
        return self._run("__call__", *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        """Returns the model's method ``name``, run with the adapters."""
        model = self.__dict__.get("model")
        if callable(getattr(type(model), name, None)) and not name.startswith("_"):
            return lambda *args, **kwargs: self._run(name, *args, **kwargs)
        return super().__getattr__(name)

    @nn.nowrap
    def apply(self, variables, *args, method: Method = None, **kwargs) -> Any:
        """As `flax.linen.Module.apply`; ``method`` is one of the wrapped model's."""
        return super().apply(variables, *args, method=_on_model(method), **kwargs)

    @nn.nowrap
    def init_with_output(self, rngs, *args, method: Method = None, **kwargs) -> Any:
        """As `flax.linen.Module.init_with_output`, with fresh base and adapters."""
        example = Example.of(*args, method=method or "__call__", **kwargs)
        self._select(trace_model(self.model, None, example))
        return super().init_with_output(rngs, *args, method=_on_model(method), **kwargs)

    @nn.nowrap
    def init(self, rngs, *args, method: Method = None, **kwargs) -> Any:
        """As `flax.linen.Module.init`, with fresh base and adapters."""
        return self.init_with_output(rngs, *args, method=method, **kwargs)[1]

    @nn.nowrap
    def targets(self, params: Mapping[str, Any] | None = None) -> list[Target]:
        """Returns the table of adapted layers.

        Args:
          params: the model's plain parameter tree (arrays or shapes); not needed where
            example inputs were given to `adapt`.

        Returns:
          One row a layer.

        Raises:
          ValueError: if the config names what the model has not; see `select_targets`.
        """
        return self._select(self._trace(params))

    @nn.nowrap
    def attach(self, params: Mapping[str, Any], key: PRNGKey) -> dict[str, PyTree]:
        """Puts fresh adapters beside pretrained parameters.

        Args:
          params: the model's own tree, as ``model.apply({"params": params}, x)`` takes
            it; its arrays are used as they are, uncopied, but for those that
            `upcast_trained` makes float32.
          key: PRNG key of the adapters; each layer folds in its path.

        Returns:
          ``{"frozen": ..., "lora": ..., "params": ...}``; until an adapter is trained
          the output has the bits of the base's. With DoRA it is within rounding (1e-6)
          of them where XLA sums a norm in another order than here: inside `nn.scan`,
          and for convolutions.

        Raises:
          ValueError: if ``params`` are not those of the model, hold a NaN, or the
            config names what is not there.
        """
        params = nn.meta.unbox(params)
        if set(params) == {PARAMS}:
            raise ValueError(
                f"params must be the model's own tree; got {{{PARAMS!r}: ...}}. Pass "
                f"variables[{PARAMS!r}]."
            )
        targets = self.targets(params)
        check_kernels(params, targets)
        flat, adapters = flatten(params), {}
        for target in targets:
            a, b = target.init(key, self.config.init)
            adapters[child(target.path, LORA_A)] = a
            adapters[child(target.path, LORA_B)] = b
            if target.dora:
                m = target.init_magnitude(flat[target.weight_path])
                adapters[child(target.path, MAGNITUDE)] = m
        return self.upcast_trained(
            partition(join(params, unflatten(adapters)), self.config)
        )

    @nn.nowrap
    def upcast_trained(self, variables: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """Makes what is trained in full float32 where it is bfloat16 or float16.

        A small step from a number near 1 is lost in bfloat16. A leaf is made float32
        where its module computes in a ``dtype`` of its own, so that no output changes.
        Where the parameters' dtype is that of the computation (``dtype=None``, as in
        the embeddings of the models here) the leaf stays as it is.

        Args:
          variables: the collections.

        Returns:
          The same, with such leaves of ``params`` in float32.
        """
        if PARAMS not in variables:
            return dict(variables)
        typed = self._trace(self.detach(variables)).typed
        return {**variables, PARAMS: widened(variables[PARAMS], typed)}

    @nn.nowrap
    def detach(self, variables: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """Returns the base alone, a plain tree: `attach` undone, save upcasting."""
        return join(variables[FROZEN], variables.get(PARAMS, {}))

    @nn.nowrap
    def merge(
        self, variables: Mapping[str, PyTree], *, check: bool = True
    ) -> dict[str, PyTree]:
        """Folds the adapters in.

        Args:
          variables: the three collections; left as they are.
          check: whether the merged model is run beside the adapted one on one example
            of random numbers. It tells a weight that the model also reads directly,
            where no adapter acts. Left out under `jax.jit` and for several processes.

        Returns:
          A plain tree for ``model.apply({"params": tree}, x)``: kernels in the dtype of
          the base, and what was trained in full in that of its training, unrounded.

        Raises:
          ValueError: if an adapter is missing, left over, or not finite; if a layer
            transforms its kernel before use, so that no kernel is the merged one; or if
            the merged model is not the adapted one.
        """
        base = nn.meta.unbox(self.detach(variables))
        found = self._trace(base)
        merged = merge_params(base, variables.get(LORA, {}), self._select(found))
        if check and jax.process_count() == 1 and is_concrete(merged):
            example = found.example
            check_merged(
                (self.clone(deterministic=True), variables),
                (self.model, {PARAMS: base}, {PARAMS: merged}),
                found.others,
                example.arguments(self.model),
                example.method,
            )
        return merged

    @nn.nowrap
    def unmerge(
        self, merged: Mapping[str, Any], variables: Mapping[str, PyTree]
    ) -> dict[str, PyTree]:
        """Takes the adapters out of a merged tree: W0 bit for bit, never a difference.

        Args:
          merged: the result of `merge`.
          variables: the collections it was made of.

        Returns:
          A plain tree with the base's kernels.
        """
        base = nn.meta.unbox(self.detach(variables))
        return unmerge_params(merged, base, self.targets(base))

    @nn.nowrap
    def merge_errors(self, variables: Mapping[str, PyTree]) -> list[MergeError]:
        """Measures what merging loses by rounding to the base's dtype.

        Args:
          variables: the three collections.

        Returns:
          One row an adapted layer.
        """
        base = nn.meta.unbox(self.detach(variables))
        targets = self.targets(base)
        merged = merge_params(base, variables[LORA], targets)
        return merge_errors(base, merged, variables[LORA], targets)

    @nn.nowrap
    def _trace(self, params: Mapping[str, Any] | None) -> Trace:
        found = trace_model(self.model, params, self.example)
        if params is not None:
            check_shapes(shapes_of(found.params), shapes_of(params))
        return found

    @nn.nowrap
    def _select(self, found: Trace) -> list[Target]:
        chosen = select_targets(
            found.sites,
            self.config,
            weights=flatten(found.params),
            unsupported=found.unsupported,
        )
        if left := left_out(found.unsupported, self.config):
            kinds = Counter(weight.kind for weight in left.values())
            first = {weight.kind: path for path, weight in reversed(left.items())}
            shown = ", ".join(
                f"{first[kind]} ({kind}"
                + (f", and {n - 1} more of its kind)" if n > 1 else ")")
                for kind, n in kinds.items()
            )
            warnings.warn(
                f"targets='all-linear' does not adapt {shown}: LoRA does not know "
                "their layers. `register_layer` teaches it one; `exclude` says that "
                "they are to stay as they are.",
                stacklevel=3,
            )
        return chosen

    def _run(self, method: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a method of the model on the joined tree, with every layer watched."""
        initializing = self.is_initializing()
        deterministic = self.deterministic
        if deterministic is None:
            deterministic = is_deterministic(self.model, method, args, kwargs)
        deterministic = deterministic or initializing
        assert self.scope is not None
        flag_scope(self.scope, (self.config, deterministic))
        intercept = make_interceptor(
            self.config,
            len(self.scope.path),
            deterministic=deterministic,
            initializing=initializing,
        )

        def call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with nn.intercept_methods(intercept):
                return bound_method(model, method)(*args, **kwargs)

        run = nn.map_variables(
            call,
            _MAPPED,
            trans_in_fn=lambda v: {PARAMS: join(*(v.get(c, {}) for c in _MAPPED))},
            trans_out_fn=lambda v: partition(v.get(PARAMS, {}), self.config),
            mutable=any(self.is_mutable_collection(c) for c in _MAPPED),
        )
        return run(self.model, *args, **kwargs)


def adapt(
    model: nn.Module,
    config: LoRAConfig,
    *example_args: Any,
    deterministic: bool | None = None,
    example_method: str = "__call__",
    **example_kwargs: Any,
) -> Adapted:
    """Adds LoRA to any Linen model, unchanged.

    Args:
      model: an unbound module, in ``setup`` or ``compact`` style, with or without
        lifted transforms.
      config: what to adapt, and how.
      *example_args: example inputs (arrays or `jax.ShapeDtypeStruct`), used for shapes
        alone. A model of one input, token ids or features, does without them: its
        parameters tell.
      deterministic: see `Adapted`.
      example_method: method the example inputs are for.
      **example_kwargs: example keyword arguments.

    Returns:
      A Linen module with the same call signature and methods.

    Raises:
      TypeError: if ``model`` is not a Linen module or ``config`` not a `LoRAConfig`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> model = nn.Dense(4)
      >>> x = jnp.ones((2, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> adapted = adapt(model, LoRAConfig(rank=2, alpha=4, targets=".*"))
      >>> variables = adapted.attach(params, jax.random.key(1))
      >>> base = model.apply({"params": params}, x)
      >>> bool((adapted.apply(variables, x) == base).all())
      True

    References:
      Hu et al., https://arxiv.org/abs/2106.09685, section 4.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a flax.linen Module; got {type(model).__name__}."
        )
    if not isinstance(config, LoRAConfig):
        raise TypeError(f"config must be a LoRAConfig; got {type(config).__name__}.")
    example = None
    if example_args or example_kwargs:
        example = Example.of(*example_args, method=example_method, **example_kwargs)
    return Adapted(model, config, example, deterministic)


def find_targets(
    model: nn.Module,
    params: Mapping[str, Any] | None,
    config: LoRAConfig,
    *example_args: Any,
    **example_kwargs: Any,
) -> list[Target]:
    """Returns the table of layers that ``config`` adapts in ``model``.

    Args:
      model: any Linen module.
      params: its parameter tree, arrays or shapes; None if example inputs are given.
      config: what to adapt.
      *example_args: example inputs, as in `adapt`.
      **example_kwargs: example keyword arguments.

    Returns:
      One `Target` a layer: path, kind, kernel shape, rank, alpha, scaling, trainable.

    Raises:
      ValueError: naming every pattern without a match and every target that can't be
        adapted.
    """
    return adapt(model, config, *example_args, **example_kwargs).targets(params)


def _on_model(method: Method) -> Callable[..., Any]:
    return lambda adapted, *args, **kwargs: adapted._run(
        method or "__call__", *args, **kwargs
    )
