"""What the ops should compute: NumPy in float64, written the slow and obvious way.

The oracle knows nothing of the library: each einsum is told how its A and B multiply
into the kernel (``factors``), instead of finding out.
"""

import itertools

import numpy as np

TOLERANCE = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 2e-2}


def assert_close(got, want, dtype: str = "float32", rtol: float | None = None) -> None:
    """Asserts closeness, relative to the largest element wanted.

    ``rtol`` replaces the table's tolerance where errors add up over a long sum.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{got.shape} is not {want.shape}"
    atol = (rtol or TOLERANCE[dtype]) * np.abs(want).max(initial=0.0)
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def merge(kernel, a, b, scaling, factors="ir,ro->io"):
    """``W0 + scaling * A B``, where ``factors`` says how A and B multiply."""
    kernel, a, b = (np.asarray(array, np.float64) for array in (kernel, a, b))
    delta = np.einsum(factors, a, b)
    return kernel + scaling * delta.reshape(kernel.shape)


def dora_merge(kernel, a, b, magnitude, scaling, factors="ir,ro->io", inputs=(0,)):
    """``m / ‖W‖ * W`` for ``W = W0 + scaling * A B``, norms over the axes ``inputs``.

    ``magnitude`` has the other axes of the kernel, in the kernel's order.
    """
    merged = merge(kernel, a, b, scaling, factors)
    norms = np.sqrt(np.square(merged).sum(axis=inputs, keepdims=True))
    return np.expand_dims(np.asarray(magnitude, np.float64), inputs) / norms * merged


def dense(x, kernel, a, b, scaling):
    return np.asarray(x, np.float64) @ merge(kernel, a, b, scaling)


def einsum(equation, factors, x, kernel, a, b, scaling):
    merged = merge(kernel, a, b, scaling, factors)
    return np.einsum(equation, np.asarray(x, np.float64), merged)


def experts(x, kernel, a, b, scaling, sizes):
    """Each row times the merged kernel of its expert; zero beyond the experts' rows."""
    merged = merge(kernel, a, b, scaling, "eir,ero->eio")
    y = np.zeros((len(x), merged.shape[2]))
    ends = np.cumsum(sizes)
    for matrix, start, stop in zip(merged, ends - sizes, ends, strict=True):
        y[start:stop] = np.asarray(x, np.float64)[start:stop] @ matrix
    return y


def embed(ids, table, a, b, scaling):
    return merge(table, a, b, scaling)[np.asarray(ids)]


def attend(x, table, a, b, scaling):
    return np.asarray(x, np.float64) @ merge(table, a, b, scaling).T


def conv(x, kernel, *, strides, padding, dilation=None, groups=1):
    """Convolves ``[b, *spatial, i]`` with ``[*k, i/groups, o]``, tap by tap.

    ``padding`` is a list of (before, after); ``"SAME"`` and ``"VALID"`` as in XLA.
    """
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    window, (i_group, o) = kernel.shape[:-2], kernel.shape[-2:]
    dilation = dilation or [1] * len(window)
    reach = [(k - 1) * d for k, d in zip(window, dilation, strict=True)]
    sizes = x.shape[1:-1]
    if padding == "VALID":
        padding = [(0, 0)] * len(window)
    elif padding == "SAME":
        total = [
            max((-(-n // s) - 1) * s + r + 1 - n, 0)
            for n, s, r in zip(sizes, strides, reach, strict=True)
        ]
        padding = [(p // 2, p - p // 2) for p in total]
    x = np.pad(x, [(0, 0), *padding, (0, 0)])
    out = [
        (n - r - 1) // s + 1
        for n, r, s in zip(x.shape[1:-1], reach, strides, strict=True)
    ]
    y = np.zeros((x.shape[0], *out, o))
    for tap in itertools.product(*map(range, window)):
        seen = x[
            :,
            *(
                slice(t * d, t * d + (n - 1) * s + 1, s)
                for t, d, n, s in zip(tap, dilation, out, strides, strict=True)
            ),
        ]
        for g in range(groups):
            ins = slice(g * i_group, (g + 1) * i_group)
            outs = slice(g * o // groups, (g + 1) * o // groups)
            y[..., outs] += seen[..., ins] @ kernel[tap][:, outs]
    return y
