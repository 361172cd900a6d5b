import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from torchnnfs import Dense, ReLU, Softmax, classifier, compare, spiral
from torchnnfs.testing import Candidate, comparison, twins
from torchnnfs.testing.controls import BREAKS, UNSHIFTED
from torchnnfs.testing.measure import measure

#: What eight significant bits of every number cannot show of the chapter's network.
TOO_FINE_FOR_BFLOAT16 = {
    "a weight matrix times 1 + 1e-5",
    "constant output",
    "swapped classes",
    "parameters rounded to TF32",
    "parameters rounded to bfloat16",
    "parameters rounded to float16",
}


@pytest.fixture
def chapter(stream):
    points, _ = spiral(generator=stream)
    return classifier(2, 3, 3, generator=stream), points


def controls(model, input, dtype=torch.float32, device="cpu"):
    """The controls by name; none may be silent about its reason."""
    tried = compare(model, input, candidates=[Candidate("eager", device, dtype)]).controls
    assert [control.name for control in tried] == list(BREAKS)
    assert all(control.reason for control in tried)
    return {control.name: control for control in tried}


def outcomes(tried, outcome):
    return {name for name, control in tried.items() if control.outcome == outcome}


def test_every_broken_twin_of_the_chapters_network_is_rejected(chapter, device):
    tried = controls(*chapter, device=device)
    assert outcomes(tried, "rejected") == set(BREAKS)


@pytest.mark.parametrize("name", [name for name in BREAKS if name != UNSHIFTED])
def test_the_first_layer_that_diverges_is_the_broken_one(chapter, name):
    model, points = chapter
    twin = copy.deepcopy(model)
    path = BREAKS[name](twin, points)
    again = compare(twin, points, reference=model, candidates=["eager"], controls=False)
    control = controls(model, points)[name]
    assert again.first_divergence.layer == path == control.layer
    assert f"at layer {path} {type(model[int(path)]).__name__}" in control.reason


def test_a_softmax_that_does_not_subtract_the_maximum_is_judged_alone(chapter):
    model, points = chapter
    control = controls(model, points)[UNSHIFTED]
    assert control.outcome == "rejected"
    assert "Softmax" in control.reason
    twin = copy.deepcopy(model)
    BREAKS[UNSHIFTED](twin, points)  # on the small logits of this network it is right
    assert compare(twin, points, reference=model, candidates=["eager"]).ok


def test_what_bfloat16_cannot_show_is_called_indistinguishable(chapter, device):
    tried = controls(*chapter, torch.bfloat16, device)
    assert outcomes(tried, "indistinguishable") == TOO_FINE_FOR_BFLOAT16
    assert outcomes(tried, "rejected") == set(BREAKS) - TOO_FINE_FOR_BFLOAT16
    reason = "what rounding in bfloat16 explains"
    assert tried["swapped classes"].reason.endswith(reason)
    same = tried["parameters rounded to bfloat16"].reason
    assert same == "all parameters are such numbers already"


@pytest.mark.parametrize(
    ("model", "shape", "absent"),
    [
        (
            nn.Sequential(Dense(2, 3), Softmax()),
            (20, 2),
            dict.fromkeys(
                ("ReLU left out", "leaky ReLU, slope 1e-2", "leaky ReLU, slope 1e-4"),
                "no ReLU in this network",
            )
            | {"a weight matrix transposed": "no square weight matrix in this network"},
        ),
        (
            classifier(2, 5, 3),
            (20, 2),
            {"a weight matrix transposed": "no square weight matrix in this network"},
        ),
        (
            classifier(3, 3, 1),
            (20, 3),
            {
                "constant output": "rounding in float32 explains",  # 1 is right
                "swapped classes": "a single class",
            },
        ),
        (
            classifier(3, 3, 3),
            (3,),
            {"softmax over the wrong axis": "an input of one dimension has no other axis"},
        ),
        (
            Dense(3, 3),
            (20, 3),
            dict.fromkeys(list(BREAKS)[:3], "no ReLU in this network")
            | dict.fromkeys(
                ("softmax over the wrong axis", UNSHIFTED), "no Softmax in this network"
            ),
        ),
        (Dense(1, 1), (20, 1), {"a weight matrix permuted": "a single element"}),
        (Softmax(), (20, 3), {"parameters rounded to TF32": "no Linear in this network"}),
        (ReLU(), (20, 3), {"a bias of 1e-6": "no Linear in this network"}),
    ],
    ids=[
        "no ReLU",
        "no square matrix",
        "one class",
        "one dimension",
        "a dense layer alone",
        "one weight",
        "a softmax alone",
        "a ReLU alone",
    ],
)
def test_what_a_network_lacks_cannot_be_broken(model, shape, absent):
    torch.manual_seed(3)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    tried = controls(model, torch.randn(shape))
    assert not outcomes(tried, "passed")
    assert outcomes(tried, "rejected")
    for name, reason in absent.items():
        assert tried[name].outcome == "indistinguishable"
        assert tried[name].reason.endswith(reason)


