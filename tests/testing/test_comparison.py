import json

import numpy as np
import pytest
import torch
from torch import nn

from torchnnfs import Dense, ReLU, Softmax, classifier, compare
from torchnnfs.testing import Candidate, assert_agrees


class LeakyReLU(ReLU):
    def __init__(self, slope):
        super().__init__()
        self.slope = slope

    def forward(self, input):
        return torch.where(input > 0, input, self.slope * input)


class Constant(Softmax):
    def forward(self, input):
        return torch.full_like(input, 1 / 3)


class Doubling(nn.Sequential):
    """A chain by its type, but its layers do not get what the chain says."""

    def forward(self, input):
        for layer in self:
            input = layer(input)
            if isinstance(layer, ReLU):
                input = input * 2
        return input


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(2, 2)
        self.branch = nn.ModuleDict({"dense": Dense(2, 2), "relu": ReLU(inplace=True)})
        self.unused = ReLU()

    def forward(self, input):
        input = input + self.branch["relu"](self.branch["dense"](input))
        return torch.softmax(self.shared(self.shared(input)), -1)


def edit(model, change):
    twin = classifier(2, 3, 3)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        change(twin)
    return twin


def test_the_chapter_agrees_on_every_device(chapter, device, dtype):
    model, points = chapter
    if device.type == "mps" and dtype == torch.float64:
        pytest.skip("MPS has no float64")
    comparison = compare(model, points, candidates=[Candidate("eager", device, dtype)])
    assert comparison.ok, comparison
    assert [row.layer for row in comparison.rows] == ["0", "1", "2", "3"]
    assert [row.kind for row in comparison.rows] == ["Dense", "ReLU", "Dense", "Softmax"]
    assert all(row.chained_ratio is not None for row in comparison.rows)
    assert max(row.bound_ratio for row in comparison.rows) > 0.05


def test_default_candidates(chapter):
    comparison = compare(*chapter)
    names = dict.fromkeys((row.candidate, row.dtype) for row in comparison.rows)
    assert list(names) == [("eager", "float32"), ("numpy", "float32")]
    assert comparison.ok
    assert comparison.first_divergence is None
    assert comparison.environment["torch"] == torch.__version__


def test_the_books_numpy_is_exact_up_to_softmax(chapter):
    rows = compare(*chapter, candidates=["numpy"]).rows
    # Accumulated in float64 and rounded once; the biases are zero.
    assert [row.bit_equal for row in rows[:3]] == [1, 1, 1]
    assert max(row.max_ulp for row in rows[:3]) <= 0.5


@pytest.mark.parametrize("slope", [1, 1e-2, 1e-4, -1e-4])
def test_a_relu_that_leaks_is_found(chapter, slope):
    model, points = chapter
    wrong = edit(model, lambda twin: twin.__setitem__(1, LeakyReLU(slope)))
    first = compare(wrong, points).first_divergence
    assert (first.layer, first.kind) == ("1", "LeakyReLU")
    assert first.worst.expected == 0
    assert first.worst.value * slope < 0


def test_a_constant_output_is_found(chapter):
    model, points = chapter
    wrong = edit(model, lambda twin: twin.__setitem__(3, Constant()))
    assert compare(wrong, points).first_divergence.kind == "Constant"


@pytest.mark.parametrize(
    ("change", "layer"),
    [
        (lambda twin: twin[0].weight.mul_(1.1), "0"),
        (lambda twin: twin[0].weight.mul_(1 + 1e-6), "0"),
        (lambda twin: twin[0].bias.fill_(1e-6), "0"),
        (lambda twin: twin[2].weight.copy_(twin[2].weight.T.clone()), "2"),
        (lambda twin: twin[2].weight.copy_(twin[2].weight[[1, 0, 2]]), "2"),
        (lambda twin: twin[2].bias[1].fill_(1e-7), "2"),
        (lambda twin: twin[2].weight.copy_(twin[2].weight.bfloat16()), "2"),
    ],
    ids=[
        "weights 10 % up",
        "weights 1e-6 up",
        "bias",
        "transposed",
        "permuted",
        "one bias",
        "bf16",
    ],
)
def test_wrong_parameters_are_found(chapter, change, layer):
    model, points = chapter
    wrong = edit(model, change)
    comparison = compare(wrong, points, reference=model)
    assert not comparison.ok
    assert comparison.first_divergence.layer == layer
    assert comparison.first_divergence.isolated_ratio > 1
    assert comparison.first_divergence.chained_ratio > 1
    assert compare(model, points, reference=model).ok


