import copy
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchnnfs import Dense, ReLU, Softmax, book, book_numpy, classifier, compare, spiral
from torchnnfs.testing import Candidate
from torchnnfs.testing.precision import PRECISIONS
from torchnnfs.testing.reference import answer


class Own(nn.Module):
    """What most people write: a forward of their own."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return torch.softmax(self.last(torch.relu(self.first(x)) + x[..., :1]), -1)


class Twice(Own):
    """Softmax twice: a mistake that its own float64 run makes, too."""

    def forward(self, x):
        return torch.softmax(super().forward(x), -1)


class Unscaled(Own):
    def forward(self, x):
        return super().forward(x) * 1.0001


class Logits(Own):
    def forward(self, x):
        return self.last(torch.relu(self.first(x)) + x[..., :1])


@pytest.fixture
def model():
    return Own()


@pytest.fixture
def points():
    return torch.randn(20, 3)


def same_weights(kind, model):
    other = kind()
    other.load_state_dict(model.state_dict())
    return other


def formula(model, dtype=None):
    """The model in NumPy."""
    w, b, v, c = (each.detach().numpy() for each in model.parameters())

    def compute(x):
        x = x.astype(dtype or x.dtype)
        hidden = np.maximum(0, x @ w.T.astype(x.dtype) + b) + x[..., :1]
        powers = np.exp(hidden @ v.T + c - np.max(hidden @ v.T + c, axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True)

    return compute


class Returns:
    def __init__(self, compute):
        self.compute = compute

    def forward(self, inputs):
        return self.compute(inputs)


class Sets(Returns):
    def forward(self, inputs):
        self.output = self.compute(inputs)


class Trains(Returns):
    def forward(self, inputs, training):
        assert training is False
        self.output = self.compute(inputs)


def numbers(model, points):
    return formula(model, np.float64)(points.numpy())


FORMS = {
    "a function in float64": lambda model, points: formula(model, np.float64),
    "an object that returns": lambda model, points: Returns(formula(model)),
    "an object that sets output": lambda model, points: Sets(formula(model)),
    "forward takes training": lambda model, points: Trains(formula(model)),
    "a list of one": lambda model, points: [Sets(formula(model))],
    "more objects than layers": lambda model, points: [
        *(Returns(lambda x: x) for _ in range(4)),
        Sets(formula(model)),
    ],
    "a tensor": lambda model, points: torch.from_numpy(numbers(model, points)),
    "a mapping to an array": lambda model, points: {"": numbers(model, points)},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_output_is_judged_whatever_the_form(form, model, points):
    told = compare(model, points, reference=form(model, points), controls=False)
    assert told.ok, told
    assert told.unjudged == ()
    assert told.rows[-1].label.startswith("(output)")
    for wrong in (Twice, Unscaled, Logits):
        wrong = same_weights(wrong, model)
        told = compare(wrong, points, reference=form(model, points), candidates=["eager"])
        assert told.first_divergence.layer == "(output)", told


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.relu(x) * 2,
        lambda x: x.relu() * 2,
        lambda x: F.linear(x, 2 * torch.eye(3)).clamp(min=0),
        lambda x: nn.Sequential(nn.ReLU(), nn.Flatten())(x) * 2,
    ],
    ids=["torch's functions", "methods of tensors", "torch.nn.functional", "layers"],
)
def test_a_reference_that_takes_tensors_alone(function, points):
    class TwiceReLU(nn.Module):
        def forward(self, x):
            return 2 * torch.relu(x)

    told = compare(TwiceReLU(), points, reference=function)
    assert told.ok, told
    assert not compare(TwiceReLU(), points, reference=lambda x: function(x) * 1.001).ok


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
def test_a_readers_own_network(inside):
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
    assert {row.layer for row in comparison.rows} == {"0", "1", "2", "3", "(output)"}
    theirs[2].weights = theirs[2].weights * np.float32(1.00001)
    assert compare(model, points, reference=theirs).first_divergence.layer == "2"
    theirs[1].forward = lambda inputs: setattr(theirs[1], "output", inputs)
    assert compare(model, points, reference=theirs).first_divergence.layer == "1"


def test_objects_whose_number_is_not_that_of_the_layers():
    """They are run in order, and their end is judged."""
    dense, points = Dense(2, 3), torch.randn(9, 2)
    theirs = [Layer_Dense(2, 3), Activation_ReLU()]
    theirs[0].weights, theirs[0].biases = (each.detach().numpy().T for each in dense.parameters())
    model = nn.Sequential(dense, ReLU(), nn.Identity())
    told = compare(model, points, reference=theirs, candidates=["eager"])
    assert told.ok, told
    words = "The reference has 2 objects for 3 layers: it judges the output alone."
    assert words in told.notes
    assert told.rows[-1].layer == "(output)"
    model[2] = nn.Flatten(0)
    told = compare(model, points, reference=theirs, candidates=["eager"])
    assert told.first_divergence.layer == "(output)"
    assert "shape (27,) where" in told.first_divergence.reason
    assert "(9, 3)" in told.first_divergence.reason


def test_a_readers_float64_network():
    weights = np.random.RandomState(0).randn(2, 3)
    theirs = [Layer_Dense(2, 3), Activation_ReLU()]
    theirs[0].weights = weights
    model = nn.Sequential(Dense.from_numpy(weights, np.zeros((1, 3))), ReLU()).double()
    points = torch.randn(30, 2, dtype=torch.float64)
    assert compare(model, points, reference=theirs).ok
    theirs[0].weights = weights + 1e-12
    assert not compare(model, points, reference=theirs).ok


def test_the_books_dialect():
    stream = np.random.RandomState(0)
    theirs = [book.Layer_Dense(2, 3), book.Activation_ReLU()]
    model = nn.Sequential(Dense(2, 3), ReLU())
    points = torch.from_numpy(stream.randn(9, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.as_tensor(np.asarray(theirs[0].weights)).T)
    told = compare(model, points, reference=theirs)
    assert told.ok, told
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-4
    assert compare(model, points, reference=theirs).first_divergence.layer == "0"


def test_places_within_the_model(points):
    """Functions and arrays for places inside; the output is judged where it is named."""

    class Nested(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh())
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.encoder(x))

    model = Nested()
    w, b, v, c = (each.detach().numpy().astype(float) for each in model.parameters())
    hidden = np.tanh(points.numpy().astype(float) @ w.T + b)
    end = hidden @ v.T + c
    right = {"encoder.1": hidden, "encoder.0": lambda x: x @ w.T + b, "": end}
    told = compare(model, points, reference=right, candidates=["eager"])
    assert told.ok, told
    assert told.unjudged == ()
    for path, wrong in (
        ("encoder.1", hidden * 1.0001),
        ("encoder.0", lambda x: x @ w.T),
        ("", end + 1e-4),
    ):
        told = compare(model, points, reference={**right, path: wrong}, candidates=["eager"])
        assert told.first_divergence.layer == (path or "(output)"), told
    del right[""]
    told = compare(model, points, reference=right, candidates=["eager"])
    assert told.ok
    assert told.unjudged == ("(output) Nested",)


def test_a_reference_with_several_outputs():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(2, 3), nn.Linear(2, 1)

        def forward(self, x):
            return {"one": self.one(x), "two": self.two(x)}

    model, points = Heads(), torch.randn(5, 2)
    w, b, v, c = (each.detach().numpy() for each in model.parameters())
    right = compare(model, points, reference=lambda x: {"one": x @ w.T + b, "two": x @ v.T + c})
    assert right.ok, right
    told = compare(model, points, reference=lambda x: {"one": x @ w.T + b, "two": x @ v.T})
    assert told.first_divergence.layer == "(output)['two']"
    told = compare(model, points, reference=lambda x: x @ w.T + b)
    assert told.first_divergence.layer.startswith("(output)")


def test_several_inputs():
    class Both(nn.Module):
        def forward(self, a, b):
            return a * b

    a, b = torch.randn(2, 5)
    assert compare(Both(), (a, b), reference=lambda a, b: a * b).ok
    assert not compare(Both(), (a, b), reference=lambda a, b: a * b + 1e-5).ok
    assert compare(Both(), {"a": a, "b": b}, reference=lambda *, a, b: a * b).ok


def test_the_less_accurate_side_is_named(model, points):
    wrong = same_weights(Unscaled, model)
    told = compare(wrong, points, reference=formula(model), candidates=["eager"])
    assert "in float64 this is no rounding" in told.verdict
    rough = formula(model, np.float64)
    told = compare(model, points, reference=lambda x: rough(x) + 1e-3, candidates=["eager"])
    assert "in float64 this is no rounding" in told.verdict


class Nothing:
    def forward(self, inputs):
        pass


class NoNumbers:
    def forward(self, inputs):
        return "three"


@pytest.mark.parametrize(
    ("reference", "error", "words"),
    [
        (3, TypeError, "compare expects as reference for the output a torch.nn.Module, .*, got 3"),
        ("relu", TypeError, "compare expects as reference for the output .*, got 'relu'"),
        (nn.Linear, TypeError, "compare expects as reference for the output .*Linear"),
        ([], ValueError, "compare expects a reference with at least one object, got an empty list"),
        ([lambda x: x, None], TypeError, "compare expects as reference number 1 .*, got None"),
        ([Nothing()], TypeError, "Nothing.forward number 0 to return an array or to set output"),
        (Nothing(), TypeError, "Nothing.forward for the output to return .*got neither"),
        (NoNumbers(), TypeError, "to give arrays of numbers, got 'three'"),
        (
            {"middle": np.ones(3)},
            ValueError,
            "places in the model, got 'middle'; there are '', '0'",
        ),
        ({"0": 3}, TypeError, "compare expects as reference at '0' .*, got 3"),
        (
            [Activation_ReLU(), Returns(lambda x: x @ np.ones((7, 2)))],
            ValueError,
            r"the reference number 1, Returns, cannot compute from an array of shape \(5, .\)",
        ),
    ],
)
def test_what_is_no_reference(reference, error, words):
    model = nn.Sequential(Dense(2, 3), Softmax())
    with pytest.raises(error, match=words):
        compare(model, torch.randn(5, 2), reference=reference)


def test_a_note_says_how_much_the_reference_allows(model, points):
    def trusted(x):
        return model.double()(torch.from_numpy(x)).detach().numpy().astype(x.dtype)

    same = copy.deepcopy(model)
    (note,) = [each for each in compare(same, points, reference=trusted).notes if "noticed" in each]
    allowed = float(re.search(r"an error up to (\S+) in the output", note)[1])
    for factor, agrees in ((0.1, True), (10, False)):
        shifted = compare(same, points, reference=lambda x, f=factor: trusted(x) + f * allowed)
        assert shifted.ok == agrees


def test_the_model_as_its_own_reference_is_named(model, points):
    notes = compare(model, points, reference=model, candidates=["eager"]).notes
    assert any("The reference is the model itself" in note for note in notes)


def test_numbers_of_float32_were_computed_in_float32_unless_they_are_simple():
    """Multiples of 1/256 are what people write down; float64 may hold no others by chance."""
    whole = np.arange(1.0, 10.0)
    for values, name in (
        (whole / 256, "float64"),
        (whole / 512, "float32"),
        (whole[:2] / 512, "float32"),
        (whole / 3, "float64"),
        (np.float32(whole / 3).astype(float), "float32"),
        (np.float32(whole / 3), "float32"),
        (torch.tensor(whole / 3).bfloat16(), "bfloat16"),
        (np.append(whole / 512, np.nan), "float32"),
        (np.append(whole, np.nan), "float64"),
        (np.append(whole / 512, 1e300), "float64"),
    ):
        assert answer(values, "here").precision is PRECISIONS[name]
    roughest = answer([np.float32(whole / 3), np.float16(whole / 3)], "here")
    assert roughest.precision is PRECISIONS["float16"]


def test_the_first_failure_of_a_reference_is_told(model):
    """It is tried in float64, in float32, and with tensors."""

    def fails(x):
        raise ValueError(f"no {type(x).__name__} of {x.dtype}")

    message = r"shape \(5, 3\): ValueError: no ndarray of float64$"
    with pytest.raises(ValueError, match=message):
        compare(model, torch.randn(5, 3), reference=fails)


def test_a_list_has_an_object_for_each_module_of_a_chain():
    class Double(nn.Module):
        def forward(self, x):
            return 2 * x

    functions = [lambda x: 2 * x, lambda x: np.maximum(x, 0)]
    chain = nn.Sequential(Double(), nn.ReLU())
    comparison = compare(chain, torch.randn(5, 3), reference=functions)
    assert comparison.ok
    assert not any("judges the output alone" in note for note in comparison.notes)
    comparison = compare(nn.ReLU(), torch.randn(5, 3), reference=functions[1:])
    assert not any("judges the output alone" in note for note in comparison.notes)
    comparison = compare(nn.ReLU(), torch.randn(5, 3), reference=functions[1:] * 2)
    assert any("2 objects for 1 layers: it judges the output" in note for note in comparison.notes)


def test_a_branch_on_an_exact_input_does_not_excuse_itself():
    class Flag(nn.Module):
        def __init__(self, wrong):
            super().__init__()
            self.layer, self.wrong = nn.Linear(3, 2), wrong

        def forward(self, x):
            out = self.layer(x)
            return torch.where((x[:, :1] > 1) | ((x[:, :1] == 1) & self.wrong), out * 100, out)

    x = torch.randn(60, 3)
    x[:, 0] = (torch.arange(60) % 2).float()
    for wrong in (False, True):
        model = Flag(wrong)
        w, b = (each.detach().double().numpy() for each in model.parameters())
        for input in (x, [x[:1], x[1:]]):
            assert compare(model, input, reference=lambda x, w=w, b=b: x @ w.T + b).ok != wrong


def test_the_note_is_about_all_batches_and_about_rough_references(points):
    model = nn.Linear(3, 2)

    def allowed(input, reference):
        notes = " ".join(compare(model, input, reference=reference, candidates=["eager"]).notes)
        return float(re.search(r"an error up to (\S+) in the output", notes)[1])

    twin = copy.deepcopy(model).double()

    def trusted(x):
        return twin(torch.from_numpy(x).double()).detach().numpy()

    large = torch.cat([points, points * 1e3])
    whole = allowed(large, trusted)
    assert allowed([points, points * 1e3], trusted) == pytest.approx(whole, rel=0.5)
    assert allowed([points], trusted) < whole
    rough = trusted(points.numpy()).astype(np.float16)
    assert 2**-12 < allowed(points, rough) < 1


def test_an_empty_mapping_is_no_reference(model, points):
    with pytest.raises(ValueError, match="at least one place, got an empty mapping"):
        compare(model, points, reference={})


def test_a_part_with_its_own_forward_has_a_row_beside_a_reference(model, points):
    whole = nn.Sequential(nn.Linear(3, 3), model)
    for reference in (None, whole[:], lambda x: whole(x)):
        rows = compare(whole, points, reference=reference, candidates=["eager"]).rows
        assert "1" in [row.layer for row in rows]


def test_a_module_that_cannot_take_the_input_says_which_layer():
    words = r"0 Linear raised RuntimeError: mat1 and mat2 .*the input was \(5, 2\) in torch.float32"
    narrow, wide = nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(4, 3))
    for model, reference in ((narrow, wide), (wide, None)):
        with pytest.raises(ValueError, match=words):
            compare(model, torch.ones(5, 2), reference=reference, candidates=["eager"])


class Huge(Own):
    def forward(self, x):
        return super().forward(x) * 1e30 * 1e30


def test_a_reference_of_another_kind_says_who_is_far_and_whose_run_it_was():
    torch.manual_seed(0)
    model, reference = Huge(), Own()
    reference.load_state_dict(model.state_dict())
    double = [Candidate("eager", dtype=torch.float64)]  # not the dtype of the parameters
    input, reference = torch.randn(4, 3), nn.Sequential(reference)
    first = compare(model, input, reference=reference, candidates=double).first_divergence
    assert "the reference's own float64 run gives" in first.reason
    assert "the candidate computes what the model's own layers and parameters give" in first.reason


class Parallel(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.a(x) + self.b(x)


def test_a_layer_that_gets_the_models_input_is_no_victim_of_another():
    torch.manual_seed(0)
    model, x = Parallel(), torch.randn(20, 3)
    recorded = {path: model.get_submodule(path)(x).detach().numpy() for path in ("a", "b")}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    found = compare(model, x, reference=recorded, candidates=["eager"], controls=False)
    assert [(row.layer, row.state) for row in found.rows[:2]] == [
        ("a", "differs"),
        ("b", "differs"),
    ]


@pytest.mark.parametrize(
    ("places", "where"),
    [
        ([], "; a reference that maps places in the model to arrays shows where"),
        ([("first", "array")], "; arrays at more places show where"),
        ([("first", "function")], "; a function at a place misses faults between places: arrays"),
    ],
)
def test_the_verdict_says_how_to_find_the_place(places, where):
    torch.manual_seed(0)
    right, wrong, x = Own(), Unscaled(), torch.randn(20, 3)
    wrong.load_state_dict(right.state_dict())
    weight, bias = (each.detach().numpy().astype(np.float64) for each in right.first.parameters())
    known = {"array": x.numpy() @ weight.T + bias, "function": lambda h: h @ weight.T + bias}
    exact = copy.deepcopy(right).double()
    reference = {path: known[kind] for path, kind in places}
    reference[""] = lambda x: exact(torch.from_numpy(x)).detach().numpy()
    found = compare(wrong, x, reference=reference, candidates=["eager"], controls=False)
    assert found.first_divergence.candidate == "the model"
    assert where in found.verdict


def test_a_shape_is_no_matter_of_rounding():
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(20, 3)
    found = compare(model, x, reference=lambda x: x[1:, :2], candidates=["eager"], controls=False)
    assert found.verdict.endswith("shape (20, 2) where the reference gives shape (19, 2).")


def test_several_recorded_arrays_are_cut_into_batches():
    class Two(Own):
        def forward(self, x):
            return self.first(x), self.first(x)[:, 0]

    model, x = Two(), torch.randn(20, 3)
    w, b = (each.detach().double().numpy() for each in model.first.parameters())
    y = x.double().numpy() @ w.T + b
    batches = list(x.split(7))
    assert compare(model, batches, reference=(y, y[:, 0]), controls=False).ok
    off = y[:, 0] + 1e-4 * (np.arange(20) == 19)
    found = compare(model, batches, reference=(y, off), controls=False).first_divergence
    assert (found.layer, found.worst.index) == ("(output)[1]", (19,))
    with pytest.raises(ValueError, match=r"the array for the output\[1\] to have a row for each"):
        compare(model, batches, reference=(y, y[:9, 0]), controls=False)


def test_the_excess_of_a_layer_with_a_recorded_array_is_its_own():
    torch.manual_seed(0)
    model, x = Parallel(), torch.randn(50, 3)
    coarse = model.a(x).detach().half()
    found = compare(model, x, reference={"a": coarse}, candidates=["eager"], controls=False)
    assert found.ok
    assert found.rows[0].excess < 2
