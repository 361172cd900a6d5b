import math

import pytest
import torch
from torch import nn

from torchnnfs import compare
from torchnnfs.testing import Candidate


class BiasFirst(nn.Linear):
    """The sum begins with the bias, as that of many kernels does."""

    def forward(self, input):
        total = self.bias.expand(*input.shape[:-1], self.out_features).clone()
        for k in range(self.in_features):
            total += input[..., k, None] * self.weight[:, k]
        return total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1.0, 100.0, 1e4])
def test_sums_that_begin_with_a_large_bias_are_right(size, dtype):
    model = BiasFirst(64, 3)
    with torch.no_grad():
        model.bias.copy_(torch.tensor([1.0, -2.0, 0.7]) * size)
    (row,) = compare(model, torch.randn(50, 64), candidates=[Candidate(dtype=dtype)]).rows
    assert row.ok
    assert row.excess < 1.5


def test_what_overflows_is_left_out_without_a_warning():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    for layer in model:
        nn.init.constant_(layer.weight, 2.0)
    points = torch.tensor([[3e38], [1.0], [0.3]])
    comparison = compare(model, points, candidates=["eager"], controls=False)
    assert comparison.ok, comparison
    assert [row.excess for row in comparison.rows] == [0, 0]


class Off(nn.Linear):
    """Off by a number that may be of any size."""

    by = 0.0

    def forward(self, input):
        return super().forward(input) + self.by


def excess_of(weight, input, by, dtype=torch.float32):
    model = Off(len(weight[0]), len(weight), bias=False)
    model.by = by
    with torch.no_grad():
        model.weight.copy_(torch.tensor(weight))
    candidates = [Candidate(dtype=dtype)]
    (row,) = compare(model, torch.tensor(input), candidates=candidates, controls=False).rows
    return row.excess


def test_where_plain_sums_are_exact_a_roundoff_is_expected_all_the_same():
    """Of the root mean square of the output, spread evenly: u / sqrt(3)."""
    by = 2.0**-20
    found = excess_of([[1.0]], [[1.0], [2.0], [-1.0]], by)
    assert found == pytest.approx(by / (2.0**-24 * math.sqrt(2) / math.sqrt(3)), rel=1e-6)
    found = excess_of([[1.0]], [[1.0], [2.0], [-1.0]], 2.0**-9, torch.bfloat16)
    assert found == 0  # it is not there after rounding


def test_near_zero_numbers_may_be_flushed():
    tiny = 2.0**-126
    # Twice for the result; and for each input with the size of the largest number and 1.
    found = excess_of([[2 * tiny, 0.0]], [[3.0, 0.0]], 20 * tiny)
    assert found == pytest.approx(20 / (2 + 2 * (1 + 3)), rel=1e-6)
    found = excess_of([[2.0**-20]], [[2.0**-3]], 2.0**-22, torch.float16)
    size = 2.0**-23  # a half type rounds to 2^-24 there
    floor = 2.0**-11 * size / math.sqrt(3) + 2 * 2.0**-25
    assert found == pytest.approx(2.0**-22 / floor, rel=1e-6)
