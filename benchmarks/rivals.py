"""The contenders of `benchmarks.contenders` that rely on JAX's autodiff.

Plain autodiff, qwix and nnx.LoRA; and the base's matmuls alone, as a lower bound.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.interpreters.partial_eval import dce_jaxpr
from jax.tree_util import keystr

from benchmarks.harness import Contender, is_on_cpu, measured
from lora_jax import LoRAConfig, adapt, count
from lora_jax.models.decoder_config import DecoderConfig
from lora_jax.models.experts import ExpertDense
from lora_jax.names import EXPERTS
from lora_jax.plan.flops import traced_flops

RANK, ALPHA, RATE = 8, 16, 1e-3
TARGETS = ("query", "key", "value", "output", "gate", "up", "gate_up", "down")


class Task(NamedTuple):
    """A model and a batch, for the contenders that rely on autodiff.

    Attributes:
      model: the model without LoRA.
      params: its parameters.
      inputs: arguments of its call.
      loss: maps its outputs to the loss.
    """

    model: nn.Module
    params: Any
    inputs: tuple[jax.Array, ...]
    loss: Callable[[jax.Array], jax.Array]


def dtype() -> Any:
    """Returns the dtype of the base and the computation."""
    return jnp.float32 if is_on_cpu() else jnp.bfloat16


def stepper(step: Any, state: Any, *rest: Any, **facts: Any) -> Contender:
    """Makes a contender from a jitted ``(state, ...) -> (state, loss)``."""
    holder = [state]

    def run() -> Any:
        holder[0], loss = step(holder[0], *rest)
        return loss

    return _traced(step.trace(state, *rest), run, **facts)


def repeater(run: Any, *args: Any, **facts: Any) -> Contender:
    """Makes a contender from a jitted function without state."""
    return _traced(run.trace(*args), lambda: run(*args), **facts)


def _traced(traced: jax.stages.Traced, run: Callable[[], Any], **facts: Any) -> Any:
    """Records the FLOPs of matmuls that are needed: XLA counts a loop's body once."""
    jaxpr = traced.jaxpr.jaxpr
    needed, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    flops = traced_flops(needed)
    return measured(traced.lower(), run, matmul_flops=flops, **facts)


def _by_autodiff(
    forward: Callable, adapters: Any, frozen: Any, task: Task, **options: Any
) -> Contender:
    """Adam on the adapters of ``forward(adapters, frozen, *inputs)``, by autodiff.

    The inputs are arguments, as in training: XLA drops a constant mask of ones.
    """
    tx = optax.adam(RATE)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, frozen, inputs):
        adapters, opt_state = state

        def loss(adapters):
            return task.loss(forward(adapters, frozen, *inputs))

        value, gradient = jax.value_and_grad(loss)(adapters)
        updates, opt_state = tx.update(gradient, opt_state, adapters)
        return (optax.apply_updates(adapters, updates), opt_state), value

    state = (adapters, tx.init(adapters))
    rest = (frozen, task.inputs)
    return stepper(step, state, *rest, trained=count(adapters), **options)


def plain(
    task: Task, call: Callable[..., Any] | None = None, **options: Any
) -> Contender:
    """``x W + s (x A) B`` written directly, differentiated by JAX.

    Of experts every product is a `jax.lax.ragged_dot`.

    ``call`` maps parameters and inputs to what ``task.loss`` takes; None for the
    model's outputs.
    """

    def outputs(params: Any, *inputs: jax.Array) -> Any:
        return task.model.apply({"params": params}, *inputs)

    call = call or outputs
    config = LoRAConfig(RANK, ALPHA, targets=_linears(task.params))
    adapted = adapt(task.model, config, *task.inputs)
    adapters = adapted.attach(task.params, jax.random.key(1))["lora"]

    def forward(adapters, params, *inputs):
        def intercept(next_fun, args, kwargs, context):
            module, node = context.module, adapters
            if not isinstance(module, nn.Dense | ExpertDense):
                return next_fun(*args, **kwargs)
            for name in module.path:
                node = node.get(name, {})
            if not node:
                return next_fun(*args, **kwargs)
            a, b = (node[name].astype(dtype()) for name in ("lora_a", "lora_b"))
            if isinstance(module, ExpertDense):
                x, sizes = args[0][0, 0], args[1][0, 0]  # of one device
                dot = functools.partial(jax.lax.ragged_dot, group_sizes=sizes)
                y = dot(x, module.get_variable("params", "kernel"))
                return (y + ALPHA / RANK * dot(dot(x, a), b))[None, None]
            return next_fun(*args, **kwargs) + ALPHA / RANK * (args[0] @ a) @ b

        with nn.intercept_methods(intercept):
            return call(params, *inputs)

    return _by_autodiff(forward, adapters, task.params, task, **options)


