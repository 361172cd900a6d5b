"""The comparison: does a torch model compute what NumPy computes, and if not, where not?"""

from torchnnfs.testing.candidates import Candidate
from torchnnfs.testing.comparison import Comparison, Row, Worst, assert_agrees, compare

__all__ = ["Candidate", "Comparison", "Row", "Worst", "assert_agrees", "compare"]
