"""Run the candidates, measure every layer against NumPy in float64, and give the verdict."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchnnfs.testing import golden, html, report
from torchnnfs.testing.candidates import KINDS, Candidate, Trace, choose
from torchnnfs.testing.controls import BREAKS, UNSHIFTED, Control, NotHereError, find_last
from torchnnfs.testing.environment import describe, precision_notes
from torchnnfs.testing.golden import Recorded
from torchnnfs.testing.gradients import gradients
from torchnnfs.testing.inputs import check_finite, check_input, check_model
from torchnnfs.testing.measure import Measured, Worst, measure
from torchnnfs.testing.problem import FACTORED, PROVEN, Problem, carried, pose
from torchnnfs.testing.reference import Array
from torchnnfs.testing.twins import find_layers, find_twin, is_chain, to_numpy


@dataclass(frozen=True)
class Row:
    """One layer of one candidate, measured.

    Attributes:
        candidate: its name.
        device: where it computed.
        dtype: what it computed in.
        layer: path of the layer in the model, with the number of the call if there are several;
            "(output)" for the whole of a model that is no plain chain.
        kind: type of the layer.
        max_abs: largest absolute error: of the layer on the input it really got, or, where the
            candidate does not show its layers, from the model's input on.
        max_ulp: the same in units in the last place of `dtype`; 0.5 at most is correctly rounded.
        bit_equal: fraction of elements that are the exact result correctly rounded.
        isolated_ratio: largest error over its bound, of the layer on the input it really got; None
            where the candidate does not show it.
        chained_ratio: the same from the model's input on, the bound carried along; None where the
            model is no plain chain.
        chained_ulp: largest error in units in the last place, from the model's input on.
        bound_ratio: the larger of the two ratios.
        basis: what the bound is: "rounding" (proven), "64 u" (of the largest output) or "sampled".
        worst: the element behind `bound_ratio`.
        ulps: number of elements with errors in ULP up to each of `measure.ULP_EDGES`.
        unbounded: number of elements that could not be judged, since the dtype may overflow.
    """

    candidate: str
    device: str
    dtype: str
    layer: str
    kind: str
    max_abs: float
    max_ulp: float
    bit_equal: float
    isolated_ratio: float | None
    chained_ratio: float | None
    chained_ulp: float | None
    bound_ratio: float
    basis: str
    worst: Worst
    ulps: tuple[int, ...]
    unbounded: int

    @property
    def ok(self) -> bool:
        """Whether no error is larger than its bound."""
        return self.bound_ratio <= 1

    @property
    def gradient(self) -> bool:
        """Whether the row is about a gradient and not about an output."""
        return "dL/" in self.kind


@dataclass(frozen=True)
class Comparison:
    """The outcome of `compare`.

    Attributes:
        rows: one `Row` for each candidate and call of a layer, in order.
        controls: what became of deliberately broken twins of the model.
        environment: versions, devices and settings that the numbers depend on.
        notes: what a reader has to know beside the rows, such as what was not judged.
        input: the model's input.
        output: what the first candidate gave for it.
        traces: each candidate with all that it showed.
        model: a copy of the model, as it was.
    """

    rows: tuple[Row, ...]
    controls: tuple[Control, ...]
    environment: dict[str, str]
    notes: tuple[str, ...]
    input: Array = field(repr=False)
    output: Array = field(repr=False)
    traces: tuple[tuple[Candidate | Recorded, Trace], ...] = field(repr=False)
    model: nn.Module = field(repr=False)

    @property
    def ok(self) -> bool:
        """Whether every layer of every candidate is within its bounds."""
        return all(row.ok for row in self.rows)

    @property
    def proves_little(self) -> bool:
        """Whether the controls say so: one passed as correct, or none could be told apart."""
        outcomes = [control.outcome for control in self.controls]
        return bool(outcomes) and ("passed" in outcomes or "rejected" not in outcomes)

    @property
    def first_divergence(self) -> Row | None:
        """The first row out of bounds, in order of candidates and layers."""
        return next((row for row in self.rows if not row.ok), None)

    def to_json(self) -> str:
        """Everything but the arrays as JSON; infinity and NaN are "Infinity" and "NaN" there."""
        first = self.first_divergence
        document = {
            "ok": self.ok,
            "verdict": report.verdict(self),
            "first_divergence": None if first is None else self.rows.index(first),
            "environment": self.environment,
            "notes": self.notes,
            "rows": [{**asdict(row), "ok": row.ok} for row in self.rows],
            "controls": [asdict(control) for control in self.controls],
        }
        return json.dumps(_json_safe(document), indent=2, allow_nan=False)

    def save_golden(self, name: str) -> None:
        """Write what the candidates gave to an ``.npz`` file for `compare` on another machine.

        Raises:
            ValueError: the file cannot be written.
        """
        golden.save(name, self.model, torch.from_numpy(self.input), self.traces, self.environment)

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


#: A second module, or objects in the book's style in the order of the model's layers.
Reference = nn.Module | Sequence[Any]


def compare(
    model: nn.Module,
    input: Tensor,
    *,
    reference: Reference | None = None,
    candidates: Sequence[str | Candidate] | None = None,
    golden_file: str | None = None,
    backward: bool = False,
    target: Tensor | None = None,
    controls: bool = True,
    progress: Callable[[str], object] | None = None,
) -> Comparison:
    """Judge, layer by layer, whether `model` computes what NumPy computes.

    Model and input are cast to each candidate's device and dtype; NumPy computes in float64 from
    the same cast parameters and input. Whether the parameters are the right ones is a question of
    its own: name what has them as `reference`.

    An error is measured against what rounding can explain (`torchnnfs.testing.bounds`): once with
    each layer *isolated*, on the input it really got, and, where the model is a plain chain of
    layers, once *chained*, from the model's input on. A candidate that shows only its output is
    judged on that, chained. A model that is no plain chain has a row for its output as well,
    against a float64 run, with an estimated bound. The model itself is not changed.

    Args:
        model: any composition of `nn.Linear`, `nn.ReLU`, `nn.Softmax`, `nn.LogSoftmax`,
            `nn.Flatten`, `nn.Identity`, `nn.Dropout` in eval mode, what derives from them, and
            types that were registered with `torchnnfs.testing.register`.
        input: the model's input, floating point and finite.
        reference: what NumPy computes instead of the model itself: a module, whose parameters are
            used, or, if it has other layers, whose output; or a list of objects in the book's
            style, one for each layer of the model, with ``forward`` setting ``output``.
        candidates: names, which stand for every device of this machine in float32, or
            `Candidate` objects; default "eager" and "numpy".
        golden_file: a file of `Comparison.save_golden`, made from the same model and input, whose
            candidates are judged as well.
        backward: whether to judge the gradients of torch eager as well, of the cross-entropy of
            `target` averaged over the batch: to the output, and to the input and parameters of
            each layer.
        target: (N,) classes, for `backward`.
        controls: whether to show that broken twins of the model are rejected.
        progress: called with a few words before each step.

    Raises:
        MissingExtraError: a candidate whose packages are not installed.
        TypeError: a `model` that is no module or has layers that NumPy has no twin for; an
            `input` that is no floating-point tensor; a `reference` of another kind.
        ValueError: an `input` that is empty, not finite or on the meta device; parameters that
            are not finite or on the meta device; another number of objects than layers; an unknown
            candidate; `backward` without a fitting `target`, or with a reference whose layers
            cannot be paired.

    Example:
        >>> import torch
        >>> from torchnnfs import classifier, compare, spiral
        >>> comparison = compare(classifier(2, 3, 3), spiral()[0], candidates=["eager"])
        >>> comparison.ok, comparison.first_divergence
        (True, None)
    """
    check_model("model", model)
    check_input(input)
    if reference is None:
        reference = model
    elif isinstance(reference, nn.Module):
        check_model("reference", reference)
    elif isinstance(reference, str) or not isinstance(reference, Sequence):
        raise TypeError(
            "compare expects reference to be a torch.nn.Module or a list of objects with a "
            f"method forward, got {type(reference).__name__}"
        )
    progress = progress or (lambda step: None)
    chosen = _expand(candidates)
    posed = {each.dtype: pose(model, reference, each.dtype) for each in chosen}
    rows: list[Row] = []
    notes: list[str] = []
    called: set[str] = set()
    first: Array | None = None
    traces: list[tuple[Candidate | Recorded, Trace]] = []
    for candidate in chosen:
        progress(f"{candidate.name} on {candidate.device} in {candidate.dtype_name}")
        ready = copy.deepcopy(model).to(candidate.device, candidate.dtype)
        received = input.detach().to(candidate.device, candidate.dtype, copy=True)
        problem = posed[candidate.dtype]
        check_finite(ready, problem.module, received, candidate.dtype_name)
        x = to_numpy(received)  # before the run, which may work in place
        trace = KINDS[candidate.name].run(ready, received)
        rows += _judge(model, candidate, trace, problem, x)
        called |= {call.path for call in trace.calls}
        if backward and candidate.name == "eager":
            progress(f"gradients on {candidate.device} in {candidate.dtype_name}")
            rows += _judge_gradients(candidate, ready, problem, input, target)
        first = trace.output if first is None else first
        if candidate.name == "numpy":
            notes += _simd_exp(trace)
        traces.append((candidate, trace))
    for recorded, trace in golden.load(golden_file, model, input) if golden_file else []:
        problem = pose(model, reference, recorded.dtype)
        x = to_numpy(input.detach().to("cpu", recorded.dtype))
        rows += _judge(model, recorded, trace, problem, x)
    assert first is not None
    notes = _notes(model, reference, posed[chosen[0].dtype], called) + notes
    notes += [
        f"{row.dtype} may overflow in layer {report.label(row)}: {row.unbounded} elements of "
        f"{row.candidate} are not judged."
        for row in rows
        if row.unbounded
    ]
    notes += precision_notes([(row.device, row.dtype, row.ok) for row in rows])
    tried: tuple[Control, ...] = ()
    if controls and posed[chosen[0].dtype].judges is not None:
        progress("negative controls")
        tried = _controls(model, input, next((c for c in chosen if c.name == "eager"), chosen[0]))
    return Comparison(
        rows=tuple(rows),
        controls=tried,
        environment=describe(str(each.device) for each in chosen),
        notes=tuple(notes),
        input=to_numpy(input),
        output=first,
        traces=tuple(traces),
        model=copy.deepcopy(model),
    )


def assert_agrees(model: nn.Module, input: Tensor, **keywords: Any) -> None:
    """`compare` with the same arguments, for test suites; without controls unless asked for.

    Raises:
        AssertionError: with the whole table, when a layer strays further than rounding explains.

    Example:
        >>> from torchnnfs import classifier, spiral
        >>> assert_agrees(classifier(2, 3, 3), spiral()[0])
    """
    comparison = compare(model, input, **{"controls": False, **keywords})
    if not comparison.ok:
        raise AssertionError(f"the model does not compute what NumPy computes\n{comparison}")


def _expand(candidates: Sequence[str | Candidate] | None) -> list[Candidate]:
    if candidates is None:
        return choose(["eager", "numpy"])
    if isinstance(candidates, str) or not candidates:
        raise ValueError(f"compare expects a list of candidates, got {candidates!r}")
    expanded: list[Candidate] = []
    for candidate in candidates:
        expanded += [candidate] if isinstance(candidate, Candidate) else choose([candidate])
    return expanded


def _judge(
    model: nn.Module, candidate: Candidate | Recorded, trace: Trace, problem: Problem, x: Array
) -> list[Row]:
    """Measure each call that `trace` shows, and the output where the calls do not tell all."""
    rows = []
    times: Counter[str] = Counter()
    chain = is_chain(model) and problem.judges is not None and problem.chain is not None
    error: Array | None = None
    start = x
    for call in trace.calls if problem.judges is not None else []:
        assert problem.judges is not None
        judge = problem.judges[call.path]
        exact, bound = judge(call.input, None)
        isolated = measure(call.output, exact, bound, candidate.dtype)
        chained = None
        if chain:
            x, error = carried(judge, x, error, problem.precision)
            chained = measure(call.output, x, error, candidate.dtype)
        times[call.path] += 1
        again = f" (call {times[call.path]})" if times[call.path] > 1 else ""
        layer = find_layers(model)[call.path]
        twin = find_twin(layer)
        basis = PROVEN if twin is not None and twin.bound is not None else FACTORED
        rows.append(_row(candidate, call.path + again, call.kind, isolated, chained, basis))
    shown = chain and bool(rows)
    if problem.chain is None and problem.module is None:
        if not rows:
            raise ValueError(
                f"{candidate.name} shows only its output, and objects as a reference give one only "
                "for a plain chain of layers"
            )
    elif not shown or not np.array_equal(trace.output, trace.calls[-1].output, equal_nan=True):
        exact, bound, basis = problem.output(start)
        measured = measure(trace.output, exact, bound, candidate.dtype)
        path, kind = "(output)", type(model).__name__
        if chain and not shown:
            path, layer = list(find_layers(model).items())[-1]
            kind = type(layer).__name__
        rows.append(_row(candidate, path, kind, None, measured, basis))
    return rows


def _judge_gradients(
    candidate: Candidate, model: nn.Module, problem: Problem, input: Tensor, target: Tensor | None
) -> list[Row]:
    if target is None:
        raise ValueError("compare with backward expects a target, the classes of the input's rows")
    if problem.module is None or problem.judges is None:
        raise ValueError(
            "compare with backward expects as reference a module with the model's own layers"
        )
    received = input.detach().to(candidate.device, candidate.dtype, copy=True)
    with np.errstate(all="ignore"), torch.inference_mode(False), torch.enable_grad():
        found = list(gradients(model, problem.module, received, target, problem.precision))
    return [
        _row(candidate, each.path, each.kind, measure(*each[2:], candidate.dtype), None, PROVEN)
        for each in found
    ]


def _row(
    candidate: Candidate | Recorded,
    layer: str,
    kind: str,
    isolated: Measured | None,
    chained: Measured | None,
    basis: str,
) -> Row:
    shown = [each for each in (isolated, chained) if each is not None]
    decisive = max(shown, key=lambda measured: measured.ratio)
    return Row(
        candidate=candidate.name,
        device=str(candidate.device),
        dtype=candidate.dtype_name,
        layer=layer,
        kind=kind,
        max_abs=shown[0].max_abs,
        max_ulp=shown[0].max_ulp,
        bit_equal=shown[0].bit_equal,
        isolated_ratio=None if isolated is None else isolated.ratio,
        chained_ratio=None if chained is None else chained.ratio,
        chained_ulp=None if chained is None else chained.max_ulp,
        bound_ratio=decisive.ratio,
        basis=basis,
        worst=decisive.worst,
        ulps=shown[0].ulps,
        unbounded=max(each.unbounded for each in shown),
    )


def _notes(model: nn.Module, reference: Reference, problem: Problem, called: set[str]) -> list[str]:
    kind = type(model).__name__
    if problem.judges is None:
        return [f"Only the output of {kind} is judged: {problem.mismatch}."]
    notes = []
    if not is_chain(model):
        notes.append(
            f"{kind} is no plain chain of layers: what happens between its layers is judged by its "
            "output alone, with an estimated bound"
            + (
                ", and against itself; name a reference to find what is wrong in both."
                if reference is model
                else "."
            )
        )
    uncalled = [path for path in find_layers(model) if called and path not in called]
    if uncalled:
        notes.append(f"Never called, so not judged: {', '.join(uncalled)}.")
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


#: Rows of the input that a control is tried on first; what is rejected there is rejected.
_FEW = 1000


def _controls(model: nn.Module, input: Tensor, candidate: Candidate) -> tuple[Control, ...]:
    """Break copies of `model` in every way that `BREAKS` knows, and judge them by the model."""
    eager = Candidate("eager", candidate.device, candidate.dtype)
    problem = pose(model, model, eager.dtype)
    tried = []
    for name in BREAKS:
        whole = input.detach().to(eager.device, eager.dtype)
        step = -(-len(whole) // _FEW) if whole.ndim > 1 else 1
        control = None
        for part in (whole[::step], whole) if step > 1 else (whole,):
            control = _try(name, model, part, eager, problem)
            if control.outcome == "rejected":
                break
        assert control is not None
        tried.append(control)
    return tuple(tried)


def _try(
    name: str, model: nn.Module, input: Tensor, candidate: Candidate, problem: Problem
) -> Control:
    """Judge one broken twin, and where it is not rejected, ask float64 whether it could be."""
    path = alone = ""

    def judged(dtype: torch.dtype, device: torch.device | str) -> Row:
        nonlocal path
        twin = copy.deepcopy(model).to(candidate.dtype).to(device, dtype)
        given = input.to(device, dtype, copy=True)
        x = to_numpy(given)
        path = BREAKS[name](twin, given)
        rows = _judge(twin, candidate, KINDS["eager"].run(twin, given), problem, x)
        return next((row for row in rows if not row.ok), max(rows, key=lambda row: row.bound_ratio))

    try:
        if name == UNSHIFTED:
            alone, model, input, problem = _alone(model, input, candidate)
        row = judged(candidate.dtype, candidate.device)
        if not row.ok:
            far = "infinitely far off"
            if row.bound_ratio < np.inf:
                far = f"{row.bound_ratio:.3g} times its bound"
            reason = f"{far} at layer {report.label(row)}"
            return Control(name, alone or path, "rejected", reason)
        ratio = judged(torch.float64, "cpu").bound_ratio
    except NotHereError as error:
        return Control(name, alone or path, "indistinguishable", str(error))
    if ratio > 2:
        return Control(
            name, alone or path, "passed", f"off by {ratio:.3g} times what rounding explains"
        )
    reason = (
        f"without rounding it is off by {ratio:.2g} of what rounding in {candidate.dtype_name} "
        "explains"
        if ratio
        else "on this input it computes the same"
    )
    return Control(name, alone or path, "indistinguishable", reason)


def _alone(
    model: nn.Module, input: Tensor, candidate: Candidate
) -> tuple[str, nn.Module, Tensor, Problem]:
    """Path of the last softmax, itself, the logits it gets here scaled to size 100, its problem."""
    path, layer = find_last(model, nn.Softmax)
    ready = copy.deepcopy(model).to(candidate.device, candidate.dtype)
    given = input.to(candidate.device, candidate.dtype, copy=True)
    calls = KINDS["eager"].run(ready, given).calls
    logits = next((call.input for call in calls if call.path == path), np.zeros(1))
    size = float(logits.flat[np.argmax(np.abs(logits))])
    if not 0 < abs(size) < np.inf:
        raise NotHereError("its logits here are all zero")
    # With its sign, so that the largest is 100 and not -100.
    scaled = torch.from_numpy(logits * (100 / size)).to(candidate.device, candidate.dtype)
    return path, layer, scaled, pose(layer, layer, candidate.dtype)
