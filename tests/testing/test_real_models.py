"""Models that people really have: masks, indices, constants, caches, random numbers."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torchnnfs import compare

EAGER = ["eager"]


class Model(nn.Module):
    """A forward of its own."""

    def __init__(self, compute, **parts):
        super().__init__()
        self.compute = compute
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args):
        return self.compute(self, *args)


def judged(model, x, **keywords):
    return compare(model.eval(), x, **{"candidates": EAGER, "controls": False, **keywords})


def drawn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def softmax(x):
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def mirrored(x):
    return np.swapaxes(x, -1, -2)


LEAST = float(np.finfo(np.float32).min)
GRID = drawn(16, 16)
TABLE = nn.Embedding(9, 8)
IDS = torch.arange(54).reshape(6, 9) % 9


def lookup(model, p):
    x, y = p[:, 0], p[:, 1]
    x0, y0 = torch.floor(x), torch.floor(y)
    x1, y1, wx, wy = x0 + 1, y0 + 1, x - x0, y - y0
    low = GRID.to(p)[x0.long(), y0.long()] * (1 - wx) + GRID.to(p)[x1.long(), y0.long()] * wx
    high = GRID.to(p)[x0.long(), y1.long()] * (1 - wx) + GRID.to(p)[x1.long(), y1.long()] * wx
    return low * (1 - wy) + high * wy


def numpys_lookup(p):
    g, x, y = GRID.double().numpy(), *np.floor(p).astype(int).T
    wx, wy = p.T - (x, y)
    low = g[x, y] * (1 - wx) + g[x + 1, y] * wx
    return low * (1 - wy) + (g[x, y + 1] * (1 - wx) + g[x + 1, y + 1] * wx) * wy


def causal(model, x):
    keep = torch.tril(torch.ones(9, 9)).to(x)
    return (x @ x.transpose(1, 2)).masked_fill(keep != 1, -1e9).softmax(-1) @ x


def numpys_causal(x):
    return softmax(np.where(np.tril(np.ones((9, 9))) == 1, x @ mirrored(x), -1e9)) @ x


def padded(model, ids):
    mask = (1.0 - (ids != 0).float()[:, None]) * LEAST
    z = model.table(ids)
    return (z @ z.transpose(1, 2) + mask).softmax(-1) @ z


def numpys_padded(ids):
    z = TABLE.weight.detach().double().numpy()[ids]
    return softmax(z @ mirrored(z) + (1.0 - (ids != 0)[:, None]) * LEAST) @ z


def cell(model, p):
    return 64 * torch.floor(4 * p)[:, 0] + torch.floor(4 * p)[:, 1]


def numpys_cell(p):
    return 64 * np.floor(4 * p)[:, 0] + np.floor(4 * p)[:, 1]


#: Code in which whole numbers decide, what NumPy makes of it, and an input.
EXACT = {
    "a lookup in a grid": (lookup, numpys_lookup, 7 + 2 * drawn(50, 2).tanh()),
    "a number of a cell": (lambda m, p: cell(m, p).long() + 0.0, numpys_cell, drawn(50, 2)),
    "a quantile": (
        lambda m, x: x.quantile(0.3, -1),
        lambda x: np.quantile(x, 0.3, axis=-1),
        drawn(12, 40),
    ),
    "a causal mask": (causal, numpys_causal, drawn(6, 9, 8)),
    "a mask of the least number": (padded, numpys_padded, IDS),
    "the end of a domain": (
        lambda m, x: torch.acosh(x.clamp(min=1)),
        lambda x: np.arccosh(np.maximum(x, 1)),
        drawn(12, 6),
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_whole_numbers_do_not_round(name):
    compute, trusted, x = EXACT[name]
    assert judged(Model(compute, table=TABLE), x, reference=trusted).ok
    wrong = Model(lambda model, x: 1.001 * compute(model, x), table=TABLE)
    assert not judged(wrong, x, reference=trusted).ok


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("leak", [False, True])
def test_a_mask_of_infinities_hides_nothing(leak, recorded):
    mask = torch.full((9, 9), -math.inf).triu(1)
    mask[0, 1] *= not leak or math.nan  # the first token sees the second
    mask = mask.nan_to_num(0.0, neginf=-math.inf)
    model = Model(lambda m, x: (x @ x.transpose(1, 2) + m.mask).softmax(-1) @ x, mask=mask)
    x = drawn(4, 9, 8)
    exact = numpys_causal(x.double().numpy())
    found = judged(model, x, reference=exact if recorded else numpys_causal)
    assert found.ok is not leak
    assert not any("may overflow" in note for note in found.notes)


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (lambda: nn.Sequential(nn.Conv2d(64, 8, 3), nn.ReLU()), drawn(1, 64, 6, 6)),
        (lambda: nn.Sequential(nn.LayerNorm(1024), nn.GELU()), drawn(4, 1024)),
    ],
)
def test_a_module_with_the_same_layers_is_asked_in_float64(make, x):
    right, wrong = make(), make()
    wrong.load_state_dict(right.state_dict())
    assert judged(wrong, x, reference=right).ok
    with torch.no_grad():
        wrong[0].weight.mul_(1.0001)
    assert not judged(wrong, x, reference=right).ok


@pytest.mark.parametrize("times", [1, 1.001])
def test_a_mask_of_ones_is_compared_with_one(times):
    ones = torch.tril(torch.ones(9, 9))

    def attend(model, x, mask):
        return times * (x @ x.transpose(1, 2)).masked_fill(mask != 1, -1e9).softmax(-1) @ x

    x = drawn(2, 9, 8)
    held = Model(lambda model, x: attend(model, x, model.mask), mask=ones)
    for model in (held, Model(lambda model, x: attend(model, x, ones))):
        assert judged(model, x, reference=numpys_causal).ok is (times == 1)


WAVES = torch.sin(torch.outer(torch.arange(12.0), torch.exp(torch.arange(6.0) * -0.7)))
NUMPYS_WAVES = np.sin(np.outer(np.arange(12.0), np.exp(np.arange(6.0) * -0.7)))
CONSTANTS = {
    "dict": Model(lambda model, x: x + model.waves[len(x)], waves={12: WAVES}),
    "tuple": Model(lambda model, x: x + model.waves[0], waves=(WAVES, WAVES)),
    "global": Model(lambda model, x: x + WAVES),
    "matrix": Model(lambda model, x: model.eye[0] @ x + WAVES, eye=[torch.eye(12)]),
}


@pytest.mark.parametrize("kind", CONSTANTS)
def test_constants_may_be_rounded_wherever_they_are(kind):
    x = drawn(12, 6)
    assert judged(CONSTANTS[kind], x, reference=lambda x: x + NUMPYS_WAVES).ok
    assert not judged(CONSTANTS[kind], x, reference=lambda x: x + 1.001 * NUMPYS_WAVES).ok


def test_so_may_complex_ones_and_the_buffers_of_a_reference():
    angles = np.outer(np.arange(12.0), 10.0 ** -np.arange(3))
    turns = torch.from_numpy(np.exp(1j * angles)).to(torch.complex64)

    def turned(model, x):
        pairs = torch.view_as_complex(x.reshape(12, 3, 2).contiguous())
        return torch.view_as_real(pairs * model.turns).flatten(1)

    def trusted(x):
        pairs = x.reshape(12, 3, 2)
        z = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)
        return np.stack([z.real, z.imag], -1).reshape(12, 6)

    x = drawn(12, 6)
    assert judged(Model(turned, turns=turns), x, reference=trusted).ok
    model = Model(lambda model, x: model.linear(x + model.waves), linear=nn.Linear(6, 3))
    model.register_buffer("waves", WAVES)
    trusted = copy.deepcopy(model).double()
    trusted.waves = torch.from_numpy(NUMPYS_WAVES)
    assert judged(model, x, reference=trusted).ok


SUMS = {
    "index_put": lambda i, x: torch.zeros(3).to(x).index_put_((i,), x, accumulate=True),
    "bincount": lambda i, x: torch.bincount(i, weights=x),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_by_index(name):
    i, x = torch.arange(100_000) % 3, drawn(100_000).abs()
    assert judged(Model(lambda model, x: SUMS[name](i, x)), x).ok


def test_images_made_smaller():
    shrunk = Model(lambda model, x: F.interpolate(x, (97, 131), mode="bilinear", antialias=True))
    assert judged(shrunk, drawn(1, 2, 224, 224)).ok


DRAWS = {
    "normal_": lambda x, g: torch.empty_like(x).normal_(generator=g),
    "uniform_": lambda x, g: torch.empty_like(x).uniform_(generator=g),
    "normal": lambda x, g: torch.normal(0.0, 1.0, x.shape, generator=g).to(x),
    "bernoulli": lambda x, g: torch.bernoulli(torch.sigmoid(x), generator=g),
    "randint": lambda x, g: torch.randint(9, x.shape, generator=g),
    "randperm": lambda x, g: torch.randperm(len(x), generator=g)[:, None],
}


@pytest.mark.parametrize("name", DRAWS)
def test_random_numbers_of_a_generator_of_its_own(name):
    def noisy(model, x):
        return x + DRAWS[name](x, torch.Generator().manual_seed(5))

    found = judged(Model(noisy), drawn(12, 6))
    assert found.ok, found.verdict
    assert not any("cannot run" in note for note in found.notes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_forward_mode_derivatives_need_a_reference():
    """Moved by random numbers they ended the process."""

    def laplace(model, x):
        hessians = torch.vmap(torch.func.hessian(lambda z: (z**3).sum()))(x)
        return hessians.diagonal(dim1=1, dim2=2).sum(1)

    x = drawn(12, 6)
    assert judged(Model(laplace), x, reference=lambda x: 6 * x.sum(1)).ok
    assert not judged(Model(laplace), x, reference=lambda x: 6.001 * x.sum(1)).ok
    with pytest.raises(ValueError, match="forward-mode differentiation has no bound"):
        judged(Model(laplace), x)


class Cache:
    """What it saw, as language models keep it."""

    def __init__(self):
        self.seen, self.keys = 0, None

    def add(self, keys):
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys])
        self.seen += len(keys)
        return self.keys[-len(keys) :]


def test_what_a_forward_keeps_in_an_object_is_undone():
    model, x = (
        Model(lambda m, x: m.last(m.cache.add(x)), cache=Cache(), last=nn.Linear(6, 3)),
        drawn(12, 6),
    )
    assert judged(model, x).ok
    assert (model.cache.seen, model.cache.keys) == (0, None)
    model(x)
    assert model.cache.seen == 12


def test_so_is_what_an_object_in_an_object_keeps():
    cache = Held()
    cache.inner = Cache()
    model = Model(lambda model, x: model.cache.inner.add(x), cache=cache)
    assert judged(model, drawn(12, 6)).ok
    assert (cache.inner.seen, cache.inner.keys) == (0, None)


def test_so_is_what_it_writes_into_a_tensor_or_draws():
    def written(model, x):
        kept = model.kept["k"]
        return kept.copy_(x.to(kept)).to(x) + torch.rand(6, generator=model.chance).to(x)

    chance = torch.Generator().manual_seed(3)
    model, before = (
        Model(written, kept={"k": torch.zeros(12, 6)}, chance=chance),
        chance.get_state(),
    )
    judged(model, drawn(12, 6), reference=lambda x: x)
    assert not model.kept["k"].any()
    assert torch.equal(chance.get_state(), before)


def test_weights_that_a_hook_makes_are_named():
    linear = nn.Linear(6, 3)
    linear.weight_orig = nn.Parameter(linear.weight.detach())
    del linear.weight
    linear.register_forward_pre_hook(
        lambda module, _: setattr(module, "weight", 1.5 * module.weight_orig)
    )
    found = judged(nn.Sequential(linear), drawn(12, 6))
    assert found.unjudged == ("how 0 Linear makes its parameters",)


@pytest.mark.parametrize("wrong", [False, True])
def test_attention_as_one_operation_is_computed_in_float64(wrong):
    """PyTorch says of it that it draws numbers: it may drop some out."""

    def attend(model, x):
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    def trusted(x):
        seen = np.tril(np.ones((9, 9))) == 1
        return softmax(np.where(seen, x @ mirrored(x) / (8 + 1e-6 * wrong) ** 0.5, -np.inf)) @ x

    found = judged(Model(attend), drawn(2, 9, 8), reference=trusted)
    assert found.ok is not wrong
    assert found.rows[-1].bound_ratio > 1e3 or not wrong


def test_a_reference_that_can_tell_nothing_is_said_to():
    """A network that makes chaos of rounding errors."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(40))
    for layer in layers:
        nn.init.normal_(layer.weight)

    def chaos(model, x):
        for layer in model.layers:
            x = torch.sin(3 * layer(x))
        return x

    def trusted(x):
        for layer in layers:
            weight, bias = (each.detach().double().numpy() for each in layer.parameters())
            x = np.sin(3 * (x @ weight.T + bias))
        return x

    found = judged(Model(chaos, layers=layers), drawn(5, 16), reference=trusted)
    assert found.ok
    assert found.unjudged == ("the output, which rounding may change by more than its size",)
    assert found.verdict.startswith("AGREES AS FAR AS JUDGED")
    assert found.verdict.endswith("by more than its size: a wrong formula there is not noticed.")


