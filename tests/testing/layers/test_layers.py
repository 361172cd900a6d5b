"""Every kind of layer: formula, bound and gradients against torch, and broken copies."""

import inspect

import numpy as np
import pytest
import torch
from torch import nn

from torchnnfs import book_numpy, compare
from torchnnfs.testing.layers import dense, normalise, pointwise, reshape, softmax
from torchnnfs.testing.precision import PRECISIONS

DTYPES = ["float64", "float32", "bfloat16", "float16"]


@pytest.fixture(autouse=True)
def _quiet():
    with np.errstate(all="ignore"):
        yield


def with_statistics(module):
    module.running_mean.normal_()
    module.running_var.uniform_(0.1, 3)
    return module


D, P, S, N, R = dense, pointwise, softmax, normalise, reshape
TABLE = [
    (D.DENSE, nn.Linear(7, 3), (5, 7)),
    (D.DENSE, nn.Linear(4, 4, bias=False), (2, 5, 4)),
    (D.DENSE, nn.Linear(64, 2), (64,)),
    (D.CONV1D, nn.Conv1d(3, 4, 3), (2, 3, 9)),
    (D.CONV1D, nn.Conv1d(4, 6, 4, padding="same", groups=2, dilation=2), (4, 12)),
    (D.CONV1D, nn.Conv1d(2, 4, 3, 2, 2, padding_mode="circular", bias=False), (2, 2, 8)),
    (D.CONV2D, nn.Conv2d(2, 3, (3, 2), (2, 1), (1, 2)), (2, 2, 7, 6)),
    (D.CONV2D, nn.Conv2d(4, 8, 3, padding="valid", groups=4, dilation=(1, 2)), (2, 4, 8, 7)),
    (D.CONV2D, nn.Conv2d(2, 2, (2, 3), padding="same", padding_mode="reflect"), (2, 6, 7)),
    (D.CONV2D, nn.Conv2d(1, 2, 3, 2, 1, padding_mode="replicate"), (3, 1, 6, 7)),
    (D.EMBEDDING, nn.Embedding(10, 4), (30,)),
    (D.EMBEDDING, nn.Embedding(4, 3, padding_idx=1, scale_grad_by_freq=True), (3, 5)),
    (P.RELU, nn.ReLU(), (40, 3)),
    (P.IDENTITY, nn.Identity(), (4, 3)),
    (P.DROPOUT, nn.Dropout().eval(), (4, 3)),
    (P.LEAKY_RELU, nn.LeakyReLU(), (50, 4)),
    (P.LEAKY_RELU, nn.LeakyReLU(-1.7), (50, 4)),
    (P.TANH, nn.Tanh(), (500, 4)),
    (P.SIGMOID, nn.Sigmoid(), (500, 4)),
    (P.GELU, nn.GELU(), (500, 4)),
    (P.GELU, nn.GELU("tanh"), (500, 4)),
    (S.SOFTMAX, nn.Softmax(-1), (100, 10)),
    (S.SOFTMAX, nn.Softmax(0), (7, 3)),
    (S.SOFTMAX, nn.Softmax(1), (3, 5, 2)),
    (S.SOFTMAX, nn.Softmax(-1), (4,)),
    (S.LOG_SOFTMAX, nn.LogSoftmax(-1), (100, 10)),
    (S.LOG_SOFTMAX, nn.LogSoftmax(1), (3, 5, 2)),
    (N.LAYER_NORM, nn.LayerNorm(16), (50, 16)),
    (N.LAYER_NORM, nn.LayerNorm(1000), (3, 1000)),
    (N.LAYER_NORM, nn.LayerNorm((2, 5), elementwise_affine=False, eps=1e-3), (4, 3, 2, 5)),
    (N.LAYER_NORM, nn.LayerNorm(3, bias=False), (3,)),
    (N.LAYER_NORM, nn.LayerNorm(1), (5, 1)),
    (N.BATCH_NORM, with_statistics(nn.BatchNorm1d(3)), (50, 3)),
    (N.BATCH_NORM, with_statistics(nn.BatchNorm1d(3, affine=False)), (4, 3, 5)),
    (N.BATCH_NORM, with_statistics(nn.BatchNorm2d(4, eps=0.1)), (4, 4, 5, 6)),
    (R.FLATTEN, nn.Flatten(), (2, 3, 4)),
    (R.FLATTEN, nn.Flatten(-3, 2), (2, 3, 4, 2)),
    (R.MAX_POOL2D, nn.MaxPool2d(2), (2, 3, 5, 4)),
    (R.MAX_POOL2D, nn.MaxPool2d((3, 2), (1, 2), (1, 0), (1, 2), ceil_mode=True), (2, 6, 8)),
    (R.MAX_POOL2D, nn.MaxPool2d(3, 2, 1, ceil_mode=True), (2, 1, 6, 7)),
    (R.AVG_POOL2D, nn.AvgPool2d(2), (2, 3, 5, 4)),
    (R.AVG_POOL2D, nn.AvgPool2d(3, 2, 1, ceil_mode=True), (2, 6, 7)),
    (R.AVG_POOL2D, nn.AvgPool2d((3, 2), (2, 3), 1, True, False), (1, 2, 6, 8)),
    (R.AVG_POOL2D, nn.AvgPool2d(3, 1, divisor_override=-7), (1, 2, 6, 8)),
]
IDS = [f"{module}-{'x'.join(map(str, shape))}" for _, module, shape in TABLE]
every_layer = pytest.mark.parametrize(("layer", "module", "shape"), TABLE, ids=IDS)

