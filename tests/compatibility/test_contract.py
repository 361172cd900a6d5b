"""The contract of a module.

What `torch.nn` promises of its layers, asked of ours. Where numbers come out, torch's layers must
give the same bits on the same parameters.
"""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from torchnnfs import Dense, ReLU, Softmax, classifier
from torchnnfs.classes import from_torch, to_torch
from torchnnfs.modules import LazyDense

SHAPES = [(2,), (5, 2), (0, 2), (4, 5, 2), (3, 0, 2), (2, 3, 4, 2)]


def plain(model, input):
    """What Linear, ReLU, Linear, Softmax computes, without modules."""
    first, _, second, _ = model
    hidden = F.relu(F.linear(input, first.weight, first.bias))
    return F.softmax(F.linear(hidden, second.weight, second.bias), -1)


def gradients(model, input):
    input = input.detach().requires_grad_()
    weight = torch.linspace(-1, 1, 3, device=input.device, dtype=input.dtype)
    (model(input) * weight).sum().backward()
    return [input.grad, *(parameter.grad for parameter in model.parameters())]


def assert_same_bits(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert torch.equal(a, b)


@pytest.mark.feature("the same bits as torch, forward and backward", "`model(input).backward()`")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits(twins, shape, device, dtype):
    ours, theirs = (model.to(device) for model in twins(2, 7, 3, dtype=dtype))
    input = torch.randn(shape).to(device, dtype)
    assert_same_bits([ours(input)], [theirs(input)])
    assert_same_bits(gradients(ours, input), gradients(theirs, input))


@pytest.mark.feature("inputs with any number of dimensions", "`layer(torch.ones(4, 5, 2))`")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(network, shape):
    model = network(2, 7, 3)
    input = torch.randn(shape)
    output = model(input)
    assert output.shape == (*shape[:-1], 3)
    assert torch.equal(output, plain(model, input))
    number = torch.tensor(-2.0)
    assert ReLU()(number) == 0
    assert Softmax(0)(number) == 1


@pytest.mark.feature("empty inputs", "`layer(torch.ones(0, 2))`")
@pytest.mark.parametrize("shape", [(0, 2), (3, 0, 2)], ids=str)
def test_empty(network, shape):
    model = network(2, 7, 3)
    assert model(torch.ones(shape)).shape == (*shape[:-1], 3)
    grads = gradients(model, torch.ones(shape))
    assert all(not grad.any() for grad in grads)


@pytest.mark.feature("one number in, one class out", "`Dense(1, 1)`, `Softmax(0)`")
def test_single():
    layer = Dense(1, 1)
    assert torch.equal(layer(torch.ones(1)), layer.weight[0] + layer.bias)
    assert Softmax(0)(torch.tensor([7.0])) == 1


@pytest.mark.feature("factory keywords", "`Dense(2, 3, bias=False, device=..., dtype=...)`")
def test_factory_keywords(device, dtype):
    layer = Dense(2, 3, device=device, dtype=dtype)
    for parameter in (layer.weight, layer.bias):
        assert (parameter.device.type, parameter.dtype) == (device.type, dtype)
        assert parameter.is_leaf
        assert parameter.requires_grad
    assert Dense(2, 3, False, device, dtype).bias is None
    assert Dense(in_features=2, out_features=3, bias=False).bias is None
    assert ReLU(inplace=True).inplace
    assert Softmax(dim=1).dim == 1


@pytest.mark.feature("the defaults of torch", "`torch.set_default_dtype`, `with torch.device(...)`")
def test_defaults():
    torch.set_default_dtype(torch.float64)
    try:
        assert Dense(2, 3).weight.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert Dense(2, 3).weight.is_meta


@pytest.mark.feature("the meta device", '`Dense(2, 3, device="meta").to_empty(device="cpu")`')
def test_meta(device):
    state = torch.random.get_rng_state()
    model = nn.Sequential(Dense(2, 3, device="meta"), ReLU(), Softmax(-1))
    output = model(torch.empty(5, 2, device="meta"))
    assert output.is_meta
    assert output.shape == (5, 3)
    assert torch.equal(torch.random.get_rng_state(), state)
    model.to_empty(device=device)
    model[0].reset_parameters()
    assert model(torch.ones(5, 2, device=device)).isfinite().all()


@pytest.mark.feature("state dicts onto the meta device", "`load_state_dict(state, assign=True)`")
def test_assign(network, points):
    model = network(2, 7, 3)
    empty = copy.deepcopy(model).to("meta")
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(points), model(points))


