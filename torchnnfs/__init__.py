"""Chapter 4 of "Neural Networks from Scratch" as PyTorch modules, proven equal to NumPy."""

from torchnnfs.modules import Dense, ReLU, Softmax, classifier
from torchnnfs.spiral import spiral
from torchnnfs.streams import book_numpy
from torchnnfs.testing import compare

__all__ = ["Dense", "ReLU", "Softmax", "book_numpy", "classifier", "compare", "spiral"]
