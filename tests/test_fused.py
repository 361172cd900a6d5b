import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from torchnnfs import Dense, LazyDense, ReLU, Softmax, classifier, compare, fuse, fused
from torchnnfs.testing import Candidate, assert_agrees

WIDTHS = [(2, 3, 3), (2, 16, 3), (2, 64, 64, 3), (1, 1), (5, 7), (13, 1, 8), (3, 97, 256, 2)]


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
def no_kernel(monkeypatch, tmp_path):
    """A C++ compiler that fails, and nothing that one compiled before."""
    monkeypatch.setenv("CXX", "c++ -Dint=oops")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    caches = (fused._compiler, fused.kernel, fused._warn, fused._compiled)
    for cache in caches:
        cache.cache_clear()
    yield
    fused._failures.clear()
    for cache in caches:
        cache.cache_clear()


def both(fused_model, input):
    """What the fused model and its layers give, without gradients."""
    with torch.no_grad():
        return fused_model(input), nn.Sequential.forward(fused_model, input)


@pytest.mark.parametrize("end", ["softmax", "logits", "relu"])
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
def test_agrees_within_rounding(widths, end, dtype):
    model = lively(*widths, dtype=dtype, bias=end != "logits")
    if end != "softmax":
        model = model[:-1] if end == "logits" else nn.Sequential(*model[:-1], nn.ReLU())
    assert fuse(model).formulation == "kernel"
    input = torch.randn(130, widths[0])
    assert_agrees(model, input, candidates=[Candidate("fused", dtype=dtype)])


def test_a_wrong_kernel_is_rejected(model, points, monkeypatch):
    def wrong(*arguments):
        said = kernel(*arguments)
        arguments[1].mul_(1 + 2e-6)
        return said

    kernel = fuse(model)._current().function
    monkeypatch.setattr(fused, "kernel", lambda chain, dtype: wrong)
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


def replaced(model):
    model[0], model[2] = Dense(2, 9), Dense(9, 4)


def without_bias(model):
    model[2].bias = None


def narrower(model):
    model[0].weight.data = model[0].weight.data[:3].clone()
    model[0].bias.data = model[0].bias.data[:3].clone()
    model[2].weight.data = model[2].weight.data[:, :3].clone()


def swapped_rows(model):
    square = Dense(2, 2)
    model.insert(0, square)
    both(fuse(model), torch.ones(1, 2))
    square.weight.data = square.weight.data.T  # the same memory, read in another order


def removed_and_replaced(model):
    del model[-1]
    model[0] = nn.Linear(2, 5)


def softmax_along_rows(model):
    model[3].dim = 0


