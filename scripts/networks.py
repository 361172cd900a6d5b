"""Random networks that are right, and dense layers computed in right and in wrong ways."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchnnfs import Dense, ReLU, Softmax

#: A way of computing a dense layer, from input, weight and bias.
Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
#: What a reference computes, from parameters and input as arrays.
Formula = Callable[[dict[str, np.ndarray], np.ndarray], Any]


def wider(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Half types are computed in float32, as torch does."""
    return tensor.to(torch.promote_types(tensor.dtype, dtype))


def in_float64(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return x.double() @ w.double().T + b.double()


def reversed_order(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    total = wider(b).expand(*x.shape[:-1], len(w)).clone()
    for k in reversed(range(x.shape[-1])):
        total += wider(x[..., k, None]) * wider(w[:, k])
    return total


def fused_multiply_add(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Each product is added before it is rounded; in float64 it is rounded."""
    step = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros(*x.shape[:-1], len(w), dtype=step)
    for k in range(x.shape[-1]):
        exact = x[..., k, None].double() * w[:, k].double() + total.double()
        total = exact.to(step)
    return total + wider(b)


def blocked(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Sums of eight products, and their sum."""
    blocks = zip(wider(x).split(8, -1), wider(w).split(8, -1), strict=True)
    return sum((part @ factors.T for part, factors in blocks), torch.zeros(())) + wider(b)


def pairwise(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    terms = wider(x)[..., None, :] * wider(w)
    while terms.shape[-1] > 1:
        terms = F.pad(terms, (0, terms.shape[-1] % 2))
        terms = terms[..., ::2] + terms[..., 1::2]
    return terms[..., 0] + wider(b)


def by_addmm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(b, x.flatten(0, -2), w.T).reshape(*x.shape[:-1], len(w))


RIGHT: dict[str, Compute] = {
    "einsum": lambda x, w, b: torch.einsum("...i,oi->...o", x, w) + b,
    "addmm": by_addmm,
    "blocked sums": blocked,
    "reversed sums": reversed_order,
    "fused multiply-add": fused_multiply_add,
    "pairwise sums": pairwise,
    "float64 inside": in_float64,
}


def shortened(tensor: Tensor, bits: int) -> Tensor:
    """A float32 tensor with that many significant bits."""
    mantissa, exponent = torch.frexp(tensor.double())
    return torch.ldexp(torch.round(mantissa * 2**bits), exponent - bits).to(tensor.dtype)


def in_bfloat16(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """Each partial sum is rounded to bfloat16."""
    total = torch.zeros(*x.shape[:-1], len(w))
    for k in range(x.shape[-1]):
        total = (total + x[..., k, None] * w[:, k]).bfloat16().float()
    return total + b


def noisy(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    random = torch.Generator().manual_seed(0)
    y = F.linear(x, w, b)
    return y * (1 + 1e-6 * torch.randn(y.shape, generator=random))


WRONG: dict[str, Compute] = {
    "TF32": lambda x, w, b: F.linear(shortened(x, 11), shortened(w, 11), b),
    "bfloat16 partial sums": in_bfloat16,
    "noise of 1e-6": noisy,
}


class OtherDense(nn.Linear):
    """A dense layer that is computed in another way."""

    def __init__(self, layer: nn.Linear, compute: Compute):
        dtype = layer.weight.dtype
        super().__init__(layer.in_features, layer.out_features, dtype=dtype)
        self.load_state_dict(layer.state_dict())
        self.compute = compute

    def forward(self, input: Tensor) -> Tensor:
        return self.compute(input, self.weight, self.bias).to(input.dtype)


class OtherSoftmax(nn.Softmax):
    """Softmax by way of its logarithm."""

    def forward(self, input: Tensor) -> Tensor:
        return F.log_softmax(wider(input), self.dim).exp().to(input.dtype)


def other_way(model: nn.Sequential, compute: Compute) -> nn.Sequential:
    """The same chain, its dense layers computed in another way, and its softmax too."""
    layers = [OtherDense(each, compute) if isinstance(each, Dense) else each for each in model]
    return nn.Sequential(*(OtherSoftmax(-1) if isinstance(e, Softmax) else e for e in layers))


def network(seed: int, index: int) -> tuple[nn.Sequential, Tensor]:
    """Chain `index` of `seed` and its input, in float64; each candidate rounds them itself."""
    stream = np.random.RandomState([seed, index])
    widths = stream.randint(1, 65, size=stream.randint(2, 6))
    layers: list[nn.Module] = []
    for n_inputs, n_neurons in itertools.pairwise(widths.tolist()):
        weights = stream.randn(n_inputs, n_neurons) * 10 ** stream.uniform(-3, 1)
        layers += [Dense.from_numpy(weights, stream.randn(n_neurons)), ReLU()]
    # A softmax may hide what is wrong in large numbers: some networks end without one.
    layers[-1:] = [Softmax()] if stream.rand() < 0.75 else []
    points = stream.randn(stream.randint(1, 201), widths[0]) * 10 ** stream.uniform(-2, 2)
    return nn.Sequential(*layers), torch.from_numpy(points)


def scrambled(model: nn.Module, stream: np.random.RandomState) -> nn.Module:
    """`model` in float64 and eval mode, its parameters and running statistics drawn at random."""
    model = model.double().eval()
    scale = 10 ** stream.uniform(-1, 0.5)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            values = stream.randn(*tensor.shape)
            fan = max(1, tensor[0].numel()) if tensor.ndim > 1 else 1
            positive = name.endswith("running_var")
            tensor.copy_(torch.from_numpy(values**2 + 0.01 if positive else values * scale))
            tensor /= 1 if positive else fan**0.5
    return model


def activation(stream: np.random.RandomState) -> nn.Module:
    known = [
        nn.ReLU(),
        nn.LeakyReLU(float(stream.choice([0.01, 0.2]))),
        nn.Tanh(),
        nn.Sigmoid(),
        nn.GELU(),
        nn.GELU(approximate="tanh"),
    ]
    return known[stream.randint(len(known))]


def other_layers(seed: int, index: int) -> tuple[nn.Module, Tensor]:
    """A network of other layers: of vectors, pictures, sequences or words, and its input."""
    stream = np.random.RandomState([seed, index, 1])
    a, b, c, rows = (int(each) for each in stream.randint(1, 17, size=4))
    pool = [nn.MaxPool2d(2), nn.AvgPool2d(3, stride=2, padding=1)][stream.randint(2)]
    stride, padding = int(stream.randint(1, 3)), int(stream.randint(0, 2))
    heads: list[tuple[list[nn.Module], int, tuple[int, ...]]] = [
        ([nn.Linear(a, b), nn.BatchNorm1d(b)], b, (rows, a)),
        (
            [
                nn.Conv2d(a, b, 3, stride, 1),
                nn.BatchNorm2d(b),
                activation(stream),
                pool,
                nn.Flatten(),
            ],
            b * (4 // stride) ** 2,
            (rows, a, 8, 8),
        ),
        (
            [nn.Conv1d(a, b, 3, padding=padding), activation(stream), nn.Flatten()],
            b * (7 + 2 * padding),
            (rows, a, 9),
        ),
        ([nn.Embedding(20, a), nn.Flatten()], 5 * a, (rows, 5)),
    ]
    kind = int(stream.randint(len(heads)))
    layers, width, shape = heads[kind]
    layers += [activation(stream), nn.LayerNorm(width), nn.Linear(width, c), activation(stream)]
    layers += [nn.Linear(c, 1 + c), [nn.Softmax(-1), nn.LogSoftmax(-1)][stream.randint(2)]]
    model = scrambled(nn.Sequential(*layers), stream)
    if kind == 3:
        return model, torch.from_numpy(stream.randint(20, size=shape))
    return model, torch.from_numpy(stream.randn(*shape) * 10 ** stream.uniform(-1, 1))


class Residual(nn.Module):
    """``y = (x + relu(x W1 + b1)) W2 + b2``."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, input: Tensor) -> Tensor:
        return self.last(input + torch.relu(self.first(input)))


class Attention(nn.Module):
    """``y = softmax(x x^T / sqrt(d)) (x W + b)``."""

    def __init__(self, width: int):
        super().__init__()
        self.values = nn.Linear(width, width)

    def forward(self, input: Tensor) -> Tensor:
        scores = input @ input.mT / input.shape[-1] ** 0.5
        return torch.softmax(scores, -1) @ self.values(input)


class TwoHeads(nn.Module):
    """Classes and a size, from the same hidden numbers."""

    def __init__(self, width: int):
        super().__init__()
        self.trunk, self.classes, self.size = (nn.Linear(width, n) for n in (width, 4, 1))

    def forward(self, input: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.trunk(input))
        return {"classes": torch.softmax(self.classes(hidden), -1), "size": self.size(hidden)}


def numpy_softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def numpy_linear(p: dict[str, np.ndarray], name: str, x: np.ndarray) -> np.ndarray:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def numpy_attention(p: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    scores = x @ np.swapaxes(x, -1, -2) / x.dtype.type(x.shape[-1] ** 0.5)
    return numpy_softmax(scores) @ numpy_linear(p, "values", x)


def numpy_heads(p: dict[str, np.ndarray], x: np.ndarray) -> dict[str, np.ndarray]:
    hidden = np.tanh(numpy_linear(p, "trunk", x))
    scores = numpy_linear(p, "classes", hidden)
    return {"classes": numpy_softmax(scores), "size": numpy_linear(p, "size", hidden)}


OWN: dict[str, tuple[type[nn.Module], Formula]] = {
    "residual": (
        Residual,
        lambda p, x: numpy_linear(p, "last", x + np.maximum(0, numpy_linear(p, "first", x))),
    ),
    "attention": (Attention, numpy_attention),
    "two heads": (TwoHeads, numpy_heads),
}


def own_forward(seed: int, index: int) -> tuple[str, nn.Module, Tensor]:
    """The kind of a network with a forward of its own, the network and its input."""
    stream = np.random.RandomState([seed, index, 2])
    kind = list(OWN)[stream.randint(len(OWN))]
    width = int(stream.randint(1, 33))
    model = scrambled(OWN[kind][0](width), stream)
    shape = (int(stream.randint(1, 4)), int(stream.randint(1, 17)), width)
    return kind, model, torch.from_numpy(stream.randn(*shape) * 10 ** stream.uniform(-1, 0.5))
