"""The models that people have: own forwards, references of any form, any signature."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from torchnnfs import Dense, book, classifier, compare, spiral
from torchnnfs.testing import Candidate, assert_agrees


@pytest.fixture(scope="module")
def points():
    return spiral(generator=np.random.RandomState(0))[0]


@pytest.fixture
def model():
    """The chapter's network with weights a hundred times as large: its softmax says something."""
    model = classifier(2, 16, 3, generator=np.random.RandomState(0))
    with torch.no_grad():
        for layer in model[::2]:
            layer.weight.mul_(100)
    return model


def numpy_of(model):
    """What the model computes, as somebody's NumPy code; in the precision of its input."""
    w, b, v, c = (each.detach().numpy() for each in model.parameters())

    def forward(x):
        z = np.maximum(x @ w.T + b, 0) @ v.T + c
        e = np.exp(z - z.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    return forward


class Own(nn.Module):
    """The chapter's network with a forward of its own, which may be wrong."""

    def __init__(self, model, wrong=""):
        super().__init__()
        self.first, self.last, self.wrong = model[0], model[2], wrong

    def forward(self, x):
        h = self.first(x)
        h = h if self.wrong == "no activation" else F.relu(h)
        if self.wrong == "dropout":
            h = F.dropout(h, 0.5)
        z = self.last(h)
        if self.wrong == "logits":
            return z
        p = F.softmax(z * (1.01 if self.wrong == "scaled" else 1), -1)
        if self.wrong == "noise":
            p = p + 1e-4 * torch.randn_like(p)
        if self.wrong == "chance":
            p = torch.rand(len(x), 3)
        return F.softmax(p, -1) if self.wrong == "softmax twice" else p


# An own forward.


@pytest.mark.parametrize("wrong", ["chance", "noise", "dropout"])
def test_two_runs_that_differ_are_no_agreement(model, points, wrong):
    comparison = compare(Own(model, wrong), points)
    assert not comparison.ok
    assert comparison.first_divergence.basis == "not the same twice"
    assert "two runs on the same input gave" in comparison.verdict


def test_an_own_forward_without_a_reference_is_no_plain_agreement(model, points):
    comparison = compare(Own(model), points)
    assert comparison.ok
    assert comparison.unjudged == ("(output) Own",)
    assert comparison.verdict.startswith("AGREES AS FAR AS JUDGED: ")
    assert "Nothing independent judged (output) Own" in comparison.verdict
    with pytest.warns(UserWarning, match=r"AGREES AS FAR AS JUDGED: .*\(output\) Own"):
        assert_agrees(Own(model), points)


WRONG = ["no activation", "scaled", "softmax twice", "logits"]
REFERENCES = {
    "a function": numpy_of,
    "an array": lambda model: numpy_of(model)(
        spiral(generator=np.random.RandomState(0))[0].numpy()
    ),
    "a mapping": lambda model: {"": numpy_of(model)},
    "one object": lambda model: type("Net", (), {"forward": lambda _, x: numpy_of(model)(x)})(),
    "objects": lambda model: [
        lambda x: np.maximum(x @ model[0].weight.detach().numpy().T, 0),
        lambda h: F.softmax(torch.from_numpy(h) @ model[2].weight.T, -1).numpy(),
        lambda p: p,
    ],
    "a module": lambda model: model,
}


@pytest.mark.parametrize("form", REFERENCES)
def test_any_reference_judges_an_own_forward(model, points, form):
    reference = REFERENCES[form](model)
    comparison = compare(Own(model), points, reference=reference, candidates=["eager"])
    assert comparison.ok, comparison
    assert comparison.unjudged == ()
    assert comparison.rows[-1].layer == "(output)"
    for wrong in WRONG:
        told = compare(Own(model, wrong), points, reference=reference, candidates=["eager"])
        assert not told.ok
        assert told.first_divergence.layer == "(output)"
        assert "the output of Own differs: " in told.verdict


def test_the_verdict_says_which_of_the_two_is_far_from_float64(model, points):
    def rough(x):
        return numpy_of(model)(x.astype(np.float16)).astype(np.float32)

    told = compare(Own(model), points, reference=rough, candidates=["eager"])
    assert "the candidate computes what the model's own layers" in told.verdict
    assert not compare(model, points, reference=rough).ok


def test_a_reference_in_less_precision_brings_its_own_rounding(model, points):
    double = model.double()
    single = numpy_of(classifier(2, 16, 3))

    def in_float32(x):
        return numpy_of(double)(x).astype(np.float32)

    assert compare(double, points.double(), reference=in_float32).ok
    assert not compare(double, points.double(), reference=single).ok


def test_places_within_a_model(model, points):
    w, b = model[0].weight.detach().numpy(), model[0].bias.detach().numpy()
    hidden = points.numpy() @ w.T + b
    for entry in (hidden, lambda x: x @ w.T + b):
        comparison = compare(Own(model), points, reference={"first": entry})
        assert comparison.ok, comparison
        assert comparison.unjudged == ("(output) Own",)
    for entry in (hidden * (1 + 1e-4), lambda x: x @ w.T * (1 + 1e-4) + b):
        told = compare(Own(model), points, reference={"first": entry})
        assert told.first_divergence.layer == "first"


# Signatures.


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.one, self.two = nn.Linear(2, 8), nn.Linear(8, 3), nn.Linear(8, 1)

    def forward(self, x, scale=None):
        h = torch.tanh(self.trunk(x)) * (1 if scale is None else scale)
        return {"classes": self.one(h), "rest": (self.two(h), h)}


def test_dictionaries_and_tuples_in_and_out(points):
    heads, scale = Heads(), torch.rand(len(points), 8)
    for given in (points, (points, scale), {"x": points, "scale": scale}):
        comparison = compare(heads, given, candidates=["eager", "numpy", "exported"])
        assert comparison.ok, comparison
        ends = [row.layer for row in comparison.rows if row.layer.startswith("(output)")]
        assert ends[:3] == ["(output)['classes']", "(output)['rest'][0]", "(output)['rest'][1]"]

    def reference(x):
        w = {name: p.detach().numpy() for name, p in heads.named_parameters()}
        h = np.tanh(x @ w["trunk.weight"].T + w["trunk.bias"])
        one = h @ w["one.weight"].T + w["one.bias"]
        return {"classes": one, "rest": (h @ w["two.weight"].T + w["two.bias"], h)}

    assert compare(heads, points, reference=reference).unjudged == ()
    swapped = compare(heads, points, reference=lambda x: reference(-x))
    assert swapped.first_divergence.layer == "(output)['classes']"
    fewer = compare(heads, points, reference=lambda x: reference(x)["classes"])
    assert "3 arrays where the reference gives 1 array" in fewer.verdict


def test_integers_recurrence_and_attention():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.gru = nn.Embedding(20, 8), nn.GRU(8, 8, batch_first=True)
            self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.head = nn.Linear(8, 20)

        def forward(self, tokens):
            h, _ = self.gru(self.embed(tokens))
            return self.head(self.block(h))

    comparison = compare(Language().eval(), torch.randint(20, (5, 7)))
    assert comparison.ok, comparison
    assert {"embed", "gru[0]", "gru[1]", "block.linear1", "head"} <= {
        r.layer for r in comparison.rows
    }
    assert compare(nn.GRU(2, 4), torch.randn(5, 3, 2)).unjudged == ("(output) GRU",)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_model_is_judged_in_its_own_dtype(model, points, dtype):
    comparison = compare(model.to(dtype), points)
    assert {row.dtype for row in comparison.rows} == {str(dtype)[6:]}
    other = classifier(2, 16, 3, dtype=dtype)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other[0].weight.mul_(1 + (1e-6 if dtype == torch.float64 else 1e-2))
    assert not compare(other, points, reference=model).ok


def test_layers_of_every_kind_stand_in_one_chain():
    convolution = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.LeakyReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3),
        nn.GELU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.LayerNorm(16),
        nn.Linear(16, 8),
        nn.Tanh(),
        nn.Dropout(),
        nn.Linear(8, 4),
        nn.Sigmoid(),
    ).eval()
    comparison = compare(convolution, torch.randn(6, 2, 12, 12))
    assert comparison.ok, comparison
    assert {row.basis for row in comparison.rows} == {"rounding"}
    assert all(row.chained_ratio is not None for row in comparison.rows)
    assert comparison.verdict.startswith("AGREES: ")
    outcomes = [control.outcome for control in comparison.controls]
    assert outcomes.count("rejected") > len(outcomes) - 3
    assert "passed" not in outcomes


