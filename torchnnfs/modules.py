"""The chapter's layers as torch modules: torch's own contract, the book's initialisation."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn import init
from torch.nn.parameter import UninitializedParameter

from torchnnfs.checks import check_count, check_generator, check_numbers
from torchnnfs.streams import Generator

_Forward = TypeVar("_Forward", bound=Callable[..., Tensor])


def _explained(forward: _Forward) -> _Forward:
    """`forward`, with failures that say what was expected; a call that succeeds is not checked."""

    @functools.wraps(forward)
    def explained(self: nn.Module, input: Tensor) -> Tensor:
        try:
            return forward(self, input)
        except (AttributeError, RuntimeError, TypeError) as error:
            clear = _complaint(self, input)
            if clear is None:
                raise
            raise clear from error

    return cast(_Forward, explained)


def _complaint(layer: nn.Module, input: Any) -> Exception | None:
    """What is wrong with `input` in the reader's words, or None when it is something else."""
    name = f"{type(layer).__name__}({layer.extra_repr()})"
    if not isinstance(input, Tensor):
        kind = type(input)
        return TypeError(
            f"{name} expects a torch.Tensor, got {kind.__module__}.{kind.__qualname__}; "
            "call torch.as_tensor(input, dtype=torch.float32) first"
        )
    if not (input.is_floating_point() or input.is_complex() or isinstance(layer, nn.ReLU)):
        return TypeError(
            f"{name} expects a floating-point input, got {input.dtype}; call input.float() first"
        )
    if not isinstance(layer, nn.Linear) or input.is_complex():
        return None
    name = f"{type(layer).__name__}(in_features={layer.in_features})"
    weight = layer.weight
    if input.ndim == 0 or input.shape[-1] != layer.in_features:
        return ValueError(
            f"{name} expects a last dimension of {layer.in_features}, "
            f"got an input of shape {tuple(input.shape)}"
        )
    if input.dtype != weight.dtype:
        return TypeError(
            f"{name} holds {weight.dtype} parameters, got a {input.dtype} input; "
            f"call input.to({weight.dtype}) or layer.to({input.dtype})"
        )
    if input.device != weight.device:
        return ValueError(
            f"{name} holds its parameters on {weight.device}, got an input on {input.device}; "
            f"call input.to({str(weight.device)!r}) or layer.to({str(input.device)!r})"
        )
    return None


