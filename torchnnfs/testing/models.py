"""Models, and what of them can be judged: the table of layers, the walk, and the run elsewhere.

A *place* is a module of the model at which something is judged. A *step* is a place of the chain
that leads from the input to the output: a layer with a formula, or a module that has its own
forward. A model is always a chain of steps; one with its own forward is a chain of a single one.
"""

import copy
import inspect
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from torchnnfs.testing.layers import Forward, Layer, dense, normalise, pointwise, reshape, softmax
from torchnnfs.testing.precision import Array
from torchnnfs.testing.values import RefusedError, cast, convert, leaves, to_numpy

#: The home of each type of layer. Whatever derives from a type is judged as that type is.
LAYERS: dict[type[nn.Module], Layer] = {
    nn.Linear: dense.DENSE,
    nn.Conv1d: dense.CONV1D,
    nn.Conv2d: dense.CONV2D,
    nn.Embedding: dense.EMBEDDING,
    nn.ReLU: pointwise.RELU,
    nn.LeakyReLU: pointwise.LEAKY_RELU,
    nn.Tanh: pointwise.TANH,
    nn.Sigmoid: pointwise.SIGMOID,
    nn.GELU: pointwise.GELU,
    nn.Identity: pointwise.IDENTITY,
    nn.Dropout: pointwise.DROPOUT,
    nn.Softmax: softmax.SOFTMAX,
    nn.LogSoftmax: softmax.LOG_SOFTMAX,
    nn.LayerNorm: normalise.LAYER_NORM,
    nn.BatchNorm1d: normalise.BATCH_NORM,
    nn.BatchNorm2d: normalise.BATCH_NORM,
    nn.Flatten: reshape.FLATTEN,
    nn.MaxPool2d: reshape.MAX_POOL2D,
    nn.AvgPool2d: reshape.AVG_POOL2D,
}

#: How the arguments of a registered formula are read off a layer, where that was said.
_READERS: dict[Layer, Callable[[Any], dict[str, Any]]] = {}


def register(
    module_type: type[nn.Module],
    forward: Forward | None = None,
    bound: Callable[..., Array] | None = None,
    arguments: Callable[[Any], dict[str, Any]] | None = None,
    *,
    like: type[nn.Module] | None = None,
) -> None:
    """Let `compare` judge layers of a type of your own, and of what derives from it.

    Args:
        module_type: the type.
        forward: its formula in NumPy, ``forward(x, **arguments)``, on float64 arrays.
        bound: ``bound(x, error, precision, **arguments)``: how far a computed output may stray when
            the input has the error `error`; see `torchnnfs.testing.layers.Layer`. None: it is
            estimated, and the rows say so.
        arguments: reads the arguments off a layer, its parameters as float64 arrays. None: they
            are the layer's attributes of the same names as the formula's parameters behind `x`.
        like: a type that is known already; the layer is judged as that type is. Takes the place of
            a formula.

    Raises:
        TypeError: `module_type` is no type of module; neither or both of `forward` and `like`;
            `like` is a type that is not known.

    Example:
        >>> import numpy as np
        >>> from torch import nn
        >>> from torchnnfs import Dense, compare, spiral
        >>> class Square(nn.Module):
        ...     def forward(self, input):
        ...         return input * input
        >>> register(Square, lambda x: x * x)
        >>> compare(nn.Sequential(Dense(2, 3), Square()), spiral()[0]).ok
        True
    """
    if not (isinstance(module_type, type) and issubclass(module_type, nn.Module)):
        raise TypeError(f"register expects a type of torch.nn.Module, got {module_type!r}")
    if (forward is None) == (like is None):
        raise TypeError(
            f"register expects for {module_type.__name__} either a formula or like=, a type that "
            f"is known, got {'neither' if forward is None else 'both'}"
        )
    if forward is not None:
        formula, name = forward, module_type.__name__

        def wrong(x: Array, **arguments: Any) -> Array:
            return np.asarray(formula(x, **arguments) * (1 + 1e-3))

        controls = {f"{name} times 1 + 1e-3": wrong}
        layer = Layer(f"{name}, registered", formula, bound, controls=controls)
    else:
        known = next((kind for kind in getattr(like, "__mro__", ()) if kind in LAYERS), None)
        if known is None:
            names = ", ".join(sorted(kind.__name__ for kind in LAYERS))
            raise TypeError(f"register expects like= to be one of {names}, got {like!r}")
        layer = replace(LAYERS[known])
    LAYERS[module_type] = layer
    if arguments is not None:
        _READERS[layer] = arguments


def layer_of(module: nn.Module) -> Layer | None:
    """What is known of the module's type or of the nearest type it derives from."""
    if (
        getattr(module, "running_mean", 0) is None
        or getattr(module, "max_norm", None) is not None
        or getattr(module, "return_indices", False)
        or any(each.is_complex() for each in module.parameters(recurse=False))
    ):
        return None  # beyond its formula
    return next((LAYERS[kind] for kind in type(module).__mro__ if kind in LAYERS), None)


