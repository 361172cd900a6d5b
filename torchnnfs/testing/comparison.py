"""Run the candidates, measure every layer against NumPy in float64, and give the verdict."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from torchnnfs.testing.bounds import PRECISIONS
from torchnnfs.testing.candidates import RUNNERS, Call, Candidate, choose
from torchnnfs.testing.environment import describe
from torchnnfs.testing.reference import Array
from torchnnfs.testing.report import as_text, verdict
from torchnnfs.testing.twins import Twin, find_layers, is_chain, to_numpy, twin_of


@dataclass(frozen=True)
class Worst:
    """The element with the largest error over its bound.

    Attributes:
        index: its place in the layer's output.
        value: what the candidate computed.
        expected: what NumPy computed in float64.
    """

    index: tuple[int, ...]
    value: float
    expected: float


@dataclass(frozen=True)
class Row:
    """One layer of one candidate, measured.

    Attributes:
        candidate: its name.
        device: where it computed.
        dtype: what it computed in.
        layer: path of the layer in the model, with the number of the call if there are several.
        kind: type of the layer.
        max_abs: largest absolute error, of the layer on the input it really got.
        max_ulp: the same in units in the last place of `dtype`; 0.5 at most is correctly rounded.
        bit_equal: fraction of elements that are the exact result correctly rounded.
        isolated_ratio: largest error over its bound, of the layer on the input it really got.
        chained_ratio: the same from the model's input on, the bound carried along; None where
            the model is no plain chain.
        bound_ratio: the larger of the two.
        worst: the element behind `bound_ratio`.
    """

    candidate: str
    device: str
    dtype: str
    layer: str
    kind: str
    max_abs: float
    max_ulp: float
    bit_equal: float
    isolated_ratio: float
    chained_ratio: float | None
    bound_ratio: float
    worst: Worst

    @property
    def ok(self) -> bool:
        """Whether no error is larger than its bound."""
        return self.bound_ratio <= 1


@dataclass(frozen=True)
class Comparison:
    """The outcome of `compare`.

    Attributes:
        rows: one `Row` for each candidate and call of a layer, in order.
        environment: versions, devices and settings that the numbers depend on.
        notes: what a reader has to know beside the rows, such as what was not judged.
    """

    rows: tuple[Row, ...]
    environment: dict[str, str]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every layer of every candidate is within its bounds."""
        return all(row.ok for row in self.rows)

    @property
    def first_divergence(self) -> Row | None:
        """The first row out of bounds, in order of candidates and layers."""
        return next((row for row in self.rows if not row.ok), None)

    def to_json(self) -> str:
        """Everything as JSON; infinity and NaN become the strings "Infinity" and "NaN"."""
        first = self.first_divergence
        document = {
            "ok": self.ok,
            "verdict": verdict(self),
            "first_divergence": None if first is None else self.rows.index(first),
            "environment": self.environment,
            "notes": self.notes,
            "rows": [{**asdict(row), "ok": row.ok} for row in self.rows],
        }
        return json.dumps(_json_safe(document), indent=2, allow_nan=False)

    def __str__(self) -> str:
        return as_text(self)


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
    input: Tensor,
    *,
    reference: nn.Module | None = None,
    candidates: Sequence[str | Candidate] | None = None,
) -> Comparison:
    """Judge, layer by layer, whether `model` computes what NumPy computes.

    Model and input are cast to each candidate's device and dtype; NumPy computes in float64 from
    the same cast parameters and input. Whether the parameters are the right ones is a question of
    its own: name the module that has them as `reference`.

    An error is measured against what rounding can explain (`torchnnfs.testing.bounds`): once with
    each layer *isolated*, on the input it really got, and, where the model is a plain chain of
    layers, once *chained*, from the model's input on. The model itself is not changed.

    Args:
        model: any composition of `nn.Linear`, `nn.ReLU`, `nn.Softmax` and what derives from them.
        input: the model's input, floating point and finite.
        reference: a module with the same layers, whose parameters NumPy uses instead of the
            model's own.
        candidates: names, which stand for every device of this machine in float32, or
            `Candidate` objects; default "eager" and "numpy".

    Raises:
        TypeError: a `model` that is no module or has layers that NumPy has no twin for; an
            `input` that is no floating-point tensor.
        ValueError: an `input` that is empty, not finite or on the meta device; parameters that
            are not finite or on the meta device; a `reference` with other layers; an unknown
            candidate.

    Example:
        >>> import torch
        >>> from torchnnfs import classifier, compare, spiral
        >>> comparison = compare(classifier(2, 3, 3), spiral()[0], candidates=["eager"])
        >>> comparison.ok, comparison.first_divergence
        (True, None)
    """
    _check_model("model", model)
    _check_input(input)
    reference = model if reference is None else reference
    _check_model("reference", reference)
    _pair(model, reference)
    rows: list[Row] = []
    called: set[str] = set()
    for candidate in _expand(candidates):
        ready, problem = (
            copy.deepcopy(module).to(candidate.device, candidate.dtype)
            for module in (model, reference)
        )
        received = input.detach().to(candidate.device, candidate.dtype)
        _check_finite(ready, problem, received, candidate)
        calls = RUNNERS[candidate.name](ready, received)
        chain = to_numpy(received) if is_chain(model) else None
        rows += _judge(candidate, calls, _pair(ready, problem), chain)
        called |= {call.path for call in calls}
    notes = _notes(model, called)
    return Comparison(tuple(rows), describe(row.device for row in rows), notes)


