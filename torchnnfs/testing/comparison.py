"""Run the candidates, judge their traces, and give the verdict."""

from __future__ import annotations

import json
import math
import random
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchnnfs.testing import golden, html, plot, report
from torchnnfs.testing.candidates import DTYPES, Candidate, choose, dtype_name, resolved
from torchnnfs.testing.controls import Control, try_controls
from torchnnfs.testing.environment import describe, precision_notes
from torchnnfs.testing.files import write_whole
from torchnnfs.testing.gradients import judge_gradients
from torchnnfs.testing.inputs import check_finite, check_input, check_model
from torchnnfs.testing.judge import Row, judge, judge_formula
from torchnnfs.testing.models import leaves, own_dtype, to_numpy, walk
from torchnnfs.testing.outcome import Outcome
from torchnnfs.testing.problem import Problem
from torchnnfs.testing.reference import Reference, read
from torchnnfs.testing.traces import Trace


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Outcome):
    """The outcome of `compare`: what it found, and the reports of it.

    Attributes:
        traces: all that the candidates showed.
        setting: what the run depends on: input and parameters.
    """

    traces: tuple[Trace, ...] = field(repr=False)
    setting: golden.Setting = field(repr=False)

    @property
    def verdict(self) -> str:
        """The outcome in one sentence."""
        return report.verdict(self)

    def to_json(self) -> str:
        """Everything but the arrays as JSON; infinity and NaN are "Infinity" and "NaN" there."""
        first = self.first_divergence
        document = {
            "ok": self.ok,
            "verdict": self.verdict,
            "first_divergence": None if first is None else self.rows.index(first),
            "unjudged": self.unjudged,
            "environment": self.environment,
            "notes": self.notes,
            "rows": [{**asdict(row), "ok": row.ok} for row in self.rows],
            "controls": [asdict(control) for control in self.controls],
        }
        return json.dumps(_json_safe(document), indent=2, allow_nan=False)

    def to_markdown(self) -> str:
        """The report for a pull request: the verdict, the table, the remarks."""
        return report.as_markdown(self)

    def save_html(self, path: str) -> None:
        """Write the report as one page that needs nothing else.

        Raises:
            ValueError: the file cannot be written.
        """
        write_whole(path, html.page(self).encode())

    def save_plot(self, path: str) -> None:
        """Write the verdict as a picture, ``.png`` or ``.svg``.

        Raises:
            MissingExtraError: without matplotlib.
            ValueError: another kind of file, or one that cannot be written.
        """
        write_whole(path, plot.render(self, plot.kind_of(path)))

    def save_golden(self, path: str) -> None:
        """Write what the candidates gave to an ``.npz`` file for `compare` on another machine.

        Raises:
            ValueError: the file cannot be written.
        """
        golden.save(path, self.setting, self.traces, self.environment)

    def __repr__(self) -> str:
        return f"<Comparison: {self.verdict}>"

    def __str__(self) -> str:
        return report.as_text(self)

    def _repr_html_(self) -> str:
        return html.fragment(self)


