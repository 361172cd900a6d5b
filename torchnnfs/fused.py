"""`fuse`: a chain of Dense, ReLU and Softmax as one pass over the data, forward and backward."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from operator import itemgetter
from typing import Any, cast

import torch
from torch import Tensor, is_autocast_enabled, is_grad_enabled, nn
from torch._C import _are_functorch_transforms_active  # which has no public name
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

from torchnnfs.chain import AGAIN, PLAIN, Held, Structure, Way, failures, is_plain
from torchnnfs.kernel import TYPES, WIDEST, Chain, Derived, chain, formula, mean_loss, memory, warn

_hooks = itemgetter(
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
)
_is_tracing: Callable[[], bool] = torch.jit.is_tracing  # type: ignore[attr-defined]


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


class Fused(nn.Sequential):
    """What `fuse` gives; see there."""

    _reason = ""  # why the layers computed the last input

    def __init__(self, *layers: Any) -> None:
        super().__init__(*layers)
        self._follow(nn.Sequential(*layers))

    def _follow(self, model: nn.Sequential) -> None:
        self._modules = model._modules
        self._model = [model]  # in a list, so that it is no submodule
        self._structure = Structure(model)
        self._ways: dict[Any, Way] = {}

    @property
    def formulation(self) -> str:
        """How it is computed: "kernel", "torch.compile" or "eager", and why not the first."""
        if self._structure.is_changed():
            return f"none, since {AGAIN}"
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
        if _are_functorch_transforms_active():
            return "a transformation of torch.func follows each layer"
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

    def _way(self, tensor: Tensor) -> Way:
        way = self._ways[tensor.dtype, tensor.is_cpu] = Way(
            self._structure, tensor.dtype, tensor.is_cpu
        )
        return way

    def _prepare(self, input: Any) -> tuple[Way, Tensor, int, Held] | str:
        """What to compute, on what and how many samples; or why the layers must do it."""
        structure = self._structure
        for sequence, layers in structure.sequences:
            if [*sequence._modules.values()] != layers:
                raise RuntimeError(AGAIN)
        reason = self._why_not(input)
        if reason:
            return reason
        if type(input) not in PLAIN:
            return f"the input is a {type(input).__name__}"
        way = self._ways.get((input.dtype, input.is_cpu)) or self._way(input)
        x, softmax = memory(input), structure.softmax
        if x is None:
            return "the input is empty or has no memory of its own"
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

    def _place(self, out: Any, way: Way, x: Tensor) -> Tensor | None:
        """The memory of `out`, if a kernel can write there unasked."""
        fits = (
            type(out) is Tensor
            and out.dtype == x.dtype
            and out.shape == (*x.shape[:-1], way.outputs)
            and is_plain(out)
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

    def _compile(self, way: Way, input: Tensor, tensors: list[Tensor]) -> Tensor:
        try:
            return _compiled(way.chain)(input, *tensors)
        except RuntimeError as error:
            result = self._eager(input)  # if this fails too, it was the input
            failures[way.chain] = str(error).strip().partition("\n")[0]
            self._ways.clear()
            warn(f"torch.compile failed, eager torch is used: {failures[way.chain]}")
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
        model = model._model[0]
    fused = Fused()
    fused._follow(model if isinstance(model, nn.Sequential) else nn.Sequential(model))
    fused.training = model.training
    if not fused._structure.layers:
        raise ValueError("fuse expects at least one layer, got an empty torch.nn.Sequential")
    return fused
