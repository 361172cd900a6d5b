import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from torchnnfs import Dense, compare
from torchnnfs.__main__ import main
from torchnnfs.testing import environment

ROOT = Path(__file__).parents[1]


def skeleton(text):
    """The words of a report without its numbers, which belong to a machine and a version."""
    text = re.sub(r"^(torch|numpy|nnfs|python|device cpu):.*$", r"\1:", text, flags=re.M)
    text = re.sub(r"(?<![\w.])\d+(\.\d+)*([eE][-+]\d+)?%?", "#", text)
    words = re.sub(r"[━─┏┓┗┛┡┩├┤┼┬┴╇┳┻╈└┘]+", "", text).split()
    return words


def test_the_table_in_the_docs_is_what_is_printed(capsys):
    page = (ROOT / "docs/judge.md").read_text()
    (capture,) = re.findall(r"```text\n(.*?)```", page, re.S)
    main(["compare", "--device", "cpu", "--candidates", "eager", "numpy"])
    printed = capsys.readouterr().out
    # What follows the table says who came first and whether exp was exact: of a machine, too.
    capture, printed = (text[: text.index("Closest to float64")] for text in (capture, printed))
    assert skeleton(capture) == skeleton(printed)


def test_the_constraints_satisfy_the_metadata():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints.txt").read_text(), re.M))
    for requirement in project["project"]["dependencies"]:
        name, lowest = requirement.split(">=")
        assert [int(n) for n in pins[name].split(".")] >= [int(n) for n in lowest.split(".")]
    for name, newest in environment.TESTED.items():
        assert pins[name].startswith(f"{newest}.")


def test_a_version_newer_than_the_tested_ones_is_a_line_and_no_failure(monkeypatch):
    model, points = Dense(2, 3), torch.ones(1, 2)
    assert "newer" not in str(compare(model, points))
    monkeypatch.setattr(environment, "TESTED", {"torch": "2.9", "numpy": "99.0"})
    comparison = compare(model, points)
    assert comparison.ok
    assert f"torch {torch.__version__} is newer than the tests have run with: 2.9." in str(
        comparison
    )


def test_a_keras_model_is_a_reference(tmp_path):
    if importlib.util.find_spec("keras") is None:
        pytest.skip("needs keras")
    page = (ROOT / "docs/port.md").read_text()
    (block,) = re.findall(r"```python\n(import os\n.*?)```", page, re.S)
    leaking = block.replace("nn.ReLU()", "nn.LeakyReLU()")
    command = [sys.executable, "-W", "ignore", "-c", f"{block}\n{leaking}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^(?:DIS)?AGREES", done.stdout, re.M) == ["AGREES", "DISAGREES"]


def test_readme_names_every_public_function():
    import torchnnfs

    readme = (ROOT / "README.md").read_text()
    missing = [name for name in torchnnfs.__all__ if name not in readme]
    assert not missing


@pytest.mark.parametrize("script", ["scripts/compare", "scripts/test", ".ci/run"])
def test_scripts_can_be_run(script):
    assert (ROOT / script).stat().st_mode & 0o111


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark", ROOT / "scripts/benchmark.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        spec.loader.exec_module(module)
        yield module


def test_the_benchmark_writes_what_it_measured(benchmark, monkeypatch, capsys, tmp_path):
    record, picture = tmp_path / "speed.json", tmp_path / "speed.png"
    arguments = ["--samples", "5", "70", "--networks", "2-3-3", "--rounds", "2"]
    arguments += ["--peers", "fused", "torch eager", "--json", str(record), "--plot", str(picture)]
    monkeypatch.setattr(sys, "argv", ["scripts/benchmark.py", *arguments])
    benchmark.main()
    printed = capsys.readouterr().out
    for kind in ("forward", "training"):
        assert f"{kind}: 2 -> 3 -> 3, 70 samples, 2 rounds" in printed
    assert "the best of the others" in printed or "The machine is too busy" in printed
    few, _, step, _ = json.loads(record.read_text())["results"]
    assert [row["peer"] for row in step["peers"]] == ["fused", "torch eager"]
    assert [row["peer"] for row in few["peers"]] == [
        "fused",
        "torch eager",
        "copy of as many bytes",
    ]
    assert all(row["microseconds"] > 0 for row in few["peers"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_tables_of_speed_are_those_of_the_record(benchmark):
    record = json.loads((ROOT / "results/speed.json").read_text())["results"]
    assert {case["table"] for case in record} == {"forward", "training"}
    text = (ROOT / "docs/speed.md").read_text()
    assert benchmark.filled(text, record) == text
    assert benchmark.filled(text, record[1:]) != text
    restless = [{**case, "unrest": 1.5} for case in record]
    assert "too busy" in benchmark.summary(restless, "forward")
    assert benchmark.verdict(restless[0]).startswith("The machine is too busy: half of the ratios")
