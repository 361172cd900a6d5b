"""The backward pass by hand: what torch's gradients have to be, and how far they may stray.

The loss is the cross-entropy of the targets, averaged over the batch. Each gradient is judged
isolated: from the layer's real input and output and the real gradient that reached its output.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchnnfs.testing import bounds, reference
from torchnnfs.testing.bounds import Precision
from torchnnfs.testing.reference import Array
from torchnnfs.testing.twins import find_layers, is_chain, to_numpy, twin_of


class Gradient(NamedTuple):
    """One gradient: torch's values, the exact ones and how far these may be apart."""

    path: str
    kind: str
    value: Array
    exact: Array
    bound: Array


class _Call(NamedTuple):
    path: str
    layer: nn.Module
    input: Tensor
    output: Tensor


def gradients(
    model: nn.Module, problem: nn.Module, input: Tensor, target: Tensor, precision: Precision
) -> Iterator[Gradient]:
    """The gradients of the loss: to the output, and to input and parameters of each layer.

    Args:
        model: the candidate, on its device and in its dtype.
        problem: the module with the layers whose parameters the exact gradients are computed from.
        input: (N, inputs).
        target: (N,) classes.
        precision: what `model` computes in.

    Raises:
        ValueError: an output that is not (N, classes), or targets that do not fit it.
    """
    model = copy.deepcopy(model).requires_grad_()
    for layer in model.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False  # in place, the layer's own input would be gone
    calls, output = _forward(model, input.detach().clone().requires_grad_())
    if output.ndim != 2 or target.shape != output.shape[:1]:
        raise ValueError(
            "compare with backward expects an output of shape (N, classes) and a target of shape "
            f"(N,), got {tuple(output.shape)} and {tuple(target.shape)}"
        )
    classes = output.shape[-1]
    if target.is_floating_point() or not ((target >= 0) & (target < classes)).all():
        raise ValueError(
            f"compare with backward expects targets that are classes from 0 to {classes - 1}, got "
            f"{target.dtype} from {target.min().item()} to {target.max().item()}"
        )
    target = target.to(output.device, torch.int64)
    last = twin_of(calls[-1].layer).forward if calls else reference.identity
    loss, by_hand = _LOSSES.get(last, _LOSSES[reference.identity])
    parameters = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    wanted = [output, *(call.output for call in calls), *(call.input for call in calls)]
    wanted += parameters.values()
    found = torch.autograd.grad(loss(output, target), wanted, allow_unused=True)
    # What does not reach the loss has no gradient: it is zero.
    values = [
        np.zeros(tuple(tensor.shape)) if each is None else to_numpy(each)
        for tensor, each in zip(wanted, found, strict=True)
    ]
    p = to_numpy(output)
    yield Gradient("(loss)", "dL/doutput", values[0], *by_hand(p, target.cpu().numpy(), precision))
    chain = is_chain(model)
    theirs = dict(zip(find_layers(model), find_layers(problem).values(), strict=True))
    totals: dict[str, tuple[Array, Array]] = {}
    for index, call in enumerate(calls):
        g = values[1 + index]
        if chain and index + 1 < len(calls):
            g = values[1 + len(calls) + index + 1]  # what the next layer passed on, and no other
        backward = _BACKWARD.get(twin_of(call.layer).forward)
        if backward is None:
            continue
        arguments = twin_of(call.layer).arguments(theirs[call.path])
        x, y = to_numpy(call.input), to_numpy(call.output)
        for name, (exact, bound) in backward(x, y, g, precision, **arguments).items():
            if name == "input":
                value = values[1 + len(calls) + index] if chain else _own(call, g)
                kind = f"{type(call.layer).__name__} dL/dx"
                yield Gradient(call.path, kind, value, exact, bound)
            else:
                # A parametrized layer has no parameter of that name; a tied one has another's.
                full = names.get(id(getattr(call.layer, name)), "")
                before = totals.get(full, (np.zeros_like(exact), np.zeros_like(exact)))
                # A layer that is called several times adds up, and rounds, once more for each.
                total = before[0] + exact
                both = precision.stored(total, before[1] + bound + precision.unit * np.abs(total))
                totals[full] = (total, bound if full not in totals else both)
    for full, (exact, bound) in totals.items():
        path, _, name = full.rpartition(".")
        if full:
            value = values[1 + 2 * len(calls) + list(parameters).index(full)]
            kind = f"{type(model.get_submodule(path)).__name__} {_SYMBOLS[name]}"
            yield Gradient(path, kind, value, exact, bound)


_SYMBOLS = {"weight": "dL/dW", "bias": "dL/db"}


def _forward(model: nn.Module, input: Tensor) -> tuple[list[_Call], Tensor]:
    calls: list[_Call] = []
    handles = [
        layer.register_forward_hook(
            lambda layer, args, keywords, output, path=path: calls.append(
                _Call(path, layer, args[0] if args else next(iter(keywords.values())), output)
            ),
            with_kwargs=True,
        )
        for path, layer in find_layers(model).items()
    ]
    output = model(input)
    for handle in handles:
        handle.remove()
    return calls, output