def arguments_of(module: nn.Module) -> dict[str, Any]:
    """The arguments of the module's formula: its attributes, tensors as float64 arrays."""
    layer, kind = layer_of(module), type(module).__name__
    if layer is None:
        return {}
    if layer.eval_only and module.training and getattr(module, "p", 1) > 0:
        raise RefusedError(
            f"compare expects {module} to be in eval mode, got it in training mode, where it "
            "depends on chance or on the batch; call model.eval() first"
        )
    if layer in _READERS:
        return _READERS[layer](module)
    found = {}
    for name, parameter in list(parameters_of(layer.forward).items())[1:]:
        if hasattr(module, name):
            with torch._C._DisableFuncTorch():  # under torch.func an operation wraps its result
                found[name] = convert(getattr(module, name), Tensor, to_numpy)
        elif parameter.default is parameter.empty:
            raise RefusedError(
                f"compare expects {kind} to have an attribute {name!r}, as its registered formula "
                "takes it; name a reader with register(..., arguments=...)"
            )
    if found.get("dim", 0) is None:
        raise RefusedError(
            f"compare expects {kind} to name its dim, got {module}; write {kind}(dim=-1) for the "
            "last one"
        )
    return found


def parameters_of(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The parameters of a function by their names; none of a function in C without a signature."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
    various = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {name: each for name, each in parameters.items() if each.kind not in various}


def takes(x: Any, layer: Layer) -> TypeGuard[Array]:
    """Whether the layer's formula is one of such an input: real numbers along an axis or more."""
    if not isinstance(x, np.ndarray) or not x.size or not x.ndim or x.dtype.kind == "c":
        return False
    return x.dtype.kind == "f" or "pool" not in layer.name  # torch's means of integers are integers


@contextmanager
def computable(module: nn.Module, layer: Layer, x: Array) -> Iterator[None]:
    """Say it where a formula cannot compute: the module may be another layer than its type says."""
    try:
        yield
    except (TypeError, ValueError) as failure:
        raise RefusedError(
            f"{type(module).__name__} is judged as {layer.name}, whose formula cannot compute from "
            f"an input of shape {x.shape} ({failure}); if it is another layer, tell "
            "torchnnfs.testing.register"
        ) from failure


@dataclass(frozen=True)
class Place:
    """A module of the model at which something is judged."""

    path: str
    module: nn.Module
    layer: Layer | None  # what is known of its kind; else its own float64 run judges it
    step: bool  # of the chain

    @property
    def kind(self) -> str:
        """The name of the module's type."""
        return type(self.module).__name__

    @property
    def label(self) -> str:
        """How rows name the place; the whole of a model with its own forward is "(output)"."""
        return self.path or ("" if self.layer else "(output)")

    @property
    def title(self) -> str:
        """The label and the type."""
        return f"{self.label} {self.kind}".strip()


def walk(model: nn.Module) -> list[Place]:
    """The places of `model`, the steps in the order of their calls, shared ones each time.

    Inside a module with its own forward the layers are places, in the order of registration.
    """
    first: dict[int, str] = {}

    def visit(module: nn.Module, path: str, step: bool) -> Iterator[Place]:
        layer, children = layer_of(module), module._modules
        plain = type(module).forward is nn.Sequential.forward and "forward" not in vars(module)
        if layer is not None or not children or (step and not plain):
            yield Place(first.setdefault(id(module), path), module, layer, step)
        if layer is None:
            for name, child in children.items():
                if child is not None:
                    yield from visit(child, f"{path}.{name}" if path else name, step and plain)

    return list(visit(model, "", True))


def cast_input(model: nn.Module, input: Any, device: torch.device | str, dtype: torch.dtype) -> Any:
    """A copy of the model's input in `dtype`; a model of several dtypes may take any of them."""
    own = own_dtype(model, input) == dtype
    return cast(input, device, dtype, {each.dtype for each in model.parameters()} if own else ())


def stored_dtype(model: nn.Module, input: Any, dtype: torch.dtype) -> torch.dtype | None:
    """What the model's numbers are cast to; None, as they are, where the dtype is the model's."""
    return None if own_dtype(model, input) == dtype else dtype


def own_dtype(model: nn.Module, input: Any) -> torch.dtype:
    """The dtype of most of the model's numbers; without parameters, that of the input."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in (*model.parameters(), *leaves(input).values()):
        if tensor.is_floating_point() or tensor.is_complex():
            sizes[tensor.dtype.to_real()] += tensor.numel() * isinstance(tensor, nn.Parameter)
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def state_of(
    model: nn.Module, device: torch.device | str, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Copies of the model's parameters and buffers by their names, as `cast` makes them."""
    named = dict([*model.named_parameters(), *model.named_buffers()])
    return {name: cast(tensor, device, dtype) for name, tensor in named.items()}


_BORROWED = threading.RLock()


@contextmanager
def borrowed(
    model: nn.Module,
    device: torch.device | str,
    dtype: torch.dtype | None,
    state: Mapping[str, Tensor] | None = None,
) -> Iterator[Callable[..., Any]]:
    """The model as a function of its arguments, with `state`, or what `state_of` gives.

    The model is not copied: `torch.func.functional_call` puts other tensors in the place of its
    own. Whatever a forward keeps or changes in the model is undone behind the block. Until then
    no other thread can use the model.
    """
    others = dict(state_of(model, device, dtype) if state is None else state)

    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return functional_call(model, others, args, kwargs)
        except (RefusedError, Warning):
            raise
        except Exception as error:
            raise ValueError(_failure(model, error, (args, kwargs))) from error

    with _BORROWED, ExitStack() as undo:
        undo.callback(torch.set_default_dtype, torch.get_default_dtype())
        for module in model.modules():
            _keep(module, undo)
            for name, value in list(vars(module).items()):
                if isinstance(value, Tensor):
                    vars(module)[name] = cast(value, device, dtype)
        if dtype is not None and own_dtype(model, ()) != dtype:
            torch.set_default_dtype(dtype)  # for tensors that a forward makes
        yield run


def _failure(model: nn.Module, error: Exception, given: Any) -> str:
    """Which module of the model raised what, and what the model was given."""
    paths = {id(module): path for path, module in model.named_modules()}
    where = type(model).__name__
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if id(module) in paths:
            where = f"{paths[id(module)]} {type(module).__name__}".strip()
    tensors = [f"{tuple(each.shape)} in {each.dtype}" for each in leaves(given).values()]
    words = f"{where} raised {type(error).__name__}: {error}; the input was {', '.join(tensors)}"
    if "does not require grad" in words:
        words += "; compare runs it under torch.no_grad(), and torch.enable_grad() undoes that"
    return words


#: What nothing can be written into, and most of what models keep.
_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device)


