"""How far a computed result may be from an exact one, where no bound is proven: it is estimated."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from torchnnfs.testing.precision import Array, Precision
from torchnnfs.testing.values import convert, kept_dtype, leaves

#: What a row rests on. ROUNDING: a formula and a proven bound. ESTIMATED: a formula or somebody's
#: reference, and an estimated bound. ITSELF: a float64 run of the same code, and an estimated
#: bound: it shows rounding and faults of a dtype, not a wrong formula.
ROUNDING, ESTIMATED, ITSELF = "rounding", "estimated", "own float64 run"

#: What a forward may raise that was not made for float64.
FAILS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, OSError)

#: An estimated bound is the largest change in that many runs with errors that are so many times too
#: large: so a number that jumps, as where two classes are nearly equal, has its chance to do so.
_RUNS, _TIMES = 8, 8

#: Errors are drawn evenly from minus to plus this many of the dtype's. Were they drawn as plus or
#: minus one, two of them would cancel out in every other run.
_WIDEST = _TIMES * math.sqrt(3)


@dataclass
class Expected:
    """The exact result at one place, and how far a computed one may be from it."""

    output: Any  # tuples, lists and dictionaries of arrays as well
    bounds: dict[str, Array]  # of each of its arrays; infinite where the dtype may overflow
    basis: str  # `ROUNDING`, `ESTIMATED` or `ITSELF`
    source: str = "NumPy"  # who gave the result, in words

    @property
    def values(self) -> dict[str, Array]:
        """The arrays of the result, by their names there; a single one has the empty name."""
        return leaves(self.output)


class Arithmetic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every operation computes in float64, also where the code asks for less.

    With a seed it rounds at random, as the arithmetic of a dtype may: what goes into an operation
    and what comes out is moved by several units roundoff (Monte Carlo arithmetic: D. S. Parker,
    1997). Beyond the largest number of the dtype is infinity. With `constants` nothing rounds, but
    numbers that the code keeps in a coarser dtype are off by that relative error.
    """

    def __init__(
        self,
        precision: Precision,
        seed: int | None,
        dtype: torch.dtype,
        most: float,
        constants: float = 0.0,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.precision, self.dtype, self.constants = precision, dtype, constants
        self.exact = seed is None or constants > 0
        self.count, self.most = 0, most  # of operations
        self.whole = False  # whether the operation at work computes whole numbers exactly
        self.random = torch.Generator().manual_seed(seed or 0)

    def moved(self, tensor: Tensor, size: float) -> Tensor:
        """The tensor with relative errors of `_TIMES` that size, root mean square."""
        if tensor.is_complex():
            return _of_parts(tensor, lambda part: self.moved(part, size))
        if not size or not tensor.is_floating_point():
            return tensor
        drawn = torch.rand(tensor.shape, generator=self.random, dtype=tensor.dtype)
        return self.kept(tensor, tensor * (1 + size * _WIDEST * (2 * drawn - 1)))

    def kept(self, tensor: Tensor, moved: Tensor) -> Tensor:
        """`moved`, but for whole numbers as they were, where the operation computes these exactly.

        Then indices and equalities are what they are in the dtype.
        """
        if not self.whole:
            return moved
        exact = (tensor.abs() <= 2.0**self.precision.digits) & (tensor == tensor.round())
        return torch.where(exact, tensor, moved)

    def unrounded(self, tensor: Tensor) -> Tensor:
        """A constant of the code in float64, off by what `constants` says."""
        double = _doubled(tensor)
        own = double is tensor or counts(double, self.constants)
        return double if own else self.moved(double, self.constants)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        if self.count > self.most:
            raise RuntimeError("where numbers round at random it comes to no end")
        kwargs = dict(kwargs or {})
        if (dtype := kwargs.get("dtype")) is not None:
            kwargs["dtype"] = kept_dtype(torch.empty(0, dtype=dtype), torch.float64)
        schema, name = func._schema, func.overloadpacket.__name__.rstrip("_")
        writes = any(each.alias_info and each.alias_info.is_write for each in schema.arguments)
        takes = {each.name for each in schema.arguments}
        if name in _DRAWN or ("generator" in takes and "training" not in takes):
            # The numbers that the dtype draws; what takes both draws none in eval mode.
            if name in _DRAWN and "dtype" in takes:
                kwargs["dtype"] = self.dtype
            narrow = convert(args, Tensor, lambda tensor: tensor.to(kept_dtype(tensor, self.dtype)))
            drawn = convert(func(*narrow, **kwargs), Tensor, _doubled)
            return args[0].copy_(drawn) if writes else drawn
        if not writes:
            args = convert(args, Tensor, self.unrounded)
        shares = any(each.alias_info and not each.alias_info.is_write for each in schema.returns)
        if self.exact or name in _EXACT or shares:
            return func(*args, **kwargs)
        if forward_ad._current_level >= 0:  # torch 2.13 ends the process where numbers are moved
            raise RuntimeError("forward-mode differentiation has no bound")
        self.whole = (torch.Tag.pointwise in func.tags or name in _WHOLE) and _exactly(
            args, kwargs, name in _ADDED, self.precision
        )
        if not writes:
            args = convert(args, Tensor, lambda tensor: self.moved(tensor, self.precision.unit))
        result = func(*args, **kwargs)
        # Sums of many equal terms round in one direction: allow for the root of their number.
        terms = _terms(args, result) if name in _SUMS else 1.0
        if name.lstrip("_").startswith("upsample"):
            # The places between which it interpolates may round by so much.
            terms = float(max(result.shape[2:])) ** 2
        if not writes:
            return convert(result, Tensor, lambda tensor: self.stored(tensor, terms))
        convert(result, Tensor, lambda tensor: tensor.copy_(self.stored(tensor, terms)))
        return result

    def stored(self, tensor: Tensor, terms: float) -> Tensor:
        """What the dtype would keep of a result, a sum of that many terms."""
        if tensor.is_complex():
            return _of_parts(tensor, lambda part: self.stored(part, terms))
        if not tensor.is_floating_point():
            return tensor
        p = self.precision
        rounded = self.moved(tensor, (2 + math.sqrt(terms)) * p.unit + p.stored_unit)
        if p.stored_tiny:
            tiny = torch.full_like(tensor, p.stored_tiny)
            rounded = self.kept(tensor, rounded + self.moved(tiny, 1.0) - tiny)
        return torch.where(tensor.abs() > p.largest, tensor * np.inf, rounded)


def counts(tensor: Tensor, unit: float) -> bool:
    """Whether a constant is a mask or a table of whole numbers, which no rounding made.

    The half types round much to whole numbers: of theirs only masks of 0 and 1.
    """
    size = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).abs()
    return bool((size == size.round()).all()) and (unit < 2.0**-20 or bool((size <= 1).all()))