def test_a_layer_nobody_knows_is_judged_by_itself_and_the_chain_goes_on(points):
    chain = nn.Sequential(nn.Linear(2, 5), nn.SiLU(), nn.Linear(5, 3))
    comparison = compare(chain, points)
    assert comparison.ok, comparison
    assert comparison.unjudged == ("1 SiLU",)
    bases = [row.basis for row in comparison.rows[:3]]
    assert bases[:2] == ["rounding", "own float64 run"]
    assert all(row.chained_ratio is not None for row in comparison.rows)

    class Coarse(nn.SiLU):
        def forward(self, input):
            return super().forward(input.half()).to(input.dtype)

    chain[1] = Coarse()
    assert not compare(chain, points).ok


def test_modules_that_are_never_called_are_never_asked_for(model, points):
    own = Own(model)
    own.loss, own.dropout = nn.CrossEntropyLoss(), nn.Dropout()
    comparison = compare(own, points)
    assert comparison.ok
    assert comparison.notes[0] == "Never called, so not judged: loss, dropout."


# Precision.


class Rounded(nn.Linear):
    """Factors rounded to 11 bits, as TF32 does."""

    def forward(self, input):
        short = [(t.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32) for t in (
            input, self.weight
        )]  # fmt: skip
        return F.linear(*short, self.bias)