def test_chained_finds_what_happens_between_layers(chapter):
    model, points = chapter
    wrong = Doubling(*model)
    assert compare(wrong, points).ok  # no plain chain: each layer by itself is right
    wrong.forward = None
    plain = nn.Sequential(*model)
    plain[2].register_forward_pre_hook(lambda layer, args: (args[0] * 2,))
    first = compare(plain, points).first_divergence
    assert first.layer == "2"
    assert first.isolated_ratio <= 1 < first.chained_ratio


def test_any_composition(device):
    model = Residual()
    comparison = compare(model, torch.randn(7, 2), candidates=[Candidate("eager", device), "numpy"])
    assert comparison.ok, comparison
    layers = [row.layer for row in comparison.rows]
    calls = ["branch.dense", "branch.relu", "shared", "shared (call 2)", "(output)"]
    assert layers == calls * 2
    assert [row.chained_ratio is None for row in comparison.rows] == ([True] * 4 + [False]) * 2
    assert comparison.unjudged == ("(output) Residual",)
    assert comparison.verdict.startswith("AGREES AS FAR AS JUDGED: ")
    assert [row.basis for row in comparison.rows] == (["rounding"] * 4 + ["own float64 run"]) * 2
    assert comparison.notes[0] == "Never called, so not judged: unused."
    assert all(note in str(comparison) for note in comparison.notes)


def test_nested_chains_and_single_layers_are_chains():
    nested = nn.Sequential(
        nn.Sequential(Dense(2, 4), ReLU()), nn.Sequential(Dense(4, 3)), Softmax()
    )
    for model in (nested, nested[0][0]):
        rows = compare(model, torch.randn(5, 2)).rows
        assert all(row.chained_ratio is not None for row in rows)
    assert rows[0].layer == ""


def test_in_place_layers_are_measured_on_what_they_got():
    model = nn.Sequential(Dense(2, 5), ReLU(inplace=True), Dense(5, 3))
    assert compare(model, torch.randn(20, 2)).ok


@pytest.mark.parametrize("shape", [(2,), (1, 2), (3, 4, 2)])
def test_any_number_of_dimensions(shape):
    assert compare(classifier(2, 3, 3), torch.randn(shape)).ok
    assert compare(Softmax(0), torch.randn(shape)).ok


def test_a_model_that_works_in_place_leaves_the_input_alone():
    points = torch.randn(9, 2)
    kept = points.clone()
    assert compare(nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 3)), points).ok
    assert torch.equal(points, kept)
    doubling = classifier(2, 3, 3)
    doubling.register_forward_pre_hook(lambda model, args: args[0].mul_(2) and None)
    with pytest.raises(ValueError, match="raised RuntimeError: Boolean value"):  # the hook's own
        compare(doubling, points)


def test_hooks_on_the_whole_model_are_judged(chapter):
    model, points = chapter
    before, after = (nn.Sequential(*model) for _ in range(2))
    before.register_forward_pre_hook(lambda model, args: (args[0].mul_(2),))
    assert compare(before, points).first_divergence.layer == "0"
    after.register_forward_hook(lambda model, args, output: output * 2)
    assert compare(after, points).first_divergence.layer == "(output)"


def test_layers_may_be_called_by_keyword():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = Dense(2, 3)

        def forward(self, x):
            return self.dense(input=x)

    assert compare(Keyword(), torch.randn(4, 2)).ok


def test_a_module_that_bypasses_its_layers_is_judged_by_a_reference(chapter):
    model, points = chapter

    class Functional(nn.Module):
        def __init__(self, slope):
            super().__init__()
            self.first, self.second, self.slope = model[0], model[2], slope

        def forward(self, x):
            x = nn.functional.leaky_relu(self.first(x), self.slope)
            return torch.softmax(self.second(x), -1)

    assert compare(Functional(0.0), points, reference=model).ok
    comparison = compare(Functional(0.01), points, reference=model)
    assert comparison.first_divergence.layer == "(output)"
    assert comparison.notes[0].startswith("The reference judges the output alone: where the mode")
    alone = compare(Functional(0.01), points)
    assert alone.ok  # it is itself, and the verdict says that this proves little
    assert alone.unjudged == ("(output) Functional",)
    assert "Nothing independent judged (output) Functional" in alone.verdict


def test_nnfs_init_does_not_reach_the_judge(chapter):
    import nnfs

    model, points = chapter
    before, state = (np.dot, np.zeros, np.eye, np.random.randn), np.random.get_state()
    target = torch.randint(3, (len(points),))
    keywords = {"backward": True, "target": target}
    keywords["candidates"] = [Candidate(dtype=torch.float64), "eager", "numpy"]
    expected = compare(model, points, **keywords)
    try:
        nnfs.init()
        found = compare(model, points, **keywords)
        assert found.ok
        assert found.rows == expected.rows
    finally:
        np.dot, np.zeros, np.eye, np.random.randn = before
        np.random.set_state(state)


