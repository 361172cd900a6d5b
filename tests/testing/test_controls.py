import copy

import pytest
import torch
from torch import nn

from torchnnfs import Dense, ReLU, Softmax, classifier, compare
from torchnnfs.testing import Candidate, controls, register
from torchnnfs.testing.layers import dense
from torchnnfs.testing.layers.softmax import UNSHIFTED
from torchnnfs.testing.models import layer_of

OF_DENSE, OF_RELU, OF_SOFTMAX = (
    set(layer_of(layer).controls) for layer in (Dense(1, 1), ReLU(), Softmax())
)
AT_THE_END = {"constant output", "swapped classes"}
OF_THE_CHAPTER = OF_DENSE | OF_RELU | OF_SOFTMAX | AT_THE_END

#: What eight significant bits of every number cannot show of the chapter's network.
TOO_FINE_FOR_BFLOAT16 = {
    "a weight matrix times 1 + 1e-5",
    "swapped classes",
    "constant output",
}
#: What leaves numbers of eight significant bits as they are.
NOTHING_TO_BFLOAT16 = {f"parameters rounded to {name}" for name in ("TF32", "bfloat16", "float16")}


def tried(model, input, dtype=None, device="cpu"):
    """The controls by name; none may be silent about its reason."""
    found = compare(model, input, candidates=[Candidate("eager", device, dtype)]).controls
    assert all(control.reason for control in found)
    by_name = {control.name: control for control in found}
    assert len(by_name) == len(found)
    return by_name


def outcomes(found, outcome):
    return {name for name, control in found.items() if control.outcome == outcome}


def test_every_broken_copy_of_the_chapters_network_is_rejected(chapter, device):
    found = tried(*chapter, device=device)
    assert set(found) == outcomes(found, "rejected") == OF_THE_CHAPTER


def test_the_layer_that_was_broken_is_the_first_that_differs(chapter):
    model, points = chapter
    for name, control in tried(model, points).items():
        assert control.layer in "0123"
        layer = model[int(control.layer)]
        assert name in {*layer_of(layer).controls, *AT_THE_END}
        if name != UNSHIFTED:
            assert control.reason.endswith(f" at layer {control.layer} {type(layer).__name__}")


def test_what_bfloat16_cannot_show_is_called_indistinguishable(chapter, device):
    found = tried(*chapter, torch.bfloat16, device)
    assert outcomes(found, "indistinguishable") == TOO_FINE_FOR_BFLOAT16
    assert set(found) == OF_THE_CHAPTER - NOTHING_TO_BFLOAT16
    assert found["swapped classes"].reason.endswith("of what rounding in bfloat16 explains")


@pytest.mark.parametrize(
    ("model", "shape", "expected"),
    [
        (
            nn.Sequential(Dense(2, 3), Softmax()),
            (20, 2),
            (OF_DENSE | OF_SOFTMAX | AT_THE_END) - {"a weight matrix transposed"},
        ),
        (classifier(2, 5, 3), (20, 2), OF_THE_CHAPTER - {"a weight matrix transposed"}),
        (classifier(3, 3, 1), (20, 3), OF_THE_CHAPTER - {"swapped classes"}),
        (classifier(3, 3, 3), (3,), OF_THE_CHAPTER - {"softmax over the wrong axis"}),
        (Dense(3, 3), (20, 3), OF_DENSE | AT_THE_END),
        (Softmax(), (20, 3), OF_SOFTMAX | AT_THE_END),
        (ReLU(), (20, 3), OF_RELU | AT_THE_END),
        (nn.GELU(), (20, 3), {"GELU in its other form"} | AT_THE_END),
    ],
    ids=[
        "no ReLU",
        "no square matrix",
        "one class",
        "one dimension",
        "a dense layer alone",
        "a softmax alone",
        "a ReLU alone",
        "another layer",
    ],
)
def test_only_what_fits_a_layer_that_is_there_is_tried(model, shape, expected):
    torch.manual_seed(4)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    found = tried(model, torch.randn(shape))
    assert set(found) == expected
    assert not outcomes(found, "passed")
    # A single class has the probability 1, whatever the logits are.
    right = {"constant output"} if "swapped classes" not in found else set()
    assert outcomes(found, "rejected") == expected - right


def test_layers_inside_a_forward_of_its_own_are_broken_too():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense, self.relu = Dense(3, 3), ReLU()

        def forward(self, x):
            return x + self.relu(self.dense(x))

    found = tried(Residual(), torch.randn(20, 3))
    assert set(found) == outcomes(found, "rejected") == OF_DENSE | OF_RELU


def test_a_model_without_known_layers_has_no_controls():
    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    assert tried(Twice(), torch.randn(20, 3)) == {}


def test_a_registered_layer_gets_a_control_of_its_own():
    class Square(nn.Module):
        def forward(self, input):
            return input * input

    register(Square, lambda x: x * x)
    found = tried(nn.Sequential(Dense(2, 3), Square()), torch.randn(20, 2))
    assert found["Square times 1 + 1e-3"].outcome == "rejected"
    assert found["Square times 1 + 1e-3"].layer == "1"


def test_an_input_that_cannot_show_it_is_the_reason(chapter):
    model, _ = chapter
    result = compare(model, torch.zeros(4, 2), candidates=["eager"])
    found = {control.name: control for control in result.controls}
    for name in ("ReLU left out", "a weight matrix permuted", "parameters rounded to TF32"):
        assert found[name].outcome == "indistinguishable"
        assert found[name].reason == "on this input it computes the same"
    assert found[UNSHIFTED].reason == "its logits here are all zero"
    assert not result.proves_little


def test_without_controls_there_are_none(chapter):
    result = compare(*chapter, candidates=["eager"], controls=False)
    assert result.controls == ()


def test_they_are_not_tried_where_the_model_itself_differs(chapter):
    model, points = chapter
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].weight *= 1.01
    result = compare(model, points, reference=other, candidates=["eager"])
    assert not result.ok
    assert result.controls == ()
    assert "Broken copies were not tried: the model itself differs." in result.notes


@pytest.mark.parametrize("names", [["eager"], ["numpy"]])
def test_they_leave_the_model_alone(chapter, names):
    model, points = chapter
    before = copy.deepcopy(model.state_dict())
    result = compare(model, points, candidates=names)
    assert {control.outcome for control in result.controls} == {"rejected"}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(layer) for layer in model)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model)


def test_a_judge_that_accepts_everything_gives_itself_away(chapter, monkeypatch):
    monkeypatch.setattr(controls, "judge", lambda trace, problem: [])
    result = compare(*chapter, candidates=["eager"])
    assert result.ok
    assert result.proves_little
    passed = {control.name for control in result.controls if control.outcome == "passed"}
    assert passed == OF_THE_CHAPTER - {UNSHIFTED}  # that one is not judged by its rows
    assert all("times what rounding explains" in each.reason for each in result.controls[:6])
    assert "proves little" in str(result).lower()


def test_bounds_a_million_times_too_wide_reject_nothing(chapter):
    """The bounds say what a control could have shown: how tight they are, the campaign shows."""

    def wide(*args, **arguments):
        return 1e6 * dense.dense_bound(*args, **arguments) + 1e-3

    register(nn.Linear, dense.dense, wide)
    model, points = chapter
    result = compare(model[:1], points, candidates=["eager"])
    assert result.ok
    (control, *others) = result.controls
    assert control.name == "Linear times 1 + 1e-3"
    assert {each.outcome for each in [control, *others]} <= {"indistinguishable", "rejected"}
    assert control.outcome == "indistinguishable"
    assert control.reason.endswith("of what rounding in float32 explains")