def assert_agrees(
    model: nn.Module,
    input: Tensor,
    *,
    reference: nn.Module | None = None,
    candidates: Sequence[str | Candidate] | None = None,
) -> None:
    """`compare`, for test suites.

    Raises:
        AssertionError: with the whole table, when a layer strays further than rounding explains.

    Example:
        >>> from torchnnfs import classifier, spiral
        >>> assert_agrees(classifier(2, 3, 3), spiral()[0])
    """
    comparison = compare(model, input, reference=reference, candidates=candidates)
    if not comparison.ok:
        raise AssertionError(f"the model does not compute what NumPy computes\n{comparison}")


def _notes(model: nn.Module, called: set[str]) -> tuple[str, ...]:
    notes = []
    if not is_chain(model):
        notes.append(
            f"{type(model).__name__} is no plain chain of layers: each layer is judged on the "
            "input it got, but not what happens between the layers."
        )
    uncalled = [path for path in find_layers(model) if path not in called]
    if uncalled:
        notes.append(f"Never called, so not judged: {', '.join(uncalled)}.")
    return tuple(notes)


def _judge(
    candidate: Candidate, calls: list[Call], layers: dict[str, nn.Module], chain: Array | None
) -> list[Row]:
    """Measure each call against its layer in `layers`, by path.

    `chain` is the model's input where the model is a plain chain of layers, else None.
    """
    precision = PRECISIONS[candidate.dtype_name]
    error = None if chain is None else np.zeros_like(chain)
    rows = []
    times: Counter[str] = Counter()
    for call in calls:
        twin = twin_of(layers[call.path])
        arguments = twin.arguments(layers[call.path])
        times[call.path] += 1

        def measure(
            x: Array, error: Array, twin: Twin = twin, arguments: Any = arguments, call: Call = call
        ) -> tuple[_Measured, Array, Array]:
            with np.errstate(all="ignore"):
                exact = twin.forward(x, **arguments)
                bound = twin.bound(x, error, precision, **arguments)
                return _measure(call.output, exact, bound, candidate), exact, bound

        isolated, _, _ = measure(call.input, np.zeros_like(call.input))
        decisive, chained = isolated, None
        if chain is not None and error is not None:
            chained, chain, error = measure(chain, error)
            # Where the dtype may have overflowed, anything may follow.
            error[~(np.abs(chain) + error < precision.largest)] = np.inf
            decisive = max(isolated, chained, key=lambda measured: measured.ratio)
        rows.append(
            Row(
                candidate=candidate.name,
                device=str(candidate.device),
                dtype=candidate.dtype_name,
                layer=call.path + (f" (call {times[call.path]})" if times[call.path] > 1 else ""),
                kind=type(call.layer).__name__,
                max_abs=isolated.max_abs,
                max_ulp=isolated.max_ulp,
                bit_equal=isolated.bit_equal,
                isolated_ratio=isolated.ratio,
                chained_ratio=None if chained is None else chained.ratio,
                bound_ratio=decisive.ratio,
                worst=decisive.worst,
            )
        )
    return rows


class _Measured(NamedTuple):
    max_abs: float
    max_ulp: float
    bit_equal: float
    ratio: float
    worst: Worst


#: Elements measured at a time: few enough that what is computed between stays in the cache.
_BLOCK = 1 << 16


def _measure(value: Array, exact: Array, bound: Array, candidate: Candidate) -> _Measured:
    """`value` against `exact`, elementwise, with `bound` what rounding can explain."""
    if value.shape != exact.shape:
        nowhere = Worst((), math.nan, math.nan)
        return _Measured(math.inf, math.inf, 0.0, math.inf, nowhere)
    flat = [np.ascontiguousarray(array).reshape(-1) for array in (value, exact, bound)]
    blocks = [
        _measure_block(candidate, *(array[start : start + _BLOCK] for array in flat))
        for start in range(0, value.size, _BLOCK)
    ]
    max_abs, max_ulp, bit_equal, ratio, place = zip(*blocks, strict=True)
    block = int(np.argmax(ratio))
    worst = block * _BLOCK + place[block]
    return _Measured(
        max_abs=max(max_abs),
        max_ulp=max(max_ulp),
        bit_equal=sum(bit_equal) / value.size,
        ratio=ratio[block],
        worst=Worst(
            tuple(int(i) for i in np.unravel_index(worst, value.shape)),
            float(flat[0][worst]),
            float(flat[1][worst]),
        ),
    )


