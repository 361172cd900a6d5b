"""`fuse`: a chain of Dense, ReLU and Softmax as one pass over the data, forward and backward."""

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

from torchnnfs.kernel import Call, Chain, Derived, Kernel, chain, kernel, mean_loss, memory, warn
from torchnnfs.modules import Dense, LazyDense, ReLU, Softmax

AGAIN = "the model's layers are not those that fuse saw; call fuse(model) again"
_KNOWN = (Dense, LazyDense, ReLU, Softmax, nn.Linear, nn.ReLU, nn.Softmax)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_FOR_ALL = [getattr(hooks, f"_global{name}") for name in _HOOKS]
_PLAIN = frozenset([Tensor, nn.Parameter])
_is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]


class _Held(NamedTuple):
    """Parameters as a call read them, in memory that this holds: an address there stays theirs."""

    kernel: Kernel
    tensors: list[Tensor]
    slots: list[Any]  # layer, name, parameter or None, address and shape
    places: bytes  # as the kernel gets them
    values: list[Tensor]
    like: tuple[torch.dtype, bool]


class _Structure:
    """The layers of a model in the order of their calls, and where their parameters were last."""

    def __init__(self, model: nn.Sequential) -> None:
        named = [each for _, each in model.named_modules(remove_duplicate=False)]
        inner = [each for each in named if type(each) is nn.Sequential]
        self.model, self.layers = model, [each for each in named if type(each) is not nn.Sequential]
        self.sequences = [(each, [*each._modules.values()]) for each in inner]
        # A LazyDense becomes a Dense by its first input.
        self.parts = [(each, Dense if type(each) is LazyDense else type(each)) for each in named]
        self.dense: list[nn.Linear] = []
        self.relus: list[bool] = []
        self.softmax: nn.Softmax | None = None
        self.order = self.reason = ""  # why no kernel computes any input, or the last one
        self.shapes: list[Any] = []
        self.held: _Held | None = None
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
        return {**vars(self), "held": None}

    def elsewhere(self, input: Any, compiling: bool = False) -> str:
        """Why the layers must compute, as things are outside of them; "" if they need not.

        torch.compile and torch.export work by modes of their own: `compiling` passes these over.
        """
        for sequence, layers in self.sequences:
            if [*sequence._modules.values()] != layers:
                raise RuntimeError(AGAIN)
        if not compiling and (is_in_torch_dispatch_mode() or has_torch_function((input,))):
            return "a mode or a subclass of torch's takes part"
        if is_autocast_enabled("cpu"):
            return "autocast is on"
        if _are_functorch_transforms_active():
            return "a transformation of torch.func follows each layer"
        if _is_tracing() or forward_ad._current_level >= 0:
            return "torch.jit.trace or forward-mode differentiation follows each layer"
        return "a hook is registered for all modules" if any(_FOR_ALL) else ""

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

    def prepare(self, input: Any) -> tuple[_Held, Call, Any] | None:
        """Parameters, the call, and what holds the input's memory; None if the layers must."""
        self.reason = ""
        if self.elsewhere(input) or self.why_not():
            return None
        found = self.read(input)
        if isinstance(found, str):
            self.reason = found
            return None
        return found

    def read(self, input: Any) -> tuple[_Held, Call, Any] | str:
        """The same, or why this input is none for a kernel."""
        if type(input) not in _PLAIN:
            return "the input is no plain tensor"
        try:
            kept, address = input.untyped_storage(), input.data_ptr()
        except RuntimeError:
            address = 0
        if not address:
            return "the input is empty or has no memory of its own"
        held = self.parameters(input)
        if isinstance(held, str):
            return held
        shape, kernel = input.shape, held.kernel
        if not shape or shape[-1] != kernel.inputs:
            return "the input is not what the layers expect"
        if self.softmax is not None and self.softmax.dim not in (-1, len(shape) - 1):
            return "the softmax is along another dimension than the last"
        samples = shape[0] if len(shape) == 2 else math.prod(shape[:-1])
        if samples < kernel.least:
            return kernel.reason or f"the kernel is slower for fewer than {kernel.least} samples"
        if not input.is_contiguous() or input.is_neg():
            copy = input.detach().resolve_neg().contiguous()
            return held, (samples, copy.data_ptr(), held.places), copy
        if input.untyped_storage() is not kept:
            return self.read(input)  # another thread gave it other memory meanwhile
        return held, (samples, address, held.places), kept

    def parameters(self, like: Tensor) -> _Held | str:
        """The parameters as they are now, for an input of this type; or why the layers must."""
        held, dtype = self.held, like.dtype
        if held is None or held.like != (dtype, like.is_cpu):
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
        every: list[Any] = [
            (layer, name, layer._parameters.get(name, layer))
            for layer in self.dense
            for name in ("weight", "bias")
        ]
        there = [slot for slot in every if slot[2] is not None]
        tensors = [slot[2] for slot in there]
        if not _PLAIN.issuperset(map(type, tensors)):
            return "a parameter is not a plain tensor, or is computed anew at each call"
        values = [each.data for each in tensors]
        shapes = [each.shape for each in values]
        self.shapes = self.shapes or shapes
        if shapes != self.shapes:
            raise RuntimeError(AGAIN)
        biases = tuple(slot[2] is not None for slot in every[1::2])
        network = Chain.of(values, biases, self.relus, self.softmax is not None)
        if network is None:
            return "the widths of its layers do not fit"
        kind = like.dtype, like.is_cpu
        if any((v.dtype, v.is_cpu) != kind or not v.is_contiguous() or v.is_neg() for v in values):
            return "a parameter is not contiguous memory of the input's dtype and device"
        for v in values:
            end = (v.storage_offset() + v.numel()) * v.element_size()
            if not v.data_ptr() or v.untyped_storage().nbytes() < end:
                return "a parameter has no memory"
        places = [each.data_ptr() for each in values]
        slots = [(*slot, *known) for slot, *known in zip(there, places, shapes, strict=True)]
        slots += [(*slot, 0, None) for slot in every if slot[2] is None]
        packed = struct.pack(f"{len(places)}q", *places)
        self.held = _Held(kernel(network, *kind), tensors, slots, packed, values, kind)
        return self.held