def _exactly(args: Any, kwargs: Any, added: bool, precision: Precision) -> bool:
    """Whether the dtype computes whole numbers from such arguments as float64 does.

    Numbers in the code round to the dtype; sums may grow on the way.
    """
    numbers = [each for each in (*args, *kwargs.values()) if isinstance(each, float)]
    if any(each % 1 for each in numbers if math.isfinite(each)):
        return False
    size = args[0].abs().sum() if added and args[0].is_floating_point() else 0.0
    return bool(size <= 2.0**precision.digits)


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.to(kept_dtype(tensor, torch.float64))


def _of_parts(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A complex tensor with `change` of its real and imaginary parts."""
    real = torch.view_as_real(tensor.resolve_conj())
    return torch.view_as_complex(change(real).contiguous())


#: Operations that do not round: moving what goes into them would be another question.
_EXACT = {"floor", "ceil", "round", "trunc", "sign", "abs", "neg", "clone", "copy", "_to_copy"}
_EXACT |= {"eq", "ne", "lt", "le", "gt", "ge", "argmax", "argmin", "where", "maximum", "minimum"}
_EXACT |= {"relu", "threshold", "clamp", "embedding", "cat", "stack", "index", "gather"}
_EXACT |= {"max", "min", "amax", "amin", "sort", "topk", "kthvalue", "median", "masked_fill"}
_EXACT |= {"tril", "triu", "flip", "roll", "repeat", "constant_pad_nd", "index_select"}

#: Operations that compute whole numbers from whole numbers exactly, beside the pointwise ones.
_ADDED = {"sum", "cumsum"}
_WHOLE = _ADDED | {"ones", "ones_like", "new_ones", "full", "full_like", "new_full"}
_WHOLE |= {"arange", "eye", "fill", "scalar_tensor", "one_hot", "scatter"}

#: Operations that add many terms.
_SUMS = {"mm", "addmm", "bmm", "baddbmm", "mv", "dot", "convolution", "sum", "mean", "var"}
_SUMS |= {"linalg_vector_norm", "norm", "cumsum", "native_layer_norm", "native_batch_norm"}
_SUMS |= {"index_add", "scatter_add", "scatter_reduce", "_embedding_bag", "avg_pool1d"}
_SUMS |= {"_embedding_bag_forward_only", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d"}
_SUMS |= {"_adaptive_avg_pool3d", "index_put", "bincount", "segment_reduce"}

#: Operations that draw numbers in a dtype which they are told.
_DRAWN = {"rand", "randn", "rand_like", "randn_like", "normal"}


def _terms(args: Any, result: Any) -> float:
    """About how many terms each number of the result is a sum of."""
    sizes = [t.numel() for t in leaves(args).values() if isinstance(t, Tensor) and t.numel() > 1]
    out = max(1, max((t.numel() for t in leaves(result).values()), default=1))
    sizes = sorted(sizes)[-2:]
    return max(1.0, math.sqrt(math.prod(sizes) / out) if len(sizes) > 1 else sum(sizes) / out)


def estimate(run: Callable[[int | None], Any], precision: Precision) -> Expected:
    """The exact result ``run(None)``, and how far runs that round at random are from it.

    Eight runs, ``run(0)`` to ``run(7)``, twice as many for whole numbers; the largest change in a
    row is the bound.
    """
    output = run(None)
    exact = leaves(output)
    whole = any(value.dtype.kind != "f" for value in exact.values())
    spread: dict[str, Array] = {}
    failures: list[Exception] = []
    for seed in range(_RUNS * (1 + whole)):
        try:
            found = leaves(run(seed))
            if any(found[name].shape != value.shape for name, value in exact.items()):
                raise ValueError("shapes of its results depend on rounding")
        except FAILS as failure:  # as a check that probabilities add up to 1 may
            failures.append(failure)
            if len(failures) == seed + 1 == 2:
                raise RuntimeError(f"with numbers that round at random: {failure}") from failure
            continue
        for name, value in found.items():
            off = np.abs(np.asarray(value, np.float64) - exact[name])
            off = np.where(value == exact[name], 0.0, np.where(np.isnan(off), np.inf, off))
            spread[name] = np.maximum(spread.get(name, 0.0), off)
    bounds = {}
    for name, off in spread.items():
        if off.ndim > 1 and off.size and exact[name].dtype.kind == "f":
            # An overflow concerns its own element, a rounding error its row and its column: eight
            # runs may miss the element, and a large row or column must not hide a small one.
            finite = np.where(np.isfinite(off), off, 0.0)
            rows = finite.max(axis=-1, keepdims=True)
            columns = finite.max(axis=tuple(range(off.ndim - 1)), keepdims=True)
            off = np.where(np.isfinite(off), np.minimum(rows, columns), np.inf)
        if exact[name].dtype.kind != "f":
            bounds[name] = _TIMES * np.asarray(off, np.float64)  # which jumps in any step
            continue
        size = np.where(np.isfinite(exact[name]), np.abs(exact[name]), 0.0)
        shares = off / np.maximum(size, precision.tiny)
        shares = shares[np.isfinite(shares)]
        if shares.size > 8 and off.size == len(off):  # no number has less than half of them have
            off = np.maximum(off, size * np.median(shares))
        bound = off + _TIMES * precision.unit * size
        bounds[name] = precision.stored(exact[name], np.asarray(bound + precision.tiny))
    return Expected(output, bounds, ESTIMATED)


def shaken(seed: int | None) -> Callable[[Array, Any], Array]:
    """A function of an array and errors: the array off by 8 times them; exact without seed."""
    random = np.random.RandomState(seed)

    def off(value: Array, error: Any) -> Array:
        if seed is None or not np.any(error):
            return np.array(value)
        moved = value + error * random.uniform(-_WIDEST, _WIDEST, value.shape)
        return np.where(np.isinf(value), value, moved)  # infinity does not round

    return off
