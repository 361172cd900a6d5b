"""How far a correct floating-point computation may stray from the exact one. No torch here.

Every function takes the exact input `x` of a layer and `error`, how far the computed input may be
from it (elementwise, absolute), and returns how far the computed output may be from the exact
output. What is summed in which order, with or without fused multiply-add, makes no difference.
The bounds are rigorous up to one assumption, the accuracy of `exp` (`EXP_ULP`).

Sources: N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., sections 3.1, 3.3
and 3.5 (dot products, running error analysis); P. Blanchard, D. J. Higham and N. J. Higham,
Accurately computing the log-sum-exp and softmax functions, IMA J. Numer. Anal. 41 (2021).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from torchnnfs.testing.reference import Array
from torchnnfs.testing.reference import dense as exact_dense
from torchnnfs.testing.reference import flatten as exact_flatten
from torchnnfs.testing.reference import log_softmax as exact_log_softmax
from torchnnfs.testing.reference import softmax as exact_softmax

#: Largest error of `exp` in units in the last place. Seen on a CPU with AVX-512: 0.57 in torch
#: 2.13, 2.37 in NumPy 2.4, whose authors tested up to 2.52; CUDA's manual gives 1 for `expf`.
EXP_ULP = 3.0


@dataclass(frozen=True)
class Precision:
    """What an arithmetic rounds to.

    Attributes:
        unit: unit roundoff u of the arithmetic, half the distance from 1 to the next number, and
            that of the float64 reference on top: both sides round.
        tiny: smallest normal number of the arithmetic; what is smaller may be flushed to zero.
        stored_unit: unit roundoff of the type a result is stored in, when that is another one:
            half types are computed in float32 and rounded once.
        stored_tiny: largest error of that rounding near zero.
        largest: largest finite number of the stored type.
        digits: significant bits of the stored type.
        smallest: smallest positive (subnormal) number of the stored type.
    """

    unit: float
    tiny: float
    largest: float
    digits: int
    smallest: float
    stored_unit: float = 0.0
    stored_tiny: float = 0.0

    @property
    def overflow(self) -> float:
        """Where the arithmetic itself overflows; half types are computed in float32."""
        return PRECISIONS["float32"].largest if self.stored_unit else self.largest

    def gamma(self, n: int) -> float:
        """Relative error of n roundings in a row, ``n u / (1 - n u)``; Higham, lemma 3.1."""
        return n * self.unit / (1 - n * self.unit) if n * self.unit < 1 else np.inf

    def stored(self, y: Array, error: Array) -> Array:
        """`error`, and the rounding of the result `y` to the type it is stored in."""
        return error + self.stored_unit * (np.abs(y) + error) + self.stored_tiny

    def ulp(self, y: Array) -> Array:
        """Unit in the last place of the stored type at `y`."""
        exponent = np.frexp(y)[1]
        unit = np.maximum(np.ldexp(1.0, exponent - self.digits), self.smallest)
        return np.where(y == 0, self.smallest, unit)


_U64 = 2.0**-53
_U32 = 2.0**-24 + _U64

#: By the name of the dtype, as torch and NumPy spell it.
PRECISIONS = {
    "float64": Precision(2 * _U64, 2.0**-1022, float(np.finfo(np.float64).max), 53, 2.0**-1074),
    "float32": Precision(_U32, 2.0**-126, float(np.finfo(np.float32).max), 24, 2.0**-149),
    "bfloat16": Precision(
        _U32, 2.0**-126, (2 - 2.0**-7) * 2.0**127, 8, 2.0**-133, 2.0**-8, 2.0**-126
    ),
    "float16": Precision(_U32, 2.0**-126, 65504.0, 11, 2.0**-24, 2.0**-11, 2.0**-25),
}


def dense(
    x: Array, error: Array, precision: Precision, weights: Array, biases: Array | None = None
) -> Array:
    """``e|W| + gamma(k+1) (|x||W| + |b| + e|W|)``, k the number of inputs.

    Half types are rounded once behind the product and, where there is a bias, once behind the sum.
    Numbers below `tiny` may be taken for zero, before or after the product. Where the terms could
    overflow, even if their sum does not, there is no bound.
    """
    size = np.abs(weights)
    carried = error @ size
    bound: Array = np.abs(x) @ size
    bound += carried
    if biases is not None:
        bound += np.abs(biases)
    too_large = ~(bound < precision.overflow)
    n = weights.shape[0] + 1
    bound *= precision.gamma(n)
    bound += carried
    flushed = np.sum(size, axis=0) + np.sum(np.abs(x), axis=-1, keepdims=True)
    bound += precision.tiny * (flushed + n + 1)
    if precision.stored_unit:
        product = exact_dense(x, weights)
        bound = precision.stored(product, bound)
        if biases is not None:
            bound = np.where(biases == 0, bound, precision.stored(product + biases, bound))
    bound[too_large] = np.inf
    return bound


def relu(x: Array, error: Array, precision: Precision) -> Array:
    """``e``: the larger of 0 and x is found without rounding (what is tiny may be flushed)."""
    return error + precision.tiny


def softmax(x: Array, error: Array, precision: Precision, dim: int = -1) -> Array:
    """``p ((1 + d) (1 + q) (1 + u) / (1 - s) - 1)``, where p is the exact softmax of x.

    d is what the error that came in does: it moves numerator and sum together, at most by
    ``((1 - p_i) m_i + sum_{j != i} p_j m_j) / (1 - sum_j p_j m_j)`` with ``m = expm1(e)``.
    q is the error of one computed exponential: of its argument, ``u (max x - x + 2 max e)``, and
    of exp itself. s is that of the sum: the mean of q, weighted with p, and the additions.
    """
    u = precision.unit
    p = exact_softmax(x, dim)
    depth = np.max(x, axis=dim, keepdims=True) - x
    widest = np.max(error, axis=dim, keepdims=True)
    # Along another dimension than the last, torch keeps the exponentials in the stored type.
    kept = 0.0 if dim in (-1, x.ndim - 1) else precision.stored_unit
    with np.errstate(all="ignore"):
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
        # No correct result leaves [0, 1], so no error is larger than 1 and a rounding.
        bound = np.fmin(np.where(p > 0, p * relative, nothing), 1 + 4 * u)
    tiny = precision.tiny + (precision.stored_tiny if kept else 0.0)
    bound = precision.stored(p, bound + 2 * tiny)
    return np.where(np.isfinite(widest), bound, np.inf)


def log_softmax(x: Array, error: Array, precision: Precision, dim: int = -1) -> Array:
    """``e + max e + u (m - x + 2 max e) + s / (1 - s) + 2 u (...)``.

    The logarithm of a sum of exponentials moves at most as far as the input that moves most. s is
    the relative error of the computed sum, as in `softmax`; log and two subtractions round. Of half
    types torch keeps the sum, and ``m + log sum``, in the stored type on the CPU.
    """
    u = precision.unit
    y = exact_log_softmax(x, dim)
    depth = np.max(x, axis=dim, keepdims=True) - x
    widest = np.max(error, axis=dim, keepdims=True)
    with np.errstate(all="ignore"):
        q = np.expm1(u * (depth + 2 * widest)) + 2 * EXP_ULP * u
        terms = np.exp(y + error + widest)
        s = np.sum(np.where(terms > 0, terms * q, 0.0), axis=dim, keepdims=True)
        s = s + (precision.gamma(x.shape[dim] - 1) + precision.stored_unit) * (1 + s)
        log = np.abs(y + depth)
        bound = error + widest + u * (depth + 2 * widest)
        bound = bound + np.where(s < 1, s / (1 - s), np.inf) + 2 * EXP_ULP * u * log
        bound = bound + u * (np.abs(y) + bound)
        bound = bound + precision.stored_unit * np.abs(x - y) + precision.stored_tiny
    return precision.stored(y, bound + 2 * precision.tiny)


def identity(x: Array, error: Array, precision: Precision) -> Array:
    """The error that came in."""
    return error + precision.tiny


def flatten(
    x: Array, error: Array, precision: Precision, start_dim: int = 1, end_dim: int = -1
) -> Array:
    """The error that came in, in the shape of the output."""
    return exact_flatten(error, start_dim, end_dim) + precision.tiny
