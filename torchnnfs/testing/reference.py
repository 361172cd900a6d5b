"""References: whatever somebody trusts, as something that gives arrays at places of the model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchnnfs.testing.models import Place, parameters_of
from torchnnfs.testing.precision import PRECISIONS, Array, Precision
from torchnnfs.testing.values import convert, leaves, parts, to_numpy

#: Arguments and keyword arguments.
Given = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Answer:
    """Arrays that a reference gave, floating-point ones in float64, and what it computed in."""

    output: Any
    precision: Precision


class NoAnswerError(TypeError):
    """What a reference gave is no array of numbers."""


#: From the arguments of a place to what somebody's code gives for them; in float64, or, where it
#: cannot and that is allowed, in float32.
Source = Callable[[Given, bool], Answer]


@dataclass(frozen=True)
class Reference:
    """What the candidates are compared with.

    A module is one whose layers and parameters are taken. Sources are somebody's code by the place
    whose work it does, recorded are arrays that came out elsewhere; the empty path is the output.
    """

    module: nn.Module | None = None
    sources: dict[str, Source] = field(default_factory=dict)
    recorded: dict[str, Answer] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def judges_output(self) -> bool:
        """Whether the end is compared with something independent."""
        return self.module is not None or "" in self.sources or "" in self.recorded


def read(reference: Any, model: nn.Module, places: Sequence[Place]) -> Reference:
    """A reference of any form: see `torchnnfs.compare`."""
    if reference is None:
        return Reference()
    if reference is model:
        words = "The reference is the model itself: the layers are judged by their formulas."
        return Reference(notes=(words,))
    if isinstance(reference, nn.Module):
        return Reference(module=reference)
    if isinstance(reference, Sequence) and not isinstance(reference, str) and not leaves(reference):
        return _in_order(reference, places)
    named = reference if isinstance(reference, Mapping) else {"": reference}
    if not named:
        raise ValueError("compare expects a reference for at least one place, got an empty mapping")
    paths = dict(model.named_modules(remove_duplicate=False))
    found = Reference()
    for path, entry in named.items():
        if path not in paths:
            raise ValueError(
                f"compare expects the reference's keys to be places in the model, got {path!r}; "
                f"there are {', '.join(map(repr, paths))} ('' is the output)"
            )
        where = f"at {path!r}" if path else "for the output"
        if leaves(entry) or (hasattr(entry, "__array__") and not hasattr(entry, "forward")):
            found.recorded[path] = answer(entry, where)
        else:
            found.sources[path] = source(entry, where)
    return found


def _in_order(entries: Sequence[Any], places: Sequence[Place]) -> Reference:
    """Objects that are run one after the other; as many as layers, each judges its own."""
    sources = [source(entry, f"number {i}") for i, entry in enumerate(entries)]
    if not sources:
        raise ValueError("compare expects a reference with at least one object, got an empty list")

    def whole(given: Given, single: bool) -> Answer:
        answers = []
        for each in sources:
            answers.append(each(given, single))
            given = ((answers[-1].output,), {})
        roughest = max(answers, key=lambda each: each.precision.roundoff)
        return Answer(answers[-1].output, roughest.precision)

    layers = [place.path for place in places if place.layer is not None or place.path]
    if len(layers) == len(sources):
        return Reference(sources={**dict(zip(layers, sources, strict=True)), "": whole})
    count = f"{len(sources)} object{'s' * (len(sources) > 1)}"
    note = f"The reference has {count} for {len(layers)} layers: it judges the output alone."
    return Reference(sources={"": whole}, notes=(note,))


def source(entry: Any, where: str) -> Source:
    """A function, or an object whose ``forward`` returns its result or sets ``output``."""
    compute = getattr(entry, "forward", entry)
    name = getattr(entry, "__name__", type(entry).__name__)
    if not callable(compute) or isinstance(entry, type):
        raise TypeError(
            f"compare expects as reference {where} a torch.nn.Module, a function, an object with a "
            f"method forward, an array, or a list or mapping of these, got {entry!r:.100}"
        )
    training = parameters_of(compute).get("training")
    named = {"training": False} if training and training.default is training.empty else {}

    def form(dtype: str, tensors: bool, array: Array) -> Any:
        own = array.astype(dtype) if array.dtype.kind == "f" else array.copy()  # to work in place
        return torch.from_numpy(own) if tensors else own

    def run(given: Given, single: bool) -> Answer:
        # In float64 where it can: then a wrong formula cannot hide behind rounding. Some code takes
        # torch's tensors alone.
        failure: Exception | None = None
        for how in product(("float64", "float32")[: 1 + single], (False, True)):
            try:
                args, kwargs = convert(given, np.ndarray, partial(form, *how))
                with torch.no_grad():
                    result = compute(*args, **kwargs, **named)
                result = getattr(entry, "output", None) if result is None else result
                if result is None:
                    raise NoAnswerError(
                        f"compare expects {name}.forward {where} to return an array or to set "
                        "output, got neither"
                    )
                return answer(result, f"{where}, {name},")
            except NoAnswerError:
                raise
            except Exception as error:
                failure = failure or error
        shapes = ", ".join(str(array.shape) for array in leaves(given).values())
        raise ValueError(
            f"the reference {where}, {name}, cannot compute from an array of shape {shapes}: "
            f"{type(failure).__name__}: {failure}"
        ) from failure

    return run


def answer(found: Any, where: str) -> Answer:
    """Arrays of any library as NumPy's, and what they were computed in."""
    precisions, doubles = [PRECISIONS["float64"]], [np.zeros(0)]

    def array(value: Any) -> Any:
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, Tensor):
            real = value.real if value.is_complex() else value
            precisions.append(PRECISIONS.get(str(real.dtype)[6:], PRECISIONS["float64"]))
            return to_numpy(value)
        converted: Array = parts(np.asarray(value))
        kind = converted.dtype.name if converted.dtype.itemsize <= 8 else "float64"
        if kind in PRECISIONS and converted.dtype.kind == "f":
            converted = converted.astype(np.float64)
            precisions.append(PRECISIONS[kind])
            if kind == "float64":
                doubles.append(converted.reshape(-1))
        elif converted.dtype.kind not in "iub":
            raise NoAnswerError(
                f"compare expects the reference {where} to give arrays of numbers, got "
                f"{type(value).__name__} of dtype {converted.dtype}"
            )
        return converted

    output = convert(found, object, array, _is_array)
    if not leaves(output):
        raise NoAnswerError(
            f"compare expects the reference {where} to give arrays of numbers, got {found!r:.100}"
        )
    if _is_single(np.concatenate(doubles)):  # then they were computed in float32
        precisions.append(PRECISIONS["float32"])
    return Answer(output, max(precisions, key=lambda each: each.roundoff))


def _is_array(value: Any) -> bool:
    """Whether it is a list that holds numbers alone, as NumPy's `tolist` gives for one array."""

    def numbers(value: Any) -> bool:
        if isinstance(value, list):
            return all(map(numbers, value))
        return isinstance(value, complex | float | int | np.generic)

    try:
        return isinstance(value, list) and numbers(value) and np.ndim(value) > 0
    except ValueError:  # its rows are not of one length
        return False


def _is_single(values: Array) -> bool:
    """Whether float32 holds these numbers, and they are no whole numbers or simple fractions."""
    with np.errstate(over="ignore"):
        same = np.array_equal(values.astype(np.float32), values, equal_nan=True)
    simple = np.array_equal(np.rint(values * 256), values * 256, equal_nan=True)
    return bool(values.size) and same and not simple
