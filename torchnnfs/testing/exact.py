"""What should come out at each place, and how far a computed result may be from it.

Nothing that a candidate computed enters here but, for the isolated results, the input that a layer
really got.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchnnfs.testing.estimate import (
    ESTIMATED,
    FAILS,
    ITSELF,
    ROUNDING,
    Arithmetic,
    Expected,
    counts,
    estimate,
    shaken,
)
from torchnnfs.testing.layers import Layer, Maybe
from torchnnfs.testing.models import (
    Place,
    arguments_of,
    borrowed,
    cast_input,
    computable,
    state_of,
    stored_dtype,
    takes,
    walk,
)
from torchnnfs.testing.precision import PRECISIONS, Array, Precision
from torchnnfs.testing.reference import Given
from torchnnfs.testing.traces import Call, watched
from torchnnfs.testing.values import (
    GIVEN,
    cast,
    convert,
    leaves,
    parts,
    pieces,
    split,
    to_array,
    to_numpy,
)

_ORDER = (ROUNDING, ESTIMATED, ITSELF)


#: Rows computed at a time: few enough that what is computed between stays in the cache.
_ROWS = 1 << 12


@contextmanager
def same_chance() -> Iterator[None]:
    """The same random numbers in each block, and behind it those that would have come."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@contextmanager
