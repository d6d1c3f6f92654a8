"""Linear probing: a linear classifier on frozen features, as a baseline."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PENALTIES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 1e-6)
MAX_ITERATIONS = 200


class Probe(NamedTuple):
    """A linear classifier ``argmax(x @ kernel + bias)``.

    Attributes:
      kernel: ``[i, v]`` float64.
      bias: ``[v]`` float64.
      penalty: the L2 penalty selected on the validation set.
      accuracy: accuracy on the validation set.
    """

    kernel: np.ndarray
    bias: np.ndarray
    penalty: float
    accuracy: float


def fit_probe(
    features: np.ndarray,
    labels: np.ndarray,
    validation: tuple[np.ndarray, np.ndarray],
    *,
    num_labels: int,
    penalties: Sequence[float] = PENALTIES,
) -> Probe:
    """Fits multinomial logistic regression, selecting the penalty on a validation set.

    Minimises ``mean(-log softmax(z W + b)_y) + penalty/2 · |W|²`` over standardised
    features ``z``, by L-BFGS in float64, for each penalty from the largest down.

    Args:
      features: ``[n, i]``.
      labels: ``[n]`` class indices.
      validation: features and labels for selecting the penalty.
      num_labels: number of classes ``v``.
      penalties: candidate penalties.

    Returns:
      The most accurate probe, for unstandardised features; ties go to the largest
      penalty.

    Raises:
      ValueError: if shapes disagree, a feature is not finite, or a label is out of
        range.

    Example:
      >>> x, y = np.array([[-1.0], [-2.0], [1.0], [2.0]]), np.array([0, 0, 1, 1])
      >>> fit_probe(x, y, (x, y), num_labels=2).accuracy
      1.0
    """
    from scipy.optimize import minimize  # slow to import

    x = np.asarray(features, np.float64)
    if x.ndim != 2 or len(x) != len(labels) or not len(x):
        raise ValueError(
            f"features must be [n, i] with n = {len(labels)} labels, at least 1; got "
            f"{x.shape}."
        )
    if not np.isfinite(x).all():
        raise ValueError("features must be finite; they contain NaN or infinity.")
    for name, numbers in (("labels", labels), ("validation", validation[1])):
        numbers = np.asarray(numbers)
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < num_labels:
            raise ValueError(
                f"{name} must be class indices in [0, num_labels) = [0, {num_labels}); "
                f"got {numbers.min()} to {numbers.max()}."
            )
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-8
    z, n, i, v = (x - mean) / scale, len(x), x.shape[1], num_labels
    onehot = np.eye(v)[labels]

    def objective(flat, penalty):
        kernel, bias = flat[:-v].reshape(i, v), flat[-v:]
        logits = z @ kernel + bias
        logits -= logits.max(axis=1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        dlogits = (np.exp(log_p) - onehot) / n
        grad = np.concatenate(
            [(z.T @ dlogits + penalty * kernel).ravel(), dlogits.sum(axis=0)]
        )
        return -(onehot * log_p).sum() / n + penalty / 2 * (kernel**2).sum(), grad

    flat, best = np.zeros((i + 1) * v), None
    for penalty in sorted(penalties, reverse=True):
        flat = minimize(
            objective,
            flat,
            args=(penalty,),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": MAX_ITERATIONS},
        ).x
        kernel = flat[:-v].reshape(i, v) / scale[:, None]
        probe = Probe(kernel, flat[-v:] - mean @ kernel, penalty, 0.0)
        accuracy = probe_accuracy(probe, *validation)
        if best is None or accuracy > best.accuracy:
            best = probe._replace(accuracy=accuracy)
    if best is None:
        raise ValueError("penalties must have at least 1 candidate; got none.")
    return best


def probe_accuracy(probe: Probe, features: np.ndarray, labels: np.ndarray) -> float:
    """Returns the accuracy of the probe on ``features`` ``[n, i]``."""
    logits = np.asarray(features, np.float64) @ probe.kernel + probe.bias
    return float(np.mean(logits.argmax(axis=1) == labels))
