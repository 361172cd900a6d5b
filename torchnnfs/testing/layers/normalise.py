"""Layers that subtract a mean and divide by a deviation.

Sources: T. F. Chan, G. H. Golub and R. J. LeVeque, Algorithms for computing the sample variance:
analysis and recommendations, The American Statistician 37 (1983): the variance in two passes, by
updating or by merging parts; N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed.,
sections 1.9 and 4.2.
"""

import math
from functools import partial
from typing import Any

import numpy as np

from torchnnfs.testing.layers import Gradients, Ints, Layer, Maybe, Wrong, finished
from torchnnfs.testing.precision import Array, Precision


def _affine(weight: Maybe, bias: Maybe, **others: Any) -> tuple[Any, Any]:
    """What n is multiplied with and what is added; 1 and -0, which change no bit, for None."""
    return 1.0 if weight is None else weight, -0.0 if bias is None else bias


def _affine_bound(
    precision: Precision, w: Any, b: Any, n: Array, wrong: Array, size: Array, inverse: Array
) -> Array:
    """``|w| a + gamma(2) (|w| (|n| + a) + |b|)`` for ``y = n w + b``, a the error of n."""
    y, w, b = n * w + b, np.abs(w), np.abs(b)
    bound = w * (wrong + precision.tiny) + precision.gamma(2) * (w * (np.abs(n) + wrong) + b)
    # w / s may be flushed before it is multiplied with x and m.
    bound = bound + precision.tiny * (4 + size / inverse)
    return finished(y, bound, precision, w * size + b)[1]


def _affine_backward(
    g: Array, n: Array, wrong: Array, rows: Ints, precision: Precision, **named: Any
) -> Gradients:
    """``dL/dw = sum g n`` with n wrong by `wrong`, ``dL/db = sum g``: sums over the axes `rows`.

    Of half types torch adds some up as stored on the CPU.
    """
    axes, found = tuple(rows), {}
    count = math.prod(g.shape[axis] for axis in axes)
    for name, factor, error in (("weight", n, wrong), ("bias", np.ones_like(g), 0.0)):
        size = np.abs(g) * (error + (count + 2) * precision.roundoff * (np.abs(factor) + error))
        bound = np.sum(size, axis=axes) + precision.tiny * count
        if named[name] is not None:
            found[name] = finished(np.sum(g * factor, axis=axes), bound, precision)
    return found


def _normal(
    x: Array, error: Array, precision: Precision, axes: tuple[int, ...], eps: float, kept: float
) -> tuple[Array, ...]:
    """Of rows: n, its error, ``(|x| + |m|) / s``, the largest ``1 / s``, a computed one's error.

    `layer_bound` derives them. m and 1 / s are `kept` with that relative error.
    """
    count, gamma = math.prod(x.shape[axis] for axis in axes), precision.gamma
    mean = partial(np.mean, axis=axes, keepdims=True)
    m = mean(x)
    s = np.sqrt(mean((x - m) ** 2) + eps)
    n, far, e, drift = (x - m) / s, np.abs(x) + error, mean(error), np.sqrt(mean(error * error))
    inverse = 1 / np.maximum(s - drift, math.sqrt(eps))
    moved = ((1 - 2 / count) * error + e + np.abs(n) * drift) * inverse
    # No n is larger than the root of how many there are.
    moved = np.fmin(moved, np.abs(n) + math.sqrt(count))
    largest = np.max(far, axis=axes, keepdims=True)
    q = inverse * (gamma(count) * mean(far) + gamma(4 + 2 * math.log(count)) * largest)
    eta = q * (math.sqrt(8) + q) + gamma(count + 6) + 2 * precision.tiny * inverse**2
    # Infinite where nothing is known of s.
    relative = (1 + gamma(4)) / np.sqrt(np.fmax(1 - eta, 0)) - 1 + kept
    size = (far + np.abs(m) + e) * inverse
    rounded = q + (gamma(4) + kept) * size + precision.tiny * inverse
    rounded = rounded + relative * (np.abs(n) + moved + rounded)
    overflows = 4 * np.sum(far * far, axis=axes, keepdims=True) > precision.overflow
    return n, moved + np.where(overflows, np.inf, rounded), size, inverse, relative


def _last(normalized_shape: Ints, **others: Any) -> tuple[int, ...]:
    return tuple(range(-len(normalized_shape), 0))


def layer_norm(x: Array, normalized_shape: Ints, weight: Maybe, bias: Maybe, eps: float) -> Array:
    """``y = n w + b``, ``n = (x - m) / s``, ``s = sqrt(v + eps)``; m, v by the last axes of x."""
    mean = partial(np.mean, axis=_last(normalized_shape), keepdims=True)
    centred, (w, b) = x - mean(x), _affine(weight, bias)
    return np.asarray(centred / np.sqrt(mean(centred**2) + eps) * w + b)


