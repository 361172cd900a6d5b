"""What the cells of the seed notebook (NNFS, chapter 4) print, from our modules.

The numbers are the printed ones. Those with eight digits are rounded to them; an error is allowed
to be that rounding and what the bounds give for both sides, no more.
"""

import numpy as np
import pytest
import torch

from torchnnfs import Dense, ReLU, Softmax, classifier, spiral
from torchnnfs.testing import assert_agrees
from torchnnfs.testing.layers.dense import DENSE
from torchnnfs.testing.layers.pointwise import RELU
from torchnnfs.testing.layers.softmax import SOFTMAX
from torchnnfs.testing.precision import PRECISIONS

DIGITS = 0.5e-8
FLOAT64 = PRECISIONS["float64"]
LAYER_OUTPUTS = [4.8, 1.21, 2.385]
THIRDS = [[0.33333334] * 3] * 5
PAGE = [
    [0.33333334, 0.33333334, 0.33333334],
    [0.33333316, 0.3333332, 0.33333364],
    [0.33333287, 0.3333329, 0.33333418],
    [0.3333326, 0.33333263, 0.33333477],
    [0.33333233, 0.3333324, 0.33333528],
]


@pytest.mark.parametrize("cell", [17, 18, 19])
def test_cells_17_to_19_relu(cell, device):
    inputs = torch.tensor([0, 2, -1, 3.3, -2.7, 1.1, 2.2, -100], device=device)
    printed = torch.tensor([0, 2, 0, 3.3, 0, 1.1, 2.2, 0], device=device)
    assert torch.equal(ReLU()(inputs), printed)


def test_cell_20_dense_and_relu_on_the_spiral(stream, device):
    printed = [
        [0, 0, 0],
        [0, 0.00011395, 0],
        [0, 0.00031729, 0],
        [0, 0.00052666, 0],
        [0, 0.00071401, 0],
    ]
    points, _ = spiral(samples=100, classes=3, generator=stream, device=device)
    layer = Dense(2, 3, generator=stream, device=device)
    output = ReLU()(layer(points))[:5].cpu().double()
    assert output.shape == (5, 3)
    assert (output - torch.tensor(printed).double()).abs().max() <= DIGITS + 2 * 3 * 2.0**-24 * 0.05


def test_cell_21_exponentials_in_plain_python():
    # The cell's E has 12 digits, so its exponentials are those of x log(E).
    x = torch.tensor(LAYER_OUTPUTS, dtype=torch.float64)
    off = np.abs(x.numpy()) * abs(np.log(2.71828182846) - 1)
    powers = [121.51041751893969, 3.3534846525504487, 10.85906266492961]
    probabilities = torch.tensor([0.8952826639573506, 0.024708306782070668, 0.08000902926057876])
    probabilities = torch.tensor(
        [0.8952826639573506, 0.024708306782070668, 0.08000902926057876], dtype=torch.float64
    )
    relative = (x.exp() - torch.tensor(powers, dtype=torch.float64)).abs() / x.exp()
    assert (relative <= torch.from_numpy(off) + 1e-15).all()
    assert abs(x.exp().sum().item() - 135.72296483641975) < 135 * (off.max() + 1e-15)
    bound = SOFTMAX.bound(x.numpy(), off, FLOAT64)
    output = Softmax()(x)
    assert (np.abs((output - probabilities).numpy()) <= bound).all()
    assert abs(output.sum().item() - 1.0) < 1e-15


def test_cell_22_exponentials_in_numpy():
    x = torch.tensor(LAYER_OUTPUTS, dtype=torch.float64)
    np.testing.assert_allclose(
        x.exp(), [121.51041752, 3.35348465, 10.85906266], atol=DIGITS, rtol=0
    )
    output = Softmax()(x)
    np.testing.assert_allclose(output, [0.89528266, 0.02470831, 0.08000903], atol=DIGITS, rtol=0)
    assert abs(output.sum().item() - 0.9999999999999999) < 1e-15


def test_cell_23_sums_along_rows():
    rows = [[4.8, 1.21, 2.385], [8.9, -1.81, 0.2], [1.41, 1.051, 0.026]]
    sums = torch.tensor(rows, dtype=torch.float64).sum(dim=1, keepdim=True)
    np.testing.assert_allclose(sums, [[8.395], [7.29], [2.487]], rtol=1e-15)


def test_cell_25_softmax_does_not_see_a_shift(device):
    printed = [[0.09003057, 0.24472847, 0.66524096]]
    for row in ([[1.0, 2.0, 3.0]], [[-2.0, -1.0, 0.0]]):
        output = Softmax()(torch.tensor(row, device=device)).cpu().double()
        bound = SOFTMAX.bound(np.array(row), np.zeros((1, 3)), PRECISIONS["float32"])
        assert (np.abs(output.numpy() - printed) <= bound + DIGITS).all()


@pytest.mark.parametrize(
    ("relu_cell_first", "printed"), [(False, PAGE), (True, THIRDS)], ids=["book", "notebook"]
)
def test_cell_26_the_spiral_forward_pass(relu_cell_first, printed, stream, device):
    """The book's page, and the notebook's, whose stream the ReLU cell had moved on."""
    if relu_cell_first:
        spiral(100, 3, generator=stream)
        Dense(2, 3, generator=stream)
    points, _ = spiral(100, 3, generator=stream, device=device)
    model = classifier(2, 3, 3, generator=stream, device=device)
    assert_agrees(model, points)
    output = model(points)[:5].detach().cpu().double().numpy()
    bound = chained_bound(model.cpu(), points[:5].cpu())
    # The book's NumPy strays within the same bound on its side, and printing rounds once more.
    assert (np.abs(output - np.array(printed)) <= 2 * bound + DIGITS).all()


def chained_bound(model, points):
    """The bound after the last layer of the chapter's network."""
    precision = PRECISIONS["float32"]
    x = points.double().numpy()
    error = np.zeros_like(x)
    for layer in (model[0], model[2]):
        w, b = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
        error = DENSE.bound(x, error, precision, w, b)
        x = DENSE.forward(x, w, b)
        if layer is model[0]:
            error, x = RELU.bound(x, error, precision), RELU.forward(x)
    return SOFTMAX.bound(x, error, precision)


def test_the_two_pages_differ():
    """A sharper check than the digits: the bound tells the page from the notebook's thirds."""
    stream = np.random.RandomState(0)
    points, _ = spiral(100, 3, generator=stream)
    model = classifier(2, 3, 3, generator=stream)
    bound = chained_bound(model, points[:5])
    assert (np.abs(np.array(PAGE) - np.array(THIRDS)) > 2 * bound + DIGITS).any()
