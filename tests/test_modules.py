import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from torchnnfs import Dense, LazyDense, ReLU, Softmax, book_numpy, classifier

# The first six numbers of the book's stream: rounded to float32 first, then times 0.01.
BOOK_WEIGHTS = np.float32(0.01) * np.array(
    [[1.7640524, 0.4001572, 0.978738], [2.2408931, 1.867558, -0.9772779]], dtype=np.float32
)


def test_layers_are_torchs_own():
    assert issubclass(Dense, nn.Linear)
    assert issubclass(ReLU, nn.ReLU)
    assert issubclass(Softmax, nn.Softmax)


def test_dense_from_randomstate_is_the_books_draw(stream, device, dtype):
    layer = Dense(2, 3, device=device, dtype=dtype, generator=stream)
    with book_numpy():
        book = 0.01 * np.random.randn(2, 3)
    assert book.dtype == np.float32
    np.testing.assert_allclose(book, BOOK_WEIGHTS, rtol=1e-6)  # the stream is the right one
    expected = torch.from_numpy(book.T).to(dtype)
    assert layer.weight.device.type == device.type
    assert layer.weight.dtype == dtype
    assert torch.equal(layer.weight.cpu(), expected)
    assert torch.equal(layer.bias.cpu(), torch.zeros(3, dtype=dtype))


def test_dense_from_torch_is_001_randn(device):
    generator = torch.Generator(device).manual_seed(3)
    layer = Dense(40, 50, device=device, generator=generator)
    generator.manual_seed(3)
    expected = torch.empty(50, 40, device=device).normal_(0, 0.01, generator=generator)
    assert torch.equal(layer.weight, expected)
    assert 0.0095 < layer.weight.std().item() < 0.0105


def test_dense_draws_once_from_one_stream():
    ours, theirs = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    stream = np.random.RandomState(1)
    Dense(4, 5, generator=stream)
    assert torch.equal(torch.random.get_rng_state(), ours)
    assert stream.randn() == np.random.RandomState(1).randn(21)[-1]
    Dense(4, 5, generator=torch.Generator())
    assert torch.equal(torch.random.get_rng_state(), ours)
    Dense(4, 5)
    drawn = torch.random.get_rng_state()
    torch.random.set_rng_state(ours)
    torch.empty(5, 4).normal_()
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert (np.random.get_state()[1] == theirs).all()


def test_reset_parameters_draws_again():
    layer = Dense(2, 3, generator=np.random.RandomState(0))
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.bias.fill_(1)
    layer.reset_parameters(np.random.RandomState(0))
    assert torch.equal(layer.weight, before)
    assert not layer.bias.any()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)


def test_meta_device_then_to_empty_then_reset(device):
    stream, untouched = np.random.RandomState(0), torch.random.get_rng_state()
    layer = Dense(2, 3, device="meta", generator=stream)
    assert layer.weight.is_meta
    layer.to_empty(device=device)
    layer.reset_parameters(stream)
    expected = Dense(2, 3, generator=np.random.RandomState(0))
    assert torch.equal(layer.weight.cpu(), expected.weight)
    assert torch.equal(untouched, torch.random.get_rng_state())
    with torch.device("meta"):
        assert Dense(2, 3).weight.is_meta


def test_device_context_and_default_dtype_are_followed():
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("cpu"):
            assert Dense(2, 3).weight.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("generator", [np.random.RandomState(0), torch.Generator(), None])
def test_layers_pickle_and_deepcopy(generator):
    layer = Dense(2, 3, generator=generator)
    assert set(vars(layer)) == set(vars(nn.Linear(2, 3)))
    for again in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(again.weight, layer.weight)


@pytest.mark.parametrize("shape", [(2,), (5, 2), (0, 2), (4, 5, 2), (3, 0, 2)], ids=str)
def test_layers_give_torchs_bits(shape, device, dtype):
    ours = classifier(2, 7, 3, device=device, dtype=dtype)
    theirs = nn.Sequential(nn.Linear(2, 7), nn.ReLU(), nn.Linear(7, 3), nn.Softmax(-1))
    theirs.to(device, dtype).load_state_dict(ours.state_dict())
    input = torch.randn(shape).to(device, dtype)
    assert torch.equal(ours(input), theirs(input))


def test_dense_without_bias():
    layer = Dense(2, 3, bias=False)
    assert layer.bias is None
    assert layer(torch.ones(2)).shape == (3,)


@pytest.mark.parametrize(
    "biases", [[[1.0, 2.0, 3.0]], [1.0, 2.0, 3.0], None], ids=["row", "flat", "none"]
)
def test_from_numpy(biases):
    weights = np.arange(6.0).reshape(2, 3)
    layer = Dense.from_numpy(weights, biases)
    assert layer.weight.dtype == torch.float64
    assert (layer.weight.detach().numpy() == weights.T).all()
    assert (layer.bias is None) == (biases is None)
    x = np.array([[1.0, -1.0]])
    expected = x @ weights + (0 if biases is None else np.reshape(biases, (1, 3)))
    assert (layer(torch.from_numpy(x)).detach().numpy() == expected).all()
    weights[:] = 7  # a copy, so the layer keeps its own
    assert layer.weight[0, 0] == 0