class Noisy(nn.Linear):
    def forward(self, input):
        noise = torch.Generator().manual_seed(0)
        y = super().forward(input)
        return y * (1 + 1e-6 * torch.randn(y.shape, generator=noise))


@pytest.mark.parametrize(("kind", "width"), [(Rounded, 1024), (Noisy, 128)])
def test_what_the_worst_case_lets_through_in_wide_layers_is_found(kind, width):
    input = torch.randn(200, width)
    right = compare(nn.Linear(width, 64), input, candidates=["eager"])
    assert right.ok
    assert right.rows[0].excess < 2
    told = compare(kind(width, 64), input, candidates=["eager"])
    assert told.first_divergence.basis == "excess"
    assert told.first_divergence.bound_ratio < 1
    assert "times those of plain sums in float32" in told.verdict


def test_softmax_by_way_of_its_logarithm_is_right():
    class Exponential(nn.Softmax):
        def forward(self, input):
            return F.log_softmax(input, self.dim).exp()

    assert compare(Exponential(-1), torch.randn(3000, 10) * 20).ok


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.linear.weight, 3)

    def forward(self, x):
        return x + self.linear(x)


def test_an_overflow_that_must_be_is_right():
    assert compare(Residual(), torch.tensor([[2e38], [-2e38], [1.0]])).ok
    twice = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        twice[0].weight.copy_(torch.tensor([[3.0, 0], [-3, 0]]))
        twice[1].weight.fill_(1)
    assert compare(twice, torch.tensor([[2e38, 0], [1, 1]])).ok  # inf - inf in the first row


def test_a_row_of_which_nothing_was_judged_is_not_ok():
    linear = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[3.0, -3.0]]))
    comparison = compare(linear, torch.tensor([[2e38, 2e38]]))  # 0, or inf - inf
    assert not comparison.ok
    assert comparison.rows[0].state == "not judged"
    assert comparison.verdict.startswith("NOT JUDGED: ")


def test_a_right_layer_behind_a_wrong_one_is_called_right(points):
    class Leaky(nn.ReLU):
        def forward(self, input):
            return F.leaky_relu(input, 0.01)

    rows = compare(nn.Sequential(nn.Linear(2, 5), Leaky(), nn.Linear(5, 3)), points).rows[:3]
    assert [row.state for row in rows] == ["ok", "differs", "right, but its input was wrong"]
    assert rows[2].isolated_ratio <= 1 < rows[2].chained_ratio


