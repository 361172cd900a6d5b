import copy
import json
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import nnfs
import numpy as np
import pytest
import torch
from nnfs.datasets import spiral_data
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from torchnnfs import Dense, ReLU, Softmax, book, book_numpy, classifier, compare, spiral
from torchnnfs.book import Activation_ReLU, Activation_Softmax, Layer_Dense
from torchnnfs.testing import Candidate
from torchnnfs.testing.layers.softmax import softmax_bound
from torchnnfs.testing.precision import PRECISIONS

ROOT = Path(__file__).parents[1]


@pytest.fixture
def chapter(stream, device):
    """The dialect's network on the book's data, and both as the book's NumPy objects have them."""
    points, _ = spiral(generator=stream, device=device)
    model = book.from_torch(classifier(2, 3, 3, generator=stream, device=device))
    return model, points


def float64_emulated(x, layers):
    """The book's arithmetic in NumPy alone: float64 dot products and exp, rounded to float32."""
    for weights, biases in layers[:-1]:
        x = (x.astype(np.float64) @ weights.astype(np.float64)).astype(np.float32) + biases
        x = np.maximum(0, x)
    weights, biases = layers[-1]
    x = (x.astype(np.float64) @ weights.astype(np.float64)).astype(np.float32) + biases
    shifted = x - x.max(axis=1, keepdims=True)
    powers = np.exp(shifted.astype(np.float64)).astype(np.float32)
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("init", [nnfs.init, lambda: np.random.seed(0)], ids=["nnfs", "seed"])
def test_the_books_cells(init, capsys):
    """What a reader writes, with NumPy as it is and with nnfs.init()."""
    before, state = (np.dot, np.zeros, np.eye, np.random.randn), np.random.get_state()
    try:
        init()
        points, _ = spiral_data(samples=100, classes=3)
        points = points.astype(np.float32)
        dense1, activation1 = Layer_Dense(2, 3), Activation_ReLU()
        dense2, activation2 = Layer_Dense(3, 3), Activation_Softmax()
        assert dense1.output is None
        dense1.forward(points)
        activation1.forward(dense1.output)
        dense2.forward(activation1.output)
        activation2.forward(dense2.output)
        print(activation2.output[:5])
    finally:
        np.dot, np.zeros, np.eye, np.random.randn = before
        np.random.set_state(state)
    assert capsys.readouterr().out == (
        "[[0.33333334 0.33333334 0.33333334]\n"
        " [0.33333316 0.3333332  0.33333364]\n"
        " [0.33333287 0.3333329  0.33333418]\n"
        " [0.3333326  0.33333263 0.33333477]\n"
        " [0.33333233 0.3333324  0.33333528]]\n"
    )


def test_all_rows_are_the_float64_emulation(chapter):
    model, points = chapter
    layers = [(layer.weights, layer.biases) for layer in model[::2]]
    expected = float64_emulated(points.cpu().numpy(), layers)
    assert expected.dtype == np.float32
    np.testing.assert_array_equal(model(points).detach().cpu().numpy(), expected)


