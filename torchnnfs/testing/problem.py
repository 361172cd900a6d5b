"""What a candidate has to compute: the exact result of each layer, and how far it may stray."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchnnfs.testing.bounds import PRECISIONS, Precision
from torchnnfs.testing.candidates import watch
from torchnnfs.testing.reference import Array
from torchnnfs.testing.twins import FACTOR, chain_paths, find_layers, is_chain, to_numpy, twin_of

#: From an input and the error it may have (None: none) to the exact output and its error.
Judge = Callable[[Array, Array | None], tuple[Array, Array]]

#: What the error of a bound is: proven, or else found in one of two ways that a row names.
PROVEN, SAMPLED, FACTORED = "rounding", "sampled", f"{FACTOR} u"
_SAMPLES, _SPREAD = 8, 8


@dataclass(frozen=True)
class Problem:
    """The reference side of a comparison in one precision.

    Attributes:
        precision: what the candidates compute in.
        judges: for each layer of the model, by its path there; None where the reference has other
            layers, so that only its output can be compared.
        mismatch: why there are no judges.
        chain: the judges in the order of the calls, where the reference is a plain chain.
        module: the reference as a module, where it is one.
    """

    precision: Precision
    judges: dict[str, Judge] | None
    mismatch: str
    chain: list[Judge] | None
    module: nn.Module | None

    def output(self, x: Array) -> tuple[Array, Array, str]:
        """The exact output for the input `x`, how far a computed one may be, and why so far."""
        if self.chain is not None:
            error: Array | None = None
            for judge in self.chain:
                x, error = carried(judge, x, error, self.precision)
            assert error is not None
            return x, error, PROVEN
        assert self.module is not None
        return *_sampled(self.module, x, self.precision), SAMPLED


def carried(
    judge: Judge, x: Array, error: Array | None, precision: Precision
) -> tuple[Array, Array]:
    """One step of a chain; where the dtype may have overflowed, anything may follow."""
    exact, bound = judge(x, error)
    bound[~(np.abs(exact) + bound < precision.largest)] = np.inf
    return exact, bound


def pose(model: nn.Module, reference: nn.Module | Sequence[Any], dtype: torch.dtype) -> Problem:
    """The problem that `reference` poses to `model` with parameters as `dtype` stores them.

    Raises:
        TypeError: a layer without a twin, where its own module is the reference; objects of a
            reader's that do not compute.
        ValueError: another number of objects than layers.
    """
    precision = PRECISIONS[str(dtype).removeprefix("torch.")]
    if not isinstance(reference, nn.Module):
        ours = find_layers(model)
        if len(ours) != len(reference):
            raise ValueError(
                f"compare expects a reference object for each of the model's {len(ours)} layers "
                f"({', '.join(ours)}), got {len(reference)}"
            )
        single = dtype != torch.float64
        judges = {
            path: _judge_of_object(path, each, layer, precision, single)
            for (path, layer), each in zip(ours.items(), reference, strict=True)
        }
        chain = [judges[path] for path in chain_paths(model)] if is_chain(model) else None
        return Problem(precision, judges, "", chain, None)
    stored = copy.deepcopy(reference).to("cpu", dtype)
    whole = None
    if is_chain(stored):
        layers = find_layers(stored)
        whole = [_judge_of_module(layers[path], precision) for path in chain_paths(stored)]
    if reference is not model:
        mismatch = _mismatch(model, reference)
        if mismatch:
            return Problem(precision, None, mismatch, whole, stored)
    theirs = find_layers(stored).values()
    by_path = {
        path: _judge_of_module(layer, precision)
        for path, layer in zip(find_layers(model), theirs, strict=True)
    }
    return Problem(precision, by_path, "", whole, stored)


def _judge_of_module(layer: nn.Module, precision: Precision) -> Judge:
    twin = twin_of(layer)
    arguments = twin.arguments(layer)
    return lambda x, error: twin.compute(x, error, precision, arguments)


def _judge_of_object(
    path: str, each: Any, layer: nn.Module, precision: Precision, single: bool
) -> Judge:
    """A judge from an object in the book's style; its own rounding errors count as well."""
    if not callable(getattr(each, "forward", None)):
        raise TypeError(
            f"compare expects the reference for layer {path!r} to have a method forward, got "
            f"{type(each).__name__}"
        )
    twin = twin_of(layer)
    arguments = twin.arguments(layer)
    for name in arguments.keys() & {"weights", "biases"}:
        if getattr(each, name, None) is not None:
            arguments[name] = np.asarray(getattr(each, name), np.float64)

    def judge(x: Array, error: Array | None) -> tuple[Array, Array]:
        # In float32 where that loses nothing: it is what their own code would be given.
        narrow = x.astype(np.float32)
        given = narrow if single and np.array_equal(narrow, x, equal_nan=True) else x
        with np.errstate(all="ignore"):
            result = each.forward(given.copy())  # it may work in place
        result = np.asarray(getattr(each, "output", None) if result is None else result)
        if result.dtype.name not in PRECISIONS:
            raise TypeError(
                f"compare expects {type(each).__name__}.forward to set output to an array of "
                f"floats, got dtype {result.dtype}"
            )
        _, bound = twin.compute(x, error, precision, arguments)
        _, own = twin.compute(x, None, PRECISIONS[result.dtype.name], arguments)
        if result.shape != bound.shape:
            raise ValueError(
                f"compare expects {type(each).__name__} for layer {path!r} to give shape "
                f"{bound.shape}, got {result.shape}"
            )
        return result.astype(np.float64), bound + own

    return judge


