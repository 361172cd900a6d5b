"""`fuse`: a chain of Dense, ReLU and Softmax as one pass over the data."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import itertools
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, get_num_threads, is_grad_enabled, nn
from torch._C import (
    _get_tracing_state,
    _is_any_autocast_enabled,
    _is_torch_function_mode_enabled,
    _len_torch_dispatch_stack,
)
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.nn.modules import module as module_hooks
from torch.utils.hooks import RemovableHandle

from torchnnfs.modules import Dense, LazyDense, ReLU, Softmax

#: What the kernel stores and computes in, in C++.
_TYPES = {
    torch.float64: ("double", "double"),
    torch.float32: ("float", "float"),
    torch.bfloat16: ("bfloat16", "float"),
    torch.float16: ("_Float16", "float"),
}
# Where one way becomes faster than another, measured on two cores with AVX-512 (docs/speed.md).
_WIDEST = 256  # what wider layers need of a tile leaves the cache, and eager torch is faster
_TILE, _HEAVY = 64, 2**15  # a part of a tile costs as much as a tile: so many products are too many
_COMPILED = 8000  # on a CPU, with fewer samples a call of what torch.compile made costs too much
_UNROLLED = 16  # up to this width each feature is a tensor of its own for torch.compile

# What a kernel says, in fused.cpp: done; for the layers to do; input is not contiguous; parameters
# are others than those it was compiled for.
DONE, DECLINED, STRIDED, CHANGED = range(4)


class Chain(NamedTuple):
    """What a kernel computes: the widths, which layers have a bias and a ReLU, and the end."""

    widths: tuple[int, ...]
    biases: tuple[bool, ...]
    relus: tuple[bool, ...]
    softmax: bool


@functools.cache
def _warn(text: str) -> None:
    warnings.warn(f"fuse: {text}", RuntimeWarning, stacklevel=2)


@functools.cache
def _compiler() -> tuple[list[str], bytes]:
    """The C++ compiler's command for this machine, and what tells it from others."""
    command = shlex.split(os.environ.get("CXX", "c++"))
    command += ["-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fno-trapping-math"]
    command += ["-fopenmp", "-fPIC", "-shared", "-x", "c++"]
    command += ["-I", str(Path(torch.__file__).parent / "include")]
    macros = subprocess.run(
        [*command, "-E", "-dM", os.devnull], capture_output=True, check=True, timeout=60
    )
    return command, macros.stdout


