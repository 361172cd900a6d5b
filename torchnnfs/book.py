"""The book's dialect: its names, its stream and its arithmetic, bit for bit.

The arithmetic is that of the book's page, which `nnfs.init()` and a correctly rounded `exp` give:

1. A dot product is accumulated in float64 from the first input to the last and rounded to float32
   once; the biases are added in float32.
2. ReLU works in the dtype of its input.
3. Softmax subtracts the row's maximum, takes `exp` in float64, rounds it, sums and divides, all in
   the dtype of its input (float32 behind a layer; float64 for lists of numbers, as in NumPy).
4. `backward` has the same dot products; its sums run in NumPy's order, its other steps in NumPy.

`torchnnfs.arithmetic` says how, and why the bits do not depend on the device, the number of threads,
the batch or the version of NumPy. They hold in eager mode: a compiler may contract a product and a
sum into one. Gradients of autograd are torch's: within rounding of the exact ones, and no more.

What a reader sets on a layer is a plain attribute, and so is a layer of the dialect (``dense1.next =
activation1``): it is no part of the layer that it is set on. Other modules are registered, as in
torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torchnnfs import arithmetic, objects
from torchnnfs.arithmetic import exp as exp
from torchnnfs.checks import check_numbers, check_real
from torchnnfs.modules import Dense, ReLU, Softmax, with_classes
from torchnnfs.streams import Generator


class _Kept:
    """An attribute that `forward` keeps as a tensor, and that is an array from its first use on."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: Any, owner: type | None = None) -> Any:
        state = {} if layer is None else vars(layer)
        kept = state.get("_" + self.name)
        if kept is not None:
            state[self.name] = _to_numpy(kept)
        return state.get(self.name)


class _Book(nn.Module):
    """What the book's objects have and torch's modules have not: what `forward` keeps."""

    inputs, output = _Kept(), _Kept()
    _inputs = _output = None

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module would register a linked layer, or a parameter under the name of a property.
        if isinstance(value, _Book) or hasattr(type(self), name):
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _keep(self, inputs: Any, x: Tensor, result: Tensor) -> Tensor:
        for name in ("inputs", "output"):
            vars(self).pop(name, None)
        self._inputs, kept = _values(x), _values(result)
        # A copy: what is written to the output must not reach what autograd has kept.
        self._output = kept if kept is None else kept.clone()
        if isinstance(inputs, np.ndarray):
            self.inputs = inputs
        return result

    def _received(self, dvalues: ArrayLike | Tensor, kept: Any, shape: Any = None) -> NDArray[Any]:
        """`dvalues` as an array, which fits what the last `forward` has kept."""
        name = type(self).__name__
        if kept is None:
            raise RuntimeError(f"{name}.backward expects a call of {name}.forward before it")
        values = check_numbers(f"{name}.backward", dvalues).numpy()
        shape = np.shape(kept) if shape is None else shape
        if values.shape != shape:
            raise ValueError(
                f"{name}.backward expects dvalues of shape {shape}, as the last output has, "
                f"got {values.shape}"
            )
        return values