#: The inputs that every layer is tried on.
DRAWS = {
    "normal": lambda shape: torch.randn(shape, dtype=torch.float64),
    "small": lambda shape: 1e-3 * torch.randn(shape, dtype=torch.float64),
    "positive": lambda shape: 30 * torch.rand(shape, dtype=torch.float64),
    "heavy": lambda shape: torch.distributions.StudentT(1.5).sample(shape).double().clamp(-80, 80),
    "offset": lambda shape: 50 + torch.randn(shape, dtype=torch.float64),
}


def prepared(module, shape, dtype, draw):
    """The module in eval mode with other parameters, and an input, both in `dtype`."""
    module = module.to(getattr(torch, dtype)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    if isinstance(module, nn.Embedding):
        return module, torch.randint(module.num_embeddings, shape)
    return module, DRAWS[draw](shape).to(getattr(torch, dtype))


def arrays(value):
    return value.detach().double().numpy() if isinstance(value, torch.Tensor) else value


def arguments(layer, module):
    names = list(inspect.signature(layer.forward).parameters)[1:]
    return {name: arrays(getattr(module, name)) for name in names}


def judged(layer, module, x, error, dtype):
    """The exact output of the layer and its bound."""
    named = arguments(layer, module)
    exact = layer.forward(arrays(x), **named)
    return exact, layer.bound(arrays(x), error, PRECISIONS[dtype], **named)


@every_layer
def test_the_formula_is_torchs(layer, module, shape):
    for draw in DRAWS:
        module, x = prepared(module, shape, "float64", draw)
        y, bound = judged(layer, module, x, np.zeros(shape), "float64")
        theirs = arrays(module(x))
        assert y.shape == bound.shape == theirs.shape
        assert (np.abs(y - theirs) <= bound).all()
        np.testing.assert_allclose(y, theirs, rtol=1e-9, atol=1e-11)


@every_layer
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_stays_within_the_bound(layer, module, shape, dtype):
    for draw in DRAWS:
        module, x = prepared(module, shape, dtype, draw)
        exact, bound = judged(layer, module, x, np.zeros(shape), dtype)
        assert np.isfinite(bound).all()
        assert (np.abs(arrays(module(x)) - exact) <= bound).all()
        for scale in [1e-6, 1e-2, 3.0] * x.is_floating_point():
            other = x + scale * torch.randn(shape).sign().to(x) * torch.rand(shape[-1]).to(x)
            exact, bound = judged(layer, module, x, np.abs(arrays(other) - arrays(x)), dtype)
            assert (np.abs(arrays(module(other)) - exact) <= bound).all()


@every_layer
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradients_are_autograds(layer, module, shape, dtype):
    for draw in DRAWS:
        module, x = prepared(module, shape, dtype, draw)
        x = x.requires_grad_() if x.is_floating_point() else x
        y = module(x)
        g = torch.randn_like(y)
        wanted = ([x] if x.requires_grad else []) + list(module.parameters())
        found = torch.autograd.grad(y, wanted, g)
        named, precision = arguments(layer, module), PRECISIONS[dtype]
        ours = layer.backward(arrays(x), arrays(y), arrays(g), precision, **named)
        names = ["input"] * x.requires_grad + [name for name, _ in module.named_parameters()]
        assert list(ours) == names
        for name, theirs in zip(names, found, strict=True):
            exact, bound = ours[name]
            assert exact.shape == bound.shape == tuple(theirs.shape)
            assert np.isfinite(bound).all()
            assert (np.abs(arrays(theirs) - exact) <= bound).all(), name
            if dtype in ("float32", "float64") and exact.any():  # and a wrong one is found
                assert (1e-3 * np.abs(exact) > bound).any() or draw == "offset", name


@every_layer
def test_no_bound_where_it_may_overflow_and_none_negative(layer, module, shape):
    if isinstance(module, nn.Embedding):
        return
    for size in (0.0, 1e-42, 1e15, 1e20, 3e38):
        module, x = prepared(module, shape, "float32", "normal")
        for error in (0.0, 1e-3, size, np.inf):
            exact, bound = judged(layer, module, x * size, np.full(shape, error), "float32")
            assert (bound >= 0).all()  # not a number would fail as well
            y = arrays(module(x * size))
            known = (np.abs(y - exact) <= bound) | (bound == np.inf) | (y == exact)
            assert (known | (np.isnan(y) & np.isnan(exact))).all()
            assert error < np.inf or (bound == np.inf).any()


@every_layer
def test_the_formula_in_float32_is_a_candidate_itself(layer, module, shape):
    for draw in DRAWS:
        module, x = prepared(module, shape, "float32", draw)
        exact, bound = judged(layer, module, x, np.zeros(shape), "float32")
        named = {
            name: value.astype(np.float32) if isinstance(value, np.ndarray) else value
            for name, value in arguments(layer, module).items()
        }
        y = layer.forward(x.numpy(), **named)
        assert y.dtype == np.float32
        assert (np.abs(y - exact) <= bound).all()


def controls():
    for layer in dict.fromkeys(layer for layer, _, _ in TABLE):
        for name in layer.controls:
            cases = [(module, shape) for kind, module, shape in TABLE if kind is layer]
            yield pytest.param(layer, cases, layer.controls[name], id=f"{layer.name}-{name}")


@pytest.mark.parametrize(("layer", "cases", "wrong"), list(controls()))
def test_every_control_is_outside_the_bound(layer, cases, wrong):
    found = []
    for module, shape in cases:
        for draw in DRAWS:
            module, x = prepared(module, shape, "float32", draw)
            x = 100 * x if wrong is softmax.SOFTMAX.controls[softmax.UNSHIFTED] else x
            y = wrong(arrays(x).astype(np.float32), **arguments(layer, module))
            exact, bound = judged(layer, module, x, np.zeros(shape), "float32")
            if y is not None:
                assert y.shape == exact.shape
                found.append(not (np.abs(y - exact) <= bound).all())
    assert any(found)


GRID = torch.cat([torch.linspace(-20, 20, 8001), torch.logspace(-40, 3, 1000)])


@pytest.mark.parametrize(
    "module", [nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.GELU("tanh"), nn.LeakyReLU()], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_elementwise_bounds_on_a_fine_grid(module, dtype):
    layer = next(layer for layer, kind, _ in TABLE if type(kind) is type(module))
    x = GRID.to(getattr(torch, dtype)).requires_grad_()
    exact, bound = judged(layer, module, x, np.zeros(x.shape), dtype)
    y = module(x)
    ratio = np.abs(arrays(y) - exact)[np.isfinite(exact)] / bound[np.isfinite(exact)]
    assert ratio.max() <= 1
    assert ratio.max() > 0.05 or dtype == "float64"
    (theirs,) = torch.autograd.grad(y.sum(), x)
    one = np.ones(x.shape)
    named = arguments(layer, module)
    exact, bound = layer.backward(arrays(x), arrays(y), one, PRECISIONS[dtype], **named)["input"]
    assert (np.abs(arrays(theirs) - exact) <= bound)[np.isfinite(exact)].all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 300.0])
