"""What the tests behind docs/compatibility.md share, and the record that they leave.

A test marked `feature(name, how)` stands behind one line of the table. `name` is what the line
says, `how` the one-line use; `packages=("onnxruntime",)` names what else the line was tested with.
Several tests, and all parameters of a test, may stand behind one line. The group of a line is the
test module, with the first line of its docstring as the title.

`python -m pytest tests/compatibility --compatibility FILE` writes the lines down as JSON.
"""

import functools
import importlib.metadata
import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from torchnnfs import Dense, ReLU, Softmax


def pytest_addoption(parser):
    parser.addoption(
        "--compatibility", type=Path, metavar="FILE", help="write the tested features there"
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "feature(name, how, packages=()): the line of docs/compatibility.md that this test proves",
    )
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
