from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import nn

from torchnnfs import Dense, ReLU, Softmax, classifier, compare, spiral
from torchnnfs.testing import Candidate


@pytest.fixture
def chapter(stream):
    points, target = spiral(generator=stream)
    return classifier(2, 3, 3, generator=stream), points, target


def rows(comparison):
    return [row for row in comparison.rows if "dL/" in row.kind]


def test_every_gradient_of_the_chapter(chapter, device, dtype):
    model, points, target = chapter
    candidates = [Candidate("eager", device, dtype)]
    comparison = compare(model, points, candidates=candidates, backward=True, target=target)
    assert comparison.ok, comparison
    assert [f"{row.layer} {row.kind}" for row in rows(comparison)] == [
        "(loss) dL/doutput",
        "0 Dense dL/dx",
        "1 ReLU dL/dx",
        "2 Dense dL/dx",
        "3 Softmax dL/dx",
        "0 Dense dL/dW",
        "0 Dense dL/db",
        "2 Dense dL/dW",
        "2 Dense dL/db",
    ]


def test_the_exact_gradients_are_those_of_float64_autograd(chapter):
    """The formulas by hand against torch's in float64: two derivations of the same numbers."""
    model, points, target = chapter
    double = [Candidate(dtype=torch.float64)]
    comparison = compare(model, points, candidates=double, backward=True, target=target)
    assert max(row.max_abs for row in rows(comparison)) < 1e-14


@pytest.mark.parametrize("last", [[], [nn.LogSoftmax(-1)], [Softmax()]], ids=["z", "log p", "p"])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_logits_log_probabilities_and_probabilities(last, scale, dtype):
    model = nn.Sequential(Dense(4, 8), ReLU(inplace=True), nn.Flatten(), Dense(8, 5), *last)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20).add_(torch.randn_like(parameter) / 10)
    points, target = torch.randn(60, 4) * scale, torch.randint(5, (60,))
    candidates = [Candidate(dtype=dtype)]
    comparison = compare(model, points, candidates=candidates, backward=True, target=target)
    assert comparison.ok, comparison


def test_residuals_and_shared_layers():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.relu, self.last = Dense(3, 3), ReLU(), Softmax()

        def forward(self, x):
            x = x + self.relu(self.shared(x))
            return self.last(self.shared(x))

    points, target = torch.randn(20, 3), torch.randint(3, (20,))
    comparison = compare(Residual(), points, backward=True, target=target)
    assert comparison.ok, comparison
    kinds = [f"{row.layer} {row.kind}" for row in rows(comparison)]
    assert kinds.count("shared Dense dL/dx") == kinds.count("shared (call 2) Dense dL/dx") == 1
    assert kinds.count("shared Dense dL/dW") == 1


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (1 + 1e-5)


class WrongDense(Dense):
    def forward(self, input):
        return super().forward(_Double.apply(input))


class WrongReLU(ReLU):
    """Right forwards, and a gradient that leaks."""

    def forward(self, input):
        return input.clamp(min=0) + (1e-4 * input - (1e-4 * input).detach())


class WrongSoftmax(Softmax):
    def forward(self, input):
        return torch.softmax(_Double.apply(input), -1)


@pytest.mark.parametrize(
    ("place", "wrong", "layer"),
    [
        (1, WrongReLU(), "1 WrongReLU dL/dx"),
        (3, WrongSoftmax(), "3 WrongSoftmax dL/dx"),
        (2, WrongDense(3, 3), "2 WrongDense dL/dx"),
    ],
)
def test_a_wrong_gradient_is_found(chapter, place, wrong, layer):
    model, points, target = chapter
    model[place] = wrong
    assert compare(model, points).ok  # forwards nothing is wrong
    first = compare(model, points, backward=True, target=target).first_divergence
    assert f"{first.layer} {first.kind}" == layer


def test_a_wrong_parameter_gradient_is_found(chapter):
    model, points, target = chapter

    class Scaled(Dense):
        def forward(self, input):
            weight = 1.001 * self.weight - (0.001 * self.weight).detach()
            return nn.functional.linear(input, weight, self.bias)

    model[0] = Scaled(2, 3)
    first = compare(model, points, backward=True, target=target).first_divergence
    assert f"{first.layer} {first.kind}" == "0 Scaled dL/dW"


def test_a_reference_with_other_weights_is_found(chapter):
    model, points, target = chapter
    other = classifier(2, 3, 3)
    comparison = compare(model, points, reference=other, backward=True, target=target)
    assert not all(row.ok for row in rows(comparison))


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({}, "expects a target"),
        ({"target": torch.zeros(3)}, r"got \(300, 3\) and \(3,\)"),
        ({"target": torch.full((300,), 3)}, "classes from 0 to 2, got torch.int64 from 3 to 3"),
        ({"target": torch.zeros(300)}, "classes from 0 to 2, got torch.float32 from"),
        ({"target": torch.zeros(300).long(), "reference": nn.Linear(2, 3)}, "the model's own lay"),
    ],
)
def test_bad_input_is_explained(chapter, keywords, message):
    model, points, _ = chapter
    with pytest.raises(ValueError, match=message):
        compare(model, points, backward=True, candidates=["eager"], **keywords)


