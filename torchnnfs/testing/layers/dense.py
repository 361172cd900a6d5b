"""Dense layers, convolutions and embeddings: sums of products.

Sources: N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., sections 3.1, 3.3
and 3.5 (dot products, running error analysis).
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from torchnnfs.testing.layers import Gradients, Ints, Layer, Maybe, Wrong, finished
from torchnnfs.testing.layers.reshape import collected, positions, scattered, windows
from torchnnfs.testing.precision import PRECISIONS, Array, Precision


def dense(x: Array, weight: Array, bias: Maybe = None) -> Array:
    """``y = x W^T + b``, with W of shape (out_features, in_features) as torch keeps it.

    As ``nnfs.init()`` has it, the dot product is accumulated in float64 and rounded once. Not by
    ``np.dot`` itself: that is another function where ``nnfs.init()`` was called.
    """
    wide, factors = (each.astype(np.float64, copy=False) for each in (x, weight.T))
    y: Array = (wide @ factors).astype(x.dtype, copy=False)
    return y if bias is None else y + bias


def dense_bound(
    x: Array, error: Array, precision: Precision, weight: Array, bias: Maybe = None
) -> Array:
    """``e|W| + gamma(k+1) (|x||W| + |b| + e|W|)``, k the number of inputs with a weight not zero.

    Half types are rounded once behind the product and, where there is a bias, once behind the sum.
    Numbers below `tiny` may be taken for zero, before or after the product. Where the terms could
    overflow, even if their sum does not, there is no bound.
    """
    size = np.abs(weight).T
    carried = error @ size
    terms = np.abs(x) @ size + carried + (0.0 if bias is None else np.abs(bias))
    n = 1 + int(np.max(np.count_nonzero(size, axis=0), initial=0))
    flushed = np.sum(size, axis=0) + np.abs(x) @ np.ones((len(size), 1)) + n + 1
    bound = carried + precision.gamma(n) * terms + precision.tiny * flushed
    if precision.stored_unit:
        product = dense(x, weight)
        bound = precision.stored(product, bound)
        if bias is not None:
            bound = np.where(bias == 0, bound, precision.stored(product + bias, bound))
    return np.where(terms < precision.overflow, bound, np.inf)


def dense_backward(
    x: Array, y: Array, g: Array, precision: Precision, weight: Array, bias: Maybe = None
) -> Gradients:
    """``dL/dx = g W``, ``dL/dW = g^T x``, ``dL/db = sum g``, each a product of matrices."""
    rows, flat = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    factors = {"input": (g, weight), "weight": (rows.T, flat)}
    if bias is not None:
        factors["bias"] = np.ones(len(rows)), rows
    return {
        name: (a @ b, dense_bound(a, np.zeros_like(a), precision, b.T))
        for name, (a, b) in factors.items()
    }


@np.errstate(all="ignore")
def dense_honest(x: Array, precision: Precision, weight: Array, bias: Maybe = None) -> Array:
    """Errors of plain sums, one term after the other, each step rounded, in a few orders.

    The first begins with the bias, as many kernels do: behind a large one each step rounds more
    than if it came last. Half types are summed in float32 and rounded once. The result has shape
    (orders, rows, out).
    """
    step = np.float64 if precision.digits == 53 else np.float32
    exact, narrow, factors = dense(x, weight, bias), x.astype(step), weight.T.astype(step)
    if bias is not None:  # one more term, whose input is 1
        narrow, factors = np.insert(narrow, 0, 1, -1), np.insert(factors, 0, bias, 0)
    chance, errors = np.random.RandomState(0), []
    # One order may cancel by luck: a thousand errors in all, of three to sixteen orders.
    for i in range(min(16, max(3, math.ceil(1000 / exact.size)))):
        total = np.zeros(exact.shape, step)
        for k in chance.permutation(len(factors)) if i else range(len(factors)):
            total += narrow[..., k, None] * factors[k]
        errors.append(precision.round(total.astype(np.float64)) - exact)
    return np.stack(errors)


def _with_weight(change: Callable[[Array], Array], forward: Callable[..., Any] = dense) -> Wrong:
    """A layer with other weights; None where the change leaves them as they are."""

    def wrong(x: Array, weight: Array, **arguments: Any) -> Array | None:
        changed = change(weight)
        return None if np.array_equal(changed, weight) else forward(x, changed, **arguments)

    return wrong


def _patches(
    x: Array, weight: Array, stride: Ints, padding: Any, dilation: Ints, padding_mode: str
) -> Array:
    """What each output of a convolution sees of x: (..., *positions, channels and their window)."""
    kernel = [x.shape[1 - weight.ndim], *weight.shape[2:]]  # a window reaches over all channels
    if isinstance(padding, str):
        sizes = zip(dilation, kernel[1:], strict=True)
        both = [step * (k - 1) * (padding == "same") for step, k in sizes]
    else:
        both = [2 * size for size in padding]
    pads = [(0, 0), *((size // 2, size - size // 2) for size in both)]
    modes = {"zeros": "constant", "replicate": "edge", "circular": "wrap", "reflect": "reflect"}
    view = windows(x, kernel, [1, *stride], [1, *dilation], pads, mode=modes[padding_mode])
    return np.squeeze(view, -weight.ndim)


def _matrix(weight: Array, groups: int) -> Array:
    """The weight of a convolution as that of a dense layer: zero between groups."""
    group = np.arange(len(weight))[:, None] // (len(weight) // groups)
    flat = weight.reshape(len(weight), 1, -1)
    return np.where((group == np.arange(groups))[..., None], flat, 0).reshape(len(weight), -1)


def convolution(
    x: Array,
    weight: Array,
    bias: Maybe,
    stride: Ints,
    padding: str | Ints,
    dilation: Ints,
    groups: int,
    padding_mode: str,
) -> Array:
    """``y = sum x w + b`` over each window of x (..., channels, *sizes): a dense layer each."""
    seen = _patches(x, weight, stride, padding, dilation, padding_mode)
    return np.moveaxis(dense(seen, _matrix(weight, groups), bias), -1, 1 - weight.ndim)


def conv_bound(x: Array, error: Array, precision: Precision, weight: Array, **named: Any) -> Array:
    """That of `dense_bound`, k the inputs of one output. Transforms (Winograd, FFT) differ."""
    matrix, bias = _matrix(weight, named.pop("groups")), named.pop("bias")
    seen, errors = _patches(x, weight, **named), _patches(error, weight, **named)
    return np.moveaxis(dense_bound(seen, errors, precision, matrix, bias), -1, 1 - weight.ndim)


def conv_backward(
    x: Array, y: Array, g: Array, precision: Precision, weight: Array, bias: Maybe, **named: Any
) -> Gradients:
    """Those of `dense_backward`; a number of x gets the sum over the m windows that it lies in.

    If one of m sums of n products is wrong by ``gamma(n+1)`` of their sizes, all of them in any
    order are wrong by ``m + 2`` times that at most. So for half types: each may be stored. On the
    CPU torch also adds up the gradients of their parameters as stored.
    """
    groups = named.pop("groups")
    seen, places = _patches(x, weight, **named), _patches(positions(x), weight, **named)
    slopes, matrix = np.moveaxis(g, 1 - weight.ndim, -1), _matrix(weight, groups)
    found = dense_backward(seen, y, slopes, precision, matrix, bias)
    exact, bound = (collected(each, places, x) for each in found["input"])
    found["input"] = finished(exact, (collected(1.0, places, x).max() + 2) * bound, precision)
    sizes = dense_backward(np.abs(seen), y, np.abs(slopes), precision, matrix, bias)
    steps = (g.size / len(weight) + 1) * precision.stored_unit
    for name in found.keys() & {"weight", "bias"}:
        exact, bound = found[name]
        found[name] = exact, bound + steps * sizes[name][0]
    inside = _matrix(positions(weight), groups)
    exact, bound = (collected(each, inside, weight) for each in found["weight"])
    return {**found, "weight": (exact, bound)}


def embedding(x: Array, weight: Array, padding_idx: Any, scale_grad_by_freq: Any) -> Array:
    """``y = weight[x]``, a row for each integer of x."""
    return weight[x.astype(np.int64)]


def embedding_bound(x: Array, error: Array, precision: Precision, **named: Any) -> Array:
    """Zero: rows are copied. If an integer is uncertain, there is no bound."""
    bound = np.where(error < 0.5, precision.tiny, np.inf)
    return np.broadcast_to(bound[..., None], embedding(x, **named).shape)


def embedding_backward(
    x: Array, y: Array, g: Array, precision: Precision, weight: Array, **named: Any
) -> Gradients:
    """``dL/dW``: sum of g per row taken, its mean by `scale_grad_by_freq`; 0 for `padding_idx`."""
    rows = x.astype(np.int64)
    places = np.where((rows == named["padding_idx"])[..., None], 0, positions(weight)[rows])
    if named["scale_grad_by_freq"]:
        g = g / np.bincount(rows.ravel())[rows][..., None]
    return {"weight": scattered(g, places, weight, precision)}


_TF32 = replace(PRECISIONS["float32"], digits=11, smallest=2.0**-136)
_BROKEN: dict[str, Wrong] = {
    "a weight matrix transposed": _with_weight(lambda w: w.T if len(w) == len(w.T) else w),
    "a weight matrix permuted": _with_weight(lambda w: np.roll(w, 1).reshape(w.shape)),
    "a weight matrix times 1 + 1e-5": _with_weight(lambda w: w * (1 + 1e-5)),
    "a bias of 1e-6": lambda x, **named: dense(x, **named) + 1e-6,
    "parameters rounded to TF32": _with_weight(_TF32.round),
    "parameters rounded to bfloat16": _with_weight(PRECISIONS["bfloat16"].round),
    "parameters rounded to float16": _with_weight(PRECISIONS["float16"].round),
}
_BROKEN_CONVOLUTIONS: dict[str, Wrong] = {
    "a kernel flipped": _with_weight(lambda w: np.flip(w, (*range(2, w.ndim),)), convolution),
    "a kernel times 1 + 1e-5": _with_weight(lambda w: w * (1 + 1e-5), convolution),
    "a bias of 1e-6": lambda x, **named: convolution(x, **named) + 1e-6,
}
_BROKEN_EMBEDDINGS: dict[str, Wrong] = {
    "an embedding shifted by one row": _with_weight(lambda w: np.roll(w, 1, axis=0), embedding)
}
DENSE = Layer("dense", dense, dense_bound, dense_backward, _BROKEN, dense_honest, by_rows=True)
CONV1D = Layer("conv1d", convolution, conv_bound, conv_backward, _BROKEN_CONVOLUTIONS)
CONV2D = replace(CONV1D, name="conv2d")
EMBEDDING = Layer("embedding", embedding, embedding_bound, embedding_backward, _BROKEN_EMBEDDINGS)
