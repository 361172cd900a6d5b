"""What was found of batches, joined to what is found of the whole."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from torchnnfs.testing.measure import Measured
from torchnnfs.testing.precision import Array
from torchnnfs.testing.traces import Trace


@dataclass(frozen=True)
class Sample:
    """Evenly spaced rows of a whole: every 2^k-th, as many as `most` allows, in any batches."""

    most: int
    end: int  # how many rows of the whole came so far
    rows: Array  # the numbers of those that are kept
    arrays: tuple[Array, ...]  # these rows of each array

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
        pairs = list(zip(self.arrays, other.arrays, strict=True))
        sizes = {len(each) - len(one.rows) for one in (self, other) for each in one.arrays}
        if sizes != {0} or any(a.shape[1:] != b.shape[1:] for a, b in pairs):
            return self
        end = max(self.end, other.end)
        rows = np.concatenate([self.rows, other.rows])
        kept = np.argsort(rows, kind="stable")
        kept = kept[rows[kept] % _step(end, self.most) == 0]
        arrays = tuple(np.concatenate(pair)[kept] for pair in pairs)
        return Sample(self.most, end, rows[kept], arrays)


def _step(end: int, most: int) -> int:
    return 1 << (-(-end // most) - 1).bit_length()


@dataclass(frozen=True)
class Finding:
    """What was measured at one place of one trace."""

    path: str  # of the place in the model
    place: str  # how rows name it
    leaf: str  # where the array is in a nested output
    kind: str  # type of the module, and which gradient of it
    isolated: Measured | None = None  # on the input that the place really got
    chained: Measured | None = None  # from the model's input on
    sample: Sample | None = None  # input, exact and computed output, for an honest computation
    follows: bool = True  # whether it got what the place before gave
    far: tuple[float, float] | None = None  # of candidate and reference from the float64 model
    allowed: float = 0.0  # the largest bound beside a reference for the output
    blind: bool = False  # whether half of these bounds are as large as the largest number
    remark: str = ""  # what to add where it differs
    twice: bool = False  # whether it is about a second run

    @property
    def key(self) -> tuple[bool, str, str, str]:
        """What is the same in all batches."""
        return self.twice, self.place, self.leaf, self.kind

    def joined(self, other: Finding) -> Finding:
        """Both as one."""
        far = self.far or other.far
        if self.far and other.far:
            far = max(self.far[0], other.far[0]), max(self.far[1], other.far[1])
        return replace(
            self,
            isolated=join(self.isolated, other.isolated),
            chained=join(self.chained, other.chained),
            sample=join(self.sample, other.sample),
            follows=self.follows and other.follows,
            far=far,
            allowed=max(self.allowed, other.allowed),
            blind=self.blind or other.blind,
        )


def join(one: Any, two: Any) -> Any:
    """Both as one: tables entry by entry; where only one of them is there, that one."""
    if isinstance(one, dict):
        return {key: join(one.get(key), two.get(key)) for key in {**one, **two}}
    return one.joined(two) if one and two else one or two


@dataclass
class Seen:
    """What was found of one trace in the batches so far."""

    trace: Trace  # who computed; without arrays
    findings: dict[tuple[bool, str, str, str], Finding]
    # By a word and a path: calls of each place that was "called"; of each softmax of NumPy its
    # "numbers", and the "inexact" ones, whose exp is not correctly rounded.
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    shown: Sample | None = None  # of the first candidate, rows of the input and of its output

    def joined(self, other: Seen) -> Seen:
        """Both as one."""
        findings, shown = join(self.findings, other.findings), join(self.shown, other.shown)
        return Seen(self.trace, findings, self.counts + other.counts, shown)
