"""Deliberately broken copies of a model: what a judge has to reject to be believed."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from torchnnfs.testing.candidates import Candidate, dtype_name, single
from torchnnfs.testing.estimate import Expected
from torchnnfs.testing.exact import known
from torchnnfs.testing.judge import DIFFERS, EXCESS, judge
from torchnnfs.testing.layers import Layer, Wrong
from torchnnfs.testing.layers.softmax import UNSHIFTED
from torchnnfs.testing.measure import measure
from torchnnfs.testing.models import takes
from torchnnfs.testing.precision import PRECISIONS, Array, Precision
from torchnnfs.testing.problem import Problem
from torchnnfs.testing.traces import Call, Formula, Trace


@dataclass(frozen=True)
class Control:
    """One broken copy and what the judge said of it.

    Attributes:
        name: what was broken.
        layer: path of the layer where.
        outcome: "rejected"; "indistinguishable", where this input cannot show it; or "passed".
        reason: of the outcome, in words.
    """

    name: str
    layer: str
    outcome: str
    reason: str


#: What can be wrong with the last layer, whatever it computes: from its output.
AT_THE_END: dict[str, Callable[[Array], Array | None]] = {
    "constant output": lambda y: np.full_like(y, 1 / y.shape[-1]),
    "swapped classes": lambda y: y[..., ::-1] if y.shape[-1] > 1 else None,
}


def _behind(layer: Layer, change: Callable[[Array], Array | None]) -> Wrong:
    return lambda x, **arguments: change(layer.forward(x, **arguments))


def try_controls(candidate: Candidate, problem: Problem) -> tuple[Control, ...]:
    """Break the model at the first layer that each control fits, and judge it by itself."""

    def run(broken: dict[str, Formula]) -> Trace:
        return candidate.run(problem.model.model, problem.input, broken=broken)

    calls: dict[str, Call] = {}
    for call in run({}).calls:
        calls.setdefault(call.path, call)
    tried: dict[str, Control] = {}
    for path, call in calls.items():
        layer = problem.model.places[path].layer
        if layer is None or not takes(call.input, layer):
            continue
        wrongs: dict[str, Wrong] = dict(layer.controls)
        if path == problem.model.steps[-1]:
            wrongs |= {name: _behind(layer, change) for name, change in AT_THE_END.items()}
        for name, wrong in wrongs.items():
            if name not in tried:
                told = _try(name, wrong, layer, call, problem, run)
                tried |= {name: Control(name, path, *told)} if told else {}
    return tuple(tried.values())


def _try(
    name: str,
    wrong: Wrong,
    layer: Layer,
    call: Call,
    problem: Problem,
    run: Callable[[dict[str, Formula]], Trace],
) -> tuple[str, str] | None:
    """Judge one broken copy, and where it is not rejected, ask whether it could be."""
    arguments, dtype = problem.model.arguments[call.path], problem.model.dtype

    def formula(x: Array) -> Array:
        given = (x, arguments) if dtype == torch.float64 else single((x, arguments))
        return np.asarray(wrong(given[0], **given[1]))

    if name == UNSHIFTED:  # of the layer alone, on the logits it gets, scaled to size 100
        x = call.input
        size = float(x.flat[np.argmax(np.abs(x))]) if x.size else 0.0
        if not 0 < abs(size) < np.inf:
            return "indistinguishable", "its logits here are all zero"
        # With its sign, so that the largest is 100 and not -100.
        scaled = problem.precision.round(x * (100 / size))
        expected = known(layer, scaled, None, problem.precision, arguments)
        ratio = _off(formula(scaled), expected, problem.precision)
        if ratio > 1:
            return "rejected", _size(ratio)
        return "indistinguishable", "exp does not overflow here"
    exact_wrong = wrong(call.input, **arguments)
    if exact_wrong is None:
        return None
    try:
        trace = run({call.path: formula})
    except ValueError:  # a forward that takes gradients finds none behind NumPy
        return "indistinguishable", "the model cannot compute with it"
    rows = judge(trace, problem)
    row = next((row for row in rows if row.state == DIFFERS), None)
    if row is not None:
        words = _size(row.bound_ratio)
        if row.basis == EXCESS:
            words = f"{row.excess:.3g} times the errors of plain sums"
        return "rejected", f"{words} at layer {row.label}"
    ratio = _off(exact_wrong, problem.isolated(call), PRECISIONS["float64"])
    if ratio > 2:
        return "passed", f"off by {ratio:.3g} times what rounding explains"
    words = f"off by {ratio:.2g} of what rounding in {dtype_name(dtype)} explains"
    return "indistinguishable", words if ratio else "on this input it computes the same"


def _off(value: Array, expected: Expected | None, precision: Precision) -> float:
    assert expected is not None
    return measure(value, expected.values[""], expected.bounds[""], precision).ratio


def _size(ratio: float) -> str:
    return f"{ratio:.3g} times its bound" if ratio < np.inf else "infinitely far off"
