"""One comparison, batch by batch, in one process or in several."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, reduce
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchnnfs.testing import golden
from torchnnfs.testing.candidates import DTYPES, KINDS, Candidate, choose, dtype_name
from torchnnfs.testing.controls import Control, try_controls
from torchnnfs.testing.environment import describe, precision_notes
from torchnnfs.testing.exact import same_chance
from torchnnfs.testing.gradients import judge_gradients
from torchnnfs.testing.inputs import check_finite, check_input
from torchnnfs.testing.judge import Row, find, find_formula, rows_of
from torchnnfs.testing.measure import measure
from torchnnfs.testing.merge import Finding, Sample, Seen, join
from torchnnfs.testing.models import own_dtype
from torchnnfs.testing.outcome import BLIND, Outcome
from torchnnfs.testing.precision import PRECISIONS, Array
from torchnnfs.testing.problem import Problem, nominal
from torchnnfs.testing.processes import stopped
from torchnnfs.testing.reference import Reference
from torchnnfs.testing.traces import Trace
from torchnnfs.testing.values import convert, leaves, pieces, rows_in, to_numpy, unread

#: Rows of the input and the output that are kept of many batches, to be shown.
_SHOWN = 30_000


@dataclass
class Run:
    """One comparison, batch by batch."""

    model: nn.Module
    reference: Reference
    candidates: Sequence[str | Candidate] | None
    backward: bool
    target: Any
    progress: Callable[[str], object]
    group: dist.ProcessGroup | None
    one: bool  # whether the first batch is the whole: then traces are kept
    rows: int = 0
    batches: int = 0
    digest: int = 0
    whole: dict[int, Seen] = field(default_factory=dict)
    traces: list[Trace] = field(default_factory=list)
    setting: dict[str, Array] | None = None
    left_out: str = ""

    def take(self, input: Any, target: Any) -> None:
        """Judge a batch if it is this process's turn."""
        check_input(input)
        dtypes = {name: each.dtype for name, each in leaves(input).items()}
        rows, reference = slice(self.rows, self.rows + rows_in(input)), self.reference
        if not self.one:
            recorded = {
                path: replace(
                    each, output=convert(each.output, np.ndarray, lambda a: _part(a, rows))
                )
                for path, each in reference.recorded.items()
            }
            reference = replace(reference, recorded=recorded)
        problems = _problems(self.model, input, reference, self.rows)
        if not self.batches:
            self.input, self.first, self.dtypes = input, problems, dtypes
            self.own = own_dtype(self.model, input)
            self.chosen = _expand(self.candidates, self.own)
            if not any(map(self._fits, self.chosen)):
                self.chosen.append(Candidate("eager", "cpu", self.own))
        if dtypes != self.dtypes:
            raise ValueError(
                f"compare expects every batch to be like the first, {_listed(self.dtypes)}, got "
                f"{_listed(dtypes)} in batch {self.batches}, from row {self.rows} on; convert it "
                "with .to(dtype)"
            )
        if self.group is None or self.batches % self.group.size() == self.group.rank():
            given = self.target if self.one else _part(self.target, rows)
            self._judge(input, problems, target if given is None else given)
        if self.group is not None:
            told = input if self.batches else (input, *self.model.parameters())
            self.digest = _digest(told, self.digest)
        self.batches += 1
        self.rows = rows.stop

    def _fits(self, candidate: Candidate) -> bool:
        """Whether all that the reference gives, and each gradient, can be compared with it."""
        places = {*self.reference.sources, *self.reference.recorded}
        shows_layers = KINDS[candidate.name].build is None or places <= {""}
        compared = not places or (shows_layers and candidate.dtype == self.own)
        return compared and (candidate.name == "eager" or not self.backward)

    def _judge(self, input: Any, problems: _Problems, target: Any) -> None:
        found: dict[int, Seen] = {}
        places = [*self.reference.sources, *self.reference.recorded]
        for number, candidate in enumerate(self.chosen):
            dtype = dtype_name(candidate.dtype or self.own)
            words = f"{candidate.name} on {candidate.device} in {dtype}"
            self.progress(words)
            problem = problems(dtype)  # what it refuses need not be run
            try:
                trace = candidate.run(self.model, input, places)
            except ValueError as error:
                if self.candidates is not None or candidate.name != "numpy":
                    raise
                self.left_out = f"The candidate numpy is left out: {error}."  # nobody asked for it
                continue
            self.progress(f"judging {words}")
            seen = found[number] = _judged(trace, problem)
            seen.counts.update(("unread", words) for words in unread(trace.output))
            if self.backward and candidate.name == "eager":
                more = judge_gradients(candidate, target, problem)
                seen.findings |= {each.key: each for each in more}
            if self.one:
                self.traces.append(trace)
            if not number:
                most = problem.rows if self.one else _SHOWN
                first = to_numpy(next(iter(leaves(input).values())))
                output = next(iter(leaves(trace.output).values()))
                seen.shown = Sample.of(most, problem.start, *map(np.atleast_1d, (first, output)))
        if self.reference.judges_output:
            formula = find_formula(problems(dtype_name(self.own)))
            if formula is not None:
                found[sys.maxsize] = _seen(*formula)
        self.whole = join(self.whole, found)

    def finish(self, golden_file: str | None, controls: bool) -> Outcome:
        """Join what all processes found, and make rows of it."""
        if not self.batches:
            raise ValueError("compare expects at least one batch, got an empty iterable")
        if self.traces:
            self.setting = golden.setting(self.model, self.input)
        if self.setting is not None and golden_file is not None:
            recorded = golden.load(golden_file, self.setting)
            for number, trace in enumerate(recorded, len(self.chosen)):
                try:
                    self.whole[number] = _judged(trace, self.first(trace.dtype))
                except Exception as error:
                    raise ValueError(f"{golden_file!r} is damaged: {error}") from error
        if not self.one:
            self._check_lengths()
        if self.group is not None:
            self._gather(self.group)
        rows: list[Row] = []
        for number, seen in sorted(self.whole.items()):
            last = number == sys.maxsize
            problem = self.first(dtype_name(self.own) if last else seen.trace.dtype)
            rows += rows_of(seen.trace, seen.findings.values(), problem)
        problem = self.first(self.whole[0].trace.dtype)
        notes = [*self.reference.notes, *self._notes(problem)]
        tried: tuple[Control, ...] = ()
        if controls and not all(row.ok for row in rows):
            notes.append("Broken copies were not tried: the model itself differs.")
        elif controls:
            self.progress("broken copies")
            tried = self._controls()
        notes += [
            f"{row.dtype} may overflow or cancel out in layer {row.label}: {row.unbounded} "
            f"elements of {row.candidate} are not judged."
            for row in rows
            if row.unbounded
        ]
        notes += precision_notes([(row.device, row.dtype, row.ok) for row in rows])
        environment = describe(str(each.device) for each in self.chosen)
        if self.group is not None:
            environment["processes"] = f"{self.group.size()}, which shared {self.batches} batches"
        shown = self.whole[0].shown
        assert shown is not None
        input, output = shown.arrays
        blind = any(each.blind for seen in self.whole.values() for each in seen.findings.values())
        unjudged = problem.unjudged + (problem.unjudged_gradients if self.backward else ())
        named = [
            each for seen in self.whole.values() for word, each in seen.counts if word == "unread"
        ]
        return Outcome(
            rows=tuple(rows),
            unjudged=(*unjudged, *dict.fromkeys(named), *[BLIND] * blind),
            controls=tried,
            environment=environment,
            notes=tuple(notes),
            input=input,
            output=output,
        )

    def _check_lengths(self) -> None:
        """Arrays for all batches together have as many rows as these."""
        named = {
            f"the array {f'at {path!r}' if path else 'for the output'}{name}": array
            for path, each in self.reference.recorded.items()
            for name, array in leaves(each.output).items()
        }
        if self.backward and self.target is not None:
            named["the target"] = self.target
        for name, array in named.items():
            if np.shape(array)[:1] != (self.rows,):
                raise ValueError(
                    f"compare expects {name} to have a row for each row of the batches, "
                    f"{self.rows}, got one of shape {tuple(np.shape(array))}"
                )

    def _gather(self, group: dist.ProcessGroup) -> None:
        """What every process found, in every process."""
        found: list[Any] = [None] * group.size()
        same = self.batches, self.rows, self.digest
        try:
            dist.all_gather_object(found, (same, self.whole), group=group)
        except RuntimeError as error:
            raise RuntimeError(stopped(group.size(), error)) from error
        if len({each for each, _ in found}) > 1:
            told = "; ".join(f"{rows} rows in {count} batches" for (count, rows, _), _ in found)
            raise ValueError(
                f"compare expects all processes to get the same model and batches, got others: "
                f"{told}; it shares them out itself, so leave out a DistributedSampler"
            )
        self.whole = reduce(join, (whole for _, whole in found))

    def _controls(self) -> tuple[Control, ...]:
        eager = next((each for each in self.chosen if each.name == "eager"), self.chosen[0])
        problems = self.first
        if self.reference != Reference():  # a broken copy is judged by the model itself
            problems = _problems(self.model, self.input, Reference(), 0)
        problem = problems(dtype_name(eager.dtype or self.own))
        return try_controls(replace(eager, name="eager"), problem)

    def _notes(self, problem: Problem) -> Iterator[str]:
        """What the rows do not say: what was paired, what was not called, NumPy's exp."""
        findings = [each for seen in self.whole.values() for each in seen.findings.values()]
        allowed = max(each.allowed for each in findings)
        if allowed and self.reference.module is None:
            yield (
                f"Against the reference, an error up to {allowed:.1g} in the output is not "
                "noticed: the rounding of the parameters, or of the reference, may explain it."
            )
        if problem.mismatch:
            yield (
                f"The reference judges the output alone: {problem.mismatch}. The layers are judged "
                "by their own parameters."
            )
        for path, reason in problem.exact.failed.items():
            yield f"{path or 'The model'} cannot run in float64: {reason}."
        if self.left_out:
            yield self.left_out
        ran = [seen for number, seen in self.whole.items() if number < len(self.chosen)]
        called = {path for seen in ran for word, path in seen.counts if word == "called"}
        expected = [*problem.model.places, *self.reference.sources, *self.reference.recorded]
        uncalled = [path for path in dict.fromkeys(expected) if path and path not in called]
        if called and uncalled:
            yield f"Never called, so not judged: {', '.join(uncalled)}."
        for seen in ran:
            # The C library's exp, which NumPy takes elsewhere, is so for one number in a thousand.
            inexact = {
                path: seen.counts[word, path] for word, path in seen.counts if word == "inexact"
            }
            many = [path for path, n in inexact.items() if n > seen.counts["numbers", path] / 100]
            for path in many[:1]:
                yield (
                    "NumPy's float32 exp, in vector instructions, is not correctly rounded for "
                    f"{inexact[path]} of {seen.counts['numbers', path]} numbers in layer {path}; "
                    'NPY_DISABLE_CPU_FEATURES="X86_V3 AVX2 AVX512F" turns these off.'
                )
        if self.batches > 1:
            yield (
                f"{self.rows} rows in {self.batches} batches, each judged on its own; broken "
                "copies, where asked for, are tried on the first."
            )
            if self.backward:
                yield "Gradients are of the mean loss of each batch."
            if _mixes_rows(self.model, self.input, self.own):
                yield (
                    "What comes out for a row depends on the other rows of its batch, or the first "
                    "axis does not count rows: other batches give other numbers."
                )


