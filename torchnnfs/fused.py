"""`fuse`: a chain of Dense, ReLU and Softmax as one pass over the data, forward and backward."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import os
import shlex
import signal
import struct
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib.resources import as_file, files
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, get_num_threads, is_autocast_enabled, is_grad_enabled, nn
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.nn.modules import module as hooks
from torch.overrides import has_torch_function
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from torchnnfs.modules import Dense, LazyDense, ReLU, Softmax

#: What the kernel stores and computes in, in C++.
_TYPES = {
    torch.float64: ("double", "double"),
    torch.float32: ("float", "float"),
    torch.bfloat16: ("bfloat16", "float"),
    torch.float16: ("_Float16", "float"),
}
#: How long the C++ compiler may take.
COMPILE_SECONDS = 60.0
# Where one way becomes faster than another, measured (docs/speed.md).
_WIDEST = 256  # what wider layers need of a tile leaves the cache, and eager torch is faster
_TILE, _HEAVY = 64, 2**15  # a part of a tile costs as much as a tile: so many products are too many
_COMPILED = 8000  # on a CPU, with fewer samples a call of what torch.compile made costs too much

#: What was given up: C++ compilers, and chains that torch.compile failed at; and why.
_broken: dict[str | Chain, str] = {}


class Chain(NamedTuple):
    """What a kernel computes: the widths, which layers have a bias and a ReLU, and the end."""

    widths: tuple[int, ...]
    biases: tuple[bool, ...]
    relus: tuple[bool, ...]
    softmax: bool


class _Call(NamedTuple):
    """What a kernel reads, in memory that this holds: weight and bias of each layer in `values`."""

    x: Tensor
    values: list[Tensor | None]
    addresses: list[int]


class Kernel:
    """The functions of fused.cpp, compiled for one chain."""

    def __init__(self, chain: Chain, library: ctypes.CDLL) -> None:
        self.chain = chain
        self._forward, self._gradients = library.forward, library.gradients
        self._forward.argtypes = self._gradients.argtypes = [ctypes.c_char_p]
        count = 2 * len(chain.biases)
        self._pack = struct.Struct(f"{4 + count}q").pack
        self._pack_all = struct.Struct(f"{7 + 2 * count}q").pack
        products = sum(a * b for a, b in itertools.pairwise(chain.widths))
        self.least = chain.widths[0] * (_TILE if products > _HEAVY else 1)

    def forward(self, call: _Call, out: Tensor) -> bool:
        """The chain's output; False, if `out` overlaps what is read, and nothing was done."""
        samples = call.x.numel() // self.chain.widths[0]
        places = (call.x.data_ptr(), out.data_ptr(), *call.addresses)
        return not self._forward(self._pack(samples, get_num_threads(), *places))

    def gradients(
        self, call: _Call, grad: Tensor | None, target: Tensor | None, *wants: bool
    ) -> tuple[Tensor, list[Tensor | None]] | None:
        """The loss, and the gradients of input and parameters as far as one `wants` them.

        They are those for the gradient `grad` of the output, or those of the cross-entropy of a
        `target`; None if that has other numbers than those of classes.
        """
        tensors = [call.x, *call.values]
        pairs = zip(tensors, wants, strict=True)
        found = [t.new_empty(t.shape) if want and t is not None else None for t, want in pairs]
        loss = call.x.new_empty(())
        samples, places = call.x.numel() // self.chain.widths[0], _places(found)
        ends = (*_places([call.x, grad, target]), places[0], loss.data_ptr())
        arguments = (samples, get_num_threads(), *ends, *call.addresses, *places[1:])
        return None if self._gradients(self._pack_all(*arguments)) else (loss, found)


def _places(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if each is None else each.data_ptr() for each in tensors]


@functools.cache
def _warn(text: str) -> None:
    warnings.warn(f"fuse: {text}", RuntimeWarning, stacklevel=2)


