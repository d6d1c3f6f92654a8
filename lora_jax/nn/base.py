"""Base classes of LoRA layers: W0 in ``frozen``, A and B in ``lora``.

Methods such as PiSSA also declare variables in ``fixed``; the lifted transforms of a
model that uses them need it among their ``variable_axes``, like ``frozen`` and
``lora``.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_jax.array_types import AnyFloat
from lora_jax.config import LoRAConfig
from lora_jax.names import (
    ADAPTER,
    FIXED,
    FROZEN,
    LORA,
    LORA_A,
    MAGNITUDE,
    PARAMS,
    START_A,
    VERA_D,
)
from lora_jax.nn.apply import (
    adapted_query,
    apply_adapter,
    base_weight,
    init_factors,
)
from lora_jax.nn.checks import check_factors_fit
from lora_jax.nn.layer_rules import CALL, rule_of
from lora_jax.ops.factors import Factors
from lora_jax.tree.targets import LINEAR_KINDS, child


def check_config(lora: Any) -> None:
    """Raises unless a module's ``lora`` is a `LoRAConfig` that LoRA layers can serve.

    Raises:
      TypeError: if it is something else.
      ValueError: if it has ``tokens``.
    """
    if not isinstance(lora, LoRAConfig):
        raise TypeError(
            f"lora must be a LoRAConfig; got {type(lora).__name__}. "
            "LoRAConfig.from_dict makes one from a dictionary."
        )
    check_no_tokens(lora)


def check_no_tokens(lora: LoRAConfig) -> None:
    """Raises a `ValueError` if rows of tokens are to be trained."""
    if lora.tokens:
        raise ValueError(
            "tokens must be empty here: rows of tokens are trained in a Linen model "
            "that `lora_jax.adapt` wraps, not by LoRA layers or NNX; got "
            f"{lora.tokens}."
        )


class FrozenLayer(nn.Module):
    """Keeps a Linen layer's parameters out of training.

    Inherit from it before the Linen class, whose parameters are then declared in
    ``frozen``, or in ``params`` if the config trains them in full.

    Attributes:
      lora: the adapter config of the whole model.
    """

    lora: LoRAConfig = LoRAConfig()

    def __post_init__(self) -> None:
        """Raises unless ``lora`` is a config."""
        check_config(self.lora)
        super().__post_init__()

    @nn.nowrap
    def param(self, name: str, init_fn, *args, unbox: bool = True, **kwargs) -> Any:
        """Declares a base weight like `flax.linen.Module.param`; frozen unless trained.

        Args:
          name: name of the weight.
          init_fn: ``(key, *args) -> array``.
          *args: arguments of ``init_fn``.
          unbox: whether to remove partitioning metadata.
          **kwargs: keyword arguments of ``init_fn``.

        Raises:
          ValueError: if the given weight's shape differs from that of ``init_fn``.
        """
        path = child(self._lora_path(), name)
        if self.lora.is_trained(path, is_adapted=self._is_target()):
            return super().param(name, init_fn, *args, unbox=unbox, **kwargs)
        self._require(FROZEN, name)
        value = self.variable(
            FROZEN,
            name,
            lambda: init_fn(self.make_rng(PARAMS), *args, **kwargs),
            unbox=False,
        ).value
        plain = nn.meta.unbox(value)
        wanted = jax.eval_shape(lambda: init_fn(jax.random.key(0), *args, **kwargs))
        wanted = nn.meta.unbox(wanted).shape
        if jnp.shape(plain) != wanted:
            raise ValueError(f"{path} must be {wanted}; got {jnp.shape(plain)}.")
        return plain if unbox else value

    @nn.nowrap
    def _require(self, collection: str, name: str) -> None:
        """Raises if a variable is missing and can't be initialised here."""
        is_there = self.has_variable(collection, name)
        if not is_there and not self.is_mutable_collection(collection):
            path = child(self._lora_path(), name)
            raise ValueError(
                f"variables[{collection!r}] must have {path!r}; got none. Put a "
                f"layer's Linen parameters in {FROZEN!r}, its adapter in {LORA!r}."
            )

    @nn.nowrap
    def _lora_path(self) -> str:
        return "/".join(self.path)

    @nn.nowrap
    def _is_target(self) -> bool:
        rule = rule_of(self)
        return rule is not None and self.lora.is_target(
            self._lora_path(), is_linear=rule.kind in LINEAR_KINDS
        )


