"""The book's dialect: its names, its stream and its arithmetic, bit for bit.

The arithmetic is that of the book's page, which `nnfs.init()` and a correctly rounded `exp` give:

1. A dot product is accumulated in float64 from the first input to the last and rounded to float32
   once; the biases are added in float32.
2. Softmax subtracts the row's maximum, takes `exp` in float64, rounds it, sums and divides, all in
   the dtype of its input, as ReLU does (float64 for lists of numbers, as in NumPy).
3. `backward` has the same dot products; its sums run in NumPy's order.

`torchnnfs.arithmetic` says why the bits depend neither on the device nor on the number of threads,
the batch or the version of NumPy. They hold in eager mode: a compiler may contract a product and a
sum into one. Gradients of autograd are within rounding of the exact ones, no more.

All four layers share this contract:

- ``forward(inputs)`` takes tensors on the layer's device, arrays and nested lists, and returns a
  tensor that carries the gradient. It keeps ``inputs`` and ``output`` as NumPy arrays; both may be
  assigned. The argument ``training`` of chapter 18 is taken everywhere; dropout alone needs it.
- ``backward(dvalues)`` starts from what is kept, and keeps ``dinputs``. It raises a ValueError for
  ``dvalues`` of another shape than the output, and a RuntimeError when there was no `forward`.
- Inputs that are no numbers raise a TypeError.
- What a reader sets is a plain attribute, also another layer of the dialect
  (``dense1.next = activation1``). Other modules are registered, as everywhere in torch.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from torchnnfs import arithmetic, objects
from torchnnfs.arithmetic import exp as exp
from torchnnfs.arithmetic import is_quick
from torchnnfs.checks import check_numbers, check_real
from torchnnfs.classes import Kinds, with_classes
from torchnnfs.kept import Inputs, Keeps
from torchnnfs.modules import Dense, ReLU, Softmax

_STRENGTHS = [f"{what}_regularizer_{norm}" for what in ("weight", "bias") for norm in ("l1", "l2")]


class Layer_Dense(Keeps, Dense):  # noqa: N801
    r"""The book's dense layer, ``np.dot(inputs, weights) + biases`` under ``nnfs.init()``.

    Args:
        n_inputs, n_neurons: sizes of the last dimension of the inputs and of the output.
        weight_regularizer_l1, weight_regularizer_l2, bias_regularizer_l1, bias_regularizer_l2:
            the strengths of chapter 14, kept under these names; `backward` adds their part.
        scale: the standard deviation of the weights; the book has 0.01, its video series 0.10.
        device: where the parameters live; torch's default device when None.

    Shape:
        - inputs: :math:`(*, \text{n\_inputs})`.
        - output: :math:`(*, \text{n\_neurons})`, float32.

    Attributes:
        weights: (n_inputs, n_neurons) float32 array, ``scale * np.random.randn(n_inputs,
            n_neurons)`` drawn from NumPy's global stream. May be assigned. On the CPU it is a view
            of the layer's memory, in Fortran's order. From another device it is a copy, so assign
            it as a whole there (``+=`` does).
        biases: (1, n_neurons) float32 array, zeros; the same holds.
        dweights, dinputs: the gradients that `backward` keeps, float32 arrays.
        dbiases: the same, in the dtype of ``dvalues``, float32 in the book.

    Raises:
        TypeError: a width that is no int; a device without float64.
        ValueError: a width below 1; a wrong last dimension; an assigned array of another shape.

    Example:
        >>> np.random.seed(0)
        >>> dense1 = Layer_Dense(2, 3)
        >>> dense1.weights
        array([[ 0.01764052,  0.00400157,  0.00978738],
               [ 0.02240893,  0.01867558, -0.00977278]], dtype=float32)
        >>> dense1.forward([[1, 2]])
        tensor([[ 0.0625,  0.0414, -0.0098]], grad_fn=<_ExactBackward>)
        >>> dense1.output
        array([[ 0.06245838,  0.04135273, -0.00975818]], dtype=float32)
        >>> dense1.backward([[1, 0, 0]])
        >>> dense1.dinputs
        array([[0.01764052, 0.02240893]], dtype=float32)

    Source: NNFS chapters 4, 9 and 14, class ``Layer_Dense``.
    """

    weight_regularizer_l1 = weight_regularizer_l2 = bias_regularizer_l1 = bias_regularizer_l2 = 0.0
    _stream = np.random

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
        given = dict(locals())
        self._scale = check_real("Layer_Dense", "scale", scale)
        super().__init__(n_inputs, n_neurons, device=device, dtype=torch.float32)
        for name in _STRENGTHS:
            setattr(self, name, check_real("Layer_Dense", name, given[name]))

    @property
    def weights(self) -> NDArray[np.float32]:  # noqa: D102
        return self.weight.detach().cpu().float().numpy().T

    @weights.setter
    def weights(self, values: Inputs) -> None:
        self._assign("weights", self.weight.T, values, [(self.in_features, self.out_features)])

    @property
    def biases(self) -> NDArray[np.float32] | None:  # noqa: D102
        return None if self.bias is None else self.bias.detach().cpu().float().numpy()[None]

    @biases.setter
    def biases(self, values: Inputs) -> None:
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

    def forward(self, inputs: Inputs, training: bool | None = None) -> Tensor:  # noqa: D102
        held: dict[str, Any] = self._parameters  # without the cost of nn.Module.__getattr__
        shape = (self.in_features,)
        if "bias" in held and is_quick(inputs, held.get("weight")) and inputs.shape[1:] == shape:
            x, weight, bias = torch.from_numpy(inputs.copy()), held["weight"], held["bias"]
            values = arithmetic.affine(inputs, weight, bias)
            vars(self).update(_inputs=inputs, _output=values.copy())
            return arithmetic.with_graph(values, x, weight, bias)
        x = self._tensor(inputs, self.weight.device)
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"Layer_Dense(n_inputs={self.in_features}) expects a last dimension of "
                f"{self.in_features}, got inputs of shape {tuple(x.shape)}"
            )
        return self._keep(inputs, x, arithmetic.dense("Layer_Dense", x, self.weight, self.bias))

    def backward(self, dvalues: Inputs) -> None:  # noqa: D102
        inputs = np.asarray(self.inputs)
        values = self._received(dvalues, self.inputs, self.out_features)
        values = values.reshape(-1, self.out_features)
        self.dweights = arithmetic.dot(inputs.reshape(-1, self.in_features).T, values)
        self.dbiases = np.sum(values, axis=0, keepdims=True)
        for gradient, array, what in (
            (self.dweights, self.weights, "weight"),
            (self.dbiases, self.biases, "bias"),
        ):
            l1, l2 = (getattr(self, f"{what}_regularizer_{norm}") for norm in ("l1", "l2"))
            if array is not None and l1 > 0:
                gradient += l1 * np.where(array < 0, np.float32(-1), np.float32(1))
            if array is not None and l2 > 0:
                gradient += 2 * l2 * array
        self.dinputs = arithmetic.dot(values, self.weights.T).reshape(inputs.shape)


class Activation_ReLU(Keeps, ReLU):  # noqa: N801
    """The book's ReLU, ``np.maximum(0, inputs)``.

    Shape:
        - inputs, output: any; the dtype stays.

    Attributes:
        dinputs: `dvalues`, but 0 where an input was not above 0.

    Example:
        >>> relu = Activation_ReLU()
        >>> relu.forward([0, 2, -1, 3.3, -2.7, 1.1, 2.2, -100])
        tensor([0.0000, 2.0000, 0.0000, 3.3000, 0.0000, 1.1000, 2.2000, 0.0000],
               dtype=torch.float64)
        >>> relu.backward([1, 2, 3, 4, 5, 6, 7, 8])
        >>> relu.dinputs
        array([0., 2., 0., 4., 0., 6., 7., 0.])

    Source: NNFS chapters 4 and 9, class ``Activation_ReLU``.
    """

    def forward(self, inputs: Inputs, training: bool | None = None) -> Tensor:  # noqa: D102
        if is_quick(inputs):
            result = torch.from_numpy(inputs.copy()).relu_()
            vars(self).update(_inputs=inputs, _output=result.numpy().copy())
            return result
        x = self._tensor(inputs)
        return self._keep(inputs, x, F.relu(x, inplace=self.inplace))

    def backward(self, dvalues: Inputs) -> None:  # noqa: D102
        self.dinputs = self._received(dvalues, self.inputs)
        self.dinputs[np.asarray(self.inputs) <= 0] = 0

    def predictions(self, outputs: NDArray[Any]) -> NDArray[Any]:
        """`outputs`, as in chapter 18."""
        return outputs


class Activation_Softmax(Keeps, Softmax):  # noqa: N801
    """The book's softmax along the last dimension; see the module for its arithmetic.

    NaN and infinities give what `torchnnfs.Softmax` gives.

    Shape:
        - inputs: (*, classes), at least one dimension.
        - output: the same shape; float32 for float32 and half types, else float64.

    Attributes:
        dinputs: the Jacobian of each row p of `output`, ``np.diagflat(p) - np.dot(p, p.T)``, times
            its `dvalues`, a float32 array.

    Raises:
        TypeError: a device without float64.
        ValueError: inputs without dimensions.

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

    def forward(self, inputs: Inputs, training: bool | None = None) -> Tensor:  # noqa: D102
        if is_quick(inputs) and inputs.ndim > 0:
            values = arithmetic.softmax_on_host(inputs)
            vars(self).update(_inputs=inputs, _output=values)
            return torch.from_numpy(values.copy())
        x = self._tensor(inputs)
        if x.ndim == 0:
            raise ValueError("Activation_Softmax expects at least one dimension, got a number")
        return self._keep(inputs, x, arithmetic.softmax("Activation_Softmax", x))

    def backward(self, dvalues: Inputs) -> None:  # noqa: D102
        values = self._received(dvalues, self.output)
        self.dinputs = arithmetic.jacobian_product(np.asarray(self.output), values)

    def predictions(self, outputs: NDArray[Any]) -> NDArray[Any]:
        """The class of each row of `outputs`, as in chapter 18."""
        return np.asarray(np.argmax(outputs, axis=1))


