"""What the book's layers keep of a forward pass, and torch's modules do not."""

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from torchnnfs.checks import check_numbers

Inputs = ArrayLike | Tensor


class _Kept:
    """An attribute that is kept as a tensor or an array, and is an array when it is read."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = "_" + name

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        kept = None if layer is None else vars(layer).get(self.name)
        if isinstance(kept, Tensor):
            kept = vars(layer)[self.name] = _to_numpy(kept)
        return kept

    def __set__(self, layer: Any, value: Any) -> None:
        vars(layer)[self.name] = value.detach() if isinstance(value, Tensor) else value

    def __delete__(self, layer: Any) -> None:
        vars(layer).pop(self.name, None)


class Keeps(nn.Module):
    """What the book's objects have and torch's modules have not."""

    inputs, output = _Kept(), _Kept()

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module would register a linked layer, or a parameter under the name of a property.
        if isinstance(value, Keeps) or hasattr(type(self), name):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _tensor(self, inputs: Any, device: torch.device | None = None) -> Tensor:
        """A tensor as it is; arrays and lists with the dtype that NumPy gives them, on `device`."""
        if isinstance(inputs, Tensor) and not inputs.is_complex():
            return inputs
        return check_numbers(type(self).__name__, inputs).to(device)

    def _keep(self, inputs: Any, x: Tensor, result: Tensor) -> Tensor:
        # A copy: what is written to the output must not reach what autograd has kept.
        taken = inputs if isinstance(inputs, np.ndarray) else x.detach()
        kept: tuple[Any, Any] = taken, result.detach().clone()
        if not torch.compiler.is_compiling():
            try:
                result.data_ptr()
            except RuntimeError:  # there are no values inside a transformation like vmap
                kept = None, None
        # In this form dynamo follows it, in older versions of torch, too.
        object.__setattr__(self, "_inputs", kept[0])
        object.__setattr__(self, "_output", kept[1])
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


def _to_numpy(x: Tensor) -> NDArray[Any]:
    return (x.float() if x.dtype == torch.bfloat16 else x).detach().cpu().numpy()
