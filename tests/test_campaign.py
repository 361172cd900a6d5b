import importlib.util
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from torchnnfs import ReLU

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "judge.md"


@pytest.fixture(scope="module")
def campaign():
    spec = importlib.util.spec_from_file_location("campaign", ROOT / "scripts" / "campaign.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["campaign"] = module
    sys.path.insert(0, str(ROOT / "scripts"))  # where a script finds the files beside it
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(ROOT / "scripts"))
        del sys.modules["campaign"]


@pytest.fixture
def one_thread():
    """Small products in two threads wait for each other where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_no_correct_network_is_called_wrong_and_no_bound_is_out_of_reach(campaign):
    tallies, alarms = campaign.campaign(range(200), 0)
    assert not alarms, "\n".join(f"network {index}:\n{each}" for index, each in alarms)
    dtypes = ["float64", "float32", "bfloat16", "float16"]
    assert list(tallies) == [("eager", dtype) for dtype in dtypes]
    assert all(tally.networks == 200 for tally in tallies.values())
    assert all(tally.largest <= 1 for tally in tallies.values())
    for dtype in dtypes[1:]:
        assert statistics.median(tallies["eager", dtype].dense) > 0.01
    # NumPy and torch share their bits, more often than not, where both compute in float64.
    extended = tallies["eager", "float64"].extended
    if np.finfo(np.longdouble).nmant > 52:
        assert 0.01 < statistics.median(extended) <= max(extended) <= 1


def test_a_network_is_the_same_alone(campaign):
    (model, points), (again, same) = campaign.network(0, 3), campaign.network(0, 3)
    assert torch.equal(points, same)
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)
    other = campaign.network(1, 3)[1]
    assert points.shape != other.shape or not torch.equal(points, other)


def test_the_campaign_can_fail(campaign, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(campaign, "SLOW", ())
    file = tmp_path / "new" / "campaign.json"
    command = ["--networks", "8", "--json", str(file)]
    assert campaign.main(command) == 0
    assert json.loads(file.read_text())["false alarms"] == []

    monkeypatch.setattr(ReLU, "forward", lambda self, input: F.leaky_relu(input, 1e-3))
    assert campaign.main(command) == 1
    document = json.loads(file.read_text())
    assert document["command"].startswith("scripts/campaign.py --networks 8 --json")
    assert document["environment"]["torch"] == torch.__version__
    alarms = document["false alarms"]
    assert {alarm["dtype"] for alarm in alarms} == {"float64", "float32", "bfloat16", "float16"}
    assert all(alarm["layer"].endswith("ReLU") for alarm in alarms)
    assert sum(row["disagree"] for row in document["results"]) == len(alarms)
    printed = capsys.readouterr().out
    index = alarms[0]["network"]
    assert f"network {index} is right and was called wrong:\n" in printed
    assert "DISAGREES: eager on cpu in float64" in printed
    assert campaign.main(["--only", str(index)]) == 1
    assert "DISAGREES: eager on cpu in float64" in capsys.readouterr().out


def words_and_sizes(rows):
    cells = [[cell.strip() for cell in row[1:-1].split("|")] for row in rows]
    return [row[:-1] for row in cells], [float(row[-1] or 0) for row in cells]


def test_what_a_tolerance_lets_through_is_what_the_page_says(campaign, capsys):
    assert campaign.main(["--table"]) == 0
    words, sizes = words_and_sizes(capsys.readouterr().out.splitlines())
    written = re.findall(r"^\| (?!broken twin|---).*\|$", PAGE.read_text(), re.M)
    written_words, written_sizes = words_and_sizes(written)
    assert written_words == words
    for size, written_size in zip(sizes, written_sizes, strict=True):
        assert size == written_size or 0.1 < size / written_size < 10


LEAK = """
import torch.nn.functional as F
import torchnnfs
torchnnfs.ReLU.forward = lambda self, input: F.leaky_relu(input, 1e-3)
"""


def test_the_pattern_for_test_suites_passes_and_fails(tmp_path):
    (pattern,) = re.findall(r"```python\n(import pytest\n.*?)```", PAGE.read_text(), re.S)
    (tmp_path / "test_pattern.py").write_text(pattern)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir=."]
    right = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert right.returncode == 0, right.stdout
    assert re.search(r"^[24] passed", right.stdout, re.M)
    (tmp_path / "conftest.py").write_text(LEAK)
    wrong = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert wrong.returncode == 1
    assert "DISAGREES: eager on cpu in bfloat16, layer 1 ReLU" in wrong.stdout
