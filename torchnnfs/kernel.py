"""A chain of dense layers as one kernel, which fused.cpp is compiled to, and as torch sees it."""

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
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, get_num_threads, is_grad_enabled
from torch.nn import functional as F

#: What the kernel stores and computes in, in C++.
TYPES = {
    torch.float64: ("double", "double"),
    torch.float32: ("float", "float"),
    torch.bfloat16: ("bfloat16", "float"),
    torch.float16: ("_Float16", "float"),
}
#: How long the C++ compiler may take.
COMPILE_SECONDS = 60.0
# Where one way becomes faster than another, measured (docs/speed.md).
WIDEST = 256  # what wider layers need of a tile leaves the cache, and eager torch is faster
TILE, HEAVY = 64, 2**15  # a part of a tile costs as much as a tile: so many products are too many
COMPILED = 8000  # on a CPU, with fewer samples a call of what torch.compile made costs too much

#: C++ compilers that were given up, and why.
broken: dict[str, str] = {}


class Chain(NamedTuple):
    """What a kernel computes: the widths, which layers have a bias and a ReLU, and the end."""

    widths: tuple[int, ...]
    biases: tuple[bool, ...]
    relus: tuple[bool, ...]
    softmax: bool


class Kernel:
    """The functions of fused.cpp compiled for one chain and dtype, or the reason for none.

    Of parameters they get the addresses; whoever calls them holds the memory there.
    """

    library: ctypes.CDLL | None = None
    reason, least = "", math.inf  # from so many samples on it, or torch.compile, pays

    def __init__(self, chain: Chain, dtype: torch.dtype, is_cpu: bool) -> None:
        self.chain, compiler = chain, os.environ.get("CXX", "c++")
        self._there = [there for bias in chain.biases for there in (True, bias)]
        if not is_cpu:
            self.reason, self.least = "it is not on the CPU", 0
        elif dtype not in TYPES or max(chain.widths) > WIDEST:
            self.reason = f"it is wider than {WIDEST}, or of {dtype}"
        elif compiler not in broken:
            try:
                self.library = _compile(chain, dtype, compiler)
                self._forward, self._gradients = self.library.forward, self.library.gradients
                self._forward.argtypes = self._gradients.argtypes = [ctypes.c_char_p]
                products = sum(a * b for a, b in itertools.pairwise(chain.widths))
                self.least = TILE if products > HEAVY else 1
            except subprocess.TimeoutExpired:
                broken[compiler] = f"{compiler!r} took longer than {COMPILE_SECONDS:g} seconds"
            except FileNotFoundError:
                broken[compiler] = f"there is no C++ compiler {compiler!r}"
            except (OSError, ValueError) as error:
                self.reason, self.least = str(error), COMPILED
                warn(f"{error}; torch.compile or eager torch takes the kernel's place")
        if not self.reason and self.library is None:
            self.reason = broken[compiler]
            warn(f"{self.reason}; eager torch is used. The variable CXX names a C++ compiler")

    def places(self, parameters: Sequence[Tensor | None]) -> bytes:
        """The address of weight and bias of each layer; 0 where there is none."""
        rest = iter(parameters)
        found = [next(rest) if there else None for there in self._there]
        return struct.pack(f"{len(found)}q", *(0 if t is None else t.data_ptr() for t in found))

    def forward(self, samples: int, x: Tensor, places: bytes, out: Tensor) -> bool:
        """The chain's output; False, if `out` overlaps what is read, and nothing was done."""
        told = _pack4(samples, get_num_threads(), x.data_ptr(), out.data_ptr())
        return not self._forward(told + places)

    def gradients(
        self,
        samples: int,
        x: Tensor,
        places: bytes,
        wanted: Sequence[Tensor | None],
        grad: Tensor | None = None,
        target: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor | None]] | None:
        """The loss, and the gradients of what is `wanted` of input and parameters.

        They are those for the gradient `grad` of the output, or those of the cross-entropy of a
        `target`; None if that has other numbers than those of classes.
        """
        first, *rest = found = [None if t is None else x.new_empty(*t.shape) for t in wanted]
        loss = x.new_empty(())
        ends = (0 if t is None else t.data_ptr() for t in (x, grad, target, first, loss))
        told = struct.pack("7q", samples, get_num_threads(), *ends) + places + self.places(rest)
        return None if self._gradients(told) else (loss, found)

    @functools.cached_property
    def compiled(self) -> Callable[..., Tensor]:
        """What torch.compile makes of the formula, for any number of samples."""
        options = self.chain[1:]
        return torch.compile(lambda x, *p: formula(x, p, *options), dynamic=True)


kernel = functools.cache(Kernel)
_pack4 = struct.Struct("4q").pack


@functools.cache
def warn(text: str) -> None:
    """One warning for each text."""
    warnings.warn(f"fuse: {text}", RuntimeWarning, stacklevel=2)