@functools.cache
def kernel(chain: Chain, dtype: torch.dtype) -> Kernel | str:
    """The kernel of a chain, or why there is none, after a warning."""
    compiler = os.environ.get("CXX", "c++")
    if compiler not in _broken:
        try:
            return _compile(chain, dtype, compiler)
        except subprocess.TimeoutExpired:
            _broken[compiler] = f"{compiler!r} took longer than {COMPILE_SECONDS:g} seconds"
        except FileNotFoundError:
            _broken[compiler] = f"there is no C++ compiler {compiler!r}"
        except (OSError, ValueError) as error:
            _warn(f"{error}; torch.compile or eager torch takes the kernel's place")
            return str(error)
    _warn(f"{_broken[compiler]}; eager torch is used. The variable CXX names a C++ compiler")
    return _broken[compiler]


def _compile(chain: Chain, dtype: torch.dtype, compiler: str) -> Kernel:
    scalar, real = _TYPES[dtype]
    lists = {"WIDTHS": chain.widths, "BIASES": chain.biases, "RELUS": chain.relus}
    told = {name: ",".join(str(int(each)) for each in values) for name, values in lists.items()}
    told |= {"SOFTMAX": str(int(chain.softmax)), "SCALAR": scalar, "REAL": real}
    command = shlex.split(compiler) or [""]
    command += ["-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fno-trapping-math"]
    command += ["-fopenmp", "-fPIC", "-shared", *(f"-D{name}={told[name]}" for name in told)]
    source = files("torchnnfs").joinpath("fused.cpp")
    with tempfile.TemporaryDirectory(prefix="torchnnfs-") as scratch, as_file(source) as path:
        made, errors = Path(scratch, "kernel.so"), Path(scratch, "errors")
        # A file instead of a pipe, and a group of its own: when the time is up, nothing is left
        # running or waited for. A library that is loaded needs its file no longer.
        with errors.open("wb") as said:
            process = subprocess.Popen(
                [*command, str(path), "-o", str(made)],
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
            try:
                failed = process.wait(COMPILE_SECONDS)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise
        if failed:
            lines = errors.read_text(errors="replace").splitlines()
            why = next((line for line in lines if "error" in line), f"exit status {failed}")
            raise ValueError(f"the C++ compiler failed ({why})")
        try:
            return Kernel(chain, ctypes.CDLL(str(made)))
        except (OSError, AttributeError) as error:
            raise ValueError(f"{compiler!r} made no library with a kernel in it") from error


def _formula(input: Tensor, parameters: Sequence[Tensor], *options: Any) -> Tensor:
    """What the layers compute; of `options`, see `chain`."""
    biases, relus, softmax = options
    rest = iter(parameters)
    for bias, relu in zip(biases, relus, strict=True):
        input = F.linear(input, next(rest), next(rest) if bias else None)
        input = input.relu() if relu else input
    return input.softmax(-1) if softmax else input


def _vjp(grad: Tensor, formula: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
    """The gradients of a formula by torch, which can be derived once more."""
    found: tuple[Tensor, ...] = torch.func.vjp(formula, *tensors)[1](grad)
    return found


@torch.library.custom_op("torchnnfs::chain", mutates_args=())
def chain(
    input: Tensor,
    parameters: Sequence[Tensor],
    biases: Sequence[bool],
    relus: Sequence[bool],
    softmax: bool,
) -> Tensor:
    """The chain as one operation of torch's, which compile, export, autograd and vmap see."""
    if input.device.type == "cpu" and input.dtype in _TYPES and input.numel():
        rest = iter([each.contiguous() for each in parameters])
        values = [next(rest) if there else None for bias in biases for there in (True, bias)]
        weights = [each for each in values[::2] if each is not None]
        widths = (weights[0].shape[1], *(weight.shape[0] for weight in weights))
        found = kernel(Chain(widths, tuple(biases), tuple(relus), softmax), input.dtype)
        if isinstance(found, Kernel):
            out = input.new_empty(*input.shape[:-1], widths[-1])
            found.forward(_Call(input.contiguous(), values, _places(values)), out)
            return out
    return _formula(input, parameters, biases, relus, softmax)


@chain.register_fake
def _(input: Tensor, parameters: Sequence[Tensor], biases: Sequence[bool], *_: Any) -> Tensor:
    last = parameters[-2 if biases[-1] else -1]
    return input.new_empty(*input.shape[:-1], last.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, parameters, *ctx.options = inputs
    ctx.save_for_backward(input, *parameters)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    first, *rest = _vjp(grad, lambda x, *p: _formula(x, p, *ctx.options), *ctx.saved_tensors)
    return first, rest, None, None, None


chain.register_autograd(_backward, setup_context=_setup_context)


@chain.register_vmap
def _(info: Any, dims: Any, input: Tensor, parameters: Sequence[Tensor], *options: Any) -> Any:
    if all(dim is None for dim in dims[1]):  # samples in one dimension more
        return chain(input.movedim(dims[0], 0), parameters, *options), 0
    each = torch.vmap(lambda x, p: _formula(x, p, *options), tuple(dims[:2]))
    return each(input, parameters), 0


class _Derived(torch.autograd.Function):
    """What a kernel gave, with its derivative: again the kernel's, and of that torch's.

    With a `target`, the kernel gave a loss and its gradients.
    """

    @staticmethod
    def forward(ctx: Any, result: Tensor, *saved: Any) -> Tensor:
        ctx.kernel, ctx.call, ctx.target, ctx.gradients, *tensors = saved
        ctx.save_for_backward(*tensors)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        tensors, target = ctx.saved_tensors, ctx.target
        if is_grad_enabled() or type(grad) is not Tensor or not _address(grad):
            _, *options, softmax = ctx.kernel.chain
            options.append(softmax and target is None)
            there = [each for each in tensors if each is not None]
            rest = iter(_vjp(grad, lambda x, *p: _mean(_formula(x, p, *options), target), *there))
            found = [None if each is None else next(rest) for each in tensors]
        elif target is not None:
            found = [None if each is None else each * grad for each in ctx.gradients]
        else:
            grad, wants = grad.resolve_neg().contiguous(), ctx.needs_input_grad[5:]
            _, found = ctx.kernel.gradients(ctx.call, grad, None, *wants)
        return None, None, None, None, None, *found


def _derive(
    result: Tensor,
    kernel: Kernel,
    call: _Call,
    target: Tensor | None,
    gradients: list[Tensor | None] | None,
    tensors: list[Tensor | None],
    derived: bool,
) -> Tensor:
    """`result`, with a derivative if that is needed."""
    if derived:
        result = _Derived.apply(result, kernel, call, target, gradients, *tensors)  # type: ignore[no-untyped-call]
    return result


def _mean(output: Tensor, target: Tensor | None) -> Tensor:
    """The mean cross-entropy, if there is a target."""
    if target is None:
        return output
    return F.cross_entropy(output.reshape(-1, output.shape[-1]), target.reshape(-1))


def _address(tensor: Tensor) -> int:
    """Where its numbers are; 0 for tensors of torch.func and others without memory."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


_KNOWN = (Dense, LazyDense, ReLU, Softmax, nn.Linear, nn.ReLU, nn.Softmax)
_PLAIN = (Tensor, nn.Parameter)
_AGAIN = "the model's layers are not those that fuse saw; call fuse(model) again"
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_hooks, _all_hooks = itemgetter(*_HOOKS), itemgetter(*(f"_global{name}" for name in _HOOKS))
_look = attrgetter("dtype", "is_cpu", "shape")


def _is_special(module: nn.Module) -> bool:
    """Whether a call of `module` is more than its class says."""
    return any(_hooks(module.__dict__)) or "forward" in module.__dict__


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
    expected, got = ((tuple(each.shape), each.dtype, each.device) for each in (result, out))
    if expected != got:
        raise ValueError(f"fused(input, out=...) expects an out of {expected}, got {got}")
    return out.copy_(result)


@functools.cache
def _compiled(chain: Chain) -> Callable[..., Tensor]:
    """What torch.compile makes of the formula, for any number of samples."""
    compiled: Callable[..., Tensor] = torch.compile(
        lambda input, *parameters: _formula(input, parameters, *chain[1:]), dynamic=True
    )
    return compiled


class _Structure:
    """The layers of a model in the order of their calls."""

    def __init__(self, model: nn.Sequential) -> None:
        named = list(model.named_modules(remove_duplicate=False))
        self.modules = [(f"layer {n}" if n else "the model", each, type(each)) for n, each in named]
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
        for name, module, kind in self.modules:
            if type(module) is LazyDense:
                return f"{name} is a LazyDense that had no input yet"
            if type(module) is not kind and kind is not LazyDense:
                return f"{name} became a {type(module).__name__}"
            if _is_special(module):
                return f"{name} has hooks or a forward of its own"
        return self.reason


class _Way(NamedTuple):
    """How a chain is computed in one dtype, on the CPU or elsewhere."""

    chain: Chain
    kernel: Kernel | None
    reason: str  # why there is no kernel
    compiled: float  # from how many samples on torch.compile is better than the layers
    slots: list[tuple[nn.Linear, str, Any]]  # layer, name of a parameter, what it has to be


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
        self._ways: dict[tuple[torch.dtype, bool], _Way] = {}

    @property
    def formulation(self) -> str:
        """How it is computed: "kernel", "torch.compile" or "eager", and why not the first."""
        if self._structure.is_changed():
            return f"none, since {_AGAIN}"
        reason = self._why_not(None) or self._reason
        if not reason:
            first = self._structure.dense[0].weight
            way = self._way(first.dtype, first.is_cpu)
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
        if torch.jit.is_tracing() or forward_ad._current_level >= 0:  # type: ignore[no-untyped-call, attr-defined]
            return "torch.jit.trace or forward-mode differentiation follows each layer"
        if any(_all_hooks(hooks.__dict__)):
            return "a hook is registered for all modules"
        return self._structure.why_not()

    def _way(self, dtype: torch.dtype, is_cpu: bool) -> _Way:
        way = self._ways.get((dtype, is_cpu))
        if way is None:
            chain = self._structure.chain()
            slots: list[tuple[nn.Linear, str, Any]] = [
                (layer, name, seen if seen is None else (dtype, is_cpu, seen.shape))
                for layer in self._structure.dense
                for name, seen in (("weight", layer.weight), ("bias", layer.bias))
            ]
            made, reason, start = None, "it is not on the CPU", 0.0
            if is_cpu and (dtype not in _TYPES or max(chain.widths) > _WIDEST):
                reason, start = f"it is wider than {_WIDEST}, or of {dtype}", math.inf
            elif is_cpu:
                found = kernel(chain, dtype)
                made, reason = (found, "") if isinstance(found, Kernel) else (None, found)
                start = math.inf if os.environ.get("CXX", "c++") in _broken else _COMPILED
            if chain in _broken:
                reason, start = _broken[chain], math.inf
            way = self._ways[dtype, is_cpu] = _Way(chain, made, reason, start, slots)
        return way

    def _prepare(self, input: Any) -> tuple[_Way, _Call, list[Tensor | None]] | str:
        """What to compute on what memory, and whose that is; or why the layers must do it."""
        if self._structure.is_changed():
            raise RuntimeError(_AGAIN)
        reason = self._why_not(input)
        if reason:
            return reason
        if type(input) not in _PLAIN or input.is_meta:
            return f"the input is a {type(input).__name__}, or has no numbers"
        way = self._way(input.dtype, input.is_cpu)
        # Others may give tensors other memory at any time; what `data` returns is ours alone.
        x, softmax = input.data, self._structure.softmax
        shape = x.shape
        if shape[-1:] != way.chain.widths[:1]:
            return "the input is not what the layers expect"
        if softmax is not None and softmax.dim not in (-1, len(shape) - 1):
            return "the softmax is along another dimension than the last"
        tensors: list[Tensor | None] = [input]
        values: list[Tensor | None] = []
        for layer, name, expected in way.slots:
            tensor = layer._parameters.get(name)
            tensors.append(tensor)
            if tensor is not None and expected is not None:
                value = tensor.data
                if value.shape != expected[2]:
                    raise RuntimeError(_AGAIN)
                if type(tensor) not in _PLAIN or _look(value) != expected:
                    return "a parameter is not a plain tensor of the input's dtype and device"
                if not value.is_contiguous() or value.is_neg():
                    return "a parameter is not contiguous"
                values.append(value)
            elif tensor is expected:
                values.append(None)
            elif name in layer._parameters:
                raise RuntimeError(_AGAIN)
            else:
                return f"a {name} is computed anew at each call"
        samples = x.numel() // shape[-1]
        if way.kernel is None:
            return way.reason if samples < way.compiled else (way, _Call(x, values, []), tensors)
        if samples < way.kernel.least:
            return "the samples are too few"
        try:
            call = _Call(x.resolve_neg().contiguous(), values, _places(values))
            if call.x.data_ptr() and all(call.addresses[::2]):
                return way, call, tensors
        except RuntimeError:  # of `data_ptr`
            pass
        return "a tensor has no memory of its own, as in torch.func"

    def forward(self, input: Tensor, out: Tensor | None = None) -> Tensor:  # noqa: D102
        if is_compiling():
            traced = self._traced(input, self._structure.softmax is not None)
            return _into(out, self._eager(input) if traced is None else traced)
        found = self._prepare(input)
        self.__dict__["_reason"] = found if isinstance(found, str) else ""
        if isinstance(found, str):
            return _into(out, self._eager(input))
        way, call, tensors = found
        if way.kernel is None:
            return _into(out, self._compile(way, tensors))
        derived = is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        shape = (*call.x.shape[:-1], way.chain.widths[-1])
        if (
            type(out) is Tensor
            and _look(out) == (call.x.dtype, True, shape)
            and out.is_contiguous()
            and not (derived or out.requires_grad or out.is_neg() or out.is_inference())
        ):
            increment_version(out)  # autograd is to know that what it may have saved is gone
            if way.kernel.forward(call, out.data):
                return out
        result = call.x.new_empty(shape)
        way.kernel.forward(call, result)
        return _into(out, _derive(result, way.kernel, call, None, None, tensors, derived))

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
            logits, found, classes = None, self._prepare(input), target.data.contiguous()
            if (
                not isinstance(found, str)
                and found[0].kernel
                and target.is_cpu
                and _address(classes)
            ):
                kernel, (_, call, tensors) = found[0].kernel, found
                wants = [is_grad_enabled() and t is not None and t.requires_grad for t in tensors]
                given = kernel.gradients(call, None, classes, *wants)
                if given is not None:
                    return _derive(given[0], kernel, call, classes, given[1], tensors, any(wants))
        if logits is None:
            logits = functools.reduce(lambda x, layer: layer(x), layers, input)
        return _mean(logits, target)

    def _eager(self, input: Tensor) -> Tensor:
        model = self._model[0]
        # Else the layers are called: the model is no submodule of this, which tracing expects.
        run = model if _is_special(model) else super().forward
        output: Tensor = run(input)  # type: ignore[no-untyped-call]
        return output

    def _compile(self, way: _Way, tensors: list[Tensor | None]) -> Tensor:
        try:
            return _compiled(way.chain)(*(each for each in tensors if each is not None))
        except RuntimeError as error:
            result = self._eager(cast(Tensor, tensors[0]))  # if this fails too, it was the input
            _broken[way.chain] = str(error).strip().partition("\n")[0]
            self._ways.clear()
            _warn(f"torch.compile failed, eager torch is used: {_broken[way.chain]}")
            return result

    def _traced(self, input: Tensor, softmax: bool) -> Tensor | None:
        """For torch.compile and torch.export: one operation; None for what they fuse themselves."""
        structure = self._structure
        if structure.why_not():
            return None
        (widths, biases, relus, _), first = structure.chain(), structure.dense[0].weight
        if (
            not first.is_cpu
            or first.dtype not in _TYPES
            or max(widths) > _WIDEST
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
        tensor([[0.3333, 0.3333, 0.3333]], grad_fn=<_DerivedBackward>)

    Source: NNFS chapter 4; the kernel is fused.cpp.
    """
    if isinstance(model, Fused):
        model = model._model[0]
    fused = Fused()
    fused._follow(model if isinstance(model, nn.Sequential) else nn.Sequential(model))
    fused.training = model.training
    if not fused._structure.layers:
        raise ValueError("fuse expects at least one layer, got an empty torch.nn.Sequential")
    return fused
