"""The command line: `torchnnfs compare` and `torchnnfs page`."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from rich.console import Console

from torchnnfs.modules import classifier
from torchnnfs.spiral import spiral
from torchnnfs.testing import html, plot
from torchnnfs.testing.candidates import (
    DTYPES,
    KINDS,
    Candidate,
    MissingExtraError,
    choose,
    devices_here,
)
from torchnnfs.testing.comparison import Comparison, compare
from torchnnfs.testing.files import check_writable, write_whole
from torchnnfs.testing.page import compute as compute_page
from torchnnfs.testing.page import show as show_page
from torchnnfs.testing.report import show

AGREES, DISAGREES, USAGE, MISSING = 0, 1, 2, 3


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
        "Exit status: 0 agrees, 1 disagrees, 2 wrong usage, 3 a package is missing.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = command.add_argument
    add("--samples", type=_count, default=100, help="points on each spiral arm")
    add("--classes", type=_count, default=3, help="spiral arms, at most 256")
    add("--hidden", type=_count, nargs="+", default=[3], help="neurons of each hidden layer")
    add("--seed", type=_seed, default=0, help="of the NumPy stream behind data and weights")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto is all of this machine")
    add("--dtype", nargs="+", choices=DTYPES, default=["float32"], help="what torch computes in")
    add(
        "--candidates",
        nargs="+",
        choices=KINDS,
        metavar="NAME",
        help=f"who is judged, of {', '.join(KINDS)} (default: all but compiled, as far as their "
        "packages are here)",
    )
    add("--backward", action="store_true", help="judge the gradients of torch eager as well")
    add("--no-controls", action="store_true", help="do not try deliberately broken twins")
    add("--golden", metavar="FILE.npz", help="judge what candidates gave on another machine, too")
    add("--save-golden", metavar="FILE.npz", help="write what the candidates gave here to a file")
    add("--json", metavar="FILE", help="write the outcome as JSON; - is standard output")
    add("--markdown", metavar="FILE", help="write the report as Markdown; - is standard output")
    add("--html", metavar="FILE", help="write the report as one page with pictures")
    add("--plot", metavar="FILE", help="write the pictures as .png or .svg")
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
        raise ValueError(f"--device {name!r} is unknown to torch; here are {names}") from None
    same = [known for known in here if known.type == device.type]
    if device.index is None:
        same = same[:1]
    else:
        same = [known for known in same if (known.index or 0) == device.index]
    if not same:
        raise ValueError(f"--device {name!r} is not on this machine; here are {names}")
    return same


def _check_memory(widths: Sequence[int], rows: int) -> None:
    """A machine that runs out of memory kills the process; better a word before."""
    parameters = sum((n + 1) * m for n, m in itertools.pairwise(widths))
    arrays = 16  # of float64 and of the widest layer's size: both sides, their errors and bounds
    needed = (rows * max(widths) + parameters) * 8 * arrays
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ValueError(
            f"this would need about {needed >> 30} GiB of memory, {there >> 30} are here; take "
            "fewer --samples or narrower --hidden layers"
        )


def _candidates(
    arguments: argparse.Namespace, devices: list[torch.device], dtypes: list[torch.dtype]
) -> tuple[list[Candidate], list[str]]:
    """The candidates, and what was left out and why."""
    if arguments.candidates:
        return choose(arguments.candidates, devices, dtypes), []
    chosen: list[Candidate] = []
    skipped: list[str] = []
    for name in KINDS:
        try:
            if name != "compiled":  # it takes a compiler and its time
                chosen += choose([name], devices, dtypes)
        except (MissingExtraError, ValueError) as error:
            skipped.append(f"{error}.")
    return chosen, skipped


def _kind(name: str) -> str:
    """The kind of picture that a file's name asks for."""
    kind = Path(name).suffix.lower().removeprefix(".")
    if kind not in plot.KINDS:
        raise ValueError(f"--plot {name!r} ends neither in .png nor in .svg")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("plots need matplotlib: pip install 'torchnnfs[plot]'")
    return kind