@pytest.mark.feature("moves", "`layer.to(device)`, `.double()`, `.half()`, `.to(torch.bfloat16)`")
def test_moves(network, device, dtype):
    model = network(2, 7, 3)
    weight = model[0].weight
    assert model.to(device, dtype) is model
    input = torch.ones(5, 2, device=device, dtype=dtype)
    output = model(input)
    assert (output.device.type, output.dtype) == (device.type, dtype)
    assert torch.equal(output, plain(model, input))
    assert model[0].weight is weight  # moved in place, so an optimizer still has it
    assert model.double()[0].weight.dtype == torch.float64
    assert model.half()[0].bias.dtype == torch.float16


@pytest.mark.feature("repr", "`print(layer)`")
def test_repr(twins):
    assert repr(Dense(2, 3, bias=False)).endswith("(in_features=2, out_features=3, bias=False)")
    assert repr(ReLU(inplace=True)) == "ReLU(inplace=True)"
    assert repr(Softmax(1)) == "Softmax(dim=1)"
    ours, theirs = twins(2, 7, 3)
    assert repr(ours).replace("Dense", "Linear") == repr(theirs)


@pytest.mark.feature("pickle", "`pickle.dumps(model)`, `torch.save(model)`")
def test_pickle(network, points):
    model = network(2, 7, 3)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert [type(layer) for layer in again] == [type(layer) for layer in model]
        assert torch.equal(again(points), model(points))


@pytest.mark.feature("deepcopy", "`copy.deepcopy(model)`")
def test_deepcopy(network, points):
    model = network(2, 7, 3)
    before = model(points)
    again = copy.deepcopy(model)
    assert torch.equal(again(points), before)
    with torch.no_grad():
        again[0].weight.zero_()
    assert torch.equal(model(points), before)


@pytest.mark.feature("no attribute that torch's layers have not", "`vars(layer)`")
def test_attributes(twins):
    ours, theirs = twins(2, 7, 3)
    for a, b in zip(ours, theirs, strict=True):
        assert vars(a).keys() == vars(b).keys()
        assert a.__constants__ == b.__constants__
    ours(torch.ones(5, 2)).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert vars(a).keys() == vars(b).keys()


@pytest.mark.feature("state dicts, strict", "`model.load_state_dict(state)`")
def test_state_dict():
    layer = Dense(2, 3)
    state = layer.state_dict()
    assert list(state) == ["weight", "bias"]
    other = Dense(2, 3)
    result = other.load_state_dict(state)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_same_bits(other.state_dict().values(), state.values())
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"bias\""):
        other.load_state_dict({"weight": state["weight"]})
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        Dense(4, 3).load_state_dict(state)
    assert ReLU().state_dict() == Softmax(-1).state_dict() == {}


@pytest.mark.feature("state dicts in files", "`torch.load(file, weights_only=True)`")
def test_state_dict_in_a_file(network, points):
    model = network(2, 7, 3)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    again = network(2, 7, 3)
    with torch.no_grad():
        again[0].weight.zero_()
    again.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(again(points), model(points))


@pytest.mark.feature("state dicts from and for nn.Linear", "`linear.load_state_dict(dense...)`")
@pytest.mark.parametrize("bias", [True, False])
def test_state_dicts_interchange(bias, points):
    ours, theirs = Dense(2, 3, bias), nn.Linear(2, 3, bias)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(theirs(points), ours(points))
    ours, theirs = Dense(2, 3, bias), nn.Linear(2, 3, bias)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(theirs(points), ours(points))


