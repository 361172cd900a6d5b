"""Layers that move numbers or choose among them, and windows over an array.

Sources: N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 4.2 (sums in
any order); C.-P. Jeannerod and S. M. Rump, Improved error bounds for inner products in
floating-point arithmetic, SIAM J. Matrix Anal. Appl. 34 (2013): n u where others have gamma(n), for
any n.
"""

import math
from typing import Any

import numpy as np

from torchnnfs.testing.layers import Bounded, Gradients, Ints, Layer, Wrong, finished
from torchnnfs.testing.precision import Array, Precision

#: Of both axes of an image, or of each.
Two = int | tuple[int, int]


def windows(x: Array, kernel: Ints, stride: Ints, dilation: Ints, pads: Any, **how: Any) -> Array:
    """All windows over the last axes of x, padded: (..., *positions, numbers of one window)."""
    x = np.pad(x, [(0, 0)] * (x.ndim - len(kernel)) + [*pads], **how)
    reach = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
    view = np.lib.stride_tricks.sliding_window_view(x, reach, tuple(range(-len(kernel), 0)))
    steps: Any = (slice(None, None, step) for step in (*stride, *dilation))
    view = view[(..., *steps)]
    return view.reshape(*view.shape[: -len(kernel)], -1)


def positions(x: Array) -> Array:
    """The place of each number of x, counted from 1: padded with 0 and cut, it says where from."""
    return np.arange(1, x.size + 1).reshape(x.shape)


def collected(values: Any, places: Array, x: Array) -> Array:
    """The sum of the `values` that belong to each place of x, as `positions` counts them."""
    flat = np.broadcast_to(values, places.shape).ravel()
    sums = np.bincount(places.ravel(), weights=flat, minlength=x.size + 1)
    return sums[1:].reshape(x.shape)


def scattered(values: Array, places: Array, x: Array, precision: Precision) -> Bounded:
    """The sums of `values` at their places in x, and ``(n + 1) u`` of the sums of their sizes.

    n is the most that one place gets. Half types may be added up as stored.
    """
    exact, n = collected(values, places, x), collected(1.0, places, x).max()
    bound = (n + 1) * precision.roundoff * collected(np.abs(values), places, x)
    return finished(exact, bound + n * (precision.tiny + precision.stored_tiny), precision)


def flatten(x: Array, start_dim: int, end_dim: int) -> Array:
    """The dimensions from `start_dim` to `end_dim` as one."""
    first, behind = start_dim % x.ndim, end_dim % x.ndim + 1
    return x.reshape(*x.shape[:first], math.prod(x.shape[first:behind]), *x.shape[behind:])


def _column_major(x: Array, start_dim: int, end_dim: int) -> Array:
    """Flattened with the first of the dimensions running fastest, as Fortran and MATLAB do."""
    axes, first, behind = [*range(x.ndim)], start_dim % x.ndim, end_dim % x.ndim + 1
    axes[first:behind] = axes[first:behind][::-1]
    return flatten(x.transpose(axes), start_dim, end_dim)


