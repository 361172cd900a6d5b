import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from torch import nn

from torchnnfs import classifier, compare, spiral
from torchnnfs.testing.candidates import devices_here

#: Files whose tests compile, start processes or train, and single ones; scripts/test --quick leaves
#: them out.
SLOW = ("compatibility/", "test_campaign.py", "test_docs.py", "test_fused", "test_kernel.py")
SLOW += (
    "test_gradients.py",
    "test_chapters.py",
    "test_notebook.py",
    "test_main.py",
    "test_html.py",
)
SLOW += ("test_the_page_whatever", "test_transformations_leave", "test_importing_seeds", ".md")


def pytest_collection_modifyitems(items):
    for item in items:
        if any(name in item.nodeid for name in SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(params=devices_here(), ids=str)
def device(request):
    return request.param


@pytest.fixture(params=[torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def lively():
    """Makes networks whose outputs differ from row to row."""

    def make(*widths, dtype=torch.float32, **keywords):
        model = classifier(*widths, **keywords)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=1.0)
        return model.to(dtype)

    return make


@pytest.fixture
def both():
    """What a fused model and its layers give, without gradients."""

    @torch.no_grad()
    def call(fused_model, input):
        return fused_model(input), nn.Sequential.forward(fused_model, input)

    return call


@pytest.fixture
def model(lively):
    """What the tests of fuse call, unless they need another."""
    return lively(2, 5, 3)


@pytest.fixture
def points():
    return torch.randn(300, 2)


@pytest.fixture
def stream():
    """The stream behind the book's page."""
    return np.random.RandomState(0)


@pytest.fixture(autouse=True)
def _unchanged_process():
    """No test leaves NumPy patched, or torch with other defaults, behind."""
    before = (np.dot, np.zeros, np.eye, np.random.randn, torch.get_default_dtype())
    torch.manual_seed(0)
    yield
    assert before == (np.dot, np.zeros, np.eye, np.random.randn, torch.get_default_dtype())


@pytest.fixture(scope="session")
def agreeing():
    """The comparison of the chapter's network with NumPy."""
    stream = np.random.RandomState(0)
    points, _ = spiral(generator=stream)
    return compare(classifier(2, 3, 3, generator=stream), points)


@pytest.fixture(scope="session")
def disagreeing():
    """The same with a ReLU that is not one."""
    stream = np.random.RandomState(0)
    points, _ = spiral(generator=stream)
    model = classifier(2, 3, 3, generator=stream)
    model[1].forward = lambda input: torch.where(input > 0, input, 0.01 * input)
    return compare(model, points)


@pytest.fixture
def browser(tmp_path):
    """What a document writes into the data-measured attributes, in a browser without a screen."""
    names = ("chromium", "chromium-browser", "google-chrome")
    executable = next(filter(None, map(shutil.which, names)), None)
    if executable is None:
        pytest.skip("no chromium executable on this machine's PATH")
    flags = [
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *(f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,800", "--dump-dom"),
    ]

    def measured(document):
        path = tmp_path / "document.html"
        path.write_text(document, encoding="utf-8")
        run = [executable, *flags, path.as_uri()]
        shown = subprocess.run(run, capture_output=True, text=True, timeout=120, check=True).stdout
        return re.findall(r'data-measured="([^"]*)"', shown)

    return measured
