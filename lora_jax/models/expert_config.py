"""`ExpertConfig`: the mixture of experts in a decoder's MLPs."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class ExpertConfig:
    """Sizes and variants of a mixture of experts.

    Attributes:
      num_experts: ``e``.
      num_chosen: experts that a token is sent to.
      size: width inside an expert, ``f``.
      is_normalized: whether the weights of the chosen experts sum to 1; else they are
        their probabilities among all.
      has_router_bias: whether the router's scores have a bias.
      has_bias: whether the experts' layers have biases.
      gate: ``"plain"`` is ``act(gate) * up`` of ``[gate | up]``; ``"clamped"`` is
        ``(up + 1) * gate * sigmoid(alpha * gate)`` of bounded values, with gate and up
        in turns.
      gate_alpha: ``alpha``.
      gate_limit: the bound: ``gate <= limit`` and ``|up| <= limit``.
      shared_size: width inside an expert that every token goes through, weighted by a
        sigmoid; None if there is none.
      dense_layers: numbers of layers that have a plain MLP instead.
      is_beside_mlp: whether a layer has a plain MLP too, and adds both, each with norms
        of its own; a router then reads scaled inputs, and each expert's weights are
        multiplied by a number of its own.

    Raises:
      ValueError: if a size is out of range; every fault is named.
    """

    num_experts: int
    num_chosen: int
    size: int
    is_normalized: bool = True
    has_router_bias: bool = False
    has_bias: bool = False
    gate: Literal["plain", "clamped"] = "plain"
    gate_alpha: float = 1.702
    gate_limit: float = 7.0
    shared_size: int | None = None
    dense_layers: tuple[int, ...] = ()
    is_beside_mlp: bool = False

    def __post_init__(self):
        names = ["num_experts", "num_chosen", "size"]
        if self.shared_size is not None:
            names.append("shared_size")
        faults = [
            f"{name} must be a positive integer; got {value!r}"
            for name in names
            if type(value := getattr(self, name)) is not int or value < 1
        ]
        if not faults and self.num_chosen > self.num_experts:
            faults.append(
                f"num_chosen must be at most num_experts = {self.num_experts}; got "
                f"{self.num_chosen}"
            )
        if faults:
            raise ValueError("ExpertConfig: " + "; ".join(faults) + ".")

    @property
    def active_share(self) -> float:
        """The part of the experts' weights that a token meets."""
        return self.num_chosen / self.num_experts