@pytest.mark.parametrize("classes", [1, 2, 10, 1000])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_softmax_by_way_of_its_logarithm(scale, classes, dtype):
    x = (scale * torch.randn(100, classes)).to(getattr(torch, dtype))
    exact, bound = judged(S.SOFTMAX, nn.Softmax(-1), x, np.zeros(x.shape), dtype)
    assert (np.abs(arrays(x.log_softmax(-1).exp()) - exact) <= bound).all()


@pytest.mark.parametrize("classes", [1, 2, 3, 64, 1000])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 30.0])
def test_softmax_bounds_a_bad_exp(classes, scale):
    """Exponentials wrong by three units in the last place, each in the worse direction."""
    x = (scale * torch.randn(100, classes)).numpy()
    powers = np.exp((x - x.max(1, keepdims=True)).astype(np.float64)).astype(np.float32)
    sign = np.where(np.arange(classes) == 0, 1, -1)
    powers = (powers + sign * 3 * np.spacing(powers)).astype(np.float32)
    y = powers / np.cumsum(powers, axis=1, dtype=np.float32)[:, -1:]
    exact, bound = judged(S.SOFTMAX, nn.Softmax(1), x.astype(float), np.zeros(x.shape), "float32")
    assert (np.abs(y - exact) <= bound).all()