@pytest.mark.feature("work in place", "`ReLU(inplace=True)`")
def test_in_place():
    input = torch.tensor([-1.0, 2.0])
    assert ReLU(inplace=True)(input) is input
    assert input.tolist() == [0, 2]
    leaf = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        ReLU(inplace=True)(leaf)
    output = Softmax(-1)(leaf)
    output.mul_(2)  # autograd has kept the output, and notices
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.feature("the input stays what it is", "`layer(x)`")
def test_input_is_left_alone(network, points):
    model = network(2, 7, 3)
    before = points.clone()
    model(points)
    assert torch.equal(points, before)


@pytest.mark.feature("non-contiguous inputs", "`layer(x.T)`, `layer(x[::2])`")
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T.contiguous().T,
        lambda x: x[::2],
        lambda x: x.repeat_interleave(2, -1)[:, ::2],
        lambda x: x[0].expand(5, 2),
    ],
    ids=["transposed", "rows", "columns", "expanded"],
)
def test_non_contiguous_input(network, points, view):
    model = network(2, 7, 3)
    odd = view(points)
    assert torch.equal(model(odd), model(odd.contiguous()))
    assert_same_bits(gradients(model, odd), gradients(copy.deepcopy(model), odd.contiguous()))


@pytest.mark.feature("non-contiguous gradients", "`output.backward(gradient.T)`")
def test_non_contiguous_gradient(network, points):
    model = network(2, 7, 3)
    gradient = torch.randn(3, 5).T
    assert not gradient.is_contiguous()
    found = []
    for grad in (gradient, gradient.contiguous()):
        model.zero_grad()
        model(points).backward(grad)
        found.append([parameter.grad for parameter in model.parameters()])
    assert_same_bits(*found)


@pytest.mark.feature("gradcheck", "`torch.autograd.gradcheck(layer, input)`")
# torch's own rules for the forward mode are scripted when they are first needed.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_gradcheck(network):
    model = network(2, 4, 3, dtype=torch.float64)
    input = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    names, values = zip(*model.named_parameters(), strict=True)

    def call(input, *values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (input,))

    assert torch.autograd.gradcheck(call, (input, *values), check_forward_ad=True)


@pytest.mark.feature("gradgradcheck", "`torch.autograd.gradgradcheck(layer, input)`")
def test_gradgradcheck(network):
    input = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    dense = Dense(2, 3, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(dense, input)
    assert torch.autograd.gradgradcheck(ReLU(), input)
    assert torch.autograd.gradgradcheck(Softmax(-1), input)
    model = network(2, 4, 3, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(model, input)


@pytest.mark.feature("memory formats", "`model.to(memory_format=torch.channels_last)`")
def test_memory_format():
    input = torch.randn(4, 2, 5, 6).to(memory_format=torch.channels_last)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), ReLU(), Softmax(1))
    model.to(memory_format=torch.channels_last)
    hidden = model[0](input)
    expected = F.softmax(F.relu(hidden), 1)
    output = model(input)
    assert torch.equal(output, expected)
    assert output.stride() == expected.stride()
    assert ReLU()(input).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.feature("train and eval", "`model.eval()`")
def test_train_and_eval(network, points):
    model = network(2, 7, 3)
    expected = model(points)
    assert model.eval() is model
    assert not any(layer.training for layer in model)
    assert torch.equal(model(points), expected)
    assert all(layer.training for layer in model.train())


@pytest.mark.feature("freezing", "`layer.requires_grad_(False)`")
def test_requires_grad(network, points):
    model = network(2, 7, 3)
    model[0].requires_grad_(False)
    model(points).prod().backward()
    assert model[0].weight.grad is None
    assert model[2].weight.grad is not None
    with torch.inference_mode():
        assert model(points).is_inference()


