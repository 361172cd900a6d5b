"""Phase 1: whatever computes a model gives a trace of what came out at which place."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchnnfs.fused import fuse
from torchnnfs.testing.models import (
    arguments_of,
    borrowed,
    call,
    cast,
    computable,
    convert,
    copied,
    layer_of,
    leaves,
    split,
    to_numpy,
    walk,
)
from torchnnfs.testing.traces import Call, Formula, Trace, replaced, watched

#: The dtypes that can be judged, by name.
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class Candidate:
    """A way of computing a model.

    Attributes:
        name: "eager" is torch as it is, "fused" `torchnnfs.fuse`, "compiled" `torch.compile`,
            "exported" `torch.export`, "onnx" `torch.onnx.export` run by ONNX Runtime, "jax"
            jax.numpy under jit on the same parameters, and "numpy" the book's NumPy in float32.
        device: where it computes; "onnx", "jax" and "numpy" are on the CPU here.
        dtype: what parameters and input are cast to first; None: the model's own dtype (float32
            for "numpy").
    """

    name: str = "eager"
    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.name not in KINDS:
            raise ValueError(f"unknown candidate {self.name!r}; known are {', '.join(KINDS)}")
        kind = KINDS[self.name]
        if self.dtype is not None and self.dtype not in [DTYPES[name] for name in kind.dtypes]:
            raise ValueError(f"{self.name} computes in {', '.join(kind.dtypes)}, got {self.dtype}")
        if torch.device(self.device).type == "meta":
            raise ValueError("candidates compute numbers, which the meta device does not have")
        if not kind.anywhere and torch.device(self.device).type != "cpu":
            raise ValueError(f"{self.name} computes on the CPU here, got {self.device}")

    def run(
        self,
        model: nn.Module,
        input: Any,
        extra: Sequence[str] = (),
        broken: Mapping[str, Formula] | None = None,
    ) -> Trace:
        """Compute the model twice, and watch its places and the modules at `extra` paths.

        Where `broken` names a place, its formula takes the place of the module, and the model is
        computed once.

        Raises:
            ValueError: the candidate cannot compute this model, and why.
        """
        kind, dtype = KINDS[self.name], self.dtype or torch.float32
        modules = {place.path: place.module for place in walk(model)} if kind.shows else {}
        modules |= {path: model.get_submodule(path) for path in extra if kind.shows and path}
        calls: list[Call] = []
        with warnings.catch_warnings(), torch.no_grad():
            if not kind.shows:  # compilers and exporters warn of what they use themselves
                warnings.simplefilter("ignore")
            try:
                with kind.build(model, cast(input, self.device, dtype), self.device, dtype) as run:
                    with replaced(model, broken or {}), watched(modules, calls):
                        output = _arrays(call(run, cast(input, self.device, dtype)))
                    again = None
                    if broken is None:
                        again = _arrays(call(run, cast(input, self.device, dtype)))
            except Exception as error:
                if kind.shows:
                    raise  # the model's own error says more than we could
                words = " ".join(str(error).split())[:300]
                raise ValueError(f"{self.name} cannot compute this model: {words}") from error
        return Trace(self.name, str(self.device), dtype_name(dtype), tuple(calls), output, again)


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype as NumPy spells it."""
    return str(dtype).removeprefix("torch.")


def _arrays(output: Any) -> Any:
    arrays = convert(output, Tensor, to_numpy)
    if not leaves(arrays):
        raise TypeError(
            "compare expects a model whose output is a tensor, or tensors in tuples, lists and "
            f"dictionaries, got {type(output).__name__}"
        )
    return arrays


class MissingExtraError(ImportError):
    """A candidate was asked for by name whose packages are not installed."""


