"""Which axes of a kernel are batch, input and output.

This determines the shapes of A and B, A's fan-in, merging, and the reshape for other
libraries' files. Roles are never inferred from sizes, so a rank that equals the number
of heads or layers is not ambiguous.

A kernel with batch axes (experts, scanned layers) holds one matrix for each batch
element, and A and B hold one factor for each: ``lora_a`` is ``[*batch, *in, r]`` and
``lora_b`` is ``[*batch, r, *out]``.
"""

import math
from typing import NamedTuple

from lora_jax.array_types import AnyFloat

Shape = tuple[int, ...]


class Contraction(NamedTuple):
    """The role of each kernel axis, by index.

    Attributes:
      batch: axes whose elements are separate kernels.
      inputs: axes contracted with the input.
      outputs: axes that appear in the output.
      groups: number of groups a convolution splits its one output axis into; if above
        1, the groups become the last batch axis.

    Example:
      >>> heads = Contraction(inputs=(0,), outputs=(1, 2))  # [d, n, h]
      >>> heads.factor_shapes((16, 4, 8), rank=3)
      ((16, 3), (3, 4, 8))
    """

    batch: tuple[int, ...] = ()
    inputs: tuple[int, ...] = (0,)
    outputs: tuple[int, ...] = (1,)
    groups: int = 1

    def split(self, kernel_shape: Shape) -> tuple[Shape, Shape, Shape]:
        """Returns the sizes of the batch, input and output axes.

        Args:
          kernel_shape: shape of the whole kernel.

        Returns:
          Three tuples of sizes. With groups, the output is one group's, and the number
          of groups is the last batch size.

        Raises:
          ValueError: unless every kernel axis has exactly one role and the groups
            divide the outputs.
        """
        axes = (*self.batch, *self.inputs, *self.outputs)
        if sorted(axes) != list(range(len(kernel_shape))):
            raise ValueError(
                f"kernel must have {len(axes)} axes for {self}; "
                f"got shape {kernel_shape}."
            )
        batch = tuple(kernel_shape[axis] for axis in self.batch)
        inputs = tuple(kernel_shape[axis] for axis in self.inputs)
        outputs = tuple(kernel_shape[axis] for axis in self.outputs)
        if self.groups > 1:
            if outputs[0] % self.groups:
                raise ValueError(
                    f"groups must divide the {outputs[0]} outputs of a kernel of shape "
                    f"{kernel_shape}; got {self.groups}."
                )
            batch, outputs = (*batch, self.groups), (outputs[0] // self.groups,)
        return batch, inputs, outputs

    def factor_shapes(self, kernel_shape: Shape, rank: int) -> tuple[Shape, Shape]:
        """Returns the shapes of A and B for a kernel.

        They are ``[*batch, *in, r]`` and ``[*batch, r, *out]``.
        """
        batch, inputs, outputs = self.split(kernel_shape)
        return (*batch, *inputs, rank), (*batch, rank, *outputs)

    def matrix_size(self, kernel_shape: Shape) -> tuple[int, int]:
        """Returns the fan-in and fan-out of one matrix."""
        _, inputs, outputs = self.split(kernel_shape)
        return math.prod(inputs), math.prod(outputs)

    def stacked(self, axes: tuple[int, ...]) -> "Contraction":
        """Returns the contraction of many such kernels stacked in one array.

        Args:
          axes: positions of the new axes in the stacked array (a scan's layer axis).

        Returns:
          The shifted roles; the new axes are the first batch axes.
        """
        ndim = len(self.batch) + len(self.inputs) + len(self.outputs) + len(axes)
        old = [axis for axis in range(ndim) if axis not in axes]

        def moved(roles: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(old[axis] for axis in roles)

        return self._replace(
            batch=(*axes, *moved(self.batch)),
            inputs=moved(self.inputs),
            outputs=moved(self.outputs),
        )


DENSE = Contraction()


def check_factors(
    kernel_shape: Shape,
    a_shape: Shape,
    b_shape: Shape,
    contraction: Contraction = DENSE,
) -> None:
    """Raises a ValueError unless the shapes of A, B and the kernel are compatible."""
    rank = a_shape[-1] if a_shape else 0
    wanted = contraction.factor_shapes(kernel_shape, rank)
    if (tuple(a_shape), tuple(b_shape)) == wanted and rank > 0:
        return
    if contraction == DENSE:
        i, o = kernel_shape
        names = f"[in, rank], [rank, out] = [{i}, {rank}], [{rank}, {o}]"
    else:
        names = "[*batch, *in, rank], [*batch, rank, *out] = {}, {}".format(
            *map(list, wanted)
        )
    swapped = contraction == DENSE and (a_shape[::-1], b_shape[::-1]) == (
        contraction.factor_shapes(kernel_shape, a_shape[0] if a_shape else 0)
    )
    hint = "The last axis of lora_a is the rank."
    if swapped:
        hint = "PyTorch stores these transposed: pass `weight.T`."
    raise ValueError(
        f"lora_a, lora_b must be {names} for a kernel of shape {kernel_shape}; "
        f"got {a_shape}, {b_shape}. {hint}"
    )


def check_bias(bias: AnyFloat | None, kernel_shape: Shape) -> None:
    """Raises unless the bias, if any, has one element per output."""
    if bias is not None and bias.shape != kernel_shape[-1:]:
        raise ValueError(
            f"bias must be [out] = [{kernel_shape[-1]}] for a kernel of shape "
            f"{kernel_shape}; got {bias.shape}."
        )