def plain_chunked(task: Task, labels: jax.Array, chunk: int) -> Contender:
    """`plain` for a decoder, its logits formed again in the backward pass.

    The head and the loss run under ``jax.checkpoint``, ``chunk`` tokens at a time.
    """

    def call(params: Any, *inputs: jax.Array) -> Any:
        variables = {"params": params}
        hidden = task.model.apply(variables, *inputs, method="hidden")
        return hidden, params["head"]["kernel"]

    def loss(outputs: Any) -> jax.Array:
        hidden, kernel = outputs

        @jax.checkpoint
        def of_chunk(xs: Any) -> jax.Array:
            h, wanted = xs
            logits = jnp.dot(h, kernel, preferred_element_type=jnp.float32)
            return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).sum()

        rows = hidden.reshape(-1, chunk, hidden.shape[-1]), labels.reshape(-1, chunk)
        return jnp.sum(jax.lax.map(of_chunk, rows)) / labels.size

    return plain(task._replace(loss=loss), call)


def matmuls(params: Any, tokens: int, chosen: int = 0) -> Contender:
    """A lower bound for any step: ``x W`` and ``dy Wᵀ`` of every linear layer.

    Of experts each has the same part of ``tokens * chosen`` rows.
    """
    kernels = [
        leaf if f"['{EXPERTS}']" in keystr(path) else leaf.reshape(leaf.shape[0], -1)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key == "kernel" and path[-2].key in (*TARGETS, "head")
    ]

    @jax.jit
    def run(kernels, rows):
        rows = dict(rows)  # by width; each product feeds the next
        for kernel in kernels:
            own = kernel.shape[:-1]
            rows[own] = (rows[own] @ kernel) @ kernel.mT
        return rows

    key, rows = jax.random.key(0), {}
    for own in {kernel.shape[:-1] for kernel in kernels}:
        number = tokens if len(own) == 1 else tokens * chosen // own[0]
        shape = (*own[:-1], number, own[-1])
        rows[own] = jax.random.normal(key, shape, dtype())
    return repeater(run, kernels, rows, trained=0)


def _linears(params: Any) -> list[str]:
    """Returns the names of the linear layers in the model's blocks."""
    paths = jax.tree_util.tree_flatten_with_path(params)[0]
    names = {path[-2].key for path, _ in paths}
    return [name for name in TARGETS if name in names]


def qwix_lora(task: Task) -> Contender:
    """qwix's `LoraProvider` on the task's own model."""
    import qwix

    names = "|".join(_linears(task.params))
    rule = qwix.LoraRule(module_path=f".*({names})", rank=RANK, alpha=ALPHA)
    provider = qwix.LoraProvider([rule])
    lora_model = qwix.apply_lora_to_model(task.model, provider)
    fresh = jax.jit(lora_model.init)(jax.random.key(1), *task.inputs)["params"]
    is_adapter = jax.tree_util.tree_map_with_path(
        lambda path, _: "lora" in keystr(path), fresh
    )
    leaves, treedef = jax.tree.flatten(fresh)
    flags = jax.tree.leaves(is_adapter)
    adapters = [x for x, flag in zip(leaves, flags, strict=True) if flag]
    frozen = [
        x.astype(dtype()) for x, flag in zip(leaves, flags, strict=True) if not flag
    ]

    def forward(adapters, frozen, *inputs):
        moving, still = iter(adapters), iter(frozen)
        joined = [next(moving) if flag else next(still) for flag in flags]
        return lora_model.apply({"params": treedef.unflatten(joined)}, *inputs)

    return _by_autodiff(forward, adapters, frozen, task)


def nnx_lora(config: DecoderConfig, task: Task) -> Contender:
    """`nnx.LoRA` on the decoder written for NNX."""
    from flax import nnx

    from benchmarks.nnx_decoder import NnxDecoder

    return _split_nnx(NnxDecoder(config, RANK, dtype(), nnx.Rngs(0)), task)


def nnx_layer(width: int, task: Task) -> Contender:
    """One `nnx.LoRA` linear."""
    from flax import nnx

    from benchmarks.nnx_decoder import lora_linear

    return _split_nnx(lora_linear(width, width, RANK, dtype(), nnx.Rngs(0)), task)


def qwix_nnx(config: DecoderConfig, task: Task) -> Contender:
    """qwix's `LoraProvider` on the decoder written for NNX."""
    from flax import nnx

    from benchmarks.nnx_decoder import NnxDecoder

    model = NnxDecoder(config, None, dtype(), nnx.Rngs(0))
    return _split_nnx(_with_qwix(model, _linears(task.params), task), task)


def qwix_nnx_layer(width: int, task: Task) -> Contender:
    """qwix's `LoraProvider` on one NNX linear."""
    from flax import nnx

    from benchmarks.nnx_decoder import linear

    layer = linear(width, width, dtype(), nnx.Rngs(0))
    return _split_nnx(_with_qwix(layer, [""], task), task)


def _with_qwix(model: Any, names: Sequence[str], task: Task) -> Any:
    import qwix
    from flax import nnx

    path = f".*({'|'.join(names)})"
    rule = qwix.LoraRule(module_path=path, rank=RANK, alpha=ALPHA)
    provider = qwix.LoraProvider([rule])
    return qwix.apply_lora_to_model(model, provider, *task.inputs, rngs=nnx.Rngs(1))


def _split_nnx(model: Any, task: Task) -> Contender:
    from flax import nnx

    graph, adapters, frozen = nnx.split(model, nnx.LoRAParam, ...)

    def forward(adapters, frozen, *inputs):
        return nnx.merge(graph, adapters, frozen)(*inputs)

    return _by_autodiff(forward, adapters, frozen, task)