# Copies.


def test_models_that_cannot_be_copied(points):
    kept = Own(classifier(2, 4, 3))
    kept.register_forward_hook(lambda module, args, output: setattr(module, "output", output))
    output = kept(points)
    kept.output = output
    pruned = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
    prune.l1_unstructured(pruned[0], "weight", amount=0.5)
    pruned(points)
    normed = nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 8)), nn.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = nn.Sequential(nn.utils.weight_norm(nn.Linear(2, 8)), nn.ReLU())
    old(points)
    for each in (kept, pruned, normed, old):
        comparison = compare(each, points, candidates=["eager", "numpy", "exported"])
        assert comparison.ok, comparison
    assert kept.output is output


def test_hooks_on_the_gradients_of_parameters_are_seen(model, points):
    target = torch.randint(3, (len(points),))
    model[0].weight.register_hook(lambda gradient: gradient * 1.001)
    told = compare(model, points, backward=True, target=target)
    assert told.first_divergence.label == "0 Dense dL/dW"


def test_what_a_forward_changes_in_the_model_is_undone(points):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense, self.count, self.log = nn.Linear(2, 3), torch.zeros(1), []

        def forward(self, x):
            self.count.add_(1)
            self.log.append(len(x))
            self.register_buffer("late", torch.ones(1))
            with torch.no_grad():
                self.dense.weight.clamp_(-0.1, 0.1)
            return self.dense(x)

    counting = Counting()
    before = {name: value.clone() for name, value in counting.state_dict().items()}
    compare(counting, points)
    assert counting.count == 0
    assert counting.log == []
    assert counting.state_dict().keys() == before.keys()
    assert torch.equal(counting.dense.weight, before["dense.weight"])


# Found by trying to break the judge.


