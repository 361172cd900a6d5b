import copy
import pickle
import stat
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from torchnnfs import (
    Dense,
    LazyDense,
    ReLU,
    Softmax,
    chain,
    classifier,
    compare,
    fuse,
    fused,
    kernel,
)
from torchnnfs.testing import Candidate, assert_agrees

CHAINS = [
    ((2, 64, 64, 3), "softmax"),
    ((1, 1), "logits"),
    ((13, 1, 8), "relu"),
    ((3, 97, 256, 2), "softmax"),
]


def lively(*widths, dtype=torch.float32, **keywords):
    """A network whose outputs differ from row to row."""
    model = classifier(*widths, **keywords)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=1.0)
    return model.to(dtype)


@pytest.fixture
def model():
    return lively(2, 5, 3)


@pytest.fixture
def points():
    return torch.randn(300, 2)


@pytest.fixture
def no_kernel(monkeypatch):
    """A C++ compiler that fails, and nothing that one compiled before."""

    caches = kernel.kernel, kernel.warn, fused._compiled

    def forget():
        for cache in caches:
            cache.cache_clear()
        kernel.broken.clear()
        chain.failures.clear()

    monkeypatch.setenv("CXX", "c++ -Dint=oops")
    forget()
    yield
    forget()


def both(fused_model, input):
    """What the fused model and its layers give, without gradients."""
    with torch.no_grad():
        return fused_model(input), nn.Sequential.forward(fused_model, input)


@pytest.mark.parametrize(("widths", "end"), CHAINS, ids=str)
def test_agrees_within_rounding(widths, end, dtype):
    model = lively(*widths, dtype=dtype, bias=end != "logits")
    if end != "softmax":
        model = model[:-1] if end == "logits" else nn.Sequential(*model[:-1], nn.ReLU())
    assert fuse(model).formulation == "kernel"
    input = torch.randn(130, widths[0])
    assert_agrees(model, input, candidates=[Candidate("fused", dtype=dtype)])


def test_a_wrong_kernel_is_rejected(model, points, monkeypatch):
    def wrong(self, samples, x, places, out):
        done = right(self, samples, x, places, out)
        out.mul_(1 + 2e-6)
        return done

    right = kernel.Kernel.forward
    monkeypatch.setattr(kernel.Kernel, "forward", wrong)
    assert not compare(model, points, candidates=["fused"]).ok


def test_exponentials_of_any_size(dtype):
    model = nn.Sequential(Dense(2, 2, bias=False), Softmax()).to(dtype)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
    input = torch.stack([torch.linspace(-800, 0, 5001), torch.zeros(5001)], -1)
    assert_agrees(model, input, candidates=[Candidate("fused", dtype=dtype)])


def test_rows_do_not_depend_on_the_batch(dtype):
    """Nor on where in a tile they are, on padding, or on the number of threads."""
    model = fuse(lively(2, 7, 3, dtype=dtype))
    input = torch.randn(100_001, 2).to(dtype)
    with torch.no_grad():
        whole = model(input)
        for count in [0, *range(1, 140), 1000, 4097]:
            assert torch.equal(
                model(input[-count:] if count else input[:0]), whole[-count:][:count]
            )
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            assert torch.equal(model(input), whole)
        finally:
            torch.set_num_threads(threads)