def _json_safe(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json_safe(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def compare(
    model: nn.Module,
    input: Tensor | tuple[Any, ...] | dict[str, Any],
    *,
    reference: Any = None,
    candidates: Sequence[str | Candidate] | None = None,
    golden_file: str | None = None,
    backward: bool = False,
    target: Tensor | None = None,
    controls: bool = True,
    progress: Callable[[str], object] | None = None,
) -> Comparison:
    """Judge, layer by layer, whether `model` computes what NumPy, or a reference, computes.

    First every candidate computes the model and leaves a trace: what went into and out of each
    layer. Then each trace is judged against the exact result, in float64 on the same parameters and
    input as the candidate's dtype stores them. An error is measured against what rounding can
    explain (`torchnnfs.testing.layers`): once with each layer *isolated*, on the input it really
    got, and once *chained*, from the model's input on. The model itself is not changed.

    A layer whose type is known is judged against its formula. A module with a forward of its own is
    judged against its own float64 run: that shows faults of rounding, not a wrong formula, so
    `Comparison.unjudged` names it unless a reference is given. Every candidate runs twice.

    Args:
        model: any module whose output is a tensor, or tensors in tuples, lists and dictionaries.
            Known are `nn.Linear`, `Conv1d`, `Conv2d`, `Embedding`, `ReLU`, `LeakyReLU`, `Tanh`,
            `Sigmoid`, `GELU`, `Softmax`, `LogSoftmax`, `LayerNorm`, `BatchNorm1d` and `2d`,
            `MaxPool2d`, `AvgPool2d`, `Flatten`, `Identity`, `Dropout` (the last and batch
            normalisation in eval mode), what derives from them, and types that
            `torchnnfs.testing.register` was told of.
        input: the model's input: a tensor, a tuple of its arguments, or a dictionary of its keyword
            arguments. Floating-point numbers are finite.
        reference: what to compare with instead of the model itself. A module: its layers and
            parameters, or, if it has other layers, its output. A function of arrays, or an object
            whose ``forward`` returns its result or sets ``output``: its output for the same input.
            A list of such objects: they are run in order; as many as layers judge these as well. An
            array: the output, recorded elsewhere. A mapping from paths in the model ("" is the
            output) to arrays, functions or objects.
        candidates: names, which stand for every device of this machine, or `Candidate` objects;
            default "eager" in the model's own dtype, and "numpy" where that is float32.
        golden_file: a file of `Comparison.save_golden`, made from the same model and input, whose
            traces are judged as well.
        backward: whether to judge the gradients of torch eager as well, of the cross-entropy of
            `target` averaged over the batch: to the output, and to the input and parameters of
            each layer.
        target: (N,) classes, for `backward`.
        controls: whether to show that broken copies of the model are rejected.
        progress: called with a few words before each step.

    Raises:
        MissingExtraError: a candidate whose packages are not installed.
        TypeError: a `model` that is no module; an `input` that is no tensor; a `reference` that
            neither computes nor holds numbers.
        ValueError: an `input` that is empty, not finite or on the meta device; parameters that are
            not finite or on the meta device; layers in training mode that depend on chance; a
            reference that cannot compute; an unknown candidate; `backward` without a fitting
            `target`, or with a reference whose layers cannot be paired.

    Example:
        >>> import torch
        >>> from torchnnfs import classifier, compare, spiral
        >>> comparison = compare(classifier(2, 3, 3), spiral()[0], candidates=["eager"])
        >>> comparison.ok, comparison.first_divergence, comparison.unjudged
        (True, None, ())
    """
    check_model("model", model)
    check_input(input)
    if target is not None and not isinstance(target, Tensor):
        target = torch.as_tensor(np.asarray(target))
    if isinstance(reference, nn.Module):
        check_model("reference", reference)
    trusted = read(reference, model, walk(model))
    own = own_dtype(model, input)
    chosen = [resolved(each, own) for each in _expand(candidates, own)]
    step = progress or (lambda words: None)
    # A dtype may overflow: that is judged, and no reason to warn.
    with np.errstate(all="ignore"), _untouched_chance():
        return _compare(
            model, input, trusted, chosen, own, golden_file, backward, target, controls, step
        )


def _compare(
    model: nn.Module,
    input: Any,
    reference: Reference,
    chosen: list[Candidate],
    own: torch.dtype,
    golden_file: str | None,
    backward: bool,
    target: Tensor | None,
    controls: bool,
    progress: Callable[[str], object],
) -> Comparison:
    # Phase 1: traces.
    traces: list[Trace] = []
    problems: dict[str, Problem] = {}
    for candidate in chosen:
        progress(f"{candidate.name} on {candidate.device} in {candidate.dtype}")
        assert candidate.dtype is not None
        check_finite(model, "model", input, candidate.dtype)
        if reference.module is not None:
            check_finite(reference.module, "reference", input, candidate.dtype)
        name = dtype_name(candidate.dtype)
        if name not in problems:
            problems[name] = Problem(model, input, reference, candidate.dtype)
        traces.append(candidate.run(model, input, [*reference.sources, *reference.recorded]))
    here = golden.setting(model, input)
    recorded = golden.load(golden_file, here) if golden_file else []
    # Phase 2: rows.
    rows: list[Row] = []
    ran = dict(zip(map(id, traces), chosen, strict=True))
    for trace in [*traces, *recorded]:
        progress(f"judging {trace.name} on {trace.device} in {trace.dtype}")
        if trace.dtype not in problems:
            problems[trace.dtype] = Problem(model, input, reference, DTYPES[trace.dtype])
        problem = problems[trace.dtype]
        found = judge(trace, problem)
        if not found:
            raise ValueError(_nothing_to_judge(trace, problem))
        rows += found
        if backward and trace.name == "eager":
            rows += judge_gradients(ran[id(trace)], model, input, target, problem)
    if dtype_name(own) not in problems and reference.judges_output:
        problems[dtype_name(own)] = Problem(model, input, reference, own)
    rows += [row for each in problems.values() if each.is_own for row in judge_formula(each)]
    first = problems[traces[0].dtype]
    tried: tuple[Control, ...] = ()
    notes = [*reference.notes, *_notes(first, traces)]
    if controls and not all(row.ok for row in rows):
        notes.append("Broken copies were not tried: the model itself differs.")
    elif controls:
        progress("broken copies")
        eager = next((each for each in chosen if each.name == "eager"), chosen[0])
        alone = first
        if reference != Reference() or eager is not chosen[0]:
            assert eager.dtype is not None
            alone = Problem(model, input, Reference(), eager.dtype)
        tried = try_controls(model, input, Candidate("eager", eager.device, eager.dtype), alone)
    notes += [
        f"{row.dtype} may overflow or cancel out in layer {row.label}: {row.unbounded} elements of "
        f"{row.candidate} are not judged."
        for row in rows
        if row.unbounded
    ]
    notes += precision_notes([(row.device, row.dtype, row.ok) for row in rows])
    return Comparison(
        rows=tuple(rows),
        unjudged=first.unjudged + (first.unjudged_gradients if backward else ()),
        controls=tried,
        environment=describe(str(each.device) for each in chosen),
        notes=tuple(notes),
        input=to_numpy(next(iter(leaves(input).values()))),
        output=next(iter(leaves(traces[0].output).values())),
        traces=tuple(traces),
        setting=here,
    )


def assert_agrees(
    model: nn.Module, input: Tensor | tuple[Any, ...] | dict[str, Any], **keywords: Any
) -> None:
    """`compare` with the same arguments, for test suites; without controls unless asked for.

    Warns, as a `UserWarning`, of parts of the model that nothing independent judged.

    Raises:
        AssertionError: with the verdict and the whole table, when a layer strays further than
            rounding explains.

    Example:
        >>> from torchnnfs import classifier, spiral
        >>> assert_agrees(classifier(2, 3, 3), spiral()[0])
    """
    __tracebackhide__ = True  # pytest then shows the line of the test
    comparison = compare(model, input, **{"controls": False, **keywords})
    if not comparison.ok:
        raise AssertionError(f"{comparison.verdict}\n\n{comparison}")
    if comparison.unjudged:
        warnings.warn(comparison.verdict, UserWarning, stacklevel=2)


def _expand(candidates: Sequence[str | Candidate] | None, own: torch.dtype) -> list[Candidate]:
    if candidates is None:
        return choose(["eager", "numpy"] if own == torch.float32 else ["eager"])
    if isinstance(candidates, str) or not candidates:
        raise ValueError(f"compare expects a list of candidates, got {candidates!r}")
    expanded: list[Candidate] = []
    for candidate in candidates:
        expanded += [candidate] if isinstance(candidate, Candidate) else choose([candidate])
    return expanded


@contextmanager
def _untouched_chance() -> Any:
    """Leave the global random streams where they were; a model or a library may draw from them."""
    state, pythons = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        np.random.set_state(state)
        random.setstate(pythons)


def _nothing_to_judge(trace: Trace, problem: Problem) -> str:
    reasons = "; ".join(problem.exact.failed.values()) or "it shows nothing"
    return (
        f"compare finds nothing to judge {trace.name} by: the model cannot run in float64 "
        f"({reasons}), so it needs a reference for its output"
    )


def _notes(problem: Problem, traces: Sequence[Trace]) -> list[str]:
    """What the rows do not say: what was paired, what was not called, NumPy's exp."""
    notes = []
    if problem.mismatch:
        notes.append(
            f"The reference judges the output alone: {problem.mismatch}. The layers are judged by "
            "their own parameters."
        )
    for path, reason in problem.exact.failed.items():
        notes.append(f"{path or 'The model'} cannot run in float64: {reason}.")
    shown = [trace for trace in traces if trace.calls]
    called = {call.path for trace in shown for call in trace.calls}
    uncalled = [path for path in problem.model.places if path not in called]
    if shown and uncalled:
        notes.append(f"Never called, so not judged: {', '.join(uncalled)}.")
    for trace in traces:
        if trace.name == "numpy":
            notes += _simd_exp(trace)
    return notes


def _simd_exp(trace: Trace) -> list[str]:
    """Name NumPy's float32 exp where it, and not summing or dividing, costs the last bits."""
    for call in trace.calls:
        if "softmax" not in call.kind.lower() or not np.isfinite(call.input).all():
            continue
        x = call.input.astype(np.float32)
        with np.errstate(all="ignore"):
            shifted = x - x.max(axis=-1, keepdims=True)
            right = np.exp(shifted.astype(np.float64)).astype(np.float32)
            wrong = np.count_nonzero(np.exp(shifted) != right)
        if wrong:
            return [
                f"NumPy's float32 exp, in vector instructions, is not correctly rounded for "
                f"{wrong} of {x.size} numbers in layer {call.path}; "
                "NPY_DISABLE_CPU_FEATURES=X86_V3 turns these off."
            ]
    return []
