"""Chapters 5 to 18 with the import line changed alone: the reader's classes beside the dialect's.

The classes here are what a reader writes from the book's formulas, under `nnfs.init()`.
"""

import copy
import itertools
import pickle
import sys
import time

import nnfs
import numpy as np
import pytest
import torch
from nnfs.datasets import spiral_data
from torch import nn

import torchnnfs
from torchnnfs import book, book_numpy
from torchnnfs.book import Activation_ReLU, Activation_Softmax, Layer_Dense, Layer_Dropout


class MyDense:
    def __init__(self, n_inputs, n_neurons, wl1=0, wl2=0, bl1=0, bl2=0):
        self.weights = 0.01 * np.random.randn(n_inputs, n_neurons)
        self.biases = np.zeros((1, n_neurons))
        self.strengths = wl1, wl2, bl1, bl2

    def forward(self, inputs):
        self.inputs = inputs
        self.output = np.dot(inputs, self.weights) + self.biases

    def backward(self, dvalues):
        self.dweights = np.dot(self.inputs.T, dvalues)
        self.dbiases = np.sum(dvalues, axis=0, keepdims=True)
        wl1, wl2, bl1, bl2 = self.strengths
        for gradient, values, l1, l2 in (
            (self.dweights, self.weights, wl1, wl2),
            (self.dbiases, self.biases, bl1, bl2),
        ):
            if l1 > 0:
                signs = np.ones_like(values)
                signs[values < 0] = -1
                gradient += l1 * signs
            if l2 > 0:
                gradient += 2 * l2 * values
        self.dinputs = np.dot(dvalues, self.weights.T)


class MyReLU:
    def forward(self, inputs):
        self.inputs = inputs
        self.output = np.maximum(0, inputs)

    def backward(self, dvalues):
        self.dinputs = dvalues.copy()
        self.dinputs[self.inputs <= 0] = 0


class MySoftmax:
    def forward(self, inputs):
        # NumPy's float32 exp has its own last bits; the book's page has those of a rounded one.
        shifted = (inputs - np.max(inputs, axis=1, keepdims=True)).astype(np.float64)
        powers = np.exp(shifted).astype(np.float32)
        self.output = powers / np.sum(powers, axis=1, keepdims=True)

    def backward(self, dvalues):
        self.dinputs = np.empty_like(dvalues)
        for index, (p, values) in enumerate(zip(self.output, dvalues, strict=True)):
            p = p.reshape(-1, 1)
            self.dinputs[index] = np.dot(np.diagflat(p) - np.dot(p, p.T), values)


class MyDropout:
    def __init__(self, rate):
        self.rate = 1 - rate

    def forward(self, inputs):
        self.binary_mask = np.random.binomial(1, self.rate, size=inputs.shape) / self.rate
        self.output = inputs * self.binary_mask

    def backward(self, dvalues):
        self.dinputs = dvalues * self.binary_mask


class Loss:
    def forward(self, outputs, targets):
        clipped = np.clip(outputs, 1e-7, 1 - 1e-7)
        return float(np.mean(-np.log(clipped[range(len(outputs)), targets])))

    def backward(self, outputs, targets):
        hot = np.eye(outputs.shape[1])[targets]
        self.dinputs = -hot / outputs / len(outputs)


class SoftmaxAndLoss:
    """Chapter 9: a reader's own object, which holds an activation and shortens the way back."""

    def __init__(self, activation):
        self.activation, self.loss = activation, Loss()

    def forward(self, inputs, targets):
        self.activation.forward(inputs)
        self.output = self.activation.output
        return self.loss.forward(self.output, targets)

    def backward(self, dvalues, targets):
        self.dinputs = dvalues.copy()
        self.dinputs[range(len(dvalues)), targets] -= 1
        self.dinputs = self.dinputs / len(dvalues)


class Momentum:
    def __init__(self, rate=1.0, decay=1e-3, momentum=0.9):
        self.rate, self.decay, self.momentum, self.steps = rate, decay, momentum, 0

    def step(self, layers):
        rate = self.rate / (1 + self.decay * self.steps)
        for layer in layers:
            if not hasattr(layer, "weight_momentums"):
                layer.weight_momentums = np.zeros_like(layer.weights)
                layer.bias_momentums = np.zeros_like(layer.biases)
            layer.weight_momentums = self.momentum * layer.weight_momentums - rate * layer.dweights
            layer.bias_momentums = self.momentum * layer.bias_momentums - rate * layer.dbiases
            layer.weights += layer.weight_momentums
            layer.biases += layer.bias_momentums
        self.steps += 1


@pytest.fixture
def init():
    with book_numpy():
        yield


