"""Formulas and bounds against arithmetic of sixty digits, written independently of both."""

import mpmath
import numpy as np
import pytest

from torchnnfs.testing.layers import dense, normalise, pointwise, reshape, softmax
from torchnnfs.testing.precision import PRECISIONS

FLOAT64 = PRECISIONS["float64"]
EPS = 2.0**-10


@pytest.fixture(autouse=True)
def _sixty_digits():
    with mpmath.workdps(60), np.errstate(all="ignore"):
        yield


def long(array):
    return np.vectorize(mpmath.mpf, otypes=[object])(array)


def each(function):
    return np.vectorize(function, otypes=[object])


exp, root = each(mpmath.exp), each(mpmath.sqrt)


def convolution(x, weight, bias, groups):
    """Stride 2, padding 1: the sum over channels and window, term by term."""
    out, inputs, *kernel = weight.shape
    sizes = [(n + 2 - k) // 2 + 1 for n, k in zip(x.shape[1:], kernel, strict=True)]
    y = np.zeros((out, *sizes), object)
    for o, *place in np.ndindex(y.shape):
        y[(o, *place)] = bias[o]
        for i, *offset in np.ndindex(inputs, *kernel):
            at = [2 * p + d - 1 for p, d in zip(place, offset, strict=True)]
            if all(0 <= a < n for a, n in zip(at, x.shape[1:], strict=True)):
                channel = o // (out // groups) * inputs + i
                y[(o, *place)] += x[(channel, *at)] * weight[(o, i, *offset)]
    return y


def pool(choose, x):
    """Windows of 2 x 2, stride 1, padding 1: the numbers of x in each."""
    y = np.zeros([n + 1 for n in x.shape], object)
    for i, j in np.ndindex(y.shape):
        y[i, j] = choose(x[max(i - 1, 0) : i + 1, max(j - 1, 0) : j + 1].ravel())
    return y


def normal(x, weight, bias):
    m = x.sum(-1, keepdims=True) / x.shape[-1]
    v = ((x - m) ** 2).sum(-1, keepdims=True) / x.shape[-1]
    return (x - m) / root(v + EPS) * weight + bias


RNG = np.random.RandomState(5)
W, B = RNG.randn(2, 4), RNG.randn(2)
FOUR = {"weight": RNG.randn(4), "bias": RNG.randn(4), "eps": EPS}
POOL = {"kernel_size": 2, "stride": 1, "padding": 1, "ceil_mode": False}
PLACES = {"padding_mode": "zeros"}
LINE = {"stride": (2,), "padding": (1,), "dilation": (1,), **PLACES}
IMAGE = {"stride": (2, 2), "padding": (1, 1), "dilation": (1, 1), **PLACES}
STATISTICS = {"running_mean": RNG.randn(4), "running_var": RNG.rand(4)}


def case(layer, shape, exact, **arguments):
    return pytest.param(layer, shape, exact, arguments, id=f"{layer.name}-{len(arguments)}")


CASES = [
    case(dense.DENSE, (3, 4), lambda x: x @ long(W).T + long(B), weight=W, bias=B),
    *(
        case(
            layer,
            shape,
            lambda x, w=w, groups=groups: convolution(x, long(w), long(B), groups),
            **{"weight": w, "bias": B, "groups": groups, **places},
        )
        for layer, shape, w, groups, places in [
            (dense.CONV1D, (4, 3), RNG.randn(2, 2, 2), 2, LINE),
            (dense.CONV2D, (1, 3, 2), RNG.randn(2, 1, 2, 2), 1, IMAGE),
        ]
    ),
    case(pointwise.RELU, (6,), each(lambda x: max(x, 0))),
    case(pointwise.IDENTITY, (6,), lambda x: x),
    case(
        pointwise.LEAKY_RELU,
        (6,),
        each(lambda x: x if x > 0 else -mpmath.mpf(1.25) * x),
        negative_slope=-1.25,
    ),
    case(pointwise.TANH, (6,), each(mpmath.tanh)),
    case(pointwise.SIGMOID, (6,), each(lambda x: 1 / (1 + mpmath.exp(-x)))),
    case(pointwise.GELU, (6,), each(lambda x: x * mpmath.ncdf(x)), approximate="none"),
    case(
        pointwise.GELU,
        (2, 3),
        each(
            lambda x: (
                x * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + 44.715 * x**3 / 1000))) / 2
            )
        ),
        approximate="tanh",
    ),
    case(softmax.SOFTMAX, (2, 3), lambda x: exp(x) / exp(x).sum(-1, keepdims=True), dim=1),
    case(
        softmax.LOG_SOFTMAX,
        (3, 2),
        lambda x: x - each(mpmath.log)(exp(x).sum(0, keepdims=True)),
        dim=0,
    ),
    case(
        normalise.LAYER_NORM,
        (2, 4),
        lambda x: normal(x, long(FOUR["weight"]), long(FOUR["bias"])),
        normalized_shape=(4,),
        **FOUR,
    ),
    case(
        normalise.BATCH_NORM,
        (2, 4),
        lambda x: (
            (x - long(STATISTICS["running_mean"]))
            / root(long(STATISTICS["running_var"]) + EPS)
            * long(FOUR["weight"])
            + long(FOUR["bias"])
        ),
        **STATISTICS,
        **FOUR,
    ),
    case(reshape.FLATTEN, (2, 3), lambda x: x.ravel(), start_dim=0, end_dim=1),
    case(reshape.MAX_POOL2D, (2, 3), lambda x: pool(max, x), dilation=1, **POOL),
    case(
        reshape.AVG_POOL2D,
        (2, 3),
        lambda x: pool(lambda values: sum(values) / 4, x),
        count_include_pad=True,
        divisor_override=None,
        **POOL,
    ),
    case(
        reshape.AVG_POOL2D,
        (3, 2),
        lambda x: pool(lambda values: sum(values) / len(values), x),
        **{"count_include_pad": False, "divisor_override": 0, **POOL},
    ),
]


