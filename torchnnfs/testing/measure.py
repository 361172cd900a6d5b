"""How far a computed array is from the exact one, in several ways. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from torchnnfs.testing.precision import Array, Precision

#: Upper edges of the histogram of errors in units in the last place; the last one is open.
ULP_EDGES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, math.inf)


@dataclass(frozen=True)
class Worst:
    """The element with the largest error over its bound.

    Attributes:
        index: its place in the layer's output.
        value: what the candidate computed.
        expected: what it was expected to be.
    """

    index: tuple[int, ...]
    value: float
    expected: float


@dataclass(frozen=True)
class Measured:
    """What became of one array.

    Attributes:
        max_abs: the largest absolute error.
        max_ulp: the largest error in units in the last place.
        bit_equal: the fraction of elements that are the exact result correctly rounded.
        ratio: the largest error over its bound.
        worst: the element behind `ratio`.
        ulps: number of elements with errors in ULP up to each of `ULP_EDGES`.
        unbounded: number of elements that could not be judged, since the dtype may overflow.
        size: number of elements.
        shapes: that of the array and the expected one, where they differ.
    """

    max_abs: float
    max_ulp: float
    bit_equal: float
    ratio: float
    worst: Worst
    ulps: tuple[int, ...]
    unbounded: int
    size: int
    shapes: tuple[tuple[int, ...], ...] = ()


#: Elements measured at a time: few enough that what is computed between stays in the cache.
_BLOCK = 1 << 16


def measure(value: Array, exact: Array, bound: Array, precision: Precision) -> Measured:
    """`value` against `exact`, elementwise, with `bound` what rounding can explain."""
    value, exact = np.asarray(value), np.asarray(exact)
    nowhere, none = Worst((), math.nan, math.nan), (0,) * len(ULP_EDGES)
    if value.shape != exact.shape:
        shapes = value.shape, exact.shape
        return Measured(math.inf, math.inf, 0.0, math.inf, nowhere, none, 0, 1, shapes)
    if not value.size:
        return Measured(0.0, 0.0, 1.0, 0.0, nowhere, none, 0, 0)
    bound = np.broadcast_to(bound, exact.shape)
    flat = [np.asarray(each, np.float64).reshape(-1) for each in (value, exact, bound)]
    parts = []
    with np.errstate(all="ignore"):
        for start in range(0, value.size, _BLOCK):
            block = slice(start, start + _BLOCK)
            part = _measure_block(precision, *(each[block] for each in flat))
            place = int(np.argmax(part[0])) + start
            parts.append((float(part[0].max()), place, *part[1:]))
    ratios, places, max_abs, max_ulp, equal, ulps, unbounded = zip(*parts, strict=True)
    worst = places[int(np.argmax(ratios))]
    index = tuple(int(i) for i in np.unravel_index(worst, value.shape))
    return Measured(
        max_abs=max(max_abs),
        max_ulp=max(max_ulp),
        bit_equal=sum(equal) / value.size,
        ratio=max(ratios),
        worst=Worst(index, float(flat[0][worst]), float(flat[1][worst])),
        ulps=tuple(int(count) for count in np.sum(ulps, axis=0)),
        unbounded=sum(unbounded),
        size=value.size,
    )


def _measure_block(
    precision: Precision, value: Array, exact: Array, bound: Array
) -> tuple[Array, float, float, int, Array, int]:
    rounded = precision.round(exact)
    both_nan = np.isnan(value) & np.isnan(exact)
    equal = both_nan | ((value == rounded) & (np.signbit(value) == np.signbit(rounded)))
    # Right, too: infinite where the exact result lies beyond the dtype's numbers or may do so by
    # rounding. Without a bound nothing finite can be wrong.
    overflow = np.isinf(value) & (np.sign(value) == np.sign(exact))
    overflow &= np.abs(exact) + bound >= precision.largest
    error = np.where((value == exact) | both_nan | overflow, 0.0, np.abs(value - exact))
    error[np.isnan(error)] = np.inf
    beyond = overflow & (np.abs(exact) > precision.largest)  # infinity alone is right there
    unbounded = np.isfinite(exact) & np.isinf(bound) & ~beyond
    ratio = np.where(error > 0, error / bound, 0.0)
    ratio[unbounded] = 0.0
    ratio[np.isnan(ratio)] = np.inf
    off = error / precision.ulp(exact)
    ulps = np.bincount(np.searchsorted(ULP_EDGES, off), minlength=len(ULP_EDGES))
    return (
        ratio,
        float(error.max()),
        float(off.max()),
        int(np.count_nonzero(equal)),
        ulps,
        int(np.count_nonzero(unbounded)),
    )