def test_the_numpy_candidate_is_the_books_numpy(chapter):
    from torchnnfs import book_numpy

    model, points = chapter
    with book_numpy():
        x = points.numpy()
        w, b = model[0].weight.detach().numpy().T, model[0].bias.detach().numpy()
        expected = np.dot(x, w) + b
    comparison = compare(model[:1], points, candidates=["numpy"])
    np.testing.assert_array_equal(comparison.output, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_types_that_round_more_than_once_agree(dtype):
    half = [Candidate(dtype=dtype)]
    assert compare(nn.Softmax(0), torch.randn(50, 3) * 3, candidates=half).ok
    strided = torch.randn(5, 4, 64).transpose(0, 1)
    layer = nn.Linear(64, 100)
    assert compare(layer, strided, candidates=half).ok
    with torch.no_grad():
        layer.bias.copy_(-layer(strided).reshape(-1, 100)[0])
    assert compare(layer, strided, candidates=half).ok


def test_extreme_logits(device):
    logits = torch.tensor([[0.0, -1.0, -1e11], [3e38, 0.0, -3e38]])
    assert compare(Softmax(), logits, candidates=[Candidate("eager", device), "numpy"]).ok

    class Half(Softmax):
        def forward(self, input):
            return torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], device=input.device)

    assert not compare(Half(), logits, candidates=[Candidate("eager", device)]).ok
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Softmax(-1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 1, 1], [0, 0, 0]]))
    assert compare(model, torch.tensor([[1e11, 1000, -1e11]])).ok


def test_where_the_dtype_may_overflow_there_is_no_verdict_and_a_note():
    model = nn.Linear(1, 1)
    with torch.no_grad():
        model.weight.fill_(2)
        model.bias.fill_(-3e38)
    comparison = compare(model, torch.full((1, 1), 2e38))  # 4e38 overflows, 1e38 does not
    assert not comparison.ok
    assert comparison.first_divergence is None
    assert comparison.verdict.startswith("NOT JUDGED: eager on cpu in float32, layer Linear: ")
    some = compare(model, torch.tensor([[2e38], [0.0]]))
    assert some.ok
    assert (
        "float32 may overflow or cancel out in layer Linear: 1 elements of eager" in some.notes[0]
    )

    class Zero(nn.Linear):
        def forward(self, input):
            return 0 * input

    zero = Zero(1, 1, dtype=torch.float64)
    with torch.no_grad():
        zero.weight.fill_(1e300)
    comparison = compare(
        zero, torch.full((1, 1), 1e10), candidates=[Candidate(dtype=torch.float64)]
    )
    assert not comparison.ok


def test_layer_names_are_printed_as_they_are():
    model = nn.ModuleDict({"a[/b]": Dense(2, 3)})
    model.forward = lambda x: model["a[/b]"](x)
    wrapped = nn.Sequential(nn.Sequential(Dense(2, 3)))
    wrapped[0].add_module("a[/b]", ReLU())
    assert "0.a[/b] ReLU" in str(compare(wrapped, torch.randn(3, 2)))


def test_the_model_is_left_alone(chapter):
    model, points = chapter
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = [repr(vars(layer)) for layer in model.modules()]  # hooks are among them
    kept = points.clone()
    compare(model, points, candidates=[Candidate(dtype=torch.float16)])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype == torch.float32
    assert torch.equal(points, kept)
    assert [repr(vars(layer)) for layer in model.modules()] == attributes


def test_overflow_is_right_where_it_must_be():
    model = nn.Sequential(Dense(1, 2), ReLU(), Dense(2, 2))
    with torch.no_grad():
        model[0].weight.fill_(300)
    half = [Candidate(dtype=torch.float16)]
    points = torch.tensor([[1.0], [300.0]])  # 90 000 is beyond float16
    assert compare(model, points, candidates=half).ok
    with torch.no_grad():
        model[0].bias[1] = -60000
    reference = nn.Sequential(Dense(1, 2), ReLU(), Dense(2, 2))
    reference.load_state_dict(model.state_dict())
    with torch.no_grad():
        reference[0].bias.fill_(-60000)
    assert not compare(model, points, reference=reference, candidates=half).ok