SCALARS = {
    "floor of a quotient": lambda x: torch.floor(x / 0.3),
    "an index": lambda x: (x / 0.3).long(),
    "a rest": lambda x: torch.sin(x % (2 * math.pi)),
}


@pytest.mark.parametrize("name", SCALARS)
def test_numbers_in_the_code_round_beside_whole_numbers(name):
    x = torch.arange(200.0).repeat(3, 1)
    found = judged(Model(lambda model, x: SCALARS[name](x)), x)
    assert found.ok, found.verdict


def test_a_sum_of_whole_numbers_may_round_on_the_way():
    x = torch.from_numpy(np.random.RandomState(0).randint(-8e6, 8e6, (400, 50))).float()
    found = judged(Model(lambda model, x: x.sum(-1)), x)
    assert found.ok, found.verdict


def test_a_constant_of_a_half_type_may_be_whole_by_rounding():
    mean = np.array([129.3, 140.7, 160.2])
    model = Model(lambda model, x: x - model.mean)
    model.register_buffer("mean", torch.from_numpy(mean))
    x = torch.from_numpy(np.random.RandomState(0).randint(0, 255, (9, 3))).bfloat16()
    assert judged(model.bfloat16(), x, reference=lambda x: x - mean).ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_constants_of_half_types_round_to_whole_numbers(dtype):
    table = np.cos(np.outer(np.arange(64.0), 10.0 ** -np.arange(4)))
    model = Model(lambda model, x: x * model.table + model.last(x))
    model.register_buffer("table", torch.from_numpy(table))
    model.last = nn.Linear(4, 4)
    trusted = copy.deepcopy(model).double()
    x = drawn(64, 4).to(dtype)
    assert judged(model.to(dtype), x, reference=trusted).ok


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_default_eps_of_half_types_is_that_of_float32(dtype):
    model = Model(lambda model, x: model.norm(1e-3 * x), norm=nn.RMSNorm(8)).to(dtype)
    found = judged(model, drawn(20, 8).to(dtype))
    assert found.ok, found.verdict


class Frozen(dict):
    def refuse(self, *_, **__):
        raise TypeError("it is frozen")

    clear = update = __setitem__ = refuse


class Held:
    def __init__(self):
        self.array = np.broadcast_to(np.float32(1), (3,))


def test_what_forbids_to_be_written_is_left_alone():
    model = Model(lambda model, x: model.config["times"] * x, config=Frozen(times=2.0), held=Held())
    model.lists = [torch.tensor(math.nan).expand(3)]
    assert judged(model, drawn(12, 6)).ok
    assert model.config == {"times": 2.0}


def test_a_tensor_that_a_forward_resizes_is_as_it_was():
    def grow(model, x):
        model.kept["k"].resize_(7, 3).zero_()
        return 2 * x

    model = Model(grow, kept={"k": torch.ones(4, 3)})
    assert judged(model, drawn(12, 6)).ok
    assert torch.equal(model.kept["k"], torch.ones(4, 3))