def test_the_gradients_of_the_model_are_left_alone(chapter):
    model, points, target = chapter
    compare(model, points, backward=True, target=target)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert np.isfinite(points.numpy()).all()


def test_tied_weights_add_up():
    first, second, last = Dense(4, 4), Dense(4, 4), Dense(4, 3)
    second.weight = first.weight
    model = nn.Sequential(first, ReLU(), second, ReLU(), last)
    with torch.no_grad():
        first.weight.mul_(50)
    points, target = torch.randn(30, 4), torch.randint(3, (30,))
    comparison = compare(model, points, backward=True, target=target)
    assert comparison.ok, comparison


@pytest.mark.parametrize("hook", ["pre-hook", "hook"])
def test_a_hook_on_the_gradient_of_the_whole_model_is_seen(chapter, hook):
    model, points, target = chapter
    if hook == "pre-hook":
        model.register_full_backward_pre_hook(lambda module, grads: (grads[0] * 0,))
    else:
        model.register_full_backward_hook(lambda module, given, grads: (given[0] * 2,))
    assert compare(model, points).ok
    assert not compare(model, points.requires_grad_(), backward=True, target=target).ok


def test_gradients_that_nobody_knows_are_named():
    model = nn.Sequential(Dense(2, 3), nn.SiLU())
    target = torch.randint(3, (9,))
    told = compare(model, torch.randn(9, 2), backward=True, target=target.tolist())
    assert told.unjudged == ("1 SiLU", "the gradient of 1 SiLU")


def test_a_gradient_that_never_arrives_is_found(chapter):
    model, points, target = chapter

    class Detached(Dense):
        def forward(self, input):
            return nn.functional.linear(input, self.weight.detach(), self.bias)

    model[0] = Detached(2, 3)
    first = compare(model, points, backward=True, target=target).first_divergence
    assert f"{first.layer} {first.kind}" == "0 Detached dL/dW"


@pytest.mark.parametrize("place", ["behind the first", "before the second"])
def test_a_gradient_that_changes_between_layers_is_found(chapter, place):
    model, points, target = chapter
    if place == "behind the first":
        model[0].register_forward_hook(lambda layer, args, output: _Double.apply(output))
    else:
        model[1].register_forward_pre_hook(lambda layer, args: _Double.apply(*args))
    first = compare(model, points, backward=True, target=target).first_divergence
    assert f"{first.layer} {first.kind}" == "0 Dense dL/dx"


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_judged_whatever_the_mode(chapter, mode):
    model, points, target = chapter
    with mode():
        assert compare(model, points, backward=True, target=target).ok


class Model(nn.Module):
    """A forward of its own, of the model and its arguments."""

    def __init__(self, forward, **parts):
        super().__init__()
        self.by = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args):
        return self.by(self, *args)


def scaled(parameter):
    parameter.register_hook(lambda gradient: gradient * 1.001)


def autoencoder(self, x):
    return nn.functional.linear(torch.relu(self.a(x)), self.a.weight.t())


def language_model(self, x):
    return nn.functional.linear(torch.tanh(self.a(x).mean(1)), self.a.weight)


def weight_norm(self, x):
    norm = sum(parameter.pow(2).sum() for parameter in self.parameters())
    return self.a(x) + norm * torch.arange(3).to(x)


def twice_and_once_more(self, x):
    for call in (self.a, self.a, lambda x: nn.functional.linear(x, self.a.weight)):
        x = torch.tanh(call(x))
    return x


def caught(self, x):
    with suppress(RuntimeError):
        self.a(x.reshape(-1)[:3])
    return self.a(x[:, :4]) @ self.a.weight


def tied_head():
    model = Model(
        lambda self, x: self.head(self.a(x).mean(1)) + self.a.weight.sum() * self.a.weight[:, 0],
        a=nn.Embedding(9, 6),
        head=nn.Linear(6, 9, bias=False),
    )
    model.head.weight = model.a.weight
    return model


