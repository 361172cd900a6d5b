"""Chapter 4 of "Neural Networks from Scratch" as PyTorch modules, proven equal to NumPy."""

import torchnnfs._signals  # noqa: F401 - first, for torch takes seconds to import
from torchnnfs import book
from torchnnfs.classes import from_torch, to_torch
from torchnnfs.fused import fuse
from torchnnfs.modules import Dense, LazyDense, ReLU, Softmax, classifier
from torchnnfs.spiral import spiral
from torchnnfs.streams import book_numpy
from torchnnfs.testing import compare
from torchnnfs.version import __version__

__all__ = [
    "Dense",
    "LazyDense",
    "ReLU",
    "Softmax",
    "__version__",
    "book",
    "book_numpy",
    "classifier",
    "compare",
    "from_torch",
    "fuse",
    "spiral",
    "to_torch",
]