class Layer_Dense(_Book, Dense):  # noqa: N801
    r"""The book's dense layer, ``np.dot(inputs, weights) + biases`` under ``nnfs.init()``.

    Args:
        n_inputs: size of the last dimension of the inputs.
        n_neurons: size of the last dimension of the output.
        weight_regularizer_l1, weight_regularizer_l2, bias_regularizer_l1, bias_regularizer_l2:
            the strengths of chapter 14, kept under these names; `backward` adds their part.
        scale: the standard deviation of the weights; the book has 0.01, its video series 0.10.
        device: where the parameters live; torch's default device when None.

    Shape:
        - inputs: :math:`(*, \text{n\_inputs})`: a tensor on the layer's device, an array or nested
          lists. `forward` takes ``training``, as in chapter 18, and does not need it.
        - output: :math:`(*, \text{n\_neurons})`, float32.

    Attributes:
        weights: (n_inputs, n_neurons) float32 array, ``scale * np.random.randn(n_inputs,
            n_neurons)`` drawn from NumPy's global stream, whether ``nnfs.init()`` was called or
            only ``np.random.seed``. May be assigned. On the CPU it shares the layer's memory; from
            another device it is a copy, so assign it as a whole there (``+=`` does). It is a
            transposed view, so its order in memory is Fortran's, as ``flags`` says.
        biases: (1, n_neurons) float32 array, zeros; the same holds.
        inputs: what the last ``forward`` received, as a NumPy array.
        output: what the last ``forward`` returned, as a NumPy array without history. The returned
            tensor carries the gradient. May be assigned.
        dweights, dbiases, dinputs: what ``backward(dvalues)`` gives, as NumPy arrays: the dot
            products in float32, the sum of the rows in the dtype of ``dvalues``.

    Raises:
        TypeError: a width that is no int; inputs that are no numbers; a device without float64.
        ValueError: a width below 1; a wrong last dimension; an assigned array of another shape;
            ``dvalues`` of another shape than the output.
        RuntimeError: ``backward`` before ``forward``.

    Example:
        >>> np.random.seed(0)
        >>> dense1 = Layer_Dense(2, 3)
        >>> dense1.weights
        array([[ 0.01764052,  0.00400157,  0.00978738],
               [ 0.02240893,  0.01867558, -0.00977278]], dtype=float32)
        >>> dense1.forward([[1, 2]])
        tensor([[ 0.0625,  0.0414, -0.0098]], grad_fn=<DenseBackward>)
        >>> dense1.output
        array([[ 0.06245838,  0.04135273, -0.00975818]], dtype=float32)
        >>> dense1.backward([[1, 0, 0]])
        >>> dense1.dinputs
        array([[0.01764052, 0.02240893]], dtype=float32)

    Source: NNFS chapters 4, 9 and 14, class ``Layer_Dense``.
    """

    weight_regularizer_l1: float = 0
    weight_regularizer_l2: float = 0
    bias_regularizer_l1: float = 0
    bias_regularizer_l2: float = 0

    def __init__(
        self,
        n_inputs: int,
        n_neurons: int,
        weight_regularizer_l1: float = 0,
        weight_regularizer_l2: float = 0,
        bias_regularizer_l1: float = 0,
        bias_regularizer_l2: float = 0,
        *,
        scale: float = 0.01,
        device: torch.device | str | int | None = None,
    ) -> None:
        self._scale = check_real("Layer_Dense", "scale", scale)
        super().__init__(n_inputs, n_neurons, device=device, dtype=torch.float32)
        self.weight_regularizer_l1 = weight_regularizer_l1
        self.weight_regularizer_l2 = weight_regularizer_l2
        self.bias_regularizer_l1 = bias_regularizer_l1
        self.bias_regularizer_l2 = bias_regularizer_l2

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

    def forward(self, inputs: ArrayLike | Tensor, training: bool | None = None) -> Tensor:  # noqa: D102
        weight, bias = self._parameters.get("weight"), self._parameters.get("bias")
        if (
            weight is not None
            and _is_float32(inputs, 2)
            and inputs.shape[1] == self.in_features
            and arithmetic.on_host(weight)
        ):
            values = arithmetic.affine(inputs, weight, bias)
            vars(self).update(inputs=inputs, output=values.copy())
            return arithmetic.Dense.apply(values, torch.from_numpy(inputs.copy()), weight, bias)
        weight, bias = self.weight, self.bias
        x = _as_tensor("Layer_Dense", inputs, weight.device)
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"Layer_Dense(n_inputs={self.in_features}) expects a last dimension of "
                f"{self.in_features}, got inputs of shape {tuple(x.shape)}"
            )
        return self._keep(inputs, x, arithmetic.dense("Layer_Dense", x, weight, self.bias))

    def backward(self, dvalues: ArrayLike | Tensor) -> None:
        """Keep ``dweights``, ``dbiases`` and ``dinputs``, from the last inputs and `dvalues`."""
        inputs = self.inputs
        shape = (*np.shape(inputs)[:-1], self.out_features)
        values = self._received(dvalues, inputs, shape).reshape(-1, self.out_features)
        weights, biases = self.weights, self.biases
        dweights = arithmetic.dot(inputs.reshape(-1, self.in_features).T, values)
        dbiases = arithmetic.column_sum(values)
        _regularize(dweights, weights, self.weight_regularizer_l1, self.weight_regularizer_l2)
        if biases is not None:
            _regularize(dbiases, biases, self.bias_regularizer_l1, self.bias_regularizer_l2)
        self.dweights, self.dbiases = dweights, dbiases
        self.dinputs = arithmetic.dot(values, weights.T).reshape(inputs.shape)


