"""Traces: what went into and came out of each place, and the hooks that see it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from torchnnfs.testing.models import convert, to_numpy

#: From a module and the input it got to what takes the place of its output.
Formula = Callable[[nn.Module, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Call:
    """One call of one module: what went in and what came out, exactly, as arrays.

    Attributes:
        path: of the module in the model.
        kind: the name of its type.
        args: its arguments.
        kwargs: its keyword arguments.
        output: its result; tuples, lists and dictionaries of arrays as well.
    """

    path: str
    kind: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def input(self) -> Any:
        """The first argument: all that a layer with a formula takes."""
        return next(iter((*self.args, *self.kwargs.values())))


@dataclass(frozen=True)
class Trace:
    """What a candidate showed.

    Attributes:
        name: the candidate's.
        device: where it computed.
        dtype: what it computed in, as NumPy spells it.
        calls: the calls of the places that it shows, in order.
        output: the result; tuples, lists and dictionaries of arrays as well.
        again: the result of a second run; None where there was none.
    """

    name: str
    device: str
    dtype: str
    calls: tuple[Call, ...]
    output: Any
    again: Any = None


@contextmanager
def hooked(
    modules: Mapping[str, nn.Module], before: Callable[..., None], after: Callable[..., Any]
) -> Iterator[None]:
    """``before(path, args, kwargs)`` and ``after(path, module, output)`` around each call.

    What `after` returns, unless it is None, takes the place of the output.
    """
    handles = []
    try:
        for path, module in modules.items():
            handles += [
                module.register_forward_pre_hook(
                    lambda module, args, kwargs, path=path: before(path, args, kwargs),
                    with_kwargs=True,
                ),
                module.register_forward_hook(
                    lambda module, args, output, path=path: after(path, module, output)
                ),
            ]
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watched(modules: Mapping[str, nn.Module], calls: list[Call]) -> Iterator[None]:
    """Append each call of each module to `calls`, in the order of their ends."""
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    # The input is copied before the call, for the layer may work in place.
    def before(path: str, args: Any, kwargs: Any) -> None:
        given.append((convert(args, Tensor, to_numpy), convert(kwargs, Tensor, to_numpy)))

    def after(path: str, module: nn.Module, output: Any) -> None:
        result = convert(output, Tensor, to_numpy)
        calls.append(Call(path, type(module).__name__, *given.pop(), result))

    with hooked(modules, before, after):
        yield