def _measure_block(
    candidate: Candidate, value: Array, exact: Array, bound: Array
) -> tuple[float, float, int, float, int]:
    """Largest error, in ULP too, number of exact bits, largest ratio and where it is."""
    precision = PRECISIONS[candidate.dtype_name]
    rounded = to_numpy(torch.from_numpy(exact).to(candidate.dtype))
    both_nan = np.isnan(value) & np.isnan(exact)
    equal = both_nan | ((value == rounded) & (np.signbit(value) == np.signbit(rounded)))
    # Right, too: infinite where the exact result lies beyond the dtype's numbers or may do so by
    # rounding, and no number where the input already was none.
    overflow = np.isinf(value) & (np.sign(value) == np.sign(exact))
    overflow &= np.abs(exact) + bound >= precision.largest
    right = (value == exact) | overflow | ~(np.isfinite(exact) | np.isfinite(value))
    error = np.where(right, 0.0, np.abs(value - exact))
    error[np.isnan(error)] = np.inf
    ratio = np.divide(error, bound, out=np.zeros_like(error), where=(error > 0) & (bound < np.inf))
    place = int(np.argmax(ratio))
    ulps = float(np.max(error / precision.ulp(exact)))
    return float(np.max(error)), ulps, int(np.count_nonzero(equal)), float(ratio[place]), place


def _expand(candidates: Sequence[str | Candidate] | None) -> list[Candidate]:
    if candidates is None:
        return choose()
    if isinstance(candidates, str) or not candidates:
        raise ValueError(f"compare expects a list of candidates, got {candidates!r}")
    expanded: list[Candidate] = []
    for candidate in candidates:
        expanded += [candidate] if isinstance(candidate, Candidate) else choose([candidate])
    return expanded


def _check_model(role: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"compare expects {role} to be a torch.nn.Module, got {_kind(model)}")
    if not find_layers(model):
        raise TypeError(f"compare expects {role} to have layers, got {model}")
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise ValueError(
                f"compare expects {role} with values, got {name!r} on the meta device; call "
                "to_empty(device='cpu') and then reset_parameters() or load_state_dict() first"
            )


def _check_input(input: Any) -> None:
    if not isinstance(input, Tensor):
        raise TypeError(
            f"compare expects input to be a torch.Tensor, got {_kind(input)}; "
            "call torch.as_tensor(input, dtype=torch.float32) first"
        )
    if not input.is_floating_point():
        raise TypeError(
            f"compare expects a floating-point input, got {input.dtype}; call input.float() first"
        )
    if input.is_meta:
        raise ValueError("compare expects an input with values, got one on the meta device")
    if input.numel() == 0:
        raise ValueError(
            f"compare expects at least one sample, got an input of shape {tuple(input.shape)}"
        )


def _check_finite(
    model: nn.Module, problem: nn.Module, input: Tensor, candidate: Candidate
) -> None:
    """No verdict on NaN: everything would equal everything."""
    parts = [("input", input)]
    parts += [(f"model parameter {name!r}", value) for name, value in model.named_parameters()]
    parts += [(f"reference parameter {name!r}", p) for name, p in problem.named_parameters()]
    for name, tensor in parts:
        broken = (~torch.isfinite(tensor.detach())).nonzero()
        if len(broken):
            index = tuple(broken[0].tolist())
            raise ValueError(
                f"compare expects finite numbers, got {tensor[index].item()} in {name} at {index} "
                f"in {candidate.dtype_name} ({len(broken)} of {tensor.numel()} are not finite)"
            )


def _pair(model: nn.Module, reference: nn.Module) -> dict[str, nn.Module]:
    """The reference's layers by the model's paths, paired in order."""
    ours, theirs = find_layers(model), find_layers(reference)
    for path, layer, other in zip_longest(ours, ours.values(), theirs.values()):
        expected = _signature(layer) if layer else f"no more after {len(ours)} layers"
        got = _signature(other) if other else f"none after {len(theirs)} layers"
        if expected != got:
            raise ValueError(
                f"compare expects the reference's layer for {path!r} to be {expected}, got {got}"
            )
    return dict(zip(ours, theirs.values(), strict=True))


def _signature(layer: nn.Module) -> str:
    """What must be the same of two layers that are paired: the computation and its shapes."""
    arguments = twin_of(layer).arguments(layer).items()
    shapes = [f"{name}={getattr(value, 'shape', value)}" for name, value in arguments]
    return f"{twin_of(layer).forward.__name__}({', '.join(shapes)})"


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
