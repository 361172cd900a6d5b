"""Change the package in one place at a time, and see whether a test notices.

    .venv/bin/python scripts/mutation.py --jobs 2 --minutes 25 --json results/mutation.json

A mutant is a copy of the package with one change: another operator or comparison, another constant,
a condition turned round, a value that is not returned. It is killed when a test fails among those
that mirror its file; a mutant that survives shows a missing test, or computes the same. Of those
tests only the ones run that call the changed function, the quickest first: the others cannot notice
it. The sample is drawn from all mutants of the files with a seed, the same share of each file. The
tests run on copies: this tree is not changed. --list prints the mutants and runs none.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).parents[1]
_LAYERS = ["tests/testing/layers", "tests/testing/test_bounds_properties.py"]
_JUDGE = [
    f"tests/testing/test_{name}.py"
    for name in ("judge", "excess", "comparison", "reference", "batches", "everybody")
]
#: Files of the package, and the tests that mirror them.
TESTS = {
    "modules.py": [
        "tests/test_modules.py",
        "tests/compatibility/test_contract.py",
        "torchnnfs/modules.py",
    ],
    "book.py": [
        *(f"tests/test_{name}.py" for name in ("book", "kept", "chapters", "objects")),
        "torchnnfs/book.py",
    ],
    "streams.py": ["tests/test_streams.py", "tests/test_spiral.py", "torchnnfs/streams.py"],
    "spiral.py": ["tests/test_spiral.py", "torchnnfs/spiral.py"],
    "testing/reference.py": _JUDGE,
    "testing/judge.py": _JUDGE,
    "testing/layers/__init__.py": _LAYERS,
    "testing/layers/dense.py": _LAYERS,
    "testing/layers/normalise.py": _LAYERS,
    "testing/layers/pointwise.py": _LAYERS,
    "testing/layers/reshape.py": _LAYERS,
    "testing/layers/softmax.py": _LAYERS,
}
#: By the name of a test: how long it takes, and the functions that it calls.
Tests = dict[str, dict[str, Any]]
_SHOWN = Console(stderr=True)
#: What the tests import beside torch: once, by the process from which theirs are forked.
_IMPORTED = ("mpmath", "nnfs.datasets", "rich.table", "torch.export")

OPERATORS = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "/"}
OPERATORS |= {ast.Mod: "*", ast.Pow: "*", ast.BitAnd: "|", ast.BitOr: "&", ast.MatMult: "*"}
COMPARISONS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!="}
COMPARISONS |= {ast.NotEq: "==", ast.Is: "is not", ast.IsNot: "is", ast.In: "not in"}
COMPARISONS |= {ast.NotIn: "in"}
# Not mutated: types and what they are made of, which are never run, and messages.
UNSEEN = {"annotation", "returns", "decorator_list", "type_params", "bases"}
_FUNCTIONS = ast.FunctionDef | ast.Lambda


@dataclass(frozen=True)
class Mutant:
    """One change: what stands in a file from one byte to another, and what takes its place."""

    file: str
    line: int
    old: str
    new: str
    start: int
    end: int
    function: int  # the line where the function begins that runs it; 0: it runs at the import

    @property
    def shown(self) -> dict[str, Any]:
        """What the record has of it."""
        return {"file": self.file, "line": self.line, "old": self.old, "new": self.new}

    def __str__(self) -> str:
        old, new = (" ".join(each.split()) for each in (self.old, self.new))
        return f"torchnnfs/{self.file}:{self.line}: {old} -> {new}"


def changes(node: ast.AST, text: Any) -> Iterator[tuple[ast.AST, str]]:
    """What of `node` is replaced, and by what."""
    match node:
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            yield node, f"(({text(left)}) {OPERATORS[type(op)]} ({text(right)}))"
        case ast.AugAssign(target, op, value) if type(op) in OPERATORS:
            yield node, f"{text(target)} {OPERATORS[type(op)]}= {text(value)}"
        case ast.Compare(left, [op], [right]) if type(op) in COMPARISONS:
            yield node, f"(({text(left)}) {COMPARISONS[type(op)]} ({text(right)}))"
        case ast.BoolOp(op, values):
            word = " or " if isinstance(op, ast.And) else " and "
            yield node, "(" + word.join(f"({text(each)})" for each in values) + ")"
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield node, f"({text(operand)})"
        case ast.Constant(bool() as value):
            yield node, str(not value)
        case ast.Constant(int() as value):
            yield node, str(value + 1)
        case ast.Constant(float() as value):
            yield node, repr(value * 2 or 1.0)
        case ast.Return(value) if value is not None:
            yield value, "None"
        case ast.If(test) | ast.IfExp(test) | ast.While(test):
            if not isinstance(test, ast.Compare | ast.UnaryOp | ast.BoolOp):
                yield test, f"(not ({text(test)}))"


def seen(node: ast.AST, function: int = 0) -> Iterator[tuple[ast.AST, int]]:
    """The nodes that are run, and the first line of the function that does it."""
    yield node, function
    for name, value in ast.iter_fields(node):
        if name in UNSEEN or isinstance(value, ast.JoinedStr):
            continue
        inside = function
        if name == "body" and isinstance(node, _FUNCTIONS):
            inside = min(
                [node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))]
            )
        for each in value if isinstance(value, list) else [value]:
            # zip's strict=True says what holds anyway; without it nothing else is computed.
            strict = isinstance(each, ast.keyword) and each.arg == "strict"
            unseen = strict or isinstance(each, ast.JoinedStr | ast.Raise)
            if isinstance(each, ast.AST) and not unseen:
                yield from seen(each, inside)


def mutants(file: str) -> list[Mutant]:
    """All mutants of a file."""
    source = (ROOT / "torchnnfs" / file).read_text()
    lines = [0]
    for line in source.encode().splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    found = {}
    for node, function in seen(ast.parse(source)):
        for place, new in changes(node, lambda each: ast.get_source_segment(source, each)):
            start = lines[place.lineno - 1] + place.col_offset
            end = lines[place.end_lineno - 1] + place.end_col_offset
            old = source.encode()[start:end].decode()
            if new != old and "TypeVar" not in old:
                found[start, end, new] = Mutant(file, place.lineno, old, new, start, end, function)
    return list(found.values())


def sample(files: Sequence[str], size: int | None, seed: int) -> list[Mutant]:
    """`size` mutants, of each file the same share; all of them when None."""
    by_file = {file: mutants(file) for file in files}
    total = sum(map(len, by_file.values()))
    share = 1.0 if size is None else min(1.0, size / total)
    chosen = []
    for file, each in by_file.items():
        count = max(1, round(share * len(each)))
        chosen += random.Random(f"{seed} {file}").sample(each, min(count, len(each)))
    return chosen


def copy_tree(place: Path) -> None:
    """What git knows of, in its present state."""
    command = ["git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.run(command, capture_output=True, check=True).stdout.split(b"\0"):
        path = name.decode()
        if path and (ROOT / path).is_file():
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, place / path)


class Watch:
    """Finds out how long each test takes, and which functions of the package it calls."""

    def __init__(self, place: Path) -> None:
        self.package = str(place / "torchnnfs") + "/"
        self.before: set[Any] = set()  # called while the tests are imported
        self.called = self.before
        self.tests: dict[str, dict[str, Any]] = {}
        threading.settrace(self.trace)
        sys.settrace(self.trace)

    def trace(self, frame: Any, event: str, argument: Any) -> None:
        if frame.f_code.co_filename.startswith(self.package):
            self.called.add(frame.f_code)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[Any]:
        self.called = set()
        start = time.monotonic()
        result = yield
        self.tests[item.nodeid] = {"seconds": time.monotonic() - start, "called": self.called}
        return result

    def written(self, path: Path) -> None:
        sys.settrace(None)
        for test in self.tests.values():
            codes = test["called"] | self.before
            test["called"] = [
                [code.co_filename.removeprefix(self.package), code.co_firstlineno] for code in codes
            ]
        path.write_text(json.dumps(self.tests))


class Choice:
    """Runs the given tests alone, in that order, and ends with the first that fails."""

    def __init__(self, names: Sequence[str]) -> None:
        self.order = {name: i for i, name in enumerate(names)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid in self.order]
        items.sort(key=lambda item: self.order[item.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed:
            os._exit(1)

    pytest_collectreport = pytest_runtest_logreport


def run_tests(place: Path, files: Sequence[str], names: Sequence[str] | None) -> None:
    """In a process of its own: the status of pytest is that of the process."""
    os.setsid()
    os.chdir(place)
    sys.path[0] = str(place)
    os.environ.update(PYTHONPATH=str(place), OMP_NUM_THREADS="1")
    # A mutant leaves no compiled file behind, which another could be taken for.
    sys.dont_write_bytecode = names is not None
    torch.set_num_threads(1)
    with open(os.environ.get("MUTLOG", os.devnull), "a") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    plugin = Watch(place) if names is None else Choice(names)
    status = pytest.main(["-q", "-p", "no:cacheprovider", *files], plugins=[plugin])
    if names is None:
        plugin.written(place / "tests.json")
    os._exit(int(status))


def status(
    place: Path, files: Sequence[str], names: Sequence[str] | None, seconds: float | None = None
) -> int | None:
    """The exit status of pytest, or None when it takes longer than `seconds`."""
    # torch is imported once, by this process, from which those of the tests are forked.
    context: Any = multiprocessing.get_context("fork")
    process = context.Process(target=run_tests, args=(place, files, names))
    process.start()
    process.join(seconds)
    late = process.is_alive()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return None if late else process.exitcode


def known(place: Path, files: Sequence[str]) -> Tests:
    """How long the tests of these files take and what they call, the quickest first."""
    if status(place, files, None) != 0:
        raise SystemExit(f"{' '.join(files)}: fails without any change")
    tests = json.loads((place / "tests.json").read_text())
    return dict(sorted(tests.items(), key=lambda each: each[1]["seconds"]))


def outcome(place: Path, mutant: Mutant, tests: Tests) -> str:
    """What became of it: killed, survived or timeout."""
    changed = [mutant.file, mutant.function]
    # All of them if the change is run by the import.
    names = [name for name in tests if not mutant.function or changed in tests[name]["called"]]
    if not names:
        return "survived"
    files = dict.fromkeys(name.split("::")[0] for name in names)
    path = place / "torchnnfs" / mutant.file
    source = path.read_bytes()
    path.write_bytes(source[: mutant.start] + mutant.new.encode() + source[mutant.end :])
    try:
        seconds = 20 + 5 * sum(tests[name]["seconds"] for name in names)
        found = status(place, [*files], names, seconds)
    finally:
        path.write_bytes(source)
    return {None: "timeout", 0: "survived"}.get(found, "killed")


def tried(chosen: Sequence[Mutant], jobs: int, minutes: float) -> Iterator[tuple[Mutant, str]]:
    """What became of each, until the minutes are over."""
    for name in _IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # what is imported need not be looked through in each process
    begun = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="torchnnfs-") as scratch,
        ThreadPoolExecutor(jobs) as pool,
    ):
        places: Queue[Path] = Queue()
        first = Path(scratch) / "0"
        copy_tree(first)
        lists = dict.fromkeys(tuple(TESTS[mutant.file]) for mutant in chosen)
        tests = {files: known(first, files) for files in track(lists, "tests", console=_SHOWN)}
        for i in range(jobs):
            places.put(first if i == 0 else shutil.copytree(first, Path(scratch) / str(i)))

        def one(mutant: Mutant) -> tuple[Mutant, str] | None:
            if time.monotonic() - begun > 60 * minutes:
                return None
            place = places.get()
            try:
                return mutant, outcome(place, mutant, tests[tuple(TESTS[mutant.file])])
            finally:
                places.put(place)

        results = pool.map(one, chosen)
        for told in track(results, "mutants", len(chosen), console=_SHOWN):
            if told is not None:
                yield told


def record(told: Sequence[tuple[Mutant, str]], seed: int, command: str) -> dict[str, Any]:
    """All that was found, and when and how."""
    counts: dict[str, dict[str, int]] = {}
    for file in dict.fromkeys(mutant.file for mutant, _ in told):
        counts[file] = {"mutants": len(mutants(file)), "killed": 0, "survived": 0, "timeout": 0}
    for mutant, result in told:
        counts[mutant.file][result] += 1
    survivors = [mutant.shown for mutant, result in told if result == "survived"]
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "seed": seed,
        "run": len(told),
        "killed": sum(result == "killed" for _, result in told),
        "files": counts,
        "survivors": survivors,
    }


def again(
    document: dict[str, Any], jobs: int, minutes: float, command: str
) -> Iterator[tuple[Mutant, str]]:
    """Tries the survivors of a record again, and changes the record."""
    before = [tuple(each.values()) for each in document["survivors"]]
    found = [mutant for file in document["files"] for mutant in mutants(file)]
    # Of two that look the same on a line the record does not say which survived: both are tried.
    chosen = [mutant for mutant in found if tuple(mutant.shown.values()) in before]
    left = [*chosen]
    for mutant, result in tried(chosen, jobs, minutes):
        if result == "killed":
            left.remove(mutant)
        yield mutant, result
    for file, counts in document["files"].items():
        survived = sum(mutant.file == file for mutant in left)
        counts["killed"] += counts["survived"] - survived
        counts["survived"] = survived
    document["survivors"] = [mutant.shown for mutant in left]
    document["killed"] = sum(counts["killed"] for counts in document["files"].values())
    document["again"] = command


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", nargs="+", choices=TESTS, default=[*TESTS], metavar="FILE")
    parser.add_argument("--sample", type=int, metavar="N", help="how many mutants; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=1e9, metavar="M", help="begin none later")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="how many at a time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--list", action="store_true", help="print the mutants, run none")
    parser.add_argument(
        "--again", type=Path, metavar="FILE", help="try the survivors of that record once more"
    )
    arguments = parser.parse_args(argv)
    command = " ".join(["scripts/mutation.py", *(sys.argv[1:] if argv is None else argv)])
    chosen = sample(arguments.files, arguments.sample, arguments.seed)
    if arguments.list:
        for mutant in chosen:
            print(mutant)
        return 0
    # In a mixed order, so that a run that ends early has seen every file.
    random.Random(arguments.seed).shuffle(chosen)
    document = json.loads(arguments.again.read_text()) if arguments.again else {}
    if arguments.again:
        results = again(document, arguments.jobs, arguments.minutes, command)
    else:
        results = tried(chosen, arguments.jobs, arguments.minutes)
    told = []
    for mutant, result in results:
        told.append((mutant, result))
        if result != "killed":
            print(f"{mutant}: {result}", flush=True)
    document = document or record(told, arguments.seed, command)
    print(f"{document['killed']} of {document['run']} mutants killed")
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
