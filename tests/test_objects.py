"""`book.from_numpy`: what it converts, and that it drops nothing without a word."""

import numpy as np
import pytest
import torch
from torch import nn

from torchnnfs import Dense, book, classifier
from torchnnfs.book import Activation_ReLU, Activation_Softmax, Layer_Dense, Layer_Dropout

RNG = np.random.RandomState(0)
W, B = RNG.randn(2, 3), RNG.randn(1, 3)
X = RNG.randn(5, 2).astype(np.float32)


def made(name="Layer", **attributes):
    """An object of a reader's class of this name, with these attributes."""
    layer = type(name, (), {})()
    vars(layer).update(attributes)
    return layer


def forward(then=lambda x: x, **attributes):
    """An object whose forward pass ends with `then`."""

    def run(self, inputs):
        self.output = then(np.dot(inputs, self.weights) + self.biases)

    layer = type("Forward", (), {"forward": run})()
    vars(layer).update(weights=W, biases=B, **attributes)
    return layer


@pytest.mark.parametrize("weights", ["weights", "weight"])
@pytest.mark.parametrize("biases", ["biases", "bias"])
def test_arrays_under_either_name(weights, biases):
    for wrap in (np.asarray, torch.from_numpy, lambda x: nn.Parameter(torch.from_numpy(x))):
        layer = book.from_numpy(made(**{weights: wrap(W), biases: wrap(B)}))
        assert type(layer) is Layer_Dense
        np.testing.assert_array_equal(layer.weights, W.astype(np.float32))
        np.testing.assert_array_equal(layer.biases, B.astype(np.float32))
    assert book.from_numpy(made(**{weights: W})).biases is None


@pytest.mark.parametrize(
    "name", ["ReLU", "ActivationReLU", "ReLUActivation", "Activation_ReLu", "Activation_ReLU",
             "ReluLayer", "relu_activation_function"],
)  # fmt: skip
def test_common_spellings(name):
    assert type(book.from_numpy(made(name))) is Activation_ReLU
    softmax = name.lower().replace("relu", "SoftMax")
    assert type(book.from_numpy(made(softmax))) is Activation_Softmax


def test_dropout_comes_in_evaluation():
    for name in ("Layer_Dropout", "Dropout", "DropoutLayer"):
        layer = book.from_numpy(made(name, rate=0.9, binary_mask=np.ones(3)))
        assert type(layer) is Layer_Dropout
        assert layer.rate == 0.9
        assert torch.equal(layer(torch.ones(3)), torch.ones(3))


def relu(x):
    return np.maximum(x, 0)


@pytest.mark.parametrize(
    "activation", ["relu", relu, made("Activation_ReLU"), Activation_ReLU()],
    ids=["name", "function", "object", "dialect"],
)  # fmt: skip
def test_an_activation_inside_is_converted(activation):
    model = book.from_numpy(made(weights=W, biases=B, activation=activation))
    assert [type(layer) for layer in model] == [Layer_Dense, Activation_ReLU]
    expected = np.maximum(X @ W + B, 0)
    np.testing.assert_allclose(model(torch.from_numpy(X)).detach(), expected, rtol=1e-5)


def test_what_training_leaves_behind_and_links_are_no_part():
    layer = made(
        weights=W, biases=B, inputs=X, output=X, dinputs=X, dweights=W, dbiases=B, next=made(),
        prev=made(), weight_momentums=W, bias_cache=B, n_inputs=2, n_neurons=3,
        weight_regularizer_l2=5e-4, grad=None,
    )  # fmt: skip
    ours = book.from_numpy(layer)
    assert type(ours) is Layer_Dense
    assert ours.weight_regularizer_l2 == 5e-4


