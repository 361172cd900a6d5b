"""What was found of batches, joined to what is found of the whole."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from torchnnfs.testing.measure import Measured
from torchnnfs.testing.precision import Array
from torchnnfs.testing.traces import Trace


class Judged(NamedTuple):
    """What was measured of an array, what that rests on, and who gave the expected one."""

    measured: Measured
    basis: str
    source: str

    def joined(self, other: Judged) -> Judged:
        """Both as one."""
        return self._replace(measured=self.measured.joined(other.measured))


@dataclass(frozen=True)
class Sample:
    """Evenly spaced rows of a whole: every 2^k-th, as many as `most` allows, in any batches.

    Attributes:
        most: the largest number of rows.
        end: how many rows of the whole came so far.
        rows: the numbers of the rows that are kept.
        arrays: these rows of each array.
    """

    most: int
    end: int
    rows: Array
    arrays: tuple[Array, ...]

    @staticmethod
    def of(most: int, start: int, *arrays: Array) -> Sample:
        """The sample of a batch that begins at row `start` of the whole."""
        end = start + len(arrays[0])
        step = _step(end, most)
        kept = slice(-start % step, None, step)
        copies = tuple(each[kept].copy() for each in arrays)  # a view would keep the whole batch
        return Sample(most, end, np.arange(start, end)[kept], copies)

    def joined(self, other: Sample) -> Sample:
        """The sample of both parts together, in the order of their rows.

        Where the rows of the two are not alike, it is the first alone.
        """
        sizes = {len(each) - len(one.rows) for one in (self, other) for each in one.arrays}
        if sizes != {0} or any(
            a.shape[1:] != b.shape[1:] for a, b in zip(self.arrays, other.arrays, strict=True)
        ):
            return self
        end = max(self.end, other.end)
        rows = np.concatenate([self.rows, other.rows])
        kept = np.argsort(rows, kind="stable")
        kept = kept[rows[kept] % _step(end, self.most) == 0]
        pairs = zip(self.arrays, other.arrays, strict=True)
        arrays = tuple(np.concatenate(pair)[kept] for pair in pairs)
        return Sample(self.most, end, rows[kept], arrays)


def _step(end: int, most: int) -> int:
    return 1 << (-(-end // most) - 1).bit_length()


@dataclass(frozen=True)
class Finding:
    """What was measured at one place of one trace.

    Attributes:
        path: of the place in the model.
        place: how rows name it.
        leaf: where the array is in a nested output.
        kind: type of the module, and which gradient of it.
        isolated: on the input that the place really got.
        chained: from the model's input on.
        sample: input, exact and computed output of a layer with an honest computation.
        joined: whether it got what the place before gave.
        far: how far the candidate and the reference are from the model in float64.
        allowed: the largest bound beside a reference for the output.
        remark: what to add where it differs.
        twice: whether it is about a second run.
    """

    path: str
    place: str
    leaf: str
    kind: str
    isolated: Judged | None = None
    chained: Judged | None = None
    sample: Sample | None = None
    joined: bool = True
    far: tuple[float, float] | None = None
    allowed: float = 0.0
    remark: str = ""
    twice: bool = False

    @property
    def key(self) -> tuple[bool, str, str, str]:
        """What is the same in all batches."""
        return self.twice, self.place, self.leaf, self.kind

    def merged(self, other: Finding) -> Finding:
        """Both as one."""
        far = self.far or other.far
        if self.far and other.far:
            far = max(self.far[0], other.far[0]), max(self.far[1], other.far[1])
        return replace(
            self,
            isolated=_both(self.isolated, other.isolated),
            chained=_both(self.chained, other.chained),
            sample=_both(self.sample, other.sample),
            joined=self.joined and other.joined,
            far=far,
            allowed=max(self.allowed, other.allowed),
        )


def _both(one: Any, two: Any) -> Any:
    return one.joined(two) if one and two else one or two


@dataclass
class Seen:
    """What was found of one trace in the batches so far.

    Attributes:
        trace: who computed; without arrays.
        findings: by their keys, in order.
        counts: by a word and a path: calls of each place that was "called"; of each softmax of
            NumPy its "numbers", and the "inexact" ones, whose exp is not correctly rounded.
        shown: of the first candidate, rows of the input and of its output.
    """

    trace: Trace
    findings: dict[tuple[bool, str, str, str], Finding]
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    shown: Sample | None = None

    def joined(self, other: Seen) -> Seen:
        """Both as one."""
        mine, theirs = self.findings, other.findings
        both = {key: mine[key].merged(theirs[key]) for key in mine.keys() & theirs.keys()}
        shown = _both(self.shown, other.shown)
        return Seen(self.trace, {**mine, **theirs, **both}, self.counts + other.counts, shown)


def merge(whole: dict[int, Seen], part: dict[int, Seen]) -> dict[int, Seen]:
    """What was found of the traces, by their numbers, in more batches."""
    return {each: _both(whole.get(each), part.get(each)) for each in whole.keys() | part.keys()}