@pytest.mark.parametrize("size", [1, 2, 7, 32, 300])
def test_a_batch_is_its_rows(chapter, size):
    model, points = chapter
    whole = model(points)
    parts = torch.cat([model(part) for part in points.split(size)])
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("classes", [1, 2, 7, 8, 9, 16, 100, 128, 129, 255, 1000])
def test_wide_rows_split_and_sum_as_numpy_does(classes, device):
    rng = np.random.RandomState(classes)
    logits = rng.randn(40, classes).astype(np.float32) * 5
    whole = Activation_Softmax().forward(torch.from_numpy(logits).to(device)).cpu()
    rows = [Activation_Softmax().forward(torch.from_numpy(row).to(device)).cpu() for row in logits]
    assert torch.equal(whole, torch.stack(rows))
    shifted = logits - logits.max(axis=1, keepdims=True)
    powers = np.exp(shifted.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(whole, powers / powers.sum(axis=1, keepdims=True))


@pytest.mark.parametrize("width", [1, 5, 100, 784])
def test_wide_dot_products_run_from_the_first_input_to_the_last(width, device):
    rng = np.random.RandomState(width)
    x, layer = rng.randn(20, width).astype(np.float32), Layer_Dense(width, 4, device=device)
    layer.biases = rng.randn(1, 4)
    w = layer.weights.astype(np.float64)
    total = np.zeros((20, 4))
    for i in range(width):
        total += x[:, i : i + 1] * w[i]
    expected = total.astype(np.float32) + layer.biases
    np.testing.assert_array_equal(layer.forward(x).detach().cpu().numpy(), expected)
    np.testing.assert_array_equal(layer.forward(x[3]).detach().cpu().numpy(), expected[3])


def test_threads_make_no_difference(chapter):
    model, _ = chapter
    if next(model.parameters()).device.type != "cpu":
        pytest.skip("threads are the CPU's")
    points = torch.randn(50_000, 2)
    threads = torch.get_num_threads()
    outputs = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            outputs.append(model(points))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_exp_is_right_to_a_unit_in_the_last_place(device):
    x = torch.cat([-torch.logspace(-12, 2.8, 200_001), torch.linspace(-745, 0, 200_001)]).double()
    expected = np.exp(x.numpy())
    ours = book.exp(x.to(device)).cpu().numpy()
    # NumPy's own float64 exp is off by up to a unit itself: a wider type tells ours alone.
    exact = np.exp(x.numpy().astype(np.longdouble))
    assert (np.abs(ours - exact) <= 1.25 * np.spacing(expected)).all()
    np.testing.assert_array_equal(ours.astype(np.float32), expected.astype(np.float32))
    special = torch.tensor([0.0, -0.0, -1e308, -np.inf, np.nan], dtype=torch.float64)
    assert book.exp(special)[:4].tolist() == [1, 1, 0, 0]
    assert book.exp(special)[4].isnan()


def test_softmax_follows_numpys_dtypes():
    softmax = Activation_Softmax()
    assert softmax.forward([[1, 2, 3]]).dtype == torch.float64
    assert softmax.forward(np.float32([[1, 2, 3]])).dtype == torch.float32
    assert softmax.forward(torch.tensor([[1, 2]])).dtype == torch.float64
    assert softmax.forward(torch.ones(1, 2, dtype=torch.bfloat16)).dtype == torch.float32
    assert Activation_ReLU().forward([1, -2]).tolist() == [1, 0]
    assert Layer_Dense(2, 3).forward([[1, 2]]).dtype == torch.float32


def test_softmax_of_special_values_is_torchs():
    inf, nan = float("inf"), float("nan")
    rows = torch.tensor(
        [[nan, 0, 0], [inf, 0, 0], [-inf, -inf, -inf], [-inf, 0, 0], [3e38, -3e38, 0]]
    )
    ours, theirs = Activation_Softmax().forward(rows), Softmax()(rows)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())


def test_output_is_kept_without_history(chapter):
    model, points = chapter
    result = model[0].forward(points)
    assert result.requires_grad
    assert result.device == points.device
    assert isinstance(model[0].output, np.ndarray)
    np.testing.assert_array_equal(model[0].output, result.detach().cpu().numpy())
    np.testing.assert_array_equal(np.argmax(model[0].output, axis=1).shape, (300,))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(points), model(points))


def test_writing_to_the_output_does_not_reach_the_gradient():
    softmax, x = Activation_Softmax(), torch.randn(4, 3, requires_grad=True)
    (expected,) = torch.autograd.grad(softmax.forward(x)[:, 0].sum(), x)
    p = softmax.forward(x)
    softmax.output[:] = 0
    (gradient,) = torch.autograd.grad(p[:, 0].sum(), x)
    assert torch.equal(gradient, expected)
    assert not softmax.output.any()


def test_transformations_leave_nothing_behind():
    model = nn.Sequential(Layer_Dense(2, 3), Activation_ReLU(), Activation_Softmax())
    points = torch.randn(4, 2)
    expected = model(points)
    assert torch.equal(torch.func.vmap(model)(points), expected)
    assert model[2].output is None
    copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of autograd.Function
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert compiled(points).shape == (4, 3)
    copy.deepcopy(model)


def test_odd_arrays_and_empty_ones():
    x, layer = np.random.RandomState(0).randn(5, 2), Layer_Dense(2, 3)
    forwards = layer.forward(x)
    assert torch.equal(layer.forward(x[::-1]), forwards.flip(0))
    assert torch.equal(layer.forward(x.astype(">f8")), forwards)
    assert layer.forward(np.zeros((0, 2))).shape == (0, 3)
    assert Activation_Softmax().forward(np.zeros((3, 0))).shape == (3, 0)
    layer.weights = nn.Parameter(torch.ones(2, 3))
    assert layer.weights.tolist() == [[1, 1, 1], [1, 1, 1]]
    assert book.from_torch(nn.Linear(2, 3, bias=False)).biases is None
    layer.bfloat16()
    assert layer.weights.dtype == np.float32


