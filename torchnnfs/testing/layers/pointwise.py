"""Layers that treat each number by itself.

Each bound has two parts: what the error that came in does, and what the computation rounds.
"""

from __future__ import annotations

import numpy as np

from torchnnfs.testing.layers import Gradients, Layer
from torchnnfs.testing.precision import Array, Precision


def relu(x: Array) -> Array:
    """``y = max(0, x)``."""
    return np.maximum(0, x)


def relu_bound(x: Array, error: Array, precision: Precision) -> Array:
    """``e``: the larger of 0 and x is found without rounding (what is tiny may be flushed)."""
    return error + precision.tiny


def relu_backward(x: Array, y: Array, g: Array, precision: Precision) -> Gradients:
    """``dL/dx = g`` where x > 0, else 0."""
    return {"input": (np.where(x > 0, g, 0.0), np.full_like(g, precision.tiny))}


def identity(x: Array) -> Array:
    """``y = x``: also dropout in eval mode."""
    return x


def identity_bound(x: Array, error: Array, precision: Precision) -> Array:
    """The error that came in."""
    return error + precision.tiny


def identity_backward(x: Array, y: Array, g: Array, precision: Precision) -> Gradients:
    """``dL/dx = g``."""
    return {"input": (g, np.full_like(g, precision.tiny))}


RELU = Layer(
    "relu",
    relu,
    relu_bound,
    relu_backward,
    controls={
        "ReLU left out": lambda x: x,
        "leaky ReLU, slope 1e-2": lambda x: np.where(x > 0, x, 1e-2 * x),
        "leaky ReLU, slope 1e-4": lambda x: np.where(x > 0, x, 1e-4 * x),
    },
)
IDENTITY = Layer("identity", identity, identity_bound, identity_backward)
DROPOUT = Layer("dropout", identity, identity_bound, identity_backward, eval_only=True)
