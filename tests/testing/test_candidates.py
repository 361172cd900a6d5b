import importlib.util

import numpy as np
import pytest
import torch
from torch import nn

from torchnnfs import Dense, ReLU, Softmax, classifier, compare
from torchnnfs.testing import Candidate, MissingExtraError, candidates
from torchnnfs.testing.candidates import KINDS, choose

CPU = [torch.device("cpu")]


@pytest.fixture(params=[name for name in KINDS if name != "eager"])
def name(request):
    kind = KINDS[request.param]
    absent = [each for each in kind.packages if importlib.util.find_spec(each) is None]
    if absent:
        pytest.skip(f"{request.param} needs {', '.join(absent)}")
    return request.param


def judge(model, input, *chosen, **named):
    return compare(model, input, candidates=list(chosen), controls=False, **named)


def test_every_candidate_agrees_on_the_chapter(name, chapter):
    dtypes = [torch.float32, torch.float64, torch.float16]
    comparison = judge(*chapter, *choose([name], CPU, dtypes))
    assert comparison.ok, comparison
    last = comparison.rows[-1]
    assert (last.candidate, last.label) == (name, "3 Softmax")
    assert last.chained_ratio > 0
    assert (last.isolated_ratio is None) == (name != "numpy")


def test_every_candidate_can_be_rejected(name, chapter):
    """What a candidate computes is judged, not what the model would have computed."""
    model, points = chapter
    other = classifier(2, 3, 3)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other[0].weight[0, 0] *= 1.01
    assert not judge(model, points, name, reference=other).ok


def test_deeper_networks_without_softmax(name):
    model = nn.Sequential(Dense(5, 16), ReLU(), Dense(16, 16), ReLU(), nn.Linear(16, 4, bias=False))
    comparison = judge(model, torch.randn(30, 5), name)
    assert comparison.ok, comparison
    model = nn.Sequential(Dense(5, 16), nn.Identity(), nn.LogSoftmax(-1))
    if name == "fused":
        with pytest.raises((TypeError, ValueError), match=r"fuse expects .* got Identity"):
            judge(model, torch.randn(30, 5), name)
        return
    comparison = judge(model, torch.randn(30, 5), name)
    assert comparison.ok, comparison


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense, self.softmax = Dense(3, 3), Softmax()

    def forward(self, x):
        return self.softmax(x + self.dense(x))


def test_compilers_follow_any_composition():
    comparison = judge(Residual(), torch.randn(9, 3), "exported", "compiled")
    assert comparison.ok, comparison
    assert [row.label for row in comparison.rows] == ["(output) Residual"] * 2
    assert {row.basis for row in comparison.rows} == {"own float64 run"}


def test_jax_follows_plain_chains_alone():
    pytest.importorskip("jax")
    with pytest.raises(ValueError, match=r"jax follows plain chains of dense, relu.*\(Residual\)"):
        judge(Residual(), torch.randn(9, 3), "jax")
    with pytest.raises(ValueError, match=r"jax follows plain chains .* got tanh \(Tanh\)"):
        judge(nn.Sequential(Dense(3, 3), nn.Tanh()), torch.randn(9, 3), "jax")


def test_a_candidate_computes_in_the_models_own_dtype():
    """A weight that is off by one part in a million of a million is seen in float64 alone."""
    model, other = (nn.Linear(3, 3, dtype=torch.float64) for _ in range(2))
    points = torch.randn(9, 3, dtype=torch.float64)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.weight *= 1 + 1e-12
    told = judge(model, points, Candidate(), reference=other)
    assert [row.dtype for row in told.rows] == ["float64", "float64"]  # the last: "the model"
    assert not told.rows[0].ok
    assert judge(model, points, Candidate(dtype=torch.float32), reference=other).rows[0].ok
    told = judge(nn.Linear(3, 3, dtype=torch.bfloat16), points.bfloat16(), "eager")
    assert [row.dtype for row in told.rows] == ["bfloat16"]