def test_weights_and_biases_are_the_books(device):
    np.random.seed(3)
    layer = Layer_Dense(2, 3, device=device)
    drawn = np.random.RandomState(3).randn(2, 3).astype(np.float32) * np.float32(0.01)
    np.testing.assert_array_equal(layer.weights, drawn)
    assert (layer.weights.shape, layer.biases.shape) == ((2, 3), (1, 3))
    best = layer.weights.copy()
    step = 0.05 * np.random.randn(2, 3)
    layer.weights += step
    layer.biases += 0.5
    np.testing.assert_array_equal(
        layer.weights, (best + step.astype(np.float64)).astype(np.float32)
    )
    assert layer.bias.tolist() == [0.5, 0.5, 0.5]
    layer.weights = best
    np.testing.assert_array_equal(layer.weight.detach().cpu().numpy(), best.T)
    layer.biases = [1, 2, 3]
    assert layer.biases.tolist() == [[1, 2, 3]]
    layer.weights = torch.ones(2, 3)
    assert layer.weights.sum() == 6
    if device.type == "cpu":
        layer.weights[0, 0] = 7  # shared memory, as the book's array is
        assert layer.weight[0, 0] == 7


def test_weights_come_from_numpys_global_stream():
    with book_numpy():
        inside = Layer_Dense(2, 3).weights
    state = np.random.get_state()
    try:
        np.random.seed(0)
        outside = Layer_Dense(2, 3)
        np.testing.assert_array_equal(outside.weights, inside)
        assert np.random.randn() == np.random.RandomState(0).randn(7)[-1]
        outside.reset_parameters(np.random.RandomState(0))
        np.testing.assert_array_equal(outside.weights, inside)
    finally:
        np.random.set_state(state)


def test_meta_device_draws_nothing():
    state = np.random.get_state()[1].copy()
    assert Layer_Dense(2, 3, device="meta").weight.is_meta
    assert (np.random.get_state()[1] == state).all()


def test_moves_between_devices(device):
    model = nn.Sequential(Layer_Dense(2, 3), Activation_ReLU(), Activation_Softmax())
    expected = model(torch.ones(4, 2))
    moved = model.to(device)(torch.ones(4, 2, device=device))
    assert moved.device.type == device.type
    assert torch.equal(moved.cpu(), expected)


def test_gradients_flow_and_agree_with_the_plain_modules(chapter):
    model, points = chapter
    plain = book.to_torch(model)
    target = torch.randint(3, (300,), device=points.device)
    gradients = []
    for network in (model, plain):
        x = points.clone().requires_grad_()
        loss = -network(x)[torch.arange(300), target].log().mean()
        gradients.append(torch.autograd.grad(loss, [*network.parameters(), x]))
    for ours, theirs in zip(*gradients, strict=True):
        # Sums of up to 300 terms, with the terms' own few roundings.
        scale = theirs.abs().max()
        assert (ours - theirs).abs().max() <= 300 * 2.0**-24 * scale
        assert scale > 0


def test_softmax_passes_gradcheck():
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Activation_Softmax(), x)
    assert torch.autograd.gradgradcheck(Activation_Softmax(), x)
    layer = Layer_Dense(3, 2)
    with torch.no_grad():
        layer.weight.mul_(100)
    x = torch.randn(5, 3, requires_grad=True)
    (ours,) = torch.autograd.grad(layer.forward(x).sum(), x)
    np.testing.assert_allclose(ours, layer.weights.sum(1) * np.ones((5, 1)), rtol=1e-6)


def test_the_judge_accepts_the_dialect(chapter, device):
    model, points = chapter
    comparison = compare(model, points, candidates=[Candidate("eager", device)])
    assert comparison.ok
    assert [row.bit_equal for row in comparison.rows[:3]] == [1, 1, 1]


def test_conversion_both_ways_keeps_the_parameters(chapter):
    model, points = chapter
    model(points)
    plain = book.to_torch(model)
    assert [type(layer) for layer in plain] == [Dense, ReLU, Dense, Softmax]
    assert "_output" not in vars(plain[0])
    again = book.from_torch(plain)
    assert torch.equal(again(points), model(points))
    torchs = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Sequential(nn.Softmax(-1)))
    dialect = book.from_torch(torchs.double())
    assert type(dialect[2][0]) is Activation_Softmax
    assert dialect[0].weight.dtype == torch.float32
    assert torch.equal(dialect[0].weight, torchs[0].weight.float())
    assert type(torchs[0]) is nn.Linear  # the original is left alone
    handle = plain[0].register_forward_hook(lambda *_: None)
    assert handle.id in book.from_torch(plain)[0]._forward_hooks


class Reader:
    """A layer as a reader of the book writes it."""

    def __init__(self, weights, biases):
        self.weights, self.biases = weights, biases


