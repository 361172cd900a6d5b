"""The book's spiral data set as tensors."""

import numpy as np
import torch
from nnfs.datasets import spiral_data
from torch import Tensor

from torchnnfs.checks import check_count, check_generator
from torchnnfs.streams import Generator, book_numpy


def spiral(
    samples: int = 100,
    classes: int = 3,
    *,
    generator: Generator = None,
    device: torch.device | str | int | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Points on `classes` spiral arms, `samples` on each, and the arm that each belongs to.

    Sample :math:`i` of arm :math:`c` lies at radius :math:`r = i / (\text{samples} - 1)` and angle
    :math:`2.5 t` with :math:`t = 4 (c + r) + 0.2 z`, :math:`z \sim \mathcal{N}(0, 1)`:
    :math:`(r \sin 2.5 t, r \cos 2.5 t)`.

    Args:
        samples: points on each arm, at least 1.
        classes: number of arms, at least 1.
        generator: where the noise z is drawn from. From a `numpy.random.RandomState` the data is
            bit for bit ``nnfs.datasets.spiral_data(samples, classes)`` under ``nnfs.init()``.
            From a `torch.Generator` or None it is drawn on `device` itself.
        device: where the tensors live; torch's default device when None.
        dtype: dtype of the points; torch's default dtype when None.

    Returns:
        ``(input, target)``: (samples * classes, 2) of `dtype`, and (samples * classes,) int64.

    Raises:
        TypeError: `samples` or `classes` that is no int, another kind of generator, a `dtype`
            that is not floating point.
        ValueError: `samples` or `classes` below 1; more than 256 classes from a `RandomState`
            (nnfs keeps them in uint8); a generator that cannot serve `device`.

    Example:
        >>> input, target = spiral(generator=np.random.RandomState(0))
        >>> input[1], target[[0, 100, 200]]
        (tensor([0.0030, 0.0096]), tensor([0, 1, 2]))

    Source: NNFS chapter 3, package ``nnfs``; after A. Karpathy's CS231n notes.
    """
    samples = check_count("spiral", "samples", samples)
    classes = check_count("spiral", "classes", classes)
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if not dtype.is_floating_point:
        raise TypeError(f"spiral expects a floating-point dtype, got {dtype}")
    device = torch.empty(0, device=device).device
    check_generator("spiral", generator, device)
    if isinstance(generator, np.random.RandomState):
        if classes > 256:
            raise ValueError(
                "spiral from a numpy.random.RandomState expects at most 256 classes, since nnfs "
                f"keeps them in uint8, got {classes}; draw from a torch.Generator instead"
            )
        with book_numpy(generator):
            points, labels = map(torch.from_numpy, spiral_data(samples, classes))
        return points.to(device, dtype), labels.to(device, torch.int64)
    # A half type could not tell neighbouring radii apart: draw in float32 at least, round once.
    precise = torch.promote_types(dtype, torch.float32)
    radius = torch.linspace(0, 1, samples, device=device, dtype=precise)
    angle = torch.randn(classes, samples, generator=generator, device=device, dtype=precise)
    arm = torch.arange(classes, device=device, dtype=precise)[:, None]
    angle.mul_(0.2).add_(radius, alpha=4).add_(arm, alpha=4).mul_(2.5)
    points = torch.stack([radius * angle.sin(), radius * angle.cos()], dim=-1)
    target = torch.arange(classes, device=device).repeat_interleave(samples)
    return points.reshape(-1, 2).to(dtype), target
