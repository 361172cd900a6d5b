"""Bounds against their formulas, written out number by number.

The arithmetic is coarse: its roundoff and its smallest number are so large that every term of a
bound can be seen.
"""

import math
from dataclasses import replace

import numpy as np
import pytest

from torchnnfs.testing.layers import dense, normalise, pointwise, reshape, softmax
from torchnnfs.testing.precision import PRECISIONS

U, TINY = 2.0**-10, 2.0**-12
SINGLE = replace(PRECISIONS["float32"], unit=U, tiny=TINY)
HALF = replace(PRECISIONS["float16"], unit=U, tiny=TINY, stored_unit=2.0**-5, stored_tiny=2.0**-8)
both = pytest.mark.parametrize("precision", [SINGLE, HALF], ids=["single", "half"])


@pytest.fixture(autouse=True)
def _quiet():
    with np.errstate(all="ignore"):
        yield


def gamma(n):
    return n * U / (1 - n * U)


def stored(y, bound, precision):
    """A half type rounds once more."""
    return bound + precision.stored_unit * (abs(y) + bound) + precision.stored_tiny


def finished(y, bound, precision):
    """The last step may flush to zero, and rounds to the type that is stored."""
    return stored(y, bound + precision.tiny, precision)


def same(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=0)


def overflows_beyond(call, total):
    """Where the sizes on the way may reach the largest number, there is no bound."""
    assert np.isfinite(call(replace(SINGLE, largest=total * (1 + 1e-9)))).all()
    assert np.isinf(call(replace(SINGLE, largest=total * (1 - 1e-9)))).any()


def phi(x):
    return math.erfc(-x / math.sqrt(2)) / 2


def logistic(x):
    return 1 / (1 + math.exp(-x))


C = math.sqrt(2 / math.pi)


def tanh_gate(x):
    return (1 + math.tanh(C * (x + 0.044715 * x**3))) / 2


#: The layer, its arguments, what it computes, and what it rounds for an argument of size a.
POINTWISE = [
    (pointwise.TANH, {}, math.tanh, lambda x, e, p: gamma(6) * math.tanh(abs(x) + e)),
    (pointwise.SIGMOID, {}, logistic, lambda x, e, p: gamma(8) * max(0.5, logistic(x + e))),
    (
        pointwise.LEAKY_RELU,
        {"negative_slope": -0.3},
        lambda x: x if x > 0 else -0.3 * x,
        lambda x, e, p: (gamma(2) + p.stored_unit) * 0.3 * max(e - x, 0),
    ),
    (
        pointwise.GELU,
        {"approximate": "none"},
        lambda x: x * phi(x),
        lambda x, e, p: (gamma(11) * max(0.5, phi(x + e)) + TINY) * (abs(x) + e),
    ),
    (
        pointwise.GELU,
        {"approximate": "tanh"},
        lambda x: x * tanh_gate(x),
        lambda x, e, p: (gamma(16) * max(0.5, tanh_gate(x + e)) + TINY) * (abs(x) + e),
    ),
]


@both
@pytest.mark.parametrize(("layer", "arguments", "f", "rounds"), POINTWISE)
@pytest.mark.parametrize(("x", "e"), [(1.5, 0.25), (-0.25, 0.125), (-1.5, 0.0), (0.5, 0.0)])
def test_pointwise_bounds(layer, arguments, f, rounds, x, e, precision):
    moved = max(abs(f(x + e) - f(x)), abs(f(x - e) - f(x)))
    found = layer.bound(np.array([x]), np.array([e]), precision, **arguments)
    same(found, [finished(f(x), moved + rounds(x, e, precision), precision)])


def test_what_rounds_nothing_may_be_flushed():
    x, e = np.array([2.0**53, -3.0, 2.0**30]), np.array([1.0, 5.0, 0.0])
    # 2^53 + 1 is no number of float64: the bound is not smaller for that.
    same(pointwise.IDENTITY.bound(x, e, HALF), [5 + TINY, 5 + TINY, TINY])
    same(pointwise.RELU.bound(x, e, HALF), [5 + TINY, 2 + TINY, TINY])
    for layer in (pointwise.IDENTITY, pointwise.RELU):
        exact, bound = layer.backward(x, x, np.array([2.0, 3.0, 4.0]), HALF)["input"]
        same(exact, [2, 0, 4] if layer is pointwise.RELU else [2, 3, 4])
        same(bound, [TINY] * 3)