def test_from_a_readers_own_objects(device):
    rng = np.random.RandomState(0)
    dense = Reader(rng.randn(2, 3), rng.randn(1, 3))
    layer = book.from_numpy(dense, device=device)
    assert type(layer) is Layer_Dense
    assert layer.weight.device.type == device.type
    np.testing.assert_array_equal(layer.weights, dense.weights.astype(np.float32))
    np.testing.assert_array_equal(layer.biases, dense.biases.astype(np.float32))
    relu = type("Activation_ReLU", (), {})()
    softmax = type("Activation_Softmax", (), {})()
    model = book.from_numpy([dense, relu, softmax])
    assert [type(each) for each in model] == [Layer_Dense, Activation_ReLU, Activation_Softmax]


class NoFloat64(torch.Tensor):
    """A tensor of a device that has no float64."""

    def double(self):
        raise TypeError("the MPS framework doesn't support float64")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Layer_Dense(0, 3), ValueError, "in_features to be at least 1, got 0"),
        (lambda: Layer_Dense(2, 3).forward([[1, 2, 3]]), ValueError,
         r"Layer_Dense\(n_inputs=2\) expects a last dimension of 2, got inputs of shape \(1, 3\)"),
        (lambda: Layer_Dense(2, 3).forward(1.0), ValueError, r"got inputs of shape \(\)"),
        (lambda: Layer_Dense(2, 3).forward([["a", "b"]]), TypeError, "real numbers, got an"),
        (lambda: Activation_Softmax().forward(3.0), ValueError, "at least one dimension"),
        (lambda: setattr(Layer_Dense(2, 3), "weights", np.ones((3, 2))), ValueError,
         r"weights expects shape \(2, 3\), got \(3, 2\)"),
        (lambda: setattr(Layer_Dense(2, 3), "biases", np.ones((3, 1))), ValueError,
         r"biases expects shape \(1, 3\) or \(3,\), got \(3, 1\)"),
        (lambda: book.from_numpy(3), TypeError, "got one of class int"),
        (lambda: book.from_numpy("ab"), TypeError, "got one of class str"),
        (lambda: Layer_Dense(2, 3).forward(1j * torch.ones(2)), TypeError, "with dtype complex64"),
        (lambda: setattr(Layer_Dense(2, 3), "weights", nn.Linear(2, 3)), TypeError, "real numbers"),
        (lambda: setattr(weight_norm(Layer_Dense(2, 3)), "weights", np.ones((2, 3))), ValueError,
         "weights cannot be assigned while the layer is parametrized"),
        (lambda: setattr(book.from_torch(nn.Linear(2, 3, bias=False)), "biases", [1, 2, 3]),
         ValueError, "without bias expects no biases"),
        (lambda: book.from_torch(nn.Softmax(0)), ValueError, "along the last dimension, got Softm"),
        (lambda: Activation_Softmax().forward(torch.ones(2).as_subclass(NoFloat64)), TypeError,
         "Activation_Softmax computes in float64, which cpu does not have; move"),
        (lambda: Layer_Dense(2, 3).forward(torch.ones(2).as_subclass(NoFloat64)), TypeError,
         "Layer_Dense computes in float64, which cpu does not have; move"),
    ],
)  # fmt: skip
def test_bad_input_is_explained(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_page_whatever_numpy_uses():
    """In a process of its own, since NumPy reads the variable when it is imported."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "torchnnfs", "page"],
        env={**os.environ, "NPY_DISABLE_CPU_FEATURES": "X86_V3 AVX2 AVX512F"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "torchnnfs.book on cpu prints what the book prints, digit for digit." in run.stdout


RECORDS = sorted((ROOT / "results").glob("bits-*.json"))


def test_there_is_a_record():
    assert RECORDS


@pytest.mark.parametrize("record", RECORDS, ids=lambda path: path.stem)
def test_the_bits_are_those_of_every_recorded_device(record, device):
    """Golden files of `scripts/gpu_check.py`: whatever device wrote them, the bits are these."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from gpu_check import bits
    finally:
        sys.path.pop(0)
    assert bits(device) == json.loads(record.read_text())["bits"]


def test_the_bounds_hold_for_the_dialect_at_any_scale(device):
    rng = np.random.RandomState(1)
    for scale in (1e-3, 1, 30):
        logits = (rng.randn(100, 10) * scale).astype(np.float32)
        ours = Activation_Softmax().forward(torch.from_numpy(logits).to(device)).cpu().numpy()
        exact = torch.from_numpy(logits).double().softmax(-1).numpy()
        bound = softmax_bound(logits.astype(float), np.zeros(logits.shape), PRECISIONS["float32"])
        assert (np.abs(ours - exact) <= bound).all()