def _regularize(gradient: NDArray[Any], values: NDArray[np.float32], l1: float, l2: float) -> None:
    if l1 > 0:
        gradient += float(l1) * np.where(values < 0, np.float32(-1), np.float32(1))
    if l2 > 0:
        gradient += 2 * float(l2) * values


class Activation_ReLU(_Book, ReLU):  # noqa: N801
    """The book's ReLU, ``np.maximum(0, inputs)``.

    Shape:
        - inputs: any: a tensor, an array or nested lists; ``training`` as in `Layer_Dense`.
        - output: the same shape and dtype.

    Attributes:
        inputs, output: as in `Layer_Dense`.
        dinputs: what ``backward(dvalues)`` gives: a copy of `dvalues`, 0 where an input was not
            above 0.

    Raises:
        TypeError: inputs that are no numbers.
        ValueError, RuntimeError: in ``backward``, as `Layer_Dense`.

    Example:
        >>> relu = Activation_ReLU()
        >>> relu.forward([0, 2, -1, 3.3, -2.7, 1.1, 2.2, -100])
        tensor([0.0000, 2.0000, 0.0000, 3.3000, 0.0000, 1.1000, 2.2000, 0.0000],
               dtype=torch.float64)
        >>> relu.backward([1, 2, 3, 4, 5, 6, 7, 8])
        >>> relu.dinputs
        array([0, 2, 0, 4, 0, 6, 7, 0])

    Source: NNFS chapters 4 and 9, class ``Activation_ReLU``.
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, inputs: ArrayLike | Tensor, training: bool | None = None) -> Tensor:  # noqa: D102
        if _is_float32(inputs):
            result = torch.from_numpy(inputs).relu()
            vars(self).update(inputs=inputs, output=result.numpy().copy())
            return result
        x = _as_tensor("Activation_ReLU", inputs)
        return self._keep(inputs, x, x.relu_() if self.inplace else x.relu())

    def backward(self, dvalues: ArrayLike | Tensor) -> None:
        """Keep ``dinputs``, from the last inputs and `dvalues`."""
        inputs = self.inputs
        self.dinputs = self._received(dvalues, inputs)
        self.dinputs[inputs <= 0] = 0

    def predictions(self, outputs: NDArray[Any]) -> NDArray[Any]:
        """`outputs`, as chapter 18 has it."""
        return outputs


class Activation_Softmax(_Book, Softmax):  # noqa: N801
    """The book's softmax along the last dimension; see the module for its arithmetic.

    Shape:
        - inputs: (*, classes), at least one dimension: a tensor, an array or nested lists;
          ``training`` as in `Layer_Dense`.
        - output: the same shape; float32 for float32 and half types, else float64.

    NaN and infinities give what `torchnnfs.Softmax` gives.

    Attributes:
        inputs, output: as in `Layer_Dense`.
        dinputs: what ``backward(dvalues)`` gives, in float32: the Jacobian of each row of `output`,
            ``np.diagflat(p) - np.dot(p, p.T)``, times its `dvalues`.

    Raises:
        TypeError: inputs that are no numbers; a device without float64.
        ValueError: inputs without dimensions; in ``backward``, as `Layer_Dense`.
        RuntimeError: ``backward`` without an output.

    Example:
        >>> softmax = Activation_Softmax()
        >>> _ = softmax.forward([[1, 2, 3]])
        >>> print(softmax.output)
        [[0.09003057 0.24472847 0.66524096]]
        >>> softmax.output = np.array([[0.5, 0.25, 0.25]])
        >>> softmax.backward([[1, 0, 0]])
        >>> softmax.dinputs
        array([[ 0.25 , -0.125, -0.125]], dtype=float32)

    Source: NNFS chapters 4 and 9, class ``Activation_Softmax``.
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, inputs: ArrayLike | Tensor, training: bool | None = None) -> Tensor:  # noqa: D102
        if (
            type(inputs) is np.ndarray
            and inputs.dtype == np.float32
            and inputs.size > 0 < inputs.ndim
        ):
            values = arithmetic.softmax_on_host(inputs)
            vars(self).update(inputs=inputs, output=values)
            return torch.from_numpy(values.copy())
        x = _as_tensor("Activation_Softmax", inputs)
        if x.ndim == 0:
            raise ValueError("Activation_Softmax expects at least one dimension, got a number")
        if x.dtype in (torch.float16, torch.bfloat16):
            x = x.float()
        elif not x.is_floating_point():
            x = x.double()
        return self._keep(inputs, x, arithmetic.softmax("Activation_Softmax", x))

    def backward(self, dvalues: ArrayLike | Tensor) -> None:
        """Keep ``dinputs``, from `output`, the last one or one that was assigned, and `dvalues`."""
        p = None if self.output is None else np.asarray(self.output)
        values = self._received(dvalues, p)
        self.dinputs = arithmetic.jacobian_product(p, values)

    def predictions(self, outputs: NDArray[Any]) -> NDArray[Any]:
        """The class of each row of `outputs`, as chapter 18 has it."""
        return np.asarray(np.argmax(outputs, axis=1))


