import importlib.util

import pytest
import torch
from torch import nn

from torchnnfs import Dense, ReLU, Softmax, classifier, compare, spiral
from torchnnfs.testing import Candidate, MissingExtraError, candidates
from torchnnfs.testing.candidates import KINDS, choose


@pytest.fixture(params=[name for name in KINDS if name != "eager"])
def name(request):
    lack = missing(request.param)
    if lack:
        pytest.skip(lack)
    return request.param


@pytest.fixture
def chapter(stream):
    points, _ = spiral(generator=stream)
    return classifier(2, 3, 3, generator=stream), points


def test_every_candidate_agrees_on_the_chapter(name, chapter):
    model, points = chapter
    dtypes = [torch.float32, torch.float64, torch.float16]
    comparison = compare(model, points, candidates=choose([name], [torch.device("cpu")], dtypes))
    assert comparison.ok, comparison
    last = comparison.rows[-1]
    assert (last.candidate, last.layer, last.kind) == (name, "3", "Softmax")
    assert last.chained_ratio > 0
    assert (last.isolated_ratio is None) == (name != "numpy")


def test_every_candidate_can_be_rejected(name, chapter):
    """What a candidate computes is judged, not what the model would have computed."""
    model, points = chapter
    other = classifier(2, 3, 3)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other[0].weight[0, 0] *= 1.01
    assert not compare(model, points, reference=other, candidates=[name]).ok


def test_deeper_networks_without_softmax(name):
    model = nn.Sequential(Dense(5, 16), ReLU(), Dense(16, 16), ReLU(), nn.Linear(16, 4, bias=False))
    comparison = compare(model, torch.randn(30, 5), candidates=[name])
    assert comparison.ok, comparison
    model = nn.Sequential(Dense(5, 16), nn.Identity(), nn.LogSoftmax(-1))
    if name == "fused":
        with pytest.raises(TypeError, match=r"fuse expects .* got Identity"):
            compare(model, torch.randn(30, 5), candidates=[name])
        return
    comparison = compare(model, torch.randn(30, 5), candidates=[name])
    assert comparison.ok, comparison


def test_exported_and_compiled_follow_any_composition():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense, self.softmax = Dense(3, 3), Softmax()

        def forward(self, x):
            return self.softmax(x + self.dense(x))

    comparison = compare(Residual(), torch.randn(9, 3), candidates=["exported", "compiled"])
    assert comparison.ok, comparison
    assert [row.layer for row in comparison.rows] == ["(output)", "(output)"]
    if missing("jax") is None:
        with pytest.raises(ValueError, match="jax follows plain chains of layers, got Residual"):
            compare(Residual(), torch.randn(9, 3), candidates=["jax"])


def test_choose():
    cpu = [torch.device("cpu")]
    assert choose(["eager"], cpu) == [Candidate("eager", torch.device("cpu"))]
    assert choose(["eager", "eager", "numpy"], cpu, [torch.float64]) == [
        Candidate("eager", torch.device("cpu"), torch.float64),
        Candidate("numpy"),
    ]
    with pytest.raises(
        ValueError, match="unknown candidate 'tpu'; known are eager, fused, compiled"
    ):
        choose(["tpu"])


def test_what_is_missing_is_named(monkeypatch, chapter):
    monkeypatch.setattr(
        candidates.importlib.util,
        "find_spec",
        lambda name: None if name == "onnxscript" else importlib.util._find_spec_from_path(name),
    )
    with pytest.raises(MissingExtraError, match=r"onnx needs .*onnxscript.*'torchnnfs\[onnx\]'"):
        compare(*chapter, candidates=["onnx"])


def test_accuracy_of_both_sides_is_reported(chapter):
    text = str(compare(*chapter, candidates=["eager", "numpy"]))
    assert "Closest to float64 at the end, in float32: " in text
    assert "numpy on cpu (" in text


def test_a_layer_that_is_called_twice_in_a_chain(name):
    shared = nn.ReLU()
    model = nn.Sequential(Dense(4, 4), shared, nn.Sequential(Dense(4, 4), shared), Dense(4, 3))
    with torch.no_grad():
        for layer in (model[0], model[2][0], model[3]):
            layer.weight.mul_(100)
    comparison = compare(model, torch.randn(20, 4), candidates=[name])
    assert comparison.ok, comparison


def test_more_models_than_torch_compile_takes_for_one():
    for width in range(9):
        assert compare(classifier(2, 3 + width), torch.randn(5, 2), candidates=["compiled"]).ok


def test_an_output_that_is_no_tensor_is_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = Dense(2, 3)

        def forward(self, x):
            return self.dense(x), x

    with pytest.raises(TypeError, match="a model whose output is a tensor, got tuple"):
        compare(Net(), torch.randn(5, 2))
