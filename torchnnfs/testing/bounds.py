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
    """``e|W| + gamma(k+1) (|x||W| + |b| + e|W|)``, k the number of inputs."""
    size = np.abs(weights)
    carried = error @ size
    bound: Array = np.abs(x) @ size
    bound += carried
    if biases is not None:
        bound += np.abs(biases)
    n = weights.shape[0] + 1
    bound *= precision.gamma(n)
    bound += carried
    bound += (n + 1) * precision.tiny
    if precision.stored_unit:
        bound = precision.stored(exact_dense(x, weights, biases), bound)
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
    with np.errstate(all="ignore"):
        m = np.expm1(error)
        mean = np.sum(p * m, axis=dim, keepdims=True)
        d = np.where(mean < 1, (m * (1 - p) + (mean - p * m)) / (1 - mean), np.inf)
        q = np.expm1(u * (depth + 2 * widest)) + 2 * EXP_ULP * u
        s = np.sum(p * (1 + d) * q, axis=dim, keepdims=True)
        s = s + precision.gamma(x.shape[dim] - 1) * (1 + s)
        relative = np.where(s < 1, (1 + d) * (1 + q) * (1 + u) / (1 - s) - 1, np.inf)
        bound = np.where(p > 0, p * relative, np.exp(error - depth * (1 - u)))
        # No correct result leaves [0, 1], so no error is larger than 1 and a rounding.
        bound = np.fmin(bound, 1 + 4 * u)
    return precision.stored(p, bound + 2 * precision.tiny)
