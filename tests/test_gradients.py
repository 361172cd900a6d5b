"""Gradients that kernels compute: against float64 by hand, torch's own, and themselves."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchnnfs import Dense, ReLU, Softmax, fuse


def expected_gradients(model, x, target, unit):
    """By hand in float64: loss, gradients of input and parameters, and how far rounding may go.

    `unit` is the unit roundoff of what is computed in; errors are followed through all layers.
    """

    def gamma(n):
        return n * unit / (1 - n * unit)

    def product(a, ea, b, eb):
        error = ea @ (np.abs(b) + eb) + np.abs(a) @ eb
        return a @ b, error + gamma(a.shape[-1] + 4) * ((np.abs(a) + ea) @ (np.abs(b) + eb))

    dense = [layer for layer in model if isinstance(layer, nn.Linear)]
    a, ea, kept = x, np.zeros_like(x), []
    for layer in dense:
        w, b = (each.detach().double().numpy() for each in (layer.weight, layer.bias))
        z, ez = product(a, ea, w.T, 0 * w.T)
        z, ez = z + b, ez + gamma(w.shape[1] + 4) * np.abs(b)
        kept.append((a, ea, w, z, ez))
        a, ea = (z, ez) if layer is dense[-1] else (np.maximum(z, 0), ez)
    n, classes = a.shape
    p = np.exp(a - a.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    ep = p * np.expm1(2 * ea.max(1, keepdims=True) + gamma(classes + 24))
    one_hot = np.eye(classes)[target]
    d, ed = (p - one_hot) / n, (ep + gamma(4) * (p + one_hot)) / n
    loss = -np.log((p * one_hot).sum(1)).mean()
    found = []
    for layer, (a, ea, w, z, ez) in zip(reversed(dense), reversed(kept), strict=True):
        if layer is not dense[-1]:
            unsure = np.abs(z) <= ez
            d, ed = np.where(z > 0, d, 0), np.where(unsure, np.abs(d) + ed, np.where(z > 0, ed, 0))
        ones = np.ones((n, 1))
        bias, bias_error = product(d.T, ed.T, ones, 0 * ones)
        found = [product(d.T, ed.T, a, ea), (bias[:, 0], bias_error[:, 0]), *found]
        d, ed = product(d, ed, w, 0 * w)
    return loss, [(d, ed), *found]


TRAINED = [((2, 3, 3), 1), ((2, 64, 3), 17), ((2, 64, 3), 3000), ((4, 20, 9, 7), 300)]


def gradients(model, input, target, way):
    """The gradients of the mean cross-entropy, by one of three ways."""
    if way == "cross_entropy":
        loss = fuse(model).cross_entropy(input, target)
    elif way == "logits":
        loss = F.cross_entropy(fuse(model[:-1])(input), target)
    else:
        loss = F.nll_loss(fuse(model)(input).log(), target)
    return loss, torch.autograd.grad(loss, [input, *model.parameters()])


@pytest.mark.parametrize("way", ["cross_entropy", "logits", "probabilities"])
@pytest.mark.parametrize(("widths", "samples"), TRAINED, ids=str)
def test_gradients_are_right_within_rounding(widths, samples, way, lively):
    model = lively(*widths)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    input, target = torch.randn(samples, widths[0]), torch.randint(widths[-1], (samples,))
    loss, got = gradients(model, input.requires_grad_(), target, way)
    unit = 2.0**-24
    exact, pairs = expected_gradients(model, input.detach().double().numpy(), target.numpy(), unit)
    assert abs(loss.item() - exact) < 1e-5 * max(1, exact)
    for ours, (value, bound) in zip(got, pairs, strict=True):
        # What goes through 1 / p loses as many digits as p is small.
        room = 8 if way == "probabilities" else 1
        error = np.abs(ours.double().numpy() - value)
        assert (error <= room * bound + 1e-30).all()
        assert (np.abs(1.01 * ours.double().numpy() - value) > bound).any()  # it can fail


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_half_types_are_rounded_once(dtype, lively):
    model = lively(2, 64, 3, dtype=dtype)
    input = torch.randn(3000, 2).to(dtype).requires_grad_()
    target = torch.randint(3, (3000,))
    _, got = gradients(model, input, target, "cross_entropy")
    numbers = input.detach().double().numpy()
    _, pairs = expected_gradients(model, numbers, target.numpy(), 2.0**-24)
    for ours, (value, bound) in zip(got, pairs, strict=True):
        rounding = torch.finfo(dtype).eps / 2 * (np.abs(value) + bound) + torch.finfo(dtype).tiny
        assert ours.dtype == dtype
        assert (np.abs(ours.double().numpy() - value) <= bound + rounding).all()


def test_gradients_are_the_same_whatever_the_threads(lively):
    model, input = lively(2, 64, 3), torch.randn(30_001, 2).requires_grad_()
    target = torch.randint(3, (30_001,))
    threads = torch.get_num_threads()
    for way in ("cross_entropy", "logits"):
        _, first = gradients(model, input, target, way)
        try:
            for count in (1, 2, 3, 2):
                torch.set_num_threads(count)
                _, again = gradients(model, input, target, way)
                assert all(map(torch.equal, first, again))
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("last", ["softmax", "relu", "relu and softmax"])
def test_gradients_of_gradients(last, lively):
    ends = {"softmax": [Softmax()], "relu": [ReLU()], "relu and softmax": [ReLU(), Softmax()]}
    model = lively(2, 5, 3)[:-1].extend(ends[last]).double()
    model[0].bias = None
    fused_model, names = fuse(model), [name for name, _ in model.named_parameters()]
    target = torch.tensor([0, 2, 1, 1])
    for call in (fused_model, lambda x: fused_model.cross_entropy(x, target)):

        def of(x, *parameters, call=call):
            for name, parameter in zip(names, parameters, strict=True):
                layer = model.get_submodule(name.partition(".")[0])
                layer._parameters[name.rpartition(".")[2]] = parameter
            return call(x)

        values = [torch.randn(4, 2).double(), *(p.detach().clone() for p in model.parameters())]
        values = [each.requires_grad_() for each in values]
        assert torch.autograd.gradcheck(of, values)
        assert torch.autograd.gradgradcheck(of, values)
        assert fused_model.formulation == "kernel"


def test_training(model, batch):
    twins = [copy.deepcopy(model) for _ in range(3)]
    target = torch.randint(3, (300,))
    first, second, plain = fuse(twins[0]), fuse(twins[1]), twins[2]
    losses = [
        lambda x: first.cross_entropy(x, target),
        lambda x: F.nll_loss(second(x).log(), target),
        lambda x: F.nll_loss(plain(x).log(), target),
    ]
    for twin, loss in zip(twins, losses, strict=True):
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
        for _ in range(20):
            optimizer.zero_grad()
            loss(batch).backward()
            optimizer.step()
    for ours, too, theirs in zip(*(twin.parameters() for twin in twins), strict=True):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(too, theirs)
    assert not torch.equal(twins[0][0].weight, model[0].weight)


def test_only_what_requires_a_gradient_gets_one(model, batch):
    fused_model, target = fuse(model.requires_grad_(False)), torch.zeros(300, dtype=torch.long)
    assert not fused_model(batch).requires_grad
    assert not fused_model.cross_entropy(batch, target).requires_grad
    input = batch.clone().requires_grad_()
    fused_model.cross_entropy(input, target).backward()
    assert all(each.grad is None for each in model.parameters())
    expected = torch.autograd.grad(F.cross_entropy(model[:-1](input), target), input)[0]
    torch.testing.assert_close(input.grad, expected)
    model[2].bias.requires_grad_()
    fused_model(batch).sum().backward()
    assert [each.grad is None for each in model.parameters()] == [True, True, True, False]


def test_backward_twice_scaled_and_after_a_change(model, batch):
    fused_model, target = fuse(model), torch.randint(3, (300,))
    loss = fused_model.cross_entropy(batch, target)
    once = torch.autograd.grad(loss, model[0].weight, retain_graph=True)[0]
    (3 * loss).backward(retain_graph=True)
    (3 * loss).backward()
    torch.testing.assert_close(model[0].weight.grad, 6 * once)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    loss = fused_model.cross_entropy(batch, target)
    with torch.no_grad():
        model[2].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = fused_model.cross_entropy(batch, target)
    target.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_scaled_loss_keeps_small_gradients(lively):
    model, target = lively(2, 8, 3).half(), torch.randint(3, (30_000,))
    nn.init.normal_(model[0].weight, std=0.01)
    input = torch.randn(30_000, 2).half().requires_grad_()
    (2.0**14 * fuse(model).cross_entropy(input, target)).backward()
    exact = input.detach().double().requires_grad_()
    (2.0**14 * F.cross_entropy(model.double()[:-1](exact), target)).backward()
    assert (input.grad - exact.grad).norm() < 0.01 * exact.grad.norm()


@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 3), (33, 2)], ids=str)
@pytest.mark.parametrize("softmax", [True, False])
def test_cross_entropy_is_torchs(model, shape, softmax):
    target = torch.randint(3, shape)
    input = torch.randn(*shape, 2)
    if softmax and shape == (7,):
        target[2] = -100
    layers = model[:-1]
    expected = F.cross_entropy(layers(input).reshape(-1, 3), target.reshape(-1))
    got = fuse(model if softmax else layers).cross_entropy(input, target)
    torch.testing.assert_close(got, expected, equal_nan=True)
    for ours, theirs in zip(
        *(torch.autograd.grad(each, [*model.parameters()]) for each in (got, expected)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


def test_cross_entropy_of_large_and_broken_logits():
    model = nn.Sequential(Dense(3, 3, bias=False), Softmax())
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3))
    inf, nan = float("inf"), float("nan")
    rows = [[1e4, -1e4, 0], [0, -inf, 3], [80, 0, 0], [nan, 0, 0], [inf, 0, 0], [-inf] * 3]
    for row in rows:
        for label in range(3):
            input, target = torch.tensor([row], dtype=torch.float32), torch.tensor([label])
            expected = F.cross_entropy(model[0](input), target)
            got = fuse(model).cross_entropy(input, target)
            torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize(
    ("target", "error", "match"),
    [
        (torch.zeros(300), TypeError, "expects a target of torch.int64, got torch.float32"),
        ([0] * 300, TypeError, "expects a target of torch.int64, got list"),
        (torch.zeros(3, dtype=torch.long), ValueError, r"shape \(300,\), .*, got \(3,\)"),
        (torch.full((300,), 3), IndexError, "Target 3 is out of bounds"),
        (torch.full((300,), -1), IndexError, "Target -1 is out of bounds"),
    ],
)
def test_targets_that_do_not_fit(model, batch, target, error, match):
    with pytest.raises(error, match=match):
        fuse(model).cross_entropy(batch, target)


def test_cross_entropy_along_the_samples_is_refused(model, batch):
    model[3].dim = 0
    with pytest.raises(ValueError, match=r"softmax along the classes, got Softmax\(dim=0\)"):
        fuse(model).cross_entropy(batch, torch.zeros(300, dtype=torch.long))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_cross_entropy_where_the_layers_compute(model, batch):
    target, fused_model = torch.randint(3, (300,)), fuse(model)
    expected = fused_model.cross_entropy(batch, target)
    calls = []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(fused_model.cross_entropy(batch, target), expected)
    handle.remove()
    assert calls == [1]
    compiled = torch.compile(fused_model.cross_entropy, fullgraph=True)
    torch.testing.assert_close(compiled(batch, target), expected)


LAYOUTS = {
    "transposed": lambda x: x.reshape(2, 50).T,
    "every other row": lambda x: x[::2],
    "expanded": lambda x: x[:1].expand(9, 2),
    "three dimensions": lambda x: x.reshape(5, 10, 2).transpose(0, 1),
    "one sample": lambda x: x[3],
    "empty": lambda x: x[:0],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_an_input_of_any_layout(model, layout):
    for call in (fuse(model), fuse(model[:-1])):
        input = torch.randn(50, 2).requires_grad_()
        got = torch.autograd.grad(call(LAYOUTS[layout](input)).pow(2).sum(), input)
        expected = nn.Sequential.forward(call, LAYOUTS[layout](input))
        torch.testing.assert_close(got, torch.autograd.grad(expected.pow(2).sum(), input))
        target = torch.zeros(LAYOUTS[layout](input).shape[:-1], dtype=torch.long)
        if target.numel():
            got = torch.autograd.grad(call.cross_entropy(LAYOUTS[layout](input), target), input)
            logits = nn.Sequential.forward(fuse(model[:-1]), LAYOUTS[layout](input))
            loss = F.cross_entropy(logits.reshape(-1, 3), target.reshape(-1))
            torch.testing.assert_close(got, torch.autograd.grad(loss, input))
