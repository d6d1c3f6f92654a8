"""What LoRA modules share: W0 in ``frozen``, A and B in ``lora``."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_jax.array_types import AnyFloat
from lora_jax.config import LoRAConfig
from lora_jax.names import FROZEN, LORA, LORA_A, LORA_B, MAGNITUDE, PARAMS
from lora_jax.nn.dora import init_magnitude, scale_output
from lora_jax.nn.layers import LINEAR_KINDS, adapter_update, init_factors, layer_of
from lora_jax.ops.contraction import Contraction, Shape
from lora_jax.ops.dora import magnitude_shape
from lora_jax.tree.targets import child


class Factors(NamedTuple):
    """What is trained of one layer.

    Attributes:
      lora_a: ``A`` ``[*batch, *in, r]``.
      lora_b: ``B`` ``[*batch, r, *out]``.
      magnitude: DoRA's ``m`` ``[*batch, *out]``, or None.
    """

    lora_a: AnyFloat
    lora_b: AnyFloat
    magnitude: AnyFloat | None = None


def check_config(lora: Any) -> None:
    """Raises `TypeError` unless a module's ``lora`` is a `LoRAConfig`."""
    if not isinstance(lora, LoRAConfig):
        raise TypeError(
            f"lora must be a LoRAConfig; got {type(lora).__name__}. "
            "LoRAConfig.from_dict makes one of a dictionary."
        )


class FrozenLayer:
    """Mixin that keeps a Linen layer's parameters out of training.

    Put before the Linen class, whose own code runs: its parameters are declared in
    ``frozen``, or in ``params`` if the config trains them in full.

    Attributes:
      lora: the config, one for the whole model.
    """

    lora: LoRAConfig
    scope: Any
    variable: Callable[..., nn.Variable]
    make_rng: Callable[[str], jax.Array]

    def __post_init__(self) -> None:
        """Refuses anything but a config, before it is asked for a rank."""
        check_config(self.lora)
        super().__post_init__()  # pyright: ignore[reportAttributeAccessIssue] - the Linen class

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
        if self.lora.is_trained(path, is_adapted=self._is_target()):
            return super().param(name, init_fn, *args, unbox=unbox, **kwargs)  # pyright: ignore[reportAttributeAccessIssue] - the Linen class
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

    def _require(self, collection: str, name: str) -> None:
        """Raises if a variable is neither given nor can be made here."""
        if self.scope.has_variable(collection, name):
            return
        if not self.scope.is_mutable_collection(collection):
            path = child(self._lora_path(), name)
            raise ValueError(
                f"variables[{collection!r}] must have {path!r}; got none. A layer's "
                f"Linen parameters belong in {FROZEN!r}, its adapter in {LORA!r}."
            )

    def _lora_path(self) -> str:
        return "/".join(self.scope.path)

    def _is_target(self) -> bool:
        layer = layer_of(self)  # pyright: ignore[reportArgumentType] - a module
        return layer is not None and self.lora.is_target(
            self._lora_path(), is_linear=layer.kind in LINEAR_KINDS
        )


class LoRALayer(FrozenLayer):
    """Mixin that turns a Linen layer into its LoRA twin.

    The twin runs the Linen class's own code for the base. Which rank, alpha and scaling
    apply, and whether the layer is adapted at all, is asked of ``lora`` with the
    module's path.

    Attributes:
      lora: the config, one for the whole model.
      deterministic: switches adapter dropout off; may be given at the call instead.
    """

    deterministic: bool | None

    def _factors(self, *inputs: Any) -> Factors | None:
        """Declares what is trained, or returns None if this layer is no target."""
        layer = layer_of(self)  # pyright: ignore[reportArgumentType] - a module
        assert layer is not None
        path = self._lora_path()
        if not self._is_target():
            if self.scope.has_variable(LORA, LORA_A):
                raise ValueError(
                    f"variables[{LORA!r}] has {child(path, LORA_A)!r}, but the config "
                    f"does not target {path!r}. Load the adapter with its own config."
                )
            return None
        drawn: list[tuple[AnyFloat, AnyFloat]] = []

        def draw(index: int) -> AnyFloat:
            if not drawn:
                drawn.append(init_factors(self, inputs, self.lora, path))  # pyright: ignore[reportArgumentType] - a module
            return drawn[0][index]

        values = []
        for index, name in enumerate((LORA_A, LORA_B)):
            self._require(LORA, name)
            values.append(self.variable(LORA, name, draw, index).value)
        factors = Factors(*values)
        rank = self.lora.rank_for(path)
        shape = self._weight_shape(layer.weight)
        contraction = layer.contraction(self, *inputs)
        wanted = contraction.factor_shapes(shape, rank)
        if (jnp.shape(factors.lora_a), jnp.shape(factors.lora_b)) != wanted:
            raise ValueError(
                f"lora_a, lora_b of {path!r} must be {wanted[0]}, {wanted[1]} for rank "
                f"{rank} and a kernel of shape {shape}; got "
                f"{jnp.shape(factors.lora_a)}, {jnp.shape(factors.lora_b)}."
            )
        return factors._replace(magnitude=self._magnitude(inputs, shape, contraction))

    def _magnitude(
        self, inputs: tuple[Any, ...], shape: Shape, contraction: Contraction
    ) -> AnyFloat | None:
        """Declares DoRA's m, or returns None without DoRA."""
        path = child(self._lora_path(), MAGNITUDE)
        if not self.lora.dora:
            if self.scope.has_variable(LORA, MAGNITUDE):
                raise ValueError(
                    f"variables[{LORA!r}] has {path!r}, but the config has dora=False. "
                    "Load the adapter with its own config."
                )
            return None
        self._require(LORA, MAGNITUDE)
        value = self.variable(LORA, MAGNITUDE, init_magnitude, self, inputs).value
        wanted = magnitude_shape(shape, contraction)
        if jnp.shape(value) != wanted:
            raise ValueError(f"{path} must be {wanted}; got {jnp.shape(value)}.")
        return value

    def _weight_shape(self, name: str) -> tuple[int, ...]:
        held = PARAMS if self.scope.has_variable(PARAMS, name) else FROZEN
        return jnp.shape(nn.meta.unbox(self.scope.get_variable(held, name)))

    def _updated(
        self,
        y: AnyFloat,
        factors: Factors | None,
        inputs: tuple[Any, ...],
        deterministic: bool | None = None,
        method: str = "__call__",
        *,
        drops: bool = True,
    ) -> AnyFloat:
        """Adds the adapter's update to the base output ``y``; scales it for DoRA."""
        if factors is None:
            return y
        drops = drops and self.lora.dropout_rate > 0
        if drops:
            drops = not nn.merge_param(
                "deterministic", self.deterministic, deterministic
            )
        module: Any = self  # a mixin to the checker, but a module
        path = self._lora_path()
        a, b, m = factors
        y = y + adapter_update(
            module,
            method,
            inputs,
            a,
            b,
            config=self.lora,
            path=path,
            deterministic=not drops,
            dtype=y.dtype,
        )
        if m is None:
            return y
        scaling = self.lora.scaling_for(path)
        return scale_output(y, module, method, inputs, a, b, m, scaling=scaling)
