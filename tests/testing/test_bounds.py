"""The bounds hold for computations that round as badly as they may, and are not far above them."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torchnnfs.testing.bounds import PRECISIONS

from torchnnfs.testing import bounds, reference

RNG = np.random.RandomState(3)
FLOAT32 = PRECISIONS["float32"]


def test_precisions_are_torchs():
    for name, precision in PRECISIONS.items():
        dtype = getattr(torch, name)
        info = torch.finfo(dtype)
        assert precision.largest == info.max
        assert 2.0 ** (1 - precision.digits) == info.eps
        assert precision.smallest == info.smallest_normal * info.eps
        assert (precision.stored_unit or precision.unit) >= info.eps / 2
        one_up = torch.nextafter(torch.tensor(3.0, dtype=dtype), torch.tensor(9.0, dtype=dtype))
        assert precision.ulp(np.array(3.0)) == one_up.double() - 3
    assert FLOAT32.ulp(np.array(0.0)) == 2.0**-149


def test_gamma_is_highams():
    assert FLOAT32.gamma(3) == 3 * FLOAT32.unit / (1 - 3 * FLOAT32.unit)
    assert FLOAT32.gamma(2**25) == np.inf


def test_the_float64_reference_is_within_half_of_its_bound():
    """Its own share of the bound, shown with exact rational arithmetic."""
    x, w, b = RNG.randn(6, 40), RNG.randn(40, 3), RNG.randn(3)
    y = reference.dense(x, w, b)
    bound = bounds.dense(x, np.zeros_like(x), PRECISIONS["float64"], w, b)
    for i, j in np.ndindex(y.shape):
        products = (Fraction(x[i, k]) * Fraction(w[k, j]) for k in range(40))
        exact = sum(products, start=Fraction(b[j]))
        assert abs(Fraction(y[i, j]) - exact) <= Fraction(bound[i, j]) / 2


@pytest.mark.parametrize("k", [1, 2, 3, 64, 500])
@pytest.mark.parametrize("backwards", [False, True])
def test_dense_bounds_sequential_float32_sums(k, backwards):
    x = RNG.randn(50, k).astype(np.float32)
    w, b = RNG.randn(k, 4).astype(np.float32), RNG.randn(4).astype(np.float32)
    order = range(k)[::-1] if backwards else range(k)
    y = np.zeros((50, 4), np.float32)
    for i in order:
        y = y + x[:, i : i + 1] * w[i]
    y = y + b
    exact = reference.dense(*(a.astype(np.float64) for a in (x, w, b)))
    bound = bounds.dense(x.astype(float), np.zeros(x.shape), FLOAT32, w.astype(float), b)
    ratio = np.abs(y - exact) / bound
    assert ratio.max() <= 1
    assert ratio.max() > 1e-3


def test_dense_carries_an_error_to_the_last_digit():
    x, w = RNG.randn(5, 3), RNG.randn(3, 2)
    error = np.abs(RNG.randn(5, 3)) * 1e-3
    for j in range(2):
        worst = reference.dense(x + error * np.sign(w[:, j]), w)[:, j]
        bound = bounds.dense(x, error, PRECISIONS["float64"], w)[:, j]
        moved = np.abs(worst - reference.dense(x, w)[:, j])
        assert (moved <= bound).all()
        assert (moved > 0.999999 * bound).all()


def test_relu_carries_an_error():
    x, error = RNG.randn(100), np.full(100, 1e-3)
    bound = bounds.relu(x, error, FLOAT32)
    moved = np.abs(reference.relu(x + error) - reference.relu(x))
    assert (moved <= bound * (1 + 1e-12)).all()
    assert bound.max() < 1e-3 * (1 + 1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 0.1, 3.0])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_softmax_carries_an_error(scale, classes):
    x = RNG.randn(200, classes) * 5
    error = np.abs(RNG.randn(200, classes)) * scale
    bound = bounds.softmax(x, error, FLOAT32)
    p = reference.softmax(x)
    for i in range(classes):  # the worst for class i: it up, all others down
        moved = -error.copy()
        moved[:, i] *= -1
        change = (reference.softmax(x + moved) - p)[:, i]
        assert (change <= bound[:, i]).all()
        rounding = 30 * FLOAT32.unit * p[:, i] * (1 + (x.max(1) - x.min(1)))
        if scale <= 0.1:
            assert (change > 0.3 * (bound[:, i] - rounding)).all()


@pytest.mark.parametrize("classes", [1, 2, 3, 64, 1000])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0])
def test_softmax_bounds_a_bad_exp(classes, scale):
    """Exponentials wrong by three units in the last place, each in the worse direction."""
    x = (RNG.randn(100, classes) * scale).astype(np.float32)
    powers = np.exp((x - x.max(1, keepdims=True)).astype(np.float64)).astype(np.float32)
    sign = np.where(np.arange(classes) == 0, 1, -1)
    powers = (powers + sign * 3 * np.spacing(powers)).astype(np.float32)
    y = powers / np.cumsum(powers, axis=1, dtype=np.float32)[:, -1:]
    exact = reference.softmax(x.astype(np.float64))
    bound = bounds.softmax(x.astype(np.float64), np.zeros(x.shape), FLOAT32)
    assert (np.abs(y - exact) <= bound).all()


def test_softmax_never_promises_less_than_nothing():
    x = np.array([[0.0, -800.0, -1e300]])
    bound = bounds.softmax(x, np.zeros_like(x), FLOAT32)
    assert (bound > 0).all()
    assert bound[0, 1] < 1e-37
    assert (bounds.softmax(x, np.full_like(x, 1e6), FLOAT32) <= 1.001).all()
    assert (bounds.softmax(x, np.full_like(x, np.inf), FLOAT32) == np.inf).all()
    along = bounds.softmax(x.T, np.zeros((3, 1)), FLOAT32, dim=0)
    np.testing.assert_array_equal(along, bound.T)


def test_half_types_round_once_on_top():
    y, error = np.array([1.0, 3e-8]), np.array([0.0, 0.0])
    half = PRECISIONS["float16"].stored(y, error)
    np.testing.assert_allclose(half, [2.0**-11 + 2.0**-25, 2.0**-25], rtol=1e-3)
