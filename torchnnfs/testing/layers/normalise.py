"""Layers that subtract a mean and divide by a deviation.

Sources: T. F. Chan, G. H. Golub and R. J. LeVeque, Algorithms for computing the sample variance:
analysis and recommendations, The American Statistician 37 (1983): the variance in two passes, by
updating or by merging parts; N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed.,
sections 1.9 and 4.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from torchnnfs.testing.layers import Gradients, Layer, Maybe, finished, gradient
from torchnnfs.testing.precision import Array, Precision


class _Normal(NamedTuple):
    """Numbers less their mean, over their deviation; and how far computed ones may stray.

    n is ``(x - m) / s``, s the root of the variance and eps; `size` is ``(|x| + |m|) / s``, what
    cancels where n is computed as ``x / s - m / s``; `inverse` is the largest that ``1 / s`` may
    be, and `relative` the error of a computed one.
    """

    value: Array
    error: Array
    size: Array
    inverse: Array
    relative: Array


def _scaled(n: Array, weight: Maybe, bias: Maybe) -> Array:
    """``n w + b``."""
    n = n if weight is None else n * weight
    return n if bias is None else n + bias


def _scaled_bound(
    y: Array, normal: _Normal, precision: Precision, weight: Maybe, bias: Maybe
) -> Array:
    """``|w| a + gamma(2) (|w| (|n| + a) + |b|)``, a the error of n."""
    w, b = np.abs(1.0 if weight is None else weight), np.abs(0.0 if bias is None else bias)
    size = w * (np.abs(normal.value) + normal.error) + b
    bound = w * (normal.error + precision.tiny) + precision.gamma(2) * size
    # w / s may be flushed before it is multiplied with x and m.
    bound = bound + precision.tiny * (4 + normal.size / normal.inverse)
    return finished(y, bound, w * normal.size + b, precision)


def _parameters(
    g: Array, n: Array, wrong: Array, rows: tuple[int, ...], precision: Precision, **kept: Maybe
) -> Gradients:
    """``dL/dw = sum g n`` with n wrong by `wrong`, ``dL/db = sum g``: sums over the `rows`.

    Of half types torch adds some up as stored on the CPU.
    """
    count = math.prod(g.shape[axis] for axis in rows)
    found = {}
    for name, factor, error in (("weight", n, wrong), ("bias", np.ones_like(g), 0.0)):
        size = np.abs(g) * (error + (count + 2) * precision.roundoff * (np.abs(factor) + error))
        bound = np.sum(size, axis=rows) + precision.tiny * count
        if kept[name] is not None:
            found[name] = gradient(np.sum(g * factor, axis=rows), bound, precision)
    return found


def _normal(
    x: Array, error: Array, precision: Precision, axes: tuple[int, ...], eps: float, kept: float
) -> _Normal:
    """As `layer_norm_bound` derives it; m and 1 / s are `kept` with that relative error."""

    def mean(a: Array) -> Array:
        found: Array = np.mean(a, axis=axes, keepdims=True)
        return found

    count = math.prod(x.shape[axis] for axis in axes)
    m = mean(x)
    s = np.sqrt(mean((x - m) ** 2) + eps)
    value = (x - m) / s
    drift = np.sqrt(mean(error * error))
    inverse = 1 / np.maximum(s - drift, math.sqrt(eps))
    moved = ((1 - 2 / count) * error + mean(error) + np.abs(value) * drift) * inverse
    # No n is larger than the root of how many there are.
    moved = np.fmin(moved, np.abs(value) + math.sqrt(count))

    far = np.abs(x) + error
    largest = np.max(far, axis=axes, keepdims=True)
    q = precision.gamma(count) * mean(far) + precision.gamma(4 + 2 * math.log(count)) * largest
    q = q * inverse
    eta = q * (math.sqrt(8) + q) + precision.gamma(count + 6) + 2 * precision.tiny * inverse**2
    # Infinite where nothing is known of s.
    relative = (1 + precision.gamma(4)) / np.sqrt(np.fmax(1 - eta, 0)) - 1 + kept
    size = (far + np.abs(m) + mean(error)) * inverse
    rounded = q + (precision.gamma(4) + kept) * size + precision.tiny * inverse
    rounded = rounded + relative * (np.abs(value) + moved + rounded)
    overflows = 4 * np.sum(far * far, axis=axes, keepdims=True) > precision.overflow
    return _Normal(value, moved + np.where(overflows, np.inf, rounded), size, inverse, relative)


def layer_norm(
    x: Array, normalized_shape: Sequence[int], weight: Maybe, bias: Maybe, eps: float
) -> Array:
    """``y = n w + b``, ``n = (x - m) / s``, ``s = sqrt(v + eps)``.

    m and v are the mean and the variance of x over its last axes, those of `normalized_shape`.
    """
    axes = tuple(range(-len(normalized_shape), 0))
    centred = x - np.mean(x, axis=axes, keepdims=True)
    deviation = np.sqrt(np.mean(centred**2, axis=axes, keepdims=True) + eps)
    return _scaled(centred / deviation, weight, bias)


def layer_norm_bound(x: Array, error: Array, precision: Precision, **arguments: Any) -> Array:
    """That of `_scaled_bound`; the error of n has two parts.

    What came in moves ``x_i - m`` by ``(1 - 2/k) e_i + mean e``, with k numbers in a row. It moves
    s, which is a norm of the row, by ``d = sqrt(mean e^2)``. So n moves by
    ``((1 - 2/k) e_i + mean e + |n_i| d) / (s - d)``.

    The computed mean is wrong by ``f = gamma(k) mean|x| + gamma(4 + 2 log k) max|x|``; the second
    part is for a mean that is updated: differences and quotients of its first steps round, too. A
    mean wrong by f makes the variance of two passes wrong by ``f^2``. That of updating is a sum of
    ``(x_j - m_{j-1}) (x_j - m_j)``: it is wrong by ``2 f mean|x_j - m_{j-1}| + f^2``, at most
    ``2 f sqrt(2 v) + f^2``. Merged parts are no worse. The sums round by ``gamma(k + 6) v``. With
    ``q = f / s``, s is wrong by half of ``q (sqrt 8 + q) + gamma(k + 6)``. n is wrong by that, by
    q, and by ``gamma(4) (|x| + |m|) / s`` if it is computed as ``x / s - m / s``.

    A variance as ``mean x^2 - m^2`` is not covered where m is large against s: it is unstable.
    """
    axes = tuple(range(-len(arguments["normalized_shape"]), 0))
    normal = _normal(x, error, precision, axes, arguments["eps"], 0.0)
    kept = {name: arguments[name] for name in ("weight", "bias")}
    return _scaled_bound(layer_norm(x, **arguments), normal, precision, **kept)


def layer_norm_backward(
    x: Array, y: Array, g: Array, precision: Precision, **arguments: Any
) -> Gradients:
    """``dL/dx = (h - mean h - n mean(h n)) / s`` with ``h = g w``, and those of w and b.

    Every n and 1 / s has the error of the forward pass, and of half types torch keeps m and 1 / s
    as stored. Sums of k numbers round by ``gamma(k)``.
    """
    weight = arguments["weight"]
    axes = tuple(range(-len(arguments["normalized_shape"]), 0))
    zero, kept = np.zeros_like(x), precision.stored_unit
    n, wrong, size, inverse, relative = _normal(x, zero, precision, axes, arguments["eps"], kept)
    h = g if weight is None else g * weight
    means = np.mean([h, h * n, np.abs(h)], axis=axes, keepdims=True)
    roundings = precision.gamma(math.prod(x.shape[axis] for axis in axes) + 6)
    exact = (h - means[0] - n * means[1]) * inverse
    wrong_mean = np.mean(np.abs(h) * (wrong + roundings * (size + wrong)), axes, keepdims=True)
    largest = np.abs(means[1]) + wrong_mean
    bound = roundings * means[2] + precision.gamma(4) * (np.abs(h) + size * largest)
    bound = bound + np.abs(n) * wrong_mean + wrong * largest + 4 * precision.tiny
    bound = bound * inverse * (1 + relative) + relative * np.abs(exact)
    rows = tuple(range(x.ndim - len(axes)))
    found = _parameters(g, n, wrong, rows, precision, weight=weight, bias=arguments["bias"])
    # torch multiplies g, w, x and 1 / s^3 in an order that may overflow, or be flushed to zero,
    # where the result is not.
    total = np.sum(np.abs(g) + np.abs(h), axis=axes, keepdims=True)
    far = 1 + np.max(np.abs(x), axis=axes, keepdims=True)
    largest = total * far * (1 + inverse**3)
    w = np.abs(1.0 if weight is None else weight)
    bound = bound + precision.tiny * (w + 4 * far * (1 + total * far))
    return {"input": gradient(exact, bound, precision, largest), **found}


def _channels(
    x: Array, running_mean: Maybe, running_var: Maybe, weight: Maybe, bias: Maybe, eps: float
) -> tuple[Array, Array, Maybe, Maybe]:
    """Mean, ``1 / s``, weight and bias in shapes that fit x."""
    if running_mean is None or running_var is None:
        raise ValueError(
            "compare expects BatchNorm to have running statistics, got None; "
            "with track_running_stats=False its output depends on the batch"
        )
    shape = (-1,) + (1,) * (x.ndim - 2)
    weight, bias = (None if each is None else each.reshape(shape) for each in (weight, bias))
    inverse = 1 / np.sqrt(running_var + eps)
    return running_mean.reshape(shape), inverse.reshape(shape), weight, bias


def batch_norm(
    x: Array, running_mean: Maybe, running_var: Maybe, weight: Maybe, bias: Maybe, eps: float
) -> Array:
    """``y = (x - m) / sqrt(v + eps) w + b`` for each channel, m and v the running statistics."""
    mean, inverse, *kept = _channels(x, running_mean, running_var, weight, bias, eps)
    return _scaled((x - mean) * inverse, *kept)


def batch_norm_bound(x: Array, error: Array, precision: Precision, **arguments: Any) -> Array:
    """That of `_scaled_bound`, ``a = (e + gamma(5) (|x - m| + e) + gamma(4) (|x| + e + |m|)) / s``.

    ``1 / s`` rounds up to five times: eps, sum, root and quotient, or a root and quotient in one,
    right to two units in the last place. As torch computes y, ``(w / s) x + (b - m w / s)``, x and
    m are rounded three times before they cancel.
    """
    mean, inverse, *kept = _channels(x, **arguments)
    far, gamma = np.abs(x) + error + np.abs(mean), precision.gamma
    wrong = error + gamma(5) * (np.abs(x - mean) + error) + gamma(4) * far + precision.tiny
    normal = _Normal((x - mean) * inverse, wrong * inverse, far * inverse, inverse, inverse)
    return _scaled_bound(batch_norm(x, **arguments), normal, precision, *kept)


def batch_norm_backward(
    x: Array, y: Array, g: Array, precision: Precision, **arguments: Any
) -> Gradients:
    """``dL/dx = g w / s``, ``dL/dw = sum g (x - m) / s``, ``dL/db = sum g``."""
    mean, inverse, weight, _ = _channels(x, **arguments)
    exact, n = _scaled(g * inverse, weight, None), (x - mean) * inverse
    # Of three factors the product of any two may be flushed.
    flushed = 2 + inverse + np.abs(g) + np.abs(1.0 if weight is None else weight)
    bound = precision.gamma(8) * np.abs(exact) + precision.tiny * flushed
    wrong = precision.gamma(8) * np.abs(n) + precision.tiny
    kept = {name: arguments[name] for name in ("weight", "bias")}
    found = _parameters(g, n, wrong, (0, *range(2, x.ndim)), precision, **kept)
    return {"input": gradient(exact, bound, precision, np.abs(g) * inverse), **found}


def _of_a_sample(x: Array, normalized_shape: tuple[int, ...], **others: Any) -> Array | None:
    """With the variance divided by k - 1 in the place of k."""
    count = math.prod(normalized_shape)
    if count == 1:
        return None
    factor, weight = math.sqrt(count / (count - 1)), others.pop("weight")
    weight = np.ones(normalized_shape) if weight is None else weight
    return layer_norm(x * factor, normalized_shape, weight / factor, **others)


def _by_its_batch(x: Array, running_mean: Array, running_var: Array, **others: Any) -> Array:
    rows = (0, *range(2, x.ndim))
    return batch_norm(x, np.mean(x, axis=rows), np.var(x, axis=rows), **others)


LAYER_NORM = Layer(
    "layer norm",
    layer_norm,
    layer_norm_bound,
    layer_norm_backward,
    {
        "layer norm without eps": lambda x, eps, **others: layer_norm(x, eps=0.0, **others),
        "layer norm by the variance of a sample": _of_a_sample,
    },
)
BATCH_NORM = Layer(
    "batch norm",
    batch_norm,
    batch_norm_bound,
    batch_norm_backward,
    {
        "batch norm without eps": lambda x, eps, **others: batch_norm(x, eps=0.0, **others),
        "batch norm by the statistics of the batch": _by_its_batch,
    },
    eval_only=True,
)