@pytest.mark.parametrize(
    "odd",
    [
        lambda w: w[::-1],
        lambda w: np.asfortranarray(w),
        lambda w: w.astype(">f4"),
        lambda w: w.astype(np.longdouble),
        lambda w: np.repeat(w, 2, 1)[:, ::2],
        lambda w: torch.tensor(w, requires_grad=True),
        lambda w: w.astype(np.uint16),
    ],
)
def test_from_numpy_takes_any_array(odd):
    weights = odd(np.arange(6.0).reshape(2, 3))
    layer = Dense.from_numpy(weights, dtype=torch.float64)
    expected = weights.detach().numpy() if isinstance(weights, torch.Tensor) else weights
    np.testing.assert_array_equal(layer.weight.detach().numpy(), expected.astype(float).T)


def test_from_numpy_dtype_and_device(device):
    weights = np.ones((2, 3), dtype=np.float32)
    assert Dense.from_numpy(weights).weight.dtype == torch.float32
    assert Dense.from_numpy([[1, 2], [3, 4]]).weight.dtype == torch.float32
    layer = Dense.from_numpy(weights, device=device, dtype=torch.float16)
    assert (layer.weight.dtype, layer.weight.device.type) == (torch.float16, device.type)


def test_a_lazy_layer_takes_the_last_dimension():
    layer = LazyDense(3, bias=False)
    assert layer(torch.ones(4, 2, 5)).shape == (4, 2, 3)
    assert (layer.in_features, layer.bias) == (5, None)
    assert LazyDense(3)(torch.ones(4, 0, 5)).shape == (4, 0, 3)
    with pytest.raises(ValueError, match=r"of at least 1, got an input of shape \(4, 2, 0\)"):
        LazyDense(3)(torch.ones(4, 2, 0))


def test_relu_of_special_values():
    inf = float("inf")
    output = ReLU()(torch.tensor([float("nan"), inf, -inf, 1e-45, -1e-45]))
    assert output[0].isnan()
    assert output[1:].tolist() == [inf, 0, torch.tensor(1e-45).item(), 0]


def test_relu_in_place():
    input = torch.tensor([-1.0, 2.0])
    assert ReLU(inplace=True)(input) is input
    assert input.tolist() == [0, 2]


def test_softmax_is_stable_for_any_finite_input(device, dtype):
    largest = torch.finfo(dtype).max
    rows = [[largest, -largest, 0], [largest, largest, -largest]]
    output = Softmax()(torch.tensor(rows, device=device, dtype=dtype))
    assert output.tolist() == [[1, 0, 0], [0.5, 0.5, 0]]


def test_softmax_of_special_values():
    nan, inf = float("nan"), float("inf")
    rows = torch.tensor([[nan, 0, 0], [inf, 0, 0], [-inf, -inf, -inf], [-inf, 0, 0]])
    output = Softmax()(rows)
    assert output[:3].isnan().all()
    assert output[3].tolist() == [0, 0.5, 0.5]


def test_softmax_dim():
    input = torch.randn(3, 4, 5)
    assert torch.equal(Softmax(1)(input), torch.softmax(input, 1))
    assert Softmax().dim == -1


def test_classifier_draws_in_the_books_order():
    model = classifier(2, 3, 4, 5, generator=np.random.RandomState(0))
    stream = np.random.RandomState(0)
    layers = [Dense(2, 3, generator=stream), Dense(3, 4, generator=stream)]
    layers.append(Dense(4, 5, generator=stream))
    kinds = [Dense, ReLU, Dense, ReLU, Dense, Softmax]
    assert [type(layer) for layer in model] == kinds
    for ours, expected in zip(model[::2], layers, strict=True):
        assert torch.equal(ours.weight, expected.weight)


