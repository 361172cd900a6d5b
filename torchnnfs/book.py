"""The book's dialect: its names, its stream and its arithmetic, bit for bit.

The arithmetic is that of the book's page, which `nnfs.init()` and a correctly rounded `exp` give:

1. A dot product is accumulated in float64 from the first input to the last and rounded to float32
   once; the biases are added in float32.
2. ReLU works in the dtype of its input.
3. Softmax subtracts the row's maximum, takes `exp` in float64, rounds it, sums and divides, all in
   the dtype of its input (float32 behind a layer; float64 for lists of numbers, as in NumPy).
   A sum runs in the order of NumPy's pairwise summation: one after the other up to 7 numbers;
   up to 128 in eight interleaved partial sums; longer rows in two halves.

Only operations that IEEE 754 rounds in one way are used (`exp` is made of them here), one torch
operation each, so the bits of the results do not depend on the device, the number of threads, the
batch or the version of NumPy. They hold in eager mode: a compiler may contract a product and a sum
into one. Gradients are torch's: within rounding of the exact ones, and no more.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchnnfs.checks import check_numbers
from torchnnfs.modules import Dense, ReLU, Softmax, with_classes
from torchnnfs.streams import Generator


class _KeepsOutput:
    """What the book's objects have and torch's modules have not: `.output`."""

    _output: Tensor | None = None

    @property
    def output(self) -> NDArray[Any] | None:
        """What the last `forward` returned, as the book's array; None before the first."""
        kept = self._output
        if kept is None:
            return None
        return (kept.float() if kept.dtype == torch.bfloat16 else kept).cpu().numpy()

    def _keep(self, result: Tensor) -> Tensor:
        # A copy: what is written to the output must not reach what autograd has kept.
        kept = result.detach().clone()
        try:
            if not torch.compiler.is_compiling():
                kept.data_ptr()
            self._output = kept
        except RuntimeError:  # inside a transformation like vmap, tensors have no values
            self._output = None
        return result


class Layer_Dense(_KeepsOutput, Dense):  # noqa: N801
    r"""The book's dense layer, ``np.dot(inputs, weights) + biases`` under ``nnfs.init()``.

    Args:
        n_inputs: size of the last dimension of the inputs.
        n_neurons: size of the last dimension of the output.
        device: where the parameters live; torch's default device when None.

    Shape:
        - inputs: :math:`(*, \text{n\_inputs})`: a tensor on the layer's device, an array or nested
          lists.
        - output: :math:`(*, \text{n\_neurons})`, float32.

    Attributes:
        weights: (n_inputs, n_neurons) float32 array, ``0.01 * np.random.randn(n_inputs,
            n_neurons)`` drawn from NumPy's global stream, whether ``nnfs.init()`` was called or
            only ``np.random.seed``. May be assigned. On the CPU it shares the layer's memory; from
            another device it is a copy, so assign it as a whole there (``+=`` does). It is a
            transposed view, so its order in memory is Fortran's, as ``flags`` says.
        biases: (1, n_neurons) float32 array, zeros; the same holds.
        output: what the last ``forward`` returned, as a NumPy array without history. The returned
            tensor carries the gradient.

    Raises:
        TypeError: a width that is no int; inputs that are no numbers; a device without float64.
        ValueError: a width below 1; a wrong last dimension; an assigned array of another shape.

    Example:
        >>> np.random.seed(0)
        >>> dense1 = Layer_Dense(2, 3)
        >>> dense1.weights
        array([[ 0.01764052,  0.00400157,  0.00978738],
               [ 0.02240893,  0.01867558, -0.00977278]], dtype=float32)
        >>> dense1.forward([[1, 2]])
        tensor([[ 0.0625,  0.0414, -0.0098]], grad_fn=<AddBackward0>)
        >>> dense1.output
        array([[ 0.06245838,  0.04135273, -0.00975818]], dtype=float32)

    Source: NNFS chapter 4, class ``Layer_Dense``.
    """

    def __init__(
        self, n_inputs: int, n_neurons: int, *, device: torch.device | str | int | None = None
    ) -> None:
        super().__init__(n_inputs, n_neurons, device=device, dtype=torch.float32)

    def reset_parameters(self, generator: Generator = None) -> None:
        """Draw the weights again, from `generator` or, when None, from NumPy's global stream."""
        if generator is not None or self.weight.is_meta:
            super().reset_parameters(generator)
            return
        self._fill(np.random.randn(self.in_features, self.out_features))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def weights(self) -> NDArray[np.float32]:  # noqa: D102
        return self.weight.detach().cpu().float().numpy().T

    @weights.setter
    def weights(self, values: ArrayLike | Tensor) -> None:
        self._assign("weights", self.weight.T, values, [(self.in_features, self.out_features)])

    @property
    def biases(self) -> NDArray[np.float32] | None:  # noqa: D102
        if self.bias is None:
            return None
        return self.bias.detach().cpu().float().numpy().reshape(1, -1)

    @biases.setter
    def biases(self, values: ArrayLike | Tensor) -> None:
        if self.bias is None:
            raise ValueError("Layer_Dense without bias expects no biases")
        n = self.out_features
        self._assign("biases", self.bias.view(1, -1), values, [(1, n), (n,)])

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module would register a parameter or module under the name of the property.
        if name in ("weights", "biases"):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _assign(self, name: str, place: Tensor, values: Any, shapes: list[tuple[int, ...]]) -> None:
        tensor = check_numbers(f"Layer_Dense.{name}", values)
        if tensor.shape not in shapes:
            raise ValueError(
                f"Layer_Dense.{name} expects shape {' or '.join(map(str, shapes))}, "
                f"got {tuple(tensor.shape)}"
            )
        if parametrize.is_parametrized(self):
            raise ValueError(
                f"Layer_Dense.{name} cannot be assigned while the layer is parametrized; call "
                "torch.nn.utils.parametrize.remove_parametrizations first"
            )
        with torch.no_grad():
            place.copy_(tensor)

    def forward(self, inputs: ArrayLike | Tensor) -> Tensor:  # noqa: D102
        x = _as_tensor("Layer_Dense", inputs, self.weight.device)
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"Layer_Dense(n_inputs={self.in_features}) expects a last dimension of "
                f"{self.in_features}, got inputs of shape {tuple(x.shape)}"
            )
        x, weight = _double("Layer_Dense", x), _double("Layer_Dense", self.weight)
        # The product of two float32 numbers is exact in float64, so only the sums round.
        total = x[..., :1] * weight[:, 0]
        for i in range(1, self.in_features):
            total = total + x[..., i : i + 1] * weight[:, i]
        output = total.float()
        return self._keep(output if self.bias is None else output + self.bias.float())


