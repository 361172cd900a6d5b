import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchnnfs import Dense, Softmax, compare
from torchnnfs.testing import Candidate, register


def judge(model, input, dtype=None, **named):
    return compare(
        model, input, candidates=[Candidate(dtype=dtype)], **{"controls": False, **named}
    )


def scrambled(model):
    """Parameters and running statistics that hide nothing."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape) / max(1, tensor[0].numel()) ** 0.5)
            if name.endswith("running_var"):
                tensor.abs_()
    return model.eval()


def wrong(kind, change):
    """A type that derives from `kind` and computes something else."""

    class Wrong(kind):
        def forward(self, input):
            return change(super().forward(input))

    return Wrong


VECTORS, PICTURES, SEQUENCES = (9, 6), (3, 4, 8, 8), (3, 4, 9)

#: Chains in which every layer is known, and the shape of their input; None: integers.
CHAINS = {
    "pointwise": ([nn.LeakyReLU(0.2), nn.Tanh(), nn.Linear(6, 5), nn.Sigmoid()], VECTORS),
    "gated": ([nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4), nn.GELU("tanh")], VECTORS),
    "normalising": ([nn.Linear(6, 5), nn.LayerNorm(5), nn.BatchNorm1d(5), nn.ReLU()], VECTORS),
    "flat": ([nn.Flatten(), nn.Linear(6, 8, bias=False), nn.LogSoftmax(1)], (9, 2, 3)),
    "idle": ([nn.Linear(6, 4), nn.Dropout(0.5), nn.Identity(), nn.ReLU()], VECTORS),
    "pictures": ([nn.Conv2d(4, 3, 3, 2, 1), nn.BatchNorm2d(3), nn.AvgPool2d(2)], PICTURES),
    "patches": ([nn.MaxPool2d(2), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Softmax(-1)], PICTURES),
    "sequences": ([nn.Conv1d(4, 3, 3), nn.Tanh(), nn.Flatten()], SEQUENCES),
    "words": ([nn.Embedding(7, 3), nn.Flatten(), nn.Linear(15, 3), nn.Softmax(-1)], None),
}


def chain(name):
    layers, shape = CHAINS[name]
    points = torch.randint(7, (6, 5)) if shape is None else torch.randn(shape)
    return scrambled(nn.Sequential(*layers)), points


@pytest.mark.parametrize("name", CHAINS)
def test_chains_of_known_layers_rest_on_rounding_alone(name, dtype):
    model, points = chain(name)
    told = judge(model, points, dtype)
    assert told.ok, told
    assert told.unjudged == ()
    assert [row.layer for row in told.rows] == [str(i) for i in range(len(model))]
    assert {row.basis for row in told.rows} == {"rounding"}
    assert all(row.chained_ratio is not None for row in told.rows)


@pytest.mark.parametrize("name", CHAINS)
def test_each_layer_of_a_chain_can_be_found_wrong(name):
    model, points = chain(name)
    for i, layer in enumerate(model):
        kept = layer.__class__
        layer.__class__ = wrong(kept, lambda y: y * 1.001)
        told = judge(model, points)
        assert told.first_divergence.layer == str(i), told
        layer.__class__ = kept
    assert judge(model, points).ok


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_log_softmax_is_bounded_and_no_more(scale, dim):
    logits = torch.randn(40, 30) * scale
    (row,) = judge(nn.LogSoftmax(dim), logits).rows
    assert 0.01 < row.bound_ratio <= 1
    off = wrong(nn.LogSoftmax, lambda y: y * (1 + 1e-5) + 1e-5 * scale)
    assert not judge(off(dim), logits).ok


@pytest.mark.parametrize(
    ("layer", "shape", "words"),
    [
        (nn.Dropout(0.1), (4, 3), r"Dropout\(p=0.1, inplace=False\) to be in eval mode"),
        (nn.BatchNorm1d(3), (4, 3), r"BatchNorm1d\(3, .*\) to be in eval mode"),
        (nn.BatchNorm2d(3), (4, 3, 2, 2), r"BatchNorm2d\(3, .*\) to be in eval mode"),
    ],
)
def test_layers_that_depend_on_chance_or_the_batch_are_refused(layer, shape, words):
    with pytest.raises(ValueError, match=words):
        judge(nn.Sequential(layer), torch.randn(shape))
    assert judge(nn.Sequential(layer).eval(), torch.randn(shape)).ok


class MyReLU(nn.Module):
    def __init__(self, at=0.0):
        super().__init__()
        self.at = at

    def forward(self, input):
        return torch.clamp(input, min=self.at)


def test_register_like_a_known_type(dtype):
    register(MyReLU, like=nn.ReLU)
    model = nn.Sequential(Dense(4, 5), MyReLU(), Dense(5, 3))
    told = judge(model, torch.randn(20, 4), dtype)
    assert told.ok, told
    assert {row.basis for row in told.rows} == {"rounding"}
    model[1] = MyReLU(0.01)
    assert judge(model, torch.randn(20, 4), dtype).first_divergence.label == "1 MyReLU"


def test_register_like_takes_the_arguments_by_their_names():
    class MyLinear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(3, 4)), None

        def forward(self, input):
            return input @ self.weight.T

    register(MyLinear, like=Dense)  # a type that derives from a known one is as good
    assert judge(MyLinear(), torch.randn(9, 4)).rows[0].basis == "rounding"
    assert judge(wrong(MyLinear, lambda y: y * 1.001)(), torch.randn(9, 4)).first_divergence


def test_register_a_lambda():
    register(MyReLU, lambda x: np.maximum(0, x))
    model = nn.Sequential(Dense(4, 5), MyReLU(), Dense(5, 3))
    told = judge(model, torch.randn(20, 4))
    assert told.ok, told
    assert [row.basis for row in told.rows[:2]] == ["rounding", "estimated"]
    assert told.rows[2].chained_ratio is not None
    assert told.unjudged == ()
    model[1] = MyReLU(0.01)
    assert judge(model, torch.randn(20, 4)).first_divergence.layer == "1"


def test_two_models_of_a_registered_type_are_paired():
    register(MyReLU, lambda x: np.maximum(0, x))
    one, two = (nn.Sequential(Dense(4, 5), MyReLU()) for _ in range(2))
    points = torch.randn(20, 4)
    assert judge(one, points, reference=two).first_divergence.layer == "0"
    two.load_state_dict(one.state_dict())
    assert judge(one, points, reference=two).ok


def test_register_a_formula_and_a_bound():
    class Hard(nn.Module):
        def forward(self, input):
            return F.hardtanh(input)

    register(Hard, lambda x: np.clip(x, -1, 1), lambda x, error, precision: error + precision.tiny)
    told = judge(nn.Sequential(Dense(2, 5), Hard(), Dense(5, 3), Softmax()), torch.randn(20, 2))
    assert told.ok, told
    assert {row.basis for row in told.rows} == {"rounding"}
    assert not judge(wrong(Hard, lambda y: y + 1e-7)(), torch.randn(20, 2)).ok


class Scale(nn.Module):
    def __init__(self, size=3.0):
        super().__init__()
        self.size = nn.Parameter(torch.tensor(size))
        self.power = 2

    def forward(self, input):
        return self.size * input**self.power


def test_arguments_are_read_by_their_names():
    seen = []

    def formula(x, power, size, other=5):
        seen.append((power, size.dtype, np.shape(size), other))
        return size * x**power

    register(Scale, formula)
    assert judge(Scale(), torch.randn(5, 2)).ok
    assert set(seen) == {(2, np.dtype(np.float64), (), 5)}
    register(Scale, lambda x, power: x**power)
    assert not judge(Scale(), torch.randn(5, 2)).ok


def test_arguments_may_be_read_by_a_function():
    register(Scale, lambda x, by: by * x**2, arguments=lambda layer: {"by": layer.size.item()})
    assert judge(nn.Sequential(Dense(2, 3), Scale()), torch.randn(5, 2)).ok
    register(Scale, lambda x, by: by * x**2, arguments=lambda layer: {"by": 3.001})
    assert not judge(nn.Sequential(Dense(2, 3), Scale()), torch.randn(5, 2)).ok


def test_an_attribute_that_is_missing_is_named():
    register(Scale, lambda x, factor: factor * x)
    words = (
        "compare expects Scale to have an attribute 'factor', as its registered formula takes it; "
        r"name a reader with register\(..., arguments=...\)"
    )
    with pytest.raises(ValueError, match=words):
        judge(Scale(), torch.randn(5, 2))


@pytest.mark.parametrize(
    ("arguments", "named", "words"),
    [
        ((3, np.tanh), {}, "register expects a type of torch.nn.Module, got 3"),
        ((int, np.tanh), {}, "register expects a type of torch.nn.Module, got <class 'int'>"),
        ((MyReLU,), {}, "for MyReLU either a formula or like=, .*, got neither"),
        ((MyReLU, np.tanh), {"like": nn.ReLU}, "for MyReLU either a formula or like=, .* got both"),
        ((MyReLU,), {"like": nn.GRU}, "like= to be one of AvgPool2d, BatchNorm1d.*got .*GRU'>"),
        ((MyReLU,), {"like": "ReLU"}, "like= to be one of .*, got 'ReLU'"),
    ],
)
def test_what_cannot_be_registered(arguments, named, words):
    with pytest.raises(TypeError, match=words):
        register(*arguments, **named)


def test_what_derives_from_a_registered_type_is_judged_alike():
    register(MyReLU, like=nn.ReLU)

    class Mine(MyReLU):
        pass

    assert judge(Mine(), torch.randn(5, 2)).rows[0].basis == "rounding"


def test_a_layer_that_its_formula_does_not_cover_is_judged_by_its_own_run():
    told = judge(nn.BatchNorm1d(3, track_running_stats=False), torch.randn(9, 3))
    assert told.ok
    assert told.rows[0].basis == "own float64 run"


class Fails(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 3))

    def forward(self, x):
        if len(x) == 3:
            return {}["missing"]
        return self.inner(x) if len(x) == 4 else x + self.inner


@pytest.mark.parametrize(
    ("input", "words"),
    [
        (
            torch.ones(3, 2),
            r"Fails raised KeyError: 'missing'; the input was \(3, 2\) in .*float32",
        ),
        (torch.ones(4, 5), r"inner.0 Linear raised RuntimeError: .*4x5 and 2x3.*was \(4, 5\) in "),
        (torch.ones(4, 2).int(), r"inner.0 Linear raised RuntimeError: .*\(4, 2\) in torch.int32"),
        (torch.ones(5, 2), r"Fails raised TypeError: unsupported operand .*; the input was \(5, 2"),
    ],
)
def test_an_error_in_a_forward_names_the_module_and_the_input(input, words):
    with pytest.raises(ValueError, match=words) as raised:
        judge(Fails(), input)
    assert raised.value.__cause__ is not None
    with pytest.raises(ValueError, match=words):
        judge(nn.Sequential(nn.Identity(), Fails()), input)