CHANGES = {
    "values": (lambda model: model[0].weight.detach().mul_(3), "kernel"),
    "an optimizer": (
        lambda model: torch.optim.SGD(model.parameters(), 0.1).load_state_dict(
            torch.optim.SGD(model.parameters(), 0.1).state_dict()
        ),
        "kernel",
    ),
    "a state dict": (
        lambda model: model.load_state_dict(lively(2, 5, 3).state_dict(), assign=True),
        "kernel",
    ),
    "dtype": (lambda model: model.double(), "kernel"),
    "layers": (replaced, "kernel"),
    "appended": (lambda model: model.append(ReLU()), "eager"),
    "removed": (lambda model: model.pop(3), "kernel"),
    "removed, then replaced": (removed_and_replaced, "kernel"),
    "bias": (without_bias, "kernel"),
    "fewer neurons": (narrower, "kernel"),
    "the order in memory": (swapped_rows, "eager"),
    "softmax": (softmax_along_rows, "kernel"),
    "parametrized": (
        lambda model: nn.utils.parametrizations.weight_norm(model[0]),
        "eager",
    ),
    "pruned": (lambda model: prune.random_unstructured(model[2], "weight", 0.5), "eager"),
    "another kind": (lambda model: model.insert(1, nn.Dropout(0.0)), "eager"),
    "wide": (lambda model: model.insert(0, Dense(2, 300)).insert(1, Dense(300, 2)), "eager"),
    "another class": (lambda model: setattr(model[1], "__class__", nn.Tanh), "eager"),
    "nested": (lambda model: model.__setitem__(0, nn.Sequential(model[0])), "kernel"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_needs_no_new_call(model, points, change):
    fused_model = fuse(model)
    both(fused_model, points)
    act, way = CHANGES[change]
    act(model)
    input = points.to(model[0][0].weight.dtype if change == "nested" else model[0].weight.dtype)
    got, _ = both(fused_model, input)
    with torch.no_grad():
        torch.testing.assert_close(got, model(input))
    assert fused_model.formulation.startswith(way)
    assert list(fused_model.state_dict()) == list(model.state_dict())
    assert torch.equal(both(fused_model, input)[0], got)


def test_a_layer_deleted_from_the_fused_model(model, points):
    fused_model = fuse(model)
    del fused_model[-1]
    assert len(model) == 3
    torch.testing.assert_close(*both(fused_model, points))


def test_hooks_are_called_while_they_are_there(model, points):
    fused_model = fuse(nn.Sequential(model[0], nn.Sequential(*model[1:])))
    for layer in (model[0], fused_model[1]):
        calls = []
        handle = layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        both(fused_model, points)
        assert len(calls) == 2
        assert fused_model.formulation == "eager, since a layer has hooks"
        handle.remove()
        assert fused_model.formulation == "kernel"


def test_global_hooks_see_every_layer(model, points):
    seen = []
    fused_model = fuse(model)
    both(fused_model, points)
    handle = nn.modules.module.register_module_forward_hook(lambda each, *_: seen.append(each))
    with torch.no_grad():
        fused_model(points)
    handle.remove()
    assert seen == [*model, fused_model]
    assert fused_model.formulation == "kernel"


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


def test_training(model, points):
    twin = copy.deepcopy(model)
    fused_model = fuse(model)
    target = torch.randint(3, (300,))
    for each in (fused_model, twin):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        for _ in range(5):
            optimizer.zero_grad()
            nn.functional.nll_loss(each(points).log(), target).backward()
            optimizer.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    frozen = fuse(copy.deepcopy(model).requires_grad_(False))
    assert torch.equal(frozen(points), both(fused_model, points)[0])
    assert frozen(points.clone().requires_grad_()).requires_grad


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


@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("biases", [[True, True], [False, False], [False, True]], ids=str)
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
        (torch.empty(300, 4), ValueError, r"an out of shape \(300, 3\), got \(300, 4\)"),
        (torch.empty(300, 3).double(), ValueError, "dtype torch.float32, got torch.float64"),
        (torch.empty(300, 3, device="meta"), ValueError, "device cpu, got meta"),
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
    assert (
        fuse(nn.Sequential(ReLU(), Dense(2, 3))).formulation
        == "eager, since ReLU breaks the order Dense, ReLU, ..., Softmax"
    )


def test_without_a_compiler_there_is_one_warning(no_kernel, model, points, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(RuntimeWarning, match=r"no C\+\+ compiler .*no-such-compiler") as caught:
        results = [both(fuse(each), points) for each in (model, lively(2, 6, 3))]
    assert len(caught) == 1
    assert all(torch.equal(got, expected) for got, expected in results)
    assert fuse(model).formulation.startswith("eager, since ")
    large = torch.randn(9000, 2)
    assert torch.equal(*both(fuse(model), large))


def test_a_failing_compiler_is_quoted(no_kernel, model, points):
    with pytest.warns(RuntimeWarning, match=r"no C.. kernel .*error: expected"):
        got, expected = both(fuse(model), points)
    assert torch.equal(got, expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:fuse:RuntimeWarning")
@pytest.mark.parametrize("width", [5, 20])
def test_then_torch_compile_computes_large_batches(no_kernel, width, dtype):
    model = lively(2, width, 3, dtype=dtype)
    input = torch.randn(9000, 2).to(dtype)
    fused_model = fuse(model)
    with torch.no_grad():
        got = fused_model(input)
        assert fused_model.formulation.startswith("torch.compile")
        assert torch.equal(fused_model(input[:8001]), got[:8001])
    assert_agrees(model, input, candidates=[Candidate("fused", dtype=dtype)])


def test_and_where_that_fails_eager_torch(no_kernel, model, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no compiler at all\nand more")

    monkeypatch.setattr(fused, "_compiled", lambda chain: fail)
    input = torch.randn(9000, 2)
    with pytest.warns(RuntimeWarning) as caught:
        got, expected = both(fuse(model), input)
    assert torch.equal(got, expected)
    assert len(caught) == 1
    assert "torch.compile is used from 8000 samples on" in str(caught[0].message)
    assert fuse(model).formulation == "eager, since no compiler at all"


def test_kernels_are_kept(model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    definitions = fused._definitions(fuse(model)._current().chain, torch.float32)
    first = fused._build(definitions)
    before = first.stat().st_mtime_ns
    assert fused._build(definitions) == first
    assert first.stat().st_mtime_ns == before
    assert [each.name for each in first.parent.iterdir()] == [first.name]
    other = fused._build(fused._definitions(fuse(model)._current().chain, torch.float64))
    assert other != first


def test_a_damaged_kernel_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chain = fused.Chain((2, 11, 3), (True, True), (True, False), True)
    fused._build(fused._definitions(chain, torch.float32)).write_bytes(b"no library")
    assert callable(fused.kernel(chain, torch.float32))


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
