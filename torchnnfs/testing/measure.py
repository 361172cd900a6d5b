"""How far a computed array is from the exact one, in four ways."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from torchnnfs.testing.bounds import PRECISIONS
from torchnnfs.testing.reference import Array
from torchnnfs.testing.twins import to_numpy

#: Upper edges of the histogram of errors in units in the last place; the last one is open.
ULP_EDGES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, math.inf)


@dataclass(frozen=True)
class Worst:
    """The element with the largest error over its bound.

    Attributes:
        index: its place in the layer's output.
        value: what the candidate computed.
        expected: what NumPy computed in float64.
    """

    index: tuple[int, ...]
    value: float
    expected: float


class Measured(NamedTuple):
    """Largest error, in ULP too, share of exact bits, largest error over its bound, and more."""

    max_abs: float
    max_ulp: float
    bit_equal: float
    ratio: float
    worst: Worst
    ulps: tuple[int, ...]
    unbounded: int


#: Elements measured at a time: few enough that what is computed between stays in the cache.
_BLOCK = 1 << 16


def measure(value: Array, exact: Array, bound: Array, dtype: torch.dtype) -> Measured:
    """`value` in `dtype` against `exact`, elementwise, with `bound` what rounding can explain."""
    if value.shape != exact.shape:
        nowhere = Worst((), math.nan, math.nan)
        return Measured(math.inf, math.inf, 0.0, math.inf, nowhere, (0,) * len(ULP_EDGES), 0)
    flat = [np.ascontiguousarray(array).reshape(-1) for array in (value, exact, bound)]
    with np.errstate(all="ignore"):
        blocks = [
            _measure_block(dtype, *(array[start : start + _BLOCK] for array in flat))
            for start in range(0, value.size, _BLOCK)
        ]
    max_abs, max_ulp, equal, ratio, place, ulps, unbounded = zip(*blocks, strict=True)
    block = int(np.argmax(ratio))
    worst = block * _BLOCK + place[block]
    return Measured(
        max_abs=max(max_abs),
        max_ulp=max(max_ulp),
        bit_equal=sum(equal) / value.size,
        ratio=ratio[block],
        worst=Worst(
            tuple(int(i) for i in np.unravel_index(worst, value.shape)),
            float(flat[0][worst]),
            float(flat[1][worst]),
        ),
        ulps=tuple(int(count) for count in np.sum(ulps, axis=0)),
        unbounded=sum(unbounded),
    )


def _measure_block(
    dtype: torch.dtype, value: Array, exact: Array, bound: Array
) -> tuple[float, float, int, float, int, Any, int]:
    precision = PRECISIONS[str(dtype).removeprefix("torch.")]
    rounded = to_numpy(torch.from_numpy(exact).to(dtype))
    both_nan = np.isnan(value) & np.isnan(exact)
    equal = both_nan | ((value == rounded) & (np.signbit(value) == np.signbit(rounded)))
    # Right, too: infinite where the exact result lies beyond the dtype's numbers or may do so by
    # rounding. Without a bound nothing finite can be wrong.
    overflow = np.isinf(value) & (np.sign(value) == np.sign(exact))
    overflow &= np.abs(exact) + bound >= precision.largest
    error = np.where((value == exact) | both_nan | overflow, 0.0, np.abs(value - exact))
    error[np.isnan(error)] = np.inf
    unbounded = np.isfinite(exact) & np.isinf(bound)
    ratio = np.where(error > 0, error / bound, 0.0)
    ratio[unbounded] = 0.0
    ratio[np.isnan(ratio)] = np.inf
    place = int(np.argmax(ratio))
    off = error / precision.ulp(exact)
    ulps = np.bincount(np.searchsorted(ULP_EDGES, off), minlength=len(ULP_EDGES))
    return (
        float(np.max(error)),
        float(np.max(off)),
        int(np.count_nonzero(equal)),
        float(ratio[place]),
        place,
        ulps,
        int(np.count_nonzero(unbounded)),
    )