def test_what_an_overflow_hides_is_noted():
    def network(weight):
        return nn.Sequential(*(Dense.from_numpy(np.float32([[w]])) for w in (300.0, weight)))

    half = [Candidate(dtype=torch.float16)]
    points = torch.full((1, 1), 300.0)
    comparison = compare(network(2e-4), points, reference=network(1e-4), candidates=half)
    assert any("float16 may overflow or cancel out in layer" in note for note in comparison.notes)
    assert comparison.first_divergence.candidate == "the model"  # float64 shows what was hidden


def test_an_infinity_of_the_wrong_sign_is_a_divergence():
    model = Dense.from_numpy(np.array([[300.0]], np.float32))
    wrong = Dense.from_numpy(np.array([[-300.0]], np.float32))
    half = [Candidate(dtype=torch.float16)]
    points = torch.full((1, 1), 300.0)
    assert compare(model, points, candidates=half).ok
    assert not compare(wrong, points, reference=model, candidates=half).ok


def test_a_wrong_shape_is_a_divergence():
    class Wide(Dense):
        def forward(self, input):
            return torch.cat([super().forward(input)] * 2, -1)

    row = compare(nn.Sequential(Wide(2, 2)), torch.randn(3, 2)).first_divergence
    assert row.bound_ratio == float("inf")


def test_nan_is_a_divergence():
    class Broken(Softmax):
        def forward(self, input):
            return torch.full_like(input, float("nan"))

    comparison = compare(nn.Sequential(Dense(2, 2), Broken()), torch.randn(3, 2))
    assert comparison.first_divergence.kind == "Broken"
    document = json.loads(comparison.to_json())
    row = document["rows"][document["first_divergence"]]
    assert (row["max_abs"], row["worst"]["value"]) == ("Infinity", "NaN")


def test_measures():
    model = nn.Sequential(Dense.from_numpy(np.array([[1.0]], np.float32), [1.0]))

    class Off(nn.Linear):
        def forward(self, input):
            output = super().forward(input)
            output[1] += 3 * 2.0**-22  # three units in the last place of 2 to 4
            return output

    off = nn.Sequential(Off(1, 1))
    off.load_state_dict(model.state_dict())
    (row,) = compare(off, torch.ones(4, 1), candidates=["eager"]).rows
    assert row.max_abs == 3 * 2.0**-22
    assert row.max_ulp == 3
    assert row.bit_equal == 0.75
    assert (row.worst.index, row.worst.value, row.worst.expected) == ((1, 0), 2 + 3 * 2.0**-22, 2)
    # gamma(2) of |1||1| + |1|: 3 ulp of 2 are 12 u of 1, over 2 u * 2
    assert row.bound_ratio == pytest.approx(3, rel=1e-6)
    assert not row.ok


def test_json_holds_every_row(chapter):
    comparison = compare(*chapter)
    document = json.loads(comparison.to_json())
    assert document["ok"] is True
    assert document["first_divergence"] is None
    assert len(document["rows"]) == 8
    row = document["rows"][0]
    assert row["bound_ratio"] == comparison.rows[0].bound_ratio
    assert set(row) >= {"candidate", "device", "dtype", "layer", "max_abs", "max_ulp", "bit_equal"}


def test_assert_agrees_shows_the_table(chapter):
    model, points = chapter
    assert_agrees(model, points)
    wrong = edit(model, lambda twin: twin.__setitem__(1, LeakyReLU(0.01)))
    with pytest.raises(AssertionError, match=r"(?s)bits equal.*DISAGREES: eager .* 1 LeakyReLU"):
        assert_agrees(wrong, points)


NAN = torch.tensor([[1.0, float("nan")]])


