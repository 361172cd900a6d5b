import time

import numpy as np
import pytest
import torch
from nnfs.datasets import spiral_data

from torchnnfs import book_numpy, spiral


@pytest.mark.parametrize(("samples", "classes"), [(100, 3), (1, 1), (7, 5), (2, 256)])
def test_from_randomstate_it_is_nnfs(samples, classes, device, dtype):
    with book_numpy():
        points, labels = spiral_data(samples, classes)
    stream = np.random.RandomState(0)
    input, target = spiral(samples, classes, generator=stream, device=device, dtype=dtype)
    assert input.device.type == target.device.type == device.type
    assert torch.equal(input.cpu(), torch.from_numpy(points).to(dtype))
    assert target.dtype == torch.int64
    assert target.tolist() == labels.tolist()


@pytest.mark.parametrize("samples", [1, 2, 1000])
def test_from_torch_it_follows_the_formula(samples, device):
    input, target = spiral(samples, 4, generator=torch.Generator(device), device=device)
    noise = torch.randn(4, samples, generator=torch.Generator(device), device=device).double().cpu()
    r = torch.linspace(0, 1, samples, dtype=torch.float64)
    t = 2.5 * (4 * (torch.arange(4).unsqueeze(-1) + r) + 0.2 * noise)
    expected = torch.stack((r * t.sin(), r * t.cos()), -1).reshape(-1, 2)
    # The angle goes up to 50, so float32 knows it to 50 units roundoff and a few more operations.
    assert (input.double().cpu() - expected).abs().max() < 200 * 2.0**-24
    assert target.tolist() == [c for c in range(4) for _ in range(samples)]


def test_the_noise_is_drawn_from_torchs_stream():
    numpys = np.random.get_state()[1].copy()
    first, second = (spiral(generator=torch.Generator().manual_seed(1))[0] for _ in range(2))
    assert torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(spiral()[0], first)
    assert not torch.equal(spiral()[0], first)
    assert (np.random.get_state()[1] == numpys).all()


def test_dtype_and_defaults(device, dtype):
    input, target = spiral(5, 2, device=device, dtype=dtype)
    assert (input.dtype, target.dtype) == (dtype, torch.int64)
    assert input.shape == (10, 2)
    assert spiral()[0].shape == (300, 2)
    radius = input.double().norm(dim=-1).cpu().reshape(2, 5)
    eps = torch.finfo(dtype).eps
    assert ((radius - torch.linspace(0, 1, 5)).abs() < 4 * max(eps, 1e-6)).all()


def test_two_million_samples_take_a_blink(device):
    start = time.perf_counter()
    input, _ = spiral(2_000_000, 1, device=device)
    assert input.shape == (2_000_000, 2)
    assert time.perf_counter() - start < 5  # a fraction of a second; no Python loop


def test_the_arms_are_numbered_from_the_first(device):
    """In rows of the points' own order, whatever the number of arms."""
    for generator in (None, np.random.RandomState(0)):
        input, target = spiral(4, 3, generator=generator, device=device)
        assert input.shape == (12, 2)
        assert target.tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert not input[::4].any()  # each arm begins in the middle


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"samples": 0}, ValueError, "samples to be at least 1, got 0"),
        ({"classes": -1}, ValueError, "classes to be at least 1, got -1"),
        ({"samples": 2.0}, TypeError, r"samples to be an int, got 2.0 \(float\)"),
        ({"classes": True}, TypeError, r"classes to be an int, got True \(bool\)"),
        ({"generator": 0}, TypeError, "got builtins.int; make one with"),
        ({"dtype": torch.int64}, TypeError, "floating-point dtype, got torch.int64"),
        (
            {"classes": 257, "generator": np.random.RandomState(0)},
            ValueError,
            "at most 256 classes, since nnfs keeps them in uint8, got 257",
        ),
    ],
)
def test_bad_input_is_explained(arguments, error, message):
    with pytest.raises(error, match=message):
        spiral(**arguments)
