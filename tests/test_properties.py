"""What holds for every finite input, subnormal numbers and -0 included, up to a proven bound."""

import math

import numpy as np
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from torchnnfs import Dense, ReLU, Softmax, book
from torchnnfs.testing.layers.dense import dense_bound
from torchnnfs.testing.layers.softmax import softmax_bound
from torchnnfs.testing.precision import PRECISIONS

WIDTHS = {torch.float64: 64, torch.float32: 32, torch.bfloat16: 32, torch.float16: 16}
#: Numbers near 1, where the layers do something, and any finite ones.
FLOATS = {
    dtype: [st.floats(-top, top, width=width) for top in (8.0, torch.finfo(dtype).max)]
    for dtype, width in WIDTHS.items()
}
DTYPES = st.sampled_from(list(FLOATS))
SOFTMAX = st.sampled_from([Softmax(), book.Activation_Softmax()])
RELU = st.sampled_from([ReLU(), book.Activation_ReLU()])
EXAMPLES = settings(max_examples=100, derandomize=True, deadline=None, database=None)


def tensor(data, dtype, n):
    """A tensor of n numbers, any finite ones of the dtype."""
    elements = FLOATS[dtype][data.draw(st.integers(0, 1))]
    numbers = data.draw(st.lists(elements, min_size=n, max_size=n))
    return torch.tensor(numbers, dtype=torch.float64).to(dtype)


def precision_of(dtype):
    return PRECISIONS[str(dtype).removeprefix("torch.")]


def exact(x):
    return x.detach().double().numpy()


def bound_of(y, x, error=0.0):
    """How far a softmax y may be from the exact one of x, whose input was off by `error`."""
    with np.errstate(all="ignore"):
        error = np.broadcast_to(error, x.shape)
        return softmax_bound(exact(x), error, precision_of(y.dtype))


@EXAMPLES
@given(st.data(), SOFTMAX, DTYPES, st.integers(1, 9))
def test_probabilities_sum_to_one(data, layer, dtype, classes):
    x = tensor(data, dtype, classes)
    y = layer(x)
    assert ((y >= 0) & (y <= 1)).all()
    # The exact ones sum to 1, and each computed one is within its bound of the exact one.
    assert abs(math.fsum([*exact(y), -1])) <= math.fsum(bound_of(y, x))


@EXAMPLES
@given(st.data(), SOFTMAX, DTYPES, st.integers(1, 9))
def test_a_shift_changes_no_probability(data, layer, dtype, classes):
    x, shift = tensor(data, dtype, classes), tensor(data, dtype, 1)
    shifted = x + shift
    assume(shifted.isfinite().all())
    # x + shift is rounded, by a unit in its last place at most: the bound takes that as an error of
    # the input. The other bound is for the probabilities of x itself.
    moved = precision_of(dtype).ulp(exact(shifted))
    first, second = layer(x), layer(shifted)
    bound = bound_of(first, x) + bound_of(second, x, moved)
    assert (np.abs(exact(first) - exact(second)) <= bound).all()


@EXAMPLES
@given(st.data(), RELU, DTYPES)
def test_relu_keeps_or_clears_and_does_so_once(data, layer, dtype):
    x = tensor(data, dtype, 8)
    y = layer(x)
    # Nothing is computed, so nothing is rounded: the bound is 0.
    assert torch.equal(layer(y), y)
    assert torch.equal(y, torch.where(x > 0, x, torch.zeros_like(x)))


@EXAMPLES
@given(st.data(), DTYPES, st.integers(1, 4), st.booleans())
def test_dense_is_linear(data, dtype, width, dialect):
    weight = tensor(data, dtype, 2 * width).reshape(2, width)
    layer = Dense(width, 2, bias=False, dtype=dtype)
    layer.weight = torch.nn.Parameter(weight)
    x, y = tensor(data, dtype, width), tensor(data, dtype, width)
    both = x + y
    assume(both.isfinite().all())
    if dialect:  # its weights and results are float32, whatever the input is
        layer, dtype = book.from_torch(layer), torch.float32
        assume(layer.weight.isfinite().all())
    results = [exact(layer(each)) for each in (x, y, both)]
    # x + y is rounded, by a unit in its last place at most: an error of the third input. The sums
    # of this test round in float64 too, which the last term covers.
    moved = precision_of(both.dtype).ulp(exact(both))
    with np.errstate(all="ignore"):
        bound = sum(
            dense_bound(exact(each)[None], error[None], precision_of(dtype), exact(layer.weight))[0]
            for each, error in ((x, 0 * moved), (y, 0 * moved), (both, moved))
        )
        apart = np.abs(results[0] + results[1] - results[2])
        bound = bound + 2.0**-51 * np.abs(results).sum(0)
    proven = np.isfinite(bound)  # where terms overflow nothing is
    assert (apart <= bound)[proven].all()