def _pooled(
    x: Array, fill: Any, kernel_size: Two, stride: Two, padding: Two, ceil_mode: bool, dilation: Two
) -> Array:
    """The windows of an image (..., height, width): (..., rows, columns, numbers of one window).

    The padding is filled with `fill`; a second number is for where ceil mode reaches past it.
    """
    inside, beyond = np.broadcast_to(fill, 2)
    sizes = (kernel_size, stride, padding, dilation)
    kernel, step, pad, spread = (np.broadcast_to(size, 2) for size in sizes)
    # The last window of ceil mode may reach past the padding, but never starts in it.
    rows, columns = -(-(np.array(x.shape[-2:]) + pad) // step)
    past = [(0, size) for size in ceil_mode * (step - 1)]
    x = np.pad(x, [(0, 0)] * (x.ndim - 2) + [(size, size) for size in pad], constant_values=inside)
    view = windows(x, [*kernel], [*step], [*spread], past, constant_values=beyond)
    return view[..., :rows, :columns, :]


def max_pool2d(
    x: Array, kernel_size: Two, stride: Two, padding: Two, dilation: Two, ceil_mode: bool
) -> Array:
    """``y = max x`` over each window of an image (..., height, width); padding never wins."""
    view = _pooled(x, -np.inf, kernel_size, stride, padding, ceil_mode, dilation)
    return np.asarray(np.max(view, axis=-1))


def max_bound(x: Array, error: Array, precision: Precision, **sizes: Any) -> Array:
    """The largest e in a window of those that may win: ``x + e >= max(x - e)``. No rounding."""
    view, reach = _pooled(x, -np.inf, **sizes), _pooled(error, 0, **sizes)
    may_win = view + reach >= np.max(view - reach, axis=-1, keepdims=True)
    return np.asarray(np.max(np.where(may_win, reach, 0.0), axis=-1) + precision.tiny)


def max_backward(x: Array, y: Array, g: Array, precision: Precision, **sizes: Any) -> Gradients:
    """``dL/dx``: each g goes to the maximum of its window.

    Of several maxima torch takes the first. Any other is right as well, so they may differ by g.
    """
    view, places = _pooled(x, -np.inf, **sizes), _pooled(positions(x), 0, **sizes)
    first = np.argmax(view, axis=-1)[..., None]
    exact, bound = scattered(g, np.take_along_axis(places, first, -1)[..., 0], x, precision)
    largest = view == np.max(view, axis=-1, keepdims=True)
    ties = np.sum(largest, axis=-1, keepdims=True) > 1
    doubt = collected(np.where(largest & ties, np.abs(g)[..., None], 0.0), places, x)
    return {"input": (exact, bound + doubt)}


def _average(
    x: Array, count_include_pad: bool, divisor_override: int | None, **sizes: Any
) -> tuple[Array, Array]:
    """The windows over x, and what the sum of each is divided by."""
    ones, fill = np.ones(x.shape[-2:]), (float(count_include_pad), 0)
    n: Array = np.sum(_pooled(ones, fill, dilation=1, **sizes), axis=-1)
    view = _pooled(x, 0, dilation=1, **sizes)
    return view, n * 0 + divisor_override if divisor_override else n


def avg_pool2d(
    x: Array,
    kernel_size: Two,
    stride: Two,
    padding: Two,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Array:
    """``y = sum x / n`` over each window of an image (..., height, width), padded with 0.

    n is `divisor_override`; or the numbers in the window, with or without those of the padding.
    """
    sizes = {"kernel_size": kernel_size, "stride": stride, "padding": padding}
    view, n = _average(x, count_include_pad, divisor_override, ceil_mode=ceil_mode, **sizes)
    return np.asarray(np.sum(view, axis=-1) / n.astype(x.dtype))


def avg_bound(x: Array, error: Array, precision: Precision, **sizes: Any) -> Array:
    """``(sum e + gamma(k+1) sum (|x| + e)) / |n|``, k the numbers of a window.

    There are k - 1 additions; a product with ``1 / n``, in the quotient's place, rounds twice.
    """
    carried = np.sum(_average(error, **sizes)[0], axis=-1)
    view, n = _average(np.abs(x), **sizes)
    size, k = np.sum(view, axis=-1) + carried, view.shape[-1]
    bound = (carried + precision.gamma(k + 1) * size + precision.tiny * k) / np.abs(n)
    return finished(avg_pool2d(x, **sizes), bound, precision, size)[1]


def avg_backward(x: Array, y: Array, g: Array, precision: Precision, **sizes: Any) -> Gradients:
    """``dL/dx``: the sum of ``g / n`` over the windows that a number lies in."""
    places, n = _average(positions(x), **sizes)
    return {"input": scattered((g / n)[..., None], places, x, precision)}


def _as_mean(x: Array, dilation: Two, **sizes: Any) -> Array | None:
    view = _pooled(x, 0, dilation=dilation, **sizes)
    return np.mean(view, axis=-1) if np.max(dilation) == 1 else None


def _counted_otherwise(x: Array, **sizes: Any) -> Array | None:
    """With the padding counted if it is not, or without."""
    y = avg_pool2d(x, **{**sizes, "count_include_pad": not sizes["count_include_pad"]})
    return None if np.array_equal(y, avg_pool2d(x, **sizes)) else y


_BROKEN: dict[str, Wrong] = {"flatten with the first dimension running fastest": _column_major}
_BROKEN_MAXIMA: dict[str, Wrong] = {"max pool as mean": _as_mean}
_BROKEN_MEANS: dict[str, Wrong] = {"average pool, padding counted otherwise": _counted_otherwise}
FLATTEN = Layer(
    "flatten",
    flatten,
    lambda x, error, precision, **dims: flatten(error, **dims) + precision.tiny,
    lambda x, y, g, precision, **_: {
        "input": (g.reshape(x.shape), np.full_like(x, precision.tiny))
    },
    _BROKEN,
)
MAX_POOL2D = Layer("max pool", max_pool2d, max_bound, max_backward, _BROKEN_MAXIMA)
AVG_POOL2D = Layer("average pool", avg_pool2d, avg_bound, avg_backward, _BROKEN_MEANS)