@pytest.mark.feature("apply, and torch's initialisers", "`model.apply(f)`, `nn.init.xavier_...`")
def test_apply(network):
    model = network(2, 7, 3)
    seen = []
    model.apply(lambda layer: seen.append(isinstance(layer, nn.Linear)))
    assert seen == [True, False, True, False, False]
    nn.init.xavier_uniform_(model[0].weight, generator=torch.Generator().manual_seed(0))
    expected = torch.empty(7, 2)
    nn.init.xavier_uniform_(expected, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model[0].weight, expected)


@pytest.mark.feature("initialisation again", "`layer.reset_parameters()`")
def test_reset_parameters():
    layer = Dense(2, 3)
    kept = layer.weight
    before = kept.detach().clone()
    layer.reset_parameters()
    assert layer.weight is kept
    assert not torch.equal(kept, before)


@pytest.mark.feature("tied parameters", "`b.weight = a.weight`")
def test_tied():
    model = nn.Sequential(Dense(3, 3), ReLU(), Dense(3, 3))
    model[2].weight = model[0].weight
    assert len(list(model.parameters())) == 3
    assert copy.deepcopy(model)[2].weight.shape == (3, 3)
    again = copy.deepcopy(model)
    assert again[2].weight is again[0].weight


@pytest.mark.feature("complex parameters and inputs", "`Dense(2, 3, dtype=torch.complex64)`")
def test_complex(points):
    input = torch.complex(points, points.flip(0))
    ours, theirs = (kind(2, 3, dtype=torch.complex64) for kind in (Dense, nn.Linear))
    theirs.load_state_dict(ours.state_dict())
    assert ours.weight.imag.any()
    assert_same_bits([ours(input)], [theirs(input)])


@pytest.mark.feature("whole numbers through a ReLU", "`ReLU()(torch.tensor([-1, 2]))`")
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_integers(dtype):
    output = ReLU()(torch.tensor([0, 2], dtype=dtype))
    assert (output.dtype, output.tolist()) == (dtype, [0, 2])


@pytest.mark.feature("to_torch and from_torch", "`to_torch(model)`, `from_torch(model)`")
def test_to_torch_and_back(twins, points):
    ours, theirs = twins(2, 7, 3)
    there = to_torch(ours)
    assert [type(layer) for layer in there] == [type(layer) for layer in theirs]
    back = from_torch(there)
    assert [type(layer) for layer in back] == [type(layer) for layer in ours]
    assert [type(layer) for layer in ours] == [Dense, ReLU, Dense, Softmax]  # a copy was changed
    for model in (there, back, from_torch(theirs)):
        assert_same_bits([model(points)], [ours(points)])
        assert_same_bits(gradients(model, points), gradients(copy.deepcopy(ours), points))
        assert model[0].weight is not ours[0].weight
        assert_same_bits(model.state_dict().values(), ours.state_dict().values())
    for layer, expected in zip(there, theirs, strict=True):
        assert vars(layer).keys() == vars(expected).keys()


@pytest.mark.feature("to_torch and from_torch", "`to_torch(model)`, `from_torch(model)`")
@pytest.mark.parametrize(
    ("convert", "linear", "relu", "softmax"),
    [(to_torch, Dense, ReLU, Softmax), (from_torch, nn.Linear, nn.ReLU, nn.Softmax)],
    ids=["to_torch", "from_torch"],
)
def test_conversion_keeps_hooks_options_and_structure(convert, linear, relu, softmax, points):
    calls = []

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.softmax = softmax(0)
            self.dense = linear(2, 2, bias=False, dtype=torch.float64)
            self.again, self.relu = self.dense, relu(inplace=True)

        def forward(self, x):
            return self.softmax(self.relu(self.again(self.dense(x))))

    block = Block().eval()
    block.dense.requires_grad_(False)
    block.dense.register_forward_hook(lambda *_: calls.append("hook"))
    other = convert(block)
    assert other.again is other.dense
    assert not other.dense.training
    assert not other.dense.weight.requires_grad
    assert (other.relu.inplace, other.softmax.dim, other.dense.bias) == (True, 0, None)
    assert torch.equal(other(points.double()), block(points.double()))
    assert len(calls) == 4


