"""What candidates gave on another machine, in a file: compared without meeting."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchnnfs.testing.candidates import DTYPES, Call, Candidate, Trace
from torchnnfs.testing.files import write_whole
from torchnnfs.testing.reference import Array
from torchnnfs.testing.twins import find_layers, to_numpy

VERSION = 1


@dataclass(frozen=True)
class Recorded:
    """A candidate that ran elsewhere; the attributes of `Candidate`, as far as rows need them."""

    name: str
    device: str
    dtype: torch.dtype

    @property
    def dtype_name(self) -> str:
        """The dtype as NumPy spells it."""
        return str(self.dtype).removeprefix("torch.")


def save(
    name: str,
    model: nn.Module,
    input: Tensor,
    traces: Iterable[tuple[Candidate | Recorded, Trace]],
    environment: dict[str, str],
) -> None:
    """Write parameters, input and all that the candidates showed to an ``.npz`` file, whole.

    Raises:
        ValueError: the file cannot be written.
    """
    arrays: dict[str, Array] = {"input": _narrow(to_numpy(input))}
    for path, parameter in model.state_dict().items():
        arrays[f"parameter {path}"] = _narrow(to_numpy(parameter))
    runs = []
    for i, (candidate, trace) in enumerate(traces):
        arrays[f"{i} output"] = _narrow(trace.output)
        for j, call in enumerate(trace.calls):
            arrays[f"{i} {j} input"] = _narrow(call.input)
            arrays[f"{i} {j} output"] = _narrow(call.output)
        where = str(candidate.device)
        runs.append(
            {
                "name": candidate.name,
                "device": f"{where} ({environment.get(f'device {where}', 'elsewhere')})",
                "dtype": candidate.dtype_name,
                "calls": [[call.path, call.kind] for call in trace.calls],
            }
        )
    about: dict[str, Any] = {
        "version": VERSION,
        "layers": _layers(model),
        "runs": runs,
        "environment": environment,
    }
    about["digest"] = _digest(arrays, about)
    buffer = io.BytesIO()
    content: dict[str, Any] = {**arrays}
    content["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez_compressed(buffer, **content)
    write_whole(name, buffer.getvalue())


def load(name: str, model: nn.Module, input: Tensor) -> list[tuple[Recorded, Trace]]:
    """The candidates of a file that `save` wrote, for this very model and input.

    Raises:
        ValueError: no such file, or one of another kind, version or content than was written, or
            of another model or input.
    """
    try:
        with np.load(name, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
        about: dict[str, Any] = json.loads(arrays.pop("about").tobytes())
        version, digest, runs = about["version"], about.pop("digest"), about["runs"]
    except Exception as error:
        # NumPy raises a dozen kinds for a dozen kinds of damage; all mean the same to a reader.
        raise ValueError(f"{name!r} is no golden file: {error}") from None
    if version != VERSION:
        raise ValueError(f"{name!r} has version {version} of the format, expected {VERSION}")
    if digest != _digest(arrays, about):
        raise ValueError(f"{name!r} is damaged: its content does not match its digest")
    expected = {"input": to_numpy(input)}
    expected |= {f"parameter {path}": to_numpy(p) for path, p in model.state_dict().items()}
    recorded = {key for key in arrays if key == "input" or key.startswith("parameter ")}
    for key in sorted(recorded | expected.keys()):
        if (
            key not in arrays
            or key not in expected
            or not np.array_equal(arrays[key].astype(np.float64), expected[key])
        ):
            raise ValueError(
                f"{name!r} was made from another {key}; it takes the same data, network and seed"
            )
    if about["layers"] != _layers(model):
        raise ValueError(
            f"{name!r} was made from another network: its layers are {about['layers']}"
        )
    loaded = []
    for i, run in enumerate(runs):
        calls = [
            Call(path, kind, _wide(arrays[f"{i} {j} input"]), _wide(arrays[f"{i} {j} output"]))
            for j, (path, kind) in enumerate(run["calls"])
        ]
        candidate = Recorded(f"golden {run['name']}", run["device"], DTYPES[run["dtype"]])
        loaded.append((candidate, Trace(calls, _wide(arrays[f"{i} output"]))))
    return loaded


def _layers(model: nn.Module) -> list[list[str]]:
    return [[path, type(layer).__name__] for path, layer in find_layers(model).items()]


def _narrow(array: Array) -> Array:
    """In float32 where that loses nothing."""
    with np.errstate(over="ignore"):
        single = array.astype(np.float32)
    return single if np.array_equal(single, array, equal_nan=True) else array


def _wide(array: Array) -> Array:
    return array.astype(np.float64)


def _digest(arrays: dict[str, Array], about: dict[str, Any]) -> str:
    found = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for key in sorted(arrays):
        array = arrays[key]
        found.update(f"{key} {array.shape} {array.dtype.str}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()
