"""Arguments that several functions take, checked in one place."""

from typing import Any

import numpy as np
import torch


def check_count(owner: str, name: str, count: Any) -> int:
    """`count` as an int; a TypeError when it is none (a bool is none), a ValueError below 1."""
    if isinstance(count, bool) or not isinstance(count, int | np.integer):
        raise TypeError(
            f"{owner} expects {name} to be an int, got {count!r} ({type(count).__name__})"
        )
    if count < 1:
        raise ValueError(f"{owner} expects {name} to be at least 1, got {count}")
    return int(count)


def check_real(owner: str, name: str, number: Any) -> float:
    """`number` as a float; a TypeError when it is none, a ValueError when it is not finite."""
    if isinstance(number, bool) or not isinstance(number, int | float | np.integer | np.floating):
        raise TypeError(
            f"{owner} expects {name} to be a number, got {number!r} ({type(number).__name__})"
        )
    if not np.isfinite(number):
        raise ValueError(f"{owner} expects {name} to be finite, got {number}")
    return float(number)


def check_numbers(owner: str, values: Any) -> torch.Tensor:
    """Arrays, nested lists and tensors as a tensor on its own on the CPU, of the dtype they have.

    A TypeError when they are no real numbers, or when some of them are masked.
    """
    if isinstance(values, torch.Tensor) and not values.is_complex():
        return values.detach().cpu().clone()
    if type(values) is np.ndarray and values.dtype in (np.float32, np.float64):
        return torch.from_numpy(values.copy())
    array = np.asarray(values)
    if array.dtype.kind not in "fiu" or np.ma.is_masked(values):
        masked = "masked values" if np.ma.is_masked(values) else f"dtype {array.dtype}"
        raise TypeError(f"{owner} expects real numbers, got an array with {masked}")
    kept = array.dtype if array.dtype.itemsize <= 8 else np.dtype(np.float64)
    if kept.kind == "u" and kept.itemsize > 1:
        kept = np.dtype(np.int64)  # torch computes with no other unsigned type than uint8
    return torch.from_numpy(np.array(array, dtype=kept.newbyteorder("="), order="C"))


def check_generator(owner: str, generator: Any, device: torch.device) -> None:
    """A TypeError for another kind of generator, a ValueError for one of another device."""
    if generator is None or isinstance(generator, np.random.RandomState):
        return
    if not isinstance(generator, torch.Generator):
        kind = type(generator)
        raise TypeError(
            f"{owner} expects generator to be a torch.Generator, a numpy.random.RandomState or "
            f"None, got {kind.__module__}.{kind.__qualname__}; make one with torch.Generator()"
            ".manual_seed(0) or, for the book's stream, numpy.random.RandomState(0)"
        )
    if generator.device.type != device.type and device.type != "meta":
        raise ValueError(
            f"{owner} on {device} expects a torch.Generator on {device.type}, got one on "
            f"{generator.device}; make one with torch.Generator({device.type!r})"
        )
