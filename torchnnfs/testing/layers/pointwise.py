"""Layers that treat each number by itself.

Each bound has two parts: how far the error that came in can move the function, and what the
computation rounds, at the input that it really had. If f is monotone between its turning points,
the first part is exact: the largest change is at an end of the interval from x - e to x + e or at a
turning point in it; that of a convex f is at an end. For the second part a concave f with f(0) = 0
helps: if its argument is wrong by the relative error d, f is wrong by d at most.

Source: N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., sections 1.6 (what a
function makes of an error) and 3.1 (roundings in a row).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from torchnnfs.testing.layers import Gradients, Layer, finished, gradient
from torchnnfs.testing.precision import EXP_ULP, Array, Precision

_EXP = 2 * EXP_ULP  # in units roundoff


def moved(forward: Callable[[Array], Array], x: Array, error: Array, *turns: float) -> Array:
    """The largest change of `forward` within `error`: monotone between its `turns`, or convex."""
    low, high, y = x - error, x + error, forward(x)
    values = [forward(low), forward(high), *(forward(np.clip(t, low, high)) for t in turns)]
    farthest: Array = np.max([np.abs(value - y) for value in values], axis=0)
    # These differences round in float64.
    farthest += (error > 0) * 2.0**-51 * np.max(np.abs([y, *values]), axis=0)
    return np.where(np.isnan(farthest), np.inf, farthest)


def passed_on_bound(x: Array, error: Array, precision: Precision) -> Array:
    """``e``: no number rounds, and none moves farther. What is tiny may be flushed to zero."""
    return error + precision.tiny


def passed_on_backward(
    x: Array, y: Array, g: Array, precision: Precision, **arguments: Any
) -> Gradients:
    """``dL/dx = g``, in the shape of x."""
    return {"input": (g.reshape(x.shape), np.full(x.shape, precision.tiny))}


def relu(x: Array) -> Array:
    """``y = max(0, x)``."""
    return np.maximum(0, x)


def relu_bound(x: Array, error: Array, precision: Precision) -> Array:
    """What e moves: the larger of 0 and x is found without rounding (tiny may be flushed)."""
    return moved(relu, x, error) + precision.tiny


def relu_backward(x: Array, y: Array, g: Array, precision: Precision) -> Gradients:
    """``dL/dx = g`` where x > 0, else 0."""
    return {"input": (np.where(x > 0, g, 0.0), np.full_like(g, precision.tiny))}


def identity(x: Array) -> Array:
    """``y = x``: also dropout in eval mode."""
    return x


def leaky_relu(x: Array, negative_slope: float) -> Array:
    """``y = x`` where x > 0, else ``negative_slope x``."""
    return np.where(x > 0, x, x.dtype.type(negative_slope) * x)


def leaky_relu_bound(x: Array, error: Array, precision: Precision, negative_slope: float) -> Array:
    """What e moves, and ``gamma(2) |slope| |x - e|`` where x - e < 0: slope and product round.

    Some libraries store the slope in the half type: there it rounds once more.
    """
    roundings = precision.gamma(2) + precision.stored_unit
    bound = moved(lambda x: leaky_relu(x, negative_slope), x, error)
    bound = bound + roundings * abs(negative_slope) * np.maximum(error - x, 0)
    return finished(leaky_relu(x, negative_slope), bound, error, precision)


def leaky_relu_backward(
    x: Array, y: Array, g: Array, precision: Precision, negative_slope: float
) -> Gradients:
    """``dL/dx = g`` where x > 0, else ``negative_slope g``."""
    exact = np.where(x > 0, 1.0, negative_slope) * g
    bound = np.where(x > 0, 0.0, (precision.gamma(2) + precision.stored_unit) * np.abs(exact))
    return {"input": gradient(exact, bound, precision)}


def tanh(x: Array) -> Array:
    """``y = (exp(x) - exp(-x)) / (exp(x) + exp(-x))``."""
    return np.tanh(x)


def tanh_bound(x: Array, error: Array, precision: Precision) -> Array:
    """What e moves, and ``gamma(6) |y|``: tanh is right to three units in the last place."""
    bound = moved(tanh, x, error) + precision.gamma(_EXP) * tanh(np.abs(x) + error)
    return finished(tanh(x), bound, error, precision)


def tanh_backward(x: Array, y: Array, g: Array, precision: Precision) -> Gradients:
    """``dL/dx = g (1 - y^2)``, from the y that the layer computed; the square rounds, then all."""
    exact = g * (1 - y * y)
    bound = precision.gamma(2) * np.abs(exact) + precision.gamma(1) * np.abs(g) * y * y
    return {"input": gradient(exact, bound, precision)}


def sigmoid(x: Array) -> Array:
    """``y = 1 / (1 + exp(-x))``, for negative x as ``exp(x) / (1 + exp(x))``: none overflows."""
    power = np.exp(-np.abs(x))
    y: Array = np.where(x < 0, power, x.dtype.type(1)) / (1 + power)
    return y


def sigmoid_bound(x: Array, error: Array, precision: Precision) -> Array:
    """What e moves, and ``gamma(8) max(y, 1/2)``.

    exp is wrong by 6 u, and the sum less; sum and quotient round: ``gamma(8) y`` at most. Many
    libraries compute ``1/2 + tanh(x / 2) / 2`` or a fraction of two polynomials plus 1/2. There a
    small y is as uncertain as 1/2, up to ``gamma(8) / 2``.
    """
    roundings = precision.gamma(_EXP + 2)
    bound = moved(sigmoid, x, error) + roundings * np.maximum(sigmoid(x + error), 0.5)
    return finished(sigmoid(x), bound, error, precision)


def sigmoid_backward(x: Array, y: Array, g: Array, precision: Precision) -> Gradients:
    """``dL/dx = g y (1 - y)``, from the y that the layer computed: three roundings.

    Of half types torch stores each of them on the CPU.
    """
    exact = g * y * (1 - y)
    bound = 4 * precision.roundoff * np.abs(exact)
    bound = bound + (precision.tiny + precision.stored_tiny) * (np.abs(g) + 1)
    return {"input": gradient(exact, bound, precision)}


_ERFC = np.vectorize(math.erfc, otypes=[float])
_SLOPE, _CUBE = math.sqrt(2 / math.pi), 0.044715
#: Where the two forms of GELU are least.
_LEAST = {"none": -0.7517915246935645, "tanh": -0.752461422071016}
#: Roundings of erf or tanh at a rounded argument, and three more of the sum and the products.
_ROUNDINGS = {"none": _EXP + 2 + 3, "tanh": _EXP + 7 + 3}


def _gate(x: Array, approximate: str) -> Array:
    """What GELU multiplies x with: the normal distribution, or tanh in its place."""
    if approximate == "tanh":
        return sigmoid(2 * _SLOPE * (x + _CUBE * x * x * x))
    gate: Array = (_ERFC(-x / math.sqrt(2)) / 2).astype(x.dtype)
    return gate


def _gate_size(x: Array, error: Array, approximate: str) -> Array:
    """The larger of 1/2 and ``(1 + erf) / 2`` within `error`: what is rounded.

    Kernels compute erf and tanh with an error in units of 1, not of their result.
    """
    return np.maximum(0.5, _gate(x + error, approximate))


def gelu(x: Array, approximate: str) -> Array:
    """``y = x Phi(x)``, Phi the normal distribution ``(1 + erf(x / sqrt 2)) / 2``.

    With ``approximate="tanh"`` it is ``(1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2``.
    """
    return x * _gate(x, approximate)


def gelu_bound(x: Array, error: Array, precision: Precision, approximate: str) -> Array:
    """What e moves, and ``gamma(n) |x| max(1, 1 + erf) / 2``, n = 11, or 16 with tanh.

    The argument of erf rounds twice, that of tanh seven times; both are concave, so their relative
    error is no larger. They are wrong by 6 u themselves: of 1, as vectorized kernels have it (with
    an error of 6 u of the result, torch 2.13 on AVX2 reached 1.1 times the bound). Then the sum
    ``1 + erf`` and two products round.
    """
    far, roundings = np.abs(x) + error, precision.gamma(_ROUNDINGS[approximate])
    bound = moved(lambda x: gelu(x, approximate), x, error, _LEAST[approximate])
    bound = bound + (roundings * _gate_size(x, error, approximate) + precision.tiny) * far
    return finished(gelu(x, approximate), bound, error, precision)


def gelu_backward(
    x: Array, y: Array, g: Array, precision: Precision, approximate: str
) -> Gradients:
    """``dL/dx = g (Phi(x) + x Phi'(x))``; ``Phi'`` is the normal density ``exp(-x^2 / 2) / c``.

    The density is wrong by its roundings and exp's, and by ``x^2 u`` for the rounded exponent. With
    tanh in the place of erf, ``1 - tanh^2`` is wrong by twice what tanh is.
    """
    gate, size = _gate(x, approximate), _gate_size(x, np.zeros_like(x), approximate)
    roundings, square = _ROUNDINGS[approximate], x * x
    if approximate == "tanh":
        inner = 2 * _SLOPE * np.abs(x) * (1 + 3 * _CUBE * square)
        slope = inner * gate * (1 - gate)
        wrong = inner / 4 * precision.gamma(2 * roundings + 7)
    else:
        slope = np.abs(x) * np.exp(-square / 2) / math.sqrt(2 * math.pi)
        wrong = slope * (precision.gamma(_EXP + 4) + np.expm1(square * precision.unit))
    exact = g * (gate + np.copysign(slope, x))
    bound = np.abs(g) * (precision.gamma(roundings) * size + wrong + precision.tiny * (1 + square))
    bound = bound + precision.gamma(2) * (np.abs(exact) + bound)
    return {"input": gradient(exact, bound, precision)}


def _steeper(x: Array, negative_slope: float) -> Array | None:
    return leaky_relu(x, 1.01 * negative_slope) if negative_slope else None


def _other_gelu(x: Array, approximate: str) -> Array:
    return gelu(x, "none" if approximate == "tanh" else "tanh")


RELU = Layer(
    "relu",
    relu,
    relu_bound,
    relu_backward,
    controls={
        "ReLU left out": lambda x: x,
        "leaky ReLU, slope 1e-2": lambda x: np.where(x > 0, x, 1e-2 * x),
        "leaky ReLU, slope 1e-4": lambda x: np.where(x > 0, x, 1e-4 * x),
    },
)
LEAKY_RELU = Layer(
    "leaky relu",
    leaky_relu,
    leaky_relu_bound,
    leaky_relu_backward,
    {"leaky ReLU, slope 1 % too large": _steeper},
)
TANH = Layer("tanh", tanh, tanh_bound, tanh_backward, {"tanh left out": lambda x: x})
SIGMOID = Layer(
    "sigmoid", sigmoid, sigmoid_bound, sigmoid_backward, {"sigmoid left out": lambda x: x}
)
GELU = Layer("gelu", gelu, gelu_bound, gelu_backward, {"GELU in its other form": _other_gelu})
IDENTITY = Layer("identity", identity, passed_on_bound, passed_on_backward)
DROPOUT = Layer("dropout", identity, passed_on_bound, passed_on_backward, eval_only=True)
