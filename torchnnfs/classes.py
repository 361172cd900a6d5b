"""Models with torch's classes in place of ours, and the other way round."""

import copy

from torch import nn

from torchnnfs.modules import Dense, ReLU, Softmax

Kinds = dict[type[nn.Module], type[nn.Module]]

_TO_TORCH: Kinds = {Dense: nn.Linear, ReLU: nn.ReLU, Softmax: nn.Softmax}
_FROM_TORCH = {theirs: ours for ours, theirs in _TO_TORCH.items()}


def to_torch(model: nn.Module) -> nn.Module:
    """A copy of `model` with torch's own layers in the place of `Dense`, `ReLU` and `Softmax`.

    Parameters have the same values, and outputs the same bits; hooks and everything else stay. For
    tools that ask for exactly these types, such as `torch.ao.quantization.quantize_dynamic`. Only
    layers of exactly our types are replaced: a subclass, a parametrized layer and a `LazyDense`
    before its first call stay.

    Args:
        model: any module, also a single layer; it is left as it is.

    Example:
        >>> from torchnnfs import classifier
        >>> to_torch(classifier(2, 3))
        Sequential(
          (0): Linear(in_features=2, out_features=3, bias=True)
          (1): Softmax(dim=-1)
        )
    """
    return with_classes(model, _TO_TORCH)


def from_torch(model: nn.Module) -> nn.Module:
    """A copy of `model` with `Dense`, `ReLU` and `Softmax`: the way back from `to_torch`.

    Example:
        >>> from_torch(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
        Sequential(
          (0): Dense(in_features=2, out_features=3, bias=True)
          (1): ReLU()
        )
    """
    return with_classes(model, _FROM_TORCH)


def with_classes(model: nn.Module, kinds: Kinds) -> nn.Module:
    """A copy of `model` in which layers of exactly these types have the class `kinds` gives.

    Both classes must have the same attributes: these, parameters and hooks among them, stay.
    """
    model = copy.deepcopy(model)
    for layer in model.modules():
        if type(layer) in kinds:
            layer.__class__ = kinds[type(layer)]
    return model