def test_conversion_leaves_subclasses_and_takes_single_layers():
    class Mine(Dense):
        def forward(self, input):
            return 2 * super().forward(input)

    assert type(to_torch(nn.Sequential(Mine(2, 3)))[0]) is Mine
    assert type(to_torch(Dense(2, 3))) is nn.Linear
    assert type(from_torch(nn.Softmax(-1))) is Softmax
    lazy = LazyDense(3)
    assert type(to_torch(lazy)) is LazyDense
    lazy(torch.ones(5, 2))
    assert type(to_torch(lazy)) is nn.Linear


def test_conversion_draws_nothing():
    state = torch.random.get_rng_state()
    from_torch(to_torch(classifier(2, 3, device="meta")))
    assert torch.equal(torch.random.get_rng_state(), state)


LAZY = pytest.mark.feature("lazy layers", "`LazyDense(3)`, as nn.LazyLinear(3)")
GENERATORS = {
    "default": lambda: None,
    "torch": lambda: torch.Generator().manual_seed(3),
    "book": lambda: np.random.RandomState(0),
}


@pytest.fixture(params=GENERATORS)
def generator(request):
    return GENERATORS[request.param]


@LAZY
@pytest.mark.parametrize("bias", [True, False])
def test_lazy_layers_infer_their_inputs(bias, points):
    layer = LazyDense(3, bias)
    assert isinstance(layer, nn.LazyLinear)
    assert repr(layer) == f"LazyDense(in_features=0, out_features=3, bias={bias})"
    assert layer.has_uninitialized_params()
    parameters = list(layer.parameters())
    layer.double().float()
    assert layer(points).shape == (5, 3)
    assert type(layer) is Dense
    assert vars(layer).keys() == vars(Dense(2, 3)).keys()
    assert [type(p) for p in layer.parameters()] == [nn.Parameter] * (1 + bias)
    assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True))
    layer(points).sum().backward()
    with pytest.raises((ValueError, RuntimeError)):
        layer(torch.ones(5, 4))


@LAZY
def test_lazy_dense_draws_as_dense_does(generator, device, dtype):
    if device.type != "cpu" and isinstance(generator(), torch.Generator):
        pytest.skip("the generator is one of the CPU's")
    torch.manual_seed(5)
    expected = Dense(2, 3, device=device, dtype=dtype, generator=generator())
    torch.manual_seed(5)
    layer = LazyDense(3, device=device, dtype=dtype, generator=generator())
    layer(torch.ones(5, 2, device=device, dtype=dtype))
    assert_same_bits(layer.state_dict().values(), expected.state_dict().values())


@LAZY
def test_lazy_dense_lets_go_of_its_generator(generator, points):
    stream = generator()
    layer = LazyDense(3, generator=stream)
    layer(points)
    assert not [value for value in vars(layer).values() if value is not None and value is stream]
    assert vars(layer).keys() == vars(nn.Linear(2, 3)).keys()


@LAZY
def test_lazy_layers_draw_nothing_before_the_first_call():
    state = torch.random.get_rng_state()
    layer = LazyDense(3)
    layer.reset_parameters()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(is_lazy(parameter) for parameter in layer.parameters())


@LAZY
@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_lazy_dense_pickles_and_copies(generator, again, points):
    torch.manual_seed(5)
    layer = LazyDense(3, generator=generator())
    early = again(layer)
    layer(points)
    torch.manual_seed(5)
    early(points)
    late = again(layer)
    for other in (early, late):
        assert type(other) is Dense
        assert_same_bits(other.state_dict().values(), layer.state_dict().values())


