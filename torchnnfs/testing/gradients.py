"""The gradients of torch against the backward formulas, each from what really reached it.

The loss is the cross-entropy of the targets, averaged over the batch.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from torchnnfs.testing.candidates import Candidate
from torchnnfs.testing.estimate import ROUNDING
from torchnnfs.testing.exact import Exact
from torchnnfs.testing.layers import softmax
from torchnnfs.testing.measure import measure
from torchnnfs.testing.merge import Finding
from torchnnfs.testing.models import borrowed, cast_input, state_of, stored_dtype, takes
from torchnnfs.testing.precision import Array, Precision
from torchnnfs.testing.problem import Problem
from torchnnfs.testing.traces import Call, lent, readable, watched
from torchnnfs.testing.values import convert, leaves, split, to_numpy


def judge_gradients(candidate: Candidate, target: Any, problem: Problem) -> list[Finding]:
    """What is found of each gradient: to the output, and to input and parameters of each layer.

    Raises:
        ValueError: no target; an output that is not (N, classes), or targets that do not fit it.
    """
    if target is None:
        raise ValueError("compare with backward expects a target, the classes of the input's rows")
    if problem.mismatch or problem.reference.sources or problem.reference.recorded:
        raise ValueError(
            "compare with backward expects as reference a module with the model's own layers, or "
            "none: then each gradient is judged by the formula of its layer"
        )
    if not isinstance(target, Tensor):
        target = torch.as_tensor(np.array(target))
    found, times = [], Counter[str]()
    with torch.inference_mode(False), torch.enable_grad():
        for path, kind, value, pair in _gradients(candidate, target, problem):
            first = 0 if kind.endswith(tuple(_SYMBOLS.values())) else problem.start
            measured = measure(value, *pair, problem.precision, first)
            measured = replace(measured, basis=ROUNDING, source="NumPy")
            times[path + kind] += 1
            again = f" (call {times[path + kind]})" if times[path + kind] > 1 else ""
            found.append(Finding(path, path + again, "", kind, measured))
    return found


def _judged(exact: Exact) -> dict[str, dict[str, str]]:
    """By the path of a layer: what the model calls its weight and its bias, also if tied."""
    names = {id(parameter): name for name, parameter in exact.model.named_parameters()}
    places = {path: place for path, place in exact.places.items() if place.layer is not None}
    return {  # a parametrized layer has no parameter of that name
        path: {
            name: names[id(parameter)]
            for name, parameter in place.module._parameters.items()
            if name in _SYMBOLS and parameter is not None
        }
        for path, place in places.items()
    }


def _run(
    candidate: Candidate, problem: Problem, judged: dict[str, dict[str, str]]
) -> tuple[Any, Any, dict[str, Tensor], list[Call]]:
    """The first input, the output, the judged parameters and the calls of the layers."""
    device, model, dtype = candidate.device, problem.model.model, problem.model.dtype
    stored = stored_dtype(model, problem.input, dtype)
    state = state_of(model, device, stored)
    for name, _ in model.named_parameters():
        if state[name].is_floating_point():
            state[name].requires_grad_()
    args, kwargs = split(cast_input(model, problem.input, device, dtype))
    tensors = list(leaves([args, kwargs]).values())
    for each in tensors:
        each.requires_grad_(each.is_floating_point())
    calls: list[Call] = []
    known = {path: problem.model.places[path].module for path in judged}
    # A layer gets a copy, and a copy of what it gives goes on: the gradients of those kept are of
    # this call alone, and no later work in place changes them.
    watching = watched(known, calls, _copy, lambda kept: convert(kept, Tensor, _copy))
    lending = lent(model, judged, state)
    with borrowed(model, device, stored, state) as run, watching, lending as own:
        for module in model.modules():
            if getattr(module, "inplace", False):
                vars(module)["inplace"] = False  # else the layer's own input would be gone
        given, named = convert((args, kwargs), Tensor, _copy)
        output = run(*given, **named)
    return tensors[0], output, own, calls


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _gradients(
    candidate: Candidate, target: Tensor, problem: Problem
) -> Iterator[tuple[str, str, Array, tuple[Array, Array]]]:
    """Path, kind, value, and exact value and bound of each gradient."""
    judged = _judged(problem.model)
    whole, output, parameters, calls = _run(candidate, problem, judged)
    classes, precision = _check(output, target), problem.precision
    target = target.to(output.device, torch.int64)
    steps = problem.model.steps
    last = problem.model.places[steps[-1]].layer
    loss, by_hand = _LOSSES.get(last.name if last else "", _LOSSES[""])
    if not output.requires_grad:
        raise ValueError(
            "compare with backward expects an output with gradients, got one without: no parameter "
            "requires grad, or the forward runs under torch.no_grad()"
        )
    met = [output, whole, *parameters.values()]
    met += [tensor for call in calls for tensor in (call.input, call.output)]
    wanted = [each for each in met if isinstance(each, Tensor) and each.requires_grad]
    grads = torch.autograd.grad(loss(output, target), wanted, allow_unused=True, retain_graph=True)
    found = {id(tensor): grad for tensor, grad in zip(wanted, grads, strict=True)}

    def gradient(tensor: Tensor) -> Array:
        grad = found.get(id(tensor))  # what does not reach the loss has no gradient: it is zero
        if grad is None:
            return np.zeros(tuple(tensor.shape), np.float64)
        return to_numpy(grad.to_dense())

    rows = np.eye(classes, dtype=np.float64)[target.cpu().numpy()]
    pair = by_hand(to_numpy(output), rows, precision)
    yield "(loss)", "dL/doutput", gradient(output), pair
    is_chain = [call.path for call in calls] == steps
    totals: dict[str, tuple[str, str, tuple[Array, Array]]] = {}
    for index, call in enumerate(calls):
        place = problem.model.places[call.path]
        g = gradient(call.output)
        if is_chain:  # what the next layer, or the loss, passed on, and no other
            g = gradient(calls[index + 1].input if index + 1 < len(calls) else output)
        if place.layer is None or place.layer.backward is None:
            continue
        x, y = readable(call.input), readable(call.output)
        if not takes(x, place.layer):
            continue
        arguments = problem.exact.arguments[problem.paired[call.path]]
        for name, pair in place.layer.backward(x, y, g, precision, **arguments).items():
            if name == "input":
                cut = is_chain and index and calls[index - 1].output.requires_grad
                if not call.input.requires_grad and not cut:
                    continue
                if is_chain:
                    value = gradient(call.input if index else whole)
                elif not call.output.requires_grad:
                    continue
                else:  # not what comes through derivatives that the forward itself takes
                    reached = torch.from_numpy(g).to(call.output.device, call.output.dtype)
                    own = torch.autograd.grad(
                        call.output, call.input, reached, retain_graph=True, materialize_grads=True
                    )
                    value = to_numpy(own[0])
                yield call.path, f"{call.kind} dL/dx", value, pair
                continue
            full = judged[call.path].get(name)
            if full is None:
                continue
            path, symbol = call.path, f"{call.kind} {_SYMBOLS[name]}"
            if full in totals:  # a layer called again adds up, and rounds, once more
                path, symbol, (before, allowed) = totals[full]
                exact = before + pair[0]
                error = allowed + pair[1] + precision.unit * np.abs(exact)
                pair = exact, precision.stored(exact, error)
            totals[full] = path, symbol, pair
    for full, (path, symbol, pair) in totals.items():
        yield path, symbol, gradient(parameters[full]), pair


_SYMBOLS = {"weight": "dL/dW", "bias": "dL/db"}


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