class Layer_Dropout(_Book, nn.Dropout):  # noqa: N801
    """The book's dropout: a share of the inputs becomes 0, the others grow by as much.

    Args:
        rate: the share that becomes 0, from 0 up to but not including 1.

    Shape:
        - inputs: any: a tensor, an array or nested lists. ``training=False`` lets them through, as
          in chapter 18; without it, `train` and `eval` decide, as everywhere in torch.
        - output: the same shape; float64 while training, as in NumPy.

    Attributes:
        rate: the share that stays, ``1 - rate``, as the book keeps it.
        binary_mask: what the last ``forward`` multiplied by, ``np.random.binomial(1, rate,
            size=inputs.shape) / rate`` from NumPy's global stream; 1 when it let all through.
        inputs, output: as in `Layer_Dense`.
        dinputs: what ``backward(dvalues)`` gives: ``dvalues * binary_mask``.

    Raises:
        TypeError: a rate or inputs that are no numbers.
        ValueError: another rate; in ``backward``, as `Layer_Dense`.

    Example:
        >>> np.random.seed(0)
        >>> Layer_Dropout(0.5).forward([1, 2, 3, 4])
        tensor([2., 4., 6., 8.], dtype=torch.float64)

    Source: NNFS chapter 15, class ``Layer_Dropout``.
    """

    def __init__(self, rate: float) -> None:
        if not 0 <= check_real("Layer_Dropout", "rate", rate) < 1:
            raise ValueError(f"Layer_Dropout expects a rate from 0 up to 1, without 1, got {rate}")
        super().__init__(float(rate))

    @property
    def rate(self) -> float:  # noqa: D102
        return 1 - self.p

    def forward(self, inputs: ArrayLike | Tensor, training: bool | None = None) -> Tensor:  # noqa: D102
        x = _as_tensor("Layer_Dropout", inputs)
        if not (self.training if training is None else training):
            self.binary_mask = np.ones((), np.float32)
            return self._keep(inputs, x, x.clone())
        self.binary_mask = np.random.binomial(1, self.rate, size=tuple(x.shape)) / self.rate
        return self._keep(inputs, x, x * torch.as_tensor(self.binary_mask, device=x.device))

    def backward(self, dvalues: ArrayLike | Tensor) -> None:
        """Keep ``dinputs``, from the last mask and `dvalues`."""
        self.dinputs = self._received(dvalues, self.inputs) * self.binary_mask


