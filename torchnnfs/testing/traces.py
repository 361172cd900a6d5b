"""Traces: what went into and came out of each place, and the hooks that see it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from torchnnfs.testing.values import GIVEN, RefusedError, convert, to_array

#: From the input that a module got to what takes the place of its output.
Formula = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Call:
    """One call of one module: what went in and what came out, exactly, as arrays."""

    path: str  # of the module in the model
    kind: str  # the name of its type
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any  # tuples, lists and dictionaries of arrays as well

    @property
    def input(self) -> Any:
        """The first argument: all that a layer with a formula takes."""
        return next(iter((*self.args, *self.kwargs.values())), None)


@dataclass(frozen=True)
class Trace:
    """What a candidate showed."""

    name: str
    device: str
    dtype: str  # as NumPy spells it
    calls: tuple[Call, ...]  # of the places that it shows, in order
    output: Any  # tuples, lists and dictionaries of arrays as well
    again: Any = None  # the output of a second run


def readable(value: Any) -> Any:
    """The numbers as an array; None for those that cannot be read, as inside of `torch.vmap`."""
    try:
        return to_array(value)
    except (RefusedError, RuntimeError):
        return None


@contextmanager
def watched(
    modules: Mapping[str, nn.Module],
    calls: list[Call],
    keep: Callable[[Any], Any] = readable,
    hand_on: Callable[[Any], Any] = lambda kept: None,
) -> Iterator[None]:
    """Append each call of each module to `calls`, in the order of their ends; `keep` of numbers.

    What `hand_on` makes of what was kept, if not None, takes the place of the original.
    """
    given: list[tuple[nn.Module, Any, Any]] = []

    # Kept before the call: the layer may work in place, and hooks on gradients come behind it.
    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        kept = convert((args, kwargs), Tensor, keep)
        given.append((module, *kept))
        return hand_on(kept)

    def after(path: str, module: nn.Module, args: Any, output: Any) -> Any:
        while (entry := given.pop())[0] is not module:
            pass  # it raised, and the model caught that
        kept = convert(output, GIVEN, keep)
        calls.append(Call(path, type(module).__name__, *entry[1:], kept))
        return hand_on(kept)

    with ExitStack() as hooks:
        for path, module in modules.items():
            hooks.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(partial(after, path)))
        yield


@contextmanager
def lent(
    model: nn.Module, layers: Mapping[str, Mapping[str, str]], state: Mapping[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Stand-ins for the parameters in `state` while their layers are called, with their hooks.

    Their gradients are of these calls alone, wherever else the model uses the parameters.

    Args:
        model: the model, which runs with `state`.
        layers: by the path of each layer, what the model calls the layer's parameters.
        state: the model's parameters by their names.
    """
    own = {name: state[name].clone() for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        own[name].data = state[name].data  # the same numbers, also when a forward changes them
        same = (own[name].dtype, own[name].device) == (parameter.dtype, parameter.device)
        if same and parameter.requires_grad:
            for hook in (parameter._backward_hooks or {}).values():
                own[name].register_hook(hook)  # type: ignore[no-untyped-call]

    def put(path: str, back: bool, module: nn.Module, *_: Any) -> None:
        now, then = (own, state) if back else (state, own)
        parameters: dict[str, Any] = module._parameters
        for key, name in layers[path].items():
            if parameters.get(key) is now[name]:
                parameters[key] = then[name]

    with ExitStack() as hooks:
        for path in layers:
            module, back = model.get_submodule(path), partial(put, path, True)
            hooks.enter_context(module.register_forward_pre_hook(partial(put, path, False)))
            # First of all hooks, which may use the parameter as well, and also behind an error.
            first = module.register_forward_hook(back, prepend=True, always_call=True)
            hooks.enter_context(first)
        yield own
