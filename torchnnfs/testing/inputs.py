"""What `compare` can be asked: clear errors for everything else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def check_model(role: str, model: Any) -> None:
    """A module whose parameters have values."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"compare expects {role} to be a torch.nn.Module, got {_kind(model)}")
    lazy = [name for name, value in model.named_parameters() if nn.parameter.is_lazy(value)]
    if lazy:
        raise ValueError(
            f"compare expects {role} with values, got {lazy[0]!r} that has no shape yet; call the "
            "model once first"
        )
    for name, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise ValueError(
                f"compare expects {role} with values, got {name!r} on the meta device; call "
                "to_empty(device='cpu') and then reset_parameters() or load_state_dict() first"
            )


def check_input(input: Any) -> None:
    """A floating-point tensor with values."""
    if not isinstance(input, Tensor):
        raise TypeError(
            f"compare expects input to be a torch.Tensor, got {_kind(input)}; "
            "call torch.as_tensor(input, dtype=torch.float32) first"
        )
    if not input.is_floating_point():
        raise TypeError(
            f"compare expects a floating-point input, got {input.dtype}; call input.float() first"
        )
    if input.is_meta:
        raise ValueError("compare expects an input with values, got one on the meta device")
    if input.numel() == 0 or input.ndim == 0:
        raise ValueError(
            f"compare expects at least one sample, got an input of shape {tuple(input.shape)}"
        )


def check_finite(model: nn.Module, problem: nn.Module | None, input: Tensor, dtype: str) -> None:
    """No verdict on NaN: everything would equal everything."""
    parts = [("input", input)]
    parts += [(f"model parameter {name!r}", value) for name, value in model.named_parameters()]
    if problem is not None:
        parts += [(f"reference parameter {name!r}", p) for name, p in problem.named_parameters()]
    for name, tensor in parts:
        broken = (~torch.isfinite(tensor.detach())).nonzero()
        if len(broken):
            index = tuple(broken[0].tolist())
            raise ValueError(
                f"compare expects finite numbers, got {tensor[index].item()} in {name} at {index} "
                f"in {dtype} ({len(broken)} of {tensor.numel()} are not finite)"
            )


def _kind(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