class Any(nn.Module):
    """A module of a function."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, *args):
        return self.function(self, *args)


def deep():
    torch.manual_seed(0)
    layers = [nn.Linear(16, 64), nn.GELU()]
    for _ in range(6):
        layers += [nn.LayerNorm(64), nn.Linear(64, 64), nn.GELU()]
    return nn.Sequential(*layers, nn.Linear(64, 3))


def test_a_deep_chain_is_judged_sharply_by_a_function():
    right, input = deep(), torch.randn(20, 16)
    double = deep().double()

    def trusted(x):
        return double(torch.from_numpy(x)).detach().numpy()

    assert compare(right, input, reference=trusted, controls=False).ok
    right[-2] = nn.ReLU()
    told = compare(right, input, reference=trusted, controls=False)
    assert told.first_divergence.candidate == "the model"
    assert "in float64 this is no rounding" in told.verdict


def test_what_happens_between_the_layers_of_a_deep_chain_is_seen():
    chain = nn.Sequential(*(k for _ in range(8) for k in (nn.Linear(64, 64), nn.ReLU())))
    chain[-2].register_forward_pre_hook(lambda module, args: (args[0] * 3,))
    first = compare(chain, torch.randn(20, 64)).first_divergence
    assert first.layer == "14"
    assert "its input is not what the layer before it gave" in first.reason


def test_outputs_are_paired_by_their_names():
    model, x = Any(lambda self, x: {"mean": x, "spread": 2 * x}), torch.randn(5, 4)
    assert compare(model, x, reference=lambda x: {"spread": 2 * x, "mean": x}).ok
    for wrong in (lambda x: {"spread": x, "mean": 2 * x}, lambda x: (x, 2 * x)):
        assert not compare(model, x, reference=wrong).ok


def test_one_array_is_paired_with_one_array():
    linear, x = nn.Linear(8, 3), torch.randn(9, 8)
    w, b = linear.weight.detach().numpy(), linear.bias.detach().numpy()
    for wrap in (lambda y: {"p": y}, lambda y: (y,)):
        model = Any(lambda self, x, wrap=wrap: wrap(self.linear(x)), linear=linear)
        assert compare(model, x, reference=lambda x: x @ w.T.astype(np.float64) + b).ok
        assert not compare(model, x, reference=lambda x: x @ w.T + b * 1.001).ok


def test_a_reference_row_by_row_is_one_array():
    linear = nn.Linear(8, 3)
    w, b = linear.weight.detach().numpy(), linear.bias.detach().numpy()
    assert compare(linear, torch.randn(9, 8), reference=lambda x: [w @ row + b for row in x]).ok


def test_operations_that_do_not_round_hide_nothing():
    embedding = nn.Embedding(50, 8)
    negative = Any(lambda self, x: -self.table(x.long()), table=embedding)
    table = embedding.weight.detach().numpy()
    x = torch.randint(1, 50, (20,)).float()
    assert not compare(negative, x, reference=lambda x: table[x.astype(int)]).ok


def test_a_large_column_hides_no_small_one():
    model = Any(lambda self, x: torch.cat([x * 1e8, x.sin() * 2], -1))
    wrong = compare(
        model, torch.randn(20, 4), reference=lambda x: np.concatenate([x * 1e8, np.sin(x)], -1)
    )
    assert not wrong.ok


def test_a_single_number_is_an_output():
    linear, x = nn.Linear(8, 3), torch.randn(32, 8)
    w, b = linear.weight.detach().numpy(), linear.bias.detach().numpy()
    model = Any(lambda self, x: self.linear(x).sum(), linear=linear)
    assert compare(model, x).unjudged == ("(output) Any",)
    assert compare(model, x, reference=lambda x: (x @ w.T + b).sum()).ok
    assert not compare(model, x, reference=lambda x: (x @ w.T + b).sum() * 1.001).ok


def test_sums_that_cancel_in_their_natural_order_are_right():
    half = torch.randn(1000, 512) * 100
    input = torch.stack([half, -half], -1).reshape(1000, 1024)
    linear = nn.Linear(1024, 1)
    with torch.no_grad():
        linear.weight[:, 1::2] = linear.weight[:, ::2] * (1 + 1e-4)
    assert compare(linear, input).ok


def test_sums_of_equal_terms_are_right():
    weight = nn.Parameter(torch.full((784, 4), 1 / 784))
    model = Any(lambda self, x: x**2 @ self.weight, weight=weight)
    assert compare(model, torch.full((4, 784), 0.7)).ok


def test_a_reference_of_nothing_but_nan_is_refused():
    model = Any(lambda self, x: x * float("nan"))
    with pytest.raises(ValueError, match="a reference with finite numbers, got none"):
        compare(model, torch.ones(2, 2), reference=lambda x: x * np.nan)


def test_a_module_of_torch_jit_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Linear(2, 3))
    with pytest.raises(TypeError, match=r"got one of torch\.jit, whose parameters it cannot"):
        compare(scripted, torch.ones(2, 2))


def test_a_subclass_that_is_another_layer_is_told_of_register():
    class ChannelNorm(nn.LayerNorm):
        def forward(self, input):
            return super().forward(input.transpose(1, -1)).transpose(1, -1)

    with pytest.raises(ValueError, match=r"ChannelNorm is judged as layer norm, .*register"):
        compare(ChannelNorm(3), torch.randn(2, 3, 5))


# What results know of themselves.


def test_a_comparison_is_equal_to_itself_alone(model, points):
    one, two = (compare(model, points, controls=False) for _ in range(2))
    assert one == one
    assert one != two


def test_reports_of_a_model_of_ones_own(model, points, tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib")
    comparison = compare(Own(model), points, reference=numpy_of(model))
    comparison.save_html(str(tmp_path / "a.html"))
    comparison.save_plot(str(tmp_path / "a.svg"))
    for name in ("a.html", "a.svg"):
        assert "(output) Own" in (tmp_path / name).read_text()
    assert "(output) Own" in comparison.to_markdown()
    assert comparison.rows[-1].label == "(output) Own"
    with pytest.raises(ValueError, match=r"pictures are .png or .svg files, got .*a.gif"):
        comparison.save_plot(str(tmp_path / "a.gif"))


def test_a_failed_assertion_begins_with_the_verdict(points):
    with pytest.raises(AssertionError, match=r"^DISAGREES: eager on cpu"):
        assert_agrees(Own(classifier(2, 4, 3), "chance"), points)


def test_chance_is_left_where_it_was(model, points):
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    compare(Own(model, "chance"), points)
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])


def test_dialect_layers_are_references(model, points):
    dialect = book.from_torch(model)
    for reference in (dialect, list(dialect)):
        assert compare(model, points, reference=reference).ok
    assert compare(model[:1], points, reference=dialect[0]).ok
    other = book.from_torch(classifier(2, 16, 3))
    assert not compare(model, points, reference=list(other)).ok


def test_jax_is_a_reference(model, points):
    jax = pytest.importorskip("jax", reason="needs jax")
    w, b, v, c = (jax.numpy.asarray(each.detach().numpy()) for each in model.parameters())

    @jax.jit
    def forward(x):
        return jax.nn.softmax(jax.nn.relu(x @ w.T + b) @ v.T + c)

    comparison = compare(Own(model), points, reference=forward, candidates=["eager"])
    assert comparison.ok, comparison
    assert not compare(Own(model, "logits"), points, reference=forward).ok


@pytest.mark.parametrize("device", ["cpu"])
def test_a_candidate_says_its_own_dtype(model, points, device):
    candidate = Candidate("eager", device, torch.float16)
    assert {row.dtype for row in compare(model, points, candidates=[candidate]).rows} == {"float16"}


class Catches(nn.Module):
    """A forward that tries one layer and takes another where that fails."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 3), nn.Linear(2, 3)

    def forward(self, x):
        try:
            return self.first(x[:, :1])
        except RuntimeError:
            return self.second(x)


