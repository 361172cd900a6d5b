"""One comparison, batch by batch, in one process or in several."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchnnfs.testing import golden
from torchnnfs.testing.candidates import DTYPES, Candidate, choose, dtype_name, resolved
from torchnnfs.testing.controls import Control, try_controls
from torchnnfs.testing.environment import describe, precision_notes
from torchnnfs.testing.exact import same_chance
from torchnnfs.testing.gradients import judge_gradients
from torchnnfs.testing.inputs import check_finite, check_input
from torchnnfs.testing.judge import Row, find, find_formula, rows_in, rows_of
from torchnnfs.testing.merge import Finding, Sample, Seen, Whole
from torchnnfs.testing.models import (
    borrowed,
    call,
    cast,
    convert,
    leaves,
    own_dtype,
    to_numpy,
)
from torchnnfs.testing.outcome import Outcome
from torchnnfs.testing.precision import PRECISIONS
from torchnnfs.testing.problem import Problem, nominal
from torchnnfs.testing.reference import Reference
from torchnnfs.testing.traces import Trace

#: Rows of the input and the output that are kept of many batches, to be shown.
_SHOWN = 30_000


class _Batch:
    """Some rows of the whole, from `start` on, and what is expected of them in each dtype."""

    def __init__(self, model: nn.Module, input: Any, reference: Reference, start: int) -> None:
        self.model, self.input, self.reference, self.start = model, input, reference, start
        self.problems: dict[str, Problem] = {}

    def problem(self, dtype: str) -> Problem:
        if dtype not in self.problems:
            check_finite(self.model, "model", self.input, DTYPES[dtype])
            if self.reference.module is not None:
                check_finite(self.reference.module, "reference", self.input, DTYPES[dtype])
            self.problems[dtype] = Problem(self.model, self.input, self.reference, DTYPES[dtype])
        return self.problems[dtype]

    def seen(self, trace: Trace) -> Seen:
        """What is found of a trace."""
        problem = self.problem(trace.dtype)
        found = find(trace, problem, self.start)
        if all(each.twice for each in found):
            raise ValueError(_nothing_to_judge(trace, problem))
        seen = _seen(trace, found)
        seen.called = {call.path for call in trace.calls}
        if trace.name == "numpy":
            _count_inexact(trace, seen)
        return seen


class Run:
    """One comparison, batch by batch.

    Attributes:
        traces: all that the candidates showed, where there is one batch that is the whole.
        setting: what the run depends on, there.
    """

    def __init__(
        self,
        model: nn.Module,
        reference: Reference,
        candidates: Sequence[str | Candidate] | None,
        progress: Callable[[str], object] | None,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.model, self.reference, self.candidates = model, reference, candidates
        self.progress = progress or (lambda words: None)
        self.group = group
        self.rank, self.processes = (group.rank(), group.size()) if group else (0, 1)
        self.rows = self.batches = 0
        self.whole = Whole()
        self.traces: list[Trace] = []
        self.setting: golden.Setting | None = None

    def take(self, input: Any, keep: bool) -> None:
        """Judge a batch if it is this process's turn; with `keep`, the only one, keep traces."""
        check_input(input)
        batch = _Batch(self.model, input, self._reference(input, keep), self.rows)
        if not self.batches:
            self.first, self.own = batch, own_dtype(self.model, input)
            self.chosen = [resolved(each, self.own) for each in _expand(self.candidates, self.own)]
        if self.batches % self.processes == self.rank:
            self._judge(batch, keep)
        self.batches += 1
        self.rows += rows_in(input)

    def _reference(self, input: Any, keep: bool) -> Reference:
        """The reference, with the rows of its arrays that belong to the batch."""
        rows = slice(self.rows, self.rows + rows_in(input))
        if keep:
            return self.reference
        recorded = {
            path: replace(each, output=each.output[rows])
            for path, each in self.reference.recorded.items()
        }
        return replace(self.reference, recorded=recorded)

    def _judge(self, batch: _Batch, keep: bool) -> None:
        found = Whole()
        places = [*self.reference.sources, *self.reference.recorded]
        for number, candidate in enumerate(self.chosen):
            assert candidate.dtype is not None
            words = f"{candidate.name} on {candidate.device} in {dtype_name(candidate.dtype)}"
            self.progress(words)
            batch.problem(dtype_name(candidate.dtype))  # what cannot be judged need not be run
            trace = candidate.run(self.model, batch.input, places)
            self.progress(f"judging {words}")
            found.seen[number] = batch.seen(trace)
            if keep:
                self.traces.append(trace)
            if not number:
                most = rows_in(batch.input) if keep else _SHOWN
                given = to_numpy(next(iter(leaves(batch.input).values())))
                shown = next(iter(leaves(trace.output).values()))
                found.shown = Sample.of(most, batch.start, *map(np.atleast_1d, (given, shown)))
        if self.reference.judges_output:
            formula = find_formula(batch.problem(dtype_name(self.own)), batch.start)
            if formula is not None:
                found.seen[sys.maxsize] = _seen(*formula)
        self.whole.add(found)

    def finish(
        self, golden_file: str | None, backward: bool, target: Any, controls: bool
    ) -> Outcome:
        """Join what all processes found, and make rows of it."""
        if not self.batches:
            raise ValueError("compare expects at least one batch, got an empty iterable")
        if self.traces:
            self.setting = golden.setting(self.model, self.first.input)
        if golden_file is not None and self.setting is not None:
            recorded = golden.load(golden_file, self.setting)
            for number, trace in enumerate(recorded, len(self.chosen)):
                try:
                    self.whole.seen[number] = self.first.seen(trace)
                except Exception as error:
                    raise ValueError(f"{golden_file!r} is damaged: {error}") from error
        self._check_recorded()
        self._gather()
        rows: list[Row] = []
        for number, seen in sorted(self.whole.seen.items()):
            last = number == sys.maxsize
            problem = self.first.problem(dtype_name(self.own) if last else seen.trace.dtype)
            rows += rows_of(seen.trace, seen.findings.values(), problem)
            if backward and seen.trace.name == "eager":
                if target is not None and not isinstance(target, Tensor):
                    target = torch.as_tensor(np.asarray(target))
                candidate, input = self.chosen[number], self.first.input
                rows += judge_gradients(candidate, self.model, input, target, problem)
        problem = self.first.problem(self.whole.seen[0].trace.dtype)
        notes = [*self.reference.notes, *self._notes(problem)]
        tried: tuple[Control, ...] = ()
        if controls and not all(row.ok for row in rows):
            notes.append("Broken copies were not tried: the model itself differs.")
        elif controls:
            self.progress("broken copies")
            tried = self._controls(problem)
        notes += [
            f"{row.dtype} may overflow or cancel out in layer {row.label}: {row.unbounded} "
            f"elements of {row.candidate} are not judged."
            for row in rows
            if row.unbounded
        ]
        notes += precision_notes([(row.device, row.dtype, row.ok) for row in rows])
        environment = describe(str(each.device) for each in self.chosen)
        if self.group is not None:
            environment["processes"] = f"{self.processes}, which shared {self.batches} batches"
        assert self.whole.shown is not None
        input, output = self.whole.shown.arrays
        return Outcome(
            rows=tuple(rows),
            unjudged=problem.unjudged + (problem.unjudged_gradients if backward else ()),
            controls=tried,
            environment=environment,
            notes=tuple(notes),
            input=input,
            output=output,
        )

    def _check_recorded(self) -> None:
        for path, each in self.reference.recorded.items():
            if self.batches > 1 and len(each.output) != self.rows:
                raise ValueError(
                    f"compare expects the array {f'at {path!r}' if path else 'for the output'} to "
                    f"have a row for each row of the batches, {self.rows}, got {len(each.output)}"
                )

    def _gather(self) -> None:
        """What every process found, in every process."""
        if self.group is None:
            return
        found: list[Any] = [None] * self.processes
        try:
            dist.all_gather_object(found, self.whole, group=self.group)
        except RuntimeError as error:
            words = " ".join(str(error).split())[:200]
            raise RuntimeError(
                f"compare expects {self.processes} processes to the end, but one of them has "
                f"stopped: {words}"
            ) from error
        self.whole = Whole()
        for each in found:
            self.whole.add(each)

    def _controls(self, problem: Problem) -> tuple[Control, ...]:
        eager = next((each for each in self.chosen if each.name == "eager"), self.chosen[0])
        input = self.first.input
        if self.reference != Reference() or eager is not self.chosen[0]:
            assert eager.dtype is not None
            problem = Problem(self.model, input, Reference(), eager.dtype)
        candidate = Candidate("eager", eager.device, eager.dtype)
        return try_controls(self.model, input, candidate, problem)

    def _notes(self, problem: Problem) -> Iterator[str]:
        """What the rows do not say: what was paired, what was not called, NumPy's exp."""
        if problem.formula is not None and self.reference.module is None:
            allowed = max(np.max(each, initial=0.0) for each in problem.formula.bounds.values())
            yield (
                f"Against the reference, the model in float64 may be off by {allowed:.1g} in the "
                "output, as the rounding of its parameters to their dtype may explain."
            )
        if problem.mismatch:
            yield (
                f"The reference judges the output alone: {problem.mismatch}. The layers are judged "
                "by their own parameters."
            )
        for path, reason in problem.exact.failed.items():
            yield f"{path or 'The model'} cannot run in float64: {reason}."
        ran = [self.whole.seen[number] for number in range(len(self.chosen))]
        called = {path for seen in ran for path in seen.called}
        uncalled = [path for path in problem.model.places if path not in called]
        if called and uncalled:
            yield f"Never called, so not judged: {', '.join(uncalled)}."
        for seen in ran:
            for path, wrong in [(path, count) for path, count in seen.inexact.items() if count][:1]:
                yield (
                    "NumPy's float32 exp, in vector instructions, is not correctly rounded for "
                    f"{wrong} of {seen.sizes[path]} numbers in layer {path}; "
                    "NPY_DISABLE_CPU_FEATURES=X86_V3 turns these off."
                )
        if self.batches > 1:
            yield (
                f"{self.rows} rows in {self.batches} batches, each judged on its own; broken "
                "copies, where asked for, are tried on the first."
            )
            if _mixes_rows(self.model, self.first.input, self.own):
                yield (
                    "What comes out for a row depends on the other rows of its batch, or the first "
                    "axis does not count rows: other batches give other numbers."
                )


