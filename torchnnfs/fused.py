"""`fuse`: a chain of Dense, ReLU and Softmax as one pass over the data, forward and backward."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, is_autocast_enabled, is_grad_enabled, nn
from torch._C import _are_functorch_transforms_active  # which has no public name
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling
from torch.nn.modules import module as hooks
from torch.overrides import has_torch_function
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from torchnnfs.kernel import (
    TYPES,
    WIDEST,
    Chain,
    Derived,
    Kernel,
    chain,
    into,
    kernel,
    mean_loss,
    memory,
    warn,
)
from torchnnfs.modules import Dense, LazyDense, ReLU, Softmax

AGAIN = "the model's layers are not those that fuse saw; call fuse(model) again"
_KNOWN = (Dense, LazyDense, ReLU, Softmax, nn.Linear, nn.ReLU, nn.Softmax)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = frozenset([Tensor, nn.Parameter])
_is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]


class _Held(NamedTuple):
    """Parameters as a call read them, in memory that this holds: an address there stays theirs."""

    kernel: Kernel
    tensors: list[Tensor]
    places: bytes  # as the kernel gets them
    slots: list[tuple[nn.Module, str, Tensor | None, int, torch.Size]]
    values: list[Tensor]


class _Structure:
    """The layers of a model in the order of their calls, and where their parameters were last."""

    def __init__(self, model: nn.Sequential) -> None:
        named = [each for _, each in model.named_modules(remove_duplicate=False)]
        # A LazyDense becomes a Dense by its first input.
        kinds = [Dense if type(each) is LazyDense else type(each) for each in named]
        self.model, self.parts = model, list(zip(named, kinds, strict=True))
        inner = [each for each in named if type(each) is nn.Sequential]
        self.sequences = [(each, [*each._modules.values()]) for each in inner]
        self.layers = [each for each in named if type(each) is not nn.Sequential]
        self.dense: list[nn.Linear] = []
        self.relus: list[bool] = []
        self.softmax: nn.Softmax | None = None
        self.order = ""  # why a kernel cannot compute them in this order
        self.shapes: list[Any] = []
        self.held: dict[Any, _Held] = {}
        for layer in self.layers:
            if type(layer) not in _KNOWN:
                raise TypeError(
                    "fuse expects a torch.nn.Sequential of Dense, ReLU and Softmax (or torch's "
                    f"Linear, ReLU and Softmax), got {type(layer).__name__}"
                )
            if self.softmax is not None or not (self.dense or isinstance(layer, nn.Linear)):
                self.order = f"{type(layer).__name__} breaks the order Dense, ReLU, ..., Softmax"
            elif isinstance(layer, nn.Linear):
                self.dense.append(layer)
                self.relus.append(False)
            elif isinstance(layer, nn.Softmax):
                self.softmax = layer
            else:
                self.relus[-1] = True

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "held": {}}

    def why_not(self) -> str:
        for module, kind in self.parts:  # spelled out, since each call pays for it
            here = module.__dict__
            if type(module) is not kind:
                if type(module) is LazyDense:
                    return "a LazyDense had no input yet"
                return f"a {kind.__name__} became a {type(module).__name__}"
            if (
                here["_forward_hooks"]
                or here["_forward_pre_hooks"]
                or here["_backward_hooks"]
                or here["_backward_pre_hooks"]
                or "forward" in here
            ):
                return f"a {kind.__name__} has hooks or a forward of its own"
        return self.order

    def read(self, like: Tensor) -> _Held | str:
        """The parameters as they are now, for an input of this type; or why the layers must."""
        dtype = like.dtype
        held = self.held.get((dtype, like.is_cpu))
        if held is None:
            return self.hold(like)
        for layer, name, known, address, shape in held.slots:
            tensor = layer._parameters.get(name, layer)
            if tensor is not known or (
                known is not None
                and (
                    known.data_ptr() != address
                    or known.dtype is not dtype
                    or known.shape != shape
                    or not known.is_contiguous()
                )
            ):
                return self.hold(like)
        return held

    def hold(self, like: Tensor) -> _Held | str:
        names = [(layer, name) for layer in self.dense for name in ("weight", "bias")]
        found: list[Any] = [layer._parameters.get(name, layer) for layer, name in names]
        tensors = [each for each in found if each is not None]
        if not _PLAIN.issuperset(map(type, tensors)):
            return "a parameter is not a plain tensor, or is computed anew at each call"
        shapes: list[Any] = [each if each is None else each.shape for each in found]
        self.shapes = self.shapes or shapes
        if shapes != self.shapes:
            raise RuntimeError(AGAIN)
        widths = (shapes[0][1], *(shape[0] for shape in shapes[::2]))
        if any(shape[1] != width for shape, width in zip(shapes[::2], widths, strict=False)):
            return "the widths of its layers do not fit"
        biases = tuple(shape is not None for shape in shapes[1::2])
        found_kernel = kernel(
            Chain(widths, biases, tuple(self.relus), self.softmax is not None),
            like.dtype,
            like.is_cpu,
        )
        if found_kernel.library is None:
            return _Held(found_kernel, tensors, b"", [], [])
        values = [value for each in tensors if (value := memory(each)) is not None]
        if [(v.dtype, v.shape, v.is_cpu, v.is_contiguous(), v.is_neg()) for v in values] != [
            (like.dtype, each.shape, True, True, False) for each in tensors
        ]:
            return "a parameter is not contiguous memory of the input's dtype and device"
        rest = iter(values)
        places = [0 if each is None else next(rest).data_ptr() for each in found]
        slots = [(*name, *each) for name, *each in zip(names, found, places, shapes, strict=True)]
        self.held[like.dtype, like.is_cpu] = held = _Held(
            found_kernel, tensors, struct.pack(f"{len(places)}q", *places), slots, values
        )
        return held


class Fused(nn.Sequential):
    """What `fuse` gives; see there."""

    _reason = ""  # why the layers computed the last input

    def __init__(self, *layers: Any) -> None:
        super().__init__(*layers)
        self._follow(nn.Sequential(*layers))

    def _follow(self, model: nn.Sequential) -> None:
        self._modules = model._modules
        self._structure = _Structure(model)

    @property
    def formulation(self) -> str:
        """How it is computed: "kernel", "torch.compile" or "eager", and why not the first."""
        structure = self._structure
        try:
            reason = self._why_not(None) or self._reason
            held = reason or structure.hold(structure.dense[0].weight)
        except RuntimeError as error:
            return f"none, since {error}"
        if isinstance(held, str):
            return f"eager, since {held}"
        if held.kernel.library is not None:
            return "kernel"
        way = "torch.compile" if held.kernel.least < math.inf else "eager"
        return f"{way}, since {held.kernel.reason}"

    def extra_repr(self) -> str:  # noqa: D102
        return f"formulation: {self.formulation}"

    def _why_not(self, input: Any) -> str:
        """Why the layers must compute, whatever the numbers are; "" if they need not."""
        for sequence, layers in self._structure.sequences:
            if [*sequence._modules.values()] != layers:
                raise RuntimeError(AGAIN)
        if is_in_torch_dispatch_mode() or has_torch_function((input,)):
            return "a mode or a subclass of torch's takes part"
        if is_autocast_enabled("cpu"):
            return "autocast is on"
        if _are_functorch_transforms_active():
            return "a transformation of torch.func follows each layer"
        if _is_tracing() or forward_ad._current_level >= 0:
            return "torch.jit.trace or forward-mode differentiation follows each layer"
        if (
            hooks._global_forward_hooks
            or hooks._global_forward_pre_hooks
            or hooks._global_backward_hooks
            or hooks._global_backward_pre_hooks
        ):
            return "a hook is registered for all modules"
        return self._structure.why_not()

    def _prepare(self, input: Any) -> tuple[_Held, Tensor, int] | None:
        """What to compute, on what and how many samples; None if the layers must do it."""
        self.__dict__["_reason"] = ""
        if self._why_not(input):
            return None
        reason, softmax = "", self._structure.softmax
        held = (
            self._structure.read(input) if type(input) in _PLAIN else "the input is no plain tensor"
        )
        x = None if isinstance(held, str) else memory(input)
        if isinstance(held, str):
            reason = held
        elif x is None:
            reason = "the input is empty or has no memory of its own"
        else:
            shape, inputs = x.shape, held.kernel.chain.widths[0]
            if not shape or shape[-1] != inputs:
                reason = "the input is not what the layers expect"
            elif softmax is not None and softmax.dim != -1 and softmax.dim != len(shape) - 1:
                reason = "the softmax is along another dimension than the last"
            else:
                samples = x.numel() // inputs
                if samples >= held.kernel.least:
                    if not x.is_contiguous() or x.is_neg():
                        x = x.resolve_neg().contiguous()
                    return held, x, samples
                reason = held.kernel.reason or "the samples are too few"
        self.__dict__["_reason"] = reason
        return None

    def forward(self, input: Tensor, out: Tensor | None = None) -> Tensor:  # noqa: D102
        if is_compiling():
            traced = self._traced(input, self._structure.softmax is not None)
            return into(out, self._eager(input) if traced is None else traced)
        found = self._prepare(input)
        if found is None:
            return into(out, self._eager(input))
        held, x, samples = found
        kernel = held.kernel
        if kernel.library is None:
            return into(out, self._compiled(kernel, input, held.tensors))
        outputs = kernel.chain.widths[-1]
        derived = is_grad_enabled() and any(t.requires_grad for t in (input, *held.tensors))
        if (
            type(out) is Tensor
            and (out.dtype, out.shape, out.device) == (x.dtype, (*x.shape[:-1], outputs), x.device)
            and out.is_contiguous()
            and not (derived or out.is_neg() or out.requires_grad or out.is_inference())
            and (place := memory(out)) is not None
        ):
            increment_version(out)  # autograd is to know that what it may have saved is gone
            if kernel.forward(samples, x, held.places, place):
                return out
        if x.ndim == 2:  # which saves half a microsecond
            result = x.new_empty(samples, outputs)
        else:
            result = x.new_empty(*x.shape[:-1], outputs)
        kernel.forward(samples, x, held.places, result)
        if derived:
            given = result, None, None, (kernel, samples, x, held.places, held)
            result = Derived.apply(given, input, *held.tensors)  # type: ignore[no-untyped-call]
        return result if out is None else into(out, result)

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
            >>> from torchnnfs import classifier
            >>> fused = fuse(classifier(2, 3, 3))
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
        logits = self._traced(input, False) if is_compiling() else None
        found = None if is_compiling() else self._prepare(input)
        if found and found[0].kernel.library and (classes := memory(target)) is not None:
            held, x, samples = found
            classes, inputs = classes.cpu().contiguous(), [input, *held.tensors]
            grad = is_grad_enabled()
            wanted = [each if grad and each.requires_grad else None for each in inputs]
            given = held.kernel.gradients(samples, x, held.places, wanted, target=classes)
            if given:
                if all(each is None for each in wanted):
                    return given[0]
                call = held.kernel, samples, x, held.places, held
                result = given[0], classes, given[1], call
                return cast(Tensor, Derived.apply(result, *inputs))  # type: ignore[no-untyped-call]
        if logits is None:
            logits = functools.reduce(lambda x, layer: layer(x), layers, input)
        return mean_loss(logits, target)

    def _eager(self, input: Tensor) -> Tensor:
        here = self._structure.model.__dict__
        # Else the layers are called: the model is no submodule of this, which tracing expects.
        if "forward" in here or any(here[name] for name in _HOOKS):
            return cast(Tensor, self._structure.model(input))
        return super().forward(input)  # type: ignore[no-any-return, no-untyped-call]

    def _compiled(self, kernel: Kernel, input: Tensor, tensors: list[Tensor]) -> Tensor:
        try:
            return kernel.compiled(input, *tensors)
        except RuntimeError as error:
            result = self._eager(input)  # if this fails too, it was the input
            said = str(error).strip().replace(" raised:\n", " raised: ")
            kernel.reason, kernel.least = said.partition("\n")[0], math.inf
            warn(f"torch.compile failed, eager torch is used: {kernel.reason}")
            return result

    def _traced(self, input: Tensor, softmax: bool) -> Tensor | None:
        """For torch.compile and torch.export: one operation; None for what they fuse themselves."""
        if (
            self._structure.why_not()
            or is_autocast_enabled("cpu")
            or torch.onnx.is_in_onnx_export()
        ):
            return None
        parameters = [
            each for layer in self._structure.dense for each in (layer.weight, layer.bias)
        ]
        there = [each for each in parameters if each is not None]
        widest = max(size for each in there for size in each.shape)
        fits = self._structure.softmax is None or self._structure.softmax.dim in (
            -1,
            input.ndim - 1,
        )
        if not fits or not there[0].is_cpu or there[0].dtype not in TYPES or widest > WIDEST:
            return None
        biases = [each is not None for each in parameters[1::2]]
        output: Tensor = chain(input, there, biases, list(self._structure.relus), softmax)
        return output


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
        >>> from torchnnfs import classifier
        >>> model = classifier(2, 3, 3)
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
        model = model._structure.model
    fused = Fused()
    fused._follow(model if isinstance(model, nn.Sequential) else nn.Sequential(model))
    fused.training = model.training
    if not fused._structure.layers:
        raise ValueError("fuse expects at least one layer, got an empty torch.nn.Sequential")
    return fused
