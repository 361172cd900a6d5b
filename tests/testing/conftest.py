import numpy as np
import pytest

from torchnnfs import classifier, spiral
from torchnnfs.testing.models import LAYERS


@pytest.fixture
def chapter(stream):
    """The chapter's network and its data."""
    points, _ = spiral(generator=stream)
    return classifier(2, 3, 3, generator=stream), points


@pytest.fixture
def registry():
    """The table of layers, which is behind the test what it was before."""
    before = dict(LAYERS)
    yield
    LAYERS.clear()
    LAYERS.update(before)