def _seen(trace: Trace, found: list[Finding]) -> Seen:
    bare = Trace(trace.name, trace.device, trace.dtype, (), None)
    return Seen(bare, {each.key: each for each in found})


def _mixes_rows(model: nn.Module, input: Any, dtype: torch.dtype) -> bool:
    """Whether one row more in a batch changes what comes out for the others."""
    rows = rows_in(input)
    more = convert(input, Tensor, lambda tensor: torch.cat([tensor, tensor[:1]]))
    with torch.no_grad(), borrowed(model, "cpu", dtype) as run:
        try:
            with same_chance():
                few = leaves(convert(call(run, cast(input, "cpu", dtype)), Tensor, to_numpy))
            with same_chance():
                many = leaves(convert(call(run, cast(more, "cpu", dtype)), Tensor, to_numpy))
        except (RuntimeError, ValueError, LookupError):
            return True
    allowed = {name: nominal(value, PRECISIONS[dtype_name(dtype)]) for name, value in few.items()}
    return any(
        many[name][:rows].shape != value.shape
        or bool((np.abs(many[name][:rows] - value) > allowed[name]).any())
        for name, value in few.items()
    )


def _expand(candidates: Sequence[str | Candidate] | None, own: torch.dtype) -> list[Candidate]:
    if candidates is None:
        return choose(["eager", "numpy"] if own == torch.float32 else ["eager"])
    if isinstance(candidates, str) or not candidates:
        raise ValueError(f"compare expects a list of candidates, got {candidates!r}")
    expanded: list[Candidate] = []
    for candidate in candidates:
        expanded += [candidate] if isinstance(candidate, Candidate) else choose([candidate])
    return expanded


def _nothing_to_judge(trace: Trace, problem: Problem) -> str:
    reasons = "; ".join(problem.exact.failed.values()) or "it shows nothing"
    return (
        f"compare finds nothing to judge {trace.name} by: the model cannot run in float64 "
        f"({reasons}), so it needs a reference for its output"
    )


def _count_inexact(trace: Trace, seen: Seen) -> None:
    """Where NumPy's float32 exp, and not summing or dividing, costs the last bits."""
    for each in trace.calls:
        if "softmax" not in each.kind.lower() or not np.isfinite(each.input).all():
            continue
        x = each.input.astype(np.float32)
        shifted = x - x.max(axis=-1, keepdims=True)
        right = np.exp(shifted.astype(np.float64)).astype(np.float32)
        seen.inexact[each.path] += int(np.count_nonzero(np.exp(shifted) != right))
        seen.sizes[each.path] += x.size
