"""Layers that move numbers or choose among them: flatten and pooling, and windows over an array.

Source: N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 4.2 (sums in
any order).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from torchnnfs.testing.layers import Gradients, Layer, finished
from torchnnfs.testing.precision import Array, Precision


def windows(
    x: Array, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Array:
    """All windows over the last axes of x: (..., *positions, *kernel), a view."""
    axes = tuple(range(-len(kernel), 0))
    reach = tuple(d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True))
    view = np.lib.stride_tricks.sliding_window_view(x, reach, axis=axes)
    steps = [slice(None, None, step) for step in (*stride, *dilation)]
    return view[(..., *steps)]


def positions(x: Array) -> Array:
    """The place of each number of x, counted from 1: padded with 0 and cut, it says where from."""
    return np.arange(1, x.size + 1).reshape(x.shape)


def collected(values: Array, places: Array, x: Array) -> Array:
    """The sum of the `values` that belong to each place of x, as `positions` counts them."""
    flat = np.broadcast_to(values, places.shape).ravel()
    sums = np.bincount(places.ravel(), weights=flat, minlength=x.size + 1)
    return sums[1:].reshape(x.shape)


def scattered(values: Array, places: Array, x: Array, precision: Precision) -> tuple[Array, Array]:
    """The sums of `values` at their places in x, and ``gamma(n)`` of the sums of their sizes.

    n is the most that one place gets, and one for a factor. Half types are added up as stored.
    """
    exact, size = collected(values, places, x), collected(np.abs(values), places, x)
    n = 1 + np.max(collected(np.ones(1), places, x), initial=0.0)
    most = n * precision.roundoff
    bound = size * most / (1 - most) if most < 1 else np.full(x.shape, np.inf)
    bound = bound + n * (precision.tiny + precision.stored_tiny)
    return exact, finished(exact, bound, np.zeros(x.shape), precision)


def flatten(x: Array, start_dim: int = 1, end_dim: int = -1) -> Array:
    """The dimensions from `start_dim` to `end_dim` as one."""
    first, last = start_dim % x.ndim, end_dim % x.ndim
    length = int(np.prod(x.shape[first : last + 1]))
    return x.reshape(*x.shape[:first], length, *x.shape[last + 1 :])


def flatten_bound(
    x: Array, error: Array, precision: Precision, start_dim: int = 1, end_dim: int = -1
) -> Array:
    """The error that came in, in the shape of the output."""
    return flatten(error, start_dim, end_dim) + precision.tiny


def flatten_backward(
    x: Array, y: Array, g: Array, precision: Precision, start_dim: int = 1, end_dim: int = -1
) -> Gradients:
    """``dL/dx = g`` in the shape of x."""
    return {"input": (g.reshape(x.shape), np.full(x.shape, precision.tiny))}


def _column_major(x: Array, start_dim: int, end_dim: int) -> Array:
    """Flattened with the first of the dimensions running fastest, as Fortran and MATLAB do."""
    first, last = start_dim % x.ndim, end_dim % x.ndim
    axes = [*range(first), *range(last, first - 1, -1), *range(last + 1, x.ndim)]
    turned = x.transpose(axes)
    return turned.reshape(flatten(x, start_dim, end_dim).shape)


Sizes = int | tuple[int, int]


class _Axis(NamedTuple):
    """How the windows of a pooling layer lie along one axis."""

    length: int
    kernel: int
    stride: int
    padding: int
    dilation: int
    count: int


def _axes(
    x: Array,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
) -> list[_Axis]:
    """The two axes of an image (..., height, width), as torch counts their windows."""
    sizes = [kernel_size, kernel_size if stride is None else stride, padding, dilation]
    axes = []
    for axis, length in enumerate(x.shape[-2:]):
        k, step, pad, d = (size if isinstance(size, int) else size[axis] for size in sizes)
        room = length + 2 * pad - d * (k - 1) - 1
        count = (-(-room // step) if ceil_mode else room // step) + 1
        # The last window of ceil mode may reach past the padding, and never starts in it.
        if ceil_mode and (count - 1) * step >= length + pad:
            count -= 1
        axes.append(_Axis(length, k, step, pad, d, count))
    return axes


def _windows(x: Array, fill: float, axes: list[_Axis]) -> Array:
    """The windows over x: (..., rows, columns, numbers of one window)."""
    pads = [(0, 0)] * (x.ndim - 2)
    for a in axes:
        end = (a.count - 1) * a.stride + a.dilation * (a.kernel - 1) + 1
        pads.append((a.padding, max(end - a.length - a.padding, 0)))
    padded = np.pad(x, pads, constant_values=fill)
    _, kernel, stride, _, dilation, count = zip(*axes, strict=True)
    view = windows(padded, kernel, stride, dilation)[..., : count[0], : count[1], :, :]
    return view.reshape(*view.shape[:-2], -1)


def max_pool2d(
    x: Array,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    dilation: Sizes = 1,
    ceil_mode: bool = False,
) -> Array:
    """``y = max x`` over each window of an image (..., height, width); padding never wins."""
    axes = _axes(x, kernel_size, stride, padding, dilation, ceil_mode)
    y: Array = np.max(_windows(x, -np.inf, axes), axis=-1)
    return y


@np.errstate(all="ignore")
def max_pool2d_bound(x: Array, error: Array, precision: Precision, **sizes: Any) -> Array:
    """The largest e in a window of those that may win: ``x + e >= max(x - e)``. No rounding."""
    axes = _axes(x, **sizes)
    view, reach = _windows(x, -np.inf, axes), _windows(error, 0, axes)
    may_win = view + reach >= np.max(view - reach, axis=-1, keepdims=True)
    bound: Array = np.max(np.where(may_win, reach, 0.0), axis=-1)
    return bound + precision.tiny


def max_pool2d_backward(
    x: Array, y: Array, g: Array, precision: Precision, **sizes: Any
) -> Gradients:
    """``dL/dx``: each g goes to the maximum of its window.

    Of several maxima torch takes the first. Any other is right as well, so they may differ by g.
    """
    axes = _axes(x, **sizes)
    view, places = _windows(x, -np.inf, axes), _windows(positions(x), 0, axes)
    first = np.argmax(view, axis=-1)[..., None]
    exact, bound = scattered(g, np.take_along_axis(places, first, -1)[..., 0], x, precision)
    largest = view == np.max(view, axis=-1, keepdims=True)
    ties = np.sum(largest, axis=-1, keepdims=True) > 1
    doubt = collected(np.where(largest & ties, np.abs(g)[..., None], 0.0), places, x)
    return {"input": (exact, bound + 2 * doubt)}


def _divisors(axes: list[_Axis], count_include_pad: bool) -> Array:
    """How many numbers each window has, with those of the padding or without."""
    counts = []
    for a in axes:
        first = np.arange(a.count) * a.stride - a.padding
        last = np.minimum(first + a.kernel, a.length + a.padding)
        if not count_include_pad:
            first, last = np.maximum(first, 0), np.minimum(last, a.length)
        counts.append(last - first)
    return np.multiply.outer(*counts)


def _average(
    x: Array,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> tuple[list[_Axis], Array]:
    """The windows of an average and what their sums are divided by."""
    axes = _axes(x, kernel_size, stride, padding, 1, ceil_mode)
    divisors = _divisors(axes, count_include_pad)
    return axes, np.full_like(divisors, divisor_override) if divisor_override else divisors


def avg_pool2d(
    x: Array,
    kernel_size: Sizes,
    stride: Sizes | None = None,
    padding: Sizes = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Array:
    """``y = sum x / n`` over each window of an image (..., height, width), padded with 0.

    n is `divisor_override`; or the numbers in the window, with or without those of the padding.
    """
    axes, n = _average(
        x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )
    y: Array = np.sum(_windows(x, 0, axes), axis=-1) / n.astype(x.dtype)
    return y


@np.errstate(all="ignore")
def avg_pool2d_bound(x: Array, error: Array, precision: Precision, **sizes: Any) -> Array:
    """``(sum e + gamma(k+1) sum (|x| + e)) / |n|``, k the numbers of a window.

    There are k - 1 additions, and a product with ``1 / n`` in the place of the quotient rounds
    twice.
    """
    axes, n = _average(x, **sizes)
    carried = np.sum(_windows(error, 0, axes), axis=-1)
    size = np.sum(np.abs(_windows(x, 0, axes)), axis=-1) + carried
    k = axes[0].kernel * axes[1].kernel
    bound = (carried + precision.gamma(k + 1) * size + precision.tiny * k) / np.abs(n)
    return finished(avg_pool2d(x, **sizes), bound, size, precision)


@np.errstate(all="ignore")
def avg_pool2d_backward(
    x: Array, y: Array, g: Array, precision: Precision, **sizes: Any
) -> Gradients:
    """``dL/dx``: the sum of ``g / n`` over the windows that a number lies in."""
    axes, n = _average(x, **sizes)
    return {"input": scattered((g / n)[..., None], _windows(positions(x), 0, axes), x, precision)}


def _uncounted(x: Array, **sizes: Any) -> Array | None:
    """The average without the padding counted, or with it, whichever is wrong."""
    if sizes["divisor_override"]:
        return None
    return avg_pool2d(x, **{**sizes, "count_include_pad": not sizes["count_include_pad"]})


FLATTEN = Layer(
    "flatten",
    flatten,
    flatten_bound,
    flatten_backward,
    controls={"flatten with the first dimension running fastest": _column_major},
)
MAX_POOL2D = Layer(
    "max pool",
    max_pool2d,
    max_pool2d_bound,
    max_pool2d_backward,
    controls={
        "max pool as mean": lambda x, dilation, **sizes: (
            avg_pool2d(x, **sizes) if dilation in (1, (1, 1)) else None
        ),
        "max pool as min": lambda x, **sizes: -max_pool2d(-x, **sizes),
    },
)
AVG_POOL2D = Layer(
    "average pool",
    avg_pool2d,
    avg_pool2d_bound,
    avg_pool2d_backward,
    controls={
        "average pool as max": lambda x, count_include_pad, divisor_override, **sizes: max_pool2d(
            x, **sizes
        ),
        "average pool, padding counted otherwise": _uncounted,
    },
)
