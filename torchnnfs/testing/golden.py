"""Traces to and from files: a run on another machine is one more source of traces."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from torchnnfs.testing.candidates import DTYPES
from torchnnfs.testing.files import write_whole
from torchnnfs.testing.models import leaves, to_numpy, walk
from torchnnfs.testing.precision import Array
from torchnnfs.testing.traces import Call, Trace

VERSION = 2


@dataclass(frozen=True)
class Setting:
    """What a run depends on.

    Attributes:
        arrays: those of the input, and the model's parameters and buffers.
        layers: path and type of each place of the model.
    """

    arrays: dict[str, Array]
    layers: list[list[str]]


def setting(model: nn.Module, input: Any) -> Setting:
    """What a run of the model on that input depends on."""
    found = {f"input{name}": to_numpy(tensor) for name, tensor in leaves(input).items()}
    for path, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            found[f"parameter {path}"] = to_numpy(tensor)
    layers = [[place.path, place.kind] for place in walk(model)]
    return Setting({key: _narrow(array) for key, array in found.items()}, layers)


def save(name: str, here: Setting, traces: Iterable[Trace], environment: dict[str, str]) -> None:
    """Write parameters, input and all that the candidates showed to an ``.npz`` file, whole.

    Raises:
        ValueError: the file cannot be written.
    """
    arrays = dict(here.arrays)
    runs = []
    for trace in traces:
        run = replace(trace, again=None, device=_device(trace.device, environment))
        runs.append(_packed(asdict(run), arrays))
    about = {"version": VERSION, "layers": here.layers, "runs": runs}
    content: dict[str, Any] = {**arrays, "about": np.frombuffer(json.dumps(about).encode(), "u1")}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **content)
    write_whole(name, buffer.getvalue())


def load(name: str, here: Setting) -> list[Trace]:
    """The traces of a file that `save` wrote in this very setting.

    Raises:
        ValueError: no such file, or one of another kind or version, or of another model or input.
    """
    try:
        with np.load(name, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        about: dict[str, Any] = json.loads(arrays.pop("about").tobytes())
        version, layers, runs = about["version"], about["layers"], about["runs"]
    except Exception as error:
        # NumPy raises a dozen kinds for a dozen kinds of damage; all mean the same to a reader.
        raise ValueError(f"{name!r} is no golden file: {error}") from None
    if version != VERSION:
        raise ValueError(f"{name!r} has version {version} of the format, expected {VERSION}")
    expected = here.arrays
    recorded = {key for key in arrays if key.startswith(("input", "parameter "))}
    for key in sorted(recorded | expected.keys()):
        same = key in arrays and key in expected
        if not same or not np.array_equal(arrays[key], expected[key]):
            raise ValueError(
                f"{name!r} was made from another {key}; it takes the same data, network and seed"
            )
    if not runs:
        raise ValueError(f"{name!r} holds no runs")
    if layers != here.layers:
        raise ValueError(f"{name!r} was made from another network: its layers are {layers}")
    try:
        return [_trace(_unpacked(run, arrays)) for run in runs]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{name!r} is damaged: {type(error).__name__}: {error}") from None


def _trace(run: dict[str, Any]) -> Trace:
    if run["dtype"] not in DTYPES:
        raise ValueError(f"unknown dtype {run['dtype']!r}")
    calls = tuple(Call(**each) for each in run.pop("calls"))
    return Trace(**{**run, "name": f"golden {run['name']}", "calls": calls})


def _device(device: str, environment: dict[str, str]) -> str:
    return f"{device} ({environment.get(f'device {device}', 'elsewhere')})"


def _packed(value: Any, arrays: dict[str, Array]) -> Any:
    """`value` as JSON takes it; its arrays go to `arrays` and leave their keys."""
    if isinstance(value, np.ndarray):
        key = f"array {len(arrays)}"
        arrays[key] = _narrow(value)
        return {"array": key}
    if isinstance(value, Mapping):
        return {"dict": [[key, _packed(entry, arrays)] for key, entry in value.items()]}
    if isinstance(value, list | tuple):
        return [_packed(entry, arrays) for entry in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def _unpacked(value: Any, arrays: dict[str, Array]) -> Any:
    if isinstance(value, dict):
        if "array" in value:
            array = arrays[value["array"]]
            return array.astype(np.float64) if array.dtype.kind == "f" else array
        return {key: _unpacked(entry, arrays) for key, entry in value["dict"]}
    return tuple(_unpacked(each, arrays) for each in value) if isinstance(value, list) else value


def _narrow(array: Array) -> Array:
    """In float32 where that loses nothing."""
    if array.dtype != np.float64:
        return array
    with np.errstate(over="ignore"):
        single = array.astype(np.float32)
    return single if np.array_equal(single, array, equal_nan=True) else array