def pairs(n_inputs, n_neurons, device="cpu", **strengths):
    """A reader's dense layer, and the dialect's with the same parameters."""
    mine = MyDense(n_inputs, n_neurons, *strengths.values())
    ours = Layer_Dense(n_inputs, n_neurons, device=device, **strengths)
    mine.weights = np.random.randn(n_inputs, n_neurons)
    mine.biases = np.random.randn(1, n_neurons)
    ours.weights, ours.biases = mine.weights, mine.biases
    return mine, ours


STRENGTHS = {
    "weight_regularizer_l1": 5e-4,
    "weight_regularizer_l2": 3e-4,
    "bias_regularizer_l1": 2e-4,
    "bias_regularizer_l2": 1e-4,
}


@pytest.mark.parametrize("strengths", [{}, STRENGTHS], ids=["plain", "regularized"])
@pytest.mark.parametrize(("rows", "widths"), [(300, (2, 64)), (300, (64, 3)), (7, (5, 1))])
def test_dense_goes_back_as_numpy_does(rows, widths, strengths, device, init):
    mine, ours = pairs(*widths, device=device, **strengths)
    inputs, dvalues = np.random.randn(rows, widths[0]), np.random.randn(rows, widths[1])
    before = inputs.copy(), dvalues.copy()
    for layer in (mine, ours):
        layer.forward(inputs)
        layer.backward(dvalues)
    assert ours.inputs is inputs
    for name in ("dbiases", "dweights", "dinputs"):
        theirs, gradient = getattr(mine, name), getattr(ours, name)
        assert type(gradient) is np.ndarray
        assert gradient.dtype == theirs.dtype == np.float32
        assert gradient.shape == theirs.shape
        # The one order of float64 sums against another: at most the rounding to float32 differs.
        np.testing.assert_array_max_ulp(gradient, theirs, 1)
    np.testing.assert_array_equal(ours.dbiases, mine.dbiases)
    np.testing.assert_array_equal((inputs, dvalues)[0], before[0])
    np.testing.assert_array_equal(dvalues, before[1])


def test_relu_and_softmax_go_back_bit_for_bit(init):
    values, dvalues = np.random.randn(300, 9), np.random.randn(300, 9)
    values[0, :3] = 0, -0.0, np.nan
    for mine, ours in ((MyReLU(), Activation_ReLU()), (MySoftmax(), Activation_Softmax())):
        for layer in (mine, ours):
            layer.forward(np.nan_to_num(values) if mine.__class__ is MySoftmax else values)
            layer.backward(dvalues)
        np.testing.assert_array_equal(ours.output, mine.output)
        np.testing.assert_array_equal(ours.dinputs, mine.dinputs)
        assert ours.dinputs.dtype == np.float32


def test_backward_agrees_with_autograd(device, init):
    model = nn.Sequential(Layer_Dense(4, 6), Activation_ReLU(), Layer_Dense(6, 3))
    model.append(Activation_Softmax()).to(device)
    x = torch.randn(50, 4, device=device, requires_grad=True)
    grad = torch.randn(50, 3, device=device)
    model(x).backward(grad)
    dvalues = grad
    for layer in reversed(model):
        layer.backward(dvalues)
        dvalues = layer.dinputs
    found = [(x, model[0].dinputs)]
    for layer in (model[0], model[2]):
        found += [(layer.weight, layer.dweights.T), (layer.bias, layer.dbiases[0])]
    for tensor, ours in found:
        theirs = tensor.grad.cpu().numpy()
        assert np.abs(ours - theirs).max() <= 1e-6 * np.abs(theirs).max()


def test_rows_of_other_shapes_and_dtypes_go_back():
    layer = Layer_Dense(3, 2)
    for shape in ((3,), (0, 3), (4, 5, 3)):
        layer.forward(np.ones(shape))
        layer.backward(np.ones((*shape[:-1], 2)))
        assert layer.dinputs.shape == shape
        assert (layer.dweights.shape, layer.dbiases.shape) == ((3, 2), (1, 2))
        assert layer.dbiases.tolist() == [[np.prod(shape) / 3] * 2]
    layer.forward([[1, 2, 3]])
    layer.backward([[1, 0]])
    assert layer.inputs.tolist() == [[1, 2, 3]]
    assert layer.dweights.tolist() == [[1, 0], [2, 0], [3, 0]]
    layer.forward(torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.bfloat16))
    layer.backward(torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16))
    assert layer.dweights[:, 0].tolist() == [1, 2, 3]


