import copy
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from torchnnfs import (
    Dense,
    LazyDense,
    ReLU,
    Softmax,
    classifier,
    compare,
    fuse,
    fused,
    kernel,
)
from torchnnfs.testing import Candidate, assert_agrees

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
#: Each is a kernel to compile, so not every network is in every dtype.
CHAINS = [
    *((dtype, (3, 97, 256, 2), "softmax") for dtype in DTYPES),
    (torch.bfloat16, (2, 64, 64, 3), "softmax"),
    (torch.float64, (13, 1, 8), "relu"),
    *((dtype, (1, 1), "logits") for dtype in DTYPES[1::2]),
]


@pytest.mark.parametrize(("dtype", "widths", "end"), CHAINS, ids=str)
def test_agrees_within_rounding(widths, end, dtype, lively):
    model = lively(*widths, dtype=dtype, bias=end != "logits")
    if end != "softmax":
        model = model[:-1] if end == "logits" else nn.Sequential(*model[:-1], nn.ReLU())
    assert fuse(model).formulation == "kernel"
    input = torch.randn(130, widths[0])
    assert_agrees(model, input, candidates=[Candidate("fused", dtype=dtype)])


def test_a_wrong_kernel_is_rejected(model, batch, monkeypatch):
    def wrong(self, call, out):
        done = right(self, call, out)
        out.mul_(1 + 2e-6)
        return done

    right = kernel.Kernel.forward
    monkeypatch.setattr(kernel.Kernel, "forward", wrong)
    assert not compare(model, batch, candidates=["fused"]).ok


def test_exponentials_of_any_size(dtype):
    model = nn.Sequential(Dense(2, 2, bias=False), Softmax()).to(dtype)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(2))
    input = torch.stack([torch.linspace(-800, 0, 5001), torch.zeros(5001)], -1)
    assert_agrees(model, input, candidates=[Candidate("fused", dtype=dtype)])


def test_rows_do_not_depend_on_the_batch(dtype, lively):
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
def test_layouts(model, batch, layout, both):
    model = fuse(model)
    input = LAYOUTS[layout](batch)
    got, expected = both(model, input)
    assert got.shape == expected.shape
    rows = [both(model, row.contiguous())[0] for row in input.reshape(-1, 2)]
    assert torch.equal(got.reshape(-1, 3), torch.stack(rows) if rows else got.reshape(-1, 3))
    torch.testing.assert_close(got, expected)


def test_non_finite_rows(both):
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
        lambda model: model.load_state_dict(classifier(2, 5, 3).state_dict(), assign=True),
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
def test_a_change_is_followed(model, batch, change):
    fused_model = fuse(model)
    with torch.no_grad():
        fused_model(batch)
        act, way = FOLLOWED[change]
        act(model)
        input = batch.to(next(model.parameters()).dtype)
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
def test_other_layers_are_refused(batch, change, lively, both):
    model = lively(2, 5, 3)[:-1].extend([ReLU(), Dense(3, 2, bias=False)])
    fused_model = fuse(model)
    both(fused_model, batch)
    REFUSED[change](model)
    for call in (fused_model, lambda x: fused_model.cross_entropy(x, x[:, 0].long() * 0)):
        with pytest.raises(RuntimeError, match=r"call fuse\(model\) again"):
            call(batch)
    if change in ("replaced", "appended", "removed", "inserted", "nested"):
        assert "call fuse(model) again" in repr(fused_model)


def test_hooks_are_called_while_they_are_there(model, batch, both):
    fused_model = fuse(nn.Sequential(model[0], nn.Sequential(*model[1:])))
    for layer in (model[0], fused_model[1]):
        calls = []
        handle = layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        both(fused_model, batch)
        assert len(calls) == 2
        assert fused_model.formulation.startswith("eager, since a ")
        handle.remove()
        both(fused_model, batch)
        assert fused_model.formulation == "kernel"


def test_global_hooks_see_every_layer(model, batch, both):
    seen = []
    fused_model = fuse(model)
    both(fused_model, batch)
    handle = nn.modules.module.register_module_forward_hook(lambda each, *_: seen.append(each))
    with torch.no_grad():
        fused_model(batch)
        assert fused_model.formulation == "eager, since a hook is registered for all modules"
    handle.remove()
    assert seen == [*model, fused_model]
    assert fused_model.formulation == "kernel"


def test_a_hook_elsewhere_costs_nothing(model, batch, monkeypatch, both):
    """A call after it is the same call: nothing is looked at or compiled anew."""
    fused_model = fuse(model)
    both(fused_model, batch)
    nn.Linear(1, 1).register_forward_hook(lambda *_: None)

    def fail(*_):
        raise AssertionError("a way is made anew")

    monkeypatch.setattr(fused, "kernel", fail)
    both(fused_model, batch)


@pytest.mark.parametrize("swap", ["dtype and back", "new memory", "of the input"])
def test_memory_stays_while_other_threads_replace_it(swap, lively, both):
    model = lively(2, 5, 3)
    fused_model, input = fuse(model), torch.randn(100_000, 2)
    expected, stop = both(fused_model, input)[0], threading.Event()

    def disturb():
        while not stop.is_set():
            for parameter in [input] if swap == "of the input" else model.parameters():
                if swap != "dtype and back":
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


