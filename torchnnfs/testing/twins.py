"""Which NumPy computation each type of module stands for, and how far it may stray from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchnnfs.testing import bounds, reference
from torchnnfs.testing.reference import Array


@dataclass(frozen=True)
class Twin:
    """The NumPy side of a module type.

    Attributes:
        forward: ``forward(x, **arguments)``, the computation.
        bound: ``bound(x, error, precision, **arguments)``, see `torchnnfs.testing.bounds`.
        arguments: reads the arguments off a module, its parameters as float64 arrays.
    """

    forward: Callable[..., Array]
    bound: Callable[..., Array]
    arguments: Callable[[Any], dict[str, Any]]


def _dense_arguments(layer: nn.Linear) -> dict[str, Any]:
    biases = None if layer.bias is None else to_numpy(layer.bias)
    return {"weights": to_numpy(layer.weight).T, "biases": biases}


_TWINS: dict[type[nn.Module], Twin] = {
    nn.Linear: Twin(reference.dense, bounds.dense, _dense_arguments),
    nn.ReLU: Twin(reference.relu, bounds.relu, lambda layer: {}),
    nn.Softmax: Twin(reference.softmax, bounds.softmax, lambda layer: {"dim": layer.dim}),
}


def find_twin(layer: nn.Module) -> Twin | None:
    """The twin of the layer's type or of the nearest type it derives from."""
    return next((_TWINS[kind] for kind in type(layer).__mro__ if kind in _TWINS), None)


def twin_of(layer: nn.Module) -> Twin:
    """The twin of a layer that `find_layers` gave."""
    twin = find_twin(layer)
    assert twin is not None
    return twin


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of `model` that have a twin, by their path in it, in order of registration.

    Raises:
        TypeError: a module without children that has no twin.
    """
    layers: dict[str, nn.Module] = {}
    for path, layer in _walk(model, ""):
        if not any(layer is known for known in layers.values()):
            layers[path] = layer
    return layers


def _walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    if find_twin(module) is not None:
        yield path, module
        return
    children = list(module.named_children())
    if not children:
        known = ", ".join(sorted(kind.__name__ for kind in _TWINS))
        where = f"at {path!r} " if path else ""
        raise TypeError(
            f"compare knows no NumPy computation for {type(module).__name__} {where}in the model; "
            f"it knows {known} and what derives from them"
        )
    for name, child in children:
        yield from _walk(child, f"{path}.{name}" if path else name)


def is_chain(model: nn.Module) -> bool:
    """Whether `model` is one layer after the other: a layer, or a Sequential of chains."""
    if find_twin(model) is not None:
        return True
    plain = type(model).forward is nn.Sequential.forward
    return plain and all(is_chain(child) for child in model.children())


def to_numpy(tensor: Tensor) -> Array:
    """The tensor's exact values as a float64 array of its own."""
    # First to the CPU: not every accelerator has float64.
    array: Array = np.array(tensor.detach().cpu().to(torch.float64).numpy())
    return array
