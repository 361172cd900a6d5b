"""The command line: `torchnnfs compare` and `torchnnfs page`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from torchnnfs.modules import classifier
from torchnnfs.spiral import spiral
from torchnnfs.testing.candidates import DTYPES, choose, devices_here
from torchnnfs.testing.comparison import Comparison, compare
from torchnnfs.testing.page import compute as compute_page
from torchnnfs.testing.page import show as show_page
from torchnnfs.testing.report import show

AGREES, DISAGREES, USAGE = 0, 1, 2


class _UsageError(Exception):
    """What the user can mend, in one line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def _seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"expected 0 to 2**32 - 1, got {number}")
    return number


# argparse names the type by the function's name: "invalid int value".
_count.__name__ = _seed.__name__ = "int"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="torchnnfs", description="Neural Networks from Scratch, chapter 4.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    command = commands.add_parser(
        "compare",
        help="judge the spiral forward pass in torch against NumPy, layer by layer",
        description="Compute the book's spiral forward pass with torch and with the book's NumPy, "
        "and judge every layer against NumPy in float64. "
        "Exit status: 0 agrees, 1 disagrees, 2 wrong usage.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = command.add_argument
    add("--samples", type=_count, default=100, help="points on each spiral arm")
    add("--classes", type=_count, default=3, help="spiral arms, at most 256")
    add("--hidden", type=_count, nargs="+", default=[3], help="neurons of each hidden layer")
    add("--seed", type=_seed, default=0, help="of the NumPy stream behind data and weights")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto is all of this machine")
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="what torch computes in")
    add("--json", metavar="FILE", help="write the outcome as JSON; - is standard output")
    page = commands.add_parser(
        "page",
        help="print chapter 4's page in the book's arithmetic, and what others print",
        description="Print the end of chapter 4 as the book prints it, beside what this machine's "
        "NumPy and float32 torch print, with the digits that differ marked, and why they do. "
        "Exit status: 0 the page is right, 1 it is not, 2 wrong usage.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    page.add_argument("--device", default="cpu", help="where torch computes: cpu, cuda, ...")
    return parser


def _devices(name: str) -> list[torch.device]:
    here = devices_here()
    names = ", ".join(str(device) for device in here)
    if name == "auto":
        return here
    try:
        device = torch.device(name)
    except RuntimeError:
        raise _UsageError(f"--device {name} is unknown to torch; here are {names}") from None
    same = [known for known in here if known.type == device.type]
    if device.index is None:
        same = same[:1]
    else:
        same = [known for known in same if (known.index or 0) == device.index]
    if not same:
        raise _UsageError(f"--device {name} is not on this machine; here are {names}")
    return same


def _check_memory(arguments: argparse.Namespace) -> None:
    """A machine that runs out of memory kills the process; better a word before."""
    widest = max(*arguments.hidden, arguments.classes)
    arrays = 16  # of float64 and of that width at the most: both sides, their errors and bounds
    needed = arguments.samples * arguments.classes * widest * 8 * arrays
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise _UsageError(
            f"this would need about {needed / 2**30:.0f} GiB of memory, {there / 2**30:.0f} are "
            "here; take fewer --samples or narrower --hidden layers"
        )


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise _UsageError(f"--json {path} is a directory; name a file in it")
    if not path.parent.is_dir():
        raise _UsageError(f"--json {path}: there is no directory {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise _UsageError(f"--json {path} cannot be written")


def _write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all; what is no regular file (a pipe) is written to."""
    try:
        if path.exists() and not path.is_file():
            path.write_text(text, encoding="utf-8")
            return
        path = path.resolve()
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            part.write_text(text, encoding="utf-8")
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise _UsageError(f"{path} cannot be written: {error.strerror}") from None


def _show(
    arguments: argparse.Namespace, widths: Sequence[int], comparison: Comparison, output: Tensor
) -> None:
    console = _console()
    rows = arguments.samples * arguments.classes
    facts = {
        "network": f"{' -> '.join(map(str, widths))}: Dense, ReLU, ..., Dense, Softmax",
        "data": f"spiral, {arguments.samples} samples x {arguments.classes} classes = {rows} rows",
        "seed": f"{arguments.seed}, of numpy.random.RandomState: data first, then the layers",
        **comparison.environment,
    }
    for name, fact in facts.items():
        console.print(f"{name + ':':<26}{fact}", markup=False)
    values = np.array2string(output.cpu().double().numpy().astype(np.float32), max_line_width=100)
    first = comparison.rows[0]
    heading = f"first five probabilities, {first.candidate} on {first.device} in {first.dtype}:"
    console.print(f"\n{heading}\n{values}\n", markup=False)
    show(comparison, console)


def _console() -> Console:
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # a file or a pipe has no width of its own
    return console


def _page(arguments: argparse.Namespace) -> int:
    (device,) = _devices(arguments.device)[:1]
    return AGREES if show_page(compute_page(device), _console()) else DISAGREES


def _compare(arguments: argparse.Namespace) -> int:
    devices = _devices(arguments.device)
    to_stdout = arguments.json == "-"
    if arguments.json and not to_stdout:
        _check_writable(Path(arguments.json))
    _check_memory(arguments)
    # Data first, then the network, as the book draws them.
    stream = np.random.RandomState(arguments.seed)
    points, _ = spiral(arguments.samples, arguments.classes, generator=stream, device="cpu")
    widths = (2, *arguments.hidden, arguments.classes)
    model = classifier(*widths, generator=stream, device="cpu")
    dtypes = [DTYPES[name] for name in dict.fromkeys(arguments.dtype)]
    candidates = choose(devices=devices, dtypes=dtypes)
    comparison = compare(model, points, candidates=candidates)
    if to_stdout:
        print(comparison.to_json())
    else:
        first = candidates[0]
        with torch.no_grad():
            output = model.to(first.device, first.dtype)(points[:5].to(first.device, first.dtype))
        _show(arguments, widths, comparison, output)
    if arguments.json and not to_stdout:
        _write_whole(Path(arguments.json), comparison.to_json() + "\n")
    return AGREES if comparison.ok else DISAGREES


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        return {"compare": _compare, "page": _page}[arguments.command](arguments)
    except (_UsageError, MemoryError, TypeError, ValueError, torch.OutOfMemoryError) as error:
        print(f"torchnnfs {arguments.command}: {error}", file=sys.stderr)
        return USAGE


if __name__ == "__main__":
    sys.exit(main())
