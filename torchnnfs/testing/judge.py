"""Phase 2: each trace is measured against the exact chain of its dtype and made rows."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np

from torchnnfs.testing.estimate import ESTIMATED, ROUNDING, Expected
from torchnnfs.testing.measure import Measured, Worst, measure, same, unlike
from torchnnfs.testing.merge import Finding, Sample
from torchnnfs.testing.models import Place
from torchnnfs.testing.precision import PRECISIONS, Array
from torchnnfs.testing.problem import Problem, nominal
from torchnnfs.testing.traces import Call, Trace
from torchnnfs.testing.values import leaves, split

#: What a row that differs rests on, where no bound is behind it.
EXCESS, TWICE = "excess", "not the same twice"

#: The name of rows about the model in float64, beside a reference.
MODEL = "the model"
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


def find(trace: Trace, problem: Problem) -> list[Finding]:
    """What is measured of a trace: of two runs, of each call, and of the output."""
    reference, steps = problem.reference, problem.model.steps
    found = [*_twice(trace, problem)]
    times, calls = Counter[str](), Counter(call.path for call in trace.calls)
    step, last = 0, None
    for call in trace.calls:
        place = problem.model.places.get(call.path)
        if place and place.layer is None and not place.path and reference.judges_output:
            continue
        isolated = chained = None
        follows = True
        if step < len(steps) and call.path == steps[step]:
            chained = problem.chained(step)
            before = split(problem.model.input) if step == 0 else ((last,), {})
            follows = _same((call.args, call.kwargs), before)
            if step == 0 and follows:
                isolated = chained  # nothing came before: both are one
            step, last = step + 1, call.output
        if not leaves(call.output):
            continue
        if isolated is None or call.path in reference.sources:
            isolated = problem.isolated(call)
        calls[call.path] -= 1
        alone = isolated
        if (
            problem.is_own
            and call.path in reference.recorded
            and call.path
            and not calls[call.path]
        ):
            chained = problem.recorded(call.path)  # which holds what came out last
            if _same((call.args, call.kwargs), split(problem.model.input)):
                isolated = chained  # no layer came before
        if isolated is None and chained is None:
            continue
        times[call.path] += 1
        label = place.label if place else call.path
        label += f" (call {times[call.path]})" if times[call.path] > 1 else ""
        here = Finding(call.path, label, "", call.kind, follows=follows)
        first, *more = _measured(trace, here, call.output, isolated, chained, problem)
        if alone and call.path not in reference.sources:
            first = replace(first, sample=_sample(place, call, alone, problem))
        found += [first, *more]
    named = "" in reference.sources or "" in reference.recorded
    shown = last is not None and step == len(steps) and _same(last, trace.output)
    judged_here = problem.is_own and problem.formula is None
    needed = not shown or (judged_here and (named or bool(problem.mismatch)))
    if needed and problem.output is not None:
        here = _output(problem)
        if not trace.calls and problem.is_chain and not named:
            end = problem.model.places[steps[-1]]
            here = Finding(end.path, end.label, "", end.kind)
        if reference.judges_output:
            here = replace(here, far=_far(trace, problem))
            here = _allowing(here, problem.output) if judged_here else here
        found += _measured(trace, here, trace.output, None, problem.output, problem)
    return found


def find_formula(problem: Problem) -> tuple[Trace, list[Finding]] | None:
    """Of the output of the model in float64, where a reference gives it in float64."""
    # The formula first: without a reference nothing else need be computed.
    exact = None if problem.formula is None else problem.model.end(PRECISIONS["float64"])
    if problem.formula is None or exact is None:
        return None
    trace = Trace(MODEL, "cpu", "float64", (), exact.output)
    here = replace(_allowing(_output(problem), problem.formula), remark=_where(problem))
    return trace, [*_measured(trace, here, exact.output, None, problem.formula, problem)]


def _where(problem: Problem) -> str:
    """To be said where the model in float64 is another function than the reference."""
    words = "in float64 this is no rounding: the code or the parameters differ; "
    functions, arrays = problem.reference.sources.keys(), problem.reference.recorded.keys()
    if functions - {""}:
        return f"{words}a function at a place misses faults between places: arrays there show where"
    if arrays - {""}:
        return f"{words}arrays at more places show where"
    return f"{words}a reference that maps places in the model to arrays shows where"


def _output(problem: Problem) -> Finding:
    return Finding("", "(output)", "", type(problem.model.model).__name__)


def _allowing(found: Finding, expected: Expected) -> Finding:
    """With what the bounds beside a reference let through, and whether that is nearly all."""
    pairs = zip(expected.bounds.values(), expected.values.values(), strict=True)
    blind = any(
        np.median(bound) >= np.max(np.abs(exact), where=np.isfinite(exact), initial=0.0) > 0
        for bound, exact in pairs
        if bound.size
    )
    allowed = max(
        (float(np.max(each, initial=0.0)) for each in expected.bounds.values()), default=0.0
    )
    return replace(found, allowed=allowed, blind=blind)


def rows_of(trace: Trace, findings: Iterable[Finding], problem: Problem) -> list[Row]:
    """The rows of a trace, from all that was found of it."""
    rows: list[Row] = []
    for _, group in groupby(findings, key=lambda each: each.key[:2]):
        wrong = any(row.state == DIFFERS and row.basis != TWICE for row in rows)
        made = [row_of(trace, each, _excess(each, problem), wrong) for each in group]
        rows += [row for row in made if row.state == DIFFERS or row.basis != TWICE]
    return rows


def _same(a: Any, b: Any) -> bool:
    ours, theirs = list(leaves(a).values()), list(leaves(b).values())
    # NaN is looked for only where something differs: that takes ten times as long.
    return len(ours) == len(theirs) and all(
        np.array_equal(one, two)
        or (one.dtype.kind == "f" and np.array_equal(one, two, equal_nan=True))
        for one, two in zip(ours, theirs, strict=True)
    )


def _measured(
    trace: Trace,
    here: Finding,
    output: Any,
    isolated: Expected | None,
    chained: Expected | None,
    problem: Problem,
) -> Iterator[Finding]:
    """What is measured of each array of an output."""
    values = leaves(output)
    bounds = [] if (some := isolated or chained) is None else list(some.bounds)
    names = list(values) if len(values) == len(bounds) else [*values, *bounds][:1]
    named = trace.calls or trace.name == MODEL  # exporters give their arrays without names
    if named and len(names) > 1 and names != bounds:  # as many arrays, but other places
        structure = unlike(f"arrays at {', '.join(names)}", f"them at {', '.join(bounds)}")
        structure = replace(structure, source=(isolated or chained or structure).source)
        yield replace(here, leaf="'s structure", chained=structure)
        return
    arrays = list(values.values())
    for index, name in enumerate(names):
        alone = None if isolated is None else _judged(arrays, isolated, index, trace, problem)
        whole = alone
        if chained is not isolated:
            whole = None if chained is None else _judged(arrays, chained, index, trace, problem)
        yield replace(here, leaf=name, isolated=alone, chained=whole)


def _judged(
    values: list[Array], expected: Expected, index: int, trace: Trace, problem: Problem
) -> Measured:
    """One array of an output against the one that is expected at its place."""
    theirs, bounds = list(expected.values.values()), list(expected.bounds.values())
    if len(values) != len(theirs):
        ours, wanted = (f"{n} array{'s' * (n != 1)}" for n in (len(values), len(theirs)))
        named = f" ({', '.join(expected.bounds)})" if len(theirs) > 1 else ""
        measured = unlike(ours, wanted + named)
    else:
        exact, bound = theirs[index], bounds[index]
        if bound.shape != exact.shape:
            bound = np.full(exact.shape, np.max(bound, initial=0.0))
        start = problem.start if exact.shape[:1] == (problem.rows,) else 0
        measured = measure(values[index], exact, bound, PRECISIONS[trace.dtype], start)
    return replace(measured, basis=expected.basis, source=expected.source)


def row_of(trace: Trace, found: Finding, excess: float | None = None, wrong: bool = False) -> Row:
    """A row from what was measured of a layer; `wrong`: an earlier layer of the trace differs."""
    isolated, chained = found.isolated, found.chained
    shown = [each for each in (isolated, chained) if each is not None]
    measured, decisive = shown[0], max(shown, key=lambda each: each.ratio)
    right = isolated is not None and isolated.ratio <= 1
    basis, state, reason = decisive.basis, OK, ""
    if decisive.ratio > 1:
        state, reason = INPUT if right and wrong else DIFFERS, _reason(decisive)
    elif measured.size and measured.unbounded == measured.size:
        state = NOTHING
        reason = f"no error can be told from rounding: {trace.dtype} may overflow or cancel out"
    elif excess is not None and excess > EXCESS_LIMIT:
        state, basis = DIFFERS, EXCESS
        reason = (
            f"its errors are {excess:.3g} times those of plain sums in {trace.dtype}; up to "
            f"{EXCESS_LIMIT:g} is rounding"
        )
    if found.twice:
        worst, basis = decisive.worst, TWICE
        numbers = f"{worst.expected:.9g} and {worst.value:.9g} at {list(worst.index)}"
        reason = f"two runs on the same input gave {numbers}"
    if right and not found.follows:
        state = DIFFERS
        reason = "it computes right, but its input is not what the layer before it gave"
    remark = "" if decisive.unlike else found.remark or _who_is_far(found.far)
    return Row(
        candidate=trace.name,
        device=trace.device,
        dtype=trace.dtype,
        layer=found.place + found.leaf,
        kind=found.kind,
        state=state,
        max_abs=measured.max_abs,
        max_ulp=measured.max_ulp,
        bit_equal=measured.equal / measured.size if measured.size else 1.0,
        isolated_ratio=None if isolated is None else isolated.ratio,
        chained_ratio=None if chained is None else chained.ratio,
        chained_ulp=None if chained is None else chained.max_ulp,
        bound_ratio=decisive.ratio,
        excess=excess,
        basis=basis,
        reason=f"{reason}; {remark}" if remark and state not in (OK, NOTHING) else reason,
        worst=decisive.worst,
        ulps=measured.ulps,
        unbounded=max(each.unbounded for each in shown),
    )


def _reason(measured: Measured) -> str:
    worst, source = measured.worst, measured.source
    if measured.unlike:
        return f"{measured.unlike[0]} where {source} gives {measured.unlike[1]}"
    times = f"{measured.ratio:.3g} times" if np.isfinite(measured.ratio) else "infinitely far from"
    return (
        f"{worst.value:.9g} at {list(worst.index)} where {source} gives {worst.expected:.9g}, "
        f"{times} what rounding explains"
    )


def _sample(place: Place | None, call: Call, expected: Expected, problem: Problem) -> Sample | None:
    """The rows of a call that an honest computation is made for."""
    if not (place and place.layer and place.layer.honest) or expected.basis != ROUNDING:
        return None
    value = np.asarray(call.output)
    x, y = (array.reshape(-1, array.shape[-1]) for array in (call.input, expected.values[""]))
    if value.size != y.size or not y.size:
        return None
    most = max(1, min(_HONEST_ROWS, _HONEST_PRODUCTS // max(1, x.shape[1] * y.shape[1])))
    start = problem.start * len(x) // problem.rows
    return Sample.of(most, start, x, y, value.reshape(y.shape))


def _excess(found: Finding, problem: Problem) -> float | None:
    """Root mean square of the error over that of an honest computation in the same precision.

    Of several honest ones the worst counts, and it is at least u / sqrt(3) of the output's root
    mean square: a number may be right by luck.
    """
    precision, place = problem.precision, problem.model.places.get(found.path)
    if not (found.sample and place and place.layer and place.layer.honest):
        return None
    x, y, value = found.sample.arrays
    arguments = problem.exact.arguments[problem.paired[found.path]]
    honest = place.layer.honest(x, precision, **arguments)
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
    model, reference = problem.model.end(problem.precision), problem.output
    if model is None or reference is None:
        return None
    far = []
    for arrays in (list(leaves(trace.output).values()), list(reference.values.values())):
        found = [_judged(arrays, model, index, trace, problem) for index in range(len(arrays))]
        far.append(max((each.ratio for each in found), default=0.0))
    return far[0], far[1]


def _who_is_far(far: tuple[float, float] | None) -> str:
    """To be said beside a reference that differs."""
    if far is None:
        return ""
    candidate, reference = far
    who = "both are" if min(candidate, reference) > 1 else "the candidate is"
    words = f"{who} far from the model's own layers and parameters in float64"
    if candidate <= 1:
        words = "the candidate computes what the model's own layers and parameters give in float64"
    return (
        f"{words} ({candidate:.2g} times the bound for the candidate, {reference:.2g} for the "
        "reference)"
    )


def _twice(trace: Trace, problem: Problem) -> Iterator[Finding]:
    """The second run on the same input against the first."""
    if trace.again is None:
        return
    here, first = replace(_output(problem), twice=True), leaves(trace.output)
    if _same(trace.output, trace.again):
        for name, value in first.items():
            yield replace(here, leaf=name, chained=same(value))
        return
    bounds = {name: nominal(value, problem.precision) for name, value in first.items()}
    known = problem.model.end(problem.precision)
    limits = [] if known is None else list(known.bounds.values())
    if [each.shape for each in limits] == [each.shape for each in first.values()]:
        bounds = {name: 2 * limit for name, limit in zip(first, limits, strict=True)}
    expected = Expected(trace.output, bounds, ESTIMATED)
    yield from _measured(trace, here, trace.again, None, expected, problem)
