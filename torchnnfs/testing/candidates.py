"""Phase 1: whatever computes a model gives a trace of what came out at which place."""

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchnnfs.fused import fuse
from torchnnfs.testing.layers import Layer
from torchnnfs.testing.models import (
    Place,
    arguments_of,
    borrowed,
    cast_input,
    computable,
    copied,
    own_dtype,
    stored_dtype,
    takes,
    walk,
)
from torchnnfs.testing.traces import Call, Formula, Trace, readable, watched
from torchnnfs.testing.values import GIVEN, convert, kept_dtype, leaves, split, to_array

#: From a model and an example input to a function of such inputs.
Build = Callable[[nn.Module, Any], Callable[..., Any]]

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
        kind = kind_of(self.name)
        if self.dtype is not None and dtype_name(self.dtype) not in kind.dtypes:
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
        kind, dtype, calls = KINDS[self.name], self.dtype or torch.float32, list[Call]()
        places = {each.path: each for each in walk(model)} if kind.build is None else {}
        modules = {path: place.module for path, place in places.items()}
        modules |= {path: model.get_submodule(path) for path in extra if places and path}
        formulas: dict[str, Formula] = {
            path: partial(_in_float32, place.module, place.layer)
            for path, place in places.items()
            if kind.numpy and place.layer
        }
        formulas |= broken or {}

        def once() -> Any:
            args, kwargs = split(cast_input(model, input, self.device, dtype))
            output = compute(*args, **kwargs)
            if not leaves(arrays := convert(output, GIVEN, to_array)):
                raise TypeError(
                    "compare expects a model whose output is a tensor, or tensors in tuples, lists "
                    f"and dictionaries, got {type(output).__name__}"
                )
            return arrays

        how = borrowed if kind.build is None else partial(_built, self.name, kind.build, input)
        stored = stored_dtype(model, input, dtype)
        with torch.no_grad(), how(model, self.device, stored) as compute:
            for path, formula in formulas.items():
                vars(modules[path])["forward"] = _computed(places[path], formula, dtype)
            with watched(modules, calls):
                output = once()
            again = once() if broken is None else None
        return Trace(self.name, str(self.device), dtype_name(dtype), tuple(calls), output, again)


