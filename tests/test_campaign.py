import importlib
import json
import os
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
    sys.path.insert(0, str(ROOT / "scripts"))
    module = importlib.import_module("campaign")
    yield module
    sys.path.remove(str(ROOT / "scripts"))
    for name in ("campaign", "networks"):
        del sys.modules[name]


@pytest.fixture
def one_thread():
    """Small products in two threads wait for each other where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_no_correct_network_is_called_wrong_and_no_bound_is_out_of_reach(campaign):
    tallies, alarms = campaign.campaign(range(26), 0)
    assert not alarms, "\n".join(
        f"{each.kind} {each.network}:\n{each.comparison}" for each in alarms
    )
    kinds = {kind for kind, _, _ in tallies}
    assert {"dense chain", "other layers", *campaign.RIGHT} <= kinds
    own = kinds & set(campaign.OWN)
    assert own
    assert {f"{kind}, reference NumPy" for kind in own} <= kinds
    dtypes = ["float64", "float32", "bfloat16", "float16"]
    assert {dtype for _, _, dtype in tallies} == set(dtypes)
    assert all(tallies["dense chain", "eager", dtype].networks == 26 for dtype in dtypes)
    assert all(tally.largest <= 1 and tally.excess < 4 for tally in tallies.values())
    for dtype in dtypes[1:]:
        assert statistics.median(tallies["dense chain", "eager", dtype].dense) > 0.01
    # NumPy and torch share their bits, more often than not, where both compute in float64.
    extended = tallies["dense chain", "eager", "float64"].extended
    if np.finfo(np.longdouble).nmant > 52:
        assert 0.01 < statistics.median(extended) <= max(extended) <= 1


def test_a_network_is_the_same_alone(campaign):
    for draw in (campaign.network, campaign.other_layers, campaign.own_forward):
        (*_, model, points), (*_, again, same) = draw(0, 3), draw(0, 3)
        assert torch.equal(points, same)
        pairs = zip(model.parameters(), again.parameters(), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs)
        *_, other = draw(1, 3)
        assert points.shape != other.shape or not torch.equal(points, other)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("width", [1, 64, 256])
def test_excess_tells_right_from_wrong(campaign, width):
    (found,) = campaign.excesses([width])
    assert all(found[dtype] < 2 for dtype in ("float64", "float32", "bfloat16", "float16"))
    assert found["TF32"] > 4
    assert found["bfloat16 partial sums"] > 1000
    assert width > 64 or found["noise of 1e-6"] > 4


def test_the_record_is_of_many_networks_and_no_alarm():
    record = json.loads((ROOT / "results" / "campaign.json").read_text())
    assert record["false alarms"] == []
    chains = [row for row in record["results"] if row["kind"] == "dense chain"]
    assert [row["networks"] for row in chains if row["candidate"] == "eager"] == [2000] * 4
    assert all((row["largest excess"] or 0) < 4 for row in record["results"])


@pytest.mark.usefixtures("one_thread")
def test_the_campaign_can_fail(campaign, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(campaign, "SLOW", ())
    monkeypatch.setattr(campaign, "WIDTHS", (4,))
    file = tmp_path / "new" / "campaign.json"
    command = ["--networks", "1", "--json", str(file)]
    assert campaign.main(command) == 0
    assert json.loads(file.read_text())["false alarms"] == []

    monkeypatch.setattr(ReLU, "forward", lambda self, input: F.leaky_relu(input, 1e-3))
    assert campaign.main(command) == 1
    document = json.loads(file.read_text())
    assert document["command"].startswith("scripts/campaign.py --networks 1 --json")
    assert document["environment"]["torch"] == torch.__version__
    alarms = document["false alarms"]
    assert {alarm["dtype"] for alarm in alarms} == {"float64", "float32", "bfloat16", "float16"}
    assert all(alarm["layer"].endswith("ReLU") for alarm in alarms)
    assert sum(row["disagree"] for row in document["results"]) == len(alarms)
    printed = capsys.readouterr().out
    index = alarms[0]["network"]
    assert f"network {index} ({alarms[0]['kind']}) is right and was called wrong:\n" in printed
    assert "DISAGREES: eager on cpu in float64" in printed
    assert campaign.main(["--only", str(index)]) == 1
    assert "DISAGREES: eager on cpu in float64" in capsys.readouterr().out


def words_and_sizes(rows):
    cells = [[cell.strip() for cell in row[1:-1].split("|")] for row in rows]
    return [row[:-1] for row in cells], [float(row[-1] or 0) for row in cells]


def test_what_a_tolerance_lets_through_is_what_the_page_says(campaign, capsys):
    assert campaign.main(["--table"]) == 0
    printed = capsys.readouterr().out.splitlines()
    words, sizes = words_and_sizes(printed[2:])
    page = PAGE.read_text()
    _, written = page.split("\n".join(printed[:2]) + "\n")
    written = written.split("\n\n")[0].splitlines()
    written_words, written_sizes = words_and_sizes(written)
    assert written_words == words
    for size, written_size in zip(sizes, written_sizes, strict=True):
        assert size == written_size or 0.1 < size / written_size < 10


LEAK = """
@pytest.fixture(autouse=True)
def leak(monkeypatch):
    leaky = torch.nn.functional.leaky_relu
    monkeypatch.setattr("torchnnfs.ReLU.forward", lambda self, input: leaky(input, 1e-3))
"""


def test_the_pattern_for_test_suites_passes_and_fails(tmp_path):
    (pattern,) = re.findall(r"```python\n(import pytest\n.*?)```", PAGE.read_text(), re.S)
    (tmp_path / "test_right.py").write_text(pattern)
    (tmp_path / "test_wrong.py").write_text(pattern + LEAK)
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "--rootdir=."]
    alone = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    run = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True)
    found = re.findall(r"^(PASSED|FAILED) (\w+)\.py", run.stdout, re.M)
    assert set(found) == {("PASSED", "test_right"), ("FAILED", "test_wrong")}, run.stdout
    assert len(found) in (4, 8)  # two dtypes, on a GPU as well where there is one
    assert "DISAGREES: eager on cpu in bfloat16, layer 1 ReLU" in run.stdout