def layer_bound(x: Array, error: Array, precision: Precision, **named: Any) -> Array:
    """That of `_affine_bound`; the error of n has two parts.

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
    normal = _normal(x, error, precision, _last(**named), named["eps"], 0.0)
    return _affine_bound(precision, *_affine(**named), *normal[:-1])


def layer_backward(x: Array, y: Array, g: Array, precision: Precision, **named: Any) -> Gradients:
    """``dL/dx = (h - mean h - n mean(h n)) / s`` with ``h = g w``, and those of w and b.

    Every n and 1 / s has the error of the forward pass, and of half types torch keeps m and 1 / s
    as stored. Sums of k numbers round by ``gamma(k)``.
    """
    axes, zero, kept = _last(**named), np.zeros_like(x), precision.stored_unit
    n, wrong, size, inverse, relative = _normal(x, zero, precision, axes, named["eps"], kept)
    w, gamma = _affine(**named)[0], precision.gamma(math.prod(named["normalized_shape"]) + 6)
    h = g * w
    terms = [h, h * n, np.abs(h), np.abs(h) * (wrong + gamma * (size + wrong))]
    mean, slope, mean_size, wrong_slope = np.mean(terms, axis=axes, keepdims=True)
    exact, far_slope = (h - mean - n * slope) * inverse, np.abs(slope) + wrong_slope
    bound = gamma * mean_size + precision.gamma(4) * (np.abs(h) + size * far_slope)
    bound = bound + np.abs(n) * wrong_slope + wrong * far_slope + 4 * precision.tiny
    bound = bound * inverse * (1 + relative) + relative * np.abs(exact)
    # torch multiplies g, w, x and 1 / s^3 in an order that may overflow, or be flushed to zero,
    # where the result is not.
    total = np.sum(np.abs(g) + np.abs(h), axis=axes, keepdims=True)
    far = 1 + np.max(np.abs(x), axis=axes, keepdims=True)
    bound = bound + precision.tiny * (np.abs(w) + 4 * far * (1 + total * far))
    found = _affine_backward(g, n, wrong, range(x.ndim - len(axes)), precision, **named)
    return {"input": finished(exact, bound, precision, total * far * (1 + inverse**3)), **found}


def _channels(x: Array, running_mean: Array, running_var: Array, eps: float, **named: Maybe) -> Any:
    """Mean, ``1 / s``, and what is multiplied with and added, in shapes that fit x."""
    shape, inverse = (-1,) + (1,) * (x.ndim - 2), 1 / np.sqrt(running_var + eps)
    kept = {key: each if each is None else each.reshape(shape) for key, each in named.items()}
    return running_mean.reshape(shape), inverse.reshape(shape), *_affine(**kept)


def batch_norm(
    x: Array, running_mean: Array, running_var: Array, weight: Maybe, bias: Maybe, eps: float
) -> Array:
    """``y = (x - m) / sqrt(v + eps) w + b`` for each channel, m and v the running statistics."""
    mean, inverse, w, b = _channels(x, running_mean, running_var, eps, weight=weight, bias=bias)
    return np.asarray((x - mean) * inverse * w + b)


def batch_bound(x: Array, error: Array, precision: Precision, **named: Any) -> Array:
    """That of `_affine_bound`, ``a = (e + gamma(5) (|x - m| + e) + gamma(4) (|x| + e + |m|)) / s``.

    ``1 / s`` rounds up to five times: eps, sum, root and quotient, or a root and quotient in one,
    right to two units in the last place. As torch computes y, ``(w / s) x + (b - m w / s)``, x and
    m are rounded three times before they cancel.
    """
    mean, inverse, w, b = _channels(x, **named)
    n, far, gamma = (x - mean) * inverse, np.abs(x) + error + np.abs(mean), precision.gamma
    wrong = error + gamma(5) * (np.abs(x - mean) + error) + gamma(4) * far + precision.tiny
    return _affine_bound(precision, w, b, n, wrong * inverse, far * inverse, inverse)


def batch_backward(x: Array, y: Array, g: Array, precision: Precision, **named: Any) -> Gradients:
    """``dL/dx = g w / s``, ``dL/dw = sum g (x - m) / s``, ``dL/db = sum g``."""
    mean, inverse, w, _ = _channels(x, **named)
    exact, n, gamma = g * inverse * w, (x - mean) * inverse, precision.gamma(8)
    # Of three factors the product of any two may be flushed.
    bound = gamma * np.abs(exact) + precision.tiny * (2 + inverse + np.abs(g) + np.abs(w))
    wrong, rows = gamma * np.abs(n) + precision.tiny, (0, *range(2, x.ndim))
    found = _affine_backward(g, n, wrong, rows, precision, **named)
    return {"input": finished(exact, bound, precision, np.abs(g) * inverse), **found}


def _of_a_sample(x: Array, normalized_shape: Ints, eps: float, **named: Maybe) -> Array | None:
    """With the variance divided by k - 1 in the place of k: then s is that much larger."""
    part = 1 - 1 / math.prod(normalized_shape)
    w, bias = _affine(**named)[0] * math.sqrt(part), named["bias"]
    return layer_norm(x, normalized_shape, w, bias, eps * part) if part else None


def _by_its_batch(x: Array, running_mean: Array, running_var: Array, **named: Any) -> Array:
    rows = (0, *range(2, x.ndim))
    return batch_norm(x, np.mean(x, axis=rows), np.var(x, axis=rows), **named)


_BROKEN_LAYER_NORMS: dict[str, Wrong] = {
    "layer norm without eps": lambda x, eps, **named: layer_norm(x, eps=0.0, **named),
    "layer norm by the variance of a sample": _of_a_sample,
}
_BROKEN_BATCH_NORMS: dict[str, Wrong] = {
    "batch norm without eps": lambda x, eps, **named: batch_norm(x, eps=0.0, **named),
    "batch norm by the statistics of the batch": _by_its_batch,
}
LAYER_NORM = Layer("layer norm", layer_norm, layer_bound, layer_backward, _BROKEN_LAYER_NORMS)
BATCH_NORM = Layer(
    "batch norm", batch_norm, batch_bound, batch_backward, _BROKEN_BATCH_NORMS, eval_only=True
)
