"""What is expected of every trace in one dtype: by the exact chain, or by a reference."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import nn

from torchnnfs.testing.estimate import ESTIMATED, ROUNDING, Expected
from torchnnfs.testing.exact import Exact
from torchnnfs.testing.models import Place, own_dtype
from torchnnfs.testing.precision import PRECISIONS, Array, Precision
from torchnnfs.testing.reference import Answer, Reference
from torchnnfs.testing.traces import Call
from torchnnfs.testing.values import (
    convert,
    inside,
    leaves,
    parts,
    pieces,
    rows_in,
    split,
    to_numpy,
)

_DOUBLE = PRECISIONS["float64"]


class Problem:
    """What is expected, in one dtype, of the rows of the whole from `start` on."""

    def __init__(
        self, model: nn.Module, input: Any, reference: Reference, dtype: torch.dtype, start: int = 0
    ) -> None:
        self.input, self.reference = input, reference
        self.start, self.rows = start, rows_in(input)
        # Somebody's code has the model's own parameters, not those that another dtype stores.
        self.is_own = dtype == own_dtype(model, input)
        self.model = self.end = Exact(model, input, dtype)
        # The chain that judges layers: that of a reference with the model's layers, or the model's.
        self.exact = self.model
        self.precision = self.model.precision
        self.paired = {path: path for path in self.model.places}  # to the places of `exact`
        self.mismatch = ""  # where a reference that is a module has other layers than the model
        if reference.module is not None:
            self.end = Exact(reference.module, input, dtype, ESTIMATED)
            self.mismatch, pairs = _pair(self.model, self.end)
            if not self.mismatch:
                self.exact, self.paired = self.end, pairs
        ours = [self.paired.get(path) for path in self.model.steps]
        self.is_chain = ours == self.exact.steps

    def isolated(self, call: Call) -> Expected | None:
        """What the call's place should give for what it got; None where nobody can say."""
        given = (call.args, call.kwargs)
        path = self.paired.get(call.path)
        source = self.reference.sources.get(call.path) if call.path else None
        if source is None or not self.is_own:
            return None if path is None else self.exact.at(path, given)
        answer = source(given, self.model.dtype != torch.float64)
        return self._beside(answer, partial(self.model.at, call.path, given, None))

    def chained(self, index: int) -> Expected | None:
        """What comes out of that step of the chain."""
        chain = self.exact.chain(self.precision) if self.is_chain else []
        return chain[index] if index < len(chain) else None

    def recorded(self, path: str) -> Expected:
        """What came out elsewhere at a place within the model."""
        return self._beside(self.reference.recorded[path], partial(self.model.inside, path))

    def _beside(self, answer: Answer, at: Callable[[Precision], Expected | None]) -> Expected:
        """What a reference gave; `at` says what rounding explains in a precision."""
        expected, own = at(self.precision), at(answer.precision)
        return _allowing(answer, expected, own, self.precision)

    @cached_property
    def _answer(self) -> Answer | None:
        """What somebody's code or array gives for the output."""
        if "" not in self.reference.sources:
            return self.reference.recorded.get("")
        single = self.model.dtype != torch.float64
        answer = self.reference.sources[""](split(self.model.input), single)
        values = leaves(answer.output).values()
        if any(value.size for value in values) and not any(np.isfinite(v).any() for v in values):
            raise ValueError("compare expects a reference with finite numbers, got none")
        return answer

    @cached_property
    def formula(self) -> Expected | None:
        """What the model should give in float64, by a reference that can compute in float64.

        The parameters may differ by their rounding, where they are not the reference's own.
        """
        if not self.is_own or not self.reference.judges_output:
            return None
        module = self.reference.module
        if (
            module is not None
            and not self.mismatch
            and (self.model.plain and self.end.plain)
            and self._same_parameters(module)
        ):
            return None  # its formulas are all that it computes
        ours, answer = self.model.inside("", _DOUBLE), self._answer
        theirs = ours if module is None else self.end.inside("", _DOUBLE)
        if module is not None and theirs is not None:
            answer = Answer(theirs.output, _DOUBLE)
        if ours is None or answer is None or answer.precision is not _DOUBLE:
            return None
        bounds = ours.bounds
        if module is None or not self._same_parameters(module):
            # A function gets this very input; an array may come from one that was not rounded yet.
            reach = self.model.reach(inputs="" in self.reference.recorded)
            if reach is None:
                return None
            bounds = {name: bound + reach[name] for name, bound in bounds.items()}
        return replace(_allowing(answer, replace(ours, bounds=bounds), theirs), basis=ESTIMATED)

    def _same_parameters(self, module: nn.Module) -> bool:
        ours, theirs = (
            {
                (name, i): to_numpy(piece)
                for name, each in (*model.named_parameters(), *model.named_buffers())
                for i, piece in enumerate(pieces(each))
            }
            for model in (self.model.model, module)
        )
        return ours.keys() == theirs.keys() and all(
            np.array_equal(ours[name], theirs[name]) for name in ours
        )

    @cached_property
    def output(self) -> Expected | None:
        """What the model should give for its input; None where nobody can say."""
        named = "" in self.reference.sources or "" in self.reference.recorded
        if self.formula is not None or (named and not self.is_own):
            return self.model.end(self.precision)
        answer = self._answer
        return self.end.end(self.precision) if answer is None else self._beside(answer, self._sharp)

    def _sharp(self, precision: Precision) -> Expected | None:
        """The end by the chain, or by the model's own run where a deep chain allows more."""
        chain, whole = self.model.end(precision), self.model.inside("", precision)
        if chain is None or whole is None or list(chain.bounds) != list(whole.bounds):
            return chain or whole
        if _shapes(chain) != _shapes(whole):  # a layer does not compute what its type says
            return chain
        bounds = {name: np.minimum(chain.bounds[name], whole.bounds[name]) for name in chain.bounds}
        return replace(whole, bounds=bounds)

    @property
    def unjudged_gradients(self) -> tuple[str, ...]:
        """The steps whose gradients no formula is known of."""
        return tuple(
            f"the gradient of {place.title}"
            for place in self.model.places.values()
            if place.step and (place.layer is None or place.layer.backward is None)
        )

    def _makes(self, place: Place) -> bool:
        """Whether code makes its weights: a parametrization, pruning, weight norm, a hook."""
        read = self.model.arguments.get(place.path, {}) if place.layer else {}
        own = place.module._parameters
        return any(read.get(name) is not None and name not in own for name in ("weight", "bias"))

    @property
    def unjudged(self) -> tuple[str, ...]:
        """The steps that nothing independent judged."""
        if self.reference.judges_output:
            return ()
        covered = self.reference.sources.keys() | self.reference.recorded.keys()
        places = [self.model.places[path] for path in dict.fromkeys(self.model.steps)]
        made = [
            f"how {place.title} makes its parameters"
            for place in self.model.places.values()
            if self._makes(place)
        ]
        return (
            *(each.title for each in places if each.layer is None and each.path not in covered),
            *made,
        )