TOKENS, ROWS = torch.arange(24).view(12, 2) % 9, torch.linspace(-2, 3, 72).sin().view(12, 6)
SHARED = {
    "autoencoder": lambda: (Model(autoencoder, a=nn.Linear(6, 4)), ROWS),
    "language model": lambda: (Model(language_model, a=nn.Embedding(9, 6)), TOKENS),
    "sparse": lambda: (Model(language_model, a=nn.Embedding(9, 6, sparse=True)), TOKENS),
    "weight norm": lambda: (Model(weight_norm, a=nn.Linear(6, 3)), ROWS),
    "called twice": lambda: (Model(twice_and_once_more, a=nn.Linear(6, 6)), ROWS),
    "behind an error": lambda: (Model(caught, a=nn.Linear(4, 4)), ROWS),
    "tied head": lambda: (tied_head(), TOKENS),
}


def judged(model, input, **keywords):
    keywords.setdefault("target", torch.arange(12) % 3)
    return compare(model, input, backward=True, controls=False, **keywords)


@pytest.mark.parametrize("name", SHARED)
def test_a_parameter_that_is_used_outside_its_layer_as_well(name, dtype):
    model, input = SHARED[name]()
    told = judged(model, input, candidates=[Candidate(dtype=dtype)])
    assert told.ok, told
    assert "dL/dW" in {row.kind.split()[-1] for row in rows(told)}
    scaled(model.a.weight)
    first = judged(model, input, candidates=["eager"]).first_divergence
    assert first.label == f"a {type(model.a).__name__} dL/dW"


def test_a_parameter_that_is_kept_in_a_list_and_one_that_a_hook_uses():
    model, norms = Model(lambda self, x: self.a(x) @ self.kept[0], a=nn.Linear(6, 6)), []
    model.kept = [model.a.weight]
    assert judged(model, ROWS).ok
    model = Model(lambda self, x: self.a(x) + norms.pop(), a=nn.Linear(6, 6))
    model.a.register_forward_hook(lambda layer, args, output: norms.append(layer.weight.sum(1)))
    assert judged(model, ROWS).ok


def in_place(change):
    def forward(self, x):
        y = self.a(x)
        change(y)
        return self.b(y.flatten(1))

    return forward


CHANGES = {
    "scaled": lambda y: y.mul_(0.5),
    "relu": lambda y: nn.functional.relu(y, inplace=True),
    "in part": lambda y: y[:, :1].mul_(3),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["dense", "of sequences", "embedding", "view"])
def test_work_in_place_behind_a_layer(change, kind):
    a, input = {
        "dense": (nn.Linear(6, 6), ROWS),
        "of sequences": (nn.Linear(3, 3), ROWS.view(12, 2, 3)),
        "embedding": (nn.Embedding(9, 3), TOKENS),
        "view": (nn.Sequential(nn.Linear(3, 3), nn.Flatten()), ROWS.view(12, 2, 3)),
    }[kind]
    model = Model(in_place(CHANGES[change]), a=a, b=nn.Linear(6, 3))
    told = judged(model, input)
    assert told.ok, told
    layer = a if kind != "view" else a[0]
    scaled(layer.weight)
    first = judged(model, input, candidates=["eager"]).first_divergence
    assert first.kind == f"{type(layer).__name__} dL/dW"


@pytest.mark.parametrize("layer", [nn.ReLU(), nn.Sigmoid(), nn.Identity()])
def test_the_input_of_a_layer_is_changed_in_place_behind_it(layer):
    def residual(self, x):
        x = self.a(x)
        x += self.layer(x)
        return self.b(x)

    model = Model(residual, a=nn.Linear(6, 6), layer=layer, b=nn.Linear(6, 3))
    assert judged(model, ROWS).ok


def test_the_input_of_the_model_is_changed_in_place():
    model = Model(lambda self, x: self.a(x.mul_(0.5)), a=nn.Linear(6, 3))
    assert judged(model, ROWS).ok


def test_a_wrong_gradient_before_work_in_place_is_found():
    parts = {"a": nn.Linear(6, 6), "relu": WrongReLU(), "b": nn.Linear(6, 3)}
    model = Model(lambda self, x: self.b(self.relu(self.a(x)).mul_(2)), **parts)
    assert judged(model, ROWS).first_divergence.label == "relu WrongReLU dL/dx"


def test_a_forward_that_takes_derivatives_itself():
    def forces(self, x):
        with torch.enable_grad():
            x = x.clone() if x.requires_grad else x.clone().requires_grad_()
            energy = (self.tanh(x @ self.weight) ** 2).sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]

    model = Model(forces, tanh=nn.Tanh(), weight=nn.Parameter(torch.randn(6, 5)))
    assert judged(model, ROWS).ok


def test_a_layer_that_passes_no_gradient_on_is_found():
    class Deaf(nn.Linear):
        def forward(self, input):
            return super().forward(input.detach())

    model = Model(lambda self, x: self.b(self.a(x)) + 0, a=nn.Linear(6, 6), b=Deaf(6, 3))
    assert judged(model, ROWS).first_divergence.label == "b Deaf dL/dx"
