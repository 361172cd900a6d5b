"""The book's arithmetic: dot product, exponential and sum with bits that no library decides.

1. A dot product is accumulated in float64 from the first input to the last, rounded to float32
   once, and never -0.0.
2. `exp` is computed in float64 by additions and multiplications alone.
3. A sum along a row runs in the order of NumPy's pairwise summation: one after the other up to 7
   numbers; up to 128 in eight interleaved partial sums; longer rows in two halves.

`in_order`, `exp` and `row_sum` do this step by step, with operations that IEEE 754 rounds in one
way. `dot` and `softmax_on_host` give the same bits faster, by Ziv's rounding test: they take the
float64 result y of a library and a bound e on its distance from the defined one. Where y - e and
y + e round to the same float32, the defined result does too. The rest is computed step by step.

The bound for `dot`. Let u = 2**-53, k the number of inputs and S = sum |x_i| |w_i|. Each product
and each sum is rounded at most once, in whatever order and with or without fused operations. So the
library and the defined order are both within k u S of the exact sum (Jeannerod and Rump, *Improved
error bounds for inner products in floating-point arithmetic*, 2013), and within 2 k u S of each
other. y - e and y + e are rounded as well, by u (|y| + e), and |y| is at most S (1 + k u). The
computed S is short by no more than a factor of 1 - (k + 1) u. e = (2 k + 4) u S leaves 3 u S for
these three, which is more than enough up to k = 10**7. No test is needed for up to two float32
inputs: their products are exact in float64, and one sum rounds in one way.

The bound for `softmax_on_host`. The defined `exp` is within 3 u of the exact value, relatively: u/4
from the reduced argument, 0.05 u from the end of the series, 2 u from the last steps of the
polynomial, where the terms before them are at most 0.42 of the result. Libraries state 1 unit in
the last place (2 u) for float64; 4 u is allowed here, and u for each rounding of y - e and y + e.
e = 16 u y covers twice as much.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeGuard

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

_UNIT = 2.0**-53
_PLAIN = {Tensor, nn.Parameter}
_SHARED = {torch.float32, torch.float64, torch.int64}
_LN2_HIGH = float.fromhex("0x1.62e42feep-1")  # 32 bits, so that a multiple of it is exact
_LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
_TAYLOR = [1 / math.factorial(k) for k in range(14)]


@np.errstate(all="ignore")
def dot(x: NDArray[Any], w: NDArray[Any], bias: Any = 0.0) -> NDArray[np.float32]:
    """``in_order(x, w)`` in float32, for two matrices, plus the bias."""
    if len(w) <= 2 and x.dtype == w.dtype == np.float32:
        result: NDArray[np.float32] = np.matmul(x, w, dtype=np.float64).astype(np.float32)
    else:
        x, w = x.astype(np.float64), w.astype(np.float64)
        y, error = np.matmul(x, w), np.matmul(np.abs(x), np.abs(w) * ((2 * len(w) + 4) * _UNIT))
        result, unsure = _rounded(y - error, y + error)
        if np.count_nonzero(unsure):
            places = np.flatnonzero(unsure)
            for part in np.array_split(places, 1 + places.size * len(w) // 2**22):  # 32 MB each
                rows, columns = np.divmod(part, w.shape[1])
                np.put(result, part, np.add.accumulate(x[rows] * w.T[columns], axis=1)[:, -1])
    result += bias + 0.0  # turns -0.0 into 0.0
    return result


def in_order(x: Any, w: Any) -> Any:
    """The product of x and the matrix w, tensors or arrays, from the first input to the last."""
    total = x[..., :1] * w[0]
    for i in range(1, len(w)):
        total = total + x[..., i : i + 1] * w[i]
    return total


@np.errstate(all="ignore")
def softmax_on_host(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Softmax along the last dimension, which is not empty."""
    # NumPy's own reduction is slow along a short row, and a maximum has no rounding.
    columns = (x[..., i] for i in range(x.shape[-1]))
    top = functools.reduce(np.maximum, columns) if x.shape[-1] <= 8 else x.max(-1)
    shifted = (x - top[..., None]).astype(np.float64)
    y = np.exp(shifted)
    powers, unsure = _rounded(y * (1 - 16 * _UNIT), y * (1 + 16 * _UNIT))
    if np.count_nonzero(unsure):
        powers[unsure] = exp(torch.from_numpy(shifted[unsure])).numpy()
    probabilities: NDArray[np.float32] = powers / row_sum(powers)[..., None]
    return probabilities


