"""Whatever finite numbers go in, a correct computation in float32 stays within its bound."""

import inspect
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from torchnnfs.testing.layers import dense, normalise, pointwise, reshape, softmax
from torchnnfs.testing.measure import measure
from torchnnfs.testing.precision import PRECISIONS

FLOAT32 = PRECISIONS["float32"]
EDGES = [0.0, -0.0, 2.0**-149, -(2.0**-149), 2.0**-126, 1.0, -1.0, FLOAT32.largest, -88.75, 104.0]
NUMBERS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-100, 100, width=32),
    st.sampled_from(EDGES),
)
LAYERS = [
    (dense.DENSE, nn.Linear(3, 2), (2, 3)),
    (dense.CONV1D, nn.Conv1d(2, 2, 2, padding=1, groups=2), (2, 3)),
    (pointwise.RELU, nn.ReLU(), (5,)),
    (pointwise.LEAKY_RELU, nn.LeakyReLU(0.3), (5,)),
    (pointwise.TANH, nn.Tanh(), (5,)),
    (pointwise.SIGMOID, nn.Sigmoid(), (5,)),
    (pointwise.GELU, nn.GELU(), (5,)),
    (pointwise.GELU, nn.GELU("tanh"), (5,)),
    (softmax.SOFTMAX, nn.Softmax(-1), (2, 3)),
    (softmax.SOFTMAX, nn.Softmax(0), (9, 2)),
    (softmax.LOG_SOFTMAX, nn.LogSoftmax(-1), (2, 3)),
    (normalise.LAYER_NORM, nn.LayerNorm(3), (2, 3)),
    (normalise.BATCH_NORM, nn.BatchNorm1d(3).eval(), (2, 3)),
    (reshape.FLATTEN, nn.Flatten(), (2, 3, 1)),
    (reshape.MAX_POOL2D, nn.MaxPool2d(2, 1), (1, 2, 3)),
    (reshape.AVG_POOL2D, nn.AvgPool2d(2, 1, 1, count_include_pad=False), (1, 2, 3)),
]
every_layer = pytest.mark.parametrize(
    ("layer", "module", "shape"), LAYERS, ids=[str(module) for _, module, _ in LAYERS]
)
quick = settings(
    derandomize=True,
    deadline=None,
    max_examples=20,
    database=None,
    phases=[Phase.generate],
)


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    with np.errstate(all="ignore"):
        yield


def prepared(layer, module, data):
    """The module with drawn parameters, and the arguments of its formula."""
    with torch.no_grad():
        for parameter in module.parameters():
            drawn = data.draw(arrays(np.float32, tuple(parameter.shape), elements=NUMBERS))
            parameter.copy_(torch.from_numpy(drawn))
    names = list(inspect.signature(layer.forward).parameters)[1:]
    return {name: wide(getattr(module, name)) for name in names}


def wide(value):
    return value.detach().double().numpy() if isinstance(value, torch.Tensor) else value


def outside(value, exact, bound):
    """Whether a number is off by more than its bound; an overflow has none."""
    beyond = np.isinf(value) & (np.abs(exact) + bound >= FLOAT32.largest)
    same = (value == exact) | beyond | (np.isnan(value) & np.isnan(exact))
    return not (same | (np.abs(value - exact) <= bound) | (bound == np.inf)).all()


@every_layer
@quick
@given(st.data())
def test_torch_and_numpy_stay_within_the_bound(layer, module, shape, data):
    named = prepared(layer, module, data)
    x = data.draw(arrays(np.float32, shape, elements=NUMBERS))
    exact = layer.forward(wide(torch.from_numpy(x)), **named)
    few = {k: v.astype(np.float32) if isinstance(v, np.ndarray) else v for k, v in named.items()}
    for near in (x, data.draw(arrays(np.float32, shape, elements=NUMBERS))):
        # Rounded up: that difference rounds in float64.
        error = np.nextafter(np.abs(near.astype(np.float64) - x), np.inf) * (near != x)
        bound = layer.bound(x.astype(np.float64), error, FLOAT32, **named)
        assert (bound >= 0).all()
        for value in (wide(module(torch.from_numpy(near))), layer.forward(near, **few)):
            assert not outside(value.astype(np.float64), exact, bound)


