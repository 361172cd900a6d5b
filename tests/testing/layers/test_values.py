"""Broken copies, plain sums and corners of the formulas, in numbers that can be worked out."""

import numpy as np
import pytest

from torchnnfs.testing.layers import dense, normalise, pointwise, reshape, softmax
from torchnnfs.testing.precision import PRECISIONS

FLOAT64, FLOAT32 = PRECISIONS["float64"], PRECISIONS["float32"]
W = np.array([[1.0, 2.0], [3.0, 4.0]])
X = np.array([[1.0, -2.0]])
KERNEL = np.array([[[[1.0, 2.0], [3.0, 4.0]]]])
IMAGE = np.array([[[1.0, -2.0, 0.5], [0.75, 0.25, 3.0]]])
CONVOLUTION = {
    "bias": None,
    "stride": (1, 1),
    "padding": (0, 0),
    "dilation": (1, 1),
    "groups": 1,
    "padding_mode": "zeros",
}
POOL = {"kernel_size": 2, "stride": 2, "padding": 0, "ceil_mode": False}
FINE = np.array([[1 + 2.0**-7 + 2.0**-10 + 2.0**-12, 1e5, 0.0]])


def wrong(layer, name, x, **arguments):
    return layer.controls[name](np.array(x), **arguments)


def windows(kernel):
    """Of the image, with a kernel given as a list."""
    left, right = IMAGE[0, :, :2].ravel(), IMAGE[0, :, 1:].ravel()
    return [[[left @ kernel, right @ kernel]]]