def _compile(chain: Chain, dtype: torch.dtype, compiler: str) -> ctypes.CDLL:
    lists = {"WIDTHS": chain.widths, "BIASES": chain.biases, "RELUS": chain.relus}
    told = {name: ",".join(str(int(each)) for each in values) for name, values in lists.items()}
    told["SOFTMAX"], (told["SCALAR"], told["REAL"]) = str(int(chain.softmax)), TYPES[dtype]
    command = shlex.split(compiler)
    if not command:
        raise FileNotFoundError
    command += ["-O3", "-march=native", "-std=c++17", "-fno-math-errno", "-fno-trapping-math"]
    command += ["-fopenmp", "-fPIC", "-shared", *(f"-D{name}={told[name]}" for name in told)]
    source = files("torchnnfs").joinpath("fused.cpp")
    with tempfile.TemporaryDirectory(prefix="torchnnfs-") as scratch, as_file(source) as path:
        made, errors = Path(scratch, "kernel.so"), Path(scratch, "errors")
        command += [str(path), "-o", str(made)]
        # A file instead of a pipe, and a group of its own: when the time is up, nothing is left
        # running or waited for. A library that is loaded needs its file no longer.
        with errors.open("wb") as said:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
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
            library = ctypes.CDLL(str(made))
            library.forward, library.gradients  # noqa: B018
        except (OSError, AttributeError) as error:
            raise ValueError(f"{compiler!r} made no library with a kernel in it") from error
        return library


def formula(input: Tensor, parameters: Sequence[Tensor], *options: Any) -> Tensor:
    """What the layers compute; of the `options` see `chain`."""
    biases, relus, softmax = options
    rest = iter(parameters)
    for bias, relu in zip(biases, relus, strict=True):
        input = F.linear(input, next(rest), next(rest) if bias else None)
        input = input.relu() if relu else input
    return input.softmax(-1) if softmax else input


@torch.library.custom_op("torchnnfs::chain", mutates_args=())
def chain(
    input: Tensor,
    parameters: Sequence[Tensor],
    biases: Sequence[bool],
    relus: Sequence[bool],
    softmax: bool,
) -> Tensor:
    """The chain as one operation of torch's, which compile, export, autograd and vmap see."""
    x, values = input.contiguous(), [each.contiguous() for each in parameters]
    weights = [each for each in values if each.ndim == 2]
    widths = (weights[0].shape[1], *map(len, weights))
    found = kernel(
        Chain(widths, tuple(biases), tuple(relus), softmax), input.dtype, input.device.type == "cpu"
    )
    if found.library is None or not input.numel():
        return formula(input, parameters, biases, relus, softmax)
    out = input.new_empty(*input.shape[:-1], widths[-1])
    found.forward(x.numel() // widths[0], x, found.places(values), out)
    return out


@chain.register_fake
def _(input: Tensor, parameters: Sequence[Tensor], biases: Sequence[bool], *_: Any) -> Tensor:
    last = parameters[-2 if biases[-1] else -1]
    return input.new_empty(*input.shape[:-1], last.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, parameters, *ctx.options = inputs
    ctx.save_for_backward(input, *parameters)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    pull = torch.func.vjp(lambda x, *p: formula(x, p, *ctx.options), *ctx.saved_tensors)[1]
    first, *rest = pull(grad)
    return first, rest, None, None, None


chain.register_autograd(_backward, setup_context=_setup_context)


@chain.register_vmap
def _(info: Any, dims: Any, input: Tensor, parameters: Sequence[Tensor], *options: Any) -> Any:
    if all(dim is None for dim in dims[1]):  # samples in one dimension more
        return chain(input.movedim(dims[0], 0), parameters, *options), 0

    def at(i: int, tensor: Tensor, dim: int | None) -> Tensor:
        return tensor if dim is None else tensor.select(dim, i)

    networks = [
        [at(i, *each) for each in zip(parameters, dims[1], strict=True)]
        for i in range(info.batch_size)
    ]
    outputs = [
        chain(at(i, input, dims[0]), network, *options) for i, network in enumerate(networks)
    ]
    return torch.stack(outputs), 0


class Derived(torch.autograd.Function):
    """What a kernel gave, with its derivative: again the kernel's, and of that torch's.

    With a target, the kernel gave a loss and its gradients, which go out with the first backward.
    """

    @staticmethod
    def forward(ctx: Any, given: tuple[Any, ...], *tensors: Tensor) -> Tensor:  # noqa: D102
        result, ctx.target, ctx.gradients, ctx.call = given
        ctx.save_for_backward(*tensors)
        return cast(Tensor, result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # noqa: D102
        tensors, target, found, (kernel, *call, _) = ctx.saved_tensors, ctx.target, None, ctx.call
        if not is_grad_enabled() and type(grad) is Tensor and memory(grad) is not None:
            found, ctx.gradients = ctx.gradients, None
            if found is None:
                needed = zip(tensors, ctx.needs_input_grad[1:], strict=True)
                wanted = [tensor if needs else None for tensor, needs in needed]
                given = grad.resolve_neg().contiguous() if target is None else None
                _, found = kernel.gradients(*call, wanted, grad=given, target=target)
            if target is not None and grad.item() != 1:
                found = [None if each is None else each.mul_(grad) for each in found]
        if found is None:
            _, *options, softmax = kernel.chain
            options.append(softmax and target is None)
            pull = torch.func.vjp(
                lambda x, *p: mean_loss(formula(x, p, *options), target), *tensors
            )[1]
            found = pull(grad)
        return None, *found


def mean_loss(output: Tensor, target: Tensor | None) -> Tensor:
    """The mean cross-entropy, if there is a target."""
    if target is None:
        return output
    return F.cross_entropy(output.reshape(-1, output.shape[-1]), target.reshape(-1))


def into(out: Tensor | None, result: Tensor) -> Tensor:
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


def memory(tensor: Tensor) -> Tensor | None:
    """Its numbers; None for tensors that have no memory of their own, or no numbers.

    Others may give `tensor` other memory at any time, but not what this returns.
    """
    try:
        value = tensor.data
        return value if value.data_ptr() else None
    except RuntimeError:
        return None
