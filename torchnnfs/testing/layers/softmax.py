"""Softmax and its logarithm.

The bounds are rigorous up to one assumption, the accuracy of `exp` and `log` (`EXP_ULP`).

Source: P. Blanchard, D. J. Higham and N. J. Higham, Accurately computing the log-sum-exp and
softmax functions, IMA J. Numer. Anal. 41 (2021).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from torchnnfs.testing.layers import Gradients, Layer, finished
from torchnnfs.testing.precision import EXP_ULP, Array, Precision


def _named(dim: int | None, kind: str) -> int:
    if dim is None:
        raise ValueError(
            f"compare expects {kind} to name its dim, got None; write {kind}(dim=-1) for the last"
        )
    return dim


def softmax(x: Array, dim: int | None = -1) -> Array:
    """``y_i = exp(x_i - m) / sum_j exp(x_j - m)`` along `dim`, m the maximum there."""
    dim = _named(dim, "Softmax")
    powers: Array = np.exp(x - np.max(x, axis=dim, keepdims=True))
    total: Array = np.sum(powers, axis=dim, keepdims=True)
    return powers / total


def softmax_bound(x: Array, error: Array, precision: Precision, dim: int | None = -1) -> Array:
    """``p ((1 + d) (1 + q) (1 + u) / (1 - s) - 1)``, where p is the exact softmax of x.

    d is what the error that came in does: it moves numerator and sum together, at most by
    ``((1 - p_i) m_i + sum_{j != i} p_j m_j) / (1 - sum_j p_j m_j)`` with ``m = expm1(e)``.
    q is the error of one computed exponential: of its argument, ``u (max x - x + 2 max e)``, and
    of exp itself. s is that of the sum: the mean of q, weighted with p, and the additions.

    As ``exp(log_softmax(x))`` it is ``p ((1 + d) (1 + 6 u) exp(l) - 1)``, l what the logarithm
    rounds, kept in the precision of the arithmetic. The larger of the two holds for both ways.
    """
    dim = _named(dim, "Softmax")
    u = precision.unit
    p = softmax(x, dim)
    depth = np.max(x, axis=dim, keepdims=True) - x
    widest = np.max(error, axis=dim, keepdims=True)
    # Along another dimension than the last, torch keeps the exponentials in the stored type.
    kept = 0.0 if dim in (-1, x.ndim - 1) else precision.stored_unit
    m = np.expm1(error)
    mean = np.sum(p * m, axis=dim, keepdims=True)
    d = np.where(mean < 1, (m * (1 - p) + (mean - p * m)) / (1 - mean), np.inf)
    r = 2 * EXP_ULP * u + kept
    q = np.expm1(u * (depth + 2 * widest)) * (1 + r) + r
    # What is 0 in float64 already is no more than this.
    nothing = np.exp(error + widest - depth * (1 - u))
    s = np.sum(np.where(p > 0, p * (1 + d) * q, nothing), axis=dim, keepdims=True)
    s = s + precision.gamma(x.shape[dim] - 1) * (1 + s)
    relative = np.where(s < 1, (1 + d) * (1 + q) * (1 + u) / (1 - s) - 1, np.inf)
    arithmetic = replace(precision, stored_unit=0, stored_tiny=0)
    carried, rounded = _logarithm(x, error, arithmetic, dim)
    by_logarithm = (1 + d) * (1 + 2 * EXP_ULP * u) * np.exp(rounded) - 1
    nothing = np.fmax(nothing, np.exp(log_softmax(x, dim) + carried + rounded))
    # No correct result leaves [0, 1], so no error is larger than 1 and a few roundings.
    bound = np.fmin(np.where(p > 0, p * np.fmax(relative, by_logarithm), nothing), 1 + 8 * u)
    bound = bound + precision.tiny + (precision.stored_tiny if kept else 0.0)
    return finished(p, bound, widest, precision)


def softmax_backward(
    x: Array, y: Array, g: Array, precision: Precision, dim: int | None = -1
) -> Gradients:
    """``dL/dx = p (g - sum_j g_j p_j)``, from the p that torch computed and kept."""
    dim = _named(dim, "Softmax")
    total = np.sum(g * y, axis=dim, keepdims=True)
    size = np.sum(np.abs(g * y), axis=dim, keepdims=True)
    exact = y * (g - total)
    bound = y * (precision.gamma(y.shape[dim] + 3) * (np.abs(g) + size)) + 2 * precision.tiny
    return {"input": (exact, finished(exact, bound, np.zeros_like(g), precision))}


def log_softmax(x: Array, dim: int | None = -1) -> Array:
    """``y_i = x_i - m - log sum_j exp(x_j - m)`` along `dim`, m the maximum there."""
    dim = _named(dim, "LogSoftmax")
    shifted: Array = x - np.max(x, axis=dim, keepdims=True)
    total: Array = np.sum(np.exp(shifted), axis=dim, keepdims=True)
    return shifted - np.log(total)


def _logarithm(x: Array, error: Array, precision: Precision, dim: int) -> tuple[Array, Array]:
    """How far e moves the exact result, and what the computation rounds."""
    u = precision.unit
    y = log_softmax(x, dim)
    p, m = np.exp(y), np.expm1(error)
    depth = np.max(x, axis=dim, keepdims=True) - x
    widest = np.max(error, axis=dim, keepdims=True)
    others = np.sum(p * m, axis=dim, keepdims=True) - p * m
    carried = np.fmin(np.log1p(m * (1 - p) + (1 + m) * others), error + widest)
    q = np.expm1(u * (depth + 2 * widest)) + 2 * EXP_ULP * u
    terms = np.exp(y + error + widest)
    s = np.sum(np.where(terms > 0, terms * q, 0.0), axis=dim, keepdims=True)
    s = s + (precision.gamma(x.shape[dim] - 1) + precision.stored_unit) * (1 + s)
    rounded = u * (depth + 2 * widest) + 2 * EXP_ULP * u * np.abs(y + depth)
    rounded = rounded + np.where(s < 1, s / (1 - s), np.inf)
    return carried, rounded + u * (np.abs(y) + carried + rounded)


def log_softmax_bound(x: Array, error: Array, precision: Precision, dim: int | None = -1) -> Array:
    """``log(1 + sum_{j != i} p_j (exp(e_i + e_j) - 1))``, and what is rounded.

    The first is how far the result moves if x_i moves one way and all others the other way.
    Rounded is ``u (m - x + 2 max e) + s / (1 - s) + 6 u log sum + u |y|``: s is the relative error
    of the computed sum, as in `softmax_bound`; log and two subtractions round. Of half types torch
    keeps the sum, and ``m + log sum``, in the stored type on the CPU.
    """
    dim = _named(dim, "LogSoftmax")
    y = log_softmax(x, dim)
    carried, rounded = _logarithm(x, error, precision, dim)
    kept = precision.stored_unit * np.abs(x - y) + precision.stored_tiny + precision.tiny
    return finished(y, carried + rounded + kept, np.max(error, axis=dim, keepdims=True), precision)


def log_softmax_backward(
    x: Array, y: Array, g: Array, precision: Precision, dim: int | None = -1
) -> Gradients:
    """``dL/dx = g - exp(y) sum_j g_j``, from the y that torch computed and kept."""
    dim = _named(dim, "LogSoftmax")
    total = np.sum(g, axis=dim, keepdims=True)
    size = np.sum(np.abs(g), axis=dim, keepdims=True)
    exact = g - np.exp(y) * total
    roundings = precision.gamma(y.shape[dim] + 2 * EXP_ULP + 3)
    bound = roundings * (np.abs(g) + np.exp(y) * size) + 2 * precision.tiny
    return {"input": (exact, finished(exact, bound, np.zeros_like(g), precision))}


def _along_another(forward: Callable[..., Array]) -> Callable[..., Array | None]:
    """The formula over the last axis but one, or the last; None where there is no other."""

    def wrong(x: Array, dim: int) -> Array | None:
        last = dim in (-1, x.ndim - 1)
        return None if x.ndim < 2 else forward(x, -2 if last else -1)

    return wrong


def _unshifted(x: Array, dim: int) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        powers: Array = np.exp(x)
        total: Array = np.sum(powers, axis=dim, keepdims=True)
        return powers / total


#: The control that needs large inputs to be seen.
UNSHIFTED = "softmax without the maximum subtracted, on logits of size 100"

SOFTMAX = Layer(
    "softmax",
    softmax,
    softmax_bound,
    softmax_backward,
    controls={"softmax over the wrong axis": _along_another(softmax), UNSHIFTED: _unshifted},
)
LOG_SOFTMAX = Layer(
    "log-softmax",
    log_softmax,
    log_softmax_bound,
    log_softmax_backward,
    controls={
        "log-softmax over the wrong axis": _along_another(log_softmax),
        "log-softmax without the logarithm": softmax,
    },
)
