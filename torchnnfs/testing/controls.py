"""Deliberately broken twins of a model: what a judge has to reject to be believed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchnnfs.testing.twins import chain_paths, find_layers, is_chain


@dataclass(frozen=True)
class Control:
    """One broken twin and what the judge said of it.

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


class NotHereError(Exception):
    """The network has nothing that could be broken in this way."""


#: Breaks a copy of a model in place and returns the path of the layer.
Break = Callable[[nn.Module, Tensor], str]


def find_first(model: nn.Module, kind: type[nn.Module]) -> tuple[str, Any]:
    """Path and module of the first layer of that type; `NotHereError` without one."""
    return _of(model, kind)[0]


def find_last(model: nn.Module, kind: type[nn.Module]) -> tuple[str, Any]:
    """Path and module of the last layer of that type; `NotHereError` without one."""
    return _of(model, kind)[-1]


def _of(model: nn.Module, kind: type[nn.Module]) -> list[tuple[str, Any]]:
    found = [(path, each) for path, each in find_layers(model).items() if isinstance(each, kind)]
    if not found:
        raise NotHereError(f"no {kind.__name__} in this network")
    return found


def _set_weight(path: str, layer: Any, weight: Tensor) -> None:
    if parametrize.is_parametrized(layer):
        raise NotHereError(f"the weight of layer {path} is parametrized")
    with torch.no_grad():
        layer.weight.copy_(weight)


def _replace(layer: Any, forward: Callable[[Tensor], Tensor]) -> None:
    layer.forward = lambda *args, **named: forward(*args, *named.values())


def _relu(change: Callable[[Tensor], Tensor]) -> Break:
    def break_(model: nn.Module, input: Tensor) -> str:
        path, layer = find_first(model, nn.ReLU)
        _replace(layer, change)
        return path

    return break_


def _leaky(slope: float) -> Break:
    return _relu(lambda x: torch.where(x > 0, x, slope * x))


def _weight(change: Callable[[Tensor], Tensor]) -> Break:
    def break_(model: nn.Module, input: Tensor) -> str:
        path, layer = find_first(model, nn.Linear)
        _set_weight(path, layer, change(layer.weight.detach().clone()))
        return path

    return break_


def _transposed(model: nn.Module, input: Tensor) -> str:
    for path, layer in find_layers(model).items():
        if isinstance(layer, nn.Linear) and 1 < layer.in_features == layer.out_features:
            _set_weight(path, layer, layer.weight.detach().T.clone())
            return path
    raise NotHereError("no square weight matrix in this network")


def _permuted(model: nn.Module, input: Tensor) -> str:
    path, layer = find_first(model, nn.Linear)
    if layer.in_features == layer.out_features == 1:
        raise NotHereError(f"the weight matrix of layer {path} has a single element")
    _set_weight(path, layer, layer.weight.detach().flatten().roll(1).view_as(layer.weight))
    return path


def _bias(model: nn.Module, input: Tensor) -> str:
    path, layer = find_first(model, nn.Linear)
    whole = layer.forward
    _replace(layer, lambda x: whole(x) + 1e-6)
    return path


def _output(change: Callable[[Tensor], Tensor]) -> Break:
    def break_(model: nn.Module, input: Tensor) -> str:
        layers = find_layers(model)
        path = chain_paths(model)[-1] if is_chain(model) else list(layers)[-1]
        layer: Any = layers[path]
        whole = layer.forward
        _replace(layer, lambda x: change(whole(x)))
        return path

    return break_


def _swapped(output: Tensor) -> Tensor:
    if output.shape[-1] < 2:
        raise NotHereError("a single class")
    return output.flip(-1)


def _axis(model: nn.Module, input: Tensor) -> str:
    path, layer = find_last(model, nn.Softmax)
    if input.ndim < 2:
        raise NotHereError("an input of one dimension has no other axis")
    _replace(layer, lambda x: x.softmax(-2 if layer.dim in (-1, x.ndim - 1) else -1))
    return path


def _unshifted(model: nn.Module, input: Tensor) -> str:
    path, layer = find_last(model, nn.Softmax)
    _replace(layer, lambda x: x.exp() / x.exp().sum(layer.dim, keepdim=True))
    return path


def _rounded(bits: int, smallest: float = 0.0) -> Callable[[Tensor], Tensor]:
    """Round to that many significant bits, and to multiples of `smallest`."""

    def round_(x: Tensor) -> Tensor:
        exact = x.cpu().double()  # not every device has float64
        unit = torch.ldexp(torch.ones_like(exact), torch.frexp(exact)[1] - bits)
        unit = unit.clamp(min=smallest)
        return (exact / unit).round() * unit

    return round_


def _parameters(change: Callable[[Tensor], Tensor]) -> Break:
    def break_(model: nn.Module, input: Tensor) -> str:
        find_first(model, nn.Linear)
        changed = []
        for path, layer in find_layers(model).items():
            for parameter in layer.parameters(recurse=False):
                before = parameter.detach().clone()
                with torch.no_grad():
                    parameter.copy_(change(before))
                if not torch.equal(before, parameter):
                    changed.append(path)
        if not changed:
            raise NotHereError("all parameters are such numbers already")
        return changed[0]

    return break_


#: The control that is judged on logits of size 100, at the layer alone.
UNSHIFTED = "softmax without the maximum subtracted, on logits of size 100"

BREAKS: dict[str, Break] = {
    "ReLU left out": _relu(lambda x: x),
    "leaky ReLU, slope 1e-2": _leaky(1e-2),
    "leaky ReLU, slope 1e-4": _leaky(1e-4),
    "a weight matrix transposed": _transposed,
    "a weight matrix permuted": _permuted,
    "a weight matrix times 1 + 1e-5": _weight(lambda weight: weight * (1 + 1e-5)),
    "a bias of 1e-6": _bias,
    "constant output": _output(lambda output: torch.full_like(output, 1 / output.shape[-1])),
    "swapped classes": _output(_swapped),
    "softmax over the wrong axis": _axis,
    UNSHIFTED: _unshifted,
    "parameters rounded to TF32": _parameters(_rounded(11)),
    "parameters rounded to bfloat16": _parameters(_rounded(8)),
    "parameters rounded to float16": _parameters(_rounded(11, 2.0**-24)),
}