def test_output_can_be_assigned_and_backward_starts_from_it(init):
    """Chapter 9's check of the short way against the long one, as it is written there."""
    outputs = np.array([[0.7, 0.1, 0.2], [0.1, 0.5, 0.4], [0.02, 0.9, 0.08]])
    targets = np.array([0, 1, 1])
    short = SoftmaxAndLoss(Activation_Softmax())
    short.activation.output = outputs
    short.backward(outputs, targets)
    activation = Activation_Softmax()
    activation.output = outputs
    loss = Loss()
    loss.backward(outputs, targets)
    activation.backward(loss.dinputs)
    np.testing.assert_allclose(activation.dinputs, short.dinputs, atol=1e-7)
    activation.output = torch.tensor(outputs, requires_grad=True)
    before = activation.dinputs
    activation.backward(loss.dinputs)
    np.testing.assert_array_equal(activation.dinputs, before)


def train(kinds, steps, hidden=64, dropout=None):
    """The loop of chapters 10, 14 and 15; the losses of all steps and the last accuracy."""
    nnfs.init()
    points, targets = spiral_data(samples=100, classes=3)
    dense, relu, softmax = kinds
    layers = [dense(2, hidden), relu(), dense(hidden, 3)]
    if dropout:
        layers.insert(2, dropout(0.1))
    loss, optimizer, losses = SoftmaxAndLoss(softmax()), Momentum(), []
    for _ in range(steps):
        values = points
        for layer in layers:
            layer.forward(values)
            values = layer.output
        losses.append(loss.forward(values, targets))
        accuracy = np.mean(np.argmax(loss.output, axis=1) == targets)
        loss.backward(loss.output, targets)
        dvalues = loss.dinputs
        for layer in reversed(layers):
            layer.backward(dvalues)
            dvalues = layer.dinputs
        optimizer.step([layers[0], layers[-1]])
    return np.array(losses), accuracy


MINE = MyDense, MyReLU, MySoftmax
OURS = Layer_Dense, Activation_ReLU, Activation_Softmax


class PlainSoftmax(MySoftmax):
    """The book's own, with NumPy's float32 exp."""

    def forward(self, inputs):
        powers = np.exp(inputs - np.max(inputs, axis=1, keepdims=True))
        self.output = powers / np.sum(powers, axis=1, keepdims=True)


@pytest.mark.parametrize(("softmax", "apart"), [(PlainSoftmax, 2e-7), (MySoftmax, 0)])
def test_the_first_steps_of_training_are_numpys(softmax, apart, init):
    mine, _ = train((MyDense, MyReLU, softmax), 30)
    ours, _ = train(OURS, 30)
    assert mine[0] > mine[-1]
    np.testing.assert_allclose(ours, mine, atol=apart, rtol=0)


def test_training_ends_well(init):
    losses, accuracy = train(OURS, 600)
    assert losses[-1] < 0.6
    assert accuracy > 0.7


@pytest.mark.skipif(sys.gettrace() is not None, reason="a tracer slows Python, but not NumPy")
@pytest.mark.parametrize("hidden", [3, 64])
def test_a_forward_pass_takes_at_most_three_times_numpys_time(hidden, init):
    points, _ = spiral_data(samples=100, classes=3)
    networks = []
    for dense, relu, softmax in ((MyDense, MyReLU, PlainSoftmax), OURS):
        networks.append([dense(2, hidden), relu(), dense(hidden, 3), softmax()])

    def once(network):
        start, values = time.perf_counter(), points
        for layer in network:
            layer.forward(values)
            values = layer.output
        return time.perf_counter() - start

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # In turn, so that both see the same caches and the same load; the quietest of ten rounds.
        rounds = [[[once(network) for network in networks] for _ in range(100)] for _ in range(10)]
    finally:
        torch.set_num_threads(threads)
    ratios = [np.median([ours / mine for mine, ours in times]) for times in rounds]
    assert min(ratios) < 3


def test_training_with_dropout_draws_the_same_masks(init):
    mine, _ = train(MINE, 10, dropout=MyDropout)
    ours, _ = train(OURS, 10, dropout=Layer_Dropout)
    np.testing.assert_allclose(ours, mine, atol=2e-7, rtol=0)