def test_pointwise_bounds_end_where_numbers_do():
    for layer, arguments, f, rounds in POINTWISE:
        x, e = 1.5, 0.25
        moved = max(abs(f(x + e) - f(x)), abs(f(x - e) - f(x)))
        total = f(x) + moved + rounds(x, e, SINGLE) + TINY + e
        if layer is pointwise.GELU:  # x (1 + erf) comes before the half
            total = 2 * (x + e)

        def bound(precision, layer=layer, arguments=arguments):
            return layer.bound(np.array([1.5]), np.array([0.25]), precision, **arguments)

        overflows_beyond(bound, total)


def gelu_slope(x, gate, density, wrong, roundings):
    slope = gate(x) + math.copysign(density, x)
    wrong = wrong + gamma(roundings) * max(0.5, gate(x)) + TINY * (1 + x * x)
    return slope, wrong + gamma(2) * (abs(slope) + wrong)


def erf_slope(x, y, p):
    density = abs(x) * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    return gelu_slope(x, phi, density, density * (gamma(10) + math.expm1(x * x * U)), 11)


def tanh_slope(x, y, p):
    inner = 2 * C * abs(x) * (1 + 3 * 0.044715 * x * x)
    gate = tanh_gate(x)
    return gelu_slope(x, tanh_gate, inner * gate * (1 - gate), inner / 4 * gamma(39), 16)


#: The derivative at x, from the computed y, and the error of a computed one.
SLOPES = [
    lambda x, y, p: (1 - y * y, gamma(2) * (1 - y * y) + gamma(1) * y * y),
    lambda x, y, p: (
        y * (1 - y),
        4 * max(U, p.stored_unit) * y * (1 - y) + TINY + p.stored_tiny,
    ),
    lambda x, y, p: (1, 0) if x > 0 else (-0.3, (gamma(2) + p.stored_unit) * 0.3),
    erf_slope,
    tanh_slope,
]


@both
@pytest.mark.parametrize(
    ("layer", "arguments", "f", "slope"),
    [(*each[:3], slope) for each, slope in zip(POINTWISE, SLOPES, strict=True)],
)
@pytest.mark.parametrize("x", [0.5, -0.75])
def test_pointwise_gradients(layer, arguments, f, slope, x, precision):
    y, g = f(x) + 1 / 64, -3.0  # y is what the layer computed, not the exact result
    factor, wrong = slope(x, y, precision)
    one = [np.array([each]) for each in (x, y, g)]
    exact, bound = layer.backward(*one, precision, **arguments)["input"]
    same(exact, [factor * g])
    wrong = abs(g) * wrong + TINY + precision.stored_tiny
    same(bound, [finished(factor * g, wrong, precision)])


def test_a_gradient_has_no_bound_where_it_may_overflow():
    one = np.ones(1)
    total = 3 * 0.75 + 3 * (gamma(2) * 0.75 + gamma(1) / 4) + 2 * TINY

    def bound(precision):
        return pointwise.TANH.backward(one, one / 2, 3 * one, precision)["input"][1]

    overflows_beyond(bound, total)
    for size, known in ((2e20, False), (1e10, True)):  # x^3 overflows in float32, or does not
        x = np.array([size])
        _, bound = pointwise.GELU.backward(x, x, one, PRECISIONS["float32"], approximate="tanh")[
            "input"
        ]
        assert np.isfinite(bound).all() == known


X, E = np.array([2.0, -3.0, 0.5]), np.array([0.5, 0.25, 1.0])
W, B = np.array([[4.0, 0.0, 1.0], [-2.0, 3.0, 0.0]]), np.array([6.0, 0.0])


