"""Softmax and its logarithm.

The bounds are rigorous up to one assumption, the accuracy of `exp` and `log` (`EXP`).

Source: P. Blanchard, D. J. Higham and N. J. Higham, Accurately computing the log-sum-exp and
softmax functions, IMA J. Numer. Anal. 41 (2021).
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from torchnnfs.testing.layers import Gradients, Layer, Wrong, finished
from torchnnfs.testing.precision import EXP, Array, Precision


def _front(dim: int, *arrays: Array) -> tuple[Any, ...]:
    """The axis to compute along, and the arrays: a short axis first, since NumPy is slow there."""
    if arrays[0].shape[dim] >= 8:
        return dim, *arrays
    return 0, *(np.ascontiguousarray(np.moveaxis(each, dim, 0)) for each in arrays)


def _powers(x: Array, axis: int) -> tuple[Array, Array, Array]:
    """``x - m``, m the maximum along the axis; its exponentials; and their sum."""
    shifted: Array = x - np.max(x, axis=axis, keepdims=True)
    powers: Array = np.exp(shifted)
    return shifted, powers, np.sum(powers, axis=axis, keepdims=True)


def softmax(x: Array, dim: int = -1) -> Array:
    """``y_i = exp(x_i - m) / sum_j exp(x_j - m)`` along `dim`, m the maximum there."""
    axis, front = _front(dim, x)
    _, powers, total = _powers(front, axis)
    return np.moveaxis(powers / total, axis, dim)


def log_softmax(x: Array, dim: int) -> Array:
    """``y_i = x_i - m - log sum_j exp(x_j - m)`` along `dim`, m the maximum there."""
    axis, front = _front(dim, x)
    shifted, _, total = _powers(front, axis)
    return np.moveaxis(shifted - np.log(total), axis, dim)


def _moved(x: Array, e: Array, precision: Precision, axis: int, kept: float) -> tuple[Array, ...]:
    """log-softmax y, softmax p, how far e moves y, and what the computation of y rounds.

    e moves y_i most if x_i moves one way and all others the other way, by ``log(1 + d)`` with
    ``d = sum_{j != i} p_j (exp(e_i + e_j) - 1)``, and never by more than ``e_i + max e``.

    Rounded is ``u (m - x + 2 max e) + s / (1 - s) + 6 u log sum + u |y|``. One computed exponential
    is wrong by q: of its argument, ``u (max x - x + 2 max e)``, and of exp itself. s is the
    relative error of the sum: the mean of q, weighted with p, the additions, and `kept` where the
    terms or the sum are stored. log and two subtractions round.
    """
    u, gamma = precision.unit, precision.gamma(x.shape[axis] - 1)
    shifted, powers, total = _powers(x, axis)
    logarithm = np.log(total)
    y, p = shifted - logarithm, powers / total
    carried, reached, widest = np.zeros_like(p), p, np.max(e, axis=axis, keepdims=True)
    if widest.any():
        m = np.expm1(e)
        mean = np.sum(p * m, axis=axis, keepdims=True)
        d = m * (1 - p) + (1 + m) * (mean - p * m)
        # The differences cancel, so the rounding of float64 counts.
        d += (x.shape[axis] + 4) * 2.0**-52 * (m + (1 + m) * mean)
        carried = np.fmin(np.log1p(d), e + widest)
        reached = np.exp(np.minimum(y + carried, 0.0))
    argument = u * (2 * widest - shifted)
    q = (argument + EXP * u) * np.exp(argument)  # t exp(t) is no less than exp(t) - 1
    s = np.sum(np.where(reached > 0, reached * q, 0.0), axis=axis, keepdims=True)
    s = s + (gamma + kept) * (1 + s)
    rounded = argument + (np.where(s < 1, s / (1 - s), np.inf) + EXP * u * logarithm)
    return y, p, carried, rounded + u * (carried + rounded - y)


def softmax_bound(x: Array, error: Array, precision: Precision, dim: int = -1) -> Array:
    """``p (exp(c + l + 7 u) - 1)``, where p is the exact softmax of x.

    c is how far e moves the logarithm of p, and l what that rounds (`log_softmax_bound`), kept in
    the precision of the arithmetic. It holds for ``exp(log_softmax(x))``: one more exp rounds. It
    holds for ``exp(x_i - m) / sum`` as well: numerator and sum are wrong by what l has of them, and
    the quotient rounds once.
    """
    axis, front, errors = _front(dim, x, error)
    # Along another dimension than the last, torch keeps the exponentials in the stored type.
    kept = 0.0 if dim in (-1, x.ndim - 1) else precision.stored_unit
    u = precision.unit
    y, p, carried, rounded = _moved(front, errors, precision, axis, kept)
    far = carried + rounded + ((EXP + 1) * u + kept)
    bound = p * np.expm1(far)
    small = ~(p > 2.0**-1022)  # no normal number of float64: its relative error means nothing
    bound[small] = np.exp(y[small] + far[small])
    bound[np.isneginf(front) & (errors < np.inf)] = 0.0  # a masked input: exactly nothing
    # No correct result leaves [0, 1], so no error is larger than 1 and a few roundings.
    bound = np.fmin(bound, 1 + 8 * u) + precision.tiny + (precision.stored_tiny if kept else 0.0)
    widest = np.max(errors, axis=axis, keepdims=True)
    return np.moveaxis(finished(p, bound, precision, widest)[1], axis, dim)


def softmax_backward(x: Array, y: Array, g: Array, precision: Precision, dim: int) -> Gradients:
    """``dL/dx = p (g - sum_j g_j p_j)``, from the p that torch computed and kept."""
    exact = y * (g - np.sum(g * y, axis=dim, keepdims=True))
    size = np.abs(g) + np.sum(np.abs(g * y), axis=dim, keepdims=True)
    gamma, tiny = precision.gamma(y.shape[dim] + 3), (y.shape[dim] + 2) * precision.tiny
    return {"input": finished(exact, y * gamma * size + tiny, precision, size)}


def log_softmax_bound(x: Array, error: Array, precision: Precision, dim: int = -1) -> Array:
    """How far e moves y, and what is rounded: `_moved` has the formulas.

    Of half types torch keeps the sum, and ``m + log sum``, in the stored type on the CPU.
    """
    axis, front, errors = _front(dim, x, error)
    y, _, carried, rounded = _moved(front, errors, precision, axis, precision.stored_unit)
    kept = precision.stored_unit * np.abs(front - y) + precision.stored_tiny + precision.tiny
    # Infinite if any error is, for so is `carried` then.
    return np.moveaxis(finished(y, carried + rounded + kept, precision, errors)[1], axis, dim)


def log_softmax_backward(x: Array, y: Array, g: Array, precision: Precision, dim: int) -> Gradients:
    """``dL/dx = g - exp(y) sum_j g_j``, from the y that torch computed and kept."""
    p, sizes = np.exp(y), np.sum(np.abs(g), axis=dim, keepdims=True)
    bound = precision.gamma(y.shape[dim] + EXP + 3) * (np.abs(g) + p * sizes)
    bound = bound + precision.tiny * (2 + sizes)  # exp(y) may be flushed
    exact = g - p * np.sum(g, axis=dim, keepdims=True)
    return {"input": finished(exact, bound, precision, np.abs(g) + sizes)}


def _along_another(forward: Callable[..., Array]) -> Wrong:
    """The formula over the last axis but one, or the last; None where there is no other."""
    return lambda x, dim: None if x.ndim < 2 else forward(x, -2 if dim in (-1, x.ndim - 1) else -1)


#: The control that needs large inputs to be seen.
UNSHIFTED = "softmax without the maximum subtracted, on logits of size 100"
_BROKEN: dict[str, Wrong] = {
    "softmax over the wrong axis": _along_another(softmax),
    UNSHIFTED: lambda x, dim: np.exp(x) / np.sum(np.exp(x), axis=dim, keepdims=True),
}
_BROKEN_LOGS: dict[str, Wrong] = {
    "log-softmax over the wrong axis": _along_another(log_softmax),
    "log-softmax without the logarithm": softmax,
}
SOFTMAX = Layer("softmax", softmax, softmax_bound, softmax_backward, _BROKEN, by_rows=True)
LOG_SOFTMAX = Layer(
    "log-softmax", log_softmax, log_softmax_bound, log_softmax_backward, _BROKEN_LOGS, by_rows=True
)
