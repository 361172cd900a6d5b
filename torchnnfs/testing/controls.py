"""Deliberately broken copies of a model: what a judge has to reject to be believed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from torchnnfs.testing.candidates import Candidate, single
from torchnnfs.testing.exact import known
from torchnnfs.testing.judge import DIFFERS, EXCESS, judge
from torchnnfs.testing.layers import Layer
from torchnnfs.testing.layers.softmax import UNSHIFTED
from torchnnfs.testing.measure import measure
from torchnnfs.testing.precision import PRECISIONS, Array
from torchnnfs.testing.problem import Problem
from torchnnfs.testing.traces import Call, Formula


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


#: A wrong formula: ``wrong(x, **arguments)``; None where these arguments cannot be broken so.
_Wrong = Callable[..., Array | None]


def try_controls(
    model: nn.Module, input: Any, candidate: Candidate, problem: Problem
) -> tuple[Control, ...]:
    """Break the model at the first layer that each control fits, and judge it by itself."""
    calls: dict[str, Call] = {}
    for call in candidate.run(model, input, broken={}).calls:
        calls.setdefault(call.path, call)
    tried: dict[str, Control] = {}
    for path, call in calls.items():
        place = problem.model.places[path]
        if place.layer is None:
            continue
        wrongs: dict[str, _Wrong] = dict(place.layer.controls)
        if path == problem.model.steps[-1]:
            wrongs |= _of_the_output(place.layer)
        for name, wrong in wrongs.items():
            if name not in tried:
                control = _try(name, wrong, model, input, candidate, problem, call)
                tried |= {} if control is None else {name: control}
    return tuple(tried.values())


def _of_the_output(layer: Layer) -> dict[str, _Wrong]:
    """What can be wrong with the last layer, whatever it computes."""

    def constant(x: Array, **arguments: Any) -> Array:
        y = layer.forward(x, **arguments)
        return np.full_like(y, 1 / y.shape[-1])

    def swapped(x: Array, **arguments: Any) -> Array | None:
        y = layer.forward(x, **arguments)
        return y[..., ::-1] if y.shape[-1] > 1 else None

    return {"constant output": constant, "swapped classes": swapped}


def _try(
    name: str,
    wrong: _Wrong,
    model: nn.Module,
    input: Any,
    candidate: Candidate,
    problem: Problem,
    call: Call,
) -> Control | None:
    """Judge one broken copy, and where it is not rejected, ask whether it could be."""
    path, layer = call.path, problem.model.places[call.path].layer
    assert layer is not None
    arguments = problem.model.arguments[path]
    narrow = single if candidate.dtype != torch.float64 else lambda value: value
    if name == UNSHIFTED:
        return _at_size_100(wrong, layer, call, arguments, problem, narrow)
    exact_wrong = wrong(call.input, **arguments)
    if exact_wrong is None:
        return None
    few = {key: narrow(value) for key, value in arguments.items()}

    def formula(module: nn.Module, x: Array) -> Array:
        result = wrong(narrow(x), **few)
        assert result is not None
        return result

    broken: dict[str, Formula] = {path: formula}
    rows = judge(candidate.run(model, input, broken=broken), problem)
    row = next((row for row in rows if row.state == DIFFERS), None)
    if row is not None:
        far = f"{row.excess:.3g} times the errors of plain sums" if row.basis == EXCESS else ""
        words = f"{far or _size(row.bound_ratio)} at layer {row.label}"
        return Control(name, path, "rejected", words)
    expected = problem.isolated(call)
    assert expected is not None
    value, bound = expected.values[""], expected.bounds[""]
    ratio = measure(exact_wrong, value, bound, PRECISIONS["float64"]).ratio
    if ratio > 2:
        words = f"off by {ratio:.3g} times what rounding explains"
        return Control(name, path, "passed", words)
    words = f"off by {ratio:.2g} of what rounding in {problem.exact.dtype} explains"
    if not ratio:
        words = "on this input it computes the same"
    return Control(name, path, "indistinguishable", words.replace("torch.", ""))


def _size(ratio: float) -> str:
    return f"{ratio:.3g} times its bound" if ratio < np.inf else "infinitely far off"


def _at_size_100(
    wrong: _Wrong,
    layer: Layer,
    call: Call,
    arguments: dict[str, Any],
    problem: Problem,
    narrow: Callable[[Any], Any],
) -> Control | None:
    """The layer alone, on the logits it gets here, scaled to size 100."""
    logits = call.input
    size = float(logits.flat[np.argmax(np.abs(logits))]) if logits.size else 0.0
    if not 0 < abs(size) < np.inf:
        words = "its logits here are all zero"
        return Control(UNSHIFTED, call.path, "indistinguishable", words)
    # With its sign, so that the largest is 100 and not -100.
    scaled = problem.precision.round(logits * (100 / size))
    expected = known(layer, scaled, None, problem.precision, arguments)
    value = wrong(narrow(scaled), **arguments)
    if value is None:
        return None
    ratio = measure(value, expected.values[""], expected.bounds[""], problem.precision).ratio
    outcome = "rejected" if ratio > 1 else "indistinguishable"
    words = _size(ratio) if ratio > 1 else "exp does not overflow here"
    return Control(UNSHIFTED, call.path, outcome, words)