class LoRALayer(FrozenLayer):
    """Adds LoRA to a Linen layer.

    The Linen class computes the base. The module's path determines whether ``lora``
    adapts it, and with which rank, alpha and scaling.

    Attributes:
      lora: the adapter config of the whole model.
      deterministic: disables adapter dropout; may be given at the call instead.
    """

    deterministic: bool | None = None

    @nn.nowrap
    def _factors(self, *inputs: Any) -> Factors | None:
        """Declares the adapter variables; returns plain factors, None if no target."""
        path = self._lora_path()
        if not self._is_target():
            held = next((c for c in ADAPTER if self.has_variable(c, LORA_A)), None)
            if held is not None:
                raise ValueError(
                    f"variables[{held!r}] has {child(path, LORA_A)!r}, but the config "
                    f"does not target {path!r}. Use the config the adapter was made "
                    "with."
                )
            return None
        leaves = self.lora.leaves
        of_fields = (LORA, MAGNITUDE, "dora"), (LORA, VERA_D, "vera")
        for held, name, field in (*of_fields, (FIXED, START_A, "init")):
            if name not in leaves and self.has_variable(held, name):
                raise ValueError(
                    f"variables[{held!r}] has {child(path, name)!r}, but the config "
                    f"has {field}={getattr(self.lora, field)!r}. Use the config the "
                    "adapter was made with."
                )
        fresh: list[Factors] = []

        def draw(name: str) -> AnyFloat:
            if not fresh:
                fresh.append(init_factors(self, inputs, self.lora, path))
            return getattr(fresh[0], name)

        for name, held in leaves.items():
            self._require(held, name)
        factors = Factors(
            **{n: self.variable(c, n, draw, n).value for n, c in leaves.items()}
        )
        rule = rule_of(self)
        assert rule is not None  # it is a target
        shape = jnp.shape(base_weight(self, rule.weight))
        roles = rule.contraction(self, *inputs)
        check_factors_fit(path, factors, shape, roles, self.lora)
        return factors.plain(roles)

    @nn.nowrap
    def _adapted_query(self, query: AnyFloat, factors: Factors | None) -> AnyFloat:
        """Returns the query for a tied head, scaled if DoRA is used."""
        if factors is None:
            return query
        scaling = self.lora.scaling_for(self._lora_path())
        return adapted_query(self, query, factors, scaling)

    @nn.nowrap
    def _adapted(
        self,
        y: AnyFloat,
        factors: Factors | None,
        inputs: tuple[Any, ...],
        deterministic: bool | None = None,
        method: str = CALL,
    ) -> AnyFloat:
        """Applies the adapter, if any, to the base output ``y``."""
        if factors is None:
            return y
        is_lookup = method == CALL and isinstance(self, nn.Embed)  # no dropout
        drops = self.lora.dropout_rate > 0 and not is_lookup
        if drops:
            drops = not nn.merge_param(
                "deterministic", self.deterministic, deterministic
            )
        return apply_adapter(
            self,
            method,
            inputs,
            y,
            factors,
            config=self.lora,
            path=self._lora_path(),
            deterministic=not drops,
        )


class OneInputLayer(LoRALayer):
    """A LoRA layer that is called with one array."""

    @nn.compact
    def __call__(
        self, inputs: jax.Array, deterministic: bool | None = None
    ) -> jax.Array:
        """Applies the layer to ``[*b, ...]``, as its class in `flax.linen` does."""
        y = super().__call__(inputs)
        return self._adapted(y, self._factors(inputs), (inputs,), deterministic)
