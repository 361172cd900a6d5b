import numpy as np

from torchnnfs.testing.measure import measure
from torchnnfs.testing.precision import PRECISIONS

FLOAT32 = PRECISIONS["float32"]


def test_without_an_error_no_bound_is_needed():
    one, zero = np.ones(3), np.zeros(3)
    assert measure(one, one, zero, FLOAT32).ratio == 0
    wrong = measure(np.array([1, 1, 1 + 2.0**-23]), one, zero, FLOAT32)
    assert (wrong.ratio, wrong.worst.index, wrong.max_ulp) == (np.inf, (2,), 1)


def test_joined_with_nothing_it_stays_what_it_is():
    some = measure(np.ones(2), np.zeros(2), np.ones(2), FLOAT32)
    none = measure(np.ones(0), np.zeros(0), np.ones(0), FLOAT32)
    assert some.joined(none) == none.joined(some) == some
