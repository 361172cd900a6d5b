"""What two hostile testers found: models, outputs and references that are not the usual ones."""

import dataclasses
from collections import Counter, OrderedDict, UserDict, defaultdict, deque

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import fusion, parametrize, rnn

from torchnnfs import compare
from torchnnfs.testing import Candidate
from torchnnfs.testing.values import convert, pieces

EAGER = ["eager"]


class Model(nn.Module):
    """A forward of its own, with what it needs as attributes."""

    def __init__(self, compute, **parts):
        super().__init__()
        self.compute = compute
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args, **kwargs):
        return self.compute(self, *args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Output:
    logits: torch.Tensor


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Linear(6, 4)


@pytest.fixture
def x():
    return torch.randn(12, 6, generator=torch.Generator().manual_seed(0))


def arrays(module):
    return [each.detach().double().numpy() for each in module.parameters()]


def judged(model, x, reference=None, **keywords):
    return compare(model, x, reference=reference, controls=False, **keywords)


# What a reference says is compared, whatever the candidates are.


@pytest.mark.parametrize(
    "candidate", [Candidate("eager", dtype=torch.float64), "exported"], ids=["float64", "exported"]
)
@pytest.mark.parametrize(
    "reference",
    [lambda x: np.full((12, 4), 7.5, np.float32), {"0": lambda x: np.full((12, 4), 77.0)}],
    ids=["output", "place"],
)
def test_a_reference_is_compared_in_the_dtype_of_the_model(linear, x, candidate, reference):
    found = judged(nn.Sequential(linear), x, reference, candidates=[candidate])
    assert found.first_divergence.worst.expected in (7.5, 77)


def test_a_reference_at_a_module_that_is_never_called_is_named(linear, x):
    def each(self, x):
        for layer in self.block:
            x = layer(x)
        return x

    model, (w, b) = Model(each, block=nn.Sequential(linear)), arrays(linear)
    found = judged(model, x, {"block": lambda x: x * 77, "": lambda x: x @ w.T + b})
    assert found.ok
    assert "Never called, so not judged: block." in found.notes


def hooked(model):
    model[0].register_forward_hook(lambda module, args, output: output * 2)


def patched(model):
    model[1].forward = torch.tanh


@pytest.mark.parametrize("change", [hooked, patched])
def test_hooks_and_forwards_of_a_reference_count(x, change):
    port, reference = (nn.Sequential(nn.Linear(6, 4), nn.ReLU()) for _ in range(2))
    reference.load_state_dict(port.state_dict())
    assert judged(port, x, reference).ok
    change(reference)
    assert not judged(port, x, reference).ok


def test_a_module_as_reference_is_asked_in_float64(linear, x):
    def gelu(approximate):
        compute = lambda self, x: F.gelu(self.linear(x), approximate=approximate)  # noqa: E731
        return Model(compute, linear=linear).bfloat16()

    assert judged(gelu("tanh"), x.bfloat16(), gelu("tanh")).ok
    found = judged(gelu("tanh"), x.bfloat16(), gelu("none")).first_divergence
    assert (found.candidate, found.dtype) == ("the model", "float64")


def test_a_folded_batch_norm_is_no_other_model(x):
    conv, norm = nn.Conv2d(1, 2, 3).eval(), nn.BatchNorm2d(2).eval()
    norm.running_mean.normal_()
    folded = fusion.fuse_conv_bn_eval(conv, norm)
    images = torch.randn(2, 1, 5, 5)
    assert judged(folded, images, nn.Sequential(conv, norm)).ok
    with torch.no_grad():
        folded.bias[0] += 1e-4
    assert not judged(folded, images, nn.Sequential(conv, norm)).ok


def test_layers_are_paired_by_their_names_and_not_by_their_order(x):
    def chain(self, x):
        return self.b(torch.relu(self.a(x)))

    one = Model(chain, a=nn.Linear(6, 6), b=nn.Linear(6, 6))
    two = Model(chain, b=nn.Linear(6, 6), a=nn.Linear(6, 6))
    two.load_state_dict(one.state_dict())
    assert judged(one, x, two).ok


def test_a_function_at_a_container_has_the_bound_of_its_own_run(linear, x):
    model = nn.Sequential(nn.Sequential(linear, nn.GELU()), nn.Linear(4, 3)).bfloat16()
    w, b = arrays(linear)
    wrong = {"0": lambda x: np.maximum(x @ w.T + b, 0)}
    assert not judged(model, x.bfloat16(), wrong).ok


def test_a_second_output_that_only_passes_on_hides_nothing(x):
    model = Model(lambda self, x: (F.gelu(x, approximate="tanh"), x)).half()

    def reference(x):
        return F.gelu(torch.as_tensor(x)).numpy(), x

    assert judged(model, x.half(), reference).first_divergence.candidate == "the model"


def test_constants_of_a_model_may_round_as_parameters_do(x):
    mean = [0.485, 0.456, 0.406]
    model = Model(lambda self, x: x[:, :3] - self.mean, mean=torch.tensor(mean))
    assert judged(model, x, lambda x: x[:, :3] - np.array(mean)).ok
    assert not judged(model, x, lambda x: x[:, :3] - np.array(mean) - 1e-6).ok


def test_rows_of_a_batch_of_one(linear, x):
    w, b = arrays(linear)
    assert judged(linear, list(x[:11].split(5)), lambda x: [w @ row + b for row in x]).ok


def test_an_array_at_a_layer_that_is_called_twice_is_its_last_output(linear, x):
    act = nn.Tanh()
    model = Model(lambda self, x: self.act(self.linear(self.act(x))), act=act, linear=linear)
    last = model(x).detach().numpy()
    assert judged(model, x, {"act": last}).ok
    assert not judged(model, x, {"act": last + 1e-4}).ok


@pytest.mark.parametrize(
    "form",
    [lambda y: np.longdouble(y), lambda y: (y, None), lambda y: {"": y}, torch.as_tensor],
    ids=["longdouble", "with None", "mapping", "tensor"],
)
def test_forms_of_a_reference(linear, x, form):
    w, b = arrays(linear)
    y = form(x.double().numpy() @ w.T + b)
    model = Model(lambda self, x: (self.linear(x), None), linear=linear)
    assert judged(model if isinstance(y, tuple) else linear, x, y).ok


def taken(self, x):
    y = self.linear(x)
    return self.form(y[:, :3], y[:, 3])


SAME_FORMS = {
    "numbers": lambda a, b: (float(a.mean()), float(b.mean())),
    "a list of numbers": lambda a, b: [float(a.mean()), float(b.mean())],
    "pairs": lambda a, b: ((a, b), (2 * a, 2 * b)),
    "equal pairs": lambda a, b: ((b, 2 * b), (3 * b, 4 * b)),
    "a list of mappings": lambda a, b: [{"boxes": a, "scores": b}],
    "a dataclass": lambda a, b: Output(a),
    "a dataclass of pairs": lambda a, b: Output((a, b)),
    "a text": lambda a, b: {"y": a, "task": "classes"},
    "None": lambda a, b: {"y": a, "loss": None},
    "ragged": lambda a, b: [float(b.mean()), [a, b]],
    "no rows": lambda a, b: a[a[:, 0] > 1e3],
    "no rows beside rows": lambda a, b: (a[a[:, 0] > 1e3], b),
}


@pytest.mark.parametrize("form", SAME_FORMS.values(), ids=SAME_FORMS)
def test_a_reference_may_give_what_the_model_gives(linear, x, form):
    w, b = arrays(linear)

    def reference(x, off=0.0):
        y = x @ w.T + b + off
        return form(y[:, :3], y[:, 3])

    model = Model(taken, linear=linear, form=form)
    found = judged(model, x, reference)
    assert found.ok, found.verdict
    if form is not SAME_FORMS["no rows"]:
        assert not judged(model, x, lambda x: reference(x, 1e-4)).ok


def test_an_array_of_two_rows_is_not_two_outputs(linear, x):
    w, b = arrays(linear)
    model = Model(lambda self, x: (self.linear(x), 2 * self.linear(x)), linear=linear)
    found = judged(model, x[:2], lambda x: x @ w.T + b)
    assert "2 arrays where the reference gives 1 array" in found.verdict


def test_no_rows_are_not_some_rows(linear, x):
    w, b = arrays(linear)
    none = Model(lambda self, x: self.linear(x)[:0], linear=linear)
    assert "shape (0, 4) where" in judged(none, x, lambda x: x @ w.T + b).verdict
    assert "gives shape (0, 4)" in judged(linear, x, lambda x: (x @ w.T + b)[:0]).verdict


ONE_ARRAY = {
    "a list of rows": lambda y: y.tolist(),
    "a tuple of rows": lambda y: tuple(y.tolist()),
    "tuples of numbers": lambda y: tuple(map(tuple, y.tolist())),
    "a list of arrays": list,
    "a list of NumPy's numbers": lambda y: [list(row) for row in y],
}


@pytest.mark.parametrize("form", ONE_ARRAY.values(), ids=ONE_ARRAY)
def test_a_list_of_numbers_is_one_array(linear, x, form):
    w, b = arrays(linear)
    assert judged(linear, x, lambda x: form(x @ w.T + b)).ok
    found = judged(linear, x, lambda x: form((x @ w.T + b)[:, :3]))
    assert "gives shape (12, 3)" in found.verdict
    assert not judged(linear, x, lambda x: form(x @ w.T + b + 1e-4)).ok


@pytest.mark.parametrize("result", ["three", {"": "three"}, (None,), ["a", "b"], {}])
def test_a_reference_without_numbers_is_refused(linear, x, result):
    with pytest.raises(TypeError, match="for the output, <lambda>, to give arrays of numbers, got"):
        judged(linear, x, lambda x: result)


@pytest.mark.parametrize("pool", [False, True])
def test_a_module_of_another_shape_gives_both_shapes(linear, x, pool):
    model, reference, shapes = linear, nn.Linear(6, 5), ("(12, 4)", "(12, 5)")
    if pool:
        model, reference = nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(2)
        x, shapes = torch.randn(2, 3, 7, 7), ("(2, 3, 4, 4)", "(2, 3, 3, 3)")
    for ours, theirs in ((nn.Sequential(model), nn.Sequential(reference)), (model, reference)):
        found = judged(ours, x, theirs)
        assert found.verdict.startswith("DISAGREES")
        assert f"shape {shapes[0]} where" in found.verdict
        assert f"gives shape {shapes[1]}" in found.verdict


def test_a_layer_of_another_shape_than_its_type_says_is_found_beside_an_array(x):
    class Fewer(nn.Linear):
        def forward(self, x):
            return super().forward(x)[:, :3]

    found = judged(nn.Sequential(layer := Fewer(6, 4)), x, layer(x).detach().numpy())
    assert "shape (12, 3) where NumPy gives shape (12, 4)" in found.verdict


# Each number of an output is judged, in whatever it stands.


@dataclasses.dataclass
class ModelOutput(OrderedDict):
    """A mapping and a dataclass in one, as the outputs of transformers are."""

    logits: torch.Tensor | None = None
    states: tuple | None = None

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if (value := getattr(self, field.name)) is not None:
                self[field.name] = value

    def update(self, *args, **kwargs):
        raise Exception("You cannot use ``update`` on a ModelOutput instance.")

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __reduce__(self):
        make, _, *rest = super().__reduce__()
        return make, tuple(getattr(self, each.name) for each in dataclasses.fields(self)), *rest


class Named(dict):
    """A dictionary of one's own."""

    def __init__(self, title, **entries):
        super().__init__(**entries)
        self.title = title


class Sealed(dict):
    def __setitem__(self, key, value):
        raise TypeError("it is sealed")


MAPPINGS = {
    "of transformers": lambda y: ModelOutput(y, (2 * y,)),
    "defaultdict": lambda y: defaultdict(list, logits=y),
    "OrderedDict": lambda y: OrderedDict(logits=y),
    "Counter": lambda y: Counter(logits=y),
    "UserDict": lambda y: UserDict(logits=y),
    "one's own": lambda y: Named("mine", logits=y),
    "sealed": lambda y: Sealed(logits=y),
}


@pytest.mark.parametrize("kind", MAPPINGS.values(), ids=MAPPINGS)
def test_a_mapping_of_any_type_is_judged(linear, x, kind):
    (w, b), last = arrays(linear), nn.Linear(4, 2)
    (v, c) = arrays(last)

    def reference(x):
        return kind(x @ w.T + b)

    inner = Model(lambda self, x: kind(self.linear(x)), linear=linear)
    assert judged(inner, x, reference).ok
    assert not judged(inner, x, lambda x: reference(x + 1e-4)).ok
    model = Model(lambda self, x: self.last(self.inner(x)["logits"]), inner=inner, last=last)
    assert judged(model, x, lambda x: (x @ w.T + b) @ v.T + c).ok


def test_a_rebuilt_mapping_keeps_its_type():
    for kind in MAPPINGS.values():
        given = kind(torch.ones(2))
        found = convert(given, torch.Tensor, lambda tensor: tensor + 1)
        assert type(found) is (dict if isinstance(given, Sealed) else type(given))
        assert found["logits"].tolist() == [2, 2]
        assert given["logits"].tolist() == [1, 1]
    assert convert(Named("mine", a=1), int, str).title == "mine"
    assert convert(ModelOutput(torch.ones(2)), torch.Tensor, torch.sum).logits == 2
    assert convert(defaultdict(list, a=1), int, str)["b"] == []


def test_numbers_and_dataclasses_in_an_output_are_judged(linear, x):
    w, b = arrays(linear)

    def reference(x):
        y = x @ w.T + b
        return {"loss": float(y.sum()), "more": Output(2 * y)}

    def outputs(loss, times):
        return Model(
            lambda self, x: {
                "loss": float(self.linear(x).sum()) + loss,
                "more": Output(self.linear(x) * times),
            },
            linear=linear,
        )

    assert judged(outputs(0.0, 2), x, reference).ok
    for wrong in (outputs(1.0, 2), outputs(0.0, 3)):
        assert not judged(wrong, x, reference).ok
        assert not judged(wrong, x, outputs(0.0, 2)).ok


def test_what_is_no_tensor_is_named(linear, x):
    def forward(self, x):
        return self.linear(x), torch.distributions.Normal(0.0, 1.0)

    found = judged(Model(forward, linear=linear), x)
    assert "(output)[1], which is no tensor but Normal" in found.unjudged


@pytest.mark.parametrize(
    "noise",
    [lambda: torch.rand(()).item(), lambda: Output(torch.rand(3)), lambda: torch.rand(3) * 1j],
    ids=["number", "dataclass", "complex"],
)
def test_noise_is_seen_wherever_it_is(linear, x, noise):
    model = Model(lambda self, x: (self.linear(x), noise()), linear=linear)
    assert judged(model, x).first_divergence.basis == "not the same twice"


def test_whole_numbers_beyond_those_of_float64():
    model = Model(lambda self, x: x + 2**60)
    assert judged(model, torch.arange(50), lambda x: x + 2**60).ok
    assert not judged(model, torch.arange(50), lambda x: x + 2**60 + 1).ok


def test_a_row_of_one_number_has_its_own_limit(linear, x):
    w, b = arrays(linear)
    x[7] *= 1e5
    for wrong in (0.0, 1e-3):
        model = Model(
            lambda self, x, wrong=wrong: (lambda y: torch.where(y.abs() < 100, y + wrong, y))(
                self.linear(x)[:, 0]
            ),
            linear=linear,
        )
        assert judged(model, x, lambda x: (x @ w.T + b)[:, 0]).ok == (wrong == 0)


def test_a_tie_excuses_no_other_class(linear, x):
    with torch.no_grad():
        linear.bias.zero_()
    x[0] = 0  # all classes are equal there
    w, _ = arrays(linear)
    model = Model(lambda self, x: self.linear(x).argmax(-1), linear=linear).bfloat16()
    w, _ = arrays(model)
    assert judged(model, x.bfloat16(), lambda x: (x @ w.T).argmax(-1)).ok
    assert not judged(model, x.bfloat16(), lambda x: (x @ w.T).argmin(-1)).ok


def test_a_masked_input_of_a_softmax_gives_nothing(x):
    class Leaks(nn.Softmax):
        def forward(self, x):
            return torch.where(x == -np.inf, torch.full_like(x, 0.9), super().forward(x))

    def attend(self, x):
        masked = (self.query(x) @ x.T).masked_fill(torch.ones(12, 12).triu(1).bool(), -np.inf)
        return self.softmax(masked) @ x

    for softmax, ok in ((nn.Softmax(-1), True), (Leaks(-1), False)):
        model = Model(attend, query=nn.Linear(6, 6), softmax=softmax)
        assert judged(model, x, candidates=EAGER).ok == ok


def test_weights_that_code_makes_are_named(linear, x):
    class Rounded(nn.Module):
        def forward(self, weight):
            return weight.bfloat16().float()

    parametrize.register_parametrization(linear, "weight", Rounded())
    found = judged(nn.Sequential(linear), x)
    assert found.unjudged == ("how 0 ParametrizedLinear makes its parameters",)


# The model is judged as it is.


def test_a_model_of_several_dtypes_runs_as_it_is(x):
    def mixed(self, x):
        return self.last(self.norm(self.first(x).float()).bfloat16())

    first, norm, last = nn.Linear(6, 6).bfloat16(), nn.LayerNorm(6), nn.Linear(6, 4).bfloat16()
    assert judged(Model(mixed, first=first, norm=norm, last=last), x.bfloat16()).ok


def test_a_block_of_less_precision_is_found(x):
    def block(self, x):
        return self.inner(x.to(self.inner.weight.dtype)).float()

    model = nn.Sequential(nn.Linear(6, 64), Model(block, inner=nn.Linear(64, 4).bfloat16()))
    w, b, v, c = arrays(model)
    assert not judged(model, x, lambda x: (x @ w.T + b) @ v.T + c).ok


def test_parameters_keep_whether_they_require_grad(linear, x):
    def penalised(times):
        def forward(self, x):
            wanted = [each for each in self.parameters() if each.requires_grad]
            return self.linear(x), times * sum(each.pow(2).sum() for each in wanted)

        return Model(forward, linear=linear)

    assert judged(penalised(1), x, penalised(1)).ok
    assert not judged(penalised(5), x, penalised(1)).ok


def test_what_a_forward_keeps_deep_inside_is_undone(linear, x):
    def keeps(self, x):
        self.recent.append(x)
        self.nested["log"].append(x)
        return self.linear(x)

    model = Model(keeps, linear=linear, recent=deque(), nested={"log": []})
    judged(model, x)
    assert (len(model.recent), len(model.nested["log"])) == (0, 0)


def test_a_call_of_its_own_is_part_of_the_model(linear, x):
    class Thrice(Model):
        def __call__(self, x):
            return super().__call__(x) * 3

    assert judged(Thrice(lambda self, x: self.linear(x), linear=linear), x, candidates=EAGER).ok


# Correct models that were called wrong, or could not be judged.


def packed():
    sequences = torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0))
    return rnn.pack_padded_sequence(sequences, [5, 4, 2], batch_first=True)