def test_softmax_of_logits_far_apart():
    x = np.array([[0.0, -800.0, -1e300]])
    exact, bound = judged(S.SOFTMAX, nn.Softmax(-1), x, np.zeros_like(x), "float32")
    np.testing.assert_array_equal(exact, [[1, 0, 0]])
    assert bound[0, 1] < 1e-37
    _, wide = judged(S.SOFTMAX, nn.Softmax(-1), x, np.full_like(x, 1e6), "float32")
    assert (wide <= 1.001).all()
    _, along = judged(S.SOFTMAX, nn.Softmax(0), x.T, np.zeros_like(x.T), "float32")
    np.testing.assert_array_equal(along, bound.T)


@pytest.mark.parametrize("k", [1, 2, 3, 64, 500])
@pytest.mark.parametrize("backwards", [False, True])
def test_dense_bounds_sequential_float32_sums(k, backwards):
    module, x = nn.Linear(k, 4), torch.randn(50, k)
    y = torch.zeros(50, 4)
    for i in reversed(range(k)) if backwards else range(k):
        y = y + x[:, i : i + 1] * module.weight[:, i]
    exact, bound = judged(D.DENSE, module, x, np.zeros(x.shape), "float32")
    ratio = np.abs(arrays(y + module.bias) - exact) / bound
    assert ratio.max() <= 1
    assert ratio.max() > 1e-3


def test_weights_that_are_zero_round_nothing():
    module, x = nn.Linear(100, 2, bias=False), torch.randn(5, 100)
    with torch.no_grad():
        module.weight[0, 1:], module.weight[1, 2:] = 0, 0
    exact, bound = judged(D.DENSE, module, x, np.zeros(x.shape), "float32")
    assert (np.abs(arrays(module(x)) - exact) <= bound).all()
    assert (bound[:, 0] < 3.1 * 2.0**-24 * np.abs(exact[:, 0])).all()


def test_under_nnfs_the_dot_product_is_accumulated_in_float64():
    x = np.array([[1e8, 1, -1e8]], dtype=np.float32)
    ones, b = np.ones((1, 3), np.float32), np.array([0.1], np.float32)
    with book_numpy():
        y = D.DENSE.forward(x, ones, b)
    assert y.dtype == np.float32
    assert y == np.float32(1) + np.float32(0.1)


def updated(x):
    """Mean and variance of the last axis in one pass, as Welford has it, in the dtype of x."""
    mean, squares = x[..., 0], torch.zeros_like(x[..., 0])
    for k in range(1, x.shape[-1]):
        step = x[..., k] - mean
        mean = mean + step / (k + 1)
        squares = squares + step * (x[..., k] - mean)
    return mean[..., None], squares[..., None] / x.shape[-1]


def in_order(x):
    """Mean and variance of the last axis in two passes, added up from the left."""
    mean = x.cumsum(-1)[..., -1:] / x.shape[-1]
    return mean, ((x - mean) ** 2).cumsum(-1)[..., -1:] / x.shape[-1]


@pytest.mark.parametrize("statistics", [updated, in_order])
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("offset", [0.0, 3.0, 1000.0])
@pytest.mark.parametrize("length", [2, 7, 64, 500])
def test_layer_norm_holds_for_other_ways(statistics, folded, offset, length):
    layer, module = N.LAYER_NORM, nn.LayerNorm(length, elementwise_affine=False)
    x = torch.randn(40, length) + offset
    x = torch.cat([x, x.sort().values, x.sort(descending=True).values])
    mean, variance = statistics(x)
    inverse = 1 / (variance + module.eps).sqrt()
    y = x * inverse - mean * inverse if folded else (x - mean) * inverse
    exact, bound = judged(layer, module, x, np.zeros(x.shape), "float32")
    assert (np.abs(arrays(y) - exact) <= bound).all()


U = 2.0**-24


