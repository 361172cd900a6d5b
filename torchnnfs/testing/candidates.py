"""Who is judged: each way of computing a model, in a few lines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from torchnnfs.streams import book_numpy
from torchnnfs.testing.reference import Array
from torchnnfs.testing.twins import find_layers, to_numpy, twin_of


class Call(NamedTuple):
    """One call of one layer: what went in and what came out, exactly, as float64 arrays."""

    path: str
    layer: nn.Module
    input: Array
    output: Array


@dataclass(frozen=True)
class Candidate:
    """A way of computing a model.

    Attributes:
        name: "eager" is torch as it is; "numpy" is the book's NumPy, on the CPU in float32.
        device: where it computes.
        dtype: what parameters and input are cast to first.
    """

    name: str = "eager"
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.name not in RUNNERS:
            raise ValueError(f"unknown candidate {self.name!r}; known are {', '.join(RUNNERS)}")
        if self.dtype not in DTYPES.values():
            raise ValueError(f"candidates compute in {', '.join(DTYPES)}, got {self.dtype}")

    @property
    def dtype_name(self) -> str:
        """The dtype as NumPy spells it."""
        return str(self.dtype).removeprefix("torch.")


#: The dtypes that can be judged, by name.
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def devices_here() -> list[torch.device]:
    """The CPU and every accelerator of this machine."""
    if not torch.accelerator.is_available():
        return [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    count = torch.accelerator.device_count()
    return [torch.device("cpu"), *(torch.device(accelerator.type, i) for i in range(count))]


def choose(
    names: Sequence[str] = ("eager", "numpy"),
    devices: Sequence[torch.device] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
) -> list[Candidate]:
    """The candidates of these names, on each device and in each dtype; "numpy" only once."""
    devices = devices_here() if devices is None else devices
    chosen: list[Candidate] = []
    for name in names:
        if name == "numpy":
            chosen.append(Candidate("numpy"))
        else:
            chosen += [Candidate(name, device, dtype) for device in devices for dtype in dtypes]
    return chosen


def _watch(model: nn.Module, input: Tensor, after: Callable[..., Tensor | None]) -> None:
    """Run `model`, and `after(path, layer, input, output)` behind each call of each layer.

    What `after` returns, if anything, takes the place of the output.
    """
    handles = []
    try:
        for path, layer in find_layers(model).items():
            received: list[Tensor] = []

            # The input is copied before the call, for the layer may work in place.
            def before(
                layer: nn.Module, args: tuple[Any, ...], received: list[Tensor] = received
            ) -> None:
                received.append(args[0].detach().clone())

            def behind(
                layer: nn.Module,
                args: tuple[Any, ...],
                output: Tensor,
                path: str = path,
                received: list[Tensor] = received,
            ) -> Tensor | None:
                return after(path, layer, received.pop(), output)

            handles.append(layer.register_forward_pre_hook(before))
            handles.append(layer.register_forward_hook(behind))
        with torch.no_grad():
            model(input)
    finally:
        for handle in handles:
            handle.remove()


def _eager(model: nn.Module, input: Tensor) -> list[Call]:
    calls: list[Call] = []

    def after(path: str, layer: nn.Module, received: Tensor, output: Tensor) -> None:
        calls.append(Call(path, layer, to_numpy(received), to_numpy(output)))

    _watch(model, input, after)
    return calls


def _numpy(model: nn.Module, input: Tensor) -> list[Call]:
    calls: list[Call] = []

    def after(path: str, layer: nn.Module, received: Tensor, output: Tensor) -> Tensor:
        twin = twin_of(layer)
        arguments = {
            name: value.astype(np.float32) if isinstance(value, np.ndarray) else value
            for name, value in twin.arguments(layer).items()
        }
        computed = twin.forward(received.numpy(), **arguments)
        calls.append(Call(path, layer, to_numpy(received), computed.astype(np.float64)))
        return torch.from_numpy(computed)

    with book_numpy(), np.errstate(all="ignore"):
        _watch(model, input, after)
    return calls


RUNNERS: dict[str, Callable[[nn.Module, Tensor], list[Call]]] = {"eager": _eager, "numpy": _numpy}