@both
def test_dense_bounds(precision):
    expected = []
    for w, b in zip(W, B, strict=True):
        carried = sum(abs(w) * E)
        size = sum(abs(w) * abs(X)) + carried + abs(b)
        # Two weights of a neuron are not zero; the sum with the bias is one more rounding.
        bound = carried + gamma(3) * size
        bound += TINY * (sum(abs(w)) + sum(abs(X)) + 3 + 1)
        bound = stored(X @ w, bound, precision)
        expected.append(stored(X @ w + b, bound, precision) if b and precision is HALF else bound)
    same(dense.DENSE.bound(X, E, precision, weight=W, bias=B), expected)
    narrow = dense.DENSE.bound(X, E, precision, weight=W, bias=None)
    assert narrow[1] == expected[1] < math.inf
    size = sum(abs(W[0]) * abs(X)) + sum(abs(W[0]) * E)
    bound = sum(abs(W[0]) * E) + gamma(3) * size + TINY * (5 + 5.5 + 4)
    same(narrow[0], stored(X @ W[0], bound, precision))


def test_weights_that_are_all_zero_add_nothing():
    found = dense.DENSE.bound(X, E, SINGLE, weight=0 * W, bias=B)
    same(found, gamma(1) * B + TINY * (sum(abs(X)) + 2))


def test_a_dense_layer_has_no_bound_where_its_terms_may_overflow():
    total = sum(abs(W[0]) * (abs(X) + E)) + 6
    overflows_beyond(lambda p: dense.DENSE.bound(X, E, p, weight=W, bias=B), total)
    assert dense.DENSE.bound(X, E, replace(SINGLE, largest=total), weight=W, bias=B)[0] == np.inf


def of_products(a, b, precision):
    """The bound of a sum of the products of a and b."""
    size = sum(abs(a) * abs(b))
    n = 1 + np.count_nonzero(b)
    bound = gamma(n) * size + TINY * (sum(abs(a)) + sum(abs(b)) + n + 1)
    return stored(sum(a * b), bound, precision)


@both
def test_dense_gradients(precision):
    x, g = np.array([X, X[::-1] + 1]), np.array([[1.0, -2.0], [0.5, 4.0]])
    found = dense.DENSE.backward(x, g, g, precision, weight=W, bias=B)
    # The number of products is that of the neuron with most: here two of two.
    same(found["input"][0], g @ W)
    same(found["weight"][0], g.T @ x)
    same(found["bias"][0], g.sum(0))
    for i, j in np.ndindex(2, 3):
        size = sum(abs(g[i]) * abs(W[:, j]))
        bound = gamma(3) * size + TINY * (sum(abs(g[i])) + sum(abs(W[:, j])) + 4)
        same(found["input"][1][i, j], stored(found["input"][0][i, j], bound, precision))
        same(found["weight"][1][i, j], of_products(g[:, i], x[:, j], precision))
    same(found["bias"][1], [of_products(np.ones(2), g[:, i], precision) for i in range(2)])


WINDOWS = {
    "stride": (1,),
    "padding": (0,),
    "dilation": (1,),
    "groups": 1,
    "padding_mode": "zeros",
}


@both
def test_convolution_bounds(precision):
    """Of one channel and a kernel of two: each window is a dense layer."""
    x, e, w = X[None], E[None], np.array([[[4.0, 1.0]], [[-2.0, 3.0]]])
    found = dense.CONV1D.bound(x, e, precision, weight=w, bias=B, **WINDOWS)
    for i in range(2):
        part = slice(i, i + 2)
        expected = dense.DENSE.bound(X[part], E[part], precision, weight=w[:, 0], bias=B)
        same(found[:, i], expected)


@both
def test_convolution_gradients(precision):
    w, g = np.array([[[4.0, 1.0]], [[-2.0, 3.0]]]), np.array([[1.0, -2.0], [0.5, 4.0]])
    found = dense.CONV1D.backward(X[None], g, g, precision, weight=w, bias=B, **WINDOWS)
    seen = np.array([X[:2], X[1:]])  # (windows, numbers of one)
    named = {"weight": w[:, 0], "bias": B}
    each = dense.DENSE.backward(seen, g.T, g.T, precision, **named)
    (a, b), (c, d) = each["input"][1]
    # Two windows share the middle: two sums, so four times their errors.
    exact = [each["input"][0][0, 0], sum(each["input"][0][[0, 1], [1, 0]]), each["input"][0][1, 1]]
    same(found["input"][0], [exact])
    expected = [
        finished(y, 4 * wrong, precision) for y, wrong in zip(exact, (a, b + c, d), strict=True)
    ]
    same(found["input"][1], [expected])
    # Of half types each of the two windows may be stored, and the sum begins with one of them.
    steps = 3 * precision.stored_unit
    same(found["weight"][0][:, 0], g @ seen)
    same(found["weight"][1][:, 0], each["weight"][1] + steps * (abs(g) @ abs(seen)))
    same(found["bias"][1], each["bias"][1] + steps * abs(g).sum(1))