def _rounded(
    low: NDArray[np.float64], high: NDArray[np.float64]
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """What the numbers from `low` to `high` round to in float32, and where they do not agree."""
    result = low.astype(np.float32)
    return result, result != high.astype(np.float32)


def exp(x: Tensor) -> Tensor:
    """``e**x`` for float64 x up to 0, to about one unit in the last place.

    ``2**n e**r`` with ``x = n log 2 + r``: the Taylor series of degree 13 is off by less than 5e-18
    for ``|r| <= log(2) / 2``. The exponential of a library would do, but each has its own last bit.
    """
    x = x.clamp(min=-750.0)  # e**-750 rounds to 0
    n = torch.round(x * (1 / math.log(2)))
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    power = torch.full_like(r, _TAYLOR[-1])
    for coefficient in _TAYLOR[-2::-1]:
        power = power * r + coefficient
    # In two steps, since 2**n may be no normal number.
    powers = torch.full((542,), 0.5, dtype=r.dtype, device=r.device).cumprod(0) * 2  # exact
    n = n.neg().nan_to_num().to(torch.int64)
    half = n >> 1
    return power * powers[half] * powers[n - half]


def row_sum(x: Any) -> Any:
    """The sum along the last dimension, of a tensor or an array, in NumPy's pairwise order."""
    n = x.shape[-1]
    if n > 128:
        half = n // 2 - n // 2 % 8
        return row_sum(x[..., :half]) + row_sum(x[..., half:])
    total, start = x[..., 0], 1
    if n >= 8:
        lanes, start = x[..., :8], n - n % 8
        for i in range(8, start, 8):
            lanes = lanes + x[..., i : i + 8]
        for _ in range(3):
            lanes = lanes[..., ::2] + lanes[..., 1::2]
        total = lanes[..., 0]
    for i in range(start, n):
        total = total + x[..., i]
    return total


@np.errstate(all="ignore")
def jacobian_product(p: NDArray[Any], values: NDArray[Any]) -> NDArray[np.float32]:
    """``np.dot(np.diagflat(p) - np.dot(p, p.T), values)`` for each row, as nnfs.init() has it."""
    total = np.zeros(p.shape, np.float64)
    for j in range(p.shape[-1]):
        column = -(p.astype(np.float64) * p[..., j : j + 1]).astype(np.float32).astype(p.dtype)
        column[..., j] += p[..., j]
        total += column.astype(np.float64) * values[..., j : j + 1]
    return total.astype(np.float32)


def dense(owner: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The layer in the book's arithmetic, on any device and differentiable; for `owner`."""
    if _on_host(x, weight):
        rows = x.detach().numpy().reshape(-1, x.shape[-1])
        values = affine(rows, weight, bias).reshape(*x.shape[:-1], len(weight))
        return with_graph(values, x, weight, bias)
    total: Tensor = in_order(_double(owner, x), _double(owner, weight).T).float()
    return total + (0.0 if bias is None else bias.float() + 0.0)


def affine(rows: NDArray[Any], weight: Tensor, bias: Tensor | None) -> NDArray[np.float32]:
    """`dense` for a matrix on the host."""
    plus = 0.0 if bias is None else bias.detach().float().numpy()
    return dot(rows, weight.detach().numpy().T, plus)


def softmax(owner: str, x: Tensor) -> Tensor:
    """Softmax along the last dimension, as `dense`; float32 and half types give float32."""
    if x.dtype != torch.float32:
        x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else _double(owner, x)
    if x.shape[-1] == 0:
        return x.clone()
    if x.dtype == torch.float32 and _on_host(x):
        return with_graph(softmax_on_host(x.detach().numpy()), x)
    powers = exp(_double(owner, x - x.amax(-1, keepdim=True).detach())).to(x.dtype)
    probabilities: Tensor = powers / row_sum(powers).unsqueeze(-1)
    return probabilities


class _Exact(torch.autograd.Function):
    """Values that NumPy computed, with the derivative of softmax(x) or linear(x, weight, bias)."""

    @staticmethod
    def forward(ctx: Any, values: NDArray[Any], *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.from_numpy(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = tuple(x.double() for x in ctx.saved_tensors if x is not None)
        again = torch.is_grad_enabled()  # a second derivative may be asked for
        vjp: Any = torch.autograd.functional.vjp
        formula = F.linear if len(tensors) > 1 else functools.partial(torch.softmax, dim=-1)
        gradients = vjp(formula, tensors, grad.double(), create_graph=again)[1]
        return None, *gradients, *([None] * (len(ctx.saved_tensors) - len(tensors)))


# Past Function's own `apply`, which looks for transformations: `_on_host` has done that.
with_graph: Callable[..., Tensor] = super(torch.autograd.Function, _Exact).apply


def is_quick(values: Any, *tensors: Any) -> TypeGuard[NDArray[np.float32]]:
    """Whether `values` are a plain float32 array with numbers, and `tensors` on the host."""
    plain = type(values) is np.ndarray and values.dtype == np.float32 and values.size > 0
    return plain and _on_host(*tensors)


def _on_host(*tensors: Any) -> bool:
    """Whether NumPy can read the tensors in place, and nothing records what torch does."""
    for x in tensors:
        if not (type(x) in _PLAIN and x.is_cpu and x.dtype in _SHARED):
            return False
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or torch._C._are_functorch_transforms_active()
        or is_in_torch_dispatch_mode()
        or forward_ad._current_level >= 0
    )


def _double(owner: str, x: Tensor) -> Tensor:
    try:
        return x.double()
    except (RuntimeError, TypeError) as error:
        if "64" not in str(error):
            raise
        raise TypeError(
            f"{owner} computes in float64, which {x.device} does not have; "
            "move the layer and its inputs to another device, with .to('cpu')"
        ) from error
