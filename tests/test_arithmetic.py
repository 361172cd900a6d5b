"""The quick way through the libraries gives the bits of the defined one, step by step."""

import functools

import numpy as np
import pytest
import torch

from torchnnfs import arithmetic, book
from torchnnfs.book import Activation_Softmax, Layer_Dense

#: exp of these is 1, 14, 16 and 17 units u = 2**-53 from the middle of two float32 numbers,
#: relatively. They were found among 96 million random float32 numbers from -23 to 0.
NEAR_A_MIDDLE = [float.fromhex(x) for x in ("-0x1.d2259ap+3", "-0x1.7acc62p+3", "-0x1.71e81ep-6")]


def in_order(x, w):
    """A dot product as it is defined, in plain NumPy."""
    total = np.zeros((len(x), w.shape[1]), np.float64)
    for i in range(len(w)):
        total = total + x[:, i : i + 1].astype(np.float64) * w[i].astype(np.float64)
    return total.astype(np.float32) + np.float32(0)


@pytest.fixture
def off(monkeypatch):
    """Another library: its products come from the last input to the first, its exp is 1 ULP off."""

    def install(toward):
        matmul, exp = np.matmul, np.exp

        def backwards(x, w, dtype=None):
            return matmul(x[..., ::-1], w[::-1], dtype=dtype)

        monkeypatch.setattr(np, "matmul", backwards)
        monkeypatch.setattr(np, "exp", lambda x: np.nextafter(exp(x), toward))

    return install


def ties(k):
    """Rows whose sum is the middle of two float32 numbers, or just off it, by the order."""
    rng = np.random.RandomState(k)
    rows = np.zeros((64, k), np.float32)
    rows[:, 0] = 1 + rng.randint(0, 2**10, 64) * 2.0**-23
    rows[:, 1] = 2.0**-24
    rows[::2, 2:] = 2.0**-53
    rows[1::4, 2:] = -(2.0**-54)
    rows[3::4, -1] = -(2.0**-60)
    return rows


@pytest.mark.parametrize("k", [4, 64, 300])
def test_dot_products_in_the_middle_of_two_numbers(k, off):
    x, w = ties(k), np.ones((k, 2), np.float32)
    w[:, 1] = -1
    expected = in_order(x, w)
    reverse = in_order(x[:, ::-1], w[::-1])
    assert (expected != reverse).any()  # the order decides, so the library must not
    np.testing.assert_array_equal(arithmetic.dot(x, w), expected)
    off(np.inf)
    np.testing.assert_array_equal(arithmetic.dot(x, w), expected)
    layer = Layer_Dense(k, 2)
    layer.weights = w
    for inputs in (x, torch.from_numpy(x), x.astype(np.float64)):
        layer.forward(inputs)
        np.testing.assert_array_equal(layer.output, expected)


def test_a_sum_of_two_products_needs_no_test(off):
    x = np.array([[1, 2.0**-24], [1, 2.0**-30], [0, -0.0], [1e-30, -1e-30]], np.float32)
    w = np.array([[1, -1, 1e-20], [1, 1, -1e-20]], np.float32)
    expected = in_order(x, w)
    off(np.inf)
    np.testing.assert_array_equal(arithmetic.dot(x, w), expected)
    assert not np.signbit(arithmetic.dot(x, w)[2]).any()


@pytest.mark.parametrize("k", [1, 2, 3, 20])
def test_no_result_is_a_negative_zero(k):
    x, layer = np.full((1, k), 1e-30, np.float32), Layer_Dense(k, 2)
    layer.weights = np.full((k, 2), -1e-30)
    layer.biases *= -1
    bare = book.from_torch(torch.nn.Linear(k, 2, bias=False))
    bare.weights = layer.weights
    assert not np.signbit(arithmetic.dot(x, layer.weights)).any()
    for each in (layer, bare):
        for way in (each.forward, torch.func.vmap(each)):
            assert not way(torch.from_numpy(x)).signbit().any()


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e4, 1e30])
@pytest.mark.parametrize(("m", "k", "n"), [(300, 3, 3), (300, 64, 3), (2, 300, 64), (1, 1, 1)])
def test_dot_products_of_any_scale(m, k, n, scale, off):
    rng = np.random.RandomState(m * k * n)
    x = (rng.randn(m, k) * scale).astype(np.float32)
    x[rng.rand(m, k) < 0.3] = 0
    w = rng.randn(k, n).astype(np.float32)
    off(-np.inf)
    with np.errstate(over="ignore", invalid="ignore"):
        np.testing.assert_array_equal(arithmetic.dot(x, w), in_order(x, w))


