import numpy as np
import pytest
import torch

from torchnnfs import book_numpy
from torchnnfs.testing import reference

RNG = np.random.RandomState(7)
X, W, B = RNG.randn(5, 4), RNG.randn(4, 3), RNG.randn(1, 3)


def test_float64_is_torchs_float64():
    x, w, b = map(torch.from_numpy, (X, W, B))
    np.testing.assert_allclose(reference.dense(X, W, B), x @ w + b, rtol=1e-14)
    np.testing.assert_allclose(reference.dense(X, W), x @ w, rtol=1e-14)
    np.testing.assert_array_equal(reference.relu(X), x.relu())
    for dim in (0, 1, -1):
        np.testing.assert_allclose(reference.softmax(X, dim), x.softmax(dim), rtol=1e-14)


def test_under_nnfs_the_dot_product_is_accumulated_in_float64():
    x = np.array([[1e8, 1, -1e8]], dtype=np.float32)
    ones, b = np.ones((3, 1), np.float32), np.array([[0.1]], np.float32)
    with book_numpy():
        y = reference.dense(x, ones, b)
    assert y.dtype == np.float32
    assert y == np.float32(1) + np.float32(0.1)
    assert reference.softmax(X.astype(np.float32)).dtype == np.float32


def test_softmax_of_large_numbers():
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(reference.softmax(np.array([1e308, -1e308])), [1, 0])


@pytest.mark.parametrize("shape", [(4,), (1, 4), (2, 3, 4)])
def test_any_number_of_dimensions(shape):
    x = RNG.randn(*shape)
    assert reference.dense(x, W, B[0]).shape == (*shape[:-1], 3)