@pytest.mark.parametrize(
    ("model", "input", "keywords", "error", "message"),
    [
        (lambda x: x, NAN, {}, TypeError, "model to be a torch.nn.Module, got builtins.function"),
        (Dense(2, 3), [[1.0, 2.0]], {}, TypeError, "of tensors, got builtins.float; call"),
        (Dense(2, 3), np.ones((1, 2)), {}, TypeError, "of tensors, got numpy.ndarray"),
        (Dense(2, 3), (), {}, TypeError, "of tensors, got builtins.tuple; call"),
        (Dense(2, 3), torch.ones(1, 2) * 1j, {}, TypeError, "real numbers, got torch.complex64"),
        (Dense(2, 3), torch.ones(0, 2), {}, ValueError, r"at least one sample.*\(0, 2\)"),
        (Dense(2, 3), NAN, {}, ValueError, r"got nan in input at \(0, 1\).*\(1 of 2 are"),
        (Dense(2, 3), -1 / torch.zeros(1, 2), {}, ValueError, r"got -inf in input at \(0, 0\)"),
        (Dense(2, 3), torch.ones(1, 2, device="meta"), {}, ValueError, "on the meta device"),
        (Dense(2, 3, device="meta"), torch.ones(1, 2), {}, ValueError, "'weight' on the meta dev"),
        (Dense(2, 3), torch.ones(1, 2), {"reference": 3}, TypeError, "a function, .* got 3"),
        (Dense(2, 3), torch.ones(1, 2), {"reference": []}, ValueError, "at least one object"),
        (Dense(2, 3), torch.ones(1, 2), {"reference": [3]}, TypeError, "number 0 .* got 3"),
        (Dense(2, 3), torch.ones(1, 2), {"reference": {"a": 3}}, ValueError, "the model, got 'a'"),
        (nn.Softmax(), torch.ones(1, 2), {}, ValueError, "Softmax to name its dim"),
        (Dense(2, 3), torch.ones(1, 2), {"candidates": ["jit"]}, ValueError, "candidate 'jit'; kn"),
        (Dense(2, 3), torch.ones(1, 2), {"candidates": "eager"}, ValueError, "a list of candidat"),
        (Dense(2, 3), torch.ones(1, 2), {"candidates": []}, ValueError, "a list of candidates"),
    ],
)  # fmt: skip
def test_bad_input_is_explained(model, input, keywords, error, message):
    with pytest.raises(error, match=message):
        compare(model, input, **keywords)


def test_parameters_that_are_no_numbers_are_refused():
    model = Dense(2, 3)
    with torch.no_grad():
        model.weight[1, 0] = float("nan")
    with pytest.raises(ValueError, match=r"got nan in model parameter 'weight' at \(1, 0\)"):
        compare(model, torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"got inf in input at \(0, 0\) in float16"):
        compare(Dense(2, 3), torch.full((1, 2), 1e5), candidates=[Candidate(dtype=torch.float16)])


def test_a_candidate_that_cannot_compute_is_refused():
    with pytest.raises(ValueError, match=r"numpy computes in float32, got torch.float64"):
        Candidate("numpy", dtype=torch.float64)
    with pytest.raises(ValueError, match="onnx computes on the CPU here, got cuda"):
        Candidate("onnx", "cuda")
    with pytest.raises(ValueError, match="which the meta device does not have"):
        Candidate(device="meta")


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match=r"float64, float32, bfloat16, float16, got torch.int8"):
        Candidate(dtype=torch.int8)


@pytest.mark.parametrize("seed", range(12))
def test_random_correct_networks_agree(seed, device):
    """A short share of the long campaign: no false alarm, whatever the scale."""
    rng = np.random.RandomState(seed)
    widths = rng.randint(1, 65, size=rng.randint(2, 6))
    model = classifier(*widths.tolist(), generator=rng)
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.mul_(100 * 10 ** rng.uniform(-3, 1))
            layer.bias.copy_(torch.from_numpy(rng.randn(layer.out_features)))
    points = torch.from_numpy(rng.randn(rng.randint(1, 400), widths[0]) * 10 ** rng.uniform(-2, 2))
    dtypes = [torch.float64, torch.float32, torch.bfloat16]
    comparison = compare(model, points, candidates=[Candidate("eager", device, d) for d in dtypes])
    assert comparison.ok, comparison


def test_a_reference_that_is_wired_otherwise_is_a_divergence():
    first, second = Dense(4, 4), Dense(4, 3)
    with torch.no_grad():
        first.weight.mul_(100)

    class Wired(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    points = torch.randn(20, 4)
    comparison = compare(nn.Sequential(first, second), points, reference=Wired())
    assert comparison.first_divergence.layer == "(output)"
    assert compare(Wired(), points, reference=nn.Sequential(first, ReLU(), second)).ok


def test_rounding_between_the_layers_is_no_divergence():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = Dense(4, 3)

        def forward(self, x):
            return self.dense(x - x.mean(0))

    for dtype in (torch.float32, torch.bfloat16):
        candidates = [Candidate(dtype=dtype)]
        assert compare(Centred(), torch.randn(100, 4) + 100, candidates=candidates).ok


def test_a_lazy_layer_is_refused_before_its_first_call():
    from torchnnfs import LazyDense

    with pytest.raises(ValueError, match="got 'weight' that has no shape yet; call the model once"):
        compare(LazyDense(3), torch.ones(2, 2))


def test_log_softmax_of_half_types_and_of_large_spreads(dtype):
    for scale in (0.01, 1, 10):
        logits = torch.randn(300, 3) * scale
        comparison = compare(nn.LogSoftmax(-1), logits, candidates=[Candidate(dtype=dtype)])
        assert comparison.ok, comparison
    assert compare(nn.LogSoftmax(-1), torch.tensor([[3.3, 1.1, -2e10]])).ok