@both
def test_embedding_bounds_and_gradients(precision):
    weight = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    named = {"weight": weight, "padding_idx": 1, "scale_grad_by_freq": False}
    x, g = np.array([0, 2, 0, 1]), np.array([[1.0, 2.0], [-3.0, 4.0], [5.0, -7.0], [1.0, 1.0]])
    same(dense.EMBEDDING.bound(x, np.array([0, 0.49, 0, 0]), precision, **named), [[TINY] * 2] * 4)
    assert dense.EMBEDDING.bound(x, np.full(4, 0.5), precision, **named).min() == math.inf
    exact, bound = dense.EMBEDDING.backward(x, g, g, precision, **named)["weight"]
    same(exact, [[6, -5], [0, 0], [-3, 4]])
    roundoff = max(U, precision.stored_unit)
    flushed = 2 * (TINY + precision.stored_tiny)  # a row gets two numbers at most
    sizes = np.array([[6, 9], [0, 0], [3, 4]])
    same(bound, finished(exact, 3 * roundoff * sizes + flushed, precision))
    _, bound = dense.EMBEDDING.backward(x[3:], g, g[3:], precision, **named)["weight"]
    same(bound, finished(0 * weight, 0, precision))  # the row that stands for padding gets nothing
    named["scale_grad_by_freq"] = True
    exact, bound = dense.EMBEDDING.backward(x, g, g, precision, **named)["weight"]
    same(exact, [[3, -2.5], [0, 0], [-3, 4]])
    sizes = np.array([[3, 4.5], [0, 0], [3, 4]])
    same(bound, finished(exact, 3 * roundoff * sizes + flushed, precision))


def in_logarithms(x, e, precision, kept):
    """Of a row: y, p, how far e moves y, and what rounds."""
    k, top = len(x), max(x)
    logarithm = math.log(sum(math.exp(a - top) for a in x))
    y = np.array([a - top - logarithm for a in x])
    p = np.exp(y)
    carried = np.zeros(k)
    for i in range(k):
        d = sum(p[j] * (math.exp(e[i] + e[j]) - 1) for j in range(k) if j != i)
        carried[i] = min(math.log(1 + d), e[i] + max(e))
    argument = U * (2 * max(e) - (x - top))
    q = (argument + 6 * U) * np.exp(argument)
    s = sum(np.minimum(p * np.exp(carried), 1) * q)
    s = s + (gamma(k - 1) + kept) * (1 + s)
    rounded = argument + s / (1 - s) + 6 * U * logarithm
    return y, p, carried, rounded + U * (carried + rounded + abs(y))


ROWS = [
    (np.array([0.5, -1.0, 0.25]), np.array([0.5, 0.25, 0.125])),
    (np.array([3.0, -1.0]), np.array([0.0, 0.0])),
    (np.array([0.5, -1.0, 0.25]), np.array([9.0, 1.0, 2.0])),
]


@both
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(("x", "e"), ROWS)
def test_softmax_bounds(x, e, last, precision):
    """Along another dimension than the last, the exponentials of half types are stored."""
    kept = 0.0 if last else precision.stored_unit
    _, p, carried, rounded = in_logarithms(x, e, precision, kept)
    bound = np.minimum(p * np.expm1(carried + rounded + 7 * U + kept), 1 + 8 * U) + TINY
    bound = finished(p, bound + (precision.stored_tiny if kept else 0), precision)
    for dim in (-1, 1) if last else (0, -2):
        shape = (1, -1) if last else (-1, 1)
        found = softmax.SOFTMAX.bound(x.reshape(shape), e.reshape(shape), precision, dim=dim)
        same(found.ravel(), bound)


@both
@pytest.mark.parametrize(("x", "e"), ROWS)
def test_log_softmax_bounds(x, e, precision):
    y, _, carried, rounded = in_logarithms(x, e, precision, precision.stored_unit)
    kept = precision.stored_unit * abs(x - y) + precision.stored_tiny + TINY
    found = softmax.LOG_SOFTMAX.bound(x, e, precision, dim=0)
    same(found, finished(y, carried + rounded + kept, precision))