class Activation_ReLU(_KeepsOutput, ReLU):  # noqa: N801
    """The book's ReLU, ``np.maximum(0, inputs)``.

    Shape:
        - inputs: any: a tensor, an array or nested lists.
        - output: the same shape and dtype.

    Attributes:
        output: what the last ``forward`` returned, as a NumPy array without history.

    Raises:
        TypeError: inputs that are no numbers.

    Example:
        >>> Activation_ReLU().forward([0, 2, -1, 3.3, -2.7, 1.1, 2.2, -100])
        tensor([0.0000, 2.0000, 0.0000, 3.3000, 0.0000, 1.1000, 2.2000, 0.0000],
               dtype=torch.float64)

    Source: NNFS chapter 4, class ``Activation_ReLU``.
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, inputs: ArrayLike | Tensor) -> Tensor:  # noqa: D102
        x = _as_tensor("Activation_ReLU", inputs)
        return self._keep(x.relu_() if self.inplace else x.relu())


class Activation_Softmax(_KeepsOutput, Softmax):  # noqa: N801
    """The book's softmax along the last dimension; see the module for its arithmetic.

    Shape:
        - inputs: (*, classes), at least one dimension: a tensor, an array or nested lists.
        - output: the same shape; float32 for float32 and half types, else float64.

    NaN and infinities give what `torchnnfs.Softmax` gives.

    Attributes:
        output: what the last ``forward`` returned, as a NumPy array without history.

    Raises:
        TypeError: inputs that are no numbers; a device without float64.
        ValueError: inputs without dimensions.

    Example:
        >>> softmax = Activation_Softmax()
        >>> _ = softmax.forward([[1, 2, 3]])
        >>> print(softmax.output)
        [[0.09003057 0.24472847 0.66524096]]

    Source: NNFS chapter 4, class ``Activation_Softmax``.
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, inputs: ArrayLike | Tensor) -> Tensor:  # noqa: D102
        x = _as_tensor("Activation_Softmax", inputs)
        if x.ndim == 0:
            raise ValueError("Activation_Softmax expects at least one dimension, got a number")
        _double("Activation_Softmax", x)
        if x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        elif not x.is_floating_point():
            x = x.double()
        probabilities: Tensor = _Softmax.apply(x)  # type: ignore[no-untyped-call]
        return self._keep(probabilities)


