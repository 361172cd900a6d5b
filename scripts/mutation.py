"""Change the package in one place at a time, and see whether a test notices.

    .venv/bin/python scripts/mutation.py --sample 80 --json results/mutation.json

A mutant is a copy of the package with one change: another operator or comparison, another constant,
a condition turned round, a value that is not returned. It is killed when a test fails among those
that mirror its file; a mutant that survives shows a missing test, or computes the same. The sample
is drawn from all mutants of the files with a seed, the same share of each file. The tests run on
copies: this tree is not changed. --list prints the mutants and runs none.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.progress import track

ROOT = Path(__file__).parents[1]
#: Files of the package, and the tests that mirror them, the quickest first.
TESTS = {
    "modules.py": ["tests/test_modules.py", "tests/compatibility/test_contract.py"],
    "book.py": ["tests/test_book.py"],
    "streams.py": ["tests/test_streams.py", "tests/test_spiral.py"],
    "spiral.py": ["tests/test_spiral.py"],
    "testing/reference.py": ["tests/testing/test_reference.py"],
    "testing/judge.py": ["tests/testing/test_excess.py", "tests/testing/test_comparison.py"],
    "testing/layers/dense.py": ["tests/testing/layers"],
    "testing/layers/normalise.py": ["tests/testing/layers"],
    "testing/layers/pointwise.py": ["tests/testing/layers"],
    "testing/layers/reshape.py": ["tests/testing/layers"],
    "testing/layers/softmax.py": ["tests/testing/layers"],
}
OPERATORS = {ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "/"}
OPERATORS |= {ast.Mod: "*", ast.Pow: "*", ast.BitAnd: "|", ast.BitOr: "&", ast.MatMult: "*"}
COMPARISONS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!="}
COMPARISONS |= {ast.NotEq: "==", ast.Is: "is not", ast.IsNot: "is", ast.In: "not in"}
COMPARISONS |= {ast.NotIn: "in"}
# Not mutated: types and what they are made of, which are never run, and messages.
UNSEEN = {"annotation", "returns", "decorator_list", "type_params", "bases"}


@dataclass(frozen=True)
class Mutant:
    """One change: what stands in a file from one byte to another, and what takes its place."""

    file: str
    line: int
    old: str
    new: str
    start: int
    end: int

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


def seen(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that are run."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in UNSEEN or isinstance(value, ast.JoinedStr):
            continue
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, ast.AST) and not isinstance(each, ast.JoinedStr | ast.Raise):
                yield from seen(each)


def mutants(file: str) -> list[Mutant]:
    """All mutants of a file."""
    source = (ROOT / "torchnnfs" / file).read_text()
    lines = [0]
    for line in source.encode().splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    found = {}
    for node in seen(ast.parse(source)):
        for place, new in changes(node, lambda each: ast.get_source_segment(source, each)):
            start = lines[place.lineno - 1] + place.col_offset
            end = lines[place.end_lineno - 1] + place.end_col_offset
            old = source.encode()[start:end].decode()
            if new != old and "TypeVar" not in old:
                found[start, end, new] = Mutant(file, place.lineno, old, new, start, end)
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


def run_tests(place: Path, tests: Sequence[str]) -> None:
    """In a process of its own: the status of pytest is that of the process."""
    os.setsid()
    os.chdir(place)
    sys.path[0] = str(place)
    os.environ.update(PYTHONPATH=str(place), PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
    sys.dont_write_bytecode = True
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])))


def status(place: Path, tests: Sequence[str], seconds: float | None) -> int | None:
    """The exit status of pytest, or None when it takes longer than `seconds`."""
    # torch is imported once, by this process, from which those of the tests are forked.
    process = multiprocessing.get_context("fork").Process(target=run_tests, args=(place, tests))
    process.start()
    process.join(seconds)
    late = process.is_alive()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return None if late else process.exitcode


def outcome(place: Path, mutant: Mutant, seconds: float) -> str:
    """What became of it: killed, survived or timeout."""
    path = place / "torchnnfs" / mutant.file
    source = path.read_bytes()
    path.write_bytes(source[: mutant.start] + mutant.new.encode() + source[mutant.end :])
    try:
        found = status(place, TESTS[mutant.file], seconds)
    finally:
        path.write_bytes(source)
    return {None: "timeout", 0: "survived"}.get(found, "killed")


def record(told: Sequence[tuple[Mutant, str]], seed: int, command: str) -> dict[str, Any]:
    """All that was found, and when and how."""
    counts: dict[str, dict[str, int]] = {}
    for mutant, result in told:
        blank = {"mutants": len(mutants(mutant.file)), "killed": 0, "survived": 0, "timeout": 0}
        counts.setdefault(mutant.file, blank)[result] += 1
    survivors = [asdict(mutant) for mutant, result in told if result == "survived"]
    names = ("file", "line", "old", "new")
    return {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "seed": seed,
        "run": len(told),
        "killed": sum(result == "killed" for _, result in told),
        "files": counts,
        "survivors": [{name: each[name] for name in names} for each in survivors],
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", nargs="+", choices=TESTS, default=[*TESTS], metavar="FILE")
    parser.add_argument("--sample", type=int, metavar="N", help="how many mutants; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, metavar="M", help="begin no mutant after that")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--list", action="store_true", help="print the mutants, run none")
    arguments = parser.parse_args(argv)
    chosen = sample(arguments.files, arguments.sample, arguments.seed)
    if arguments.list:
        for mutant in chosen:
            print(mutant)
        return 0
    # In a mixed order, so that a run that ends early has seen every file.
    random.Random(arguments.seed).shuffle(chosen)
    told: list[tuple[Mutant, str]] = []
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torchnnfs-") as scratch:
        place = Path(scratch)
        copy_tree(place)
        slowest = {}
        for tests in {tuple(TESTS[file]) for file in arguments.files}:
            start = time.monotonic()
            if status(place, tests, None) != 0:
                print(f"{' '.join(tests)}: fails without any change", file=sys.stderr)
                return 2
            slowest[tests] = 30 + 5 * (time.monotonic() - start)
        for mutant in track(chosen, "mutants", console=Console(stderr=True)):
            if arguments.minutes and time.monotonic() - begun > 60 * arguments.minutes:
                break
            result = outcome(place, mutant, slowest[tuple(TESTS[mutant.file])])
            told.append((mutant, result))
            if result != "killed":
                print(f"{mutant}: {result}", flush=True)
    document = record(
        told, arguments.seed, " ".join(["scripts/mutation.py", *(argv or sys.argv[1:])])
    )
    print(f"{document['killed']} of {document['run']} mutants killed")
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
