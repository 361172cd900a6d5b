"""Which NumPy computation each type of module stands for, and how far it may stray from it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchnnfs.testing import bounds, reference
from torchnnfs.testing.bounds import Precision
from torchnnfs.testing.reference import Array

#: What a layer without a bound of its own may be off by, in units roundoff of its largest output.
FACTOR = 64


@dataclass(frozen=True)
class Twin:
    """The NumPy side of a module type.

    Attributes:
        forward: ``forward(x, **arguments)``, the computation.
        bound: ``bound(x, error, precision, **arguments)``, see `torchnnfs.testing.bounds`; None
            where nothing better is known than `FACTOR` units roundoff of the largest output.
        arguments: reads the arguments off a module, its parameters as float64 arrays.
    """

    forward: Callable[..., Array]
    bound: Callable[..., Array] | None
    arguments: Callable[[Any], dict[str, Any]]

    def compute(
        self, x: Array, error: Array | None, precision: Precision, arguments: dict[str, Any]
    ) -> tuple[Array, Array]:
        """The exact output and how far a computed one may be from it.

        `error` is that of the input, None for an exact input.
        """
        with np.errstate(all="ignore"):
            exact = self.forward(x, **arguments)
            if self.bound is not None:
                error = np.zeros_like(x) if error is None else error
                return exact, self.bound(x, error, precision, **arguments)
            assert error is None
            size = np.max(np.abs(exact), initial=0.0, where=np.isfinite(exact))
            return exact, precision.stored(
                exact, np.full_like(exact, FACTOR * precision.unit * size + precision.tiny)
            )


def _dense_arguments(layer: nn.Linear) -> dict[str, Any]:
    biases = None if layer.bias is None else to_numpy(layer.bias)
    return {"weights": to_numpy(layer.weight).T, "biases": biases}


def _dropout_arguments(layer: nn.Dropout) -> dict[str, Any]:
    if layer.training and layer.p > 0:
        raise ValueError(
            f"compare expects {layer} to be in eval mode, got it in training mode, where it is "
            "random; call model.eval() first"
        )
    return {}


def _dim(layer: Any) -> dict[str, Any]:
    if layer.dim is None:
        raise ValueError(f"compare expects {type(layer).__name__} to name its dim, got {layer}")
    return {"dim": layer.dim}


_NOTHING: Callable[[Any], dict[str, Any]] = lambda layer: {}  # noqa: E731
_TWINS: dict[type[nn.Module], Twin] = {
    nn.Linear: Twin(reference.dense, bounds.dense, _dense_arguments),
    nn.ReLU: Twin(reference.relu, bounds.relu, _NOTHING),
    nn.Softmax: Twin(reference.softmax, bounds.softmax, _dim),
    nn.LogSoftmax: Twin(reference.log_softmax, bounds.log_softmax, _dim),
    nn.Identity: Twin(reference.identity, bounds.identity, _NOTHING),
    nn.Dropout: Twin(reference.identity, bounds.identity, _dropout_arguments),
    nn.Flatten: Twin(
        reference.flatten,
        bounds.flatten,
        lambda layer: {"start_dim": layer.start_dim, "end_dim": layer.end_dim},
    ),
}


def register(
    module_type: type[nn.Module],
    forward: Callable[..., Array] | None = None,
    bound: Callable[..., Array] | None = None,
    arguments: Callable[[Any], dict[str, Any]] = _NOTHING,
) -> None:
    """Let `compare` judge layers of a type of your own, and of what derives from it.

    Args:
        module_type: the type.
        forward: its computation in NumPy, ``forward(x, **arguments(layer))``, on float64 arrays;
            None: a float64 run of the layer itself, which shows its rounding and nothing else.
        bound: ``bound(x, error, precision, **arguments(layer))``, as in
            `torchnnfs.testing.bounds`; None: 64 units roundoff of the largest output, and the rows
            say so.
        arguments: reads the arguments off a layer, its parameters as float64 arrays.

    Raises:
        TypeError: `module_type` is no type of module.

    Example:
        >>> import numpy as np
        >>> from torch import nn
        >>> from torchnnfs import Dense, compare, spiral
        >>> class Square(nn.Module):
        ...     def forward(self, input):
        ...         return input * input
        >>> register(Square, np.square)
        >>> compare(nn.Sequential(Dense(2, 3), Square()), spiral()[0]).ok
        True
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"register expects a type of torch.nn.Module, got {module_type!r}")
    if forward is None:
        forward, arguments = _run_itself, lambda layer: {"layer": layer}
    _TWINS[module_type] = Twin(forward, bound, arguments)


def _run_itself(x: Array, layer: nn.Module) -> Array:
    alone = copy.deepcopy(layer).to("cpu", torch.float64)
    # By its forward, not by a call: the hooks that watch the layer are not part of it.
    with torch.no_grad():
        return to_numpy(alone.forward(torch.from_numpy(x.astype(np.float64))))


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
            f"it knows {known} and what derives from them; "
            "tell it with torchnnfs.testing.register"
        )
    for name, child in children:
        yield from _walk(child, f"{path}.{name}" if path else name)


def chain_paths(model: nn.Module) -> list[str]:
    """The paths of a plain chain's layers in the order of their calls, a shared one each time."""
    paths = {id(layer): path for path, layer in find_layers(model).items()}
    return [paths[id(layer)] for layer in _in_order(model)]


def _in_order(model: nn.Module) -> Iterator[nn.Module]:
    if find_twin(model) is not None:
        yield model
        return
    assert isinstance(model, nn.Sequential)
    for child in model:
        yield from _in_order(child)


def is_chain(model: nn.Module) -> bool:
    """Whether `model` is one layer with a bound after the other, so that errors can be carried."""
    twin = find_twin(model)
    if twin is not None:
        return twin.bound is not None
    plain = type(model).forward is nn.Sequential.forward
    return plain and all(is_chain(child) for child in model.children())


def to_numpy(tensor: Tensor) -> Array:
    """The tensor's exact values as a float64 array of its own."""
    # First to the CPU: not every accelerator has float64.
    array: Array = np.array(tensor.detach().cpu().to(torch.float64).numpy())
    return array
