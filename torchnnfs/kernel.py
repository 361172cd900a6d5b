"""A chain of dense layers as one kernel, which fused.cpp is compiled to, and as torch sees it."""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
import os
import shlex
import shutil
import signal
import struct
import subprocess
import tempfile
import threading
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
TILE, HEAVY = 64, 2**15  # fewer samples cost as much as a tile, too much with so many weights
COMPILED = 8000  # on a CPU, with fewer samples a call of what torch.compile made costs too much

#: C++ compilers that were given up, and why.
broken: dict[str, str] = {}
_pack, _DENSE = struct.Struct("8q").pack, torch.contiguous_format


class Chain(NamedTuple):
    """What a kernel computes: the widths, which layers have a bias and a ReLU, and the end."""

    widths: tuple[int, ...]
    biases: tuple[bool, ...]
    relus: tuple[bool, ...]
    softmax: bool

    @classmethod
    def of(
        cls, tensors: Sequence[Tensor], biases: Sequence[bool], relus: Sequence[bool], softmax: bool
    ) -> Chain | None:
        """The chain with these weights and biases; None where their shapes do not fit."""
        shapes = [each.shape for each in tensors]
        weights = [shape for shape in shapes if len(shape) == 2]
        widths = (*(shape[1] for shape in weights[:1]), *(shape[0] for shape in weights))
        fitting: list[Any] = []
        for inputs, outputs, bias in zip(widths, widths[1:], biases, strict=False):
            fitting += [(outputs, inputs), (outputs,)][: 1 + bias]
        return cls(widths, tuple(biases), tuple(relus), softmax) if shapes == fitting else None


#: How many samples, where they are, and where the parameters are, in memory that the caller holds.
Call = tuple[int, int, bytes]


class Kernel:
    """fused.cpp compiled for one chain and dtype, or the reason why it is not."""

    run: Callable[[bytes], int] | None = None
    reason, least = "", math.inf  # from so many samples on it, or torch.compile, pays

    def __init__(self, chain: Chain, dtype: torch.dtype, is_cpu: bool) -> None:
        self.chain, self.dtype = chain, dtype
        self.inputs, *_, self.outputs = chain.widths
        compiler = os.environ.get("CXX", "c++")
        self.nothing = bytes(8 * (len(chain.biases) + sum(chain.biases)))
        self.number = torch.empty((), dtype=dtype, device="cpu")
        if not is_cpu:
            self.reason, self.least = "it is not on the CPU", 0
        elif dtype not in TYPES or max(chain.widths) > WIDEST:
            known = f"the kernel is for {', '.join(str(each)[6:] for each in TYPES)}"
            wide = f"a layer is {max(chain.widths)} wide, the kernel at most {WIDEST}"
            self.reason = wide if dtype in TYPES else f"{known}, not {dtype}"
        elif compiler not in broken:
            try:
                self.run = _compile(chain, dtype, compiler)
                products = sum(a * b for a, b in itertools.pairwise(chain.widths))
                self.least = TILE if products > HEAVY else 1
            except subprocess.TimeoutExpired:
                broken[compiler] = f"{compiler!r} took longer than {COMPILE_SECONDS:g} seconds"
            except LookupError as error:
                broken[compiler] = str(error)
            except (OSError, AttributeError, ValueError) as error:
                self.reason, self.least = str(error), COMPILED
                warn(f"{error}; torch.compile or eager torch takes the kernel's place")
        if not self.reason and self.run is None:
            self.reason = broken[compiler]
            warn(f"{self.reason}; eager torch is used. The variable CXX names a C++ compiler")

    def forward(self, call: Call, out: Tensor) -> bool:
        """The chain's output; False, if `out` overlaps what is read, and nothing was done."""
        samples, x, places = call
        told = _pack(samples, get_num_threads(), x, out.data_ptr(), 0, 0, 0, 0)
        return not self.run(told + places + self.nothing)  # type: ignore[misc]

    def gradients(
        self, call: Call, wanted: list[Tensor | None], grad: Tensor | None, target: Tensor | None
    ) -> tuple[Tensor, list[Tensor | None]] | None:
        """The loss, and the gradients of what is `wanted` of input and parameters.

        They are those for the gradient `grad` of the output, or those of the cross-entropy of a
        `target`; None if that has other numbers than those of classes.
        """
        samples, x, places = call
        found = [None if t is None else torch.empty_like(t, memory_format=_DENSE) for t in wanted]
        loss = torch.empty_like(self.number)
        ends = [0 if t is None else t.data_ptr() for t in (target, loss, grad, *found)]
        told = _pack(samples, get_num_threads(), x, 0, *ends[:4]) + places
        told += struct.pack(f"{len(found) - 1}q", *ends[4:])
        return None if self.run(told) else (loss, found)  # type: ignore[misc]

    @functools.cached_property
    def compiled(self) -> Callable[..., Tensor]:
        """What torch.compile makes of the formula, for any number of samples."""
        options = self.chain[1:]
        return torch.compile(lambda x, *p: formula(x, p, *options), dynamic=True)


made, _MAKING = functools.cache(Kernel), threading.RLock()