def _listed(dtypes: dict[str, torch.dtype]) -> str:
    return ", ".join(f"input{name} in {dtype}" for name, dtype in dtypes.items())


def _part(values: Any, rows: slice) -> Any:
    """The rows of an array; a number, which has none, as it is."""
    return values[rows] if np.ndim(values) else values


def _digest(value: Any, before: int) -> int:
    """A number that tells tensors with other bits apart."""
    for tensor in chain.from_iterable(map(pieces, leaves(value).values())):
        flat = tensor.cpu().reshape(-1).view(torch.uint8)
        before = zlib.crc32(flat.numpy().data, before)
    return before


#: What is expected of a batch, by the name of a dtype.
_Problems = Callable[[str], Problem]


def _problems(model: nn.Module, input: Any, reference: Reference, start: int) -> _Problems:
    @cache
    def problem(dtype: str) -> Problem:
        for role, module in (("model", model), ("reference", reference.module)):
            if module is not None:
                check_finite(module, role, input, DTYPES[dtype])
        return Problem(model, input, reference, DTYPES[dtype], start)

    return problem


def _judged(trace: Trace, problem: Problem) -> Seen:
    """What is found of a trace."""
    found = find(trace, problem)
    if all(each.twice for each in found):
        reasons = "; ".join(problem.exact.failed.values()) or "it shows nothing"
        raise ValueError(
            f"compare finds nothing to judge {trace.name} by: the model cannot run in float64 "
            f"({reasons}), so it needs a reference for its output"
        )
    seen = _seen(trace, found)
    seen.counts.update(("called", call.path) for call in trace.calls)
    if trace.name == "numpy":
        _count_inexact(trace, seen)
    return seen