def _keep(module: nn.Module, undo: ExitStack) -> None:
    """Let `undo` restore the module's attributes after a forward that changes them.

    Also what is in their containers, in tensors there, and in objects that are no modules, such as
    a cache with layers; not further, where a whole program may hang on an object.
    """
    attributes = dict(vars(module))
    # The module's own tensors are not those that compute.
    own = [*attributes.values(), *module._parameters.values(), *module._buffers.values()]
    seen: dict[int, Any] = {id(each): each for each in own if isinstance(each, Tensor)}

    def keep(value: Any, objects: int = 2) -> None:
        if id(value) in seen or isinstance(value, nn.Module | type | ModuleType):
            return
        seen[id(value)] = value
        inner = vars(value) if hasattr(value, "__dict__") and not callable(value) else ()
        if isinstance(value, Tensor):
            if value.layout == torch.strided and not (value.is_meta or value.is_quantized):
                undo.callback(_rewrite, value, value.detach().clone())
        elif isinstance(value, torch.Generator):
            undo.callback(value.set_state, value.get_state())
        elif isinstance(value, np.ndarray):
            if value.flags.writeable:
                undo.callback(np.copyto, value, value.copy())
        elif isinstance(value, dict | list | set | deque | tuple):
            entries = dict(value) if isinstance(value, dict) else list(value)
            if not isinstance(value, tuple):
                undo.callback(_refill, value, entries)
            for each in entries.values() if isinstance(entries, dict) else entries:
                if not isinstance(each, _PLAIN):
                    keep(each, objects)
        elif inner and objects:
            keep(inner, objects - 1)

    def restore() -> None:
        vars(module).clear()
        vars(module).update(attributes)

    undo.callback(restore)
    for each in attributes.values():
        keep(each)


def _rewrite(tensor: Tensor, numbers: Tensor) -> None:
    if tensor.shape != numbers.shape:
        with torch.no_grad():
            tensor.set_(numbers.untyped_storage(), 0, numbers.shape, numbers.stride())
    elif not ((tensor == numbers) | (tensor != tensor) & (numbers != numbers)).all():
        tensor.detach().copy_(numbers)  # and not in vain: autograd is told of each write


def _refill(container: Any, entries: Any) -> None:
    if isinstance(container, dict):
        same = [*map(id, container.values())] == [*map(id, entries.values())]
        same = same and [*container] == [*entries]
    else:
        same = [*map(id, container)] == [*map(id, entries)]
    if same:  # some containers forbid to be written
        return
    container.clear()
    container.extend(entries) if isinstance(container, list | deque) else container.update(entries)


def copied(model: nn.Module) -> nn.Module:
    """A copy of `model`; tensors with a history, which Python cannot copy, lose it there."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        for tensor in leaves(dict(vars(module))).values():
            if isinstance(tensor, Tensor) and not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(model, memo)
