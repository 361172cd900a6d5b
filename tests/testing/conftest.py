import pytest

from torchnnfs import classifier, spiral
from torchnnfs.testing.models import LAYERS


@pytest.fixture
def chapter(stream):
    """The chapter's network and its data."""
    points, _ = spiral(generator=stream)
    return classifier(2, 3, 3, generator=stream), points


@pytest.fixture(autouse=True)
def _unchanged_table():
    """No test leaves a registered layer behind."""
    before = dict(LAYERS)
    yield
    LAYERS.clear()
    LAYERS.update(before)
