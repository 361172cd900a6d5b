"""One home for each kind of layer: formula, bound, gradients and broken copies. No torch here.

The arguments of every function are named as torch names the attributes of the layer (`weight`,
`bias`, `dim`, ...): that is how `torchnnfs.testing.models` reads them off. Arrays are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from torchnnfs.testing.precision import Array, Precision

#: From a layer's input to its output: ``forward(x, **arguments)``.
Forward = Callable[..., Array]

#: A formula that is wrong, or None where these arguments cannot be broken in this way.
Wrong = Callable[..., Array | None]

#: Exact gradients and how far computed ones may stray: by "input", "weight", "bias".
Gradients = dict[str, tuple[Array, Array]]

#: A parameter that may be left out.
Maybe = Array | None


@dataclass(frozen=True, eq=False)
class Layer:
    """All that is known of one kind of layer.

    Infinities are a part of the answers, so its functions are called with NumPy's warnings off.

    Attributes:
        name: of the formula, for people.
        forward: ``forward(x, **arguments)``: the formula, in the precision of its arrays.
        bound: ``bound(x, error, precision, **arguments)``: how far a computed output may stray from
            ``forward(x)`` when the input has the elementwise absolute error `error`, whatever the
            order of sums and with or without fused multiply-add. None: it is estimated.
        backward: ``backward(x, y, g, precision, **arguments)``: the gradients of the loss from the
            layer's input x, its computed output y and the gradient g that reaches y.
        controls: formulas that are wrong, by what is wrong: ``wrong(x, **arguments)``.
        honest: ``honest(x, precision, **arguments)``: errors of plain computations in that
            precision, for the excess; None where correct computations vary too much for it.
        eval_only: whether the formula is that of eval mode alone.
        by_rows: whether each row, along the first of several axes, is computed on its own (but
            along a `dim`).
    """

    name: str
    forward: Forward
    bound: Callable[..., Array] | None = None
    backward: Callable[..., Gradients] | None = None
    controls: Mapping[str, Wrong] = field(default_factory=dict)
    honest: Callable[..., Array] | None = None
    eval_only: bool = False
    by_rows: bool = False


def finished(y: Array, bound: Array, largest: Any, precision: Precision) -> Array:
    """`bound`, and what the last step does: flush to zero, round to the type that is stored.

    Infinite where nothing is proven: the arithmetic may overflow, in what is `largest` on the way
    to y or in y itself, or the input had no bound.
    """
    bound = precision.stored(y, bound + precision.tiny)
    # What is not a number compares as false.
    return np.where(np.abs(y) + bound + largest < precision.overflow, bound, np.inf)


def gradient(
    exact: Array, bound: Array, precision: Precision, largest: Any = 0.0
) -> tuple[Array, Array]:
    """A gradient and its `finished` bound: what it is computed from has no error."""
    return exact, finished(exact, bound, largest, precision)