@pytest.mark.parametrize(
    ("layer", "name", "x", "arguments", "expected"),
    [
        (dense.DENSE, "a weight matrix transposed", X, {"weight": W}, X @ W),
        (dense.DENSE, "a weight matrix permuted", X, {"weight": W}, X @ np.array([[4, 2], [1, 3]])),
        (dense.DENSE, "a weight matrix times 1 + 1e-5", X, {"weight": W}, X @ W.T * (1 + 1e-5)),
        (dense.DENSE, "a bias of 1e-6", X, {"weight": W}, X @ W.T + 1e-6),
        (dense.DENSE, "a bias of 1e-6", X, {"weight": W, "bias": W[0]}, X @ W.T + W[0] + 1e-6),
        (
            dense.DENSE, "parameters rounded to TF32", np.eye(3), {"weight": FINE},
            [[1 + 2.0**-7 + 2.0**-10], [99968], [0]],
        ),
        (
            dense.DENSE, "parameters rounded to bfloat16", np.eye(3), {"weight": FINE},
            [[1 + 2.0**-7], [99840], [0]],
        ),
        (
            dense.DENSE, "parameters rounded to float16", np.ones((1, 1)), {"weight": FINE.T},
            [[1 + 2.0**-7 + 2.0**-10, np.inf, 0]],
        ),
        (
            dense.CONV2D, "a kernel flipped", IMAGE, {"weight": KERNEL, **CONVOLUTION},
            windows([4, 3, 2, 1]),
        ),
        (
            dense.CONV2D, "a kernel times 1 + 1e-5", IMAGE, {"weight": KERNEL, **CONVOLUTION},
            np.array(windows([1, 2, 3, 4])) * (1 + 1e-5),
        ),
        (
            dense.CONV2D, "a bias of 1e-6", IMAGE, {"weight": KERNEL, **CONVOLUTION},
            np.array(windows([1, 2, 3, 4])) + 1e-6,
        ),
        (
            dense.EMBEDDING, "an embedding shifted by one row", [0, 1],
            {"weight": W, "padding_idx": None, "scale_grad_by_freq": False},
            W[[1, 0]],
        ),
        (pointwise.RELU, "ReLU left out", X, {}, X),
        (pointwise.RELU, "leaky ReLU, slope 1e-2", X, {}, [[1, -0.02]]),
        (pointwise.RELU, "leaky ReLU, slope 1e-4", X, {}, [[1, -2e-4]]),
        (
            pointwise.LEAKY_RELU, "leaky ReLU, slope 1 % too large", X, {"negative_slope": 0.5},
            [[1, -1.01]],
        ),
        (pointwise.TANH, "tanh left out", X, {}, X),
        (pointwise.SIGMOID, "sigmoid left out", X, {}, X),
        (
            pointwise.GELU, "GELU in its other form", X, {"approximate": "none"},
            pointwise.gelu(X, "tanh"),
        ),
        (
            pointwise.GELU, "GELU in its other form", X, {"approximate": "tanh"},
            pointwise.gelu(X, "none"),
        ),
        (
            softmax.SOFTMAX, "softmax over the wrong axis", W, {"dim": 1},
            softmax.softmax(W.T, 1).T,
        ),
        (softmax.SOFTMAX, "softmax over the wrong axis", W, {"dim": 0}, softmax.softmax(W, -1)),
        (
            softmax.SOFTMAX, "softmax over the wrong axis", IMAGE, {"dim": 0},
            softmax.softmax(IMAGE, 2),
        ),
        (softmax.SOFTMAX, softmax.UNSHIFTED, W, {"dim": 0}, np.exp(W) / np.exp(W).sum(0)),
        (
            softmax.LOG_SOFTMAX, "log-softmax over the wrong axis", W, {"dim": -1},
            softmax.log_softmax(W, 0),
        ),
        (softmax.LOG_SOFTMAX, "log-softmax without the logarithm", W, {"dim": -1},
         softmax.softmax(W, 1)),
        (
            normalise.LAYER_NORM, "layer norm without eps", [[1.0, 3.0]],
            {"normalized_shape": (2,), "weight": None, "bias": None, "eps": 8.0}, [[-1, 1]],
        ),
        (
            # variance 2, of a sample 3; with eps 4
            normalise.LAYER_NORM, "layer norm by the variance of a sample", [[1.0, 1.0, 4.0]],
            {"normalized_shape": (3,), "weight": None, "bias": np.array([5.0, 7.0, 9.0]), "eps": 1},
            [[5 - 1 / 2, 7 - 1 / 2, 10]],
        ),
        (
            normalise.LAYER_NORM, "layer norm by the variance of a sample", [[1.0, 3.0]],
            {"normalized_shape": (2,), "weight": np.array([6.0, 3.0]), "bias": None, "eps": 7.0},
            [[-2, 1]],
        ),
        (
            normalise.BATCH_NORM, "batch norm without eps", [[5.0]],
            {"running_mean": np.ones(1), "running_var": np.array([4.0]), "weight": None,
             "bias": None, "eps": 5.0}, [[2]],
        ),
        (
            normalise.BATCH_NORM, "batch norm by the statistics of the batch",
            [[[1.0, 3.0]], [[3.0, 5.0]]],
            {"running_mean": np.ones(1), "running_var": np.ones(1), "weight": None, "bias": None,
             "eps": 2.0}, [[[-1, 0]], [[0, 1]]],
        ),
        (
            reshape.FLATTEN, "flatten with the first dimension running fastest",
            np.arange(12).reshape(1, 2, 3, 2), {"start_dim": 1, "end_dim": -2},
            [[[0, 1], [6, 7], [2, 3], [8, 9], [4, 5], [10, 11]]],
        ),
        (reshape.MAX_POOL2D, "max pool as mean", IMAGE, {**POOL, "dilation": 1}, [[[0]]]),
        (
            reshape.MAX_POOL2D, "max pool as mean", IMAGE[..., :2],
            {**POOL, "stride": 3, "padding": 1, "dilation": 1}, [[[0.25]]],
        ),
        (
            reshape.AVG_POOL2D, "average pool, padding counted otherwise", IMAGE[..., :2],
            {**POOL, "stride": 3, "padding": 1, "count_include_pad": True,
             "divisor_override": None}, [[[1]]],
        ),
    ],
)  # fmt: skip
def test_what_a_broken_copy_computes(layer, name, x, arguments, expected):
    with np.errstate(all="ignore"):
        y = wrong(layer, name, x, **arguments)
    np.testing.assert_allclose(y, expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    ("layer", "name", "x", "arguments"),
    [
        (dense.DENSE, "a weight matrix transposed", X, {"weight": np.ones((3, 2))}),
        (dense.DENSE, "parameters rounded to float16", X, {"weight": W}),
        (pointwise.LEAKY_RELU, "leaky ReLU, slope 1 % too large", X, {"negative_slope": 0.0}),
        (softmax.SOFTMAX, "softmax over the wrong axis", X[0], {"dim": -1}),
        (reshape.MAX_POOL2D, "max pool as mean", IMAGE, {**POOL, "dilation": (1, 2)}),
        (
            reshape.AVG_POOL2D, "average pool, padding counted otherwise", IMAGE,
            {**POOL, "count_include_pad": True, "divisor_override": None},
        ),
        (
            normalise.LAYER_NORM, "layer norm by the variance of a sample", [[1.0]],
            {"normalized_shape": (1, 1), "weight": None, "bias": None, "eps": 1.0},
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_broken_in_that_way(layer, name, x, arguments):
    assert wrong(layer, name, x, **arguments) is None


def test_tf32_has_the_small_numbers_of_float32_in_steps_of_its_own():
    name, weight = "parameters rounded to TF32", np.array([[1.5 * 2.0**-136]])
    assert wrong(dense.DENSE, name, np.ones((1, 1)), weight=weight) == 2.0**-135


@pytest.mark.parametrize(("rows", "orders"), [(1, 16), (50, 10), (51, 10), (300, 3)])
def test_there_are_as_many_plain_sums_as_it_takes(rows, orders):
    x = np.full((rows, 1), 2.0)
    assert dense.DENSE.honest(x, FLOAT32, weight=W[:, :1]).shape == (orders, rows, 2)
    batch = dense.DENSE.honest(x[None], FLOAT32, weight=W[:, :1], bias=W[0])
    assert batch.shape == (orders, 1, rows, 2)
    assert np.abs(batch).max() < 1e-6


def test_plain_sums_begin_with_the_bias_and_round_each_step():
    """Each of two terms is half of the last place of 1; one after the other, 1 keeps none."""
    x, weight = np.ones((1, 3)), np.array([[1.0, 2.0**-24, 2.0**-24]])
    for inputs, terms in (
        (x, {"weight": weight, "bias": None}),
        (x[:, 1:], {"weight": weight[:, 1:], "bias": np.ones(1)}),
    ):
        errors = dense.DENSE.honest(inputs, FLOAT32, **terms)
        assert errors[0] == -(2.0**-23)
        assert set(errors.ravel()) == {-(2.0**-23), 0.0}  # in other orders they meet first
        assert not dense.DENSE.honest(inputs, FLOAT64, **terms).any()


def test_plain_sums_of_half_types_are_rounded_once():
    x, weight = np.array([[1.0, 1.0, 1.0]]), np.array([[2048.0, 0.5, 0.75]])
    errors = dense.DENSE.honest(x, PRECISIONS["float16"], weight=weight)
    np.testing.assert_array_equal(errors, np.full((16, 1, 1), 2050 - 2049.25))


def test_gradients_at_the_kink():
    zero = np.zeros(1)
    for layer, arguments, slope in (
        (pointwise.RELU, {}, 0.0),
        (pointwise.LEAKY_RELU, {"negative_slope": -1.5}, -1.5),
    ):
        exact, _ = layer.backward(zero, zero, np.ones(1), FLOAT32, **arguments)["input"]
        assert exact == slope
    assert np.signbit(pointwise.LEAKY_RELU.forward(zero, -1.5))  # slope times 0, as torch has it
    # Where the slope is 0 nothing is passed on, whatever comes in.
    with np.errstate(invalid="ignore"):
        exact, _ = pointwise.RELU.backward(-np.ones(1), zero, np.array([np.inf]), FLOAT32)["input"]
    assert exact == 0


def test_softmax_is_along_the_last_dimension_by_default():
    x, zero = np.random.RandomState(0).randn(2, 3, 4), np.zeros((2, 3, 4))
    np.testing.assert_array_equal(softmax.softmax(x), softmax.softmax(x, 2))
    for bound in (softmax.SOFTMAX.bound, softmax.LOG_SOFTMAX.bound):
        np.testing.assert_array_equal(bound(x, zero, FLOAT32), bound(x, zero, FLOAT32, dim=2))


def test_short_and_long_axes_give_the_same():
    """NumPy is slow along short last axes, so they are moved first: nothing else changes."""
    x = np.random.RandomState(0).randn(2, 7)
    longer = np.concatenate([x, np.full((2, 1), -np.inf)], axis=1)
    np.testing.assert_allclose(softmax.softmax(longer, 1)[:, :7], softmax.softmax(x, 1), rtol=1e-14)


def test_a_bias_that_is_missing_changes_no_bit():
    x, minus, one = np.ones((1, 2)), -np.ones(2), np.ones(2)
    named = {"weight": minus, "bias": None, "eps": 1.0}
    assert np.signbit(normalise.LAYER_NORM.forward(x, normalized_shape=(2,), **named)).all()
    statistics = {"running_mean": one, "running_var": one}
    assert np.signbit(normalise.BATCH_NORM.forward(x, **statistics, **named)).all()


def test_which_formulas_hold_in_eval_mode_alone():
    layers = [normalise.BATCH_NORM, normalise.LAYER_NORM, pointwise.DROPOUT, pointwise.IDENTITY]
    assert [layer.eval_only for layer in layers] == [True, False, True, False]