def devices_here() -> list[torch.device]:
    """The CPU and every accelerator of this machine."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return [torch.device("cpu")]
    count = torch.accelerator.device_count()
    return [torch.device("cpu"), *(torch.device(accelerator.type, i) for i in range(count))]


def choose(
    names: Sequence[str],
    devices: Sequence[torch.device] | None = None,
    dtypes: Sequence[torch.dtype | None] = (None,),
) -> list[Candidate]:
    """The candidates of these names on each device and in each dtype where that makes sense.

    Raises:
        MissingExtraError: a candidate whose packages are not installed.
        ValueError: an unknown name; none of `dtypes` is one that a candidate computes in.
    """
    devices = devices_here() if devices is None else devices
    chosen: list[Candidate] = []
    for name in dict.fromkeys(names):
        if name not in KINDS:
            raise ValueError(f"unknown candidate {name!r}; known are {', '.join(KINDS)}")
        kind = KINDS[name]
        absent = [each for each in kind.packages if importlib.util.find_spec(each) is None]
        if absent:
            needs = f"{name} needs {', '.join(absent)}"
            raise MissingExtraError(f"{needs}: pip install 'torchnnfs[{name}]'")
        if name == "numpy":
            chosen.append(Candidate("numpy"))  # the book's NumPy knows float32 only
            continue
        allowed = [None, *(DTYPES[each] for each in kind.dtypes)]
        known = [dtype for dtype in dtypes if dtype in allowed]
        if not known:
            raise ValueError(f"{name} computes in {', '.join(kind.dtypes)} alone")
        places = devices if kind.anywhere else [torch.device("cpu")]
        chosen += [Candidate(name, device, dtype) for device in places for dtype in known]
    return chosen


def resolved(candidate: Candidate, own: torch.dtype) -> Candidate:
    """The candidate with a dtype: its own choice, or `own`."""
    if candidate.dtype is not None:
        return candidate
    return replace(candidate, dtype=torch.float32 if candidate.name == "numpy" else own)


#: From a model and an example input, both to be computed on a device in a dtype, to a function.
Builder = Callable[
    [nn.Module, Any, torch.device | str, torch.dtype], AbstractContextManager[Callable[..., Any]]
]


@contextmanager
def _eager(
    model: nn.Module, input: Any, device: torch.device | str, dtype: torch.dtype
) -> Iterator[Callable[..., Any]]:
    with borrowed(model, device, dtype) as run:
        yield run


@contextmanager
def _numpy(
    model: nn.Module, input: Any, device: torch.device | str, dtype: torch.dtype
) -> Iterator[Callable[..., Any]]:
    def formula(module: nn.Module, x: np.ndarray) -> np.ndarray:
        layer = layer_of(module)
        assert layer is not None
        arguments = {name: single(value) for name, value in arguments_of(module).items()}
        with computable(module, layer, x):
            return layer.forward(single(x), **arguments)

    known = {place.path: formula for place in walk(model) if place.layer is not None}
    with borrowed(model, device, dtype) as run, replaced(model, known):
        yield run


def single(value: Any) -> Any:
    """Floating-point arrays in float32, everything else as it is."""
    floating = isinstance(value, np.ndarray) and value.dtype.kind == "f"
    return value.astype(np.float32) if floating else value


def _elsewhere(build: Callable[[nn.Module, Any], Callable[..., Any]]) -> Builder:
    """A builder that takes a copy of the model on the device and in the dtype."""

    @contextmanager
    def builder(
        model: nn.Module, input: Any, device: torch.device | str, dtype: torch.dtype
    ) -> Iterator[Callable[..., Any]]:
        yield build(copied(model).to(device, dtype), input)

    return builder


def _fused(model: nn.Module, input: Any) -> Callable[..., Any]:
    return fuse(model)


def _compiled(model: nn.Module, input: Any) -> Callable[..., Any]:
    torch.compiler.reset()  # torch counts each model as a recompilation of the same and gives up
    whole: Callable[..., Any] = torch.compile(model, fullgraph=True)
    return whole


def _exported(model: nn.Module, input: Any) -> Callable[..., Any]:
    return torch.export.export(model, *split(input)).module()


def _onnx(model: nn.Module, input: Any) -> Callable[..., Any]:
    import onnxruntime

    logger = logging.getLogger("torch.onnx")  # the exporter logs about its own dependencies
    level = logger.level
    logger.setLevel(logging.ERROR)
    args, kwargs = split(input)
    try:
        program = torch.onnx.export(model.eval(), args, kwargs=kwargs, dynamo=True, verbose=False)
    finally:
        logger.setLevel(level)
    assert program is not None
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [each.name for each in session.get_inputs()]

    def run(*args: Any, **kwargs: Any) -> Any:
        arrays = [tensor.numpy() for tensor in leaves((args, kwargs)).values()]
        results = session.run(None, dict(zip(names, arrays, strict=False)))
        tensors = tuple(torch.from_numpy(np.asarray(each)) for each in results)
        return tensors if len(tensors) > 1 else tensors[0]

    return run


def _jax(model: nn.Module, input: Any) -> Callable[..., Any]:
    import jax

    steps = [place for place in walk(model) if place.step]
    layers = []
    for place in steps:
        name = "a forward of its own" if place.layer is None else place.layer.name
        if name not in _JAX:
            raise ValueError(
                f"jax follows plain chains of {', '.join(_JAX)}, got {name} ({place.kind})"
            )
        layers.append((name, arguments_of(place.module)))
    double = input.dtype == torch.float64

    def forward(x: Any) -> Any:
        for name, arguments in layers:
            x = _JAX[name](jax, x, **arguments)
        return x

    compiled = jax.jit(forward)

    def run(given: Any) -> Any:
        with jax.enable_x64(double), jax.default_matmul_precision("highest"):
            return torch.from_numpy(np.array(compiled(given.numpy())))

    for _, arguments in layers:
        for name, value in arguments.items():
            if isinstance(value, np.ndarray):
                arguments[name] = value.astype(np.float64 if double else np.float32)
    return run


_JAX: dict[str, Callable[..., Any]] = {
    "dense": lambda jax, x, weight, bias: x @ weight.T + (0 if bias is None else bias),
    "relu": lambda jax, x: jax.nn.relu(x),
    "softmax": lambda jax, x, dim: jax.nn.softmax(x, dim),
    "log-softmax": lambda jax, x, dim: jax.nn.log_softmax(x, dim),
    "identity": lambda jax, x: x,
}


@dataclass(frozen=True)
class Kind:
    """How a candidate runs, and what it needs.

    Attributes:
        build: makes a function of the input.
        shows: whether it shows what happens at the places.
        anywhere: whether it computes on any device of torch's.
        dtypes: what it computes in.
        packages: what it needs; the extra of this package that installs them has its name.
    """

    build: Builder
    shows: bool = False
    anywhere: bool = True
    dtypes: tuple[str, ...] = tuple(DTYPES)
    packages: tuple[str, ...] = ()


KINDS = {
    "eager": Kind(_eager, shows=True),
    "fused": Kind(_elsewhere(_fused)),
    "compiled": Kind(_elsewhere(_compiled)),
    "exported": Kind(_elsewhere(_exported)),
    "onnx": Kind(
        _elsewhere(_onnx),
        anywhere=False,
        dtypes=("float64", "float32", "float16"),  # ONNX Runtime has no bfloat16 Gemm on the CPU
        packages=("onnx", "onnxscript", "onnxruntime"),
    ),
    "jax": Kind(_elsewhere(_jax), anywhere=False, dtypes=("float64", "float32"), packages=("jax",)),
    "numpy": Kind(_numpy, shows=True, anywhere=False, dtypes=("float32",)),
}