class Fused(nn.Sequential):
    """What `fuse` gives; see there."""

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
            reason = structure.elsewhere(None) or structure.why_not() or structure.reason
            held = reason or structure.hold(structure.dense[0].weight)
        except RuntimeError as error:
            return f"none, since {error}"
        if isinstance(held, str):
            return f"eager, since {held}"
        if held.kernel.run is not None:
            return "kernel"
        way = "torch.compile" if held.kernel.least < math.inf else "eager"
        return f"{way}, since {held.kernel.reason}"

    def extra_repr(self) -> str:  # noqa: D102
        return f"formulation: {self.formulation}"

    def forward(self, input: Tensor, out: Tensor | None = None) -> Tensor:  # noqa: D102
        found = None if is_compiling() else self._structure.prepare(input)
        if found is None or found[0].kernel.run is None:
            return _into(out, self._otherwise(input, found))
        held, call, kept = found
        kernel = held.kernel
        derived = is_grad_enabled() and any(t.requires_grad for t in (input, *held.tensors))
        if out is not None and (
            type(out) is Tensor
            and (out.dtype, out.device) == (input.dtype, input.device)
            and out.shape == (*input.shape[:-1], kernel.outputs)
            and out.is_contiguous()
            and not (derived or out.is_neg() or out.requires_grad or out.is_inference())
        ):
            increment_version(out)  # autograd is to know that what it may have saved is gone
            if kernel.forward(call, out.detach()):
                return out
        if input.ndim == 2:  # which saves half a microsecond
            result = input.new_empty(call[0], kernel.outputs)
        else:
            result = input.new_empty(*input.shape[:-1], kernel.outputs)
        kernel.forward(call, result)
        if derived:
            given = result, None, None, (kernel, call, (kept, held))
            result = Derived.apply(given, input, *held.tensors)  # type: ignore[no-untyped-call]
        return result if out is None else _into(out, result)

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
            >>> fused.cross_entropy(torch.zeros(4, 2), torch.tensor([0, 1, 2, 0])).backward()
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
        found = None if is_compiling() else self._structure.prepare(input)
        if (
            found
            and found[0].kernel.run
            and type(target) is Tensor
            and target.is_cpu
            and memory(target)
        ):
            held, call, kept = found
            inputs, classes = [input, *held.tensors], target.detach().contiguous()
            grad = is_grad_enabled()
            wanted = [each if grad and each.requires_grad else None for each in inputs]
            given = held.kernel.gradients(call, wanted, None, classes)
            if given:
                if all(each is None for each in wanted):
                    return given[0]
                result = given[0], classes, given[1], (held.kernel, call, (kept, held))
                return cast(Tensor, Derived.apply(result, *inputs))  # type: ignore[no-untyped-call]
        if logits is None:
            logits = functools.reduce(lambda x, layer: layer(x), layers, input)
        return mean_loss(logits, target)

    def _otherwise(self, input: Tensor, found: Any) -> Tensor:
        """What the layers give, by `torch.compile` where it was `found` to pay."""
        traced = self._traced(input, True) if is_compiling() else None
        if traced is not None:
            return traced
        failed = ""
        if found:
            kernel = found[0].kernel
            try:
                return kernel.compiled(input, *found[0].tensors)  # type: ignore[no-any-return]
            except RuntimeError as error:
                failed = str(error).strip().replace(" raised:\n", " raised: ").partition("\n")[0]
        here = self._structure.model.__dict__
        # Else the layers are called: the model is no submodule of this, which tracing expects.
        if "forward" in here or any(here[name] for name in _HOOKS):
            result = self._structure.model(input)
        else:
            result = super().forward(input)  # type: ignore[no-untyped-call]
        if failed:  # and not for the input's sake
            kernel.reason, kernel.least = failed, math.inf
            warn(f"torch.compile failed, eager torch is used: {failed}")
        return cast(Tensor, result)

    def _traced(self, input: Tensor, softmax: bool) -> Tensor | None:
        """For torch.compile and torch.export: one operation; None for what they fuse themselves."""
        structure, dense, last = self._structure, self._structure.dense, self._structure.softmax
        if (
            structure.elsewhere(input, True)
            or structure.why_not()
            or torch.onnx.is_in_onnx_export()
        ):
            return None
        if not input.is_cpu or (last is not None and last.dim not in (-1, input.ndim - 1)):
            return None
        parameters = [p for layer in dense for p in (layer.weight, layer.bias) if p is not None]
        biases, ends = [layer.bias is not None for layer in dense], softmax and last is not None
        output: Tensor = chain(input, parameters, biases, list(structure.relus), ends)
        return output


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