def test_torch_modules_and_the_dialects_own_layers():
    plain = classifier(2, 3, 3)
    model = book.from_numpy([plain, nn.Dropout(0.1), Layer_Dense(3, 2)])
    assert type(model[0][0]) is Layer_Dense
    assert torch.equal(model[0][0].weight, plain[0].weight)
    assert type(model[1]) is Layer_Dropout
    assert type(book.from_numpy(nn.Linear(2, 2))) is Layer_Dense
    assert type(book.from_numpy(nn.Sigmoid())) is nn.Sigmoid  # left as it is, as by from_torch


def test_a_forward_is_run_beside_the_result():
    state = np.random.get_state()[1].copy()
    layer = forward(learning_rate=0.1)
    assert type(book.from_numpy(layer)) is Layer_Dense
    assert not hasattr(layer, "output")
    assert (np.random.get_state()[1] == state).all()
    both = forward(lambda x: np.maximum(x, 0), activation="relu")
    assert [type(each) for each in book.from_numpy(both)] == [Layer_Dense, Activation_ReLU]


class LeakyInside:
    def forward(self, inputs):
        self.output = np.where(inputs > 0, inputs, 0.01 * inputs)


class Trains(LeakyInside):
    def forward(self, inputs, training):
        self.output = np.maximum(inputs, 0) * (2 if training else 1)


def renamed(kind, name):
    return type(name, (kind,), {})()


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (made(weights=W, biases=B, activation="tanh"), "activation 'tanh' of Layer is none of"),
        (made(weights=W, biases=B, activation=np.tanh), "activation 'tanh' of Layer"),
        (made(weights=W, biases=B, activation=made("Activation_Sigmoid")), "activation 'sigmoid'"),
        (made(weights=W, biases=B, nonlinearity=made()), "Layer has an attribute 'nonlinearity'"),
        (made(weights=W, b=B), "Layer has an attribute 'b'"),
        (made(weights=W, bias=B, biases=B), "Layer has an attribute 'bias'"),
        (made(weights=W, biases=B, _gain=2.0), "Layer has an attribute '_gain', 2.0"),
        (made(weights=W, biases=B, use_bias=False), "Layer has an attribute 'use_bias', False"),
        (made("ReLU", slope=0.1), "ReLU has an attribute 'slope', 0.1"),
        (made("Dropout", rate=0.5, seed=[1]), r"Dropout has an attribute 'seed', \[1\]"),
        (made("Dropout", rate="a"), "Dropout.rate to be the share .* got 'a'"),
        (made("Dropout", p=0.5), "Dropout.rate to be the share .* got None"),
        (made("Dropout", rate=1.5), "Dropout.rate to be the share .* got 1.5"),
        (made("LeakyReLU"), "got one of class LeakyReLU"),
        (made("Activation_Sigmoid"), "got one of class Activation_Sigmoid"),
        ([made("ReLU"), made("Conv")], "got one of class Conv"),
        (W, "got one of class ndarray"),
        ({"weights": W}, "got one of class dict"),
        (forward(lambda x: np.maximum(x, 0)), "something else than Layer_Dense"),
        (forward(lambda x: x[:, :2]), "Forward.forward computes something else"),
        (forward(lambda x: np.where(x > 1e3, 1e3, x)), "Forward.forward computes something else"),
        (forward(lambda x: 1 / 0), r"Forward.forward fails on inputs of shape \(27, 2\)"),
        (renamed(LeakyInside, "Activation_ReLU"), "ReLU.forward computes something else"),
        (renamed(Trains, "Activation_Softmax"), "Activation_Softmax.forward computes something"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_by_name(layer, message):
    with pytest.raises(TypeError, match=message):
        book.from_numpy(layer)


def test_training_is_switched_off_while_a_forward_is_run():
    assert type(book.from_numpy(renamed(Trains, "ReLU"))) is Activation_ReLU


def test_what_dense_takes_is_checked_there():
    with pytest.raises(ValueError, match=r"expects biases of shape \(1, 3\).* got \(1, 2\)"):
        book.from_numpy(made(weights=W, biases=B[:, :2]))
    assert Dense.from_numpy(W).bias is None
