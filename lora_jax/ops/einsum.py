"""LoRA on any two-operand einsum: ``y = einsum(x, W0) + scaling * (x A) B``.

The kernel's labels determine the roles: a label in both input and output is a batch
axis (experts), one only in the input is contracted, one only in the output is an output
axis. A has the batch and input labels, B the batch and output labels.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.array_types import AnyFloat, DropoutKey
from lora_jax.ops.contraction import Contraction, check_factors
from lora_jax.ops.dora import dora_scale, magnitude_shape, rescale
from lora_jax.ops.product import RANK, check_floating, low_rank_update

_SPARE = "zyxwvutsrqponmlkjihgfedcbaZYXWVUTSQPONMLKJIHGFEDCBA"


class Equation(NamedTuple):
    """A parsed einsum ``x,kernel->out`` without ellipsis.

    Attributes:
      x: labels of the input.
      kernel: labels of the kernel.
      out: labels of the output.
    """

    x: str
    kernel: str
    out: str

    @property
    def contraction(self) -> Contraction:
        """The kernel's axes by role."""
        batch, inputs, outputs = (
            tuple(map(self.kernel.index, role)) for role in self._roles()
        )
        return Contraction(batch, inputs, outputs)

    @property
    def down(self) -> str:
        """Equation of ``x A``."""
        batch, inputs, _ = self._roles()
        return f"{self.x},{batch}{inputs}{RANK}->{self._hidden()}"

    @property
    def up(self) -> str:
        """Equation of ``h B``."""
        batch, _, outputs = self._roles()
        return f"{self._hidden()},{batch}{RANK}{outputs}->{self.out}"

    def over_output(self, per_output: AnyFloat) -> AnyFloat:
        """Reshapes ``[*batch, *out]`` to broadcast against the output."""
        batch, _, outputs = self._roles()
        labels = batch + outputs
        ordered = [labels.index(label) for label in self.out if label in labels]
        others = [i for i, label in enumerate(self.out) if label not in labels]
        return jnp.expand_dims(jnp.transpose(per_output, ordered), others)

    def _hidden(self) -> str:
        return "".join(c for c in self.x if c in self.out) + RANK

    def _roles(self) -> tuple[str, str, str]:
        in_x = [c for c in self.kernel if c in self.x]
        batch = "".join(c for c in in_x if c in self.out)
        inputs = "".join(c for c in in_x if c not in self.out)
        outputs = "".join(c for c in self.kernel if c not in self.x)
        return batch, inputs, outputs


def parse_equation(equation: str, x_ndim: int) -> Equation:
    """Parses ``equation`` for an input of ``x_ndim`` axes.

    Args:
      equation: e.g. ``"...td,dnh->...tnh"``; ``...`` in both input and output.
      x_ndim: number of axes of the input, which determines the length of ``...``.

    Returns:
      The labels of the three arrays.

    Raises:
      ValueError: if it is not an explicit einsum of two operands, repeats a label in
        one array, or has a label with no role in LoRA.
    """
    compact = equation.replace(" ", "")
    operands, arrow, out = compact.partition("->")
    if not arrow or operands.count(",") != 1:
        raise ValueError(
            f"equation must be explicit with two operands, 'x,kernel->out'; "
            f"got {equation!r}."
        )
    x, kernel = operands.split(",")
    if "..." in kernel:
        raise ValueError(
            f"equation must name every axis of the kernel; got {equation!r}."
        )
    named = len(x.replace("...", ""))
    if "..." in x:
        if "..." not in out:
            raise ValueError(
                f"equation must have '...' in the output as well; got {equation!r}."
            )
        free = [c for c in _SPARE if c not in compact]
        if not 0 <= x_ndim - named <= len(free):
            raise ValueError(
                f"equation {equation!r} names {named} axes of x; got {x_ndim} axes."
            )
        dots = "".join(free[: x_ndim - named])
        x, out = x.replace("...", dots), out.replace("...", dots)
    elif "..." in out:
        raise ValueError(f"equation must have '...' in x as well; got {equation!r}.")
    if len(x) != x_ndim:
        raise ValueError(f"x must have {len(x)} axes for {equation!r}; got {x_ndim}.")
    faults = [
        f"label {c!r} repeats within one array"
        for c in sorted(set(x + kernel + out))
        if max(x.count(c), kernel.count(c), out.count(c)) > 1
    ]
    faults += [
        f"label {c!r} of the output is not in any operand"
        for c in out
        if c not in x + kernel
    ]
    faults += [
        f"label {c!r} is summed over within a single operand"
        for c in x + kernel
        if (c in x) != (c in kernel) and c not in out
    ]
    faults += [f"label {RANK!r} is reserved for the rank"] * (RANK in x + kernel + out)
    faults += [
        f"label {c!r} is not a letter" for c in x + kernel + out if not c.isalpha()
    ]
    parsed = Equation(x, kernel, out)
    if not faults and not (parsed.contraction.inputs and parsed.contraction.outputs):
        faults.append("the kernel needs at least one input and one output axis")
    if faults:
        raise ValueError(
            f"equation {equation!r} can't be adapted: {'; '.join(faults)}."
        )
    return parsed