def test_softmax_bounds_end_where_numbers_do():
    x, e = ROWS[0]
    _, p, carried, rounded = in_logarithms(x, e, SINGLE, 0.0)
    total = max(p + p * np.expm1(carried + rounded + 7 * U) + 2 * TINY + 0.5)
    overflows_beyond(lambda precision: softmax.SOFTMAX.bound(x, e, precision, dim=0), total)
    y, _, carried, rounded = in_logarithms(x, e, SINGLE, 0.0)
    total = max(abs(y) + carried + rounded + 2 * TINY + e)
    overflows_beyond(lambda precision: softmax.LOG_SOFTMAX.bound(x, e, precision, dim=0), total)


def test_softmax_bounds_where_nothing_rounds_keep_the_rounding_of_float64():
    precise = replace(SINGLE, unit=0.0, tiny=0.0)
    x, e = np.zeros(1), np.array([math.log(2)])  # exp(e) - 1 is 1
    found = softmax.LOG_SOFTMAX.bound(x, e, precise, dim=0)
    same(found, math.log1p((1 + 4) * 2.0**-52 * (1 + 2 * 1)))


def test_a_softmax_of_numbers_far_apart_is_bounded_by_what_it_may_be():
    """Below 2^-1022 the relative error of exp(-x) in float64 means nothing."""
    e, precise = np.array([0.0, 1.0]), replace(SINGLE, tiny=0.0)
    for far in (-708.3, -708.7, -720.0):
        x = np.array([0.0, far])
        found = softmax.SOFTMAX.bound(x, e, precise, dim=0)[1]
        y, p, carried, rounded = in_logarithms(x, e, SINGLE, 0.0)
        wrong = (carried + rounded + 7 * U)[1]
        expected = p[1] * math.expm1(wrong) if p[1] > 2.0**-1022 else math.exp(y[1] + wrong)
        np.testing.assert_allclose(found, expected, 1e-9)
    wide = softmax.SOFTMAX.bound(x, np.full(2, 1e3), SINGLE, dim=0)  # the sum may be all wrong
    same(wide, [1 + 8 * U + 2 * TINY] * 2)


@both
def test_softmax_gradients(precision):
    x, y, g = np.array([0.5, -1.0, 2.0]), np.array([0.25, 0.125, 0.625]), np.array([1.0, -4.0, 2.0])
    row = (each[None] for each in (x, y, g))
    exact, bound = softmax.SOFTMAX.backward(*row, precision, dim=1)["input"]
    exact, bound = exact[0], bound[0]
    same(exact, y * (g - sum(g * y)))
    size = abs(g) + sum(abs(g * y))
    same(bound, finished(exact, y * gamma(6) * size + 5 * TINY, precision))
    logs = np.log(y)
    row = (each[None] for each in (x, logs, g))
    exact, bound = softmax.LOG_SOFTMAX.backward(*row, precision, dim=-1)["input"]
    exact, bound = exact[0], bound[0]
    same(exact, g - y * sum(g))
    wrong = gamma(12) * (abs(g) + y * 7) + TINY * (2 + 7)
    same(bound, finished(exact, wrong, precision))


def test_softmax_gradients_end_where_numbers_do():
    x, y, g = np.zeros(2), np.array([0.25, 0.75]), np.array([4.0, -1.0])

    def bound(layer, y):
        return lambda precision: layer.backward(x, y, g, precision, dim=0)["input"][1]

    size = abs(g) + 1.75
    exact = y * (g - 0.25)
    total = abs(exact) + y * gamma(5) * size + 5 * TINY + size
    overflows_beyond(bound(softmax.SOFTMAX, y), max(total))
    exact = g - y * 3
    total = abs(exact) + gamma(11) * (abs(g) + y * 5) + TINY * 8 + abs(g) + 5
    overflows_beyond(bound(softmax.LOG_SOFTMAX, np.log(y)), max(total))


EPS = 0.0625


