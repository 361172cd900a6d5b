"""Dense layers, convolutions and embeddings: sums of products.

Sources: N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., sections 3.1, 3.3
and 3.5 (dot products, running error analysis).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from torchnnfs.testing.layers import Gradients, Layer
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


def dense_honest(
    x: Array, precision: Precision, weight: Array, bias: Array | None = None
) -> Array:
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