@contextmanager
def _built(
    name: str, build: Build, input: Any, model: nn.Module, device: Any, dtype: torch.dtype | None
) -> Iterator[Callable[..., Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # compilers and exporters warn of what they use
        try:
            own = own_dtype(model, input) if dtype is None else dtype
            yield build(copied(model).to(device, dtype), cast_input(model, input, device, own))
        except Exception as error:
            words = " ".join(str(error).split())[:300]
            raise ValueError(f"{name} cannot compute this model: {words}") from error


def dtype_name(dtype: torch.dtype) -> str:
    """The dtype as NumPy spells it."""
    return str(dtype).removeprefix("torch.")


class MissingExtraError(ImportError):
    """A candidate was asked for by name whose packages are not installed."""


def devices_here() -> list[torch.device]:
    """The CPU and every accelerator of this machine."""
    kind, count = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
    return [torch.device("cpu"), *(torch.device(f"{kind}:{i}") for i in range(count))]


def choose(
    names: Sequence[str],
    devices: Sequence[torch.device] | None = None,
    dtypes: Sequence[torch.dtype | None] = (None,),
) -> list[Candidate]:
    """The candidates of these names on each device and in each dtype where that makes sense."""
    devices = devices_here() if devices is None else devices
    chosen: list[Candidate] = []
    for name in dict.fromkeys(names):
        kind = kind_of(name)
        absent = [each for each in kind.packages if importlib.util.find_spec(each) is None]
        if absent:
            raise MissingExtraError(
                f"{name} needs {', '.join(absent)}: pip install 'torchnnfs[{name}]'"
            )
        known = [dtype for dtype in dtypes if dtype is None or dtype_name(dtype) in kind.dtypes]
        if len(kind.dtypes) == 1:  # it has no choice
            known = [None]
        if not known:
            raise ValueError(f"{name} computes in {', '.join(kind.dtypes)} alone")
        places = devices if kind.anywhere else [torch.device("cpu")]
        chosen += [Candidate(name, device, dtype) for device in places for dtype in known]
    return chosen


def _computed(place: Place, formula: Formula, dtype: torch.dtype) -> Callable[..., Any]:
    """A forward that computes the formula; what is no integer comes in the dtype."""
    own, inplace = place.module.forward, getattr(place.module, "inplace", False)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given: Any = next(iter((*args, *kwargs.values())), None)
        x = readable(given) if isinstance(given, Tensor) else None
        if place.layer is None or not takes(x, place.layer):
            return own(*args, **kwargs)
        result = torch.from_numpy(np.array(formula(x)))
        result = result.to(given.device, kept_dtype(result, dtype))
        return given.copy_(result) if inplace else result

    return forward


def _in_float32(module: nn.Module, layer: Layer, x: np.ndarray) -> np.ndarray:
    """The formula of a layer, as NumPy computes it."""
    with computable(module, layer, x):
        return layer.forward(single(x), **single(arguments_of(module)))


def single(value: Any) -> Any:
    """Floating-point arrays in float32, everything else as it is."""
    return convert(value, np.ndarray, lambda x: x.astype(np.float32) if x.dtype.kind == "f" else x)


def _compiled(model: nn.Module, input: Any) -> Callable[..., Any]:
    torch.compiler.reset()  # torch counts each model as a recompilation of the same and gives up
    return torch.compile(model, fullgraph=True)


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
    program.initialize_inference_session(  # its own choice is a GPU where there is one
        lambda model: onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    )

    def run(*args: Any, **kwargs: Any) -> Any:
        results = tuple(program(*args, **kwargs))
        return results if len(results) > 1 else results[0]

    return run


def _jax(model: nn.Module, input: Any) -> Callable[..., Any]:
    import jax

    layers: list[tuple[Callable[..., Any], dict[str, Any]]] = []
    double = any(each.dtype == torch.float64 for each in leaves(input).values())
    for place in walk(model):
        name = "a forward of its own" if place.layer is None else place.layer.name
        if name not in _JAX:
            raise ValueError(
                f"jax follows plain chains of {', '.join(_JAX)}, got {name} ({place.kind})"
            )
        layers.append((_JAX[name], arguments_of(place.module)))

    @jax.jit
    def forward(x: Any) -> Any:
        for layer, arguments in layers:
            x = layer(jax, x, **arguments)
        return x

    def run(given: Any) -> Any:
        with jax.enable_x64(double), jax.default_matmul_precision("highest"):
            return torch.from_numpy(np.array(forward(given.numpy())))

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
    """How a candidate runs; the extra of this package that installs what it needs has its name."""

    # From a copy of the model and an example input to a function; without it torch computes the
    # model as it is and shows its places, or NumPy's formulas take the place of the layers.
    build: Build | None = None
    numpy: bool = False
    anywhere: bool = True  # on any device of torch's, or on the CPU alone
    dtypes: tuple[str, ...] = tuple(DTYPES)
    packages: tuple[str, ...] = ()


#: ONNX Runtime has no bfloat16 Gemm on the CPU.
_OF_ONNX = ("float64", "float32", "float16")

KINDS = {
    "eager": Kind(),
    "fused": Kind(lambda model, input: fuse(model)),
    "compiled": Kind(_compiled),
    "exported": Kind(lambda model, input: torch.export.export(model, *split(input)).module()),
    "onnx": Kind(_onnx, False, False, _OF_ONNX, ("onnx", "onnxscript", "onnxruntime")),
    "jax": Kind(_jax, False, False, ("float64", "float32"), ("jax",)),
    "numpy": Kind(numpy=True, anywhere=False, dtypes=("float32",)),
}


def kind_of(name: str) -> Kind:
    """How the candidate of that name runs."""
    if name not in KINDS:
        raise ValueError(f"unknown candidate {name!r}; known are {', '.join(KINDS)}")
    return KINDS[name]