def _directory() -> Path:
    """Where compiled kernels are kept; a directory of this process alone if that cannot be."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    path = Path(cache, "torchnnfs")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(path, os.W_OK):
            return path
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="torchnnfs-"))


@functools.cache
def kernel(chain: Chain, dtype: torch.dtype) -> Callable[..., int] | str:
    """The compiled ``forward`` of fused.cpp for a chain, or why there is none, after a warning."""
    try:
        path = _build(_definitions(chain, dtype))
        try:
            library = ctypes.PyDLL(str(path))
        except OSError:  # a damaged file
            path.unlink()
            library = ctypes.PyDLL(str(_build(_definitions(chain, dtype))))
        exchange = torch.Tensor.__dlpack_c_exchange_api__
    except FileNotFoundError as error:
        _warn(f"no C++ compiler ({error}); eager torch is used. Install one, or name it in CXX")
        return str(error)
    except (AttributeError, OSError, ValueError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or b"").decode(errors="replace").splitlines()
        reason = next((line for line in said if "error" in line), str(error))
        _warn(
            f"no C++ kernel ({reason}); torch.compile is used from {_COMPILED} samples on, and "
            "eager torch below and where that fails"
        )
        return reason
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.argtypes, pointer.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
    library.load.argtypes = [ctypes.c_void_p] + [ctypes.py_object] * 3
    library.load.restype = ctypes.py_object
    api = pointer(exchange, b"dlpack_exchange_api")
    forward: Callable[..., int] = library.load(api, Tensor, nn.Parameter, None)
    return forward


def _definitions(chain: Chain, dtype: torch.dtype) -> list[str]:
    """What fused.cpp is told of the chain."""
    scalar, real = _TYPES[dtype]
    lists = {"WIDTHS": chain.widths, "BIASES": chain.biases, "RELUS": chain.relus}
    told = {name: ",".join(str(int(each)) for each in values) for name, values in lists.items()}
    told |= {"SOFTMAX": str(int(chain.softmax)), "SCALAR": scalar, "REAL": real}
    return [f"-D{name}={value}" for name, value in told.items()]


def _build(definitions: list[str]) -> Path:
    """The library of fused.cpp with these definitions, compiled unless it was before."""
    source = files("torchnnfs").joinpath("fused.cpp").read_bytes()
    command, macros = _compiler()
    command = [*command, *definitions]
    told = map(str.encode, [torch.__version__, *command])
    key = hashlib.sha256(b"\0".join([source, macros, *told])).hexdigest()
    library = _directory() / f"{key[:32]}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
            made = Path(scratch, "kernel.so")
            command += ["-", "-o", str(made)]
            subprocess.run(command, input=source, capture_output=True, check=True, timeout=600)
            with made.open("rb") as file:
                os.fsync(file.fileno())
            made.replace(library)  # whole or not at all, also when others make it at the same time
    return library


def _pairs(
    parameters: Sequence[Tensor], biases: Sequence[bool]
) -> list[tuple[Tensor, Tensor | None]]:
    """Weight and bias of each layer, from one list of all there are."""
    rest = iter(parameters)
    return [(next(rest), next(rest) if bias else None) for bias in biases]


def _formula(
    input: Tensor,
    parameters: Sequence[Tensor],
    biases: Sequence[bool],
    relus: Sequence[bool],
    softmax: bool,
) -> list[Tensor]:
    """What goes into each layer, and last what comes out of the chain."""
    values = [input]
    for (weight, bias), relu in zip(_pairs(parameters, biases), relus, strict=True):
        value = F.linear(values[-1], weight, bias)
        values.append(value.relu() if relu else value)
    if softmax:
        values[-1] = values[-1].softmax(-1)
    return values


@torch.library.custom_op("torchnnfs::chain", mutates_args=())
def chain(
    input: Tensor,
    parameters: Sequence[Tensor],
    biases: Sequence[bool],
    relus: Sequence[bool],
    softmax: bool,
) -> Tensor:
    """The chain as one operation of torch's, which compile, export and autograd see."""
    if input.device.type == "cpu" and input.dtype in _TYPES:
        pairs = _pairs([each.contiguous() for each in parameters], biases)
        widths = (pairs[0][0].shape[1], *(weight.shape[0] for weight, _ in pairs))
        function = kernel(Chain(widths, tuple(biases), tuple(relus), softmax), input.dtype)
        if callable(function):
            held = tuple({"weight": weight, "bias": bias} for weight, bias in pairs)
            out = input.new_empty(*input.shape[:-1], widths[-1])
            if function(input.contiguous(), out, get_num_threads(), held) == DONE:
                return out
    return _formula(input, parameters, biases, relus, softmax)[-1]