def _layer_by_layer() -> Iterator[None]:
    """Attention without torch's fast path, whose nested tensors nothing can follow."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class Exact:
    """The exact chain of a model in one dtype."""

    def __init__(
        self, model: nn.Module, input: Any, dtype: torch.dtype, basis: str = ITSELF
    ) -> None:
        self.model, self.dtype = model, dtype
        self.basis = basis  # of its float64 run: another model's is no run of its own
        self.precision = PRECISIONS[str(dtype).removeprefix("torch.")]
        places = walk(model)
        self.places = {place.path: place for place in places}
        self.steps = [place.path for place in places if place.step]
        self.arguments: dict[str, dict[str, Any]] = {}  # of the places that are called
        self.failed: dict[str, str] = {}  # why a place's own float64 run is not to be had
        self.stored = stored_dtype(model, input, dtype)
        self.input = convert(cast_input(model, input, "cpu", dtype), Tensor, to_numpy)
        self._insides: dict[tuple[str, Precision], Expected | None] = {}
        self._chains: dict[Precision, list[Expected]] = {}
        if any(place.layer for place in places):
            self._read(input)

    @cached_property
    def plain(self) -> bool:
        """Whether it is a chain of layers with formulas, and nothing else has a say."""
        return all(place.step and place.layer for place in self.places.values()) and not any(
            each._forward_pre_hooks or each._forward_hooks or "forward" in vars(each)
            for each in self.model.modules()
        )

    def _read(self, input: Any) -> None:
        """Read the arguments of each place in its call: pruned layers make their weights then."""
        plain = self.plain and self.basis == ITSELF  # it need not compute: the candidates will

        def read(place: Place, module: nn.Module, args: Any) -> None:
            if place.path not in self.arguments:
                self.arguments[place.path] = arguments_of(module)

        def passed_on(*args: Any, **kwargs: Any) -> Any:
            return (*args, *kwargs.values())[0]

        compute = borrowed(self.model, "cpu", self.stored)
        with torch.no_grad(), same_chance(), compute as run, ExitStack() as handles:
            for place in self.places.values():
                hook = partial(read, place)
                handles.enter_context(place.module.register_forward_pre_hook(hook))
                if plain:
                    vars(place.module)["forward"] = passed_on
            args, kwargs = split(cast_input(self.model, input, "cpu", self.dtype))
            run(*args, **kwargs)

    def chain(self, precision: Precision) -> list[Expected]:
        """What comes out of each step, from the input on, the errors carried along."""
        if precision not in self._chains:
            found: list[Expected] = []
            given, error = split(self.input), None
            for path in self.steps:
                expected = self.at(path, given, error, precision)
                if expected is None:
                    break
                for name, value in expected.values.items():
                    # Where the dtype may have overflowed, anything may follow.
                    bound = expected.bounds[name]
                    small = np.abs(value) + bound < precision.largest
                    expected.bounds[name] = np.where(small, bound, np.inf)
                if found and _ORDER.index(found[-1].basis) > _ORDER.index(expected.basis):
                    expected.basis = found[-1].basis
                found.append(expected)
                given, error = ((expected.output,), {}), expected.bounds
            self._chains[precision] = found
        return self._chains[precision]

    def end(self, precision: Precision) -> Expected | None:
        """What comes out of the model; None where there is no float64 run of it."""
        chain = self.chain(precision)
        return chain[-1] if len(chain) == len(self.steps) else None

    def at(
        self, path: str, given: Given, error: Any = None, precision: Precision | None = None
    ) -> Expected | None:
        """What the place at `path` gives for its arguments, which may be off by `error`.

        None where the module cannot run in float64; `failed` says why.
        """
        place = self.places.get(path) or Place(path, self.model.get_submodule(path), None, False)
        precision = precision or self.precision
        x: Any = next(iter((*given[0], *given[1].values())), None)
        if place.layer is not None and takes(x, place.layer):
            off = next(iter(leaves(error).values()), None)
            with computable(place.module, place.layer, x):
                return known(place.layer, x, off, precision, self.arguments.get(path, {}))
        return self._own_run(path, place.module, given, error, precision)

    def reach(self, inputs: bool) -> dict[str, Array] | None:
        """How far the output moves when parameters, and `inputs`, are off by their rounding."""
        given, unit = split(self.input), self.precision.roundoff
        off = unit * inputs
        error = convert(given, np.ndarray, lambda x: off * np.abs(x) * (x.dtype.kind == "f"))
        moved = self._own_run("", self.model, given, error, PRECISIONS["float64"], parameters=unit)
        return None if moved is None else moved.bounds

    def inside(self, path: str, precision: Precision) -> Expected | None:
        """What comes out at `path` by the float64 run of the whole model, however deep it is."""
        if (path, precision) not in self._insides:
            inner, given = self.model.get_submodule(path), split(self.input)
            found = self._own_run(path, self.model, given, None, precision, inner)
            self._insides[path, precision] = found
        return self._insides[path, precision]

    def _own_run(
        self,
        path: str,
        module: nn.Module,
        given: Given,
        error: Any,
        precision: Precision,
        inner: nn.Module | None = None,
        parameters: float = 0.0,
    ) -> Expected | None:
        """The module itself in float64, from numbers as the dtype stores them.

        With `inner`, what that module within it gives, when it is called last. With `parameters`,
        they are off by that relative error, and nothing rounds. None if it cannot run: `failed`
        says why at `path`.
        """
        stored = state_of(module, "cpu", self.stored)
        most = math.inf  # operations of a run: one that waits for convergence may wait for ever

        def run(seed: int | None) -> Any:
            nonlocal most
            off, errors = shaken(seed), iter(leaves(error).values())
            calls: list[Call] = []
            arithmetic = Arithmetic(
                precision, seed, self.dtype, most, parameters * (seed is not None)
            )
            state = cast(stored, "cpu", torch.float64)

            def nudge(stored: Tensor) -> None:
                *_, numbers = pieces(stored)
                if not (numbers.is_floating_point() or numbers.is_complex()):
                    return
                if not isinstance(stored, nn.Parameter) and counts(numbers, parameters):
                    return
                value = to_numpy(numbers)
                pairs = parts(value)
                moved = off(pairs, parameters * np.abs(pairs))
                numbers.copy_(torch.from_numpy(moved.view(value.dtype).reshape(value.shape)))

            for each in state.values() if parameters else ():
                nudge(each)

            def tensor(x: Array) -> Tensor:
                moved = off(parts(x), next(errors, None))
                return torch.from_numpy(
                    moved if x.dtype.kind != "c" else moved.view(x.dtype)[..., 0]
                )

            args, kwargs = convert(given, np.ndarray, tensor)
            with (
                torch.no_grad(),
                same_chance(),
                _layer_by_layer(),
                borrowed(module, "cpu", self.stored, {}),  # what it keeps is stored in that, too
                borrowed(module, "cpu", torch.float64, state) as compute,
                watched({} if inner is None else {"": inner}, calls),
                arithmetic,
            ):
                for part in module.modules():
                    if getattr(part, "eps", 0) is None:  # as of RMSNorm: that of the dtype
                        # Half types are normalised in float32.
                        wide = torch.promote_types(self.dtype, torch.float32)
                        vars(part)["eps"] = torch.finfo(wide).eps
                    for each in vars(part).values() if parameters else ():
                        if isinstance(each, Tensor):
                            nudge(each)
                output = compute(*args, **kwargs)
            if seed is None:
                most = 1_000 + 10 * arithmetic.count
            return convert(output, GIVEN, to_array) if inner is None else calls[-1].output

        if path in self.failed:
            return None
        try:
            expected = estimate(run, precision)
        except FAILS as failure:
            self.failed[path] = " ".join(str(failure).split())[:200]
            return None
        whose = "its own" if self.basis == ITSELF else "the reference's own"
        expected.basis, expected.source = self.basis, f"{whose} float64 run"
        return expected


def known(
    layer: Layer, x: Array, error: Maybe, precision: Precision, arguments: dict[str, Any]
) -> Expected:
    """What a layer with a formula gives."""
    limit = layer.bound
    if limit is not None:
        off = np.zeros(x.shape, np.float64) if error is None else error

        def both(rows: Any) -> tuple[Array, Array]:
            bound = np.asarray(limit(x[rows], off[rows], precision, **arguments))
            return layer.forward(x[rows], **arguments), bound

        alone = layer.by_rows and x.ndim > 1 and arguments.get("dim") not in (0, -x.ndim)
        starts = range(0, len(x), _ROWS) if alone else ()
        parts = [both(slice(start, start + _ROWS)) for start in starts] or [both(...)]
        output, bound = map(np.concatenate, zip(*parts, strict=True)) if alone else parts[0]
        return Expected(output, {"": bound}, ROUNDING)

    def run(seed: int | None) -> Array:
        off = shaken(seed)
        given = off(x, precision.unit * np.abs(x) + (0.0 if error is None else error))
        others = convert(
            arguments,
            np.ndarray,
            lambda a: off(a, precision.unit * np.abs(a)) if a.dtype.kind == "f" else a,
        )
        return np.asarray(layer.forward(given, **others))

    return estimate(run, precision)
