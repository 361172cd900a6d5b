"""Traces to and from files: a run on another machine is one more source of traces."""

import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any
from zipfile import ZipFile, ZipInfo

import numpy as np
import torch
from torch import nn

from torchnnfs.testing.candidates import DTYPES
from torchnnfs.testing.models import walk
from torchnnfs.testing.precision import Array
from torchnnfs.testing.traces import Call, Trace
from torchnnfs.testing.values import leaves, pieces, to_numpy

VERSION = 3
#: The most that a file may unpack to: this many bytes, or times the size of input and parameters.
MOST_BYTES, MOST_TIMES = 1 << 30, 256


def setting(model: nn.Module, input: Any) -> dict[str, Array]:
    """What a run depends on: the input, parameters and buffers, and the types of the layers."""
    found = {f"input{name}": tensor for name, tensor in leaves(input).items()}
    state = model.state_dict().items()
    found |= {f"parameter {path}": each for path, each in state if isinstance(each, torch.Tensor)}
    layers = {place.path: place.kind for place in walk(model)}
    arrays = {"network": _text(layers)}
    for key, tensor in found.items():
        *places, numbers = pieces(tensor)
        arrays[key] = to_numpy(numbers)
        arrays |= {f"places {i} of {key}": to_numpy(each) for i, each in enumerate(places)}
    return arrays


def content(here: dict[str, Array], traces: Iterable[Trace], environment: dict[str, str]) -> bytes:
    """The setting and all that the candidates showed, as an ``.npz`` file."""
    arrays, runs = dict(here), []
    for trace in traces:
        device = f"{trace.device} ({environment.get(f'device {trace.device}', 'elsewhere')})"
        runs.append(_packed(replace(trace, again=None, device=device), arrays))
    whole: dict[str, Any] = {**arrays, "about": _text({"version": VERSION, "runs": runs})}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **whole)
    return buffer.getvalue()


def load(name: str, here: dict[str, Array]) -> list[Trace]:
    """The traces of a file that `content` made in this very setting; ValueError for any other."""
    most = max(MOST_BYTES, MOST_TIMES * sum(array.nbytes for array in here.values()))
    try:
        if os.path.exists(name) and not os.path.isfile(name):
            raise ValueError("it is no regular file")
        with ZipFile(name) as file:
            members = file.infolist()
            size = sum(member.file_size for member in members)
            if size > most:
                raise ValueError(f"it would unpack to {size} bytes, more than the {most} allowed")
            arrays = {each.filename.removesuffix(".npy"): _array(file, each) for each in members}
        about: dict[str, Any] = json.loads(arrays.pop("about").tobytes())
        version, runs = about["version"], about["runs"]
    except Exception as error:
        # Zip, JSON and NumPy raise a dozen kinds for as many kinds of damage; all mean the same.
        raise ValueError(f"{name!r} is no golden file: {_said(error)}") from None
    if version != VERSION:
        raise ValueError(f"{name!r} has version {version!r} of the format, expected {VERSION}")
    kept = {key for key in arrays if not key.startswith("array ")}
    for key in sorted(kept | here.keys()):
        same = key in arrays and key in here
        if not same or not np.array_equal(arrays[key], here[key], equal_nan=True):
            raise ValueError(
                f"{name!r} was made from another {key}; it takes the same data, network and seed"
            )
    if not runs:
        raise ValueError(f"{name!r} holds no runs")
    try:
        paths = {*json.loads(here["network"].tobytes()), ""}
        return [_trace(_unpacked(run, arrays), paths) for run in runs]
    except Exception as error:
        raise ValueError(f"{name!r} is damaged: {_said(error)}") from None


def _text(value: Any) -> Array:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _array(file: ZipFile, member: ZipInfo) -> Array:
    """An array of plain numbers; its header is believed only where it fits the member's size."""
    with file.open(member) as content:
        if np.lib.format.read_magic(content) != (1, 0):
            raise ValueError("its arrays are of another version")
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(content)
        size = math.prod(shape) * dtype.itemsize
        if dtype.kind not in "biufc" or size != member.file_size - content.tell():
            raise ValueError(f"an array of {dtype} in shape {shape} takes other bytes")
        flat = np.frombuffer(content.read(), dtype)
    return flat.reshape(shape, order="F" if fortran else "C")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def _trace(run: dict[str, Any], paths: set[str]) -> Trace:
    """A trace whose every part is of the kind that judging takes."""
    if run.keys() != {each.name for each in fields(Trace)}:
        raise ValueError(f"a run has the entries {[*run]}")
    for word in (run["name"], run["device"], *(each["kind"] for each in run["calls"])):
        if not isinstance(word, str) or len(word) > 200 or not word.isprintable():
            raise ValueError(f"a name is expected to be a line of text, got {word!r}")
    if run["dtype"] not in DTYPES:
        raise ValueError(f"unknown dtype {run['dtype']!r}")
    calls = tuple(Call(**each) for each in run["calls"])
    for call in calls:
        if call.path not in paths or not isinstance(call.args, tuple):
            raise ValueError(f"a call of {call.path!r} with {type(call.args).__name__}")
        if not (call.args or dict(call.kwargs)) or not leaves(call.output):
            raise ValueError(f"a call of {call.path!r} without input or output")
    if not leaves(run["output"]):
        raise ValueError("a run without an output")
    return Trace(**{**run, "name": f"golden {run['name']}", "calls": calls, "again": None})


def _packed(value: Any, arrays: dict[str, Array]) -> Any:
    """`value` as JSON takes it; its arrays go to `arrays` and leave their keys."""
    if isinstance(value, np.ndarray):
        key = f"array {len(arrays)}"
        arrays[key] = value
        return {"array": key}
    if is_dataclass(value) and not isinstance(value, type):
        value = {each.name: getattr(value, each.name) for each in fields(value)}
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