def _is_float32(x: Any, ndim=None) -> bool:
    return (
        type(x) is np.ndarray
        and x.dtype == np.float32
        and x.size > 0
        and (ndim is None or x.ndim == ndim)
    )


def _as_tensor(owner: str, values: Any, device: torch.device | None = None) -> Tensor:
    """A tensor as it is; arrays and lists with the dtype that NumPy gives them, on `device`."""
    if isinstance(values, Tensor) and not values.is_complex():
        return values
    x = check_numbers(owner, values)
    return x if device is None else x.to(device)


def _to_numpy(x: Tensor) -> NDArray[Any]:
    return (x.float() if x.dtype == torch.bfloat16 else x).detach().cpu().numpy()


def _values(x: Tensor) -> Tensor | None:
    """`x` without history, or None inside a transformation like vmap, where it has no values."""
    x = x.detach()
    try:
        if not torch.compiler.is_compiling():
            x.data_ptr()
    except RuntimeError:
        return None
    return x


_TO_TORCH: dict[type[nn.Module], type[nn.Module]] = {
    Layer_Dense: Dense,
    Activation_ReLU: ReLU,
    Activation_Softmax: Softmax,
    Layer_Dropout: nn.Dropout,
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
        for name in ("_inputs", "_output"):  # only the book keeps them
            vars(layer).pop(name, None)
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
        layer: an object with ``weights`` or ``weight`` (n_inputs, n_neurons) and ``biases`` or
            ``bias``, whose values are copied, arrays or tensors, and maybe an ``activation``; one
            whose class is named like `Activation_ReLU`, `Activation_Softmax` or `Layer_Dropout`
            (``ReLU``, ``ActivationReLU``, ``ReLUActivation``, ...), where dropout comes in
            evaluation; a list of such objects, in the order in which they are called; or a torch
            module, which is converted as `from_torch` does.
        device: where the parameters live; torch's default device when None.

    What training leaves on an object (inputs, outputs, gradients, momentums, caches) and its links
    stay behind. Where an object has a ``forward``, a copy of it is run beside the result.

    Raises:
        TypeError: a class or an attribute that is not understood; a ``forward`` that computes
            something else.
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
    if isinstance(layer, nn.Module):
        return from_torch(layer).to(device)
    if isinstance(layer, list | tuple):
        return nn.Sequential(*(from_numpy(each, device=device) for each in layer))
    parts = objects.read(layer, ["relu", "softmax", "dropout"])
    if parts.kind == "dropout":
        return Layer_Dropout(1 - parts.rate).eval()
    if parts.kind is not None:
        activation = Activation_ReLU() if parts.kind == "relu" else Activation_Softmax()
        objects.check_forward(layer, activation, 5, (1.0, 30.0))
        return activation
    dense = from_torch(
        Dense.from_numpy(parts.weights, parts.biases, device=device, dtype=torch.float32)
    )
    for name in (
        "weight_regularizer_l1",
        "weight_regularizer_l2",
        "bias_regularizer_l1",
        "bias_regularizer_l2",
    ):
        setattr(dense, name, getattr(layer, name, 0))
    model = dense
    if parts.activation is not None:
        model = nn.Sequential(dense, from_numpy(parts.activation))
    objects.check_forward(layer, model, dense.in_features, (1.0, 1e3, 1e6))
    return model
