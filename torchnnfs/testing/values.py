"""Tensors, arrays and numbers, alone or in tuples, lists, dictionaries and dataclasses."""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchnnfs.testing.precision import Array


class RefusedError(ValueError):
    """What `compare` cannot judge, and why; no failure of the model."""


def to_numpy(tensor: Tensor) -> Array:
    """The tensor's exact values as an array of its own; floating-point ones in float64."""
    if tensor.is_meta or tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized:
        raise RefusedError(
            f"compare expects dense tensors with values, got one of {tensor.dtype} in "
            f"{tensor.layout} on {tensor.device}; call .to_dense() or .dequantize() first"
        )
    tensor = tensor.detach().cpu()  # first to the CPU: not every accelerator has float64
    array: Array = tensor.to(kept_dtype(tensor, torch.float64), copy=True).resolve_conj().numpy()
    return array


def pieces(tensor: Tensor) -> list[Tensor]:
    """The tensor itself; of a sparse one those of its places, and at last that of its numbers."""
    tensor = tensor.detach()
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]


def kept_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """What `dtype` makes of a tensor: whole numbers stay, complex ones take a type of its width."""
    if dtype is None:
        return tensor.dtype
    if tensor.is_complex():
        return torch.complex128 if dtype == torch.float64 else torch.complex64
    return dtype if tensor.is_floating_point() else tensor.dtype


def parts(array: Any) -> Any:
    """An array of complex numbers as one of pairs, real and imaginary part; else as it is."""
    if isinstance(array, np.ndarray) and array.dtype.kind == "c":
        return np.ascontiguousarray(array).view(array.real.dtype).reshape(*array.shape, 2)
    return array


#: What a model may give: tensors, and numbers of Python and NumPy.
GIVEN = Tensor | complex | float | int | np.generic


def to_array(value: Any) -> Array:
    """One of `GIVEN` as an array."""
    return to_numpy(value) if isinstance(value, Tensor) else np.asarray(value)


def convert(
    value: Any,
    kind: Any,
    change: Callable[[Any], Any],
    whole: Callable[[Any], bool] = lambda value: False,
) -> Any:
    """`value` with `change` of each `kind` in its tuples, lists, dictionaries and dataclasses.

    What is `whole` is not looked into.
    """
    if whole(value):
        return change(value)
    if isinstance(value, Mapping):
        found = {key: convert(entry, kind, change, whole) for key, entry in value.items()}
        if type(value) is not dict and isinstance(value, MutableMapping):
            # Somebody's own type may forbid this: then a plain dictionary serves.
            with suppress(TypeError, ValueError, LookupError, AttributeError, RuntimeError):
                same = copy.copy(value)
                for key, entry in found.items():
                    same[key] = entry
                return same
        return found
    if is_dataclass(value) and not isinstance(value, type):
        value = copy.copy(value)
        for each in fields(value):
            entry = convert(getattr(value, each.name), kind, change, whole)
            object.__setattr__(value, each.name, entry)  # also of a frozen one
        return value
    if isinstance(value, list | tuple):
        listed = [convert(entry, kind, change, whole) for entry in value]
        if hasattr(value, "_make"):  # a named tuple
            return value._make(listed)
        return listed if isinstance(value, list) else tuple(listed)
    return change(value) if isinstance(value, kind) else value


def inside(value: Any) -> Mapping[Any, Any] | None:
    """What a tuple, list, dictionary or dataclass holds, by its places; None for anything else."""
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if is_dataclass(value) and not isinstance(value, type | Mapping):
        return {each.name: getattr(value, each.name) for each in fields(value)}
    return value if isinstance(value, Mapping) else None


def entries(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What is in tuples, lists, dictionaries and dataclasses, and where: ``[0]['h']``."""
    held = inside(value)
    if held is None:
        yield name, value
        return
    for key, entry in held.items():
        yield from entries(entry, f"{name}[{key!r}]")


def leaves(value: Any) -> dict[str, Any]:
    """The tensors and arrays among the `entries`; those of complex numbers in their `parts`."""
    arrays = Tensor | np.ndarray
    return {name: parts(entry) for name, entry in entries(value) if isinstance(entry, arrays)}


def unread(output: Any) -> list[str]:
    """What is in a model's output, and is neither tensor nor text, so that nothing judges it."""
    return [
        f"(output){name}, which is no tensor but {type(entry).__name__}"
        for name, entry in entries(output)
        if not isinstance(entry, Tensor | np.ndarray | str | None)
    ]


def rows_in(input: Any) -> int:
    """How many rows an input has, along the first axis of its first array."""
    first = next(iter(leaves(input).values()), None)
    return len(first) if first is not None and first.ndim else 1


def cast(
    value: Any,
    device: torch.device | str,
    dtype: torch.dtype | None,
    kept: Collection[torch.dtype] = (),
) -> Any:
    """Copies of all tensors in `value` on `device`, but for the `kept` ones in `dtype`.

    None: in their own. A parameter stays one.
    """

    def moved(tensor: Tensor) -> Tensor:
        own = None if tensor.dtype in kept else dtype
        made = tensor.detach().to(kept_dtype(tensor, own)).to(device, copy=True)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(made, tensor.requires_grad)
        return made

    return convert(value, Tensor, moved)


def split(input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keyword arguments: a tuple is the first, a dictionary the second."""
    if isinstance(input, Mapping):
        return (), dict(input)
    return (input if isinstance(input, tuple) else (input,)), {}