def normal(x, e, precision, kept=0.0, eps=EPS):
    """Of a row: n, its error, what cancels, the largest 1 / s, and the error of a computed one."""
    k, m = len(x), sum(x) / len(x)
    s = math.sqrt(sum((x - m) ** 2) / k + eps)
    n, drift, mean = (x - m) / s, math.sqrt(sum(e * e) / k), sum(e) / k
    inverse = 1 / max(s - drift, math.sqrt(eps))
    moved = ((1 - 2 / k) * e + mean + abs(n) * drift) * inverse
    moved = np.minimum(moved, abs(n) + math.sqrt(k))
    far = abs(x) + e
    q = (gamma(k) * sum(far) / k + gamma(4 + 2 * math.log(k)) * max(far)) * inverse
    eta = q * (math.sqrt(8) + q) + gamma(k + 6) + 2 * TINY * inverse**2
    relative = (1 + gamma(4)) / math.sqrt(1 - eta) - 1 + kept
    size = (far + abs(m) + mean) * inverse
    rounded = q + (gamma(4) + kept) * size + TINY * inverse
    rounded = rounded + relative * (abs(n) + moved + rounded)
    return n, moved + rounded, size, inverse, relative


def scaled(y, n, wrong, size, inverse, w, b, precision):
    bound = w * (wrong + TINY) + gamma(2) * (w * (abs(n) + wrong) + b)
    return finished(y, bound + TINY * (4 + size / inverse), precision)


SCALE, SHIFT = np.array([2.0, -0.5, 1.5]), np.array([0.25, -3.0, 0.0])


@both
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("e", [E / 4, np.zeros(3), E * 40], ids=["moved", "exact", "far"])
def test_layer_norm_bounds(e, affine, precision):
    w, b = (SCALE, SHIFT) if affine else (np.ones(3), np.zeros(3))
    named = {"weight": SCALE, "bias": SHIFT} if affine else {"weight": None, "bias": None}
    found = normalise.LAYER_NORM.bound(X, e, precision, normalized_shape=(3,), eps=EPS, **named)
    if e[0] > 1:  # 1 / s is not known any more
        assert np.isinf(found).all()
        return
    n, wrong, size, inverse, _ = normal(X, e, precision)
    same(found, scaled(n * w + b, n, wrong, size, inverse, abs(w), abs(b), precision))


def test_a_layer_norm_knows_of_the_root_of_its_numbers():
    e, precise = np.full(3, 50.0), replace(SINGLE, unit=2.0**-40, tiny=0.0)
    named = {"normalized_shape": (3,), "weight": None, "bias": None, "eps": EPS}
    n = (X - X.mean()) / math.sqrt(X.var() + EPS)
    found = normalise.LAYER_NORM.bound(X, e, precise, **named)
    np.testing.assert_allclose(found, abs(n) + math.sqrt(3), 1e-6)
    precise = replace(precise, largest=4 * sum((abs(X) + 50) ** 2))  # s is a sum of squares
    assert np.isfinite(normalise.LAYER_NORM.bound(X, e, precise, **named)).all()
    precise = replace(precise, largest=precise.largest * (1 - 1e-9))
    assert np.isinf(normalise.LAYER_NORM.bound(X, e, precise, **named)).all()


def parameters(g, n, wrong, precision):
    """Of the weight and the bias: sums over all rows."""
    more = (len(g) + 2) * max(U, precision.stored_unit)
    weight = abs(g) * (wrong + more * (abs(n) + wrong))
    bias = abs(g) * more
    return [
        finished(np.sum(exact, 0), np.sum(each, 0) + TINY * len(g), precision)
        for exact, each in ((g * n, weight), (g, bias))
    ]


