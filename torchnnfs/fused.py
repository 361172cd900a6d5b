"""`fuse`: a chain of Dense, ReLU and Softmax as one pass over the data, forward and backward."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, is_autocast_enabled, is_grad_enabled, nn
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)
from torch.overrides import has_torch_function
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from torchnnfs.kernel import (
    TYPES,
    WIDEST,
    Chain,
    Derived,
    Kernel,
    broken,
    chain,
    formula,
    kernel,
    mean_loss,
    memory,
    warn,
)
from torchnnfs.modules import Dense, LazyDense, ReLU, Softmax

_COMPILED = 8000  # on a CPU, with fewer samples a call of what torch.compile made costs too much

_KNOWN = (Dense, LazyDense, ReLU, Softmax, nn.Linear, nn.ReLU, nn.Softmax)
_PLAIN = frozenset([Tensor, nn.Parameter])
_AGAIN = "the model's layers are not those that fuse saw; call fuse(model) again"
_hooks = itemgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)
_later: dict[type, type] = {LazyDense: Dense}  # what a layer becomes by its first input
_is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]

#: Chains that torch.compile failed at, and why.
_failures: dict[Chain, str] = {}


class _Held(NamedTuple):
    """Parameters as a call read them, in memory that this holds: an address there stays theirs."""

    tensors: list[Tensor]
    values: list[Tensor]
    places: bytes  # as the kernel gets them
    slots: list[tuple[nn.Linear, str, Tensor, int, torch.Size]]


def _into(out: Tensor | None, result: Tensor) -> Tensor:
    """`result`, copied to `out` where one was given."""
    if out is None:
        return result
    if not isinstance(out, Tensor):
        raise TypeError(f"fused(input, out=...) expects a torch.Tensor, got {type(out).__name__}")
    if is_grad_enabled() and (result.requires_grad or out.requires_grad):
        raise RuntimeError(
            "fused(input, out=...) does not support automatic differentiation, and an argument or "
            "a parameter requires grad; call it under torch.no_grad()"
        )
    if out.numel() == 0:
        out.resize_(result.shape)  # as torch's own functions do
    expected, got = (
        f"an out of shape {tuple(each.shape)} and {each.dtype} on {each.device}"
        for each in (result, out)
    )
    if expected != got:
        raise ValueError(f"fused(input, out=...) expects {expected}, got {got}")
    return out.copy_(result)


@functools.cache
def _compiled(chain: Chain) -> Callable[..., Tensor]:
    """What torch.compile makes of the formula, for any number of samples."""
    compiled: Callable[..., Tensor] = torch.compile(
        lambda input, *parameters: formula(input, parameters, *chain[1:]), dynamic=True
    )
    return compiled


class _Structure:
    """The layers of a model in the order of their calls."""

    def __init__(self, model: nn.Sequential) -> None:
        named = list(model.named_modules(remove_duplicate=False))
        self.modules = [(each, _later.get(type(each), type(each))) for _, each in named]
        inner = [each for _, each in named if type(each) is nn.Sequential]
        self.sequences = [(each, [*each._modules.values()]) for each in inner]
        self.layers = [each for _, each in named if type(each) is not nn.Sequential]
        self.dense: list[nn.Linear] = []
        self.relus: list[bool] = []
        self.softmax: nn.Softmax | None = None
        self.reason = ""  # why a kernel cannot compute them in this order
        for layer in self.layers:
            if type(layer) not in _KNOWN:
                raise TypeError(
                    "fuse expects a torch.nn.Sequential of Dense, ReLU and Softmax (or torch's "
                    f"Linear, ReLU and Softmax), got {type(layer).__name__}"
                )
            if self.softmax is not None or not (self.dense or isinstance(layer, nn.Linear)):
                self.reason = f"{type(layer).__name__} breaks the order Dense, ReLU, ..., Softmax"
            elif isinstance(layer, nn.Linear):
                self.dense.append(layer)
                self.relus.append(False)
            elif isinstance(layer, nn.Softmax):
                self.softmax = layer
            else:
                self.relus[-1] = True

    def chain(self) -> Chain:
        """What a kernel for it has to compute, as its parameters are now."""
        widths = (self.dense[0].weight.shape[1], *(len(each.weight) for each in self.dense))
        biases = tuple(each.bias is not None for each in self.dense)
        return Chain(widths, biases, tuple(self.relus), self.softmax is not None)

    def is_changed(self) -> bool:
        """Whether layers were replaced."""
        return any([*each._modules.values()] != layers for each, layers in self.sequences)

    def why_not(self) -> str:
        """Why the layers must compute; "" if they need not."""
        for module, kind in self.modules:
            here = module.__dict__
            if (
                type(module) is not kind
                or "forward" in here
                or here["_forward_hooks"]
                or here["_forward_pre_hooks"]
                or here["_backward_hooks"]
                or here["_backward_pre_hooks"]
            ):
                if type(module) is LazyDense:
                    return "a LazyDense had no input yet"
                if type(module) is not kind:
                    return f"a {kind.__name__} became a {type(module).__name__}"
                return f"a {kind.__name__} has hooks or a forward of its own"
        return self.reason


class _Way:
    """How a chain is computed in one dtype, on the CPU or elsewhere."""

    def __init__(self, structure: _Structure, dtype: torch.dtype, is_cpu: bool) -> None:
        self.dtype, self.chain, dense = dtype, structure.chain(), structure.dense
        self.inputs, self.outputs = self.chain.widths[0], self.chain.widths[-1]
        self.kernel: Kernel | None = None
        self.reason = _failures.get(self.chain, "it is not on the CPU")
        # From how many samples on torch.compile is better than the layers.
        self.compiled = math.inf if self.chain in _failures else 0.0
        if is_cpu and (dtype not in TYPES or max(self.chain.widths) > WIDEST):
            self.reason, self.compiled = f"it is wider than {WIDEST}, or of {dtype}", math.inf
        elif is_cpu:
            found = kernel(self.chain, dtype)
            if isinstance(found, Kernel):
                self.kernel, self.reason = found, ""
            elif os.environ.get("CXX", "c++") in broken:
                self.reason, self.compiled = found, math.inf
            elif self.chain not in _failures:
                self.reason, self.compiled = found, _COMPILED
        self.least = self.kernel.least if self.kernel else self.compiled
        names = ("weight", "bias")
        self._slots = [(e, n) for e in dense for n in names if getattr(e, n) is not None]
        self._bare = [each for each in dense if each.bias is None]
        self._shapes = [getattr(layer, name).shape for layer, name in self._slots]
        self._held: _Held | None = None

    def read(self) -> _Held | str:
        """The parameters as they are now; or why the layers must read them."""
        for layer in self._bare:
            if layer.bias is not None:
                raise RuntimeError(_AGAIN)
        held = self._held
        if held is None:
            return self._hold()
        for layer, name, known, address, shape in held.slots:
            tensor = layer._parameters.get(name)
            if (
                tensor is not known
                or tensor.data_ptr() != address
                or tensor.dtype is not self.dtype
                or tensor.shape != shape
                or not tensor.is_contiguous()
            ):
                return self._hold()
        return held

    def _hold(self) -> _Held | str:
        tensors: list[Any] = []
        for layer, name in self._slots:
            tensor = layer._parameters.get(name)
            if tensor is None and name in layer._parameters:
                raise RuntimeError(_AGAIN)
            if type(tensor) not in _PLAIN:
                return f"a {name} is not a plain tensor, or is computed anew at each call"
            tensors.append(tensor)
        if self.kernel is None:
            return _Held(tensors, [], b"", [])
        values: list[Tensor] = []
        for tensor, shape in zip(tensors, self._shapes, strict=True):
            value = memory(tensor)
            if tensor.shape != shape:
                raise RuntimeError(_AGAIN)
            if value is None or value.dtype != self.dtype or not _is_plain(value):
                return "a parameter is not contiguous memory of the input's dtype and device"
            values.append(value)
        rows = zip(self._slots, tensors, values, self._shapes, strict=True)
        slots = [(*slot, tensor, value.data_ptr(), shape) for slot, tensor, value, shape in rows]
        self._held = held = _Held(tensors, values, self.kernel.places(values), slots)
        return held


def _is_plain(tensor: Tensor) -> bool:
    """Whether a kernel can work on its memory as it is."""
    return tensor.is_cpu and tensor.is_contiguous() and not tensor.is_neg()


class Fused(nn.Sequential):
    """What `fuse` gives; see there."""

    _reason = ""  # why the layers computed the last input

    def __init__(self, *layers: Any) -> None:
        super().__init__(*layers)
        self._follow(nn.Sequential(*layers))

    def _follow(self, model: nn.Sequential) -> None:
        self._modules = model._modules
        self._model = [model]  # in a list, so that it is no submodule
        self._structure = _Structure(model)
        self._ways: dict[Any, _Way] = {}

    @property
    def formulation(self) -> str:
        """How it is computed: "kernel", "torch.compile" or "eager", and why not the first."""
        if self._structure.is_changed():
            return f"none, since {_AGAIN}"
        reason = self._why_not(None) or self._reason
        if not reason:
            way = self._way(self._structure.dense[0].weight)
            if way.kernel is not None:
                return "kernel"
            if way.compiled < math.inf:
                return f"torch.compile, since {way.reason}"
            reason = way.reason
        return f"eager, since {reason}"

    def extra_repr(self) -> str:  # noqa: D102
        return f"formulation: {self.formulation}"

    def _why_not(self, input: Any) -> str:
        """Why the layers must compute, whatever the numbers are; "" if they need not."""
        if is_in_torch_dispatch_mode() or has_torch_function((input,)):
            return "a mode or a subclass of torch's takes part"
        if is_autocast_enabled("cpu"):
            return "autocast is on"
        if _is_tracing() or forward_ad._current_level >= 0:
            return "torch.jit.trace or forward-mode differentiation follows each layer"
        if (
            _global_forward_hooks
            or _global_forward_pre_hooks
            or _global_backward_hooks
            or _global_backward_pre_hooks
        ):
            return "a hook is registered for all modules"
        return self._structure.why_not()

    def _way(self, tensor: Tensor) -> _Way:
        way = self._ways[tensor.dtype, tensor.is_cpu] = _Way(
            self._structure, tensor.dtype, tensor.is_cpu
        )
        return way

    def _prepare(self, input: Any) -> tuple[_Way, Tensor, int, _Held] | str:
        """What to compute, on what and how many samples; or why the layers must do it."""
        structure = self._structure
        for sequence, layers in structure.sequences:
            if [*sequence._modules.values()] != layers:
                raise RuntimeError(_AGAIN)
        reason = self._why_not(input)
        if reason:
            return reason
        if type(input) not in _PLAIN:
            return f"the input is a {type(input).__name__}"
        way = self._ways.get((input.dtype, input.is_cpu)) or self._way(input)
        x, softmax = memory(input), structure.softmax
        if x is None:
            return "the input is empty or has no memory of its own, as in torch.func"
        shape = x.shape
        if not shape or shape[-1] != way.inputs:
            return "the input is not what the layers expect"
        if softmax is not None and softmax.dim != -1 and softmax.dim != len(shape) - 1:
            return "the softmax is along another dimension than the last"
        samples = x.numel() // way.inputs
        if samples < way.least:
            return way.reason or "the samples are too few"
        held = way.read()
        if isinstance(held, str):
            return held
        if way.kernel is not None and (not x.is_contiguous() or x.is_neg()):
            x = x.resolve_neg().contiguous()
        return way, x, samples, held

    def forward(self, input: Tensor, out: Tensor | None = None) -> Tensor:  # noqa: D102
        if is_compiling():
            traced = self._traced(input, self._structure.softmax is not None)
            return _into(out, self._eager(input) if traced is None else traced)
        found = self._prepare(input)
        if isinstance(found, str):
            self.__dict__["_reason"] = "" if self._why_not(input) else found
            return _into(out, self._eager(input))
        self.__dict__["_reason"] = ""
        way, x, samples, held = found
        if way.kernel is None:
            return _into(out, self._compile(way, input, held.tensors))
        derived = is_grad_enabled() and any(t.requires_grad for t in (input, *held.tensors))
        place = None if out is None or derived else self._place(out, way, x)
        if place is not None:
            increment_version(
                cast(Tensor, out)
            )  # autograd is to know that what it may have saved is gone
            if way.kernel.forward(samples, x, held.places, place):
                return cast(Tensor, out)
        if x.ndim == 2:  # which saves half a microsecond
            result = x.new_empty(samples, way.outputs)
        else:
            result = x.new_empty(*x.shape[:-1], way.outputs)
        way.kernel.forward(samples, x, held.places, result)
        if derived:
            given = result, None, None, (way.kernel, samples, x, held.places, held)
            result = Derived.apply(given, input, *held.tensors)  # type: ignore[no-untyped-call]
        return result if out is None else _into(out, result)

    def _place(self, out: Any, way: _Way, x: Tensor) -> Tensor | None:
        """The memory of `out`, if a kernel can write there unasked."""
        fits = (
            type(out) is Tensor
            and out.dtype == x.dtype
            and out.shape == (*x.shape[:-1], way.outputs)
            and _is_plain(out)
            and not (out.requires_grad or out.is_inference())
        )
        return memory(out) if fits else None

    def cross_entropy(self, input: Tensor, target: Tensor) -> Tensor:
        r"""Mean cross-entropy of the chain's output, with all gradients from one pass.

        .. math:: L = -\frac1N \sum_n \log \mathrm{softmax}(z_n)_{t_n}

        The logits :math:`z` are what the softmax at the chain's end gets, or what the chain gives,
        if it has none. The softmax itself is not called, nor are hooks on it or on the model.

        Args:
            input: as in the forward pass.
            target: the classes :math:`t`; -100 is left out, as in torch.

        Shape:
            - input: :math:`(*, \text{in\_features})`.
            - target: :math:`(*)`, int64.
            - output: :math:`()`.

        Raises:
            TypeError: a target that is not int64; else as the layers.
            ValueError: a target of another shape; a softmax that is not along the classes.
            IndexError: a target that is no class.

        Example:
            >>> fused = fuse(nn.Sequential(Dense(2, 3), ReLU(), Dense(3, 3), Softmax()))
            >>> loss = fused.cross_entropy(torch.zeros(4, 2), torch.tensor([0, 1, 2, 0]))
            >>> loss.backward()
            >>> fused[2].bias.grad
            tensor([-0.1667,  0.0833,  0.0833])

        Source: NNFS chapters 5 and 9.
        """
        kind = getattr(target, "dtype", type(target).__name__)
        if kind != torch.int64:
            raise TypeError(f"cross_entropy expects a target of torch.int64, got {kind}")
        if target.shape != input.shape[:-1]:
            raise ValueError(
                f"cross_entropy expects a target of shape {tuple(input.shape[:-1])}, a class for "
                f"each sample, got {tuple(target.shape)}"
            )
        *layers, last = self._structure.layers
        if not isinstance(last, nn.Softmax):
            layers.append(last)
        elif last.dim not in (-1, input.ndim - 1):
            raise ValueError(f"cross_entropy expects a softmax along the classes, got {last}")
        if is_compiling():
            logits = self._traced(input, False)
        else:
            logits, found, classes = None, self._prepare(input), memory(target)
            classes = None if classes is None else classes.contiguous()
            self.__dict__["_reason"] = (
                found if isinstance(found, str) and not self._why_not(input) else ""
            )
            if not isinstance(found, str) and target.is_cpu and classes is not None:
                way, x, samples, held = found
                inputs, grad = [input, *held.tensors], is_grad_enabled()
                wanted = [each if grad and each.requires_grad else None for each in inputs]
                given = way.kernel and way.kernel.gradients(
                    samples, x, held.places, wanted, target=classes
                )
                if given:
                    if all(each is None for each in wanted):
                        return given[0]
                    call = way.kernel, samples, x, held.places, held
                    result = given[0], classes, given[1], call
                    return cast(Tensor, Derived.apply(result, *inputs))  # type: ignore[no-untyped-call]
        if logits is None:
            logits = functools.reduce(lambda x, layer: layer(x), layers, input)
        return mean_loss(logits, target)

    def _eager(self, input: Tensor) -> Tensor:
        model = self._model[0]
        # Else the layers are called: the model is no submodule of this, which tracing expects.
        is_special = any(_hooks(model.__dict__)) or "forward" in model.__dict__
        output: Tensor = model(input) if is_special else super().forward(input)  # type: ignore[no-untyped-call]
        return output

    def _compile(self, way: _Way, input: Tensor, tensors: list[Tensor]) -> Tensor:
        try:
            return _compiled(way.chain)(input, *tensors)
        except RuntimeError as error:
            result = self._eager(input)  # if this fails too, it was the input
            _failures[way.chain] = str(error).strip().partition("\n")[0]
            self._ways.clear()
            warn(f"torch.compile failed, eager torch is used: {_failures[way.chain]}")
            return result

    def _traced(self, input: Tensor, softmax: bool) -> Tensor | None:
        """For torch.compile and torch.export: one operation; None for what they fuse themselves."""
        structure = self._structure
        if structure.why_not():
            return None
        (widths, biases, relus, _), first = structure.chain(), structure.dense[0].weight
        if (
            not first.is_cpu
            or first.dtype not in TYPES
            or max(widths) > WIDEST
            or is_autocast_enabled("cpu")
            or torch.onnx.is_in_onnx_export()
            or (structure.softmax is not None and structure.softmax.dim not in (-1, input.ndim - 1))
        ):
            return None
        pairs = [each for layer in structure.dense for each in (layer.weight, layer.bias)]
        there = [each for each in pairs if each is not None]
        output: Tensor = chain(input, there, list(biases), list(relus), softmax)
        return output

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_ways": {}}


def fuse(model: nn.Module) -> Fused:
    r"""`model` in one pass: :math:`\mathrm{softmax}(\ldots \max(0, x W_1^T + b_1) W_2^T \ldots)`.

    The result is an `nn.Sequential` of the same layers. It sees once which layers there are; their
    parameters it reads at each call, so that training, `load_state_dict`, changes in place and
    moves to another dtype are followed. Who replaces layers calls `fuse` again, or gets an error.

    On the CPU and up to 256 wide (inputs count too) a kernel in C++ computes the chain and its
    gradients. It is compiled for each network and dtype, in about a second a process, by the
    compiler that ``CXX`` names (``c++``). Elsewhere `torch.compile` makes it one. At each call it
    is asked what the kernel would miss, as hooks, autocast or `torch.func`; if there is any, the
    layers run, and `formulation` says why. `Fused.cross_entropy` is the loss for training. Inside
    `torch.compile` and `torch.export` the chain is one operation, ``torchnnfs::chain``.

    Args:
        model: an `nn.Sequential`, also nested, of `Dense`, `ReLU` and `Softmax` or torch's own, or
            one such layer.

    Shape:
        - input: :math:`(*, \text{in\_features})`, of the parameters' dtype, contiguous or not.
        - out: None, or a tensor of the output's shape, dtype and device, which is then returned;
          it saves the time that fresh memory takes, the larger part of a large batch.
        - output: :math:`(*, \text{classes})`.

    Half types are computed in float32 from end to end and rounded once.

    Attributes:
        formulation: how it is computed as things are, and why not by the kernel; also in `repr`.

    Raises:
        TypeError: layers of another kind; in the forward pass as the layers themselves.
        ValueError: no layers; in the forward pass an `out` that does not fit, else as the layers.
        RuntimeError: in the forward pass, other layers than those that `fuse` saw, or of another
            shape; `out` where gradients are needed.

    Warns:
        RuntimeWarning: once, where the compiler is missing or fails.

    Example:
        >>> model = nn.Sequential(Dense(2, 3), ReLU(), Dense(3, 3), Softmax())
        >>> fused = fuse(model)
        >>> fused.formulation
        'kernel'
        >>> fused(torch.zeros(1, 2))
        tensor([[0.3333, 0.3333, 0.3333]], grad_fn=<DerivedBackward>)

    Source: NNFS chapter 4; the kernel is fused.cpp.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse expects a torch.nn.Sequential, got {type(model).__name__}")
    if isinstance(model, Fused):
        model = model._model[0]
    fused = Fused()
    fused._follow(model if isinstance(model, nn.Sequential) else nn.Sequential(model))
    fused.training = model.training
    if not fused._structure.layers:
        raise ValueError("fuse expects at least one layer, got an empty torch.nn.Sequential")
    return fused
