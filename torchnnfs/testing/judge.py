"""Phase 2: each trace is measured against the exact chain of its dtype and made rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby, zip_longest
from typing import Any, NamedTuple

import numpy as np

from torchnnfs.testing.exact import ESTIMATED, ROUNDING, Expected
from torchnnfs.testing.layers import Layer
from torchnnfs.testing.measure import Worst, measure, same, unlike
from torchnnfs.testing.merge import Finding, Sample
from torchnnfs.testing.merge import Judged as Judged
from torchnnfs.testing.models import leaves, split
from torchnnfs.testing.precision import PRECISIONS, Array
from torchnnfs.testing.problem import Problem, nominal
from torchnnfs.testing.traces import Call, Trace

#: What a row that differs rests on, where no bound is behind it.
EXCESS, TWICE = "excess", "not the same twice"

#: What a row says of its layer.
OK, DIFFERS, INPUT, NOTHING = "ok", "differs", "right, but its input was wrong", "not judged"

#: An error this many times an honest computation's is no rounding error. Correct computations
#: reached 1.77 (results/campaign.json), and 3.5 in longer hunts.
EXCESS_LIMIT = 4.0

#: Rows of the input that an honest computation is made for, and about as many of its products.
_HONEST_ROWS, _HONEST_PRODUCTS = 1000, 1 << 26


@dataclass(frozen=True)
class Row:
    """One layer of one candidate, measured.

    Attributes:
        candidate: its name.
        device: where it computed.
        dtype: what it computed in.
        layer: path of the layer in the model, with the number of the call if there are several and
            the place in a nested output; "(output)" for the output of the whole model.
        kind: type of the layer.
        state: "ok"; "differs"; "right, but its input was wrong", where an earlier layer differs;
            "not judged", where the dtype may overflow everywhere.
        max_abs: largest absolute error: of the layer on the input it really got, or, where the
            candidate does not show its layers, from the model's input on.
        max_ulp: the same in units in the last place of `dtype`; 0.5 at most is correctly rounded.
        bit_equal: fraction of elements that are the exact result correctly rounded.
        isolated_ratio: largest error over its bound, of the layer on the input it really got; None
            where the candidate does not show it.
        chained_ratio: the same from the model's input on, the bound carried along; None inside a
            module with its own forward.
        chained_ulp: largest error in units in the last place, from the model's input on.
        bound_ratio: the larger of the two ratios.
        excess: root mean square of a dense layer's error over that of an honest computation; None
            for other layers.
        basis: what the row rests on: "rounding" (a formula and a proven bound), "estimated" (a
            formula or a reference, and an estimated bound), "own float64 run" (of the same code,
            with an estimated bound), or, where that is what differs, "excess" or "not the same
            twice".
        reason: what differs, in words; empty where nothing does.
        worst: the element behind `bound_ratio`.
        ulps: number of elements with errors in ULP up to each of `measure.ULP_EDGES`.
        unbounded: number of elements that could not be judged, since the dtype may overflow.
    """

    candidate: str
    device: str
    dtype: str
    layer: str
    kind: str
    state: str
    max_abs: float
    max_ulp: float
    bit_equal: float
    isolated_ratio: float | None
    chained_ratio: float | None
    chained_ulp: float | None
    bound_ratio: float
    excess: float | None
    basis: str
    reason: str
    worst: Worst
    ulps: tuple[int, ...]
    unbounded: int

    @property
    def ok(self) -> bool:
        """Whether the layer is right, and so was its input."""
        return self.state == OK

    @property
    def label(self) -> str:
        """The layer as tables name it: its path and its type."""
        return f"{self.layer} {self.kind}".strip()

    @property
    def gradient(self) -> bool:
        """Whether the row is about a gradient and not about an output."""
        return "dL/" in self.kind


def judge(trace: Trace, problem: Problem) -> list[Row]:
    """A row for each call that the trace shows, and for the output where the calls miss it."""
    return rows_of(trace, find(trace, problem), problem)


class _Part(NamedTuple):
    """The rows of the whole that a batch holds."""

    start: int
    rows: int


def find(trace: Trace, problem: Problem, start: int = 0) -> list[Finding]:
    """What is measured of a trace, whose input holds the rows of the whole from `start` on."""
    part = _Part(start, rows_in(problem.model.input))
    found: list[Finding] = []
    times: Counter[str] = Counter()
    step = 0
    last: Any = None
    for call in trace.calls:
        place = problem.model.places.get(call.path)
        whole = place is not None and place.layer is None and not place.path
        if whole and problem.reference.judges_output:
            continue
        isolated = chained = None
        joined = True
        if step < len(problem.model.steps) and call.path == problem.model.steps[step]:
            chained = problem.chained(step)
            before = split(problem.model.input) if step == 0 else ((last,), {})
            joined = _same((call.args, call.kwargs), before)
            if step == 0 and joined:
                isolated = chained  # nothing came before: both are one
            step, last = step + 1, call.output
        if isolated is None or call.path in problem.reference.sources:
            isolated = problem.isolated(call)
        if problem.is_own and call.path and call.path in problem.reference.recorded:
            chained = problem.recorded(call.path)
        if isolated is None and chained is None:
            continue
        times[call.path] += 1
        label = place.label if place else call.path
        again = f" (call {times[call.path]})" if times[call.path] > 1 else ""
        here = Finding(call.path, label + again, "", call.kind)
        first, *more = _measured(trace, here, call.output, isolated, chained, part)
        sample = None
        if place and place.layer and isolated and call.path not in problem.reference.sources:
            sample = _sample(place.layer, call, isolated, part)
        found += [replace(first, joined=joined, sample=sample), *more]
    named = problem.reference.sources.keys() | problem.reference.recorded.keys()
    shown = last is not None and step == len(problem.model.steps) and _same(last, trace.output)
    judged_here = problem.is_own and problem.formula is None
    needed = not shown or (judged_here and ("" in named or bool(problem.mismatch)))
    if needed and problem.output is not None:
        here = Finding("", "(output)", "", type(problem.model.model).__name__)
        if not trace.calls and problem.is_chain and "" not in named:
            end = problem.model.places[problem.model.steps[-1]]
            here = Finding(end.path, end.label, "", end.kind)
        far = _far(trace, problem)
        measured = _measured(trace, here, trace.output, None, problem.output, part)
        allowed = _most(problem.output) if judged_here and problem.reference.judges_output else 0.0
        found += [replace(each, far=far, allowed=allowed) for each in measured]
    return [*_twice(trace, problem, part), *found]


def find_formula(problem: Problem, start: int = 0) -> tuple[Trace, list[Finding]] | None:
    """Of the output of the model in float64, where a reference gives it in float64."""
    # The formula first: without a reference nothing else need be computed.
    exact = None if problem.formula is None else problem.model.end(PRECISIONS["float64"])
    if problem.formula is None or exact is None:
        return None
    trace = Trace("the model", "cpu", "float64", (), exact.output)
    words = "in float64 this is no rounding: the code or the parameters differ"
    if list(problem.reference.sources) == [""]:
        words += "; a reference that maps layers to functions or arrays shows where"
    here = Finding("", "(output)", "", type(problem.model.model).__name__, remark=words)
    part = _Part(start, rows_in(problem.model.input))
    found = _measured(trace, here, exact.output, None, problem.formula, part)
    return trace, [replace(each, allowed=_most(problem.formula)) for each in found]


def _most(expected: Expected) -> float:
    return max((float(np.max(each, initial=0.0)) for each in expected.bounds.values()), default=0.0)


def rows_in(input: Any) -> int:
    """How many rows an input has, along the first axis of its first array."""
    first = next(iter(leaves(input).values()), None)
    return len(first) if first is not None and first.ndim else 1


def rows_of(trace: Trace, findings: Iterable[Finding], problem: Problem) -> list[Row]:
    """The rows of a trace, from all that was found of it."""
    rows: list[Row] = []
    for (twice, _), group in groupby(findings, key=lambda each: each.key[:2]):
        wrong = any(row.state == DIFFERS for row in rows if row.basis != TWICE)
        for each in group:
            excess = None
            if each.sample is not None:
                excess = _excess(each.sample, each.path, problem)
            label = each.place + each.leaf
            row = make_row(trace, label, each.kind, each.isolated, each.chained, excess, wrong)
            if twice:
                rows += _unstable(row)
                continue
            if not each.joined and row.isolated_ratio is not None and row.isolated_ratio <= 1:
                row = replace(row, state=DIFFERS, reason=_NOT_JOINED)
            remark = each.remark or _who_is_far(each.far)
            if not row.ok and remark:
                row = replace(row, reason=f"{row.reason}; {remark}")
            rows.append(row)
    return rows


#: Of a step whose own result is right.
_NOT_JOINED = "it computes right, but its input is not what the layer before it gave"


def _same(a: Any, b: Any) -> bool:
    pairs = zip_longest(leaves(a).values(), leaves(b).values())
    # NaN is looked for only where something differs: that takes ten times as long.
    return all(
        one is not None
        and two is not None
        and (
            np.array_equal(one, two)
            or (one.dtype.kind == "f" and np.array_equal(one, two, equal_nan=True))
        )
        for one, two in pairs
    )


def _measured(
    trace: Trace,
    here: Finding,
    output: Any,
    isolated: Expected | None,
    chained: Expected | None,
    part: _Part,
) -> Iterator[Finding]:
    """What is measured of each array of an output."""
    values = leaves(output)
    some = isolated or chained
    assert some is not None
    names = list(values) if len(values) == len(some.bounds) else [*values, *some.bounds][:1]
    if trace.calls and len(names) > 1 and names != list(some.bounds):
        values, names = {}, ["'s structure"]  # the same number of arrays, but other places
    arrays = list(values.values())
    for index, name in enumerate(names):
        alone = None if isolated is None else _judged(arrays, isolated, index, trace, part)
        whole = alone
        if chained is not isolated:
            whole = None if chained is None else _judged(arrays, chained, index, trace, part)
        yield replace(here, leaf=name, isolated=alone, chained=whole)


def _arrays(count: int) -> str:
    return f"{count} array{'s' * (count != 1)}"


def _judged(
    values: list[Array], expected: Expected, index: int, trace: Trace, part: _Part
) -> Judged:
    """One array of an output against the one that is expected at its place."""
    theirs, bounds = list(expected.values.values()), list(expected.bounds.values())
    precision = PRECISIONS[trace.dtype]
    if len(values) != len(theirs):
        named = f" ({', '.join(expected.bounds)})" if len(theirs) > 1 else ""
        counts = f"{_arrays(len(values))}", f"{_arrays(len(theirs))}{named}"
        return Judged(unlike(*counts), expected.basis, expected.source)
    value, exact, bound = values[index], theirs[index], bounds[index]
    if bound.shape != exact.shape:
        bound = np.full(exact.shape, np.max(bound, initial=0.0))
    start = part.start if exact.shape[:1] == (part.rows,) else 0
    measured = measure(value, exact, bound, precision, start)
    return Judged(measured, expected.basis, expected.source)


def make_row(
    trace: Trace,
    label: str,
    kind: str,
    isolated: Judged | None,
    chained: Judged | None,
    excess: float | None = None,
    wrong: bool = False,
) -> Row:
    """A row from what was measured of a layer; `wrong`: an earlier layer of the trace differs."""
    shown = [each for each in (isolated, chained) if each is not None]
    decisive = max(shown, key=lambda judged: judged.measured.ratio)
    measured, basis, state, reason = shown[0].measured, decisive.basis, OK, ""
    if decisive.measured.ratio > 1:
        only_chained = isolated is not None and isolated.measured.ratio <= 1
        state = INPUT if only_chained and wrong else DIFFERS
        reason = _reason(decisive)
    elif measured.size and measured.unbounded == measured.size:
        state = NOTHING
        reason = f"no error can be told from rounding: {trace.dtype} may overflow or cancel out"
    elif excess is not None and excess > EXCESS_LIMIT:
        state, basis = DIFFERS, EXCESS
        reason = (
            f"its errors are {excess:.3g} times those of plain sums in {trace.dtype}; up to "
            f"{EXCESS_LIMIT:g} is rounding"
        )
    return Row(
        candidate=trace.name,
        device=trace.device,
        dtype=trace.dtype,
        layer=label,
        kind=kind,
        state=state,
        max_abs=measured.max_abs,
        max_ulp=measured.max_ulp,
        bit_equal=measured.equal / measured.size if measured.size else 1.0,
        isolated_ratio=isolated and isolated.measured.ratio,
        chained_ratio=chained and chained.measured.ratio,
        chained_ulp=chained and chained.measured.max_ulp,
        bound_ratio=decisive.measured.ratio,
        excess=excess,
        basis=basis,
        reason=reason,
        worst=decisive.measured.worst,
        ulps=measured.ulps,
        unbounded=max(each.measured.unbounded for each in shown),
    )


def _reason(judged: Judged) -> str:
    measured, source = judged.measured, judged.source
    worst = measured.worst
    if measured.unlike:
        return f"{measured.unlike[0]} where {source} gives {measured.unlike[1]}"
    times = f"{measured.ratio:.3g} times" if np.isfinite(measured.ratio) else "infinitely far from"
    return (
        f"{worst.value:.9g} at {list(worst.index)} where {source} gives {worst.expected:.9g}, "
        f"{times} what rounding explains"
    )


def _sample(layer: Layer, call: Call, expected: Expected, part: _Part) -> Sample | None:
    """The rows of a call that an honest computation is made for."""
    value = np.asarray(call.output)
    if layer.honest is None or expected.basis != ROUNDING:
        return None
    x, y = (array.reshape(-1, array.shape[-1]) for array in (call.input, expected.values[""]))
    if value.size != y.size or not y.size:
        return None
    most = max(1, min(_HONEST_ROWS, _HONEST_PRODUCTS // max(1, x.shape[1] * y.shape[1])))
    start = part.start * len(x) // part.rows
    return Sample.of(most, start, x, y, value.reshape(y.shape))


def _excess(sample: Sample, path: str, problem: Problem) -> float | None:
    """Root mean square of the error over that of an honest computation in the same precision.

    Of several honest ones the worst counts, and it is at least u / sqrt(3) of the output's root
    mean square: a number may be right by luck.
    """
    precision, layer = problem.precision, problem.model.places[path].layer
    assert layer is not None
    assert layer.honest is not None
    x, y, value = sample.arrays
    honest = layer.honest(x, precision, **problem.exact.arguments[problem.paired[path]])
    usable = np.isfinite(y) & np.isfinite(value) & np.isfinite(honest).all(axis=0)
    usable &= np.abs(y) < precision.largest
    if not usable.any():
        return None
    size = _rms(y[usable])
    floor = precision.roundoff * size / math.sqrt(3) + 2 * (precision.tiny + precision.stored_tiny)
    flushed = precision.tiny * x.shape[1] * (1 + float(np.max(np.abs(x))))
    error = _rms(value[usable] - y[usable])
    plain = max(_rms(order[usable]) for order in honest)
    return error / max(plain, floor + flushed) if error else 0.0


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _far(trace: Trace, problem: Problem) -> tuple[float, float] | None:
    """How far candidate and reference are from the model in float64, in bounds."""
    model, expected = problem.model.end(), problem.output
    if model is None or expected is None or not problem.reference.judges_output:
        return None
    far, part = [], _Part(0, 0)
    for values in (leaves(trace.output), expected.values):
        arrays = list(values.values())
        each = [_judged(arrays, model, i, trace, part).measured.ratio for i in range(len(arrays))]
        far.append(max(each, default=0.0))
    return far[0], far[1]


def _who_is_far(far: tuple[float, float] | None) -> str:
    """To be said beside a reference that differs."""
    if far is None:
        return ""
    if min(far) > 1:
        words = "both are far from the model's own layers and parameters in float64"
    elif far[0] > 1:
        words = "the candidate is far from the model's own layers and parameters in float64"
    else:
        words = "the candidate computes what the model's own layers and parameters give in float64"
    return (
        f"{words} ({far[0]:.2g} times the bound for the candidate, {far[1]:.2g} for the reference)"
    )


def _twice(trace: Trace, problem: Problem, part: _Part) -> Iterator[Finding]:
    """The second run on the same input against the first."""
    if trace.again is None:
        return
    here = Finding("", "(output)", "", type(problem.model.model).__name__, twice=True)
    first = leaves(trace.output)
    if _same(trace.output, trace.again):
        for name, value in first.items():
            yield replace(here, leaf=name, chained=Judged(same(value), ESTIMATED, ""))
        return
    bounds = {}
    known = problem.model.end()
    for index, (name, value) in enumerate(first.items()):
        bounds[name] = nominal(value, problem.precision)
        if known is not None and len(known.bounds) == len(first):
            bound = list(known.bounds.values())[index]
            bounds[name] = 2 * bound if bound.shape == value.shape else bounds[name]
    expected = Expected(trace.output, bounds, ESTIMATED)
    yield from _measured(trace, here, trace.again, None, expected, part)


def _unstable(row: Row) -> list[Row]:
    """The row, where two runs on the same input differ by more than rounding explains."""
    if row.state != DIFFERS:
        return []
    words = (
        f"two runs on the same input gave {row.worst.expected:.9g} and {row.worst.value:.9g} at "
        f"{list(row.worst.index)}"
    )
    return [replace(row, basis=TWICE, reason=words)]