@both
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_gradients(affine, precision):
    x, g = np.array([X, X[::-1] * 2]), np.array([[1.0, -2.0, 0.5], [3.0, 0.25, -1.0]])
    w = SCALE if affine else np.ones(3)
    named = {"weight": SCALE, "bias": SHIFT} if affine else {"weight": None, "bias": None}
    named |= {"normalized_shape": (3,), "eps": EPS}
    found = normalise.LAYER_NORM.backward(x, x, g, precision, **named)
    rows = [normal(row, np.zeros(3), precision, precision.stored_unit) for row in x]
    for i, (n, wrong, size, inverse, relative) in enumerate(rows):
        h = g[i] * w
        mean = sum(h * n) / 3
        exact = (h - sum(h) / 3 - n * mean) * inverse
        same(found["input"][0][i], exact)
        wrong_mean = sum(abs(h) * (wrong + gamma(9) * (size + wrong))) / 3
        far_mean = abs(mean) + wrong_mean
        bound = gamma(9) * sum(abs(h)) / 3 + gamma(4) * (abs(h) + size * far_mean)
        bound = bound + abs(n) * wrong_mean + wrong * far_mean + 4 * TINY
        bound = bound * inverse * (1 + relative) + relative * abs(exact)
        far, total = 1 + max(abs(x[i])), sum(abs(g[i]) + abs(h))
        bound = bound + TINY * (abs(w) + 4 * far * (1 + total * far))
        same(found["input"][1][i], finished(exact, bound, precision))
    assert list(found) == (["input", "weight", "bias"] if affine else ["input"])
    if affine:
        n, wrong = (np.array([row[i] for row in rows]) for i in (0, 1))
        weight, bias = parameters(g, n, wrong, precision)
        same(found["weight"][0], sum(g * n))
        same(found["weight"][1], weight)
        same(found["bias"][0], sum(g))
        same(found["bias"][1], bias)


def test_layer_norm_gradients_end_where_the_products_on_the_way_do():
    x, g = np.array([2.0, -2.0]), np.array([2.0, 5.0])
    named = {"weight": np.array([1.0, 3.0]), "bias": None, "normalized_shape": (2,), "eps": 0.0}
    precise = replace(SINGLE, unit=0.0, tiny=0.0)
    total = (2 + 2 + 5 + 15) * (1 + 2) * (1 + 1 / 8)  # of g and g w; of x; of 1 / s^3
    exact = normalise.LAYER_NORM.backward(x, x, g, precise, **named)["input"][0]
    assert not exact.any()  # with two numbers n is always 1 and -1
    for factor, known in ((1 + 1e-9, True), (1 - 1e-9, False)):
        found = normalise.LAYER_NORM.backward(
            x, x, g, replace(precise, largest=total * factor), **named
        )
        assert np.isfinite(found["input"][1]).all() == known


STATISTICS = {"running_mean": np.array([0.5, -1.0]), "running_var": np.array([4.0, 0.25])}


@both
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_bounds_and_gradients(affine, precision):
    x, e = np.array([[2.0, -3.0], [0.5, 1.5]]), np.array([[0.5, 0.25], [0.0, 1.0]])
    g, m = np.array([[1.0, -2.0], [3.0, 0.25]]), STATISTICS["running_mean"]
    inverse = 1 / np.sqrt(STATISTICS["running_var"] + EPS)
    w, b = (SCALE[:2], SHIFT[:2]) if affine else (np.ones(2), np.zeros(2))
    named = {"weight": w if affine else None, "bias": b if affine else None, "eps": EPS}
    found = normalise.BATCH_NORM.bound(x, e, precision, **STATISTICS, **named)
    n, far = (x - m) * inverse, abs(x) + e + abs(m)
    wrong = (e + gamma(5) * (abs(x - m) + e) + gamma(4) * far + TINY) * inverse
    same(found, scaled(n * w + b, n, wrong, far * inverse, inverse, abs(w), abs(b), precision))

    found = normalise.BATCH_NORM.backward(x, x, g, precision, **STATISTICS, **named)
    exact = g * inverse * w
    same(found["input"][0], exact)
    flushed = TINY * (2 + inverse + abs(g) + abs(w))
    same(found["input"][1], finished(exact, gamma(8) * abs(exact) + flushed, precision))
    assert list(found) == (["input", "weight", "bias"] if affine else ["input"])
    if affine:
        weight, bias = parameters(g, n, gamma(8) * abs(n) + TINY, precision)
        same(found["weight"][1], weight)
        same(found["bias"][1], bias)