class Layer_Dropout(Keeps, nn.Dropout):  # noqa: N801
    """The book's dropout: a share of the inputs becomes 0, and the others grow to make up for it.

    Args:
        rate: the share that becomes 0, from 0 to below 1.

    Shape:
        - inputs: any. ``training=False`` lets them through; without it `train` and `eval` decide.
        - output: the same shape; float64 while training, as in NumPy.

    Attributes:
        rate: the share that stays, ``1 - rate``, as the book keeps it.
        binary_mask: what the last ``forward`` multiplied by: ``np.random.binomial(1, rate,
            size=inputs.shape) / rate``, drawn from NumPy's global stream, or 1.
        dinputs: ``dvalues * binary_mask``.

    Raises:
        TypeError: a rate that is no number.
        ValueError: a rate below 0, or of 1 and more.

    Example:
        >>> np.random.seed(0)
        >>> Layer_Dropout(0.5).forward([1, 2, 3, 4])
        tensor([2., 4., 6., 8.], dtype=torch.float64)

    Source: NNFS chapter 15, class ``Layer_Dropout``.
    """

    def __init__(self, rate: float) -> None:
        if not 0 <= check_real("Layer_Dropout", "rate", rate) < 1:
            raise ValueError(f"Layer_Dropout expects a rate from 0 to below 1, got {rate}")
        super().__init__(float(rate))

    @property
    def rate(self) -> float:  # noqa: D102
        return 1 - self.p

    def forward(self, inputs: Inputs, training: bool | None = None) -> Tensor:  # noqa: D102
        x = self._tensor(inputs)
        if not (self.training if training is None else training):
            self.binary_mask: NDArray[Any] = np.ones((), np.float32)
            return self._keep(inputs, x, x.clone())
        self.binary_mask = np.random.binomial(1, self.rate, size=tuple(x.shape)) / (self.rate or 1)
        return self._keep(inputs, x, x * torch.as_tensor(self.binary_mask, device=x.device))

    def backward(self, dvalues: Inputs) -> None:  # noqa: D102
        self.dinputs = self._received(dvalues, self.inputs) * self.binary_mask