def _mismatch(model: nn.Module, reference: nn.Module) -> str:
    """Where the layers of the two first differ, in words; empty when they can be paired."""
    try:
        ours, theirs = find_layers(model), find_layers(reference)
    except TypeError as error:
        return str(error)
    for path, layer, other in zip_longest(ours, ours.values(), theirs.values()):
        expected = _signature(layer) if layer else "nothing more"
        got = _signature(other) if other else "nothing more"
        if expected != got:
            where = f"the model's layer {path!r} is {expected}" if layer else "the model ends"
            return f"where {where}, the reference has {got}"
    return ""


def _signature(layer: nn.Module) -> str:
    """What must be the same of two layers that are paired: the computation and its shapes."""
    arguments = twin_of(layer).arguments(layer).items()
    shapes = [f"{name}={getattr(value, 'shape', value)}" for name, value in arguments]
    return f"{twin_of(layer).forward.__name__}({', '.join(shapes)})"


def _sampled(module: nn.Module, x: Array, precision: Precision) -> tuple[Array, Array]:
    """The module in float64, and what its output does when each layer errs by its bound.

    In each of a few runs every layer's output is moved by plus or minus its bound, at random, and
    one run is in the precision itself; the largest change in a row of the output, times 8, stands
    for the bound. It is an estimate.
    """
    exact_module = copy.deepcopy(module).to(torch.float64)
    signs = np.random.RandomState(0)

    def err(path: str, layer: nn.Module, received: Tensor, output: Tensor) -> Tensor:
        twin = twin_of(layer)
        _, bound = twin.compute(to_numpy(received), None, precision, twin.arguments(layer))
        return output + torch.from_numpy(bound * signs.choice([-1.0, 1.0], bound.shape))

    with torch.no_grad():
        exact = to_numpy(exact_module(torch.from_numpy(x)))
    size = np.max(np.abs(exact), initial=0.0)
    try:
        find_layers(module)
    except TypeError:  # there are layers that nothing is known of
        bound = np.full_like(exact, FACTOR * precision.unit * size)
    else:
        runs = [to_numpy(watch(exact_module, torch.from_numpy(x), err)) for _ in range(_SAMPLES)]
        # What happens between the layers rounds as well: a run in the precision itself has it.
        with torch.no_grad():
            (name,) = [name for name, each in PRECISIONS.items() if each is precision]
            runs.append(to_numpy(module(torch.from_numpy(x).to(getattr(torch, name)))))
        spread = np.max(np.abs(np.stack(runs) - exact), axis=0)
        spread[~np.isfinite(spread)] = np.inf
        if spread.ndim:
            spread = np.broadcast_to(spread.max(axis=-1, keepdims=True), spread.shape)
        bound = _SPREAD * (spread + precision.unit * np.abs(exact))
    return exact, precision.stored(exact, bound + precision.tiny)