@chain.register_fake
def _(input: Tensor, parameters: Sequence[Tensor], biases: Sequence[bool], *_: Any) -> Tensor:
    return input.new_empty(*input.shape[:-1], _pairs(parameters, biases)[-1][0].shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, parameters, *ctx.options = inputs
    ctx.save_for_backward(input, *parameters)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The chain rule, on intermediates computed again instead of kept."""
    input, *parameters = ctx.saved_tensors
    biases, relus, softmax = ctx.options
    *values, output = _formula(input, parameters, *ctx.options)
    if softmax:
        weighted = grad * output
        grad = weighted - output * weighted.sum(-1, keepdim=True)
    grads: list[Tensor] = []
    layers = list(zip(values, _pairs(parameters, biases), relus, strict=True))
    for x, (weight, bias), relu in reversed(layers):
        if relu:
            grad = grad.masked_fill(output <= 0, 0)
        rows = grad.reshape(-1, grad.shape[-1])
        if bias is not None:
            grads.append(rows.sum(0))
        grads.append(rows.T @ x.reshape(-1, x.shape[-1]))
        grad, output = grad @ weight, x
    return grad, grads[::-1], None, None, None


chain.register_autograd(_backward, setup_context=_setup_context)


def _flatten(module: nn.Module | None) -> list[nn.Module]:
    """The layers of a Sequential in the order of their calls; others as they are."""
    if isinstance(module, nn.Sequential) and type(module) in (nn.Sequential, Fused):
        return [layer for child in module._modules.values() for layer in _flatten(child)]
    return [] if module is None else [module]


_HOOKED, _LAZY = "a layer has hooks", "a LazyDense had no input yet"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_KNOWN = (Dense, LazyDense, ReLU, Softmax, nn.Linear, nn.ReLU, nn.Softmax)


class _Network(NamedTuple):
    """A chain that the kernel can compute, and the modules that hold its parameters."""

    chain: Chain
    dense: list[nn.Linear]
    softmax: nn.Softmax | None

    def parameters(self) -> list[Tensor]:
        """Weights and biases in order, as far as there are any."""
        pairs = [(each.weight, each.bias) for each in self.dense]
        return [each for pair in pairs for each in pair if each is not None]


def _is_hooked(layer: nn.Module) -> bool:
    """Whether a call of `layer` is more than its class says."""
    here = vars(layer)
    return any(here[hooks] for hooks in _HOOKS) or "forward" in here


def _network(layers: list[nn.Module]) -> _Network | str:
    """What `layers` compute, or why a kernel cannot."""
    dense: list[nn.Linear] = []
    relus: list[bool] = []
    softmax = None
    for layer in layers:
        if type(layer) not in _KNOWN:
            return f"it has a {type(layer).__name__}"
        if type(layer) is LazyDense:  # after its first input it is a Dense
            return _LAZY
        if _is_hooked(layer):
            return _HOOKED
        if softmax is not None or not (dense or isinstance(layer, nn.Linear)):
            return f"{type(layer).__name__} breaks the order Dense, ReLU, ..., Softmax"
        if isinstance(layer, nn.Linear):
            dense.append(layer)
            relus.append(False)
        elif isinstance(layer, nn.Softmax):
            softmax = layer
        else:
            relus[-1] = True
    if not dense:
        return "it has no layers"
    widths = (dense[0].weight.shape[1], *(each.weight.shape[0] for each in dense))
    if any(each.weight.shape[1:] != (width,) for each, width in zip(dense, widths, strict=False)):
        return "the widths of its layers do not fit"
    biases = tuple(each.bias is not None for each in dense)
    return _Network(Chain(widths, biases, tuple(relus), softmax is not None), dense, softmax)


def _unrolled(
    input: Tensor,
    parameters: Sequence[Tensor],
    biases: Sequence[bool],
    relus: Sequence[bool],
    softmax: bool,
) -> Tensor:
    """The chain in elementwise operations alone, of which torch.compile makes a single kernel."""
    dtype = input.dtype
    wide = torch.promote_types(dtype, torch.float32)
    x = list(input.to(wide).unbind(-1))
    for (weight, bias), relu in zip(_pairs(parameters, biases), relus, strict=True):
        rows = weight.to(wide).unbind()
        terms = [[w * v for w, v in zip(row.unbind(), x, strict=True)] for row in rows]
        if bias is not None:
            terms = [[b, *row] for b, row in zip(bias.to(wide).unbind(), terms, strict=True)]
        x = [functools.reduce(torch.add, row) for row in terms]
        x = [v.relu() for v in x] if relu else x
    if softmax:
        top = functools.reduce(torch.maximum, x)
        powers = [(v - top).exp() for v in x]
        total = functools.reduce(torch.add, powers)
        x = [power / total for power in powers]
    return torch.stack(x, -1).to(dtype)


@functools.cache
def _compiled(chain: Chain) -> Callable[..., Tensor]:
    """What torch.compile makes of the chain, for any number of samples."""

    def whole(input: Tensor, parameters: list[Tensor]) -> Tensor:
        if max(chain.widths) <= _UNROLLED:
            return _unrolled(input, parameters, *chain[1:])
        return _formula(input, parameters, *chain[1:])[-1]

    compiled: Callable[..., Tensor] = torch.compile(whole, dynamic=True, fullgraph=True)
    return compiled


#: Why torch.compile failed, for chains with which it did.
_failures: dict[Chain, str] = {}


class _Plan:
    """How a model is computed as it stands, and what was read to find out."""

    def __init__(self, model: nn.Sequential) -> None:
        self.modules: list[tuple[dict[str, Any], list[Any]]] = []
        self.hooked = any(getattr(module_hooks, f"_global{name}") for name in _HOOKS)
        self._note(model)
        self.handles = RemovableHandle.next_id
        self.way, self.reason, self.is_stale = "eager", "", False
        self.layers = _flatten(model)
        self.kinds = [*map(type, self.layers)]
        self.softmax: nn.Softmax | None = None
        self.weights: list[tuple[dict[str, Any], Tensor]] = []
        network = _HOOKED if self.hooked else _network(self.layers)
        if isinstance(network, str):
            self.reason = network
            if network in (_HOOKED, _LAZY):
                self.handles = -1  # hooks go, and lazy layers become others, without a notice
        else:
            self._read(network)

    def _note(self, sequence: nn.Sequential) -> None:
        children = [*sequence._modules.values()]
        self.modules.append((sequence._modules, children))
        for child in children:
            if isinstance(child, nn.Sequential):
                self._note(child)
                self.hooked = self.hooked or _is_hooked(child)

    def _read(self, network: _Network) -> None:
        self.network, self.chain, self.softmax = network, network.chain, network.softmax
        self.dim = -1 if self.softmax is None else self.softmax.dim
        self.parameters = tuple(each._parameters for each in network.dense)
        self.weights = [(each._parameters, each.weight) for each in network.dense]
        self.outputs = self.chain.widths[-1]
        products = sum(a * b for a, b in itertools.pairwise(self.chain.widths))
        self.least = _TILE * self.chain.widths[0] if products > _HEAVY else 0
        tensors = [each for held in self.parameters for each in held.values() if each is not None]
        first = network.dense[0].weight
        self.dtype, self.device = first.dtype, first.device
        if (
            len(tensors) != len(network.parameters())
            or self.dtype not in _TYPES
            or not all(
                type(each) in (Tensor, nn.Parameter)
                and (each.dtype, each.device) == (self.dtype, self.device)
                and each.is_contiguous()
                for each in tensors
            )
        ):
            self.reason = "its parameters are no plain tensors of one device and dtype"
        elif self.device.type not in ("cpu", "meta"):
            self.way = "torch.compile"
        elif max(self.chain.widths) > _WIDEST:
            self.reason = f"the input or a layer is wider than {_WIDEST}"
        else:
            function = kernel(self.chain, self.dtype)
            if isinstance(function, str):
                # torch.compile takes long to find out that there is no compiler for it either.
                there = shutil.which(os.environ.get("CXX", "c++").split()[0])
                self.way, self.reason = "torch.compile" if there else "eager", function
            else:
                self.way, self.function = "kernel", function
        if self.way == "torch.compile" and self.chain in _failures:
            self.way, self.reason = "eager", _failures[self.chain]

    def holds(self) -> bool:
        """Whether the layers are the ones that were read; a kernel looks at parameters itself."""
        if self.handles != RemovableHandle.next_id:
            return False
        for modules, layers in self.modules:
            if [*modules.values()] != layers:
                return False
        if [*map(type, self.layers)] != self.kinds:
            return False
        if self.way != "kernel" and not self._stays():
            return False
        return self.softmax is None or self.softmax.dim == self.dim

    def _stays(self) -> bool:
        for held, weight in self.weights:
            if held.get("weight") is not weight or weight.dtype is not self.dtype:
                return False
        return not self.weights or self.weights[0][1].device == self.device

    def launch(self, input: Tensor, out: Tensor | None) -> Tensor | None:
        """The kernel's output, None where it is for the layers to compute or to complain."""
        if (
            type(input) is not Tensor
            or (is_grad_enabled() and (input.requires_grad or self.requires_grad()))
            or _is_watched()
            or (self.dim != -1 and self.dim != input.ndim - 1)
            or (self.least and input.numel() < self.least)
            or input.is_neg()
            or (out is not None and not _can_be_written(out))
        ):
            return None
        if out is None:
            shape = input.shape
            if len(shape) == 2:
                out = input.new_empty(shape[0], self.outputs)
            else:
                out = input.new_empty(*shape[:-1], self.outputs)
        else:
            increment_version(out)  # autograd is to know that what it may have saved is gone
        said = self.function(input, out, get_num_threads(), self.parameters)
        if said == STRIDED:
            said = self.function(input.contiguous(), out, get_num_threads(), self.parameters)
        self.is_stale = said == CHANGED
        return out if said == DONE else None

    def requires_grad(self) -> bool:
        """Whether one of the parameters does."""
        for parameters in self.parameters:
            for each in parameters.values():
                if each is not None and each.requires_grad:
                    return True
        return False


def _is_watched() -> bool:
    """Whether torch's dispatcher has something to see to that a kernel would pass by."""
    return (
        forward_ad._current_level >= 0
        or _len_torch_dispatch_stack() > 0
        or _is_any_autocast_enabled()
        or _is_torch_function_mode_enabled()
        or _get_tracing_state() is not None
    )


def _can_be_written(out: Tensor) -> bool:
    """Whether a kernel may write there unasked; else `Tensor.copy_` says what is to be said."""
    return type(out) is Tensor and not (out.requires_grad or out.is_inference() or out.is_neg())


def _into(out: Tensor | None, result: Tensor) -> Tensor:
    """`result`, copied to `out` where one was given."""
    if out is None:
        return result
    if not isinstance(out, Tensor):
        raise TypeError(f"fused(input, out=...) expects a torch.Tensor, got {type(out).__name__}")
    if torch.is_grad_enabled() and (result.requires_grad or out.requires_grad):
        raise RuntimeError(
            "fused(input, out=...) does not support automatic differentiation, and an argument or "
            "a parameter requires grad; call it under torch.no_grad()"
        )
    if out.numel() == 0 and out.shape != result.shape:
        out.resize_(result.shape)  # as torch's own functions do
    for what in ("shape", "dtype", "device"):
        expected, got = getattr(result, what), getattr(out, what)
        if expected != got:
            expected, got = (tuple(e) if what == "shape" else e for e in (expected, got))
            raise ValueError(
                f"fused(input, out=...) expects an out of {what} {expected}, got {got}"
            )
    return out.copy_(result)


class Fused(nn.Sequential):
    """What `fuse` gives; see there."""

    _plan: _Plan | None = None
    _origin: list[nn.Sequential] = []  # noqa: RUF012  # in a list, so that it is no submodule

    def __delitem__(self, index: slice | int) -> None:
        super().__delitem__(index)
        for model in self._origin:
            model._modules = self._modules  # torch makes a new dictionary of what is left

    def _follow(self) -> None:
        for model in self._origin:
            if self._modules is not model._modules:
                self._modules = model._modules

    @property
    def formulation(self) -> str:
        """How it is computed: "kernel", "torch.compile" or "eager", and why not the first."""
        plan = self._current()
        return f"{plan.way}, since {plan.reason}" if plan.reason else plan.way

    def extra_repr(self) -> str:  # noqa: D102
        return f"formulation: {self.formulation}"

    def _current(self) -> _Plan:
        self._follow()
        plan = self._plan
        if plan is None or not plan.holds():
            plan = self._plan = _Plan(self)
        return plan

    def forward(self, input: Tensor, out: Tensor | None = None) -> Tensor:  # noqa: D102
        if is_compiling():
            return _into(out, self._traced(input))
        self._follow()
        plan = self._plan
        if plan is None or not plan.holds():
            plan = self._plan = _Plan(self)
        if plan.way == "kernel":
            result = plan.launch(input, out)
            if plan.is_stale:
                plan = self._plan = _Plan(self)
                result = plan.launch(input, out) if plan.way == "kernel" else None
            if result is not None:
                return result
        elif plan.way == "torch.compile" and isinstance(input, Tensor):
            return _into(out, self._compile(plan, input))
        if out is not None:
            return _into(out, self._eager(input))
        for layer in self._modules.values():  # as nn.Sequential does, without another call
            input = layer(input)
        return input

    def _compile(self, plan: _Plan, input: Tensor) -> Tensor:
        if (
            (input.dtype, input.device) != (plan.dtype, plan.device)
            or input.shape[-1:] != plan.chain.widths[:1]
            or plan.dim not in (-1, input.ndim - 1)
            or (input.is_cpu and input.numel() < _COMPILED * input.shape[-1])
            or plan.chain.biases != tuple(each.bias is not None for each in plan.network.dense)
            or _is_watched()
        ):
            return self._eager(input)
        try:
            return _compiled(plan.chain)(input, plan.network.parameters())
        except RuntimeError as error:
            result = self._eager(input)  # if this fails too, it was not the compiler
            _failures[plan.chain] = str(error).strip().partition("\n")[0]
            self._plan = None
            if not input.is_cpu:
                _warn(f"torch.compile failed, eager torch is used: {_failures[plan.chain]}")
            return result

    def _traced(self, input: Tensor) -> Tensor:
        """For torch.compile and torch.export: one operation, or what they fuse themselves."""
        network = _network(_flatten(self))
        if isinstance(network, str):
            return self._eager(input)
        parameters = network.parameters()
        dim = -1 if network.softmax is None else network.softmax.dim
        if (
            parameters[0].device.type != "cpu"
            or parameters[0].dtype not in _TYPES
            or max(network.chain.widths) > _WIDEST
            or torch.is_autocast_enabled("cpu")
            or torch.onnx.is_in_onnx_export()
            or dim not in (-1, input.ndim - 1)
        ):
            return self._eager(input)
        _, biases, relus, softmax = network.chain
        output: Tensor = chain(input, parameters, list(biases), list(relus), softmax)
        return output

    def _eager(self, input: Tensor) -> Tensor:
        output: Tensor = super().forward(input)  # type: ignore[no-untyped-call]
        return output

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_plan": None}


def fuse(model: nn.Module) -> Fused:
    r"""`model` in one pass: :math:`\mathrm{softmax}(\ldots \max(0, x W_1^T + b_1) W_2^T \ldots)`.

    The result is an `nn.Sequential` of the same layers, in the same dictionary: parameters, state
    dict, training, moves to another device or dtype, and layers that are replaced, are those of
    `model`, whichever of the two is changed, and `fuse` need not be called again.

    Without gradients, on the CPU and up to 256 wide (inputs count too), a kernel in C++ computes
    the chain: compiled once a network and dtype, in about a second, by the compiler that ``CXX``
    names (``c++``), and kept in ``~/.cache/torchnnfs``. On other devices `torch.compile` makes it
    one. Where gradients are needed, under autocast, in `torch.func` and with hooks on a layer, the
    layers are called as always, whatever `formulation` says. Inside `torch.compile` and
    `torch.export` the chain is one operation, ``torchnnfs::chain``, which has a derivative.

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
        formulation: how the next forward pass without gradients is computed; also in `repr`.

    Raises:
        TypeError: layers of another kind; in the forward pass as the layers themselves.
        ValueError: no layers; in the forward pass an `out` that does not fit, else as the layers.
        RuntimeError: in the forward pass, `out` where gradients are needed.

    Warns:
        RuntimeWarning: once, where the compiler is missing or fails; `torch.compile` takes its
            place from 8000 samples on, or eager torch, which also takes it below.

    Example:
        >>> model = nn.Sequential(Dense(2, 3), ReLU(), Dense(3, 3), Softmax())
        >>> fused = fuse(model)
        >>> fused.formulation
        'kernel'
        >>> with torch.no_grad():
        ...     fused(torch.zeros(1, 2))
        tensor([[0.3333, 0.3333, 0.3333]])

    Source: NNFS chapter 4; the kernel is fused.cpp.
    """
    layers = _flatten(model)
    for layer in layers:
        if type(layer) not in _KNOWN:
            raise TypeError(
                "fuse expects a torch.nn.Sequential of Dense, ReLU and Softmax (or torch's Linear, "
                f"ReLU and Softmax), got {type(layer).__name__}"
            )
    if not layers:
        raise ValueError("fuse expects at least one layer, got an empty torch.nn.Sequential")
    if not isinstance(model, nn.Sequential):
        return Fused(model)
    fused = Fused()
    fused._modules = model._modules  # one dictionary, so that a change of one is one of both
    fused._origin = [model]
    fused.training = model.training
    return fused