def test_dropout_is_numpys(device):
    mine, ours = MyDropout(0.3), Layer_Dropout(0.3)
    assert ours.rate == mine.rate == 0.7
    inputs = np.random.RandomState(0).randn(20, 5).astype(np.float32)
    dvalues = inputs[::-1].copy()
    for layer in (mine, ours):
        np.random.seed(7)
        layer.forward(inputs)
        layer.backward(dvalues)
    for name in ("output", "binary_mask", "dinputs"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(mine, name))
    np.random.seed(7)
    result = ours.forward(torch.from_numpy(inputs).to(device))
    assert result.device.type == device.type
    np.testing.assert_array_equal(result.cpu(), mine.output)
    state = np.random.get_state()[1].copy()
    for evaluated in (ours.forward(inputs, training=False), ours.eval().forward(inputs)):
        np.testing.assert_array_equal(evaluated, inputs)
        ours.backward(dvalues)
        np.testing.assert_array_equal(ours.dinputs, dvalues)
    assert (np.random.get_state()[1] == state).all()
    assert not np.array_equal(ours.forward(inputs, training=True), inputs)


def test_the_model_of_chapter_18(init):
    """Layers that are linked in both directions, called with `training` by position."""
    layers = [
        Layer_Dense(2, 8, weight_regularizer_l2=5e-4, bias_regularizer_l2=5e-4),
        Activation_ReLU(),
        Layer_Dropout(0.1),
        Layer_Dense(8, 3),
        Activation_Softmax(),
    ]
    for before, after in itertools.pairwise(layers):
        before.next, after.prev = after, before
    layers[0].prev, layers[-1].next = layers[0], layers[0]
    points, targets = spiral_data(samples=10, classes=3)
    for training in (True, False):
        layers[0].forward(points, training)
        for layer in layers[1:]:
            layer.forward(layer.prev.output, training)
    predictions = layers[-1].predictions(layers[-1].output)
    assert predictions.shape == targets.shape
    assert (layers[1].predictions(points) == points).all()
    loss = Loss()
    loss.backward(layers[-1].output, targets)
    layers[-1].backward(loss.dinputs)
    for layer in reversed(layers[:-1]):
        layer.backward(layer.next.dinputs)
    assert [hasattr(layer, "weights") for layer in layers] == [True, False, False, True, False]
    assert repr(layers[0]) == "Layer_Dense(in_features=2, out_features=8, bias=True)"
    assert list(layers[0].state_dict()) == ["weight", "bias"]
    assert not list(layers[0].children())
    for again in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):
        assert again[1].prev is again[0]
        np.testing.assert_array_equal(again[0].dweights, layers[0].dweights)
    plain = book.to_torch(nn.Sequential(*layers))
    assert type(plain[2]) is nn.Dropout
    assert not {"inputs", "output"} & vars(plain[0]).keys()


def test_the_readers_own_attributes_stay_plain():
    layer = Layer_Dense(2, 3)
    layer.weight_cache = np.ones((2, 3))
    layer.next = Activation_ReLU()
    layer.extra = nn.Linear(2, 2)  # a torch module is registered, as everywhere in torch
    assert "weight_cache" in vars(layer)
    assert [name for name, _ in layer.named_children()] == ["extra"]


def test_strengths_and_scale_are_kept():
    np.random.seed(0)
    layer = Layer_Dense(2, 3, 0.1, 0.2, 0.3, bias_regularizer_l2=0.4, scale=0.1)
    assert layer.weight_regularizer_l1 == 0.1
    assert layer.weight_regularizer_l2 == 0.2
    assert layer.bias_regularizer_l1 == 0.3
    assert layer.bias_regularizer_l2 == 0.4
    drawn = np.random.RandomState(0).randn(2, 3).astype(np.float32)
    np.testing.assert_array_equal(layer.weights, np.float32(0.1) * drawn)
    layer.reset_parameters(np.random.RandomState(0))
    np.testing.assert_array_equal(layer.weights, np.float32(0.1) * drawn)
    layer.reset_parameters(torch.Generator().manual_seed(0))
    assert 0.01 < layer.weights.std() < 1
    assert book.from_torch(nn.Linear(2, 3)).weight_regularizer_l1 == 0
    assert Layer_Dense(2, 3).bias_regularizer_l2 == 0


def test_strengths_of_a_bias_that_is_not_there_add_nothing():
    layer = book.from_torch(nn.Linear(2, 3, bias=False))
    layer.bias_regularizer_l1, layer.bias_regularizer_l2 = 0.1, 0.2
    layer.forward(np.ones((1, 2), np.float32))
    layer.backward(np.ones((1, 3), np.float32))
    np.testing.assert_array_equal(layer.dbiases, np.ones((1, 3)))
    layer = Layer_Dense(
        2, 3, bias_regularizer_l1=0.25
    )  # of a bias of 0 the slope is 1, as in the book
    layer.forward(np.ones((1, 2), np.float32))
    layer.backward(np.ones((1, 3), np.float32))
    np.testing.assert_array_equal(layer.dbiases, np.full((1, 3), 1.25))


def test_the_dialect_is_an_attribute_of_the_package():
    assert torchnnfs.book is book
