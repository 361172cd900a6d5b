"""The chapter's layers in NumPy, written from their formulas. No torch here.

Each function works in the precision of its arrays: in float64 it is the reference of every
comparison, in float32 it computes as the book does after ``nnfs.init()``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]


def dense(x: Array, weights: Array, biases: Array | None = None) -> Array:
    """``y = x W + b``, with W of shape (n_inputs, n_neurons) as the book keeps it.

    As ``nnfs.init()`` has it, the dot product is accumulated in float64 and rounded once. Not by
    ``np.dot`` itself: that is another function where ``nnfs.init()`` was called.
    """
    y: Array = (x.astype(np.float64) @ weights.astype(np.float64)).astype(x.dtype)
    return y if biases is None else y + biases


def relu(x: Array) -> Array:
    """``y = max(0, x)``, elementwise."""
    return np.maximum(0, x)


def softmax(x: Array, dim: int = -1) -> Array:
    """``y_i = exp(x_i - m) / sum_j exp(x_j - m)`` along `dim`, m the maximum there."""
    powers: Array = np.exp(x - np.max(x, axis=dim, keepdims=True))
    total: Array = np.sum(powers, axis=dim, keepdims=True)
    return powers / total


def log_softmax(x: Array, dim: int = -1) -> Array:
    """``y_i = x_i - m - log sum_j exp(x_j - m)`` along `dim`, m the maximum there."""
    shifted: Array = x - np.max(x, axis=dim, keepdims=True)
    total: Array = np.sum(np.exp(shifted), axis=dim, keepdims=True)
    return shifted - np.log(total)


def identity(x: Array) -> Array:
    """``y = x``: also dropout when it drops nothing."""
    return x


def flatten(x: Array, start_dim: int = 1, end_dim: int = -1) -> Array:
    """The dimensions from `start_dim` to `end_dim` as one."""
    first, last = start_dim % x.ndim, end_dim % x.ndim
    return x.reshape(*x.shape[:first], -1, *x.shape[last + 1 :])
