"""What every LoRA layer shares: W0 in ``frozen``, A and B in ``lora``."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_jax.array_types import AnyFloat
from lora_jax.config import LoRAConfig
from lora_jax.names import FROZEN, LORA, LORA_A, LORA_B
from lora_jax.nn.layers import LINEAR_KINDS, adapter_update, init_factors, layer_of
from lora_jax.tree.targets import child


class LoRALayer:
    """Mixin that turns a Linen layer into its LoRA twin.

    Put before the Linen class. The twin runs the Linen class's own code for the base;
    its parameters are declared in ``frozen``, or in ``params`` if the config trains
    them in full. Which rank, alpha and scaling apply, and whether the layer is adapted
    at all, is asked of ``lora`` with the module's path.

    Attributes:
      lora: the config, one for the whole model.
      deterministic: switches adapter dropout off; may be given at the call instead.
    """

    lora: LoRAConfig
    deterministic: bool | None
    scope: Any
    variable: Callable[..., nn.Variable]
    make_rng: Callable[[str], jax.Array]

    def param(self, name: str, init_fn, *args, unbox: bool = True, **kwargs) -> Any:
        """Declares a base weight, frozen unless the config trains it.

        Args:
          name: of the weight.
          init_fn: ``(key, *args) -> array``.
          *args: arguments of ``init_fn``.
          unbox: whether partitioning metadata is taken off.
          **kwargs: keyword arguments of ``init_fn``.

        Returns:
          The weight.

        Raises:
          ValueError: if the weight given has another shape than ``init_fn`` makes.
        """
        path = child(self._lora_path(), name)
        if self.lora.is_trained(path):
            return super().param(name, init_fn, *args, unbox=unbox, **kwargs)  # pyright: ignore[reportAttributeAccessIssue] - the Linen class
        value = self.variable(
            FROZEN, name, lambda: init_fn(self.make_rng("params"), *args, **kwargs)
        ).value
        wanted = jax.eval_shape(lambda: init_fn(jax.random.key(0), *args, **kwargs))
        if jnp.shape(nn.meta.unbox(value)) != nn.meta.unbox(wanted).shape:
            raise ValueError(
                f"{path} must be {nn.meta.unbox(wanted).shape}; "
                f"got {jnp.shape(nn.meta.unbox(value))}."
            )
        return nn.meta.unbox(value) if unbox else value

    def _lora_path(self) -> str:
        return "/".join(self.scope.path)

    def _factors(self, *inputs: Any) -> tuple[AnyFloat, AnyFloat] | None:
        """Declares A and B, or returns None if this layer is no target."""
        layer = layer_of(self)  # pyright: ignore[reportArgumentType] - a module
        assert layer is not None
        path = self._lora_path()
        if not self.lora.is_target(path, is_linear=layer.kind in LINEAR_KINDS):
            return None
        drawn: list[tuple[AnyFloat, AnyFloat]] = []

        def draw(index: int) -> AnyFloat:
            if not drawn:
                drawn.append(init_factors(self, inputs, self.lora, path))  # pyright: ignore[reportArgumentType] - a module
            return drawn[0][index]

        return (
            self.variable(LORA, LORA_A, draw, 0).value,
            self.variable(LORA, LORA_B, draw, 1).value,
        )

    def _updated(
        self,
        y: AnyFloat,
        factors: tuple[AnyFloat, AnyFloat] | None,
        inputs: tuple[Any, ...],
        deterministic: bool | None = None,
        method: str = "__call__",
    ) -> AnyFloat:
        """Adds the adapter's update to the base output ``y``."""
        if factors is None:
            return y
        if self.lora.dropout_rate > 0:
            deterministic = nn.merge_param(
                "deterministic", self.deterministic, deterministic
            )
        return y + adapter_update(
            self,  # pyright: ignore[reportArgumentType] - a module
            method,
            inputs,
            *factors,
            config=self.lora,
            path=self._lora_path(),
            deterministic=bool(deterministic),
            dtype=y.dtype,
        )