def test_lazy_layers_are_fused_after_their_first_input(batch, both):
    model = fuse(nn.Sequential(LazyDense(4), ReLU(), Dense(4, 3)))
    assert model.formulation == "eager, since a LazyDense had no input yet"
    both(model, batch)
    assert model.formulation == "kernel"


def test_it_shares_everything_with_the_model(model, batch, lively, both):
    fused_model = fuse(model)
    assert list(fused_model.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(fused_model.parameters(), model.parameters(), strict=True))
    fused_model.load_state_dict(lively(2, 5, 3).state_dict())
    assert torch.equal(fused_model[0].weight, model[0].weight)
    assert isinstance(fused_model[:2], fused.Fused)
    assert len(fuse(fused_model)) == 4
    expected = both(fused_model, batch)[0]
    for copied in (copy.deepcopy(fused_model), pickle.loads(pickle.dumps(fused_model))):
        assert torch.equal(both(copied, batch)[0], expected)
        assert copied[0] is not model[0]
    assert repr(fused_model).splitlines()[1] == "  formulation: kernel"


def test_out(model, batch, lively):
    model = fuse(model)
    with torch.no_grad():
        expected = model(batch)
        for out in (
            torch.empty(300, 3),
            torch.empty(0),
            torch.empty(3, 300).T,
            torch.empty(300, 6)[:, ::2],
            torch.empty(600, 3)[300:],
        ):
            assert model(batch, out=out) is out
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
def test_an_out_that_does_not_fit(model, batch, out, error, match):
    with torch.no_grad(), pytest.raises(error, match=match):
        fuse(model)(batch, out=out)


def test_out_that_autograd_has_saved(model, batch):
    weight, out = torch.randn(300, 3, requires_grad=True), torch.randn(300, 3)
    loss = (weight * out).sum()
    with torch.no_grad():
        fuse(model)(batch, out=out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_out_that_is_a_parameter(lively):
    model = lively(3, 128, 3)[:-1]
    input = torch.randn(128, 3)
    with torch.no_grad():
        expected = model(input)
        fuse(model)(input, out=model[0].weight)
    torch.testing.assert_close(model[0].weight.detach(), expected)


def test_memory_that_was_given_back(model, batch, both):
    fused_model = fuse(model)
    both(fused_model, batch)
    batch.untyped_storage().resize_(0)
    with torch.no_grad(), pytest.raises(RuntimeError):
        fused_model(batch)


def test_out_has_no_gradient(model, batch):
    with pytest.raises(RuntimeError, match=r"call it under torch.no_grad\(\)"):
        fuse(model)(batch, out=torch.empty(300, 3))


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
    spread = Dense(2, 3)
    spread.bias = nn.Parameter(torch.ones(1))  # a kernel would read two numbers past its end
    assert fuse(spread).formulation == "eager, since the widths of its layers do not fit"
    assert (
        fuse(nn.Sequential(ReLU(), Dense(2, 3))).formulation
        == "eager, since ReLU breaks the order Dense, ReLU, ..., Softmax"
    )


@pytest.mark.parametrize("name", ["0.weight", "2.weight", "2.bias"])
@pytest.mark.parametrize("size", [0, 4])
def test_memory_that_was_freed_is_not_read(model, batch, name, size):
    fused_model = fuse(model)
    output = fused_model(batch)
    model.get_parameter(name).untyped_storage().resize_(size)
    assert fused_model.formulation == "eager, since a parameter has no memory"
    with pytest.raises(RuntimeError, match=r"setStorage|out of bounds"):
        fused_model(batch)
    if name != "2.bias":  # whose numbers no gradient needs
        with pytest.raises(RuntimeError, match=r"setStorage|out of bounds"):
            output.sum().backward()


@pytest.mark.parametrize("size", [0, 1 << 20])
def test_a_backward_pass_sees_where_its_input_is_now(model, batch, size):
    batch = batch.clone().requires_grad_()
    output = fuse(model)(batch)
    batch.untyped_storage().resize_(size)
    if size > batch.nbytes:  # the same numbers, elsewhere
        output.sum().backward()
        assert batch.grad.isfinite().all()
    else:
        with pytest.raises(RuntimeError, match="data is not allocated"):
            output.sum().backward()


def test_the_reasons_say_how_wide_and_how_many():
    wide = fuse(classifier(784, 10, 10))
    assert wide.formulation == "eager, since a layer is 784 wide, the kernel at most 256"
    heavy = fuse(classifier(2, 256, 256, 3))
    with torch.no_grad():
        heavy(torch.ones(3, 2))
        words = "eager, since the kernel is slower for fewer than 64 samples"
        assert heavy.formulation == words
        heavy(torch.ones(64, 2))
    assert heavy.formulation == "kernel"
    half = fuse(nn.Sequential(nn.Linear(2, 3, dtype=torch.complex64)))
    assert half.formulation == (
        "eager, since the kernel is for float64, float32, bfloat16, float16, not torch.complex64"
    )