CORRECT = {
    "the dtype's eps": lambda: (nn.RMSNorm(6), torch.randn(5, 6) * 0.01),
    "places between pixels": lambda: (
        nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)),
        torch.randn(1, 2, 64, 64),
    ),
    "a generator of its own": lambda: (
        Model(lambda self, x: x @ torch.randn(6, 4, generator=torch.Generator().manual_seed(0))),
        torch.randn(5, 6),
    ),
    "many terms": lambda: (
        Model(lambda self, x: torch.zeros(1, 3).index_add(0, torch.zeros(len(x)).long(), x)),
        torch.randn(100_000, 3),
    ),
    "in place": lambda: (
        Model(lambda self, x: (self.act(y := self.linear(x)), y)[1], **parts()),
        torch.randn(5, 6),
    ),
    "a number": lambda: (nn.Sequential(nn.ReLU()), torch.tensor(3.0)),
    "whole numbers": lambda: (nn.Sequential(nn.AvgPool2d(2)), torch.arange(16).view(1, 1, 4, 4)),
    "no rows": lambda: (
        Model(lambda self, x: (self.softmax(x[:0]), self.softmax(x)), softmax=nn.Softmax(-1)),
        torch.randn(5, 6),
    ),
    "packed": lambda: (nn.LSTM(6, 4, batch_first=True), (packed(),)),
    "a tuple": lambda: (
        nn.Sequential(nn.LSTM(6, 4), nn.Identity(), Model(lambda self, x: x[0])),
        torch.randn(5, 2, 6),
    ),
    "a module without tensors": lambda: (
        Model(lambda self, x: x * self.two(x), two=Model(lambda self, x: 2.0)),
        torch.randn(5, 6),
    ),
    "vmap": lambda: (
        Model(lambda self, x: torch.vmap(self.linear)(x), linear=nn.Linear(6, 4)),
        torch.randn(5, 6),
    ),
    "a check of float32": lambda: (
        Model(
            lambda self, x: (
                torch.distributions.Categorical(probs=torch.softmax(self.linear(x), -1)).logits
            ),
            linear=nn.Linear(6, 200),
        ),
        torch.randn(5, 6),
    ),
    "shapes from data": lambda: (Model(lambda self, x: x.unique()), torch.randn(5, 6)),
    "a gradient inside": lambda: (Model(forces, linear=nn.Linear(6, 4)), torch.randn(5, 6)),
}


