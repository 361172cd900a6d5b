#!/usr/bin/env python
"""Fuzz the command line and golden files: each run ends as documented.

Half of the runs take a random command line, half a golden file that is damaged in its structure:
entries missing, of another kind or shape, not finite, pickled, cut, with other checksums, with
control characters in names, with sizes that are not true. A run may agree (0), disagree (1), or
refuse with one line (2); for a golden file that line names it. It shows no traceback, sends no
control character to the terminal, and leaves no temporary file.

    .venv/bin/python scripts/fuzz.py --runs 1000 --seed 0
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import sys
import tempfile
import warnings
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np

from torchnnfs.__main__ import main as run

QUICK = ["compare", "--device", "cpu", "--candidates", "eager", "--no-controls", "--samples", "5"]
#: What a value in a golden file, or an argument on the command line, becomes.
VALUES = [None, True, -1, 1e999, 10**30, "", "a" * 999, "\x1b[31m", "a\nb", "|<b>", [], [[]], {}]
VALUES += [{"array": "about"}, {"array": 3}, {"dict": [["a"]]}, {"dict": 5}, "eager", "float16"]
ARGUMENTS = ["", "-", "--", "0", "1", "2", "-1", "x", "nan", "999999999999", "\x1b[31m", "a\nb"]
ARGUMENTS += ["/nowhere/x", ".", "/dev/null", "golden.npz", "./golden.npz", "link.npz", "compare"]
ARGUMENTS += ["page", "math:pi", "torch:nn.ReLU", "eager", "numpy", "float64", "float16", "cpu"]
ARGUMENTS += ["meta", "cuda:7", "--samples", "--classes", "--hidden", "--seed", "--device"]
ARGUMENTS += ["--dtype", "--candidates", "--backward", "--no-controls", "--golden", "--input"]
ARGUMENTS += ["--save-golden", "--json", "--markdown", "--plot", "--reference", "--target", "--sed"]


def places(value, path=()):
    """The way to each entry of nested lists and dictionaries."""
    entries = []
    if isinstance(value, dict):
        entries = list(value.items())
    elif isinstance(value, list):
        entries = list(enumerate(value))
    for key, entry in entries:
        yield (*path, key)
        yield from places(entry, (*path, key))


def change_entry(chance, about, arrays):
    """Take out an entry of what describes the runs, or put another value there."""
    *way, last = chance.choice(list(places(about)))
    inner = about
    for key in way:
        inner = inner[key]
    if chance.random() < 0.4:
        del inner[last]
    elif isinstance(inner, dict) and chance.random() < 0.2:
        inner["\x1b[2J" + str(last)] = inner.pop(last)
    else:
        inner[last] = chance.choice(VALUES)


def change_array(chance, about, arrays):
    """Take out an array, or give it other numbers, another shape or kind."""
    key = chance.choice(list(arrays))
    array = arrays.pop(key)
    changed = [
        lambda: array.astype(object),
        lambda: array.astype("U9"),
        lambda: array.astype(complex),
        lambda: array.astype("i8"),
        lambda: array.T[None],
        lambda: np.atleast_1d(array)[:1],
        lambda: np.zeros((0, 3)),
        lambda: np.full_like(array, np.nan),
        lambda: np.full_like(array, -np.inf),
        lambda: np.array(5.0),
    ]
    if chance.random() < 0.8:
        arrays[key] = chance.choice(changed)()
    elif chance.random() < 0.5:
        arrays[f"{key}\n\x1b[31m"] = array


def header(shape, kind):
    """The head of an array that declares this shape and kind, whatever follows."""
    file = io.BytesIO()
    head = {"descr": kind, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, head)
    return file.getvalue()


def damaged(chance, whole):
    """The bytes of a golden file with something wrong in its structure."""
    kind = chance.randrange(10)
    if kind == 0:
        return whole[: chance.randrange(len(whole))]
    if kind == 1:
        place = chance.randrange(len(whole))
        return whole[:place] + bytes([chance.randrange(256)]) + whole[place + 1 :]
    if kind == 2:  # another checksum or size in the directory
        place = whole.index(b"PK\x01\x02") + chance.randrange(16, 28)
        return whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1 :]
    with np.load(io.BytesIO(whole)) as file:
        arrays = dict(file)
    about = json.loads(arrays.pop("about").tobytes())
    for _ in range(chance.choice([1, 1, 1, 3])):
        (change_entry if kind < 7 and places(about) else change_array)(chance, about, arrays)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        described = np.frombuffer(json.dumps(about).encode(), "u1")
        np.savez(buffer, **arrays, about=described)
    if kind == 9:
        shape = chance.choice([(1 << 40,), (1 << 62, 1 << 62), (-1,), (0, 1 << 62), (1 << 28,)])
        with warnings.catch_warnings(), zipfile.ZipFile(buffer, "a", 8) as file:
            warnings.simplefilter("ignore")
            content = header(shape, chance.choice(["<f4", "<f8", "|O", "|V0", "<U0"]))
            file.writestr(chance.choice(["input.npy", "array 9.npy", "more.npy"]), content)
    return buffer.getvalue()


def outcome(arguments):
    """Exit status, and what was printed to standard output and to standard error."""
    out, err = io.StringIO(), io.StringIO()
    out.fileno = lambda: os.open(os.devnull, os.O_WRONLY)  # a stand-in for what main() redirects
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = run(arguments)
        except SystemExit as error:
            status = error.code
    return status, out.getvalue(), err.getvalue()


def fault(status, out, err, name=None):
    """What is wrong with the end of a run; nothing where it is as documented."""
    if status not in (0, 1, 2):
        return f"status {status}"
    if status == 2 and (err.count("\n") != 1 or (name and name not in err)):
        return "not one line that says what"
    if any(not char.isprintable() and char != "\n" for char in out + err):
        return "a control character"
    return ""


def fuzz(runs, seed, report=lambda done, ends: None):
    """How many runs ended with each status, and the faults, each with its arguments."""
    chance, ends, faults = random.Random(seed), Counter(), []
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as directory:
        try:
            os.chdir(directory)
            assert outcome([*QUICK, "--save-golden", "whole.npz"])[0] == 0
            whole = Path("whole.npz").read_bytes()
            for done in range(1, runs + 1):
                Path("golden.npz").write_bytes(damaged(chance, whole) if done % 2 else whole)
                if not Path("link.npz").is_symlink():
                    Path("link.npz").symlink_to("golden.npz")
                if done % 2:
                    arguments, name = [*QUICK, "--golden", "golden.npz"], "golden.npz"
                else:
                    words = chance.choices(ARGUMENTS, k=chance.randrange(6))
                    arguments, name = [*chance.choice([QUICK, QUICK, []]), *words], None
                *end, err = outcome(arguments)
                ends[end[0]] += 1
                wrong = fault(*end, err, name)
                if any(each.name.endswith(".part") for each in Path().iterdir()):
                    wrong = "a temporary file is left"
                if wrong:
                    faults.append((done, wrong, arguments, err))
                report(done, ends)
        finally:
            os.chdir(before)
    return ends, faults


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000, help="default: 1000")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    asked = parser.parse_args()

    def report(done, ends):
        if sys.stderr.isatty() or done % 100 == 0:
            print(f"\r{done} of {asked.runs}", end="", file=sys.stderr, flush=True)

    ends, faults = fuzz(asked.runs, asked.seed, report)
    print(file=sys.stderr)
    for number, wrong, arguments, err in faults:
        print(f"run {number}: {wrong}: {arguments!r}\n{err!r}")
    counts = ", ".join(f"status {status}: {count}" for status, count in sorted(ends.items()))
    print(f"{asked.runs} runs with seed {asked.seed}: {counts}; {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