def fuse(model: nn.Module) -> Fused:
    r"""`model` in one pass: :math:`\mathrm{softmax}(\ldots \max(0, x W_1^T + b_1) W_2^T \ldots)`.

    The result is an `nn.Sequential` of the same layers. It sees once which layers there are; their
    parameters it reads at each call. Who replaces layers calls `fuse` again, or gets an error.

    On the CPU and up to 256 wide (inputs count too) a kernel in C++ computes the chain and its
    gradients. The compiler that ``CXX`` names (``c++``) makes it, in about a second a process for
    each network and dtype. Elsewhere `torch.compile` makes one. At each call it is asked what the
    kernel would miss, as hooks, autocast or `torch.func`; if there is any, the layers run, and
    `formulation` says why. Inside `torch.compile` and `torch.export` the chain is one operation,
    ``torchnnfs::chain``. Half types are computed in float32 and rounded once, at the end.

    Args:
        model: an `nn.Sequential`, also nested, of `Dense`, `ReLU` and `Softmax` or torch's own, or
            one such layer.

    Shape:
        - input: :math:`(*, \text{in\_features})`, of the parameters' dtype, contiguous or not.
        - out: None, or a tensor of the output's shape, dtype and device, which is then returned;
          it saves the time that fresh memory takes, the larger part of a large batch.
        - output: :math:`(*, \text{classes})`.

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
        >>> fused = fuse(classifier(2, 3, 3))
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
