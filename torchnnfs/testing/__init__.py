"""The comparison: does a torch model compute what NumPy computes, and if not, where not?"""

from torchnnfs.testing.candidates import Candidate, MissingExtraError
from torchnnfs.testing.comparison import Comparison, assert_agrees, compare
from torchnnfs.testing.controls import Control
from torchnnfs.testing.judge import Row
from torchnnfs.testing.measure import Worst
from torchnnfs.testing.models import register

__all__ = [
    "Candidate",
    "Comparison",
    "Control",
    "MissingExtraError",
    "Row",
    "Worst",
    "assert_agrees",
    "compare",
    "register",
]