def lora_einsum(
    equation: str,
    x: AnyFloat,
    kernel: AnyFloat,
    lora_a: AnyFloat,
    lora_b: AnyFloat,
    *,
    scaling: float | jax.Array,
    bias: AnyFloat | None = None,
    magnitude: AnyFloat | None = None,
    base_output: AnyFloat | None = None,
    hidden: AnyFloat | None = None,
    dropout_rate: float = 0.0,
    dropout_key: DropoutKey | None = None,
    precision: jax.lax.PrecisionLike = None,
) -> AnyFloat:
    """Applies a frozen einsum plus its low-rank update.

    Computes ``einsum(equation, x, W0) + bias + scaling * (x A) B``, equal to
    ``einsum(equation, x, merge_kernel(W0, A, B)) + bias``. Every batch element of the
    kernel (an expert) has its own A and B.

    Args:
      equation: explicit, two operands, ``"btd,dnh->btnh"``; ``...`` allowed in ``x``
        and the output.
      x: first operand; sets the dtype of the computation and of the result.
      kernel: frozen base weight ``W0``, the second operand.
      lora_a: ``A`` ``[*batch, *in, r]``, with axes in the kernel's order.
      lora_b: ``B`` ``[*batch, r, *out]``, likewise.
      scaling: ``alpha / rank``.
      bias: frozen base bias with one element per output, or None.
      magnitude: DoRA's ``m`` ``[*batch, *out]``, or None; see `lora_dense`.
      base_output: the frozen layer's output, bias included, if already computed.
      hidden: ``dropout(x) A`` if computed by `shared_hidden`.
      dropout_rate: probability of dropping an element of the update's input.
      dropout_key: PRNG key, required if ``dropout_rate`` is above 0.
      precision: as in `jax.lax.dot_general`.

    Returns:
      The output of the equation, in the dtype of ``x`` (of ``base_output`` if it is
      given).

    Raises:
      ValueError: if the equation can't be adapted or the shapes are incompatible.
      TypeError: if an array is not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> x, w0 = jnp.ones((2, 3)), jnp.ones((3, 4, 5))
      >>> a, b = jnp.ones((3, 1)), jnp.ones((1, 4, 5))
      >>> lora_einsum("td,dnh->tnh", x, w0, a, b, scaling=0.5)[0, 0, 0].tolist()
      4.5

    References:
      Hu et al., https://arxiv.org/abs/2106.09685, section 4.1.
    """
    check_floating(x=x, kernel=kernel, lora_a=lora_a, lora_b=lora_b, bias=bias)
    parsed = parse_equation(equation, x.ndim)
    if len(parsed.kernel) != kernel.ndim:
        raise ValueError(
            f"kernel must have {len(parsed.kernel)} axes for {equation!r}; "
            f"got shape {kernel.shape}."
        )
    clashes = [
        f"{c!r} is {x.shape[parsed.x.index(c)]} in x, {size} in the kernel"
        for c, size in zip(parsed.kernel, kernel.shape, strict=True)
        if c in parsed.x and x.shape[parsed.x.index(c)] != size
    ]
    if clashes:
        raise ValueError(
            f"x, kernel must agree on every label of {equation!r}; got {x.shape}, "
            f"{kernel.shape}: {'; '.join(clashes)}."
        )
    check_factors(kernel.shape, lora_a.shape, lora_b.shape, parsed.contraction)
    y = base_output
    if y is None:
        y = jnp.einsum(equation, x, kernel.astype(x.dtype), precision=precision)
        y = y if bias is None else y + _bias_of(parsed, kernel, bias).astype(y.dtype)
    y = y + low_rank_update(
        parsed.down,
        parsed.up,
        x,
        lora_a,
        lora_b,
        scaling=scaling,
        hidden=hidden,
        dropout_rate=dropout_rate,
        dropout_key=dropout_key,
        precision=precision,
        dtype=y.dtype,
        is_rescaled=magnitude is not None,
    )
    if magnitude is None:
        return y
    roles = parsed.contraction
    m_over_n = dora_scale(
        kernel, lora_a, lora_b, magnitude, scaling=scaling, contraction=roles
    )
    bias = None if bias is None else _bias_of(parsed, kernel, bias)
    return rescale(y, parsed.over_output(m_over_n), bias)


def _bias_of(parsed: Equation, kernel: AnyFloat, bias: AnyFloat) -> AnyFloat:
    """Reshapes a bias, with one element per output, to the output's layout."""
    shape = magnitude_shape(tuple(kernel.shape), parsed.contraction)
    per_output = jax.ShapeDtypeStruct(shape, bias.dtype)
    layout = jax.eval_shape(parsed.over_output, per_output).shape
    wanted, got = ([n for n in s if n > 1] for s in (layout, bias.shape))
    if wanted != got:
        raise ValueError(
            f"bias must have one element for each output, {list(layout)}; "
            f"got {bias.shape}."
        )
    return jnp.reshape(bias, layout)