def test_a_chapter_without_relu_or_square_matrix_is_broken_in_all_other_ways(chapter):
    _, points = chapter
    tried = controls(classifier(2, 3), points)
    assert len(outcomes(tried, "rejected")) == len(BREAKS) - 4
    tried = controls(classifier(2, 5, 3), points)
    assert outcomes(tried, "indistinguishable") == {"a weight matrix transposed"}


def test_an_input_that_cannot_show_it_is_the_reason(chapter):
    model, _ = chapter
    result = compare(model, torch.zeros(4, 2), candidates=["eager"])
    tried = {control.name: control for control in result.controls}
    for name in ("ReLU left out", "a weight matrix permuted", "parameters rounded to TF32"):
        assert tried[name].outcome == "indistinguishable"
        assert tried[name].reason == "on this input it computes the same"
    assert tried[UNSHIFTED].reason == "its logits here are all zero"
    assert "Indistinguishable here: ReLU left out (on this input it" in str(result)


def test_without_controls_there_are_none(chapter):
    model, points = chapter
    result = compare(model, points, candidates=["eager"], controls=False)
    assert result.controls == ()
    assert "Controls:" not in str(result)


def test_there_are_no_controls_where_only_an_output_is_judged(chapter):
    model, points = chapter
    other = nn.Sequential(model, nn.Identity())
    result = compare(model, points, reference=other, candidates=["eager"])
    assert result.ok
    assert result.controls == ()


def test_controls_need_no_eager_candidate_and_leave_the_model_alone(chapter):
    model, points = chapter
    before = copy.deepcopy(model.state_dict())
    result = compare(model, points, candidates=["numpy"])
    assert all(control.outcome == "rejected" for control in result.controls)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(layer) for layer in model)


def test_a_judge_that_accepts_everything_gives_itself_away(chapter, monkeypatch):
    # Whatever float32 computes is accepted; what float64 does shows that it should not be.
    def lenient(value, exact, bound, dtype):
        measured = measure(value, exact, bound, dtype)
        single = np.array_equal(value, value.astype(np.float32), equal_nan=True)
        return measured._replace(ratio=0.0) if single else measured

    monkeypatch.setattr(comparison, "measure", lenient)
    result = compare(*chapter, candidates=["eager"])
    assert result.ok
    passed = [control.name for control in result.controls if control.outcome == "passed"]
    assert passed == [name for name in BREAKS if name != UNSHIFTED]  # float64 can compute that one
    text = str(result)
    assert "Controls: 0 of 14 deliberately broken twins of this network rejected." in text
    assert "THIS RUN PROVES LITTLE: broken twins passed as correct: ReLU left out (off by" in text


def widen(monkeypatch, kinds, change):
    for kind in kinds:
        twin = twins._TWINS[kind]
        wide = dataclasses.replace(
            twin, bound=lambda *args, bound=twin.bound, **named: change(bound(*args, **named))
        )
        monkeypatch.setitem(twins._TWINS, kind, wide)


def test_bounds_without_end_prove_little(chapter, monkeypatch):
    # Not even an overflow is told from a right result then.
    widen(monkeypatch, [nn.Linear, nn.ReLU, nn.Softmax], lambda bound: bound + float("inf"))
    result = compare(*chapter, candidates=["eager"])
    assert not any(control.outcome == "rejected" for control in result.controls)
    assert "THIS RUN PROVES LITTLE" in str(result)


def test_bounds_a_million_times_too_wide_reject_less(chapter, monkeypatch):
    """The bounds say what a control could have shown: how tight they are, the campaign shows."""
    widen(monkeypatch, [nn.Linear], lambda bound: bound * 1e6 + 1e-3)
    tried = compare(*chapter, candidates=["eager"]).controls
    assert {control.outcome for control in tried} == {"rejected", "indistinguishable"}
    assert sum(control.outcome == "rejected" for control in tried) < len(tried)


def sizes(monkeypatch):
    """Rows on which each control is tried, by its name."""
    seen = {}
    original = comparison._try

    def spy(name, model, input, *rest):
        seen.setdefault(name, []).append(len(input))
        return original(name, model, input, *rest)

    monkeypatch.setattr(comparison, "_try", spy)
    return seen


def test_of_a_large_input_some_rows_are_enough_to_reject(chapter, monkeypatch):
    model, _ = chapter
    points, _ = spiral(2001, 3)
    seen = sizes(monkeypatch)
    tried = controls(model, points)
    assert outcomes(tried, "rejected") == set(BREAKS)
    assert set(map(tuple, seen.values())) == {(858,)}  # every seventh


def test_what_some_rows_cannot_show_all_rows_may(monkeypatch):
    points = torch.rand(3000, 2) + 1
    points[1] = -1
    seen = sizes(monkeypatch)
    tried = controls(ReLU(), points)
    assert seen["ReLU left out"] == [1000, 3000]
    assert tried["ReLU left out"].outcome == "rejected"
    assert seen["swapped classes"] == [1000]


def test_a_long_vector_is_one_sample(monkeypatch):
    seen = sizes(monkeypatch)
    tried = controls(ReLU(), torch.randn(3000))
    assert tried["ReLU left out"].outcome == "rejected"
    assert set(map(tuple, seen.values())) == {(3000,)}
