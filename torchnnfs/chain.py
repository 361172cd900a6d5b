"""What fuse reads of a model: its layers once, where its parameters are at each call."""

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchnnfs.kernel import TYPES, WIDEST, Chain, Kernel, broken, kernel, memory
from torchnnfs.modules import Dense, LazyDense, ReLU, Softmax

AGAIN = "the model's layers are not those that fuse saw; call fuse(model) again"
PLAIN = frozenset([Tensor, nn.Parameter])
_COMPILED = 8000  # on a CPU, with fewer samples a call of what torch.compile made costs too much
_KNOWN = (Dense, LazyDense, ReLU, Softmax, nn.Linear, nn.ReLU, nn.Softmax)
_LATER: dict[type, type] = {LazyDense: Dense}  # what a layer becomes by its first input

#: Chains that torch.compile failed at, and why.
failures: dict[Chain, str] = {}


class Held(NamedTuple):
    """Parameters as a call read them, in memory that this holds: an address there stays theirs."""

    tensors: list[Tensor]
    values: list[Tensor]
    places: bytes  # as the kernel gets them
    slots: list[tuple[nn.Linear, str, Tensor, int, torch.Size]]


class Structure:
    """The layers of a model in the order of their calls."""

    def __init__(self, model: nn.Sequential) -> None:
        named = list(model.named_modules(remove_duplicate=False))
        self.modules = [(each, _LATER.get(type(each), type(each))) for _, each in named]
        inner = [each for _, each in named if type(each) is nn.Sequential]
        self.sequences = [(each, [*each._modules.values()]) for each in inner]
        self.layers = [each for _, each in named if type(each) is not nn.Sequential]
        self.dense: list[nn.Linear] = []
        self.relus: list[bool] = []
        self.softmax: nn.Softmax | None = None
        # Why a kernel cannot compute them in this order.
        self.reason = "" if self.layers else "it has no layers"
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


class Way:
    """How a chain is computed in one dtype, on the CPU or elsewhere."""

    def __init__(self, structure: Structure, dtype: torch.dtype, is_cpu: bool) -> None:
        self.dtype, self.chain, dense = dtype, structure.chain(), structure.dense
        self.inputs, self.outputs = self.chain.widths[0], self.chain.widths[-1]
        self.kernel: Kernel | None = None
        self.reason = failures.get(self.chain, "it is not on the CPU")
        # From how many samples on torch.compile is better than the layers.
        self.compiled = math.inf if self.chain in failures else 0.0
        ends = [each.weight.shape[1] for each in dense]
        if tuple(ends) != self.chain.widths[:-1]:
            self.reason, self.compiled = "the widths of its layers do not fit", math.inf
        elif is_cpu and (dtype not in TYPES or max(self.chain.widths) > WIDEST):
            self.reason, self.compiled = f"it is wider than {WIDEST}, or of {dtype}", math.inf
        elif is_cpu:
            found = kernel(self.chain, dtype)
            if isinstance(found, Kernel):
                self.kernel, self.reason = found, ""
            elif os.environ.get("CXX", "c++") in broken:
                self.reason, self.compiled = found, math.inf
            elif self.chain not in failures:
                self.reason, self.compiled = found, _COMPILED
        self.least = self.kernel.least if self.kernel else self.compiled
        names = ("weight", "bias")
        self._slots = [(e, n) for e in dense for n in names if getattr(e, n) is not None]
        self._bare = [each for each in dense if each.bias is None]
        self._shapes = [getattr(layer, name).shape for layer, name in self._slots]
        self._held: Held | None = None

    def read(self) -> Held | str:
        """The parameters as they are now; or why the layers must read them."""
        for layer in self._bare:
            if layer.bias is not None:
                raise RuntimeError(AGAIN)
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

    def _hold(self) -> Held | str:
        tensors: list[Any] = []
        for layer, name in self._slots:
            tensor = layer._parameters.get(name)
            if tensor is None and name in layer._parameters:
                raise RuntimeError(AGAIN)
            if type(tensor) not in PLAIN:
                return f"a {name} is not a plain tensor, or is computed anew at each call"
            tensors.append(tensor)
        if self.kernel is None:
            return Held(tensors, [], b"", [])
        values: list[Tensor] = []
        for tensor, shape in zip(tensors, self._shapes, strict=True):
            value = memory(tensor)
            if tensor.shape != shape:
                raise RuntimeError(AGAIN)
            if value is None or value.dtype != self.dtype or not is_plain(value):
                return "a parameter is not contiguous memory of the input's dtype and device"
            values.append(value)
        rows = zip(self._slots, tensors, values, self._shapes, strict=True)
        slots = [(*slot, tensor, value.data_ptr(), shape) for slot, tensor, value, shape in rows]
        self._held = held = Held(tensors, values, self.kernel.places(values), slots)
        return held


def is_plain(tensor: Tensor) -> bool:
    """Whether a kernel can work on its memory as it is."""
    return tensor.is_cpu and tensor.is_contiguous() and not tensor.is_neg()
