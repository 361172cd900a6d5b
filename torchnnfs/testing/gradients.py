"""The gradients of torch against the backward formulas, each from what really reached it.

The loss is the cross-entropy of the targets, averaged over the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchnnfs.testing.candidates import Candidate, dtype_name
from torchnnfs.testing.exact import ROUNDING
from torchnnfs.testing.judge import Judged, Row, make_row
from torchnnfs.testing.layers import softmax
from torchnnfs.testing.measure import measure
from torchnnfs.testing.models import borrowed, cast, split, state_of, to_numpy
from torchnnfs.testing.precision import Array, Precision
from torchnnfs.testing.problem import Problem
from torchnnfs.testing.traces import Trace, hooked


class _Call(NamedTuple):
    path: str
    module: nn.Module
    input: Tensor
    output: Tensor


def judge_gradients(
    candidate: Candidate, model: nn.Module, input: Any, target: Tensor | None, problem: Problem
) -> list[Row]:
    """A row for each gradient: to the output, and to input and parameters of each layer.

    Raises:
        ValueError: no target; an output that is not (N, classes), or targets that do not fit it.
    """
    if target is None:
        raise ValueError("compare with backward expects a target, the classes of the input's rows")
    if problem.mismatch or problem.reference.sources or problem.reference.recorded:
        raise ValueError(
            "compare with backward expects as reference a module with the model's own layers"
        )
    assert candidate.dtype is not None
    name, device = dtype_name(candidate.dtype), str(candidate.device)
    trace = Trace(candidate.name, device, name, (), None)
    with torch.inference_mode(False), torch.enable_grad():
        return [
            make_row(trace, path, kind, _judged(value, pair, problem.precision), None)
            for path, kind, value, pair in _gradients(candidate, model, input, target, problem)
        ]


def _judged(value: Array, pair: tuple[Array, Array], precision: Precision) -> Judged:
    return Judged(measure(value, *pair, precision), ROUNDING, "NumPy")


def _gradients(
    candidate: Candidate, model: nn.Module, input: Any, target: Tensor, problem: Problem
) -> Iterator[tuple[str, str, Array, tuple[Array, Array]]]:
    device, dtype = candidate.device, candidate.dtype
    assert dtype is not None
    parameters = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    state = state_of(model, device, dtype)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        # A parameter that need not change is the model's own, so that its hooks see its gradient.
        same = parameter.dtype == dtype and parameter.device == torch.device(device)
        if same and parameter.requires_grad:
            state[name] = parameter
        elif state[name].is_floating_point():
            state[name].requires_grad_()
    args, kwargs = split(cast(input, device, dtype))
    for each in (*args, *kwargs.values()):
        if isinstance(each, Tensor) and each.is_floating_point():
            each.requires_grad_()
    calls: list[_Call] = []
    with borrowed(model, device, dtype, state=state) as run:
        for module in model.modules():
            if getattr(module, "inplace", False):
                vars(module)["inplace"] = False  # else the layer's own input would be gone
        output = _forward(run, args, kwargs, problem, calls)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if not torch.equal(parameter, before[name]):  # a forward that changes its weights
                parameter.copy_(before[name])
    classes = _check(output, target)
    target = target.to(output.device, torch.int64)
    last = problem.model.places[problem.model.steps[-1]].layer
    loss, by_hand = _LOSSES.get(last.name if last else "", _LOSSES[""])
    whole = next(each for each in (*args, *kwargs.values()) if isinstance(each, Tensor))
    wanted = [output, *([whole] if whole.requires_grad else []), *(call.output for call in calls)]
    wanted += [call.input for call in calls if call.input.requires_grad]
    wanted += [tensor for name, tensor in state.items() if name in parameters]
    grads = torch.autograd.grad(loss(output, target), wanted, allow_unused=True, retain_graph=True)
    found = {id(tensor): grad for tensor, grad in zip(wanted, grads, strict=True)}

    def gradient(tensor: Tensor) -> Array:
        grad = found[id(tensor)]  # what does not reach the loss has no gradient: it is zero
        return np.zeros(tuple(tensor.shape), np.float64) if grad is None else to_numpy(grad)

    rows = np.eye(classes, dtype=np.float64)[target.cpu().numpy()]
    yield (
        "(loss)",
        "dL/doutput",
        gradient(output),
        by_hand(to_numpy(output), rows, problem.precision),
    )
    steps = problem.model.steps
    is_chain = [call.path for call in calls] == steps
    totals: dict[int, tuple[str, str, Tensor, Array, Array]] = {}
    for index, call in enumerate(calls):
        layer = problem.model.places[call.path].layer
        assert layer is not None
        g = gradient(call.output)
        if is_chain:  # what the next layer, or the loss, passed on, and no other
            g = gradient(calls[index + 1].input if index + 1 < len(calls) else output)
        if layer.backward is None:
            continue
        arguments = problem.exact.arguments[problem.paired[call.path]]
        x, y = to_numpy(call.input), to_numpy(call.output)
        kind = type(call.module).__name__
        for name, pair in layer.backward(x, y, g, problem.precision, **arguments).items():
            if name == "input":
                if call.input.requires_grad:
                    given = whole if is_chain and index == 0 else call.input
                    value = gradient(given) if is_chain else _own(call, g)
                    yield call.path, f"{kind} dL/dx", value, pair
                continue
            # A parametrized layer has no parameter of that name; a tied one has another's.
            full = names.get(id(getattr(call.module, name)))
            if full is not None:
                _add(totals, state[full], call.path, f"{kind} {_SYMBOLS[name]}", pair, problem)
    for path, kind, tensor, exact, bound in totals.values():
        yield path, kind, gradient(tensor), (exact, bound)


_SYMBOLS = {"weight": "dL/dW", "bias": "dL/db"}


def _add(
    totals: dict[int, tuple[str, str, Tensor, Array, Array]],
    tensor: Tensor,
    path: str,
    kind: str,
    pair: tuple[Array, Array],
    problem: Problem,
) -> None:
    """A layer that is called several times adds up, and rounds, once more for each."""
    exact, bound = pair
    if id(tensor) in totals:
        path, kind, _, before, allowed = totals[id(tensor)]
        exact = before + exact
        sum_error = problem.precision.unit * np.abs(exact)
        bound = problem.precision.stored(exact, allowed + bound + sum_error)
    totals[id(tensor)] = (path, kind, tensor, exact, bound)


def _forward(
    run: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    problem: Problem,
    calls: list[_Call],
) -> Any:
    """The output, and what went into and out of the layers, all with their history."""
    inputs: list[Any] = []

    # Taken before the call: behind it hooks on the gradient of the layer would be passed already.
    def before(path: str, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        inputs.append(given[0] if given else next(iter(named.values())))

    def after(path: str, module: nn.Module, output: Tensor) -> None:
        calls.append(_Call(path, module, inputs.pop(), output))

    places = problem.model.places.items()
    known = {path: place.module for path, place in places if place.layer is not None}
    with hooked(known, before, after):
        return run(*args, **kwargs)


def _own(call: _Call, g: Array) -> Array:
    """The gradient that this layer alone passes on, where its input goes elsewhere as well."""
    reached = torch.from_numpy(g).to(call.output.device, call.output.dtype)
    (grad,) = torch.autograd.grad(call.output, call.input, reached, retain_graph=True)
    return to_numpy(grad)


def _check(output: Any, target: Tensor) -> int:
    """The number of classes."""
    shape = tuple(getattr(output, "shape", ()))
    if len(shape) != 2 or target.shape != shape[:1]:
        raise ValueError(
            "compare with backward expects an output of shape (N, classes) and a target of shape "
            f"(N,), got {shape or type(output).__name__} and {tuple(target.shape)}"
        )
    classes = int(shape[-1])
    if target.is_floating_point() or not ((target >= 0) & (target < classes)).all():
        raise ValueError(
            f"compare with backward expects targets that are classes from 0 to {classes - 1}, got "
            f"{target.dtype} from {target.min().item()} to {target.max().item()}"
        )
    return classes


def _loss_of_probabilities(p: Array, rows: Array, precision: Precision) -> tuple[Array, Array]:
    """``dL/dp = -1 / (N p)`` at the target, 0 elsewhere."""
    exact = 0.0 - rows / len(p) / np.where(p > 0, p, 1.0)
    bound = precision.gamma(4) * np.abs(exact)
    # 1 / N is stored before it is divided by p.
    stored = precision.stored(exact, precision.stored(exact, bound)) + precision.tiny
    return exact, np.where(p > 0, stored, np.inf)


def _loss_of_log_probabilities(y: Array, rows: Array, precision: Precision) -> tuple[Array, Array]:
    """``dL/dy = -1 / N`` at the target, 0 elsewhere."""
    exact = 0.0 - rows / len(y)
    return exact, precision.stored(exact, precision.gamma(3) * np.abs(exact)) + precision.tiny


def _loss_of_logits(z: Array, rows: Array, precision: Precision) -> tuple[Array, Array]:
    """``dL/dz = (softmax(z) - one_hot) / N``."""
    p = softmax.softmax(z)
    exact = (p - rows) / len(z)
    # exp(log_softmax(z)): the log-probabilities are stored in between.
    error = softmax.log_softmax_bound(z, np.zeros_like(z), precision)
    error = p * np.expm1(error) + precision.gamma(10) * (p + rows)
    # 1 / N is stored before it is multiplied.
    return exact, precision.stored(exact, precision.stored(exact, error / len(z) + precision.tiny))


#: By the name of the last layer's formula: the loss, and its gradient by hand.
_LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., tuple[Array, Array]]]] = {
    "softmax": (lambda p, t: F.nll_loss(p.log(), t), _loss_of_probabilities),
    "log-softmax": (F.nll_loss, _loss_of_log_probabilities),
    "": (F.cross_entropy, _loss_of_logits),
}
