"""Where random numbers come from: a `torch.Generator`, or the book's NumPy stream."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import nnfs
import numpy as np
import torch

#: What every `generator` argument takes.
Generator = torch.Generator | np.random.RandomState | None

_PATCHED = [(np, "dot"), (np, "zeros"), (np, "eye"), (np.random, "randn")]
_LOCK = threading.RLock()


@contextmanager
def book_numpy(generator: np.random.RandomState | None = None) -> Iterator[None]:
    """NumPy as `nnfs.init()` leaves it, for the length of a `with` block.

    Inside, ``np.dot`` accumulates in float64 and returns float32, and ``np.zeros``, ``np.eye``
    and ``np.random.randn`` give float32. Afterwards, also after an exception and when nested,
    these four and NumPy's global random state are what they were before.

    Other threads go on with the functions as they were. The random state belongs to the whole
    process, so a second thread that enters waits for the first to leave. Do not leave a block by a
    ``yield`` or an ``await``.

    Args:
        generator: the stream that ``np.random.randn`` draws from. None: NumPy's global stream,
            seeded with 0 as ``nnfs.init()`` does.

    Raises:
        TypeError: a `generator` of another kind.

    Example:
        >>> with book_numpy():
        ...     print(np.random.randn(2), np.zeros(1).dtype)
        [1.7640524 0.4001572] float32
        >>> np.zeros(1).dtype
        dtype('float64')

    Source: package ``nnfs``, function ``init``; it has no undo of its own.
    """
    if generator is not None and not isinstance(generator, np.random.RandomState):
        raise TypeError(
            "book_numpy expects generator to be a numpy.random.RandomState or None, got "
            f"{type(generator).__name__}"
        )
    with _LOCK:
        before, state = [getattr(*place) for place in _PATCHED], np.random.get_state(legacy=False)
        random = SimpleNamespace(randn=(generator or np.random).randn, seed=np.random.seed)
        numpy = SimpleNamespace(dot=np.dot, zeros=np.zeros, eye=np.eye, random=random)
        try:
            nnfs.core.np = numpy  # a stand-in, so that no other thread sees what nnfs.init() does
            nnfs.init(random_seed=0 if generator is None else None)
            nnfs.core.np = np
            changed = numpy.dot, numpy.zeros, numpy.eye, random.randn
            for (module, name), function, old in zip(_PATCHED, changed, before, strict=True):
                setattr(module, name, _here(function, old))
            yield
        finally:
            nnfs.core.np = np
            for (module, name), function in zip(_PATCHED, before, strict=True):
                setattr(module, name, function)
            np.random.set_state(state)


def _here(function: Callable[..., Any], elsewhere: Callable[..., Any]) -> Callable[..., Any]:
    """`function` in the thread that calls this, and `elsewhere` in the others."""
    thread = threading.get_ident()

    def chosen(*args: Any, **keywords: Any) -> Any:
        here = threading.get_ident() == thread
        return (function if here else elsewhere)(*args, **keywords)

    return chosen