def test_a_layer_whose_error_is_caught_leaves_no_trace():
    x = torch.randn(4, 2)
    found = compare(Catches(), x, candidates=["eager"], controls=False)
    assert found.ok, str(found)
    (trace,) = found.traces
    assert [call.path for call in trace.calls] == ["second", ""]
    for call in trace.calls:
        np.testing.assert_array_equal(call.input, x.double().numpy())


class Spectrum(nn.Module):
    """A layer with complex weights between the Fourier transform and its inverse."""

    def __init__(self, wrong=0.0, real=True):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(5, dtype=torch.complex64))
        self.tanh, self.wrong, self.real = nn.Tanh(), wrong, real

    def forward(self, x):
        z = self.tanh(torch.fft.rfft(x) * self.weight)
        z = torch.complex(z.real, z.imag + self.wrong * torch.rand_like(z.imag))
        return torch.fft.irfft(z, n=8) if self.real else z


def test_complex_numbers_are_judged_in_both_their_parts(tmp_path):
    input = torch.randn(20, 8, generator=torch.Generator().manual_seed(0))
    right = Spectrum(real=False)

    def by_numpy(x):
        return np.tanh(np.fft.rfft(x) * right.weight.detach().numpy())

    assert compare(Spectrum(), input).ok  # complex inside, real outside
    comparison = compare(right, input, reference=by_numpy, backward=False)
    assert comparison.ok
    assert not comparison.unjudged
    assert compare(right, input, reference=by_numpy(input.numpy())).ok
    assert not compare(right, input, reference=by_numpy(input.numpy()) + 1e-4j).ok
    noisy = compare(Spectrum(1e-3, real=False), input).first_divergence
    assert noisy.basis == "not the same twice"
    assert noisy.worst.index[-1] == 1  # the imaginary part
    comparison.save_golden(tmp_path / "golden.npz")
    assert compare(right, input, golden_file=tmp_path / "golden.npz").ok
    assert compare(right, list(input.split(7)), reference=by_numpy).ok


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(300, 3, device="meta"),
        torch.ones(300, 3).to_sparse(),
    ],
    ids=["meta", "sparse"],
)
def test_tensors_that_are_not_dense_are_named(points, tensor):
    with pytest.raises(ValueError, match=f"dense tensors with values, got one of {tensor.dtype}"):
        compare(Dense(2, 3), points, reference=tensor)