@LAZY
def test_lazy_layers_take_a_state_dict_first(points):
    state = nn.Linear(2, 3).state_dict()
    layer = LazyDense(3)
    layer.load_state_dict(state)
    drawn = torch.random.get_rng_state()
    output = layer(points)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert torch.equal(output, F.linear(points, state["weight"], state["bias"]))
    assert layer.in_features == 2
    assert type(layer) is Dense
    assert vars(layer).keys() == vars(nn.Linear(2, 3)).keys()
    # A state dict of a layer without values leaves one without values.
    empty, file = LazyDense(3), io.BytesIO()
    torch.save(LazyDense(3).state_dict(), file)
    file.seek(0)
    empty.load_state_dict(torch.load(file, weights_only=False))
    assert empty.has_uninitialized_params()
    assert empty(points).shape == (5, 3)


@LAZY
def test_lazy_layers_in_a_network(points, stream):
    model = nn.Sequential(
        LazyDense(7, generator=stream), ReLU(), LazyDense(3, generator=stream), Softmax()
    )
    expected = classifier(2, 7, 3, generator=np.random.RandomState(0))
    assert torch.equal(model(points), expected(points))
    assert repr(model) == repr(expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: LazyDense(0), ValueError, "LazyDense expects out_features to be at least 1"),
        (lambda: LazyDense(3, generator=7), TypeError, "LazyDense expects generator to be a torch"),
        (lambda: LazyDense(3)([1.0]), TypeError,
         r"LazyDense\(in_features=0, out_features=3, bias=True\) expects a torch.Tensor, got buil"),
        (lambda: LazyDense(3)(torch.tensor(1.0)), ValueError,
         r"LazyDense\(out_features=3\) expects a last dimension of at least 1, .* shape \(\)"),
        (lambda: LazyDense(3)(torch.ones(5, 0)), ValueError, r"got an input of shape \(5, 0\)"),
        (lambda: LazyDense(3)(torch.ones(5, 2).double()), TypeError,
         r"Dense\(in_features=2\) holds torch.float32 parameters, got a torch.float64 input"),
    ],
)  # fmt: skip
def test_bad_input_of_lazy_dense_is_explained(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_lazy_dense_survives_a_bad_first_call(points, stream):
    layer = LazyDense(3, generator=stream)
    for bad in ([1.0], torch.tensor(1.0)):
        with pytest.raises((TypeError, ValueError)):
            layer(bad)
    layer(points)
    assert torch.equal(layer.weight, Dense(2, 3, generator=np.random.RandomState(0)).weight)


def test_lazy_dense_with_a_wrong_state_dict_is_explained(points):
    layer = LazyDense(3)
    layer.load_state_dict(nn.Linear(4, 3).state_dict())
    with pytest.raises(ValueError, match=r"expects a last dimension of 4, got an input of shape"):
        layer(points)


def test_lazy_dense_from_numpy_is_a_dense():
    assert type(LazyDense.from_numpy(np.ones((2, 3)))) is Dense


@LAZY
def test_lazy_layers_on_the_meta_device():
    state, layer = torch.random.get_rng_state(), LazyDense(3, device="meta")
    assert layer(torch.empty(5, 2, device="meta")).shape == (5, 3)
    assert layer.weight.is_meta
    assert torch.equal(torch.random.get_rng_state(), state)
    layer.to_empty(device="cpu").reset_parameters()
    assert layer(torch.ones(5, 2)).isfinite().all()


def test_lazy_dense_with_a_generator_of_another_device_stays_lazy(device):
    if device.type == "cpu":
        pytest.skip("needs an accelerator, whose tensors a CPU generator cannot fill")
    layer = LazyDense(3, generator=torch.Generator()).to(device)  # may be moved before it draws
    with pytest.raises(ValueError, match=f"expects a torch.Generator on {device.type}, got one on"):
        layer(torch.ones(5, 2, device=device))
    assert layer.has_uninitialized_params()
