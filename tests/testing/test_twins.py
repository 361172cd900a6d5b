import numpy as np
import pytest
import torch
from torch import nn

from torchnnfs import Dense, ReLU, Softmax, book_numpy, classifier, compare, spiral
from torchnnfs.testing import Candidate, register, twins


@pytest.fixture(autouse=True)
def _unchanged_register():
    before = dict(twins._TWINS)
    yield
    twins._TWINS.clear()
    twins._TWINS.update(before)


def test_torchs_own_layers(dtype):
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(6, 8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Identity(),
        nn.Linear(8, 4, bias=False),
        nn.LogSoftmax(1),
    ).eval()
    comparison = compare(model, torch.randn(30, 2, 3), candidates=[Candidate(dtype=dtype)])
    assert comparison.ok, comparison
    assert all(row.chained_ratio is not None for row in comparison.rows)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_log_softmax_is_bounded_and_no_more(scale, dim):
    logits = torch.randn(40, 30) * scale
    row = compare(nn.LogSoftmax(dim), logits, candidates=["eager"]).rows[0]
    assert 0.01 < row.bound_ratio <= 1

    class Off(nn.LogSoftmax):
        def forward(self, input):
            return super().forward(input) * (1 + 1e-5) + 1e-5 * scale

    assert not compare(Off(dim), logits, candidates=["eager"]).ok


def test_dropout_in_training_is_refused():
    model = nn.Sequential(Dense(2, 3), nn.Dropout(0.1))
    with pytest.raises(ValueError, match=r"Dropout\(p=0.1, inplace=False\) to be in eval mode"):
        compare(model, torch.randn(4, 2))


def test_register_a_formula_and_a_bound():
    def bound(x, error, precision):
        # tanh is 1-Lipschitz, and torch's is good to a few units roundoff of its result
        return error + 8 * precision.unit * np.abs(np.tanh(x)) + precision.tiny

    register(nn.Tanh, np.tanh, bound)
    model = nn.Sequential(Dense(2, 5), nn.Tanh(), Dense(5, 3), Softmax())
    comparison = compare(model, torch.randn(20, 2))
    assert comparison.ok, comparison
    assert {row.basis for row in comparison.rows} == {"rounding"}
    assert all(row.chained_ratio is not None for row in comparison.rows)


def test_register_a_formula_without_a_bound():
    register(nn.Tanh, np.tanh)
    model = nn.Sequential(Dense(2, 5), nn.Tanh(), Dense(5, 3), Softmax())
    comparison = compare(model, torch.randn(20, 2), candidates=["eager"])
    assert comparison.ok, comparison
    assert [row.basis for row in comparison.rows] == [
        "rounding",
        "64 u",
        "rounding",
        "rounding",
        "sampled",
    ]
    assert "(bound: 64 u)" in str(comparison)

    class Off(nn.Tanh):
        def forward(self, input):
            return super().forward(input) * 1.001

    model[1] = Off()
    assert compare(model, torch.randn(20, 2)).first_divergence.layer == "1"


def test_register_nothing_but_the_type():
    register(nn.GELU)
    model = nn.Sequential(Dense(2, 5), nn.GELU(), Dense(5, 3))
    comparison = compare(model, torch.randn(20, 2))
    assert comparison.ok, comparison
    with pytest.raises(TypeError, match=r"register expects a type of torch.nn.Module, got 3"):
        register(3)


def test_register_with_arguments():
    def scaled(x, scale):
        return x * scale

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(3.0))

        def forward(self, input):
            return input * self.scale

    register(Scale, scaled, arguments=lambda layer: {"scale": layer.scale.item()})
    assert compare(nn.Sequential(Dense(2, 3), Scale()), torch.randn(5, 2)).ok


class Layer_Dense:  # noqa: N801
    """As a reader writes it."""

    def __init__(self, n_inputs, n_neurons):
        self.weights = 0.01 * np.random.randn(n_inputs, n_neurons)
        self.biases = np.zeros((1, n_neurons))

    def forward(self, inputs):
        self.output = np.dot(inputs, self.weights) + self.biases


class Activation_ReLU:  # noqa: N801
    def forward(self, inputs):
        self.output = np.maximum(0, inputs)


class Activation_Softmax:  # noqa: N801
    def forward(self, inputs):
        powers = np.exp(inputs - np.max(inputs, axis=1, keepdims=True))
        self.output = powers / np.sum(powers, axis=1, keepdims=True)


@pytest.mark.parametrize("inside", [True, False], ids=["nnfs.init", "plain"])
def test_a_readers_own_network_as_reference(inside):
    stream = np.random.RandomState(0)
    points, _ = spiral(generator=stream)
    model = classifier(2, 3, 3, generator=stream)
    with book_numpy():
        spiral(generator=np.random.RandomState(0))
        np.random.randn(300)
        theirs = [Layer_Dense(2, 3), Activation_ReLU(), Layer_Dense(3, 3), Activation_Softmax()]
        if inside:
            comparison = compare(model, points, reference=theirs)
    if not inside:
        comparison = compare(model, points, reference=theirs)
    assert comparison.ok, comparison
    assert all(row.chained_ratio is not None for row in comparison.rows)
    theirs[2].weights = theirs[2].weights * np.float32(1.00001)
    assert compare(model, points, reference=theirs).first_divergence.layer == "2"
    theirs[1].forward = lambda inputs: setattr(theirs[1], "output", inputs)
    assert compare(model, points, reference=theirs).first_divergence.layer == "1"


def test_a_readers_float64_network_as_reference():
    weights = np.random.RandomState(0).randn(2, 3)
    theirs = [Layer_Dense(2, 3), Activation_ReLU()]
    theirs[0].weights = weights
    model = nn.Sequential(Dense.from_numpy(weights, np.zeros((1, 3))), ReLU())
    double = [Candidate(dtype=torch.float64)]
    points = torch.randn(30, 2, dtype=torch.float64)
    assert compare(model, points, reference=theirs, candidates=double).ok
    theirs[0].weights = weights + 1e-12
    assert not compare(model, points, reference=theirs, candidates=double).ok


def test_reference_objects_that_do_not_fit():
    model = nn.Sequential(Dense(2, 3), ReLU())
    points = torch.randn(5, 2)
    with pytest.raises(ValueError, match=r"Activation_ReLU for layer '0' to give shape \(5, 3\)"):
        compare(model, points, reference=[Activation_ReLU(), Activation_ReLU()])

    class Nothing:
        def forward(self, inputs):
            pass

    with pytest.raises(TypeError, match=r"Nothing.forward to set output to an array of floats"):
        compare(model, points, reference=[Nothing(), Nothing()])