LAYOUTS = {
    "one sample": lambda x: x[0],
    "three dimensions": lambda x: x.reshape(10, 30, 2),
    "transposed": lambda x: x.T.contiguous().T,
    "every other row": lambda x: x[::2],
    "columns of a table": lambda x: torch.cat([x, x], 1)[:, 1:3],
    "swapped dimensions": lambda x: x.reshape(10, 30, 2).transpose(0, 1),
    "expanded": lambda x: x[:1].expand(70, 2),
    "empty": lambda x: x[:0],
    "an offset": lambda x: x[7:],
    "flipped": lambda x: x.flip(0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(model, points, layout):
    model = fuse(model)
    input = LAYOUTS[layout](points)
    got, expected = both(model, input)
    assert got.shape == expected.shape
    rows = [both(model, row.contiguous())[0] for row in input.reshape(-1, 2)]
    assert torch.equal(got.reshape(-1, 3), torch.stack(rows) if rows else got.reshape(-1, 3))
    torch.testing.assert_close(got, expected)


def test_non_finite_rows():
    """What the layers give, NaN for NaN and zero for zero."""
    inf, nan = float("inf"), float("nan")
    rows = [[0, 0, nan], [inf, 0, 0], [-inf, 0, 0], [-inf] * 3, [1e30, 0, -1e30], [3, nan, -inf]]
    input = torch.tensor(rows)
    for end in (Softmax(), ReLU()):
        model = nn.Sequential(Dense(3, 3, bias=False), end)
        with torch.no_grad():
            model[0].weight.copy_(torch.eye(3))
        got, expected = both(fuse(model), input)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def bend(model):
    """The same memory, read in another order."""
    model[2].weight.data = model[2].weight.data.T.contiguous().T


FOLLOWED = {
    "values": (lambda model: model[0].weight.detach().mul_(3), "kernel"),
    "new memory": (lambda model: setattr(model[0].weight, "data", torch.ones(5, 2)), "kernel"),
    "new parameter": (
        lambda model: setattr(model[0], "weight", nn.Parameter(torch.ones(5, 2))),
        "kernel",
    ),
    "a state dict": (
        lambda model: model.load_state_dict(lively(2, 5, 3).state_dict(), assign=True),
        "kernel",
    ),
    "dtype": (lambda model: model.double(), "kernel"),
    "softmax": (lambda model: setattr(model[3], "dim", 0), "eager, since the softmax is along"),
    "strides": (bend, "eager, since a parameter is not contiguous memory"),
    "parametrized": (
        lambda model: nn.utils.parametrizations.weight_norm(model[0]),
        "eager, since a Dense became a ParametrizedDense",
    ),
    "pruned": (
        lambda model: prune.random_unstructured(model[2], "weight", 0.5),
        "eager, since a Dense has hooks or a forward of its own",
    ),
    "another class": (
        lambda model: setattr(model[1], "__class__", nn.Tanh),
        "eager, since a ReLU became a Tanh",
    ),
    "a forward of its own": (
        lambda model: setattr(model[1], "forward", torch.tanh),
        "eager, since a ReLU has hooks or a forward of its own",
    ),
    "a forward of the model's own": (
        lambda model: setattr(model, "forward", lambda x: model[0](x)),
        "eager, since a Sequential has hooks or a forward of its own",
    ),
    "a hook": (
        lambda model: model[1].register_forward_hook(lambda *_: torch.ones(300, 5)),
        "eager, since a ReLU has hooks or a forward of its own",
    ),
    "a hook on the model": (
        lambda model: model.register_forward_pre_hook(lambda _, args: (args[0] + 1,)),
        "eager, since a Sequential has hooks or a forward of its own",
    ),
}


@pytest.mark.parametrize("change", FOLLOWED)
def test_a_change_is_followed(model, points, change):
    fused_model = fuse(model)
    with torch.no_grad():
        fused_model(points)
        act, way = FOLLOWED[change]
        act(model)
        input = points.to(next(model.parameters()).dtype)
        torch.testing.assert_close(fused_model(input), model(input))
    assert fused_model.formulation.startswith(way)
    assert way.split(",")[0] in repr(fused_model)


def narrower(model):
    model[0].weight.data = model[0].weight.data[:3].clone()
    model[0].bias.data = model[0].bias.data[:3].clone()
    model[2].weight.data = model[2].weight.data[:, :3].clone()


REFUSED = {
    "replaced": lambda model: model.__setitem__(1, nn.Tanh()),
    "appended": lambda model: model.append(ReLU()),
    "removed": lambda model: model.pop(3),
    "inserted": lambda model: model.insert(1, nn.Dropout(0.0)),
    "nested": lambda model: model.__setitem__(0, nn.Sequential(model[0])),
    "bias taken away": lambda model: setattr(model[2], "bias", None),
    "bias added": lambda model: setattr(model[4], "bias", nn.Parameter(torch.ones(2))),
    "fewer neurons": narrower,
}


@pytest.mark.parametrize("change", REFUSED)
def test_other_layers_are_refused(points, change):
    model = lively(2, 5, 3)[:-1].extend([ReLU(), Dense(3, 2, bias=False)])
    fused_model = fuse(model)
    both(fused_model, points)
    REFUSED[change](model)
    for call in (fused_model, lambda x: fused_model.cross_entropy(x, x[:, 0].long() * 0)):
        with pytest.raises(RuntimeError, match=r"call fuse\(model\) again"):
            call(points)
    if change in ("replaced", "appended", "removed", "inserted", "nested"):
        assert "call fuse(model) again" in repr(fused_model)


def test_hooks_are_called_while_they_are_there(model, points):
    fused_model = fuse(nn.Sequential(model[0], nn.Sequential(*model[1:])))
    for layer in (model[0], fused_model[1]):
        calls = []
        handle = layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        both(fused_model, points)
        assert len(calls) == 2
        assert fused_model.formulation.startswith("eager, since a ")
        handle.remove()
        both(fused_model, points)
        assert fused_model.formulation == "kernel"


def test_global_hooks_see_every_layer(model, points):
    seen = []
    fused_model = fuse(model)
    both(fused_model, points)
    handle = nn.modules.module.register_module_forward_hook(lambda each, *_: seen.append(each))
    with torch.no_grad():
        fused_model(points)
        assert fused_model.formulation == "eager, since a hook is registered for all modules"
    handle.remove()
    assert seen == [*model, fused_model]
    assert fused_model.formulation == "kernel"


def test_a_hook_elsewhere_costs_nothing(model, points, monkeypatch):
    """A call after it is the same call: nothing is looked at or compiled anew."""
    fused_model = fuse(model)
    both(fused_model, points)
    nn.Linear(1, 1).register_forward_hook(lambda *_: None)

    def fail(*_):
        raise AssertionError("a way is made anew")

    monkeypatch.setattr(chain.Way, "_hold", fail)
    monkeypatch.setattr(fused, "Way", fail)
    both(fused_model, points)


@pytest.mark.parametrize("swap", ["dtype and back", "new memory"])
def test_memory_stays_while_other_threads_replace_it(swap):
    model = lively(2, 5, 3)
    fused_model, input = fuse(model), torch.randn(100_000, 2)
    expected, stop = both(fused_model, input)[0], threading.Event()

    def disturb():
        while not stop.is_set():
            for parameter in model.parameters():
                if swap == "new memory":
                    parameter.data = parameter.data.clone()
                else:
                    parameter.data = parameter.data.double().float()
            torch.full((64,), 7.0)  # takes memory that was given back

    other = threading.Thread(target=disturb)
    other.start()
    try:
        with torch.no_grad():
            got = [fused_model(input) for _ in range(100)]
    finally:
        stop.set()
        other.join()
    assert sum(not torch.equal(each, expected) for each in got) == 0


def test_lazy_layers_are_fused_after_their_first_input(points):
    model = fuse(nn.Sequential(LazyDense(4), ReLU(), Dense(4, 3)))
    assert model.formulation == "eager, since a LazyDense had no input yet"
    both(model, points)
    assert model.formulation == "kernel"


def test_it_shares_everything_with_the_model(model, points):
    fused_model = fuse(model)
    assert list(fused_model.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(fused_model.parameters(), model.parameters(), strict=True))
    fused_model.load_state_dict(lively(2, 5, 3).state_dict())
    assert torch.equal(fused_model[0].weight, model[0].weight)
    assert isinstance(fused_model[:2], fused.Fused)
    assert len(fuse(fused_model)) == 4
    expected = both(fused_model, points)[0]
    for copied in (copy.deepcopy(fused_model), pickle.loads(pickle.dumps(fused_model))):
        assert torch.equal(both(copied, points)[0], expected)
        assert copied[0] is not model[0]
    assert repr(fused_model).splitlines()[1] == "  formulation: kernel"


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
def test_gradients_are_right_within_rounding(widths, samples, way):
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
def test_gradients_of_half_types_are_rounded_once(dtype):
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


def test_gradients_are_the_same_whatever_the_threads():
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
def test_gradients_of_gradients(last):
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


def test_training(model, points):
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
            loss(points).backward()
            optimizer.step()
    for ours, too, theirs in zip(*(twin.parameters() for twin in twins), strict=True):
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(too, theirs)
    assert not torch.equal(twins[0][0].weight, model[0].weight)


def test_only_what_requires_a_gradient_gets_one(model, points):
    fused_model, target = fuse(model.requires_grad_(False)), torch.zeros(300, dtype=torch.long)
    assert not fused_model(points).requires_grad
    assert not fused_model.cross_entropy(points, target).requires_grad
    input = points.clone().requires_grad_()
    fused_model.cross_entropy(input, target).backward()
    assert all(each.grad is None for each in model.parameters())
    expected = torch.autograd.grad(F.cross_entropy(model[:-1](input), target), input)[0]
    torch.testing.assert_close(input.grad, expected)
    model[2].bias.requires_grad_()
    fused_model(points).sum().backward()
    assert [each.grad is None for each in model.parameters()] == [True, True, True, False]


def test_backward_twice_scaled_and_after_a_change(model, points):
    fused_model, target = fuse(model), torch.randint(3, (300,))
    loss = fused_model.cross_entropy(points, target)
    once = torch.autograd.grad(loss, model[0].weight, retain_graph=True)[0]
    (3 * loss).backward(retain_graph=True)
    (3 * loss).backward()
    torch.testing.assert_close(model[0].weight.grad, 6 * once)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    loss = fused_model.cross_entropy(points, target)
    with torch.no_grad():
        model[2].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


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
def test_targets_that_do_not_fit(model, points, target, error, match):
    with pytest.raises(error, match=match):
        fuse(model).cross_entropy(points, target)


def test_cross_entropy_along_the_samples_is_refused(model, points):
    model[3].dim = 0
    with pytest.raises(ValueError, match=r"softmax along the classes, got Softmax\(dim=0\)"):
        fuse(model).cross_entropy(points, torch.zeros(300, dtype=torch.long))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_cross_entropy_where_the_layers_compute(model, points):
    target, fused_model = torch.randint(3, (300,)), fuse(model)
    expected = fused_model.cross_entropy(points, target)
    calls = []
    handle = model[0].register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(fused_model.cross_entropy(points, target), expected)
    handle.remove()
    assert calls == [1]
    compiled = torch.compile(fused_model.cross_entropy, fullgraph=True)
    torch.testing.assert_close(compiled(points, target), expected)


TRANSFORMATIONS = {
    "vmap": lambda f, x: torch.vmap(f)(x.reshape(10, 30, 2)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x[0]),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "functional_call": lambda f, x: torch.func.functional_call(
        f, {name: 2 * p for name, p in f.named_parameters()}, x
    ),
    "grad of parameters": lambda f, x: torch.func.grad(
        lambda p: torch.func.functional_call(f, p, x)[:, 0].log().mean()
    )(dict(f.named_parameters()))["0.weight"],
    "forward mode": lambda f, x: forward_mode(f, x),
    "autocast": lambda f, x: torch.autocast("cpu", torch.bfloat16)(f)(x),
    "inference mode": lambda f, x: torch.inference_mode()(f)(x).clone(),
    "make_fx": lambda f, x: torch.fx.experimental.proxy_tensor.make_fx(f)(x)(2 * x),
    "default device": lambda f, x: on_meta(f, x),
    "function mode": lambda f, x: doubled(f, x),
    "negative bit": lambda f, x: f(torch._neg_view(x)),
}


def forward_mode(model, x):
    from torch.autograd import forward_ad

    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        return forward_ad.unpack_dual(model(dual)).tangent.clone()


def doubled(model, x):
    from torch.overrides import TorchFunctionMode

    class Doubled(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            return 2 * result if function is nn.functional.linear else result

    with Doubled(), torch.no_grad():
        return model(x)


def on_meta(model, x):
    with torch.device("meta"), torch.no_grad():
        return model(x)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_transformations(model, points, name):
    got = TRANSFORMATIONS[name](fuse(model), points)
    expected = TRANSFORMATIONS[name](model, points)
    assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
    torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_trace_follows_its_input(model, points):
    with torch.no_grad():
        traced = torch.jit.trace(fuse(model), points)
    torch.testing.assert_close(traced(points[:7]), model(points[:7]))


def test_fake_tensors_stay_fake():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        output = fuse(nn.Sequential(nn.Linear(2, 3), Softmax()))(torch.empty(300, 2))
    assert (type(output).__name__, output.shape) == ("FakeTensor", (300, 3))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compile_and_export_see_one_operation(model, points):
    fused_model = fuse(model)
    compiled = torch.compile(fused_model, fullgraph=True, dynamic=True)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = fused_model(points)
        assert torch.equal(compiled(points), expected)
        assert torch.equal(compiled(points[:9]), expected[:9])
        program = torch.export.export(fused_model, (points,))
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert calls == [torch.ops.torchnnfs.chain.default]
    assert torch.equal(program.module()(points), expected)
    got = torch.autograd.grad(compiled(points).log().mean(), list(model.parameters()))
    wanted = torch.autograd.grad(model(points).log().mean(), list(model.parameters()))
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("softmax", "biases"),
    [(True, [True, True]), (True, [False, False]), (False, [False, True])],
    ids=str,
)
def test_the_operation_is_a_good_citizen_of_torch(softmax, biases):
    shapes = [(5, 2), (5,), (3, 5), (3,)]
    there = [True, biases[0], True, biases[1]]
    parameters = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape, is_there in zip(shapes, there, strict=True)
        if is_there
    ]

    def call(x, *parameters):
        return torch.ops.torchnnfs.chain(x, list(parameters), biases, [True, False], softmax)

    for x in (torch.randn(4, 2), torch.randn(2), torch.randn(2, 3, 2)):
        x = x.double().requires_grad_()
        arguments = (x, parameters, biases, [True, False], softmax)
        torch.library.opcheck(torch.ops.torchnnfs.chain.default, arguments)
        assert torch.autograd.gradcheck(call, (x, *parameters))
        assert torch.autograd.gradgradcheck(call, (x, *parameters))


def test_the_operation_under_vmap():
    shapes = [(5, 2), (5,), (3, 5)]
    one = [torch.randn(shape) for shape in shapes]
    many = [torch.randn(4, *shape) for shape in shapes]
    input = torch.randn(4, 6, 2)

    def call(x, parameters):
        return torch.ops.torchnnfs.chain(x, parameters, [True, False], [True, False], True)

    for dims, x, parameters in (
        ((0, None), input, one),
        ((None, 0), input[0], many),
        ((0, 0), input, many),
    ):
        got = torch.vmap(call, dims)(x, parameters)
        for i in range(4):
            own = [each[i] for each in parameters] if dims[1] == 0 else parameters
            torch.testing.assert_close(got[i], call(x[i] if dims[0] == 0 else x, own))
    got = torch.vmap(call, (1, None))(input, one)
    torch.testing.assert_close(got, call(input, one).movedim(1, 0))


def test_infinite_gradients_of_dead_neurons():
    weight = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    input = torch.ones(3, 2, requires_grad=True)
    output = torch.ops.torchnnfs.chain(input, [weight], [False], [True], False)
    output.backward(torch.full_like(output, float("inf")))
    assert torch.equal(weight.grad, torch.zeros(1, 2))
    assert torch.equal(input.grad, torch.zeros(3, 2))


def test_out(model, points):
    model = fuse(model)
    with torch.no_grad():
        expected = model(points)
        for out in (
            torch.empty(300, 3),
            torch.empty(0),
            torch.empty(3, 300).T,
            torch.empty(300, 6)[:, ::2],
            torch.empty(600, 3)[300:],
        ):
            assert model(points, out=out) is out
            torch.testing.assert_close(out, expected)
        square = fuse(lively(3, 4, 3))
        table = torch.randn(301, 3)
        for out in (table[:300], table[1:]):  # the input itself, and what overlaps with it
            input, before = table[:300], table.clone()
            wanted = square(input.clone())
            torch.testing.assert_close(square(input, out=out), wanted)
            table.copy_(before)


@pytest.mark.parametrize(
    ("out", "error", "match"),
    [
        (
            torch.empty(300, 4),
            ValueError,
            r"of shape \(300, 3\) and .*, got an out of shape \(300, 4\)",
        ),
        (
            torch.empty(300, 3).double(),
            ValueError,
            "torch.float32 on cpu, got .* torch.float64 on cpu",
        ),
        (torch.empty(300, 3, device="meta"), ValueError, "on cpu, got .* on meta"),
        ([0.0], TypeError, "expects a torch.Tensor, got list"),
    ],
)
def test_an_out_that_does_not_fit(model, points, out, error, match):
    with torch.no_grad(), pytest.raises(error, match=match):
        fuse(model)(points, out=out)


def test_out_that_autograd_has_saved(model, points):
    weight, out = torch.randn(300, 3, requires_grad=True), torch.randn(300, 3)
    loss = (weight * out).sum()
    with torch.no_grad():
        fuse(model)(points, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_out_that_is_a_parameter():
    model = lively(3, 128, 3)[:-1]
    input = torch.randn(128, 3)
    with torch.no_grad():
        expected = model(input)
        fuse(model)(input, out=model[0].weight)
    torch.testing.assert_close(model[0].weight.detach(), expected)


def test_memory_that_was_given_back(model, points):
    fused_model = fuse(model)
    both(fused_model, points)
    points.untyped_storage().resize_(0)
    with torch.no_grad(), pytest.raises(RuntimeError):
        fused_model(points)


def test_out_has_no_gradient(model, points):
    with pytest.raises(RuntimeError, match=r"call it under torch.no_grad\(\)"):
        fuse(model)(points, out=torch.empty(300, 3))


@pytest.mark.parametrize(
    ("input", "error", "match"),
    [
        (torch.ones(4, 3), ValueError, r"last dimension of 2, got an input of shape \(4, 3\)"),
        (torch.ones(4, 2).double(), TypeError, "torch.float32 parameters, got a torch.float64"),
        (torch.ones(()), ValueError, r"last dimension of 2, got an input of shape \(\)"),
        (torch.ones(4, 2, dtype=torch.int64), TypeError, "expects a floating-point input"),
        ([[1.0, 2.0]], TypeError, "expects a torch.Tensor, got builtins.list"),
    ],
)
def test_inputs_that_do_not_fit(model, input, error, match):
    with torch.no_grad(), pytest.raises(error, match=match):
        fuse(model)(input)


def test_models_that_cannot_be_fused():
    with pytest.raises(TypeError, match=r"expects a torch.nn.Sequential .*, got LayerNorm"):
        fuse(nn.Sequential(Dense(2, 3), nn.Sequential(nn.LayerNorm(3))))
    with pytest.raises(TypeError, match="got Bilinear"):
        fuse(nn.Bilinear(2, 3, 4))
    with pytest.raises(TypeError, match="got str"):
        fuse("model")
    with pytest.raises(ValueError, match="at least one layer"):
        fuse(nn.Sequential())
    assert fuse(Dense(2, 3)).formulation == "kernel"
    misfit = fuse(nn.Sequential(Dense(2, 3), Dense(4, 5)))
    assert misfit.formulation == "eager, since the widths of its layers do not fit"
    with pytest.raises(ValueError, match="expects a last dimension of 4"):
        misfit(torch.ones(6, 2))
    assert (
        fuse(nn.Sequential(ReLU(), Dense(2, 3))).formulation
        == "eager, since ReLU breaks the order Dense, ReLU, ..., Softmax"
    )


def script(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


COMPILERS = {
    "missing": ("no-such-compiler", r"there is no C\+\+ compiler 'no-such-compiler'; eager torch"),
    "empty": ("", r"there is no C\+\+ compiler ''; eager torch is used"),
    "fails": (None, r"the C\+\+ compiler failed \(.*error: "),
    "makes no file": ("true", "'true' made no library with a kernel in it"),
    "makes a file of another kind": (
        'while [ "$1" != -o ]; do shift; done; echo no > "$2"',
        "made no",
    ),
    "makes another library": (
        'echo \'int other;\' > "$0.cpp"; while [ "$1" != -o ]; do shift; done; '
        'c++ -shared -fPIC -o "$2" "$0.cpp"',
        "made no library with a kernel in it",
    ),
    "hangs": ("sleep 1000 & sleep 1000", "took longer than 0.2 seconds"),
}


@pytest.mark.parametrize("kind", COMPILERS)
def test_without_a_kernel_there_is_one_warning(
    no_kernel, model, points, kind, monkeypatch, tmp_path
):
    text, warning = COMPILERS[kind]
    if text is not None:
        whole = " " in text
        monkeypatch.setenv("CXX", script(tmp_path / "compiler", text) if whole else text)
    if kind == "hangs":
        monkeypatch.setattr(kernel, "COMPILE_SECONDS", 0.2)
    start = time.monotonic()
    with pytest.warns(RuntimeWarning, match=warning) as caught:
        results = [both(fuse(each), points) for each in (model, lively(2, 6, 3))]
    assert len(caught) == 1
    assert all(torch.equal(got, expected) for got, expected in results)
    assert fuse(model).formulation.split(",")[0] in ("eager", "torch.compile")
    assert time.monotonic() - start < 30


def test_nothing_is_left_on_disk(no_kernel, points, monkeypatch, tmp_path):
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    both(fuse(lively(2, 5, 3)), points)
    assert isinstance(kernel.kernel.cache_info().currsize, int)
    assert kernel.kernel.cache_info().currsize == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:fuse:RuntimeWarning")
def test_then_torch_compile_computes_large_batches(no_kernel):
    model, input = lively(2, 5, 3), torch.randn(9000, 2)
    fused_model = fuse(model)
    with torch.no_grad():
        got = fused_model(input)
        assert fused_model.formulation.startswith("torch.compile, since the C++ compiler failed")
        assert torch.equal(fused_model(input[:8001]), got[:8001])
    assert_agrees(model, input, candidates=["fused"])


def test_and_where_that_fails_eager_torch(no_kernel, model, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no compiler at all\nand more")

    monkeypatch.setattr(fused, "_compiled", lambda chain: fail)
    input, fused_model = torch.randn(9000, 2), fuse(model)
    with pytest.warns(RuntimeWarning) as caught:
        got, expected = both(fused_model, input)
    assert torch.equal(got, expected)
    assert [str(each.message).partition(":")[0] for each in caught] == ["fuse", "fuse"]
    assert fused_model.formulation == fuse(model).formulation == "eager, since no compiler at all"


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from Linux's /proc")
def test_no_memory_but_input_and_output():
    """At most 10 percent more, in a process of its own, whose peak no other test has seen."""
    script = """
import torch
from torchnnfs import classifier, fuse
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
with torch.no_grad():
    model = fuse(classifier(2, 64, 3))
    model(torch.ones(300_000, 2))
    open("/proc/self/clear_refs", "w").write("5")  # the peak is what is used now
    before = peak()
    input = torch.randn(3_000_000, 2)
    output = model(input)
    print((peak() - before) / (input.nbytes + output.nbytes))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert 0.8 < float(done.stdout) < 1.1
