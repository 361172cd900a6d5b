"""Layers that treat each number by itself.

Each bound has two parts: how far the error that came in moves the function, and what the
computation rounds, at the input that it really had. If f is monotone between its turning points,
the first part is exact: the largest change is at an end of the interval from x - e to x + e or at a
turning point in it; that of a convex f is at an end. For the second part a concave f with f(0) = 0
helps: if its argument is wrong by the relative error d, f is wrong by d at most.

Source: N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., sections 1.6 (what a
function makes of an error) and 3.1 (roundings in a row).
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np

from torchnnfs.testing.layers import Forward, Gradients, Layer, Wrong, finished
from torchnnfs.testing.precision import EXP, Array, Precision


def pointwise(
    name: str, forward: Forward, slope: Any, rounds: Any = None, turns: Any = (), **others: Any
) -> Layer:
    """The layer of a function that is convex, or monotone between its `turns`.

    ``slope(x, y, precision, **arguments)`` gives the derivative, and the error of ``g`` times a
    computed one in units of g; ``rounds(x, error, precision, **arguments)`` what the computation
    rounds. None: nothing, and what is tiny may be flushed to zero.
    """

    def bound(x: Array, error: Array, precision: Precision, **arguments: Any) -> Array:
        y = forward(x, **arguments)
        # Where nothing came in nothing moves, and half of the chains are asked this way.
        change = np.where(np.isfinite(y), 0.0, np.inf)
        if error.any():
            low, high = x - error, x + error
            size = np.abs(y)
            for end in (low, high, *(np.clip(turn, low, high) for turn in turns)):
                value = forward(end, **arguments)
                change = np.maximum(change, np.abs(value - y))
                size = np.maximum(size, np.abs(value))
            # The ends and the differences round in float64.
            change += (error > 0) * 2.0**-51 * size
            change = np.where(np.isnan(change), np.inf, change)
        if rounds is None:
            return change + precision.tiny
        return finished(y, change + rounds(x, error, precision, **arguments), precision, error)[1]

    def backward(x: Array, y: Array, g: Array, precision: Precision, **arguments: Any) -> Gradients:
        factor, wrong = slope(x, y, precision, **arguments)
        exact = np.where(factor == 0, 0.0, factor * g)
        if rounds is None:
            return {"input": (exact, np.full(exact.shape, precision.tiny))}
        # One product may be stored, or flushed to zero, before the last.
        wrong = np.abs(g) * wrong + precision.tiny + precision.stored_tiny
        return {"input": finished(exact, wrong, precision)}

    return Layer(name, forward, bound, backward, by_rows=True, **others)


def identity(x: Array) -> Array:
    """``y = x``: also dropout in eval mode."""
    return x


def relu(x: Array) -> Array:
    """``y = max(0, x)``, found without rounding; ``dL/dx = g`` where x > 0, else 0."""
    return np.maximum(0, x)


def leaky_relu(x: Array, negative_slope: float) -> Array:
    """``y = x`` where x > 0, else ``negative_slope x``.

    Slope and product round: ``gamma(2) |slope| |x - e|`` where x - e < 0, so does the gradient.
    Some libraries store the slope in the half type: there it rounds once more.
    """
    return np.where(x > 0, x, x.dtype.type(negative_slope) * x)


def _leaky_size(precision: Precision, negative_slope: float) -> float:
    return (precision.gamma(2) + precision.stored_unit) * abs(negative_slope)


def tanh(x: Array) -> Array:
    """``y = (exp(x) - exp(-x)) / (exp(x) + exp(-x))``, right to three units in the last place.

    ``dL/dx = g (1 - y^2)``, from the y that the layer computed: the square rounds, then all.
    """
    return np.tanh(x)


def sigmoid(x: Array) -> Array:
    """``y = 1 / (1 + exp(-x))``, for negative x as ``exp(x) / (1 + exp(x))``: none overflows.

    exp is wrong by 6 u, and the sum less; sum and quotient round: ``gamma(8) y`` at most. Many
    libraries compute ``1/2 + tanh(x / 2) / 2`` or a fraction of two polynomials plus 1/2. There a
    small y is as uncertain as 1/2, up to ``gamma(8) / 2``.

    ``dL/dx = g y (1 - y)``, from the y that the layer computed: three roundings. Of half types
    torch stores each of them on the CPU.
    """
    power = np.exp(-np.abs(x))
    return np.asarray(np.where(x < 0, power, x.dtype.type(1)) / (1 + power))


_ERFC = np.vectorize(math.erfc, otypes=[float])
_SLOPE, _CUBE = math.sqrt(2 / math.pi), 0.044715
_OTHER = {"none": "tanh", "tanh": "none"}
#: Where the two forms of GELU are least.
_LEAST = -0.7517915246935645, -0.752461422071016
#: Roundings of erf or tanh at a rounded argument, and three more of the sum and the products.
_ROUNDINGS = {"none": EXP + 2 + 3, "tanh": EXP + 7 + 3}


def _gate(x: Array, approximate: str) -> Array:
    """What GELU multiplies x with: the normal distribution, or tanh in its place."""
    if approximate == "tanh":
        return sigmoid(2 * _SLOPE * (x + _CUBE * x * x * x))
    return np.asarray(_ERFC(-x / math.sqrt(2)) / 2, x.dtype)


def gelu(x: Array, approximate: str) -> Array:
    """``y = x Phi(x)``, Phi the normal distribution ``(1 + erf(x / sqrt 2)) / 2``.

    With ``approximate="tanh"`` it is ``(1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2``.
    """
    return x * _gate(x, approximate)


def _gelu_rounds(x: Array, error: Array, precision: Precision, approximate: str) -> Array:
    """``gamma(n) |x| max(1, 1 + erf) / 2``, n = 11, or 16 with tanh.

    The argument of erf rounds twice, that of tanh seven times; both are concave, so their relative
    error is no larger. They are wrong by 6 u themselves: of 1, as vectorized kernels have it (with
    an error of 6 u of the result, torch 2.13 on AVX2 reached 1.1 times the bound). Then the sum
    ``1 + erf`` and two products round. The first of these may be ``x (1 + erf)``, which overflows
    from half of the largest number on (torch 2.13 on AVX-512).
    """
    size = precision.gamma(_ROUNDINGS[approximate]) * np.maximum(0.5, _gate(x + error, approximate))
    largest = np.abs(x) + error
    bound = (size + precision.tiny) * largest
    return np.where(2 * largest < precision.overflow, bound, np.inf)


def _gelu_slope(x: Array, y: Array, precision: Precision, approximate: str) -> tuple[Array, Array]:
    """``Phi(x) + x Phi'(x)``; ``Phi'`` is the normal density ``exp(-x^2 / 2) / c``.

    The density is wrong by its roundings and exp's, and by ``x^2 u`` for the rounded exponent. With
    tanh in the place of erf, ``1 - tanh^2`` is wrong by twice what tanh is. Two products follow.
    """
    gate, roundings, square = _gate(x, approximate), _ROUNDINGS[approximate], x * x
    if approximate == "tanh":
        inner = 2 * _SLOPE * np.abs(x) * (1 + 3 * _CUBE * square)
        density = inner * gate * (1 - gate)
        wrong = inner / 4 * precision.gamma(2 * roundings + 7)
        wrong = np.where(inner < precision.overflow, wrong, np.inf)
    else:
        density = np.abs(x) * np.exp(-square / 2) / math.sqrt(2 * math.pi)
        wrong = density * (precision.gamma(EXP + 4) + np.expm1(square * precision.unit))
    slope = gate + np.copysign(density, x)
    wrong += precision.gamma(roundings) * np.maximum(0.5, gate) + precision.tiny * (1 + square)
    return slope, wrong + precision.gamma(2) * (np.abs(slope) + wrong)


_BROKEN_RELUS: dict[str, Wrong] = {
    "ReLU left out": identity,
    "leaky ReLU, slope 1e-2": lambda x: leaky_relu(x, 1e-2),
    "leaky ReLU, slope 1e-4": lambda x: leaky_relu(x, 1e-4),
}
_BROKEN_LEAKY_RELUS: dict[str, Wrong] = {
    "leaky ReLU, slope 1 % too large": lambda x, negative_slope: (
        leaky_relu(x, 1.01 * negative_slope) if negative_slope else None
    )
}
_BROKEN_GELUS: dict[str, Wrong] = {
    "GELU in its other form": lambda x, approximate: gelu(x, _OTHER[approximate])
}
IDENTITY = pointwise("identity", identity, lambda x, y, precision: (1.0, 0.0))
DROPOUT = replace(IDENTITY, name="dropout", eval_only=True)
RELU = pointwise("relu", relu, lambda x, y, precision: (x > 0, 0.0), controls=_BROKEN_RELUS)
LEAKY_RELU = pointwise(
    "leaky relu",
    leaky_relu,
    lambda x, y, precision, negative_slope: (
        np.where(x > 0, 1.0, negative_slope),
        (x <= 0) * _leaky_size(precision, negative_slope),
    ),
    lambda x, error, precision, **slope: _leaky_size(precision, **slope) * np.maximum(error - x, 0),
    controls=_BROKEN_LEAKY_RELUS,
)
TANH = pointwise(
    "tanh",
    tanh,
    lambda x, y, precision: (
        1 - y * y,
        precision.gamma(2) * np.abs(1 - y * y) + precision.gamma(1) * y * y,
    ),
    lambda x, error, precision: precision.gamma(EXP) * tanh(np.abs(x) + error),
    controls={"tanh left out": identity},
)
SIGMOID = pointwise(
    "sigmoid",
    sigmoid,
    lambda x, y, precision: (
        y * (1 - y),
        4 * precision.roundoff * np.abs(y * (1 - y)) + precision.tiny + precision.stored_tiny,
    ),
    lambda x, error, precision: precision.gamma(EXP + 2) * np.maximum(sigmoid(x + error), 0.5),
    controls={"sigmoid left out": identity},
)
GELU = pointwise("gelu", gelu, _gelu_slope, _gelu_rounds, _LEAST, controls=_BROKEN_GELUS)