def test_batch_norm_bounds_end_where_numbers_do():
    one = np.ones((1, 1))
    named = {"running_mean": one[0], "running_var": one[0] * 3, "eps": 1.0}
    precise = replace(SINGLE, unit=0.0, tiny=0.0)

    def bound(precision):
        return normalise.BATCH_NORM.bound(
            one * 3, one / 4, precision, weight=one[0] * 8, bias=one[0] * 7, **named
        )

    # y is 15, its error 1, and on the way are 8 (3 + 1/4 + 1) / 2 and 7
    assert np.isfinite(bound(replace(precise, largest=15 + 1 + 17 + 7 + 1e-6)))
    assert np.isinf(bound(replace(precise, largest=15 + 1 + 17 + 7 - 1e-6)))

    def slope(precision):
        return normalise.BATCH_NORM.backward(
            one, one, one * 6, precision, weight=one[0] / 4, bias=None, **named
        )["input"][1]

    assert np.isfinite(slope(replace(precise, largest=0.75 + 3 + 1e-6)))
    assert np.isinf(slope(replace(precise, largest=0.75 + 3 - 1e-6)))


POOL = {"kernel_size": 2, "stride": 1, "padding": 0, "ceil_mode": False}
IMAGE = np.array([[1.0, -2.0, 0.5], [0.75, 0.25, 3.0]])


@both
def test_average_pool_bounds_and_gradients(precision):
    e, g = np.abs(IMAGE) / 8, np.array([[3.0, -5.0]])
    named = {**POOL, "count_include_pad": True, "divisor_override": -8}
    found = reshape.AVG_POOL2D.bound(IMAGE, e, precision, **named)
    for i in range(2):
        part = IMAGE[:, i : i + 2].ravel()
        carried = sum(abs(part)) / 8
        bound = (carried + gamma(5) * (sum(abs(part)) + carried) + 4 * TINY) / 8
        same(found[0, i], finished(sum(part) / 8, bound, precision))
    exact, bound = reshape.AVG_POOL2D.backward(IMAGE, g, g, precision, **named)["input"]
    same(exact, [[-3 / 8, 2 / 8, 5 / 8]] * 2)
    more = 3 * max(U, precision.stored_unit) * np.array([3 / 8, 1, 5 / 8])
    flushed = 2 * (TINY + precision.stored_tiny)
    same(bound, [finished(exact[0], more + flushed, precision)] * 2)


def test_average_pool_bounds_end_where_the_sum_does():
    named = {**POOL, "count_include_pad": True, "divisor_override": 2}
    precise, zero = replace(SINGLE, unit=0.0, tiny=0.0), np.zeros((2, 3))
    for more, known in ((1e-6, True), (0.0, False)):
        found = reshape.AVG_POOL2D.bound(
            IMAGE, zero, replace(precise, largest=5.75 + 0.875 + more), **named
        )
        assert np.isfinite(found).all() == known


@both
def test_max_pool_bounds_and_gradients(precision):
    named = {**POOL, "dilation": 1}
    e = np.array([[0.125, 0.5, 1.25], [0.25, 0.0, 1.25]])
    found = reshape.MAX_POOL2D.bound(IMAGE, e, precision, **named)
    # 0.75 + 0.25 may reach 1 - 0.125; in the second window 0.5 + 1.25 may reach 3 - 1.25.
    same(found, [[0.25 + TINY, 1.25 + TINY]])
    e[1, 0] = 0.0625  # 0.75 + 0.0625 may not
    same(reshape.MAX_POOL2D.bound(IMAGE, e, precision, **named)[0, 0], 0.125 + TINY)
    e[1, 0] = 0.125  # they may meet
    e[0, 1] = 2.875
    same(reshape.MAX_POOL2D.bound(IMAGE, e, precision, **named)[0, 0], 2.875 + TINY)
    g = np.array([[3.0, -5.0]])
    exact, bound = reshape.MAX_POOL2D.backward(IMAGE, g, g, precision, **named)["input"]
    same(exact, [[3, 0, 0], [0, 0, -5]])
    flushed = TINY + precision.stored_tiny
    wrong = 2 * max(U, precision.stored_unit) * np.abs(exact) + flushed
    same(bound, finished(exact, wrong, precision))


def test_flatten_bounds():
    e = np.arange(6.0).reshape(1, 2, 3)
    same(reshape.FLATTEN.bound(e, e, HALF, start_dim=1, end_dim=-1), [np.arange(6) + TINY])
    exact, bound = reshape.FLATTEN.backward(e, e, e.reshape(1, 6), HALF, start_dim=1, end_dim=2)[
        "input"
    ]
    same(exact, e)
    same(bound, np.full(e.shape, TINY))