def parts():
    return {"act": nn.ReLU(inplace=True), "linear": nn.Linear(6, 4)}


def forces(self, x):
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.linear(x).tanh().sum(), x)[0]


@pytest.mark.parametrize("name", CORRECT)
def test_a_correct_model_is_not_called_wrong(name):
    torch.manual_seed(0)
    model, input = CORRECT[name]()
    found = judged(model, input)
    assert found.ok, found.verdict


def test_a_candidate_that_nobody_asked_for_is_left_out(x):
    found = judged(Model(tries, wide=nn.Linear(5, 4), linear=nn.Linear(6, 4)), x)
    assert found.ok
    assert [row.candidate for row in found.rows if row.candidate == "numpy"] == []
    assert any(note.startswith("The candidate numpy is left out: ") for note in found.notes)
    with pytest.raises(ValueError, match=r"judged as dense, .*an input of shape \(12, 1\)"):
        judged(Model(tries, wide=nn.Linear(5, 4), linear=nn.Linear(6, 4)), x, candidates=["numpy"])


def tries(self, x):
    try:
        return self.wide(x[:, :1])
    except RuntimeError:  # which NumPy does not raise
        return self.linear(x)


def test_a_loop_that_rounding_keeps_going_comes_to_an_end():
    def fixed_point(self, x):
        z = torch.zeros_like(x)
        while (step := torch.tanh(self.linear(z) * 0.5 + x) - z).norm() >= 1e-6:
            z = z + step
        return z

    torch.manual_seed(0)
    x = torch.randn(8, 16)
    found = judged(Model(fixed_point, linear=nn.Linear(16, 16)), x, candidates=EAGER)
    assert any("comes to no end" in note for note in found.notes)