def _seen(trace: Trace, found: list[Finding]) -> Seen:
    bare = replace(trace, calls=(), output=None, again=None)
    return Seen(bare, {each.key: each for each in found})


def _mixes_rows(model: nn.Module, input: Any, dtype: torch.dtype) -> bool:
    """Whether one row more in a batch changes what comes out for the others."""
    rows, precision = rows_in(input), PRECISIONS[dtype_name(dtype)]
    eager, outputs = Candidate("eager", "cpu", dtype), []
    try:
        for given in (input, convert(input, Tensor, lambda x: torch.cat([x, x[:1]]))):
            with same_chance():
                outputs.append(leaves(eager.run(model, given, broken={}).output))
    except (RuntimeError, ValueError, LookupError):
        return True
    few, many = outputs
    return few.keys() != many.keys() or any(
        value.shape[:1] != (rows,)
        or measure(many[name][:rows], value, nominal(value, precision), precision).ratio > 1
        for name, value in few.items()
    )


def _expand(candidates: Sequence[str | Candidate] | None, own: torch.dtype) -> list[Candidate]:
    if candidates is None:
        candidates = ["eager", "numpy"] if own == torch.float32 else ["eager"]
    if isinstance(candidates, str) or not candidates:
        raise ValueError(f"compare expects a list of candidates, got {candidates!r}")
    found: list[Candidate] = []
    for each in candidates:
        for candidate in [each] if isinstance(each, Candidate) else choose([each]):
            (only, *others) = KINDS[candidate.name].dtypes
            dtype = candidate.dtype or (own if others else DTYPES[only])
            found.append(replace(candidate, dtype=dtype))
    return found


def _count_inexact(trace: Trace, seen: Seen) -> None:
    """Where NumPy's float32 exp, and not summing or dividing, costs the last bits."""
    for each in trace.calls:
        if "softmax" not in each.kind.lower() or not np.isfinite(each.input).all():
            continue
        x = each.input.astype(np.float32)
        shifted = x - x.max(axis=-1, keepdims=True)
        right = np.exp(shifted.astype(np.float64)).astype(np.float32)
        if wrong := int(np.count_nonzero(np.exp(shifted) != right)):
            seen.counts["inexact", each.path] += wrong
        seen.counts["numbers", each.path] += x.size