def test_classifier_passes_the_keywords_on(device):
    model = classifier(2, 3, bias=False, device=device, dtype=torch.float64)
    assert model[0].bias is None
    assert model[0].weight.dtype == torch.float64
    assert model[0].weight.device.type == device.type


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Dense(2, 3)(torch.ones(4, 5)), ValueError,
         r"Dense\(in_features=2\) expects a last dimension of 2, got an input of shape \(4, 5\)"),
        (lambda: Dense(2, 3)(torch.tensor(1.0)), ValueError, r"got an input of shape \(\)"),
        (lambda: Dense(2, 3)(torch.ones(4, 2, 5)), ValueError,
         r"expects a last dimension of 2, got an input of shape \(4, 2, 5\)"),
        (lambda: Dense(2, 3)(np.ones((4, 2))), TypeError,
         r"expects a torch.Tensor, got numpy.ndarray; call torch.as_tensor"),
        (lambda: Dense(2, 3)([[1.0, 2.0]]), TypeError, r"got builtins.list; call torch.as_tensor"),
        (lambda: Dense(2, 3)(torch.ones(4, 2, dtype=torch.int64)), TypeError,
         r"expects a floating-point input, got torch.int64; call input.float\(\)"),
        (lambda: Dense(2, 3)(torch.ones(4, 2).double()), TypeError,
         r"holds torch.float32 parameters, got a torch.float64 input; call input.to"),
        (lambda: Dense(2, 3)(torch.ones(4, 2, device="meta")), ValueError,
         r"holds its parameters on cpu, got an input on meta"),
        (lambda: ReLU()([1.0]), TypeError, r"ReLU\(\) expects a torch.Tensor, got builtins.list"),
        (lambda: Softmax()([1.0]), TypeError, r"Softmax\(dim=-1\) expects a torch.Tensor, got"),
        (lambda: Softmax()(torch.tensor([1, 2])), TypeError, r"floating-point input, got torch.in"),
        (lambda: Softmax(None), TypeError, r"dim to be an int, got None \(NoneType\)"),
        (lambda: Dense(0, 3), ValueError, r"in_features to be at least 1, got 0"),
        (lambda: Dense(2, -3), ValueError, r"out_features to be at least 1, got -3"),
        (lambda: Dense(True, 3), TypeError, r"in_features to be an int, got True \(bool\)"),
        (lambda: Dense(2, 3.0), TypeError, r"out_features to be an int, got 3.0 \(float\)"),
        (lambda: Dense(2, 3, generator=0), TypeError, r"got builtins.int; make one with"),
        (lambda: Dense(2, 3, generator=np.random.default_rng(0)), TypeError,
         r"got numpy.random._generator.Generator; make one with"),
        (lambda: classifier(2), ValueError, r"at least two widths .* got 1: \(2,\)"),
        (lambda: classifier(), ValueError, r"got 0: \(\)"),
        (lambda: classifier(2, 0, 3), ValueError, r"width 1 to be at least 1, got 0"),
        (lambda: classifier([2, 3]), TypeError, r"width 0 to be an int, got \[2, 3\] \(list\)"),
        (lambda: Dense.from_numpy([1.0, 2.0]), ValueError, r"got \(2,\)"),
        (lambda: Dense.from_numpy(np.ones((0, 3))), ValueError, r"got \(0, 3\)"),
        (lambda: Dense.from_numpy(np.ones((2, 3)), np.ones((3, 1))), ValueError,
         r"biases of shape \(1, 3\) or \(3,\) for weights of shape \(2, 3\), got \(3, 1\)"),
        (lambda: Dense.from_numpy(np.ma.masked_equal([[1.0, 2.0]], 2)), TypeError,
         r"real numbers, got an array with masked values"),
        (lambda: Dense.from_numpy([["a"]]), TypeError, r"got an array with dtype <U1"),
    ],
)  # fmt: skip
def test_bad_input_is_explained(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_other_failures_keep_their_own_words():
    layer = Dense(2, 3)
    layer.register_parameter("weight", nn.Parameter(torch.ones(3, 4)))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        layer(torch.ones(5, 2))


def test_generator_of_another_device_is_explained(device):
    if device.type == "cpu":
        pytest.skip("needs an accelerator, whose tensors a CPU generator cannot fill")
    with pytest.raises(ValueError, match=f"expects a torch.Generator on {device.type}, got one on"):
        Dense(2, 3, device=device, generator=torch.Generator())


def test_layers_script_trace_and_export():
    model, input = classifier(2, 3, 3), torch.randn(5, 2)
    expected = model(input)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch 2.13 deprecates it
        scripted = torch.jit.script(model)
    assert torch.equal(scripted(input), expected)
    assert torch.equal(torch.fx.symbolic_trace(model)(input), expected)
    assert torch.equal(torch.export.export(model, (input,)).module()(input), expected)


def test_a_subclass_draws_from_the_generator_of_the_constructor_or_of_its_own():
    class Noisy(Dense):
        def reset_parameters(self, generator=None):
            super().reset_parameters(generator)
            nn.init.constant_(self.bias, generator.randn())

    class Ones(Dense):
        def reset_parameters(self, generator=None):
            nn.init.ones_(self.weight)

    stream = np.random.RandomState(0)
    expected = Dense(2, 3, generator=stream).weight
    noisy = Noisy(2, 3, generator=np.random.RandomState(0))
    assert torch.equal(noisy.weight, expected)
    assert noisy.bias.tolist() == [np.float32(stream.randn())] * 3
    ones = Ones(2, 3, generator=np.random.RandomState(1))
    Dense.reset_parameters(ones, np.random.RandomState(0))
    assert torch.equal(ones.weight, expected)
    assert not any("generator" in name for name in vars(ones))
