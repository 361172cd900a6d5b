import functools
import importlib.metadata
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from torchnnfs import Dense, ReLU, Softmax, classifier, compare, spiral
from torchnnfs.testing.candidates import devices_here
from torchnnfs.testing.models import LAYERS

#: Files whose tests compile, start processes, train, draw or take many comparisons, and single
#: tests that do; scripts/test --quick leaves them out.
SLOW = (
    *("compatibility/", "test_campaign.py", "test_candidates.py", "test_chapters.py"),
    *("test_docs.py", "test_everybody.py", "test_fused", "test_gradients.py", "test_html.py"),
    *("test_kernel.py", "test_main.py", "test_notebook.py", "test_plot.py", "test_reference.py"),
    *("properties.py", "test_batches.py", "test_comparison.py", "test_golden.py"),
    *("test_package.py", "test_report.py", "test_scripts.py", "test_second_device.py"),
    "test_threads.py",
    *("test_forward_mode", "test_importing_seeds", "test_the_page_whatever"),
    *("test_transformations_leave", ".md"),
)


def pytest_ignore_collect(collection_path, config):
    """Among the quick tests, the files that have none are not even imported."""
    if config.option.markexpr != "not slow":
        return None
    path = collection_path.relative_to(config.rootpath).as_posix()
    return any(name in path for name in SLOW) or None


def pytest_collection_modifyitems(items):
    for item in items:
        if any(name in item.nodeid for name in SLOW):
            item.add_marker(pytest.mark.slow)


# The record behind docs/compatibility.md. A test marked `feature(name, how)` stands behind one line
# of the table: `name` is what the line says, `how` the one-line use, `packages` what else the line
# was tested with. Several tests may stand behind one line. The group of a line is the test module,
# with the first line of its docstring as the title.


def pytest_addoption(parser):
    parser.addoption(
        "--compatibility", type=Path, metavar="FILE", help="write the tested features there"
    )


def pytest_configure(config):
    file = config.getoption("compatibility", None)
    if file is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Record(file))


def pytest_itemcollected(item):
    mark = item.get_closest_marker("feature")
    if mark is not None:
        item.user_properties.append(("feature", _line(item, *mark.args, **mark.kwargs)))


def _line(item, name, how, packages=()):
    title = (item.module.__doc__ or item.path.stem).strip().splitlines()[0].rstrip(".")
    versions = {package: _version(package) for package in ("torch", *packages)}
    return {
        "group": item.path.stem.removeprefix("test_"),
        "title": title,
        "feature": name,
        "how": how,
        "versions": {package: version for package, version in versions.items() if version},
    }


def _version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class Record:
    """Collects what became of the tests, from this process or from pytest-xdist's workers."""

    def __init__(self, file):
        self.file = file
        self.lines = {}

    def pytest_runtest_logreport(self, report):
        line = dict(report.user_properties).get("feature")
        if line is None or (report.when != "call" and report.passed):
            return
        key = line["group"], line["feature"]
        self.lines.setdefault(key, (line, []))[1].append(_outcome(report))

    def pytest_sessionfinish(self):
        lines = [{**line, "result": min(found)[1]} for line, found in self.lines.values()]
        self.file.write_text(json.dumps(lines, indent=2) + "\n")


def _outcome(report):
    """What the table says, behind a number: of several tests the one with the lowest counts."""
    if hasattr(report, "wasxfail"):
        return 1, f"does not work: {report.wasxfail.removeprefix('reason: ')}"
    if report.skipped:
        return 2, f"not run here: {report.longrepr[2].removeprefix('Skipped: ')}"
    return (3, "passes") if report.passed else (0, "fails")


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
def batch():
    """What the tests of fuse give the model, unless they need another."""
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


def network_of(linear, *widths, dtype=torch.float32):
    """Dense, ReLU, ..., Dense, Softmax, or torch's, with the same parameters for both.

    They are not the book's: those give 1/3 everywhere, which would hide an error.
    """
    relu, softmax = {Dense: (ReLU, Softmax), nn.Linear: (nn.ReLU, nn.Softmax)}[linear]
    generator = torch.Generator().manual_seed(0)
    model = []
    for n_inputs, n_neurons in itertools.pairwise(widths):
        layer = linear(n_inputs, n_neurons, dtype=dtype)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        model += [layer, relu()]
    model[-1] = softmax(-1)
    return nn.Sequential(*model)


@pytest.fixture
def network():
    """`network(2, 7, 3)`: a classifier of our classes with parameters that are not the book's."""
    return functools.partial(network_of, Dense)


@pytest.fixture
def twins():
    """`twins(2, 7, 3)`: our classifier and torch's, with the same parameters."""
    return lambda *widths, **keywords: tuple(
        network_of(linear, *widths, **keywords) for linear in (Dense, nn.Linear)
    )


@pytest.fixture
def library():
    """`library("peft")`: that module; the test is skipped where its package is not installed."""
    return lambda name: pytest.importorskip(
        name, reason=f"needs {name.split('.')[0]}, which is not installed"
    )


@pytest.fixture
def points():
    """A batch for networks with two inputs."""
    return torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
