"""What the book's objects keep of a forward pass, and torch's modules do not."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from torchnnfs.checks import check_numbers

Inputs = ArrayLike | Tensor


class _Kept:
    """An attribute that `forward` keeps as a tensor, and that is an array from its first use on."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        state = {} if layer is None else vars(layer)
        kept = state.get("_" + self.name)
        if kept is not None:
            state[self.name] = _to_numpy(kept)
        return state.get(self.name)


class Keeps(nn.Module):
    """What the book's objects have and torch's modules have not."""

    inputs, output = _Kept(), _Kept()
    _inputs = _output = None

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module would register a linked layer, or a parameter under the name of a property.
        if name in ("inputs", "output") and isinstance(value, Tensor):
            value = _to_numpy(value)
        if isinstance(value, Keeps) or hasattr(type(self), name):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _keep_arrays(self, inputs: NDArray[Any], output: NDArray[Any]) -> None:
        vars(self).update(inputs=inputs, output=output, _inputs=None, _output=None)

    def _keep(self, inputs: Any, x: Tensor, result: Tensor) -> Tensor:
        for name in ("inputs", "output"):
            vars(self).pop(name, None)
        self._inputs, kept = _values(x), _values(result)
        # A copy: what is written to the output must not reach what autograd has kept.
        self._output = kept if kept is None else kept.clone()
        if isinstance(inputs, np.ndarray):
            self.inputs = inputs
        return result

    def _received(self, dvalues: Inputs, kept: Any, *last: int) -> NDArray[Any]:
        """`dvalues` as an array of the shape of what was kept, or with another `last` dimension."""
        name, shape = type(self).__name__, np.shape(kept)
        shape = (*shape[:-1], *last) if last else shape
        if kept is None:
            raise RuntimeError(f"{name}.backward expects a call of {name}.forward before it")
        values = _to_numpy(check_numbers(f"{name}.backward", dvalues))
        if values.shape != shape:
            raise ValueError(
                f"{name}.backward expects dvalues of shape {shape}, as the last output has, "
                f"got {values.shape}"
            )
        return values if values.dtype in (np.float32, np.float64) else values.astype(np.float64)


def as_tensor(owner: str, values: Any, device: torch.device | None = None) -> Tensor:
    """A tensor as it is; arrays and lists with the dtype that NumPy gives them, on `device`."""
    if isinstance(values, Tensor) and not values.is_complex():
        return values
    return check_numbers(owner, values).to(device)


def _to_numpy(x: Tensor) -> NDArray[Any]:
    return (x.float() if x.dtype == torch.bfloat16 else x).detach().cpu().numpy()


def _values(x: Tensor) -> Tensor | None:
    """`x` without history, or None inside a transformation like vmap, where it has no values."""
    x = x.detach()
    try:
        if not torch.compiler.is_compiling():
            x.data_ptr()
    except RuntimeError:
        return None
    return x
