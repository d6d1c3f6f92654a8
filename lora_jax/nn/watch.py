"""Recording which layers a model's ``init`` calls, and where lifted axes go.

The model's ``init`` is traced abstractly (no memory, no arithmetic), intercepting every
layer call. A marker parameter written beside each kernel gets the same new axes from
``nn.scan`` or ``nn.vmap`` as the kernel. The marker's own axes have a unique size, so
the positions of the new axes are unambiguous.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core.scope import Scope

from lora_jax.config import LoRAConfig
from lora_jax.names import BIAS, FROZEN, LORA, PARAMS
from lora_jax.nn.apply import call_inputs, rule_of_call
from lora_jax.nn.exactness import is_exact, is_own_arithmetic, may_be_inexact
from lora_jax.nn.layer_rules import CALL, LayerRule
from lora_jax.ops.contraction import Contraction
from lora_jax.ops.dora import magnitude_shape
from lora_jax.tree.paths import flatten, unflatten
from lora_jax.tree.targets import LINEAR_KINDS, Site, UnsupportedWeight, child

FLAG = "lora_jax"  # flag of scopes being traced or run with LoRA
_MARKERS = ("__kernel_marker", "__a_marker", "__b_marker", "__magnitude_marker")
_ODD_SIZE = 1_000_003  # size of a marker's own axes; not a plausible layer count
# Modules that rewrite every parameter of the layer they call, A and B included.
_REWRITING = (nn.WeightNorm, nn.SpectralNorm)


class Watcher:
    """An interceptor for `flax.linen.intercept_methods` around a model's ``init``.

    Attributes:
      unsupported: weights that can't be adapted, by path, after `finish`.
      configs: the LoRA layers' own configs, by path.
      typed: by path, whether a module's output dtype is its ``dtype`` attribute.
    """

    def __init__(self, lora_layers_only: bool):
        self.unsupported: dict[str, UnsupportedWeight] = {}
        self.configs: dict[str, LoRAConfig] = {}
        self.typed: dict[str, bool] = {}
        self._lora_layers_only = lora_layers_only
        self._beside = LORA if lora_layers_only else PARAMS  # collection of A and B
        self._found: dict[str, tuple[str, str, Contraction]] = {}
        self._refused: dict[str, str] = {}  # why a registered layer can't be adapted
        self._transformed: set[str] = set()
        self._calling: list[type[nn.Module]] = []  # the stack of active calls
        self._tried: dict[Any, bool] = {}

    def __call__(self, next_fun, args, kwargs, context) -> Any:
        """Runs a method of a module, and records its layer and weights."""
        module, scope = context.module, context.module.scope
        if not is_flagged(scope):  # applied to its own variables
            return next_fun(*args, **kwargs)
        self._calling.append(type(module))
        y = next_fun(*args, **kwargs)
        self._calling.pop()
        path = "/".join(scope.path) if scope else ""
        own, made = getattr(module, "dtype", None), jax.tree.leaves(y)
        if own is not None and made:
            is_own = all(getattr(leaf, "dtype", own) == own for leaf in made)
            self.typed[path] = self.typed.get(path, True) and is_own
        rule = rule_of_call(context, lora_layers_only=self._lora_layers_only)
        if rule is not None:
            inputs = call_inputs(context.orig_method, args, kwargs)
            self._add(path, module, rule, context.method_name, inputs)
        self._add_weights(path, module, rule)
        return y

    def finish(
        self, variables: Mapping[str, Any]
    ) -> tuple[dict[str, Any], tuple[Site, ...]]:
        """Returns the base's parameter shapes, nested, and the adaptable layers.

        ``variables`` are the shapes of everything ``init`` returned, markers included.
        """
        flat, markers = {}, {}
        for collection in (FROZEN, PARAMS, LORA):
            tree = nn.meta.unbox(variables.get(collection, {}))
            for path, leaf in flatten(tree).items():
                if path.endswith(_MARKERS):
                    markers[path] = leaf
                elif collection != LORA:
                    flat[path] = leaf
        found = {p: layer for p, layer in self._found.items() if p not in self._refused}
        self.unsupported = {
            path: weight
            for path, weight in self.unsupported.items()
            if path.rpartition("/")[0] not in found
        }
        sites = []
        for path, (kind, weight, contraction) in found.items():
            marked = (markers[child(path, name)].shape for name in _MARKERS)
            in_kernel, *in_leaves = (
                tuple(axis for axis, size in enumerate(shape) if size != _ODD_SIZE)
                for shape in marked
            )
            shape = flat[child(path, weight)].shape
            stacked = contraction.stacked(in_kernel)
            is_plain = path not in self._transformed
            sites.append(
                Site(path, kind, weight, shape, stacked, *in_leaves, is_plain=is_plain)
            )
        return unflatten(flat), tuple(sites)

    def _add(
        self, path: str, module: nn.Module, rule: LayerRule, method: str, inputs: tuple
    ) -> None:
        """Records a layer, or why it can't be adapted."""
        contraction = find_contraction(rule, module, method, inputs)
        rewriting = next((cls for cls in self._calling if cls in _REWRITING), None)
        why = None
        if rewriting is not None:
            why = (
                f"nn.{rewriting.__name__} rewrites its parameters on each call, which "
                "would include A and B"
            )
        elif isinstance(contraction, str):
            why = contraction
        elif self._found.get(path, (contraction,))[-1] != contraction:
            why = f"its calls use the axes of {rule.weight} differently"
        elif not self._is_exact(module, rule, method, inputs):
            self._transformed.add(path)
            if is_own_arithmetic(module):
                why = "its registered equation does not reproduce its output"
        if why is not None:
            self._refused[path] = why
        # Not "path not in found": a lifted transform may trace a layer again.
        elif not module.scope.has_variable(self._beside, _MARKERS[1]):  # pyright: ignore[reportOptionalMemberAccess] - bound
            assert isinstance(contraction, Contraction)
            self._found[path] = (rule.kind, rule.weight, contraction)
            self._put_markers(module.scope, rule.weight, contraction)
            if self._lora_layers_only:
                self.configs[path] = module.lora  # pyright: ignore[reportAttributeAccessIssue] - a LoRA layer

    def _is_exact(
        self, module: nn.Module, rule: LayerRule, method: str, inputs: tuple
    ) -> bool:
        if self._lora_layers_only or not may_be_inexact(module):
            return True
        shapes = jax.tree.map(jnp.shape, nn.meta.unbox(dict(module.variables)))
        known = (type(module), method, str(shapes))
        if known not in self._tried:
            self._tried[known] = is_exact(module, rule, method, inputs)
        return self._tried[known]

    def _add_weights(
        self, path: str, module: nn.Module, rule: LayerRule | None
    ) -> None:
        """Records a module's own weights with at least two axes."""
        for name, value in module.variables.get(PARAMS, {}).items():
            leaf = nn.meta.unbox(value)
            if name in (BIAS, *_MARKERS) or isinstance(leaf, Mapping):
                continue
            shape = max(map(jnp.shape, jax.tree.leaves(leaf)), default=(), key=len)
            if len(shape) < 2 or (
                rule is None and child(path, name) in self.unsupported
            ):
                continue
            self.unsupported[child(path, name)] = UnsupportedWeight(
                kind=type(module).__name__,
                is_linear=rule is not None and rule.kind in LINEAR_KINDS,
                why=self._refused.get(path, ""),
                shape=shape,
            )

    def _put_markers(self, scope: Any, weight: str, contraction: Contraction) -> None:
        """Writes markers with the axes of kernel, A, B and m, all of unique size."""
        held = FROZEN if scope.has_variable(FROZEN, weight) else PARAMS
        kernel = nn.meta.unbox(scope.get_variable(held, weight)).shape
        a, b = contraction.factor_shapes(kernel, 1)
        shapes = (kernel, a, b, magnitude_shape(kernel, contraction))
        for name, shape in zip(_MARKERS, shapes, strict=True):
            marker = jnp.zeros((_ODD_SIZE,) * len(shape), jnp.int8)
            scope.put_variable(
                held if name == _MARKERS[0] else self._beside, name, marker
            )


def is_flagged(scope: Scope | None) -> bool:
    """Returns whether a scope, or one above it, was marked with `FLAG`."""
    return scope is not None and FLAG in scope.flags


def find_contraction(
    rule: LayerRule, module: nn.Module, method: str, inputs: tuple[Any, ...]
) -> Contraction | str:
    """Returns the contraction of a layer's weight, or why it has none."""
    try:
        if method != CALL:  # an embedding's contraction needs no inputs
            return rule.contraction(module)
        return rule.contraction(module, *inputs)
    except ValueError as error:
        return str(error)
