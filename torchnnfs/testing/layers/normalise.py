"""Layers that subtract a mean and divide by a deviation.

Sources: T. F. Chan, G. H. Golub and R. J. LeVeque, Algorithms for computing the sample variance:
analysis and recommendations, The American Statistician 37 (1983): the variance in two passes, by
updating or by merging parts; N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed.,
sections 1.9 and 4.2.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from torchnnfs.testing.layers import Gradients, Layer, finished
from torchnnfs.testing.precision import Array, Precision


class _Normal(NamedTuple):
    """Numbers less their mean, over their deviation; and how far computed ones may stray.

    Attributes:
        value: ``n = (x - m) / s``, s the root of the variance and eps.
        error: of n.
        size: ``(|x| + |m|) / s``: what cancels where n is computed as ``x / s - m / s``.
        inverse: the largest that ``1 / s`` may be.
        rho: relative error of the computed ``1 / s``.
    """

    value: Array
    error: Array
    size: Array
    inverse: Array
    rho: Array


def _normal(
    x: Array, error: Array, precision: Precision, normalized_shape: tuple[int, ...], eps: float
) -> _Normal:
    """``x`` over its last axes, normalised; the derivation is with `layer_norm_bound`."""
    axes = tuple(range(-len(normalized_shape), 0))
    count = math.prod(normalized_shape)

    def mean(a: Array) -> Array:
        return np.mean(a, axis=axes, keepdims=True)

    m = mean(x)
    centred = x - m
    s = np.sqrt(mean(centred * centred) + eps)
    value = centred / s
    drift = np.sqrt(mean(error * error))
    inverse = 1 / np.maximum(s - drift, math.sqrt(eps))
    moved = (1 - 2 / count) * error + mean(error)
    moved = (moved + np.abs(value) * drift) * inverse
    # No n is larger than the root of their number.
    moved = np.fmin(moved, np.abs(value) + math.sqrt(count))

    far = np.abs(x) + error
    sums = precision.gamma(count) * mean(far)
    sums = sums + precision.gamma(4 + 2 * math.log(count)) * np.max(far, axis=axes, keepdims=True)
    q = sums * inverse
    eta = q * (2 * math.sqrt(2) + q) + precision.gamma(count + 6)
    eta = eta + 2 * precision.tiny * inverse * inverse
    rho = np.where(eta < 1, (1 + precision.gamma(4)) / np.sqrt(1 - eta) - 1, np.inf)
    size = (far + np.abs(m) + mean(error)) * inverse
    rounded = q + precision.gamma(4) * size + precision.tiny * inverse
    rounded = rounded + rho * (np.abs(value) + moved + rounded)
    squares = 4 * np.sum(far * far, axis=axes, keepdims=True)
    rounded = np.where(squares < precision.overflow, rounded, np.inf)
    return _Normal(value, moved + rounded, size, inverse, rho)


def layer_norm(
    x: Array,
    normalized_shape: tuple[int, ...],
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
) -> Array:
    """``y = (x - m) / sqrt(v + eps) w + b``, m and v the mean and variance over the last axes."""
    axes = tuple(range(-len(normalized_shape), 0))
    centred = x - np.mean(x, axis=axes, keepdims=True)
    y: Array = centred / np.sqrt(np.mean(centred * centred, axis=axes, keepdims=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@np.errstate(all="ignore")
def layer_norm_bound(
    x: Array,
    error: Array,
    precision: Precision,
    normalized_shape: tuple[int, ...],
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
) -> Array:
    """``|w| a + gamma(2) (|w| (|n| + a) + |b|)``, a the error of ``n = (x - m) / s``.

    What came in moves ``x_i - m`` by ``(1 - 2/k) e_i + mean e``, k the numbers of a row, and s, a
    norm of the row, by ``d = sqrt(mean e^2)``: n by ``((1 - 2/k) e_i + mean e + |n_i| d) / (s - d)``.

    The computed mean is wrong by ``f = gamma(k) mean|x| + gamma(4 + 2 log k) max|x|``: the second
    part is for updating it, which rounds differences and quotients of the first few means. A mean
    wrong by f makes the variance of two passes wrong by ``f^2``; that of updating, a sum of
    ``(x_j - m_{j-1}) (x_j - m_j)``, by ``2 f mean|x_j - m_{j-1}| + f^2``, no more than
    ``2 f sqrt(2 v) + f^2``. Merged parts are no worse. Sums round by ``gamma(k + 6) v``. Where
    ``q = f / s``, the root is wrong by half of ``q (2 sqrt 2 + q) + gamma(k + 6)``, and n by q,
    by that and by ``gamma(4) (|x| + |m|) / s``, computed as ``x / s - m / s``.

    ``mean x^2 - m^2`` is not covered where m is large against s: it is unstable.
    """
    normal = _normal(x, error, precision, normalized_shape, eps)
    w, b = np.abs(1.0 if weight is None else weight), np.abs(0.0 if bias is None else bias)
    size = w * (np.abs(normal.value) + normal.error) + b
    bound = w * (normal.error + precision.tiny) + precision.gamma(2) * size
    y = layer_norm(x, normalized_shape, weight, bias, eps)
    return finished(y, bound, error, precision)


@np.errstate(all="ignore")
def layer_norm_backward(
    x: Array,
    y: Array,
    g: Array,
    precision: Precision,
    normalized_shape: tuple[int, ...],
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
) -> Gradients:
    """``dL/dx = (h - mean h - n mean(h n)) / s``, ``h = g w``; ``dL/dw = sum g n``, ``dL/db = sum g``.

    Every n and 1 / s has the error of the forward pass; sums of k numbers round by ``gamma(k)``.
    """
    axes = tuple(range(-len(normalized_shape), 0))
    roundings = precision.gamma(math.prod(normalized_shape) + 6)
    zero = np.zeros_like(x)
    n, wrong, size, inverse, rho = _normal(x, zero, precision, normalized_shape, eps)
    h = g if weight is None else g * weight
    first = np.mean(h, axis=axes, keepdims=True)
    second = np.mean(h * n, axis=axes, keepdims=True)
    exact = (h - first - n * second) * inverse
    first_wrong = roundings * np.mean(np.abs(h), axis=axes, keepdims=True)
    second_wrong = np.abs(h) * (wrong + roundings * (size + wrong))
    second_wrong = np.mean(second_wrong, axis=axes, keepdims=True)
    largest = np.abs(second) + second_wrong
    bound = first_wrong + precision.gamma(4) * (np.abs(h) + size * largest)
    bound = bound + np.abs(n) * second_wrong + wrong * largest + 4 * precision.tiny
    bound = bound * inverse * (1 + rho) + rho * np.abs(exact)
    found = {"input": (exact, finished(exact, bound, zero, precision))}
    rows = tuple(range(x.ndim - len(normalized_shape)))
    return found | _parameters(g, n, wrong, weight, bias, rows, precision)


def _parameters(
    g: Array,
    n: Array,
    wrong: Array,
    weight: Array | None,
    bias: Array | None,
    axes: tuple[int, ...],
    precision: Precision,
) -> Gradients:
    """``dL/dw = sum g n`` with n wrong by `wrong`, ``dL/db = sum g``: sums over `axes`."""
    count = math.prod(g.shape[axis] for axis in axes)
    found = {}
    for name, parameter, factor in (("weight", weight, n), ("bias", bias, np.ones_like(g))):
        if parameter is not None:
            error = wrong if name == "weight" else np.zeros_like(g)
            exact = np.sum(g * factor, axis=axes)
            sizes = np.abs(g) * (error + precision.gamma(count + 2) * (np.abs(factor) + error))
            bound = np.sum(sizes, axis=axes) + precision.tiny * count
            found[name] = (exact, finished(exact, bound, np.zeros_like(exact), precision))
    return found


def _by_channel(x: Array, values: Array | None, missing: float) -> Array:
    """One value for each channel, axis 1 of x, in a shape that fits x."""
    if values is None:
        return np.full((1,) * (x.ndim - 1), missing, x.dtype)
    return values.reshape(-1, *(1,) * (x.ndim - 2))


def batch_norm(
    x: Array,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
) -> Array:
    """``y = (x - m) / sqrt(v + eps) w + b`` for each channel, m and v the running statistics."""
    if running_mean is None or running_var is None:
        raise ValueError(
            "compare expects BatchNorm to have running statistics, got None: "
            "with track_running_stats=False each batch is normalised by its own"
        )
    deviation = np.sqrt(_by_channel(x, running_var, 1) + eps)
    y: Array = (x - _by_channel(x, running_mean, 0)) / deviation
    return y * _by_channel(x, weight, 1) + _by_channel(x, bias, 0)


@np.errstate(all="ignore")
def batch_norm_bound(
    x: Array,
    error: Array,
    precision: Precision,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
) -> Array:
    """``a (e + gamma(7) (|x - m| + e) + gamma(4) (|x| + e + |m|)) + gamma(2) |b|``.

    Here ``a = |w| / sqrt(v + eps)``, which rounds up to seven times: eps, sum, root, quotient (or an
    approximate 1 / root) and product. Computed as ``a x + (b - m a)``, which torch does, x and m are
    rounded three times before they cancel.
    """
    y = batch_norm(x, running_mean, running_var, weight, bias, eps)
    m = _by_channel(x, running_mean, 0)
    scale = np.abs(_by_channel(x, weight, 1)) / np.sqrt(_by_channel(x, running_var, 1) + eps)
    far = np.abs(x) + error + np.abs(m)
    bound = error + precision.gamma(7) * (np.abs(x - m) + error) + precision.gamma(4) * far
    bound = scale * (bound + precision.tiny) + precision.gamma(2) * np.abs(_by_channel(x, bias, 0))
    bound = bound + 4 * precision.tiny
    return np.where(scale * far < precision.overflow, finished(y, bound, error, precision), np.inf)


@np.errstate(all="ignore")
def batch_norm_backward(
    x: Array,
    y: Array,
    g: Array,
    precision: Precision,
    running_mean: Array | None,
    running_var: Array | None,
    weight: Array | None = None,
    bias: Array | None = None,
    eps: float = 1e-5,
) -> Gradients:
    """``dL/dx = g w / s``, ``dL/dw = sum g (x - m) / s``, ``dL/db = sum g``, s as in the formula."""
    n = batch_norm(x, running_mean, running_var, None, None, eps)
    exact = g * (_by_channel(x, weight, 1) / np.sqrt(_by_channel(x, running_var, 1) + eps))
    bound = precision.gamma(8) * np.abs(exact) + 2 * precision.tiny
    found = {"input": (exact, finished(exact, bound, np.zeros_like(exact), precision))}
    wrong = precision.gamma(8) * np.abs(n) + precision.tiny
    axes = (0, *range(2, x.ndim))
    return found | _parameters(g, n, wrong, weight, bias, axes, precision)


def _unbiased(x: Array, normalized_shape: tuple[int, ...], **arguments: Any) -> Array | None:
    """With the variance of a sample, ``k / (k - 1)`` times as large."""
    count = math.prod(normalized_shape)
    if count == 1:
        return None
    eps, bias, shape = arguments.pop("eps"), arguments.pop("bias"), normalized_shape
    shrink = math.sqrt((count - 1) / count)
    y = shrink * layer_norm(x, shape, eps=eps * (count - 1) / count, bias=None, **arguments)
    return y if bias is None else y + bias


def _by_its_batch(
    x: Array, running_mean: Array, running_var: Array, **arguments: Any
) -> Array | None:
    axes = (0, *range(2, x.ndim))
    return batch_norm(x, np.mean(x, axis=axes), np.var(x, axis=axes), **arguments)


LAYER_NORM = Layer(
    "layer norm",
    layer_norm,
    layer_norm_bound,
    layer_norm_backward,
    controls={
        "layer norm without eps": lambda x, eps, **others: layer_norm(x, eps=0.0, **others),
        "layer norm with the variance of a sample": _unbiased,
    },
)
BATCH_NORM = Layer(
    "batch norm",
    batch_norm,
    batch_norm_bound,
    batch_norm_backward,
    controls={
        "batch norm without eps": lambda x, eps, **others: batch_norm(x, eps=0.0, **others),
        "batch norm by the statistics of the batch": _by_its_batch,
    },
    eval_only=True,
)