class _Softmax(torch.autograd.Function):
    """Softmax in the book's arithmetic, with the derivative of the exact one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        if x.shape[-1] == 0:
            return x.clone()
        shifted = x - x.amax(-1, keepdim=True)
        powers = exp(shifted.double()).to(x.dtype)
        return powers / _sum(powers).unsqueeze(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        p: Tensor = ctx.saved_tensors[0]
        weighted = grad * p
        return weighted - p * weighted.sum(-1, keepdim=True)


_LN2_HIGH = float.fromhex("0x1.62e42feep-1")  # 32 bits, so that a multiple of it is exact
_LN2_LOW = float.fromhex("0x1.a39ef35793c76p-33")
_TAYLOR = [1 / math.factorial(k) for k in range(14)]


def exp(x: Tensor) -> Tensor:
    """``e**x`` for float64 x up to 0, to about one unit in the last place.

    ``2**n e**r`` with ``x = n log 2 + r``: the Taylor series of degree 13 is off by less than 5e-18
    for ``|r| <= log(2) / 2``. The exponential of a library would do, but each has its own last bit.
    """
    x = x.clamp(min=-750.0)  # e**-750 rounds to 0
    n = torch.round(x * (1 / math.log(2)))
    r = x - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    power = torch.full_like(r, _TAYLOR[-1])
    for coefficient in _TAYLOR[-2::-1]:
        power = power * r
        power = power + coefficient
    # In two steps, since 2**n may be no normal number.
    half = (n * 0.5).floor()
    return power * _power_of_two(half) * _power_of_two(n - half)


def _power_of_two(n: Tensor) -> Tensor:
    """``2.0**n`` for whole n from -1022 to 1023, exactly, by the bits of a float64."""
    bits = (n.nan_to_num().to(torch.int64) + 1023) << 52
    return bits.view(torch.float64)


def _sum(x: Tensor) -> Tensor:
    """The sum along the last dimension in the order of NumPy's pairwise summation."""
    n = x.shape[-1]
    if n > 128:
        half = n // 2 - n // 2 % 8
        return _sum(x[..., :half]) + _sum(x[..., half:])
    start = 1
    total = x[..., 0]
    if n >= 8:
        start = n - n % 8
        lanes = x[..., :8]
        for i in range(8, start, 8):
            lanes = lanes + x[..., i : i + 8]
        for _ in range(3):
            lanes = lanes[..., ::2] + lanes[..., 1::2]
        total = lanes[..., 0]
    for i in range(start, n):
        total = total + x[..., i]
    return total


def _as_tensor(owner: str, values: Any, device: torch.device | None = None) -> Tensor:
    """A tensor as it is; arrays and lists with the dtype that NumPy gives them, on `device`."""
    if isinstance(values, Tensor) and not values.is_complex():
        return values
    return check_numbers(owner, values).to(device)


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


_TO_TORCH: dict[type[nn.Module], type[nn.Module]] = {
    Layer_Dense: Dense,
    Activation_ReLU: ReLU,
    Activation_Softmax: Softmax,
}
_TO_BOOK: dict[type[nn.Module], type[nn.Module]] = {
    **{theirs: ours for ours, theirs in _TO_TORCH.items()},
    nn.Linear: Layer_Dense,
    nn.ReLU: Activation_ReLU,
    nn.Softmax: Activation_Softmax,
}


def to_torch(model: nn.Module) -> nn.Module:
    """A copy of `model` with `Dense`, `ReLU` and `Softmax` in the place of the book's layers.

    Parameters, their device, hooks and everything else stay what they are.

    Example:
        >>> to_torch(nn.Sequential(Layer_Dense(2, 3), Activation_ReLU()))
        Sequential(
          (0): Dense(in_features=2, out_features=3, bias=True)
          (1): ReLU()
        )
    """
    model = with_classes(model, _TO_TORCH)
    for layer in model.modules():
        vars(layer).pop("_output", None)  # only the book keeps it
    return model


def from_torch(model: nn.Module) -> nn.Module:
    """A float32 copy of `model` with the book's layers in the place of torch's and ours.

    Only layers of exactly the types Dense, ReLU, Softmax and their `torch.nn` counterparts are
    replaced; a subclass may compute something else.

    Raises:
        ValueError: a softmax along another dimension than the last.
    """
    for path, layer in model.named_modules():
        if type(layer) in (Softmax, nn.Softmax) and layer.dim != -1:
            raise ValueError(
                f"book.from_torch expects softmax along the last dimension, got {layer} at {path!r}"
            )
    return with_classes(model, _TO_BOOK).float()


def from_numpy(layer: Any, *, device: torch.device | str | int | None = None) -> nn.Module:
    """The dialect's layer for an object of a reader's own NumPy code, or a Sequential for several.

    Args:
        layer: an object with ``weights`` (n_inputs, n_neurons) and ``biases``, whose values are
            copied; or one whose class is named like `Activation_ReLU` or `Activation_Softmax`; or
            a list of such objects, in the order in which they are called.
        device: where the parameters live; torch's default device when None.

    Raises:
        TypeError: an object of another kind.
        ValueError: arrays of shapes that do not fit.

    Example:
        >>> class Layer:
        ...     weights, biases = np.ones((2, 3)), np.zeros((1, 3))
        >>> from_numpy([Layer(), Activation_ReLU()])
        Sequential(
          (0): Layer_Dense(in_features=2, out_features=3, bias=True)
          (1): Activation_ReLU()
        )
    """
    if isinstance(layer, list | tuple):
        return nn.Sequential(*(from_numpy(each, device=device) for each in layer))
    if hasattr(layer, "weights"):
        biases = getattr(layer, "biases", None)
        dense = Dense.from_numpy(layer.weights, biases, device=device, dtype=torch.float32)
        return from_torch(dense)
    for kind in (Activation_ReLU, Activation_Softmax):
        if type(layer).__name__ == kind.__name__:
            return kind()
    raise TypeError(
        "book.from_numpy expects an object with weights and biases, or of a class named "
        f"Activation_ReLU or Activation_Softmax, got one of class {type(layer).__name__}"
    )