def _fitted(output: Any, expected: Expected) -> Any:
    """The reference's output in the order of the model's."""
    values, wanted = leaves(_alike(output, expected.output)), expected.values
    if values.keys() == wanted.keys() or len(values) == len(wanted) == 1:
        named = values if len(values) > 1 else dict.fromkeys(wanted, *values.values())
        ordered = iter([named[name] for name in wanted])
        return convert(expected.output, np.ndarray, lambda _: next(ordered))
    return output


def _alike(output: Any, wanted: Any) -> Any:
    """The reference's output in parts where the model's is, and one array where that is one."""
    held, places = inside(output), inside(wanted)
    if isinstance(wanted, np.ndarray) and isinstance(output, list | tuple):
        rows, shape = _joined(output), parts(wanted).shape
        fits = rows is not None and (rows.shape == shape or rows.shape[:1] == shape[:1] != (1,))
        return rows if fits else output
    if isinstance(output, np.ndarray) and isinstance(wanted, list | tuple):
        rows = _joined(wanted)
        if rows is not None and rows.shape == output.shape:
            held = dict(enumerate(map(np.asarray, output)))
    if held is None or places is None:
        return output
    return {place: _alike(part, places.get(place)) for place, part in held.items()}


def _joined(rows: Any) -> Array | None:
    """Rows of numbers as one array; None where they are of several lengths, or no numbers."""
    try:
        whole = np.asarray(rows)
    except ValueError:
        return None
    return whole if whole.dtype.kind in "fiub" else None


def _allowing(
    answer: Answer, expected: Expected | None, own: Expected | None, precision: Precision = _DOUBLE
) -> Expected:
    """What a reference gave, its own rounding errors allowed beside the candidate's."""
    if expected is not None:
        answer = replace(answer, output=_fitted(answer.output, expected))
    values = leaves(answer.output)
    named = expected is not None and list(values) == list(expected.bounds)
    if expected is None or own is None or not named or _shapes(expected) != _shapes(own):
        # Nothing is known but the numbers' size.
        coarse = max(precision, answer.precision, key=lambda each: each.roundoff)
        bounds = {name: nominal(value, coarse) for name, value in values.items()}
        return Expected(answer.output, bounds, ESTIMATED, "the reference")
    both = [a + b for a, b in zip(expected.bounds.values(), own.bounds.values(), strict=True)]
    basis = ROUNDING if expected.basis == ROUNDING else ESTIMATED
    bounds = dict(zip(values, both, strict=True))
    return Expected(answer.output, bounds, basis, "the reference")


def _shapes(expected: Expected) -> list[tuple[int, ...]]:
    return [bound.shape for bound in expected.bounds.values()]


def nominal(value: Array, precision: Precision) -> Array:
    """What is allowed where nothing is known but the numbers: 64 u of the largest."""
    size = np.max(np.abs(value), initial=0.0, where=np.isfinite(value))
    return np.full(value.shape, 64 * precision.roundoff * float(size))


def _pair(model: Exact, other: Exact) -> tuple[str, dict[str, str]]:
    """Where the layers of the two first differ, in words, or the places of `other` by ours."""
    ours, theirs = _called(model), _called(other)
    if ours.keys() == theirs.keys():
        theirs = {path: theirs[path] for path in ours}  # in whatever order they were registered
    ends = ("", "nothing more")
    for (path, expected), (_, got) in zip_longest(ours.items(), theirs.items(), fillvalue=ends):
        if expected != got:
            where = "the model ends"
            if expected != ends[1]:
                where = f"the model's layer {model.places[path].label!r} is {expected}"
            return f"where {where}, the reference has {got}", {}
    return "", dict(zip(ours, theirs, strict=True))


def _called(exact: Exact) -> dict[str, str]:
    """By the path of each place, what two that are paired have in common: formula and shapes."""
    found = {}
    for path, place in exact.places.items():
        if place.layer is None:
            found[path] = "a module with its own forward"
        elif path in exact.arguments:
            arguments = exact.arguments[path].items()
            shapes = [f"{name}={getattr(value, 'shape', value)}" for name, value in arguments]
            found[path] = f"{place.layer.name}({', '.join(shapes)})"
    return found
