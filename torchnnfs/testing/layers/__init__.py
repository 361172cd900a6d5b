"""One home for each kind of layer: formula, bound, gradients and broken copies. No torch here.

The arguments of every function are named as torch names the attributes of the layer (`weight`,
`bias`, `dim`, ...): that is how `torchnnfs.testing.models` reads them off. Arrays are float64.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from torchnnfs.testing.precision import Array, Precision

#: From a layer's input to its output: ``forward(x, **arguments)``.
Forward = Callable[..., Array]
#: A formula that is wrong, or None where these arguments cannot be broken in this way.
Wrong = Callable[..., Array | None]
#: Exact numbers, and how far computed ones may stray.
Bounded = tuple[Array, Array]
#: By "input", "weight", "bias".
Gradients = dict[str, Bounded]
#: A parameter that may be left out, and numbers, one for each axis.
Maybe = Array | None
Ints = Sequence[int]


@dataclass(frozen=True, eq=False)
class Layer:
    """All that is known of one kind of layer.

    Infinities are a part of the answers, so its functions are called with NumPy's warnings off.
    """

    name: str  # of the formula, for people
    #: ``forward(x, **arguments)``: the formula, in the precision of its arrays.
    forward: Forward
    #: ``bound(x, error, precision, **arguments)``: how far a computed output may stray from
    #: ``forward(x)`` when the input has the elementwise absolute error `error`, whatever the order
    #: of sums and with or without fused multiply-add. None: it is estimated.
    bound: Callable[..., Array] | None = None
    #: ``backward(x, y, g, precision, **arguments)``: the gradients of the loss from the layer's
    #: input x, its computed output y and the gradient g that reaches y.
    backward: Callable[..., Gradients] | None = None
    #: Formulas that are wrong, by what is wrong: ``wrong(x, **arguments)``.
    controls: Mapping[str, Wrong] = field(default_factory=dict)
    #: ``honest(x, precision, **arguments)``: errors of plain computations in that precision, for
    #: the excess; None where correct computations vary too much for it.
    honest: Callable[..., Array] | None = None
    eval_only: bool = False  # whether the formula is that of eval mode alone
    by_rows: bool = False  # each row, along the first of several axes, by itself (but along a dim)


def finished(exact: Array, bound: Array, precision: Precision, largest: Any = 0.0) -> Bounded:
    """`exact`, and `bound` with what the last step does: flush to zero, round as it is stored.

    Infinite where nothing is proven: the arithmetic may overflow, in what is `largest` on the way
    to the result or in the result itself, or the input had no bound.
    """
    bound = precision.stored(exact, bound + precision.tiny)
    # What is not a number compares as false.
    return exact, np.where(np.abs(exact) + bound + largest < precision.overflow, bound, np.inf)
