"""What the dialect's objects keep, share and refuse."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from torchnnfs import book
from torchnnfs.book import Activation_ReLU, Activation_Softmax, Layer_Dense, Layer_Dropout


def test_arrays_of_numpy_are_never_shared_with_autograd():
    points = np.ones((4, 3), np.float32)
    layer = Layer_Dense(3, 2)
    result = layer.forward(points)
    expected = layer.output.copy()
    points[:] = 7
    layer.output[:] = 7
    np.testing.assert_array_equal(result.detach(), expected)
    result.sum().backward()
    assert layer.weight.grad.tolist() == [[4, 4, 4]] * 2
    frozen = np.ones((4, 3), np.float32)
    frozen.flags.writeable = False
    for kind in (layer, Activation_ReLU(), Activation_Softmax(), Layer_Dropout(0.1)):
        with torch.no_grad():
            assert np.asarray(kind.forward(frozen)).shape == kind.output.shape


def test_odd_shapes_widths_and_dtypes():
    layer = Layer_Dense(2, 3)
    for shape in ((0, 5, 2), (0, 2), (2,), (1, 2, 1, 2)):
        for inputs in (np.ones(shape), np.ones(shape, np.float32), torch.ones(shape)):
            assert layer.forward(inputs).shape == layer.output.shape == (*shape[:-1], 3)
            layer.backward(layer.output)
            assert layer.dinputs.shape == shape
    x = np.random.RandomState(0).randn(9, 2).astype(np.float32)
    layer.biases = [0.1, 0.2, 0.3]
    expected = layer.forward(x).detach()
    assert torch.equal(layer.double().forward(x), expected)
    assert torch.equal(torch.func.vmap(layer)(torch.from_numpy(x)), expected)
    for order in (np.asfortranarray(x), x[::-1][::-1], np.repeat(x, 2, 0)[::2], x.astype(">f4")):
        assert torch.equal(layer.forward(order), expected)
    everything = book.from_torch(nn.Dropout(1.0)).forward(x)
    assert not everything.any()


def test_nothing_of_an_earlier_pass_comes_back():
    layer = Layer_Dense(2, 3)
    layer.forward(torch.ones(4, 2))
    layer.forward(np.ones((1, 2), np.float32))
    assert layer.output.shape == (1, 3)
    del layer.output
    assert layer.output is None
    layer.output = torch.ones(3, requires_grad=True) * 2
    assert copy.deepcopy(layer).output.tolist() == [2, 2, 2]
    layer.forward(torch.ones(4, 2))
    assert (layer.inputs.shape, layer.output.shape) == ((4, 2), (4, 3))


class Doubled(Layer_Dense):
    """A reader's subclass, with the book's way of calling the class it stands on."""

    def __init__(self, n_inputs, n_neurons):
        super().__init__(n_inputs, n_neurons)
        self.calls = 0

    def forward(self, inputs):
        self.calls += 1
        super().forward(inputs)
        self.output = self.output * 2


def test_a_subclass_can_change_the_output():
    layer = Doubled(2, 3)
    for again in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        again.forward([[1, 2]])
        assert again.calls == 1
        plain = np.float32([[1, 2]]) @ layer.weights
        np.testing.assert_allclose(again.output, 2 * plain, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Layer_Dense(2, 3).backward(np.ones((1, 3))), RuntimeError,
         r"Layer_Dense.backward expects a call of Layer_Dense.forward before it"),
        (lambda: after(Layer_Dense(2, 3)).backward(np.ones((5, 2))), ValueError,
         r"expects dvalues of shape \(4, 3\), as the last output has, got \(5, 2\)"),
        (lambda: after(Activation_ReLU()).backward(np.ones(2)), ValueError,
         r"Activation_ReLU.backward expects dvalues of shape \(4, 2\).* got \(2,\)"),
        (lambda: after(Activation_Softmax()).backward("ab"), TypeError, "expects real numbers"),
        (lambda: Layer_Dropout(1), ValueError, "rate from 0 to below 1, got 1"),
        (lambda: Layer_Dropout("a"), TypeError, "rate to be a number, got 'a'"),
        (lambda: Layer_Dense(2, 3, scale=True), TypeError, "scale to be a number, got True"),
        (lambda: Layer_Dense(2, 3, scale=np.nan), ValueError, "scale to be finite, got nan"),
        (lambda: Layer_Dense(2, 3, "l2"), TypeError, "weight_regularizer_l1 to be a number"),
    ],
)  # fmt: skip
def test_bad_input_is_explained(call, error, message):
    with pytest.raises(error, match=message):
        call()


def after(layer):
    layer.forward(np.ones((4, 2)))
    return layer
