"""How far a computed array is from the exact one, in several ways. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import reduce

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
    """What became of one array, or of several that are the rows of a whole."""

    max_abs: float
    max_ulp: float
    equal: int  # elements that are the exact result correctly rounded
    ratio: float  # the largest error over its bound
    worst: Worst  # the element behind `ratio`
    ulps: tuple[int, ...]  # elements with errors in ULP up to each of `ULP_EDGES`
    unbounded: int  # elements that could not be judged, since the dtype may overflow
    size: int
    unlike: tuple[str, ...] = ()  # both arrays in words, where their shapes differ
    basis: str = ""  # what the bound rests on
    source: str = ""  # who gave the expected array

    def joined(self, other: Measured) -> Measured:
        """Both as one; of two equal ratios the one counts that comes first in the whole."""
        if not (self.size and other.size):
            return self if self.size else other
        first = min(self, other, key=lambda each: (-each.ratio, each.worst.index))
        return replace(
            first,
            max_abs=max(self.max_abs, other.max_abs),
            max_ulp=max(self.max_ulp, other.max_ulp),
            equal=self.equal + other.equal,
            ulps=tuple(map(sum, zip(self.ulps, other.ulps, strict=True))),
            unbounded=self.unbounded + other.unbounded,
            size=self.size + other.size,
        )


#: Elements measured at a time: few enough that what is computed between stays in the cache.
_BLOCK = 1 << 14

_NOWHERE, _NONE = Worst((), math.nan, math.nan), (0,) * len(ULP_EDGES)


def unlike(value: str, exact: str) -> Measured:
    """Of what cannot be compared, in words."""
    return Measured(math.inf, math.inf, 0, math.inf, _NOWHERE, _NONE, 0, 1, (value, exact))


def same(value: Array) -> Measured:
    """Of an array that is the exact one."""
    worst = Worst((0,) * value.ndim, 0.0, 0.0)
    return Measured(0.0, 0.0, value.size, 0.0, worst, (value.size, *_NONE[1:]), 0, value.size)


def measure(
    value: Array, exact: Array, bound: Array, precision: Precision, start: int = 0
) -> Measured:
    """`value` against `exact`, elementwise, with `bound` what rounding can explain.

    The array holds the rows of a whole from `start` on.
    """
    value, exact = np.asarray(value), np.asarray(exact)
    if value.shape != exact.shape:
        return unlike(f"shape {value.shape}", f"shape {exact.shape}")
    if not value.size:
        return Measured(0.0, 0.0, 0, 0.0, _NOWHERE, _NONE, 0, 0)
    bound = np.broadcast_to(bound, exact.shape)
    whole = value.dtype.kind in "iu" and exact.dtype.kind in "iu"
    if whole and max(abs(int(exact.min())), abs(int(exact.max()))) > 2**53:
        # Float64 does not hold them exactly, but their differences.
        value, exact = np.subtract(value, exact, dtype=object), np.zeros(exact.shape)
    flat = [np.asarray(each, np.float64).reshape(-1) for each in (value, exact, bound)]

    def block(first: int) -> Measured:
        some = [each[first : first + _BLOCK] for each in flat]
        off, ratio, unbounded = _errors(precision, *some)
        place = int(np.argmax(ratio))
        index = [int(i) for i in np.unravel_index(first + place, value.shape)]
        index[:1] = [start + i for i in index[:1]]
        ulps = off / precision.ulp(some[1])
        return Measured(
            max_abs=float(off.max()),
            max_ulp=float(ulps.max()),
            equal=_equal(precision, *some[:2]),
            ratio=float(ratio[place]),
            worst=Worst(tuple(index), float(some[0][place]), float(some[1][place])),
            ulps=_histogram(ulps),
            unbounded=unbounded,
            size=ulps.size,
        )

    with np.errstate(all="ignore"):
        return reduce(Measured.joined, map(block, range(0, value.size, _BLOCK)))


def _errors(
    precision: Precision, value: Array, exact: Array, bound: Array
) -> tuple[Array, Array, int]:
    """The errors, what they are of their bounds, and how many elements have no bound."""
    error: Array = np.abs(value - exact)
    if error.max() < np.inf and bound.max() < np.inf:  # NaN is not: nearly all blocks are so
        ratio = error / bound
        if np.isnan(ratio.max()):  # zero by zero
            ratio[error == 0] = 0.0
        return error, ratio, 0
    both_nan = np.isnan(value) & np.isnan(exact)
    # Right, too: infinite where the exact result lies beyond the dtype's numbers or may do so by
    # rounding. Without a bound nothing finite can be wrong.
    overflow = np.isinf(value) & (np.sign(value) == np.sign(exact))
    overflow &= np.abs(exact) + bound >= precision.largest
    error[(value == exact) | both_nan | overflow] = 0.0
    error[np.isnan(error)] = np.inf
    beyond = overflow & (np.abs(exact) > precision.largest)  # infinity alone is right there
    unbounded = np.isfinite(exact) & np.isinf(bound) & ~beyond
    ratio = np.where(error > 0, error / bound, 0.0)
    ratio[unbounded] = 0.0
    ratio[np.isnan(ratio)] = np.inf
    return error, ratio, int(np.count_nonzero(unbounded))


def _equal(precision: Precision, value: Array, exact: Array) -> int:
    """How many are correctly rounded, bit by bit: the two zeros differ, all NaN are the same."""
    rounded = precision.round(exact)
    equal = value.view(np.int64) == rounded.view(np.int64)
    if np.isnan(rounded.sum()):
        equal |= np.isnan(value) & np.isnan(rounded)
    return int(np.count_nonzero(equal))


def _histogram(ulps: Array) -> tuple[int, ...]:
    counts: list[int] = []
    left = ulps.size
    for edge in ULP_EDGES:
        above = left and int(np.count_nonzero(ulps > edge))
        counts.append(left - above)
        left = above
    return tuple(counts)