def _show(
    arguments: argparse.Namespace,
    widths: Sequence[int],
    comparison: Comparison,
    skipped: Sequence[str],
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
    values = np.array2string(comparison.output[:5].astype(np.float32), max_line_width=100)
    first = comparison.rows[0]
    heading = f"first five probabilities, {first.candidate} on {first.device} in {first.dtype}:"
    console.print(f"\n{heading}\n{values}\n", markup=False)
    for reason in skipped:
        console.print(f"Skipped: {reason}", markup=False, soft_wrap=True)
    show(comparison, console)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would exit with the status of a disagreement


def _console() -> Console:
    console = _Console(highlight=False)
    if not console.is_terminal:
        console.width = 120  # a file or a pipe has no width of its own
    return console


def _page(arguments: argparse.Namespace) -> int:
    (device,) = _devices(arguments.device)[:1]
    return AGREES if show_page(compute_page(device), _console()) else DISAGREES


def _compare(arguments: argparse.Namespace) -> int:
    devices = _devices(arguments.device)
    dtypes = [DTYPES[name] for name in dict.fromkeys(arguments.dtype)]
    render: dict[str, Callable[[Comparison], bytes]] = {
        "json": lambda comparison: f"{comparison.to_json()}\n".encode(),
        "markdown": lambda comparison: comparison.to_markdown().encode(),
        "html": lambda comparison: html.page(comparison).encode(),
        "plot": lambda comparison: plot.render(comparison, _kind(arguments.plot)),
    }
    files = {option: vars(arguments)[option] for option in render}
    files = {option: name for option, name in files.items() if name is not None}
    if "plot" in files:
        _kind(arguments.plot)  # before the work, not after it
    written = {**files, "save-golden": arguments.save_golden}
    written = {option: name for option, name in written.items() if name not in ("-", None)}
    if arguments.save_golden == "-" or len({*written.values()}) < len(written):
        raise ValueError("each report and golden file needs a name of its own")
    for option, name in written.items():
        check_writable(f"--{option}", name)
    widths = (2, *arguments.hidden, arguments.classes)
    _check_memory(widths, arguments.samples * arguments.classes)
    candidates, skipped = _candidates(arguments, devices, dtypes)
    # Data first, then the network, as the book draws them.
    stream = np.random.RandomState(arguments.seed)
    points, target = spiral(arguments.samples, arguments.classes, generator=stream, device="cpu")
    model = classifier(*widths, generator=stream, device="cpu")
    with Console(stderr=True).status("") as status:
        comparison = compare(
            model,
            points,
            candidates=candidates,
            golden_file=arguments.golden,
            backward=arguments.backward,
            target=target,
            controls=not arguments.no_controls,
            progress=lambda step: status.update(f"judging: {step}"),
        )
    if arguments.save_golden is not None:
        comparison.save_golden(arguments.save_golden)
    # Files first: what is printed may go to a reader who stops reading.
    failure = None
    for option, name in files.items():
        try:
            if name != "-":
                write_whole(name, render[option](comparison))
        except ValueError as error:
            failure = error
    printed = [option for option, name in files.items() if name == "-"]
    for option in printed:
        print(render[option](comparison).decode(), end="")
    if not printed:
        _show(arguments, widths, comparison, skipped)
    if failure is not None:
        raise failure
    return AGREES if comparison.ok else DISAGREES


def _close_stdout() -> None:
    """Keep Python from writing, and failing, once more when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        status = {"compare": _compare, "page": _page}[arguments.command](arguments)
        sys.stdout.flush()
        return status
    except MissingExtraError as error:
        status, message = MISSING, str(error)
    except BrokenPipeError:  # the reader has stopped reading
        _close_stdout()
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        status, message = 128 + signal.SIGINT, "interrupted"
    except (MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        status, message = USAGE, " ".join(str(error).split())
        if isinstance(error, OSError):
            _close_stdout()
    print(f"torchnnfs {arguments.command}: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