@pytest.mark.parametrize("toward", [-np.inf, np.inf])
def test_exponentials_in_the_middle_of_two_numbers(toward, off):
    logits = np.array([[0, x] for x in NEAR_A_MIDDLE], np.float32)
    exact = book.exp(torch.from_numpy(logits).double()).numpy().astype(np.float32)
    expected = exact / exact.sum(axis=1, keepdims=True)
    off(toward)
    library = np.exp(logits.astype(np.float64)).astype(np.float32)
    assert toward == np.inf or (library != exact).any()  # a unit of the library does decide
    for inputs in (logits, torch.from_numpy(logits)):
        softmax = Activation_Softmax()
        softmax.forward(inputs)
        np.testing.assert_array_equal(softmax.output, expected)


@pytest.mark.parametrize("classes", [1, 2, 3, 8, 9, 129, 1000])
def test_softmax_whatever_the_library_gives(classes, off):
    logits = np.random.RandomState(0).randn(50, classes).astype(np.float32) * 9
    powers = book.exp(torch.from_numpy(logits - logits.max(1, keepdims=True)).double())
    powers = powers.numpy().astype(np.float32)
    off(np.inf)
    np.testing.assert_array_equal(
        arithmetic.softmax_on_host(logits), powers / powers.sum(axis=1, keepdims=True)
    )


def test_the_bound_on_exp_holds_beside_a_wider_type():
    x = -np.logspace(-10, 2.84, 300_001)
    exact = np.exp(x.astype(np.longdouble))
    ours = book.exp(torch.from_numpy(x)).numpy()
    normal = exact > 1e-300
    assert (np.abs(ours - exact)[normal] <= 3 * 2.0**-53 * exact[normal]).all()
    assert (np.abs(np.exp(x) - exact)[normal] <= 4 * 2.0**-53 * exact[normal]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_special_values_go_the_slow_way_to_the_same_place(value):
    x = np.random.RandomState(0).randn(6, 5).astype(np.float32)
    x[2, 3] = value
    layer, softmax = Layer_Dense(5, 4), Activation_Softmax()
    layer.weights *= 1e3
    with np.errstate(all="ignore"):
        expected = in_order(x, layer.weights)
    layer.forward(x)
    np.testing.assert_array_equal(layer.output, expected)
    softmax.forward(x)
    quick = softmax.output
    slow = torch.func.vmap(softmax)(torch.from_numpy(x))
    np.testing.assert_array_equal(quick, slow.numpy())


def test_the_quick_way_and_the_others_agree():
    """The layer's own steps in torch, as a GPU takes them, against the way through NumPy."""
    x = np.random.RandomState(1).randn(300, 7).astype(np.float32)
    layer, softmax = Layer_Dense(7, 9), Activation_Softmax()
    layer.biases = np.random.RandomState(2).randn(9)
    chain = torch.nn.Sequential(layer, softmax)
    quick = chain(torch.from_numpy(x))
    slow = torch.func.vmap(chain)(torch.from_numpy(x))
    assert torch.equal(quick, slow)
    assert layer.output is None
    assert torch.equal(softmax.forward(layer.forward(x)), quick)


# torch's own warning, of the first forward-mode derivative in a process
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_mode_and_higher_derivatives_still_work():
    layer, x = Layer_Dense(3, 2), torch.randn(4, 3)
    jacobian = torch.func.jacfwd(layer)(x)
    np.testing.assert_allclose(jacobian[1, 0, 1].detach(), layer.weights[:, 0], rtol=1e-6)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(layer.forward(dual)).tangent
    np.testing.assert_allclose(tangent[0].detach(), layer.weights.sum(0), rtol=1e-5)
    x.requires_grad_()
    run = functools.partial(torch.autograd.grad, create_graph=True)
    (gradient,) = run(layer.forward(x).pow(2).sum(), x)
    (second,) = run(gradient.sum(), x)
    expected = 2 * layer.weights.sum(0) @ layer.weights.T
    np.testing.assert_allclose(second.detach(), np.tile(expected, (4, 1)), rtol=1e-4)
