"""Dense layers, convolutions and embeddings: sums of products.

Sources: N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., sections 3.1, 3.3
and 3.5 (dot products, running error analysis).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from torchnnfs.testing.layers import Gradients, Layer, finished
from torchnnfs.testing.layers.reshape import collected, positions, scattered, windows
from torchnnfs.testing.precision import PRECISIONS, Array, Precision


def dense(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """``y = x W^T + b``, with W of shape (out_features, in_features) as torch keeps it.

    As ``nnfs.init()`` has it, the dot product is accumulated in float64 and rounded once. Not by
    ``np.dot`` itself: that is another function where ``nnfs.init()`` was called.
    """
    y: Array = (x.astype(np.float64) @ weight.astype(np.float64).T).astype(x.dtype)
    return y if bias is None else y + bias


def dense_bound(
    x: Array, error: Array, precision: Precision, weight: Array, bias: Array | None = None
) -> Array:
    """``e|W| + gamma(k+1) (|x||W| + |b| + e|W|)``, k the number of inputs.

    Half types are rounded once behind the product and, where there is a bias, once behind the sum.
    Numbers below `tiny` may be taken for zero, before or after the product. Where the terms could
    overflow, even if their sum does not, there is no bound.
    """
    size = np.abs(weight).T
    carried = error @ size
    bound: Array = np.abs(x) @ size
    bound += carried
    if bias is not None:
        bound += np.abs(bias)
    too_large = ~(bound < precision.overflow)
    n = size.shape[0] + 1
    bound *= precision.gamma(n)
    bound += carried
    flushed = np.sum(size, axis=0) + np.sum(np.abs(x), axis=-1, keepdims=True)
    bound += precision.tiny * (flushed + n + 1)
    if precision.stored_unit:
        product = dense(x, weight)
        bound = precision.stored(product, bound)
        if bias is not None:
            bound = np.where(bias == 0, bound, precision.stored(product + bias, bound))
    bound[too_large] = np.inf
    return bound


def product(a: Array, b: Array, precision: Precision) -> tuple[Array, Array]:
    """``a b`` of two matrices of exact numbers, and how far a computed one may stray."""
    with np.errstate(all="ignore"):
        return a @ b, dense_bound(a, np.zeros_like(a), precision, b.T)


def dense_backward(
    x: Array, y: Array, g: Array, precision: Precision, weight: Array, bias: Array | None = None
) -> Gradients:
    """``dL/dx = g W``, ``dL/dW = g^T x``, ``dL/db = sum g``, each a product of matrices."""
    rows, flat = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    found = {"input": product(g, weight, precision), "weight": product(rows.T, flat, precision)}
    if bias is not None:
        total, bound = product(np.ones((1, len(rows))), rows, precision)
        found["bias"] = (total[0], bound[0])
    return found


#: Errors that an honest computation is asked for: enough that none is small by luck.
_ENOUGH = 1000


def dense_honest(x: Array, precision: Precision, weight: Array, bias: Array | None = None) -> Array:
    """Errors of plain sums, one input after the other, each step rounded, in a few orders.

    Half types are summed in float32 and rounded once. The result has shape (orders, rows, out).
    """
    step: type = np.float64 if precision is PRECISIONS["float64"] else np.float32
    exact = dense(x, weight, bias)
    narrow, factors = x.astype(step), weight.T.astype(step)
    orders = np.random.RandomState(0)
    errors = []
    with np.errstate(all="ignore"):
        for i in range(min(16, math.ceil(_ENOUGH / max(1, exact.size)))):
            n = len(factors)
            total = np.zeros(exact.shape, step)
            for k in orders.permutation(n) if i else range(n):
                total += narrow[..., k, None] * factors[k]
            if bias is not None:
                total += bias.astype(step)
            errors.append(precision.round(total.astype(np.float64)) - exact)
    return np.stack(errors)


def rounded(values: Array, digits: int, smallest: float = 0.0) -> Array:
    """`values` rounded to that many significant bits, and to multiples of `smallest`."""
    with np.errstate(divide="ignore"):
        unit = np.maximum(np.ldexp(1.0, np.frexp(values)[1] - digits), smallest)
    return np.rint(values / unit) * unit


def _with_weight(change: Callable[[Array], Array]) -> Callable[..., Array | None]:
    """A dense layer with other weights; None where the change leaves them as they are."""

    def wrong(x: Array, weight: Array, bias: Array | None = None) -> Array | None:
        changed = change(weight)
        return None if np.array_equal(changed, weight) else dense(x, changed, bias)

    return wrong


def _patches(
    x: Array,
    weight: Array,
    stride: Sequence[int],
    padding: str | Sequence[int],
    dilation: Sequence[int],
    padding_mode: str,
) -> Array:
    """What each output of a convolution sees of x: (..., *positions, inputs, all channels')."""
    kernel = weight.shape[2:]
    if padding == "same":
        total = [step * (k - 1) for step, k in zip(dilation, kernel, strict=True)]
        pads = [(size // 2, size - size // 2) for size in total]
    else:
        pads = [(0, 0) if padding == "valid" else (int(size), int(size)) for size in padding]
        pads = pads[: len(kernel)]
    mode: Any = {"zeros": "constant", "replicate": "edge", "circular": "wrap"}
    padded = np.pad(
        x, [(0, 0)] * (x.ndim - len(kernel)) + pads, mode=mode.get(padding_mode, padding_mode)
    )
    view = windows(padded, kernel, stride, dilation)
    view = np.moveaxis(view, -2 * len(kernel) - 1, -len(kernel) - 1)
    return view.reshape(*view.shape[: -len(kernel) - 1], -1)


class _Group(NamedTuple):
    """The dense layer that a convolution is for one group of channels: weight, bias, inputs."""

    weight: Array
    bias: Array | None
    inputs: slice


def _groups(weight: Array, bias: Array | None, groups: int) -> list[_Group]:
    rows = weight.reshape(groups, len(weight) // groups, -1)
    biases = [None] * groups if bias is None else bias.reshape(groups, -1)
    k = rows.shape[-1]
    return [_Group(rows[i], biases[i], slice(i * k, (i + 1) * k)) for i in range(groups)]


def _channels(parts: Sequence[Array], weight: Array) -> Array:
    """The outputs of all groups, the channels before the positions, as torch has them."""
    return np.moveaxis(np.concatenate(parts, axis=-1), -1, 1 - weight.ndim)


def convolution(
    x: Array,
    weight: Array,
    bias: Array | None,
    stride: Sequence[int],
    padding: str | Sequence[int],
    dilation: Sequence[int],
    groups: int,
    padding_mode: str,
) -> Array:
    """``y = sum x w + b`` over each window of x: a dense layer for each group of channels.

    x has the shape (batch, channels, *sizes) or (channels, *sizes).
    """
    seen = _patches(x, weight, stride, padding, dilation, padding_mode)
    parts = [dense(seen[..., g.inputs], g.weight, g.bias) for g in _groups(weight, bias, groups)]
    return _channels(parts, weight)


def convolution_bound(
    x: Array,
    error: Array,
    precision: Precision,
    weight: Array,
    bias: Array | None,
    groups: int,
    **places: Any,
) -> Array:
    """That of `dense_bound`, k the numbers of a window. Transforms (Winograd, FFT) differ."""
    seen, errors = _patches(x, weight, **places), _patches(error, weight, **places)
    return _channels(
        [
            dense_bound(seen[..., g.inputs], errors[..., g.inputs], precision, g.weight, g.bias)
            for g in _groups(weight, bias, groups)
        ],
        weight,
    )


def convolution_backward(
    x: Array,
    y: Array,
    g: Array,
    precision: Precision,
    weight: Array,
    bias: Array | None,
    groups: int,
    **places: Any,
) -> Gradients:
    """Those of `dense_backward`; a number of x gets the sum over the windows that it lies in."""
    seen = _patches(x, weight, **places)
    where = _patches(positions(x), weight, **places)
    slopes = np.moveaxis(g, 1 - weight.ndim, -1)
    slopes = slopes.reshape(*slopes.shape[:-1], groups, -1)
    found: dict[str, list[tuple[Array, Array]]] = {}
    total, size, flushed = np.zeros((3, *x.shape))
    for i, group in enumerate(_groups(weight, bias, groups)):
        part = slopes[..., i, :]
        backward = dense_backward(
            seen[..., group.inputs], y, part, precision, group.weight, group.bias
        )
        del backward["input"]
        for name, pair in backward.items():
            found.setdefault(name, []).append(pair)
        spots = where[..., group.inputs]
        total += collected(part @ group.weight, spots, x)
        size += collected(np.abs(part) @ np.abs(group.weight), spots, x)
        flush = np.sum(np.abs(part), -1, keepdims=True) + np.sum(np.abs(group.weight), axis=0)
        flushed += collected(flush, spots, x)
    # A number lies in one group's windows only, so each has as many products.
    n = len(weight) // groups * np.max(collected(np.ones(1), where, x), initial=1.0)
    bound = precision.gamma(n) * size + precision.tiny * (flushed + n)
    if places["padding_mode"] != "zeros":  # the gradient of the padding is stored by itself
        bound = precision.stored(size, bound) + precision.stored_unit * size
    result = {"input": (total, finished(total, bound, np.zeros_like(x), precision))}
    for name, pairs in found.items():
        exact, wrong = (np.concatenate(each) for each in zip(*pairs, strict=True))
        shape = weight.shape if name == "weight" else exact.shape
        result[name] = (exact.reshape(shape), wrong.reshape(shape))
    return result


def embedding(
    x: Array,
    weight: Array,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    scale_grad_by_freq: bool = False,
) -> Array:
    """``y = weight[x]``, a row for each integer of x."""
    if max_norm is not None:
        raise ValueError(
            f"compare expects Embedding to leave its weight alone, got max_norm={max_norm}, "
            "which changes it at each call"
        )
    y: Array = weight[np.asarray(x, np.int64)]
    return y


def embedding_bound(x: Array, error: Array, precision: Precision, **arguments: Any) -> Array:
    """Zero: rows are copied. If an integer is uncertain, there is no bound."""
    y = embedding(x, **arguments)
    uncertain = np.asarray(error)[..., None] >= 0.5
    return np.where(uncertain, np.inf, np.full_like(y, precision.tiny))


def embedding_backward(
    x: Array,
    y: Array,
    g: Array,
    precision: Precision,
    weight: Array,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    scale_grad_by_freq: bool = False,
) -> Gradients:
    """``dL/dweight``: the sum of g where that row was taken; nothing at `padding_idx`.

    With `scale_grad_by_freq` it is divided by how often that was.
    """
    rows = np.asarray(x, np.int64)
    places = positions(weight)[rows]
    if padding_idx is not None:
        places = np.where((rows == padding_idx)[..., None], 0, places)
    if scale_grad_by_freq:
        g = g / np.bincount(rows.ravel(), minlength=len(weight))[rows][..., None]
    return {"weight": scattered(g, places, weight, precision)}


DENSE = Layer(
    "dense",
    dense,
    dense_bound,
    dense_backward,
    controls={
        "a weight matrix transposed": _with_weight(lambda w: w.T if len(w) == len(w.T) else w),
        "a weight matrix permuted": _with_weight(lambda w: np.roll(w, 1).reshape(w.shape)),
        "a weight matrix times 1 + 1e-5": _with_weight(lambda w: w * (1 + 1e-5)),
        "a bias of 1e-6": lambda x, weight, bias=None: dense(x, weight, bias) + 1e-6,
        "parameters rounded to TF32": _with_weight(lambda w: rounded(w, 11)),
        "parameters rounded to bfloat16": _with_weight(lambda w: rounded(w, 8)),
        "parameters rounded to float16": _with_weight(lambda w: rounded(w, 11, 2.0**-24)),
    },
    honest=dense_honest,
)


def _with_kernel(change: Callable[[Array], Array]) -> Callable[..., Array | None]:
    """A convolution with another weight; None where the change leaves it as it is."""

    def wrong(x: Array, weight: Array, **arguments: Any) -> Array | None:
        changed = change(weight)
        return None if np.array_equal(changed, weight) else convolution(x, changed, **arguments)

    return wrong


def _neighbours(x: Array, weight: Array, **arguments: Any) -> Array | None:
    return None if len(weight) < 2 else embedding(x, np.roll(weight, 1, axis=0), **arguments)


_CONVOLUTION: Any = (
    convolution,
    convolution_bound,
    convolution_backward,
    {
        "a kernel flipped": _with_kernel(lambda w: np.flip(w, tuple(range(2, w.ndim)))),
        "a kernel times 1 + 1e-5": _with_kernel(lambda w: w * (1 + 1e-5)),
        "a bias of 1e-6 in a convolution": lambda x, **named: convolution(x, **named) + 1e-6,
    },
)
CONV1D = Layer("conv1d", *_CONVOLUTION)
CONV2D = Layer("conv2d", *_CONVOLUTION)
EMBEDDING = Layer(
    "embedding",
    embedding,
    embedding_bound,
    embedding_backward,
    controls={"an embedding shifted by one row": _neighbours},
)
