"""The chapter's layers in NumPy, written from their formulas. No torch here.

Each function works in the precision of its arrays. In float64 it is the reference of every
comparison; in float32 under `torchnnfs.streams.book_numpy` it computes as the book does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]


def dense(x: Array, weights: Array, biases: Array | None = None) -> Array:
    """``y = x W + b``, with W of shape (n_inputs, n_neurons) as the book keeps it."""
    y: Array = np.dot(x, weights)
    return y if biases is None else y + biases


def relu(x: Array) -> Array:
    """``y = max(0, x)``, elementwise."""
    return np.maximum(0, x)


def softmax(x: Array, dim: int = -1) -> Array:
    """``y_i = exp(x_i - m) / sum_j exp(x_j - m)`` along `dim`, m the maximum there."""
    powers: Array = np.exp(x - np.max(x, axis=dim, keepdims=True))
    total: Array = np.sum(powers, axis=dim, keepdims=True)
    return powers / total