_TO_TORCH: Kinds = {Layer_Dense: Dense, Activation_ReLU: ReLU, Activation_Softmax: Softmax}
_TO_TORCH[Layer_Dropout] = nn.Dropout
_TO_BOOK = {theirs: ours for ours, theirs in _TO_TORCH.items()}
_TO_BOOK |= {nn.Linear: Layer_Dense, nn.ReLU: Activation_ReLU, nn.Softmax: Activation_Softmax}


def to_torch(model: nn.Module) -> nn.Module:
    """A copy of `model` with `Dense`, `ReLU`, `Softmax` and `nn.Dropout` for the book's layers.

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
        if not isinstance(layer, Keeps):  # only the book keeps them
            vars(layer).pop("_inputs", None)
            vars(layer).pop("_output", None)
    return model


def from_torch(model: nn.Module) -> nn.Module:
    """A float32 copy of `model` with the book's layers in the place of torch's and ours.

    Only layers of exactly the types Dense, ReLU, Softmax, their `torch.nn` counterparts and
    nn.Dropout are replaced; a subclass may compute something else.

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
            ``bias``, whose values are copied, and maybe an ``activation``; one whose class is
            named like `Activation_ReLU`, `Activation_Softmax` or `Layer_Dropout`, such as
            ``ReLU``; a list of such objects, in the order in which they are called; or a torch
            module, which is converted as by `from_torch`. Dropout comes in evaluation.
        device: where the parameters live; torch's default device when None.

    What training leaves on an object (inputs, gradients, momentums, caches, ...) and its links stay
    behind. Where an object has a ``forward``, a copy of it is run and compared with the result.

    Raises:
        TypeError: a class or an attribute that is not understood; a ``forward`` that computes
            something else.
        ValueError: arrays of shapes that do not fit.

    Example:
        >>> class Layer:
        ...     weights, biases, activation = np.ones((2, 3)), np.zeros((1, 3)), "relu"
        >>> from_numpy(Layer())
        Sequential(
          (0): Layer_Dense(in_features=2, out_features=3, bias=True)
          (1): Activation_ReLU()
        )
    """
    if isinstance(layer, nn.Module):
        return from_torch(layer).to(device)
    if isinstance(layer, list | tuple):
        return nn.Sequential(*(from_numpy(each, device=device) for each in layer))
    kind, parts = objects.read(layer)
    if kind == "dropout":
        return Layer_Dropout(1 - parts[0]).eval()
    if kind != "dense":
        model: nn.Module = Activation_ReLU() if kind == "relu" else Activation_Softmax()
        objects.check_forward(layer, model, 5, (1.0, 10.0))
        return model
    weights, biases, activation = parts
    dense = Dense.from_numpy(weights, biases, device=device, dtype=torch.float32)
    model = from_torch(dense)
    for name in _STRENGTHS:
        setattr(model, name, getattr(layer, name, 0.0))
    if activation is not None:
        model = nn.Sequential(model, from_numpy(activation))
    objects.check_forward(layer, model, dense.in_features, (1.0, 1e3, 1e6))
    return model
