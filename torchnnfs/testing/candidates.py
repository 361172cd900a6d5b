"""Who is judged: each way of computing a model, in a few lines."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from torchnnfs.fused import fuse
from torchnnfs.testing.reference import Array
from torchnnfs.testing.twins import chain_paths, find_layers, is_chain, to_numpy, twin_of


class Call(NamedTuple):
    """One call of one layer: what went in and what came out, exactly, as float64 arrays."""

    path: str
    kind: str
    input: Array
    output: Array


class Trace(NamedTuple):
    """What a candidate showed: the calls of the layers, as far as it shows them, and the result."""

    calls: list[Call]
    output: Array


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
        dtype: what parameters and input are cast to first.
    """

    name: str = "eager"
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.name not in KINDS:
            raise ValueError(f"unknown candidate {self.name!r}; known are {', '.join(KINDS)}")
        kind = KINDS[self.name]
        if self.dtype not in [DTYPES[name] for name in kind.dtypes]:
            raise ValueError(f"{self.name} computes in {', '.join(kind.dtypes)}, got {self.dtype}")
        if torch.device(self.device).type == "meta":
            raise ValueError("candidates compute numbers, which the meta device does not have")
        if not kind.anywhere and torch.device(self.device).type != "cpu":
            raise ValueError(f"{self.name} computes on the CPU here, got {self.device}")

    @property
    def dtype_name(self) -> str:
        """The dtype as NumPy spells it."""
        return str(self.dtype).removeprefix("torch.")


class MissingExtraError(ImportError):
    """A candidate was asked for by name whose packages are not installed."""


def missing(name: str) -> str | None:
    """What the candidate `name` lacks and how to get it, in one line, or None."""
    kind = KINDS[name]
    absent = [package for package in kind.packages if importlib.util.find_spec(package) is None]
    if not absent:
        return None
    return f"{name} needs {', '.join(absent)}: pip install 'torchnnfs[{kind.extra}]'"


def devices_here() -> list[torch.device]:
    """The CPU and every accelerator of this machine."""
    if not torch.accelerator.is_available():
        return [torch.device("cpu")]
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    count = torch.accelerator.device_count()
    return [torch.device("cpu"), *(torch.device(accelerator.type, i) for i in range(count))]