def _own(call: _Call, g: Array) -> Array:
    """The gradient that this layer alone passes on, where its input goes elsewhere as well."""
    x = call.input.detach().requires_grad_()
    y = call.layer(x)
    (dx,) = torch.autograd.grad(y, x, torch.from_numpy(g).to(y.device, y.dtype))
    return to_numpy(dx)


_Pairs = dict[str, tuple[Array, Array]]


def _dense(
    x: Array, y: Array, g: Array, precision: Precision, weights: Array, biases: Array | None
) -> _Pairs:
    """``dL/dx = g W^T``, ``dL/dW = x^T g``, ``dL/db = sum g``, each a product of matrices."""
    rows = x.reshape(-1, x.shape[-1])
    flat = g.reshape(-1, g.shape[-1])
    ones = np.ones((1, len(rows)))

    def product(a: Array, b: Array) -> tuple[Array, Array]:
        return a @ b, bounds.dense(a, np.zeros_like(a), precision, b)

    found = {"input": product(g, weights.T)}
    found["weight"] = product(flat.T, rows)  # as torch keeps it, (out_features, in_features)
    if biases is not None:
        total, bound = product(ones, flat)
        found["bias"] = (total[0], bound[0])
    return found


def _relu(x: Array, y: Array, g: Array, precision: Precision) -> _Pairs:
    """``dL/dx = g`` where x > 0, else 0."""
    return {"input": (np.where(x > 0, g, 0.0), np.full_like(g, precision.tiny))}


def _softmax(x: Array, y: Array, g: Array, precision: Precision, dim: int) -> _Pairs:
    """``dL/dx = p (g - sum_j g_j p_j)``, from the p that torch computed and kept."""
    total = np.sum(g * y, axis=dim, keepdims=True)
    size = np.sum(np.abs(g * y), axis=dim, keepdims=True)
    exact = y * (g - total)
    error = y * (precision.gamma(y.shape[dim] + 3) * (np.abs(g) + size))
    return {"input": (exact, precision.stored(exact, error + 3 * precision.tiny))}


def _log_softmax(x: Array, y: Array, g: Array, precision: Precision, dim: int) -> _Pairs:
    """``dL/dx = g - exp(y) sum_j g_j``, from the y that torch computed and kept."""
    total = np.sum(g, axis=dim, keepdims=True)
    size = np.sum(np.abs(g), axis=dim, keepdims=True)
    exact = g - np.exp(y) * total
    roundings = y.shape[dim] + 2 * bounds.EXP_ULP + 3
    error = precision.gamma(int(roundings)) * (np.abs(g) + np.exp(y) * size)
    return {"input": (exact, precision.stored(exact, error + 3 * precision.tiny))}


def _reshaped(x: Array, y: Array, g: Array, precision: Precision, **arguments: Any) -> _Pairs:
    return {"input": (g.reshape(x.shape), np.full(x.shape, precision.tiny))}


_BACKWARD: dict[Callable[..., Array], Callable[..., _Pairs]] = {
    reference.dense: _dense,
    reference.relu: _relu,
    reference.softmax: _softmax,
    reference.log_softmax: _log_softmax,
    reference.identity: _reshaped,
    reference.flatten: _reshaped,
}


def _one_hot(p: Array, target: Array) -> Array:
    found: Array = np.eye(p.shape[-1], dtype=np.float64)[target]
    return found


def _loss_of_probabilities(p: Array, target: Array, precision: Precision) -> tuple[Array, Array]:
    """``dL/dp = -1 / (N p)`` at the target, 0 elsewhere."""
    exact = 0.0 - _one_hot(p, target) / len(p) / np.where(p > 0, p, 1.0)
    bound = precision.gamma(4) * np.abs(exact)
    # 1 / N is stored before it is divided by p.
    stored = precision.stored(exact, precision.stored(exact, bound)) + precision.tiny
    return exact, np.where(p > 0, stored, np.inf)


def _loss_of_log_probabilities(
    y: Array, target: Array, precision: Precision
) -> tuple[Array, Array]:
    """``dL/dy = -1 / N`` at the target, 0 elsewhere."""
    exact = 0.0 - _one_hot(y, target) / len(y)
    return exact, precision.stored(exact, precision.gamma(3) * np.abs(exact)) + precision.tiny


def _loss_of_logits(z: Array, target: Array, precision: Precision) -> tuple[Array, Array]:
    """``dL/dz = (softmax(z) - one_hot) / N``."""
    p = reference.softmax(z)
    one_hot = _one_hot(z, target)
    exact = (p - one_hot) / len(z)
    # exp(log_softmax(z)): the log-probabilities are stored in between.
    error = bounds.log_softmax(z, np.zeros_like(z), precision)
    error = p * np.expm1(error) + precision.gamma(10) * (p + one_hot)
    # 1 / N is stored before it is multiplied.
    return exact, precision.stored(exact, precision.stored(exact, error / len(z) + precision.tiny))


_LOSSES: dict[Callable[..., Array], tuple[Callable[..., Tensor], Callable[..., Any]]] = {
    reference.softmax: (lambda p, t: F.nll_loss(p.log(), t), _loss_of_probabilities),
    reference.log_softmax: (F.nll_loss, _loss_of_log_probabilities),
    reference.identity: (F.cross_entropy, _loss_of_logits),
}