def kernel(chain: Chain, dtype: torch.dtype, is_cpu: bool) -> Kernel:
    """The kernel, made once, whichever thread asks first."""
    with _MAKING:
        return made(chain, dtype, is_cpu)


@functools.cache
def warn(text: str) -> None:
    """One warning for each text."""
    warnings.warn(f"fuse: {text}", RuntimeWarning, stacklevel=2)


def _compile(chain: Chain, dtype: torch.dtype, compiler: str) -> Callable[[bytes], int]:
    told: dict[str, Any] = dict(zip(("SCALAR", "REAL"), TYPES[dtype], strict=True))
    for name, values in chain._asdict().items():
        listed = values if isinstance(values, tuple) else [values]
        told[name.upper()] = ",".join(str(int(each)) for each in listed)
    command = [*shlex.split(compiler), "-O3", "-march=native", "-std=c++17", "-fno-fast-math"]
    command += ["-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared"]
    command += [f"-D{name}={value}" for name, value in told.items()]
    if shutil.which(command[0]) is None:
        raise LookupError(f"there is no C++ compiler {compiler!r}")
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
            run = ctypes.CDLL(str(made)).run
            run.argtypes = [ctypes.c_char_p]
        except (OSError, AttributeError) as error:
            raise ValueError(f"{compiler!r} made no library with a kernel in it") from error
        return run


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
    tensors = [each.contiguous() for each in (input, *parameters)]
    network = Chain.of(parameters, biases, relus, softmax)
    alike = {(each.dtype, each.is_cpu) for each in tensors} == {(input.dtype, True)}
    made = kernel(network, input.dtype, True) if network and alike else None
    wide = input.shape[-1:] == (network.widths[0],) if network else False
    if made is None or made.run is None or not wide or not all(map(memory, tensors)):
        return formula(input, parameters, biases, relus, softmax)  # which refuses what is wrong
    out = input.new_empty(*input.shape[:-1], made.outputs)
    x, *rest = (each.data_ptr() for each in tensors)
    places = struct.pack(f"{len(rest)}q", *rest)
    made.forward((input.numel() // made.inputs, x, places), out)
    return out


@chain.register_fake
def _(input: Tensor, parameters: Sequence[Tensor], *options: Any) -> Tensor:
    return input.new_empty(formula(input, parameters, *options).shape)


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
    each = [
        [tensor] * info.batch_size if dim is None else tensor.unbind(dim)
        for tensor, dim in zip((input, *parameters), (dims[0], *dims[1]), strict=True)
    ]
    return torch.stack([chain(x, p, *options) for x, *p in zip(*each, strict=True)]), 0


class Derived(torch.autograd.Function):
    """What a kernel gave, with its derivative: again the kernel's, and of that torch's.

    With a target, the kernel gave a loss and its gradients, which go out with the first backward.
    """

    @staticmethod
    def forward(ctx: Any, given: tuple[Any, ...], *tensors: Tensor) -> Tensor:  # noqa: D102
        result, target, ctx.found, ctx.call = given
        ctx.save_for_backward(*tensors, target)
        return cast(Tensor, result)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # noqa: D102
        (kernel, call, held), (*tensors, target) = ctx.call, ctx.saved_tensors
        simple = not is_grad_enabled() and type(grad) is Tensor and memory(grad)
        if simple and target is not None and kernel.dtype is torch.float16:
            simple = grad.item() == 1  # a loss is scaled before its gradients become too small
        if simple and ctx.found is not None:
            found, ctx.found = ctx.found, None
            return None, *_scaled(found, grad)
        if simple and _unmoved(tensors, call, held[0]):
            given = grad.resolve_neg().contiguous() if target is None else None
            needed = zip(tensors, ctx.needs_input_grad[1:], strict=True)
            wanted = [tensor if needs else None for tensor, needs in needed]
            computed = kernel.gradients(call, wanted, given, target)
            if computed:
                return None, *(computed[1] if target is None else _scaled(computed[1], grad))
        _, *options, softmax = kernel.chain
        options.append(softmax and target is None)
        pull = torch.func.vjp(lambda x, *p: mean_loss(formula(x, p, *options), target), *tensors)[1]
        return None, *pull(grad)


def _scaled(gradients: list[Tensor | None], by: Tensor) -> list[Tensor | None]:
    if by.item() == 1:
        return gradients
    return [None if each is None else each.mul_(by) for each in gradients]


def _unmoved(tensors: Sequence[Tensor], call: Call, kept: Any) -> bool:
    """Whether nothing that a call read has been freed since: it is where it was.

    The input may have been read from a copy, which is then `kept`.
    """
    x, *places = map(memory, tensors)
    same = struct.pack(f"{len(places)}q", *places) == call[2]
    return same and (x == call[1] or isinstance(kept, Tensor))


def memory(tensor: Tensor) -> int:
    """Where its numbers are; 0 for tensors without any, or without memory, as inside of `vmap`."""
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0


def mean_loss(output: Tensor, target: Tensor | None) -> Tensor:
    """The mean cross-entropy, if there is a target."""
    if target is None:
        return output
    return F.cross_entropy(output.reshape(-1, output.shape[-1]), target.reshape(-1))