def test_choose():
    assert choose(["eager"], CPU) == [Candidate("eager", torch.device("cpu"))]
    assert choose(["eager"], CPU)[0].dtype is None
    assert choose(["eager", "eager", "numpy"], CPU, [torch.float64]) == [
        Candidate("eager", torch.device("cpu"), torch.float64),
        Candidate("numpy", torch.device("cpu")),
    ]
    known = "eager, fused, compiled, exported, onnx, jax, numpy"
    with pytest.raises(ValueError, match=f"unknown candidate 'tpu'; known are {known}"):
        choose(["tpu"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tpu",), "unknown candidate 'tpu'; known are eager, fused"),
        (("numpy", "cpu", torch.float64), r"numpy computes in float32, got torch.float64"),
        (("eager", "cpu", torch.int64), "eager computes in float64, float32, .* got torch.int64"),
        (("eager", "meta"), "candidates compute numbers, which the meta device does not have"),
        (("jax", "cuda"), "jax computes on the CPU here, got cuda"),
    ],
)
def test_what_a_candidate_cannot_be(arguments, words):
    with pytest.raises(ValueError, match=words):
        Candidate(*arguments)


def test_a_dtype_that_a_candidate_does_not_compute_in():
    pytest.importorskip("jax")
    with pytest.raises(ValueError, match="jax computes in float64, float32 alone"):
        choose(["jax"], CPU, [torch.bfloat16])


def test_what_is_missing_is_named(monkeypatch, chapter):
    monkeypatch.setattr(
        candidates.importlib.util,
        "find_spec",
        lambda name: None if name == "onnxscript" else importlib.util._find_spec_from_path(name),
    )
    with pytest.raises(MissingExtraError, match=r"onnx needs .*onnxscript.*'torchnnfs\[onnx\]'"):
        compare(*chapter, candidates=["onnx"])


def test_a_trace_holds_what_went_in_and_out():
    model = nn.Sequential(Dense(2, 3), ReLU())
    points = torch.randn(4, 2)
    trace = Candidate(dtype=torch.float32).run(model, points)
    assert (trace.name, trace.device, trace.dtype) == ("eager", "cpu", "float32")
    assert [(call.path, call.kind) for call in trace.calls] == [("0", "Dense"), ("1", "ReLU")]
    with torch.no_grad():
        assert np.array_equal(trace.calls[0].input, points.numpy())
        assert np.array_equal(trace.calls[0].output, model[0](points).numpy())
        assert np.array_equal(trace.output, model(points).numpy())
    assert np.array_equal(trace.again, trace.output)


def test_a_layer_that_is_called_twice_in_a_chain(name):
    shared = nn.ReLU()
    model = nn.Sequential(Dense(4, 4), shared, nn.Sequential(Dense(4, 4), shared), Dense(4, 3))
    with torch.no_grad():
        for layer in (model[0], model[2][0], model[3]):
            layer.weight.mul_(100)
    comparison = judge(model, torch.randn(20, 4), name)
    assert comparison.ok, comparison


def test_more_models_than_torch_compile_takes_for_one():
    with torch._dynamo.config.patch(recompile_limit=2):  # it is 8, and each takes a second
        for width in range(3):
            assert judge(classifier(2, 3 + width), torch.randn(5, 2), "compiled").ok


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.dense = Dense(2, 3)

    def forward(self, x):
        return self.dense(x), {"input": x}


@pytest.mark.parametrize("name", ["eager", "exported"])
def test_each_array_of_a_nested_output_has_its_row(name):
    comparison = judge(Two(), torch.randn(5, 2), name)
    assert comparison.ok, comparison
    labels = [row.label for row in comparison.rows]
    assert labels[-2:] == ["(output)[0] Two", "(output)[1]['input'] Two"]


def test_an_output_without_a_tensor_is_refused():
    class Net(Two):
        def forward(self, x):
            return str(self.dense(x).sum())

    with pytest.raises(TypeError, match=r"a model whose output is a tensor, or .*, got str"):
        judge(Net(), torch.randn(5, 2), "eager")


def test_a_model_that_cannot_be_exported_says_why():
    class Net(Two):
        def forward(self, x):
            return self.dense(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match=r"exported cannot compute this model: "):
        judge(Net(), torch.randn(5, 2), "exported")