def choose(
    names: Sequence[str],
    devices: Sequence[torch.device] | None = None,
    dtypes: Sequence[torch.dtype] = (torch.float32,),
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
        lack = missing(name)
        if lack:
            raise MissingExtraError(lack)
        if name == "numpy":
            chosen.append(Candidate("numpy"))  # the book's NumPy knows float32 only
            continue
        kind = KINDS[name]
        known = [dtype for dtype in dtypes if dtype in [DTYPES[each] for each in kind.dtypes]]
        if not known:
            raise ValueError(f"{name} computes in {', '.join(kind.dtypes)} alone")
        places = devices if kind.anywhere else [torch.device("cpu")]
        chosen += [Candidate(name, device, dtype) for device in places for dtype in known]
    return chosen


def watch(model: nn.Module, input: Tensor, after: Callable[..., Tensor | None]) -> Tensor:
    """Run `model`, and `after(path, layer, input, output)` behind each call of each layer.

    What `after` returns, if anything, takes the place of the output.
    """
    handles = []
    try:
        for path, layer in find_layers(model).items():
            received: list[Tensor] = []

            # The input is copied before the call, for the layer may work in place.
            def before(
                layer: nn.Module,
                args: tuple[Any, ...],
                keywords: dict[str, Any],
                received: list[Tensor] = received,
            ) -> None:
                given: Tensor = args[0] if args else next(iter(keywords.values()))
                received.append(given.detach().clone())

            def behind(
                layer: nn.Module,
                args: tuple[Any, ...],
                output: Tensor,
                path: str = path,
                received: list[Tensor] = received,
            ) -> Tensor | None:
                return after(path, layer, received.pop(), output)

            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(layer.register_forward_hook(behind))
        with torch.no_grad():
            output = model(input)
        if not isinstance(output, Tensor):
            kind = type(output).__name__
            raise TypeError(f"compare expects a model whose output is a tensor, got {kind}")
        return output
    finally:
        for handle in handles:
            handle.remove()


def _eager(model: nn.Module, input: Tensor) -> Trace:
    calls: list[Call] = []

    def after(path: str, layer: nn.Module, received: Tensor, output: Tensor) -> None:
        calls.append(Call(path, type(layer).__name__, to_numpy(received), to_numpy(output)))

    output = watch(model, input, after)
    return Trace(calls, to_numpy(output))


def _numpy(model: nn.Module, input: Tensor) -> Trace:
    calls: list[Call] = []

    def after(path: str, layer: nn.Module, received: Tensor, output: Tensor) -> Tensor:
        computed = twin_of(layer).forward(received.numpy(), **_arguments(layer, np.float32))
        computed = np.asarray(computed, np.float32)
        result = computed.astype(np.float64)
        calls.append(Call(path, type(layer).__name__, to_numpy(received), result))
        return torch.from_numpy(computed)

    with np.errstate(all="ignore"):
        output = watch(model, input, after)
    return Trace(calls, to_numpy(output))


def _arguments(layer: nn.Module, dtype: Any) -> dict[str, Any]:
    """The arguments of the layer's twin with arrays of `dtype`."""
    return {
        name: value.astype(dtype) if isinstance(value, np.ndarray) else value
        for name, value in twin_of(layer).arguments(layer).items()
    }


def _fused(model: nn.Module, input: Tensor) -> Trace:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what torch.compile itself uses
        return Trace([], to_numpy(fuse(model)(input)))


def _compiled(model: nn.Module, input: Tensor) -> Trace:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", DeprecationWarning)  # of what the compiler itself uses
        # Each model is another one; torch counts them as recompilations of the same and gives up.
        with torch._dynamo.config.patch(recompile_limit=256):
            return Trace([], to_numpy(torch.compile(model, fullgraph=True)(input)))


def _exported(model: nn.Module, input: Tensor) -> Trace:
    with warnings.catch_warnings(), torch.no_grad():
        return Trace([], to_numpy(torch.export.export(model, (input,)).module()(input)))


def _onnx(model: nn.Module, input: Tensor) -> Trace:
    import onnxruntime

    # The exporter warns and logs about its own dependencies.
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            program = torch.onnx.export(model.eval(), (input,), dynamo=True, verbose=False)
        finally:
            logger.setLevel(level)
    assert program is not None
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (output,) = session.run(None, {session.get_inputs()[0].name: input.numpy()})
    return Trace([], np.asarray(output, np.float64))


def _jax(model: nn.Module, input: Tensor) -> Trace:
    import jax

    if not is_chain(model):
        raise ValueError(f"jax follows plain chains of layers, got {type(model).__name__}")
    double = input.dtype == torch.float64
    found = find_layers(model)
    layers = [
        (twin_of(layer).forward.__name__, _arguments(layer, np.float64 if double else np.float32))
        for layer in (found[path] for path in chain_paths(model))
    ]

    unknown = [name for name, _ in layers if name not in _JAX]
    if unknown:
        raise ValueError(f"jax knows {', '.join(_JAX)}, got {unknown[0]}")

    def forward(x: Any) -> Any:
        for name, arguments in layers:
            x = _JAX[name](jax, x, **arguments)
        return x

    with jax.enable_x64(double), jax.default_matmul_precision("highest"):
        return Trace([], np.asarray(jax.jit(forward)(input.numpy()), np.float64))


_JAX: dict[str, Callable[..., Any]] = {
    "dense": lambda jax, x, weights, biases: x @ weights + (0 if biases is None else biases),
    "relu": lambda jax, x: jax.nn.relu(x),
    "softmax": lambda jax, x, dim: jax.nn.softmax(x, dim),
    "log_softmax": lambda jax, x, dim: jax.nn.log_softmax(x, dim),
    "identity": lambda jax, x: x,
}


@dataclass(frozen=True)
class Kind:
    """How a candidate runs, and what it needs.

    Attributes:
        run: from a model and an input, both already of the candidate's device and dtype.
        anywhere: whether it computes on any device of torch's.
        dtypes: what it computes in.
        extra: the extra of this package that installs what it needs.
        packages: what that is.
    """

    run: Callable[[nn.Module, Tensor], Trace]
    anywhere: bool = True
    dtypes: tuple[str, ...] = tuple(DTYPES)
    extra: str | None = None
    packages: tuple[str, ...] = ()


KINDS = {
    "eager": Kind(_eager),
    "fused": Kind(_fused),
    "compiled": Kind(_compiled),
    "exported": Kind(_exported),
    "onnx": Kind(
        _onnx,
        anywhere=False,
        dtypes=("float64", "float32", "float16"),  # ONNX Runtime has no bfloat16 Gemm on the CPU
        extra="onnx",
        packages=("onnx", "onnxscript", "onnxruntime"),
    ),
    "jax": Kind(
        _jax, anywhere=False, dtypes=("float64", "float32"), extra="jax", packages=("jax",)
    ),
    "numpy": Kind(_numpy, anywhere=False, dtypes=("float32",)),
}
