"""What `compare` can be asked: clear errors for everything else."""

from typing import Any

import torch
from torch import Tensor, nn

from torchnnfs.testing.values import leaves, pieces


def check_model(role: str, model: Any) -> None:
    """A module whose parameters have values."""
    expects = f"compare expects {role}"
    if not isinstance(model, nn.Module):
        raise TypeError(f"{expects} to be a torch.nn.Module, got {_kind(model)}")
    if any(isinstance(each, torch.jit.ScriptModule) for each in model.modules()):
        raise TypeError(
            f"{expects} to be a torch.nn.Module in Python, got one of torch.jit, whose parameters "
            "it cannot replace; compare the module that it was made from"
        )
    for name, tensor in [*model.named_parameters(), *model.state_dict().items()]:
        if nn.parameter.is_lazy(tensor):
            raise ValueError(
                f"{expects} with values, got {name!r} that has no shape yet; call the model once "
                "first"
            )
        if isinstance(tensor, Tensor) and tensor.is_meta:
            raise ValueError(
                f"{expects} with values, got {name!r} on the meta device; call "
                "to_empty(device='cpu') and then reset_parameters() or load_state_dict() first"
            )


def check_input(input: Any) -> None:
    """A tensor, or a tuple or dictionary of tensors, with values."""
    tensors = leaves(input)
    wrong = next((each for each in tensors.values() if not isinstance(each, Tensor)), None)
    if not isinstance(input, Tensor | tuple | dict) or not tensors or wrong is not None:
        raise TypeError(
            "compare expects input to be a torch.Tensor, or a tuple (arguments) or dict (keyword "
            f"arguments) of tensors, got {_kind(input if wrong is None else wrong)}; call "
            "torch.as_tensor(...) first"
        )
    for name, tensor in tensors.items():
        if tensor.is_nested or tensor.layout != torch.strided:
            layout = tensor.layout if tensor.layout != torch.strided else "a nested layout"
            raise TypeError(
                f"compare expects a dense input, got one in {layout} as input{name}; call "
                ".to_dense() (a nested one: torch.nested.to_padded_tensor), or let the model hold "
                "a sparse one as a buffer"
            )
        got = f"got {tensor.dtype} in input{name}, of shape {tuple(tensor.shape)}"
        if tensor.is_meta:
            raise ValueError(f"compare expects an input with values, {got}, on the meta device")
        if tensor.is_complex():
            raise TypeError(f"compare expects real numbers, {got}")
        if tensor.numel() == 0:
            raise ValueError(f"compare expects at least one sample, {got}")


def check_finite(model: nn.Module, role: str, input: Any, dtype: torch.dtype) -> None:
    """No verdict on NaN: everything would equal everything."""
    parts = [(f"input{name}", tensor) for name, tensor in leaves(input).items()]
    parts += [(f"{role} parameter {name!r}", value) for name, value in model.named_parameters()]
    for name, tensor in parts:
        *_, numbers = pieces(tensor)
        stored = numbers.to(dtype) if numbers.is_floating_point() else numbers
        broken = (~torch.isfinite(stored)).nonzero()
        if len(broken):
            index = tuple(broken[0].tolist())
            raise ValueError(
                f"compare expects finite numbers, got {stored[index].item()} in {name} at {index} "
                f"in {str(dtype)[6:]} ({len(broken)} of {numbers.numel()} are not finite)"
            )


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