@every_layer
@quick
@given(st.data())
def test_gradients_stay_within_their_bounds(layer, module, shape, data):
    named = prepared(layer, module, data)
    x = torch.from_numpy(data.draw(arrays(np.float32, shape, elements=NUMBERS))).requires_grad_()
    y = module(x)
    g = torch.from_numpy(data.draw(arrays(np.float32, tuple(y.shape), elements=NUMBERS)))
    found = torch.autograd.grad(y, [x, *module.parameters()], g)
    ours = layer.backward(wide(x), wide(y), wide(g), FLOAT32, **named)
    assert len(ours) == len(found)
    for (exact, bound), theirs in zip(ours.values(), found, strict=True):
        assert not outside(wide(theirs), exact, bound)


@quick
@given(st.data())
def test_fractions_stay_within_the_bound_of_a_dense_layer(data):
    """The sum of the products as fractions: exact, whatever overflows or is subnormal."""
    x, weight, bias = (
        data.draw(arrays(np.float32, shape, elements=NUMBERS)) for shape in [(4,), (2, 4), (2,)]
    )
    bound = dense.dense_bound(x.astype(float), np.zeros(4), FLOAT32, weight.astype(float), bias)
    value = nn.functional.linear(*map(torch.from_numpy, (x, weight, bias)))
    for row, b, y, allowed in zip(weight, bias, value.tolist(), bound, strict=True):
        exact = sum((Fraction(float(p)) * Fraction(float(q)) for p, q in zip(x, row, strict=True)))
        exact += Fraction(float(b))
        if math.isfinite(allowed):
            assert math.isfinite(y)
            assert abs(Fraction(y) - exact) <= Fraction(float(allowed))


@quick
@given(arrays(np.float64, 6, elements=st.floats(allow_nan=False, allow_infinity=False)))
def test_rounding_and_units_are_numpys(values):
    theirs = values.astype(np.float32)
    rounded = FLOAT32.round(values)
    np.testing.assert_array_equal(rounded, theirs.astype(np.float64))
    np.testing.assert_array_equal(np.signbit(rounded), np.signbit(theirs))
    finite = np.abs(values) < FLOAT32.largest / 2
    toward_zero = np.nextafter(theirs, np.float32(0)).astype(np.float64)
    unit = FLOAT32.ulp(rounded)[finite & (rounded != 0)]
    step = np.abs(rounded - toward_zero)[finite & (rounded != 0)]
    assert ((unit == step) | (unit == 2 * step)).all()


@settings(derandomize=True, database=None, max_examples=200, deadline=None)
@given(
    arrays(np.float64, (2, 3), elements=st.floats(-1e38, 1e38)),
    st.integers(0, 5),
    st.integers(1, 40),
)
def test_measure_finds_the_one_number_that_is_not_correctly_rounded(exact, place, steps):
    value = exact.astype(np.float32)
    half = 0.5 * FLOAT32.ulp(exact)
    right = measure(value, exact, half, FLOAT32)
    assert (right.equal, right.unbounded, right.size) == (6, 0, 6)
    assert right.max_ulp <= 0.5
    assert right.ratio <= 1

    index = np.unravel_index(place, value.shape)
    for _ in range(steps):
        value[index] = np.nextafter(value[index], np.float32(np.inf))
    wrong = measure(value, exact, half, FLOAT32)
    assert (wrong.worst.index, wrong.worst.value) == (index, value[index])
    assert wrong.worst.expected == exact[index]
    assert wrong.equal == 5
    assert wrong.ratio >= 1
    assert wrong.max_abs == np.abs(value.astype(np.float64) - exact).max()
    # Across a power of two the numbers lie half or twice as far apart.
    assert steps / 2 - 0.5 <= wrong.max_ulp <= 2 * steps + 0.5
