"""Training.

The chapter has no training; this shows that its layers can be trained: the spiral, a hidden layer
of 64, Adam, through the logits and through the probabilities.
"""

import numpy as np
import pytest
import torch
from torch import nn

from torchnnfs import classifier, spiral
from torchnnfs.classes import to_torch


def logits(model, input, target):
    """What torch wants: the softmax is part of the loss."""
    return nn.functional.cross_entropy(model[:-1](input), target)


def probabilities(model, input, target):
    """What the book does: the negative logarithm of the target's probability."""
    return -model(input)[torch.arange(len(target)), target].log().mean()


LOSSES = [
    pytest.param(
        logits, marks=pytest.mark.feature("through logits", "`nn.CrossEntropyLoss()`, `model[:-1]`")
    ),
    pytest.param(
        probabilities,
        marks=pytest.mark.feature(
            "through probabilities", "`-model(x)[rows, target].log().mean()`"
        ),
    ),
]


@pytest.fixture
def start():
    """The book's data, and a network drawn behind it from the same stream."""
    stream = np.random.RandomState(0)
    data = spiral(100, 3, generator=stream)
    return classifier(2, 64, 3, generator=stream), *data


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors of this size gain nothing from more, and lose much where other work is done."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def step(optimizer, loss, *arguments):
    optimizer.zero_grad()
    found = loss(*arguments)
    found.backward()
    optimizer.step()
    return found.detach()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_spiral_is_learned(loss, start):
    model, input, target = start
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    # It takes 2400 to 3600 steps, as the last bits of the machine will have it.
    for i in range(1, 10_001):
        step(optimizer, loss, model, input, target)
        if i % 100 == 0:
            accuracy = (model(input).argmax(-1) == target).float().mean()
            if accuracy >= 0.95:
                break
    assert accuracy >= 0.95


@pytest.mark.parametrize("loss", LOSSES)
def test_training_gives_torchs_bits(loss, start):
    ours, input, target = start
    theirs = to_torch(ours)
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        losses.append([step(optimizer, loss, model, input, target) for _ in range(100)])
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0] / 1.1
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.feature("torch's optimizers", "`torch.optim.SGD(model.parameters(), lr=1)`")
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.02),
        lambda p: torch.optim.Adam(p, lr=0.02, fused=True),
        lambda p: torch.optim.RMSprop(p, lr=0.01),
        lambda p: torch.optim.Adagrad(p, lr=0.1),
    ],
    ids=["SGD", "AdamW", "Adam, fused", "RMSprop", "Adagrad"],
)
def test_optimizers(make, start):
    ours, input, target = start
    theirs = to_torch(ours)
    for model in (ours, theirs):
        optimizer = make(model.parameters())
        for _ in range(20):
            step(optimizer, logits, model, input, target)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.feature("LBFGS", "`torch.optim.LBFGS(model.parameters())`")
def test_lbfgs(start):
    ours, input, target = start
    theirs = to_torch(ours)
    for model in (ours, theirs):
        optimizer = torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe")

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = logits(model, input, target)
            loss.backward()
            return loss

        before = optimizer.step(closure)
        assert closure() < before
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.feature("averaged weights", "`torch.optim.swa_utils.AveragedModel(model)`")
def test_averaged_weights(start):
    ours, input, target = start
    averages = []
    for model in (ours, to_torch(ours)):
        average = torch.optim.swa_utils.AveragedModel(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        for _ in range(5):
            step(optimizer, logits, model, input, target)
            average.update_parameters(model)
        averages.append(average(input))
    assert torch.equal(*averages)


@pytest.mark.feature("stopping and going on", "`optimizer.state_dict()`, `model.state_dict()`")
def test_checkpoint(start, tmp_path):
    model, input, target = start
    again = classifier(2, 64, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(5):
        step(optimizer, logits, model, input, target)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "5")
    saved = torch.load(tmp_path / "5", weights_only=True)
    again.load_state_dict(saved["model"])
    resumed = torch.optim.Adam(again.parameters())
    resumed.load_state_dict(saved["optimizer"])
    for _ in range(5):
        step(optimizer, logits, model, input, target)
        step(resumed, logits, again, input, target)
    assert torch.equal(model(input), again(input))