@pytest.mark.parametrize(("down", "first"), [(0, 0.0), (1, 30.0)])
def test_layer_norm_holds_where_every_step_rounds_badly(down, first):
    """Updated statistics: each mean is rounded up, or each sum of squares down."""
    length, module = 200, nn.LayerNorm(200, elementwise_affine=False)
    x = torch.rand(50, length, dtype=torch.float64).pow(8).sort().values + 1 - down
    x[:, 0] += first
    mean, squares = x[:, 0], 0.0
    for k in range(1, length):
        step = x[:, k] - mean
        mean = (mean + step / (k + 1)) * (1 + U * (1 - down))
        squares = (squares + step * (x[:, k] - mean)) * (1 - U * down)
    y = (x - mean[:, None]) / (squares / length + module.eps).sqrt()[:, None]
    exact, bound = judged(N.LAYER_NORM, module, x, np.zeros(x.shape), "float32")
    ratio = np.abs(arrays(y) - exact) / bound
    assert ratio.max() <= 1
    assert ratio.max() > 0.15


def test_a_layer_norm_is_never_far_out():
    module, x = nn.LayerNorm(9, elementwise_affine=False), torch.randn(5, 9)
    _, bound = judged(N.LAYER_NORM, module, x, np.full(x.shape, 1e3), "float64")
    assert (bound < 6.01).all()


def test_batch_norm_holds_for_ten_roundings_in_a_row():
    module, x = with_statistics(nn.BatchNorm1d(3, affine=False)).eval(), torch.randn(50, 3)
    module.running_mean.zero_()
    exact, bound = judged(N.BATCH_NORM, module, x, np.zeros(x.shape), "float32")
    assert (np.abs(exact * (1 + U) ** 10 - exact) <= bound).all()


def test_gelu_may_reach_its_least_value():
    x = np.linspace(-4, 2, 100)
    for approximate in ("none", "tanh"):
        exact, bound = judged(P.GELU, nn.GELU(approximate), x, np.full(x.shape, 1.6), "float32")
        near = P.GELU.forward(x + np.linspace(-1.6, 1.6, 999)[:, None], approximate)
        reached = np.max(np.abs(near - exact), axis=0) / bound
        assert reached.max() <= 1
        assert reached.min() > 0.999


def test_of_several_maxima_any_may_have_the_gradient():
    module = nn.MaxPool2d(2)
    x, g = np.array([[[1.0, 3.0], [3.0, 3.0]]]), np.array([[[5.0]]])
    named = arguments(R.MAX_POOL2D, module)
    exact, bound = R.MAX_POOL2D.backward(x, g, g, PRECISIONS["float32"], **named)["input"]
    np.testing.assert_array_equal(exact, [[[0, 5], [0, 0]]])
    for other in ([0, 5, 0, 0], [0, 0, 5, 0], [0, 0, 0, 5], [0, 2, 2, 1]):
        assert (np.abs(np.reshape(other, exact.shape) - exact) <= bound).all()
    assert bound[0, 0, 0] < 1e-30
    x[0, 1] = 1  # one maximum: it has the gradient alone
    exact, bound = R.MAX_POOL2D.backward(x, g, g, PRECISIONS["float32"], **named)["input"]
    assert bound.max() < 1e-5
    x[0, 1, 0] = 3  # two
    exact, bound = R.MAX_POOL2D.backward(x, g, g, PRECISIONS["float32"], **named)["input"]
    np.testing.assert_allclose(bound, [[[0, 5], [5, 0]]], atol=1e-5)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_batch_norm_holds_for_both_forms(folded, offset):
    module = with_statistics(nn.BatchNorm1d(5)).eval()
    x = torch.randn(200, 5) + offset
    module.running_mean.add_(offset)
    scale = module.weight / (module.running_var + module.eps).sqrt()
    shift = module.bias - module.running_mean * scale
    y = x * scale + shift if folded else (x - module.running_mean) * scale + module.bias
    exact, bound = judged(N.BATCH_NORM, module, x, np.zeros(x.shape), "float32")
    ratio = np.abs(arrays(y) - exact) / bound
    assert ratio.max() <= 1
    assert ratio.max() > 0.05 or not folded


@pytest.mark.parametrize(
    "module", [nn.Embedding(3, 2, max_norm=1.5), nn.BatchNorm1d(4, track_running_stats=False)]
)
def test_what_has_no_formula_is_judged_by_its_own_float64_run(module):
    x = torch.tensor([0, 2, 1]) if isinstance(module, nn.Embedding) else torch.randn(5, 4)
    found = compare(module.eval(), x, candidates=["eager"])
    assert {row.basis for row in found.rows} == {"own float64 run"}
    assert found.ok
    assert found.unjudged