@pytest.mark.parametrize(("layer", "shape", "exact", "arguments"), CASES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 5.0])
def test_the_formula_takes_half_of_the_bound_at_most(layer, shape, exact, arguments, scale):
    x = RNG.randn(*shape) * scale
    y = layer.forward(x, **arguments)
    wrong = np.abs(long(y) - exact(long(x)))
    assert (wrong <= layer.bound(x, np.zeros(shape), FLOAT64, **arguments) / 2).all()
    assert (wrong <= 16 * 2.0**-53 * np.max(np.abs(y))).all()


#: Kinds whose bound of a moved input is exact, or nearly, one output at a time.
SHARP = 0.9
LESS_SHARP = {"layer norm": 0.3, "softmax": 0.75}


@pytest.mark.parametrize(("layer", "shape", "exact", "arguments"), CASES)
@pytest.mark.parametrize("size", [1e-3, 0.5, 4.0])
def test_no_moved_input_leaves_the_bound(layer, shape, exact, arguments, size):
    """Many corners of the box of possible inputs, and some of its inside."""
    x, error = RNG.randn(*shape), size * RNG.rand(*shape)
    bound = layer.bound(x, error, FLOAT64, **arguments)
    here, farthest = exact(long(x)), 0
    corners = RNG.choice([-1.0, 1.0], (64, x.size))
    inside = RNG.uniform(-1, 1, (20, x.size))
    for signs in [*corners, *inside]:
        moved = exact(long(x) + long(error) * long(np.reshape(signs, shape))) - here
        farthest = np.maximum(farthest, np.abs(moved))
    assert (farthest <= bound).all()
    if size < 1:
        ratio = (farthest / bound)[bound > 1e-300]
        assert np.median(ratio) > LESS_SHARP.get(layer.name, SHARP) * (1 - size)


def test_an_embedding_is_exact_and_knows_of_uncertain_integers():
    weight = RNG.randn(5, 2)
    arguments = {
        "weight": weight,
        "padding_idx": None,
        "scale_grad_by_freq": False,
    }
    x = np.array([[4, 0], [4, 1]])
    np.testing.assert_array_equal(
        dense.EMBEDDING.forward(x, **arguments), [[weight[4], weight[0]], [weight[4], weight[1]]]
    )
    bound = dense.EMBEDDING.bound(x, np.array([[0, 0.4], [0.5, 1]]), FLOAT64, **arguments)
    np.testing.assert_array_equal(bound[..., 1] < 1e-300, [[True, True], [False, False]])
    g = RNG.randn(2, 2, 2)
    exact, bound = dense.EMBEDDING.backward(x, g, g, FLOAT64, **arguments)["weight"]
    total = long(g[0, 0]) + long(g[1, 0])
    assert (np.abs(long(exact[4]) - total) <= bound[4]).all()
    assert (bound[4] < 1e-14).all()
    assert not exact[2].any()
