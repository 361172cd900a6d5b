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
