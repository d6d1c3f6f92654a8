"""LoRA for a Linen model that was written without it.

``adapt(model, config)`` wraps a model without changing it. The wrapper's variables are
three collections; the model itself sees the one ``params`` tree it expects, with
``lora_a`` and ``lora_b`` beside the kernels they adapt, so its own ``nn.scan``,
``nn.remat`` or ``nn.vmap`` transform them too. Every call of a targeted layer gets
``scaling * (x A) B`` added to its output (and, with DoRA, is scaled).
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from lora_jax.array_types import PRNGKey, PyTree
from lora_jax.config import LoRAConfig
from lora_jax.names import FIXED, FROZEN, LORA, PARAMS
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
from lora_jax.tree.partition import adapter_of, join, partition, upcast_leaves
from lora_jax.tree.paths import flatten, unflatten
from lora_jax.tree.targets import Target, child, select_targets
from lora_jax.tree.token_rows import (
    TokenRows,
    base_of,
    init_token_rows,
    merge_token_rows,
    select_token_rows,
    token_rows_of,
)
from lora_jax.tree.uncovered import describe_experts, describe_uncovered

_MAPPED = (FROZEN, LORA, PARAMS, FIXED)
Method = str | Callable[..., Any] | None


class Adapted(nn.Module):
    """A model with LoRA: the same methods, with variables in three collections.

    Made by `adapt`. Call a method of the model by name or function
    (``adapted.apply(variables, x, method="encode")``), or inside another module as a
    method of this one (``self.encoder.encode(x)``).

    Attributes:
      model: the wrapped model.
      config: the adapter config.
      example: example inputs for tracing, or None.
      deterministic: disables (True) or enables (False) adapter dropout. With None, each
        call decides: by the method's argument ``deterministic`` (or ``train``,
        ``training``, ``is_training``, negated) or its default; else by the model's
        attribute of that name; else False. Disabled dropout needs no PRNG key.

    Variables: ``frozen`` (the base), ``lora`` (``lora_a``, ``lora_b`` and DoRA's
    ``magnitude`` at the paths of the adapted layers), ``params`` (base leaves that
    ``config.train`` and ``config.bias`` name, and the ``token_rows`` of
    ``config.tokens``), ``fixed`` (what an adapter has and doesn't train, such as
    ``start_a`` and ``start_b`` of PiSSA).
    """

    model: nn.Module
    config: LoRAConfig
    example: Example | None = None
    deterministic: bool | None = None

    def setup(self) -> None:
        """Shares this module's scope with the model, so paths have no extra level."""
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
        """Like `flax.linen.Module.apply`; ``method`` is a method of the model."""
        return super().apply(variables, *args, method=_on_model(method), **kwargs)

    @nn.nowrap
    def init_with_output(self, rngs, *args, method: Method = None, **kwargs) -> Any:
        """Like `flax.linen.Module.init_with_output`, for base and adapters."""
        example = Example.of(*args, method=method or "__call__", **kwargs)
        self._select(trace_model(self.model, None, example))
        return super().init_with_output(rngs, *args, method=_on_model(method), **kwargs)

    @nn.nowrap
    def init(self, rngs, *args, method: Method = None, **kwargs) -> Any:
        """Like `flax.linen.Module.init`, for base and adapters."""
        return self.init_with_output(rngs, *args, method=method, **kwargs)[1]

    @nn.nowrap
    def targets(self, params: Mapping[str, Any] | None = None) -> list[Target]:
        """Returns the adapted layers.

        Args:
          params: the model's plain parameter tree (arrays or shapes); not needed if
            example inputs were given to `adapt`.

        Returns:
          One `Target` per layer.

        Raises:
          ValueError: if the config names layers that don't exist; see `select_targets`.
        """
        return self._select(self._trace(params))

    @nn.nowrap
    def token_rows(self, params: Mapping[str, Any] | None = None) -> list[TokenRows]:
        """Returns the rows of tokens that ``config.tokens`` trains; see `targets`."""
        return select_token_rows(self._trace(params).sites, self.config)

    @nn.nowrap
    def frozen_notes(self, params: Mapping[str, Any] | None = None) -> list[str]:
        """Says which weights stay frozen that a reader may take for adapted.

        Args:
          params: see `targets`.

        Returns:
          A line on experts that the config doesn't target, and one on what
          ``"all-linear"`` can't adapt, with how to; empty if there are neither.
        """
        found = self._trace(params)
        lines = (
            describe_experts(found.sites, self.config),
            describe_uncovered(found.unsupported, self.config),
        )
        return [line for line in lines if line]

    @nn.nowrap
    def attach(self, params: Mapping[str, Any], key: PRNGKey) -> dict[str, PyTree]:
        """Adds newly initialised adapters to pretrained parameters.

        Args:
          params: the model's own tree, as in ``model.apply({"params": params}, x)``.
            Its arrays are not copied, except those that `upcast_trained` casts.
          key: PRNG key for the adapters; each layer folds in its path.

        Returns:
          ``{"frozen": ..., "lora": ..., "params": ...}``, with some methods also
          ``"fixed"``; until an adapter is trained the output is bitwise equal to the
          base's (up to rounding, if ``config.init`` starts with B other than 0). With
          DoRA it may differ by rounding
          (1e-6) where XLA sums a norm in another order than here: inside `nn.scan`, and
          for convolutions.

        Raises:
          ValueError: if ``params`` don't match the model or contain NaN, or the config
            names layers that don't exist.
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
            kernel = flat[target.weight_path]
            for name, leaf in target.init(key, kernel, self.config.start).items():
                adapters[child(target.path, name)] = leaf
        rows = init_token_rows(params, self.token_rows(params))
        return self.upcast_trained(
            partition(join(params, unflatten(adapters), rows), self.config)
        )

    @nn.nowrap
    def upcast_trained(self, variables: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """Casts fully trained weights from bfloat16 or float16 to float32.

        In bfloat16 a small update of a value near 1 is rounded away. A leaf is cast
        only if its module sets its own computation ``dtype``, so no output changes;
        with ``dtype=None``, where the parameters determine it (the embeddings of the
        built-in models), the leaf is unchanged.

        Args:
          variables: the collections.

        Returns:
          The collections, with those leaves of ``params`` in float32.
        """
        if PARAMS not in variables:
            return dict(variables)
        typed = self._trace(self.detach(variables)).typed
        return {**variables, PARAMS: upcast_leaves(variables[PARAMS], typed)}

    @nn.nowrap
    def detach(self, variables: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """Returns only the base, as a plain tree: undoes `attach` except upcasting."""
        return base_of(variables)

    @nn.nowrap
    def merge(
        self, variables: Mapping[str, PyTree], *, check: bool = True
    ) -> dict[str, PyTree]:
        """Merges the adapters into the base.

        Args:
          variables: the three collections.
          check: whether to compare the merged model with the adapted one on random
            inputs, which detects adapted weights that the model also reads directly.
            Skipped under `jax.jit` and with several processes.

        Returns:
          A plain tree for ``model.apply({"params": tree}, x)``: kernels in the base's
          dtype, fully trained weights in the dtype they were trained in.

        Raises:
          ValueError: if an adapter is missing, unexpected, or not finite; if a layer
            transforms its kernel before use, so it can't be merged; or if the merged
            model's output differs from the adapted model's.
        """
        base = nn.meta.unbox(self.detach(variables))
        found = self._trace(base)
        merged = merge_params(base, adapter_of(variables), self._select(found))
        every = select_token_rows(found.sites, self.config)
        merged = merge_token_rows(merged, token_rows_of(variables), every)
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
        """Undoes `merge`, restoring W0 bit for bit.

        Args:
          merged: the result of `merge`.
          variables: the collections it was made from.

        Returns:
          A plain tree with the base's kernels.
        """
        base = nn.meta.unbox(self.detach(variables))
        every = [*self.targets(base), *self.token_rows(base)]
        return unmerge_params(merged, base, every)

    @nn.nowrap
    def merge_errors(self, variables: Mapping[str, PyTree]) -> list[MergeError]:
        """Measures the error of merging due to rounding to the base's dtype.

        Args:
          variables: the three collections.

        Returns:
          One row per adapted layer.
        """
        base = nn.meta.unbox(self.detach(variables))
        targets = self.targets(base)
        lora = adapter_of(variables)
        merged = merge_params(base, lora, targets)
        return merge_errors(base, merged, lora, targets)

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
        if message := describe_uncovered(found.unsupported, self.config):
            warnings.warn(message, stacklevel=3)
        return chosen

    def _run(self, method: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a method of the model on the joined tree, intercepting every layer."""
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
    """Adds LoRA to any Linen model, without changing it.

    Args:
      model: an unbound module, in ``setup`` or ``compact`` style, with or without
        lifted transforms.
      config: the adapter config.
      *example_args: example inputs (arrays or `jax.ShapeDtypeStruct`), used only for
        their shapes. Not needed for models with one input, token ids or features, whose
        shape follows from the parameters.
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
        is_nnx = any(c.__module__.startswith("flax.nnx") for c in type(model).__mro__)
        raise TypeError(
            f"model must be a flax.linen Module; got {type(model).__name__}"
            + (", a flax.nnx one: use `lora_jax.nnx.adapt`." if is_nnx else ".")
        )
    if not isinstance(config, LoRAConfig):
        raise TypeError(f"config must be a LoRAConfig; got {type(config).__name__}.")
    example = None
    if example_args or example_kwargs:
        example = Example.of(*example_args, method=example_method, **example_kwargs)
    return Adapted(model, config, example, deterministic)


def _on_model(method: Method) -> Callable[..., Any]:
    return lambda adapted, *args, **kwargs: adapted._run(
        method or "__call__", *args, **kwargs
    )