def sparse_kinds():
    torch.manual_seed(0)
    dense = (torch.rand(12, 12) < 0.3) * torch.rand(12, 12)
    places, numbers = [[0, 0, 5], [1, 1, 7]], [0.3, 0.4, 0.6]
    twice = torch.sparse_coo_tensor(places, numbers, (12, 12), check_invariants=True)
    return {"coo": dense.to_sparse(), "csr": dense.to_sparse_csr(), "uncoalesced": twice}


@pytest.mark.parametrize("holds", ["buffer", "attribute", "parameter"])
@pytest.mark.parametrize("kind", ["coo", "csr", "uncoalesced"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_numbers_of_a_model_are_judged(linear, x, kind, holds, tmp_path):
    adjacency = sparse_kinds()[kind]
    (w, b), a = arrays(linear), adjacency.to_dense().double().numpy()
    model = Model(lambda self, x: torch.sparse.mm(self.adjacency, self.linear(x)), linear=linear)
    if holds == "buffer":
        model.register_buffer("adjacency", adjacency)
    else:
        model.adjacency = nn.Parameter(adjacency) if holds == "parameter" else adjacency
    found = compare(model, x)
    assert found.ok, found.verdict
    found = judged(model, x, lambda x: a @ (x @ w.T + b))
    assert found.ok, found.verdict
    assert found.unjudged == ()
    assert "the model" in [row.candidate for row in found.rows]
    assert not judged(model, x, lambda x: a @ (x @ w.T + b) + 1e-4).ok
    found.save_golden(tmp_path / "golden.npz")
    assert judged(model, x, golden_file=tmp_path / "golden.npz").ok
    if holds != "attribute":
        *places, numbers = pieces(model.adjacency)
        for changed in [numbers, *places[: kind != "csr"]]:  # whose places depend on one another
            changed[(-1, 0)[-changed.ndim :]] += 1
            with pytest.raises(ValueError, match=r"was made from another .*parameter adjacency"):
                judged(model, x, golden_file=tmp_path / "golden.npz")
            changed[(-1, 0)[-changed.ndim :]] -= 1


def test_sparse_parameters_are_compared_and_finite(linear, x):
    def model(number):
        made = Model(lambda self, x: torch.sparse.mm(self.a, self.linear(x)), linear=linear)
        made.a = nn.Parameter(torch.diag(torch.full((12,), number)).to_sparse())
        return made

    assert judged(model(0.3), x, model(0.3)).ok
    assert not judged(model(0.3), x, model(0.3001)).ok
    with pytest.raises(ValueError, match=r"got nan in model parameter 'a' .*12 of 12 are not"):
        judged(model(np.nan), x)


@pytest.mark.parametrize("kind", ["sparse_coo", "sparse_csr", "jagged"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_an_input_that_is_not_dense_is_refused_in_a_line(linear, x, kind):
    tensor = {
        "sparse_coo": x.relu().to_sparse(),
        "sparse_csr": x.relu().to_sparse_csr(),
        "jagged": torch.nested.nested_tensor([x[:2], x[:3]], layout=torch.jagged),
    }[kind]
    words = rf"expects a dense input, got one in torch.{kind} as input\[1\]; .* as a buffer"
    with pytest.raises(TypeError, match=words):
        judged(Model(lambda self, x, a: self.linear(x), linear=linear), (x, tensor))


# Functions of torch.func over layers that are known.


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("batched", [False, True])
def test_a_derivative_of_a_known_layer_is_judged(linear, x, times, batched):
    def forward(self, x):
        derived = lambda z: self.linear(z).tanh()  # noqa: E731
        for _ in range(times):
            derived = torch.func.jacrev(derived)
        return torch.func.vmap(derived)(x) if batched else derived(x[0])

    w, b = arrays(linear)

    def reference(x):
        y = np.tanh(x @ w.T + b)
        slope, rest = 1 - y * y, -2 * y * (1 - y * y)
        made = slope[..., None] * w
        if times == 2:
            made = rest[..., None, None] * w[:, :, None] * w[:, None, :]
        return made if batched else made[0]

    model = Model(forward, linear=linear)
    found = judged(model, x, reference)
    assert found.ok, found.verdict
    assert not judged(model, x, lambda x: reference(x) * 1.001).ok


def test_a_gradient_of_a_known_layer_is_judged(linear, x):
    def forward(self, x):
        return torch.func.grad(lambda z: self.linear(z).tanh().sum())(x)

    w, b = arrays(linear)
    model = Model(forward, linear=linear)
    assert judged(model, x, lambda x: (1 - np.tanh(x @ w.T + b) ** 2) @ w).ok
    assert not judged(model, x, lambda x: (1 - np.tanh(x @ w.T + b)) @ w).ok


# Gradients.


def test_a_control_that_the_model_cannot_compute_with_is_no_error(x):
    found = compare(Model(forces, linear=nn.Linear(6, 4)), x)
    assert found.ok
    assert {each.reason for each in found.controls} == {"the model cannot compute with it"}


def test_gradients_without_the_candidate_eager_are_judged_all_the_same(x):
    class Cut(nn.ReLU):
        def forward(self, x):
            return super().forward(x).detach() + 0 * x

    model = nn.Sequential(nn.Linear(6, 8), Cut(), nn.Linear(8, 3))
    target = torch.zeros(12, dtype=torch.long)
    for candidate in ("numpy", "exported"):
        found = judged(model, x, backward=True, target=target, candidates=[candidate])
        assert found.first_divergence.label == "1 Cut dL/dx"


def test_a_gradient_that_a_hook_cuts_off_is_found(x):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    model[1].register_forward_pre_hook(lambda module, args: (args[0].detach(),))
    target = torch.zeros(12, dtype=torch.long)
    assert "dL/dx" in judged(model, x, backward=True, target=target).first_divergence.kind


@pytest.mark.parametrize("sparse", [False, True])
def test_a_part_without_gradients_is_no_fault(sparse):
    def frozen(self, x):
        with torch.no_grad():
            x = self.table(x)
        return self.last(x)

    table = nn.Embedding(9, 6, sparse=sparse)
    model = Model(frozen, table=table, last=nn.Linear(6, 3))
    if sparse:
        model = nn.Sequential(table, nn.Linear(6, 3))
    target = np.zeros(12, np.int64)
    target.flags.writeable = False
    assert judged(model, torch.arange(12) % 9, backward=True, target=target).ok


def test_an_output_without_gradients_is_refused(linear, x):
    model = Model(torch.no_grad()(lambda self, x: self.linear(x)), linear=linear)
    with pytest.raises(ValueError, match="an output with gradients, got one without"):
        judged(model, x, backward=True, target=torch.zeros(12, dtype=torch.long))


# Batches.


def test_batches_of_any_output_are_joined(linear, x):
    positive = Model(lambda self, x: self.linear(x) > 0, linear=linear)
    assert judged(positive, list(x.split(5))).ok
    assert judged(Model(lambda self, x: x @ x.T), list(x.split(5))).ok


# Limits that are estimated, element by element.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "last",
    [
        lambda y, x: F.binary_cross_entropy_with_logits(y, (x > 0).to(y.dtype), reduction="none"),
        lambda y, x: F.silu(y),
        lambda y, x: x * y - y * y,
        lambda y, x: torch.floor(4 * y),
        lambda y, x: (y > x).long(),
    ],
    ids=["cross-entropy", "silu", "difference", "floor", "greater"],
)
def test_no_sample_of_many_is_called_wrong(dtype, last):
    torch.manual_seed(0)
    x = torch.randn(20_000, 6).to(dtype)
    model = Model(lambda self, x: last(self.linear(x)[:, 0], x[:, 0]), linear=nn.Linear(6, 1))
    found = judged(model.to(dtype), x, candidates=EAGER)
    assert found.ok, found.verdict


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_no_class_of_many_is_called_wrong(dtype):
    torch.manual_seed(0)
    model = Model(lambda self, x: self.linear(x).argmax(-1), linear=nn.Linear(6, 10)).to(dtype)
    found = judged(model, torch.randn(5_000, 6).to(dtype), candidates=EAGER)
    assert found.ok, found.verdict
