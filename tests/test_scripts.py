"""What the scripts with a long run do before it, and whether their records add up."""

import ast
import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def mutation():
    spec = importlib.util.spec_from_file_location("mutation", ROOT / "scripts/mutation.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutation"] = module  # where a dataclass looks for its types
    spec.loader.exec_module(module)
    yield module
    del sys.modules["mutation"]


@pytest.mark.parametrize("file", ["modules.py", "testing/layers/softmax.py"])
def test_every_mutant_is_one_change_that_python_can_read(mutation, file):
    source = (ROOT / "torchnnfs" / file).read_bytes()
    before = ast.dump(ast.parse(source))
    for mutant in mutation.mutants(file):
        assert source[mutant.start : mutant.end].decode() == mutant.old
        changed = source[: mutant.start] + mutant.new.encode() + source[mutant.end :]
        assert ast.dump(ast.parse(changed)) != before, str(mutant)


def test_a_sample_is_that_of_its_seed_and_has_every_file(mutation):
    files = ["spiral.py", "streams.py"]
    first = mutation.sample(files, 12, seed=0)
    assert first == mutation.sample(files, 12, seed=0)
    assert first != mutation.sample(files, 12, seed=1)
    assert {mutant.file for mutant in first} == set(files)
    assert mutation.sample(files, None, seed=0) != first


def test_the_record_of_mutation_adds_up(mutation):
    document = json.loads((ROOT / "results/mutation.json").read_text())
    files = document["files"]
    assert set(files) <= set(mutation.TESTS)
    kinds = ("killed", "survived", "timeout")
    assert sum(each[kind] for each in files.values() for kind in kinds) == document["run"]
    assert sum(each["killed"] for each in files.values()) == document["killed"]
    assert sum(each["survived"] for each in files.values()) == len(document["survivors"])


def test_judging_measures_what_its_record_says(tmp_path):
    record = tmp_path / "judging.json"
    command = [sys.executable, ROOT / "scripts/judging.py", "--samples", "100", "--rounds", "2"]
    done = subprocess.run([*command, "--json", record], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, kept = (json.loads(each.read_text()) for each in (record, ROOT / "results/judging.json"))
    assert found.keys() == kept.keys()
    assert found["rows"] == 300
    assert done.stdout.startswith(
        f"\n300 rows: judging eager and numpy takes {found['passes']['median']:.1f} times"
    )


def versions(*arguments):
    command = [sys.executable, ROOT / "scripts/versions", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_versions_says_what_it_did_not_run(tmp_path):
    record = tmp_path / "versions.json"
    done = versions("--python", "no-such-python", "--json", record)
    assert done.returncode == 0, done.stderr
    why = "there is no no-such-python on the PATH that runs"
    assert done.stdout == f"lowest: not run: {why}\nnewest: not run: {why}\n"
    document = json.loads(record.read_text())
    assert [each["ran"] for each in document["environments"]] == [False, False]
    lowest, newest = (each["asked"] for each in document["environments"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in project["dependencies"]:
        name, version = requirement.split(">=")
        assert document["declared"][name] == version
        assert any(
            each.startswith(f"{name}~={version}") or each == f"{name}=={version}.*"
            for each in lowest
        )
    assert newest[1:] == ["nnfs", "numpy", "rich", "torch"]