class Dense(nn.Linear):
    r"""A fully connected layer, :math:`y = x W^T + b`, initialised as in the book.

    An `nn.Linear` in all but its initialisation, so whatever works with that works with this.

    Args:
        in_features: size of the last dimension of the input; the book's ``n_inputs``.
        out_features: size of the last dimension of the output; the book's ``n_neurons``.
        bias: whether a bias is added.
        device, dtype: of the parameters; torch's defaults when None.
        generator: where the weight is drawn from: a `torch.Generator` on the parameters' device,
            torch's default generator (None), or a `numpy.random.RandomState` for the book's own
            numbers, bit for bit. It is not kept.

    Shape:
        - input: :math:`(*, \text{in\_features})`, floating point, of the parameters' dtype.
        - output: :math:`(*, \text{out\_features})`.

    Attributes:
        weight: (out_features, in_features), drawn from :math:`0.01 \cdot \mathcal{N}(0, 1)`. From
            a `RandomState` it is what ``0.01 * np.random.randn(n_inputs, n_neurons)`` gives under
            ``nnfs.init()``, transposed; that is a float32 number, rounded to `dtype`.
        bias: (out_features,), zeros; None when ``bias=False``.

    Raises:
        TypeError: a width that is no int; another kind of generator; an input that is no tensor,
            or not of the parameters' dtype.
        ValueError: a width below 1; a generator or an input on another device than the parameters;
            an input with a wrong last dimension.

    Example:
        >>> layer = Dense(2, 3, generator=np.random.RandomState(0))
        >>> layer.weight
        Parameter containing:
        tensor([[ 0.0176,  0.0224],
                [ 0.0040,  0.0187],
                [ 0.0098, -0.0098]], requires_grad=True)
        >>> layer(torch.ones(5, 2)).shape
        torch.Size([5, 3])

    Source: NNFS chapter 4, class ``Layer_Dense``.
    """

    _scale = 0.01
    _stream: Any = None  # where the weight is drawn from when no generator is given

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        generator: Generator = None,
    ) -> None:
        in_features = check_count("Dense", "in_features", in_features)
        out_features = check_count("Dense", "out_features", out_features)
        # nn.Linear's own constructor would draw at once, from torch's generator.
        super(nn.Linear, self).__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, device=device, dtype=dtype)
        )
        self.register_parameter("bias", None)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        self.reset_parameters(generator)

    def reset_parameters(self, generator: Generator = None) -> None:
        """Draw the weight again from `generator`, as the constructor does, and zero the bias.

        On the meta device nothing is drawn: after ``to_empty`` call this to initialise.
        """
        weight: Any = self.weight
        check_generator("Dense", generator, weight.device)
        if weight.is_meta:
            return
        stream = self._stream if generator is None else generator
        if stream is None or isinstance(stream, torch.Generator):
            init.normal_(weight, std=self._scale, generator=stream)
        else:
            # As nnfs.init() does it: the other order of rounding and scaling gives other last bits.
            drawn = stream.randn(self.in_features, self.out_features).astype(np.float32)
            values = torch.from_numpy((self._scale * drawn).T)
            if hasattr(weight, "device_mesh"):  # a DTensor takes no plain tensor, but its own part
                from torch.distributed.tensor import distribute_tensor

                values = values.to(weight.device, weight.dtype)
                values = distribute_tensor(values, weight.device_mesh, weight.placements)
            with torch.no_grad():
                weight.copy_(values)
        if self.bias is not None:
            init.zeros_(self.bias)

    @_explained
    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        return F.linear(input, self.weight, self.bias)

    @classmethod
    def from_numpy(
        cls,
        weights: ArrayLike,
        biases: ArrayLike | None = None,
        *,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Dense:
        """A layer with the values of the book's arrays, which are copied.

        Args:
            weights: (n_inputs, n_neurons).
            biases: (1, n_neurons) or (n_neurons,); None gives a layer without bias.
            device: of the parameters; torch's default when None.
            dtype: of the parameters; when None that of `weights` if it is a floating-point array,
                else torch's default.

        Raises:
            TypeError: arrays that do not hold real numbers.
            ValueError: `weights` that is not 2-D or is empty, `biases` of another shape.

        Example:
            >>> layer = Dense.from_numpy([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], [[0.5, 0.5, 0.5]])
            >>> layer(torch.tensor([1.0, 1.0]))
            tensor([5.5000, 7.5000, 9.5000], grad_fn=<ViewBackward0>)
        """
        weight = check_numbers("Dense.from_numpy", weights)
        if weight.ndim != 2 or 0 in weight.shape:
            raise ValueError(
                "Dense.from_numpy expects weights of shape (n_inputs, n_neurons), "
                f"got {tuple(weight.shape)}"
            )
        n_inputs, n_neurons = weight.shape
        bias = None if biases is None else check_numbers("Dense.from_numpy", biases)
        if bias is not None and bias.shape not in {(n_neurons,), (1, n_neurons)}:
            raise ValueError(
                f"Dense.from_numpy expects biases of shape (1, {n_neurons}) or ({n_neurons},) for "
                f"weights of shape {tuple(weight.shape)}, got {tuple(bias.shape)}"
            )
        if dtype is None and hasattr(weights, "dtype") and weight.is_floating_point():
            dtype = weight.dtype
        kind = Dense if issubclass(cls, LazyDense) else cls  # the arrays say how many inputs
        layer = kind(n_inputs, n_neurons, bias is not None, "meta", dtype)
        layer.to_empty(device=torch.empty(0, device=device).device)
        with torch.no_grad():
            layer.weight.copy_(weight.T)
            if bias is not None:
                layer.bias.copy_(bias.reshape(-1))
        return layer


class LazyDense(nn.LazyLinear, Dense):
    r"""A `Dense` that takes its number of inputs from its first input, :math:`y = x W^T + b`.

    The first call draws the parameters and makes the layer a `Dense` in every respect. Until then
    its parameters have no values: move it to its device first, and give an optimizer its
    parameters afterwards. A state dict that is loaded before takes the place of the draw.

    Args, Shape, Attributes and Raises are those of `Dense`, but for ``in_features``. The generator
    is kept until the first call, so layers draw in the order of their first calls. That call raises
    a ValueError for an input without or with an empty last dimension.

    Example:
        >>> layer = LazyDense(3, generator=np.random.RandomState(0))
        >>> layer(torch.ones(5, 2)).shape
        torch.Size([5, 3])
        >>> layer, torch.equal(layer.weight, Dense(2, 3, generator=np.random.RandomState(0)).weight)
        (Dense(in_features=2, out_features=3, bias=True), True)

    Source: `torch.nn.LazyLinear`, with the initialisation of NNFS chapter 4.
    """

    cls_to_become = Dense

    def __init__(
        self,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        generator: Generator = None,
    ) -> None:
        out_features = check_count("LazyDense", "out_features", out_features)
        # The layer may be moved before it draws, so only the kind of generator is checked here.
        check_generator("LazyDense", generator, torch.device("meta"))
        # The constructor of nn.LazyLinear asks for a layer without inputs, which Dense refuses.
        super(nn.LazyLinear, self).__init__(1, out_features, False, "meta")
        self.in_features = 0
        parameter: Any = UninitializedParameter
        self.weight = parameter(device=device, dtype=dtype)
        if bias:
            self.bias = parameter(device=device, dtype=dtype)
        self._generator = generator

    def reset_parameters(self, generator: Generator = None) -> None:
        """Draw the weight again, as `Dense` does; before the first call there is nothing to do."""
        if not self.has_uninitialized_params():
            Dense.reset_parameters(self, generator)

    def initialize_parameters(self, input: Tensor) -> None:
        """Infer ``in_features`` from `input` and draw the parameters; torch calls this."""
        if self.has_uninitialized_params():
            if not isinstance(input, Tensor):
                raise cast(Exception, _complaint(self, input))
            if input.ndim == 0 or input.shape[-1] == 0:
                raise ValueError(
                    f"LazyDense(out_features={self.out_features}) expects a last dimension of at "
                    f"least 1, got an input of shape {tuple(input.shape)}"
                )
            check_generator("LazyDense", self._generator, self.weight.device)
            self.in_features = input.shape[-1]
            self.weight.materialize((self.out_features, self.in_features))
            if self.bias is not None:
                self.bias.materialize((self.out_features,))
            self.reset_parameters(self._generator)
        self.in_features = self.weight.shape[1]  # the parameters may come from a state dict
        del self._generator


class ReLU(nn.ReLU):
    r"""The rectified linear unit, :math:`y = \max(0, x)` elementwise.

    Args:
        inplace: overwrite the input.

    Shape:
        - input: :math:`(*)`, any number of dimensions, any real dtype but bool.
        - output: the input's shape and dtype.

    NaN gives NaN, +inf gives +inf, -inf gives 0.

    Raises:
        TypeError: an input that is no tensor.

    Example:
        >>> ReLU()(torch.tensor([0, 2, -1, 3.3, -2.7, 1.1, 2.2, -100]))
        tensor([0.0000, 2.0000, 0.0000, 3.3000, 0.0000, 1.1000, 2.2000, 0.0000])

    Source: NNFS chapter 4, class ``Activation_ReLU``.
    """

    @_explained
    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        return F.relu(input, inplace=self.inplace)


class Softmax(nn.Softmax):
    r"""Exponentials that sum to 1, :math:`y_i = e^{x_i - m} / \sum_j e^{x_j - m}`, m the maximum.

    The maximum is subtracted first, so no finite input overflows.

    Args:
        dim: the dimension whose entries sum to 1; the last one by default.

    Shape:
        - input: :math:`(*)`, any number of dimensions, floating point.
        - output: the input's shape and dtype, with values in [0, 1].

    Along `dim`, one NaN or one +inf makes all values NaN, and so does -inf everywhere; a single
    -inf gives 0 in its place.

    Raises:
        TypeError: a `dim` that is no int; an input that is no tensor or not floating point.
        IndexError: a `dim` that the input does not have.

    Example:
        >>> Softmax()(torch.tensor([[1.0, 2.0, 3.0], [-2.0, -1.0, 0.0]]))
        tensor([[0.0900, 0.2447, 0.6652],
                [0.0900, 0.2447, 0.6652]])

    Source: NNFS chapter 4, class ``Activation_Softmax``.
    """

    def __init__(self, dim: int = -1) -> None:
        if isinstance(dim, bool) or not isinstance(dim, int):
            raise TypeError(f"Softmax expects dim to be an int, got {dim!r} ({type(dim).__name__})")
        super().__init__(dim)

    @_explained
    def forward(self, input: Tensor) -> Tensor:  # noqa: D102
        return F.softmax(input, self.dim)


def classifier(
    *widths: int,
    bias: bool = True,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
    generator: Generator = None,
) -> nn.Sequential:
    """The chapter's network for any widths: Dense, ReLU, ..., Dense, Softmax.

    Args:
        widths: number of inputs, of neurons of each hidden layer, and of classes; at least two.
        bias: see `Dense`.
        device: see `Dense`.
        dtype: see `Dense`.
        generator: see `Dense`; the layers draw from it in order, as the book's cells do.

    Shape:
        - input: (*, widths[0]), floating point.
        - output: (*, widths[-1]), probabilities.

    Raises:
        ValueError: fewer than two widths; else as `Dense`.

    Example:
        >>> classifier(2, 3, 3)
        Sequential(
          (0): Dense(in_features=2, out_features=3, bias=True)
          (1): ReLU()
          (2): Dense(in_features=3, out_features=3, bias=True)
          (3): Softmax(dim=-1)
        )

    Source: NNFS chapter 4, the last cell.
    """
    for index, width in enumerate(widths):
        check_count("classifier", f"width {index}", width)
    if len(widths) < 2:
        raise ValueError(
            "classifier expects at least two widths (inputs, ..., classes), "
            f"got {len(widths)}: {widths}"
        )
    layers: list[nn.Module] = []
    for n_inputs, n_neurons in itertools.pairwise(widths):
        layers += [Dense(n_inputs, n_neurons, bias, device, dtype, generator=generator), ReLU()]
    layers[-1] = Softmax()
    return nn.Sequential(*layers)
