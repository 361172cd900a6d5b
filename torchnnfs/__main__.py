"""The command line: `torchnnfs compare` and `torchnnfs page`."""

import argparse
import difflib
import importlib
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from itertools import pairwise
from operator import attrgetter
from typing import Any, NoReturn

import numpy as np
import torch
from rich.console import Console
from torch import nn

from torchnnfs._signals import WORDS, handle, stop
from torchnnfs.modules import classifier
from torchnnfs.spiral import spiral
from torchnnfs.testing import html, page, plot
from torchnnfs.testing.batches import in_batches, shown
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
from torchnnfs.testing.models import parameters_of
from torchnnfs.testing.outcome import plain
from torchnnfs.testing.processes import Processes, processes
from torchnnfs.testing.report import show
from torchnnfs.testing.values import leaves
from torchnnfs.version import __version__

AGREES, DISAGREES, USAGE, MISSING, FAULT = 0, 1, 2, 3, 70

_STATUSES = (
    "Exit status: 0 agrees, 1 disagrees, 2 wrong usage or input, 3 a package is missing, 70 an "
    "error of ours or in the model's code, 130 interrupted, 143 terminated."
)

#: What is judged where nothing else is asked for: nothing that loads a compiler or an exporter.
_QUICK = ("eager", "numpy")

#: The options of the book's network and their defaults, and those of a model of one's own.
_BOOK: dict[str, Any] = {"samples": 100, "classes": 3, "hidden": [3], "seed": 0}
_OWN = ("input", "reference", "target")
#: How each report is written.
_REPORTS: dict[str, Callable[[Comparison, str], bytes]] = {
    "json": lambda comparison, name: f"{comparison.to_json()}\n".encode(),
    "markdown": lambda comparison, name: comparison.to_markdown().encode(),
    "html": lambda comparison, name: html.page(comparison).encode(),
    "plot": lambda comparison, name: plot.render(comparison, plot.kind_of(name)),
}
_FLAGS = ("device", "dtype", "candidates", "backward", "no-controls", "golden", "save-golden")
_OPTIONS = [f"--{name}" for name in (*_BOOK, *_OWN, *_REPORTS, *_FLAGS, "debug", "version", "help")]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        typo = re.search(r"(?:invalid choice: '|unrecognized arguments: )([^\s']+)", message)
        known = [*KINDS, *DTYPES, "compare", "page", *_OPTIONS]
        near = difflib.get_close_matches(typo[1], known, 1) if typo else []
        message += f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="torchnnfs",
        description="Neural Networks from Scratch, chapter 4, in PyTorch, proven equal to NumPy.",
    )
    parser.set_defaults(run=lambda *_: parser.print_help())
    parser.add_argument("--version", action="version", version=f"torchnnfs {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    command = commands.add_parser(
        "compare",
        help="judge a model in torch against NumPy, layer by layer",
        description="Judge every layer of a model against NumPy in float64: the book's spiral "
        f"forward pass, or a model of your own. {_STATUSES}",
        epilog="A golden file holds a whole run, so with one the input is not judged in batches: "
        "memory grows with its rows. Take fewer --samples, or a shorter --input.",
    )
    add = command.add_argument
    add("model", nargs="?", metavar="MODULE:MODEL", help="a model of your own, or what makes it")
    own = command.add_argument_group("for a model of your own").add_argument
    own("--input", metavar="FILE", help=".npy: its input; .npz: keyword arguments")
    own("--reference", metavar="MODULE:NAME", help="function, module, dictionary; or a .npy")
    own("--target", metavar="FILE.npy", help="the classes, for --backward")
    book = command.add_argument_group("for the book's network").add_argument
    book("--samples", type=int, help="points on each spiral arm (default: 100)")
    book("--classes", type=int, help="spiral arms, at most 256 (default: 3)")
    book("--hidden", type=int, nargs="+", help="neurons of hidden layers (default: 3)")
    book("--seed", type=int, help="of data and weights (default: 0)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: all of this machine)")
    add("--dtype", nargs="+", choices=DTYPES, help="of torch (default: the model's own)")
    names, words = [*KINDS, "all"], f"{', '.join(KINDS)}, or all (default: {' '.join(_QUICK)})"
    add("--candidates", nargs="+", choices=names, metavar="NAME", default=_QUICK, help=words)
    add("--backward", action="store_true", help="judge the gradients of torch eager as well")
    add("--no-controls", action="store_true", help="do not try deliberately broken copies")
    add("--golden", metavar="FILE.npz", help="judge what another machine gave, too (see below)")
    add("--save-golden", metavar="FILE.npz", help="write what candidates gave here (see below)")
    add("--json", metavar="FILE", help="write the outcome as JSON; - is standard output")
    add("--markdown", metavar="FILE", help="write the report as Markdown; - is standard output")
    add("--html", metavar="FILE", help="write the report as one page with pictures")
    add("--plot", metavar="FILE", help="write the pictures as .png or .svg")
    chapter = commands.add_parser(
        "page",
        help="print chapter 4's page in the book's arithmetic, and what others print",
        description="Print the end of chapter 4 as the book prints it, beside what this machine's "
        "NumPy and float32 torch print, with the digits that differ marked, and why they do. "
        f"{_STATUSES}",
    )
    chapter.add_argument("--device", default="cpu", help="where torch computes (default: cpu)")
    for each, run in ((command, _compare), (chapter, _page)):
        each.add_argument("--debug", action="store_true", help="show where an error comes from")
        each.set_defaults(run=run)
    return parser


def _devices(name: str) -> list[torch.device]:
    here, wanted = devices_here(), (name, f"{name}:0")
    named = [each for each in here if name == "auto" or f"{each.type}:{each.index or 0}" in wanted]
    if not named:
        names = ", ".join(map(str, here))
        raise ValueError(f"--device {name!r} is not on this machine; here are {names}")
    return named


def _spiral(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The arguments of `compare` for the book's network on its data, and what to say of them."""
    samples, classes, hidden, seed = map({**_BOOK, **given}.__getitem__, _BOOK)
    widths = 2, *hidden, classes
    network = f"{' -> '.join(map(str, widths))}: Dense, ReLU, ..., Dense, Softmax"
    try:  # to have its memory, before minutes are spent on drawing it
        _ = [torch.empty(pair) for pair in pairwise(widths)]
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the network {network} cannot be made: {reason}") from None
    if samples >= 1 << 40:  # an array of so many numbers has no address
        raise ValueError(f"--samples expects a number below 2**40, got {samples}")
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"--seed expects a number from 0 to 2**32 - 1, got {seed}")
    stream = np.random.RandomState(seed)
    points, target = spiral(samples, classes, generator=stream, device="cpu")
    model = classifier(*widths, generator=stream, device="cpu")
    facts = {
        "network": network,
        "data": f"spiral, {samples} samples x {classes} classes = {len(points)} rows",
        "seed": f"{seed}, of numpy.random.RandomState: data first, then the layers",
    }
    return {"model": model, "input": points, "target": target}, facts


def _own(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The same for a model of the user's, from a module that Python can import here."""
    name, input = given["model"], given.get("input")
    if input is None:
        raise ValueError(f"{name} needs its input: --input FILE.npy")
    model = _named(name)
    made = not isinstance(model, nn.Module) and callable(model)
    if made:
        needed = [each.name for each in parameters_of(model).values() if each.default is each.empty]
        if needed:
            raise ValueError(
                f"{name} is expected to be a torch.nn.Module or to make one without arguments, but "
                f"needs {', '.join(needed)}; --reference takes functions"
            )
        model = model()
    if not isinstance(model, nn.Module):
        got = type(model).__name__
        raise ValueError(f"{name} is expected to be a torch.nn.Module or to make one, got {got}")
    task = {"model": model, "input": _loaded("input", input)}
    shapes = [f"{tuple(each.shape)} {each.dtype}" for each in leaves(task["input"]).values()]
    facts = {"model": name + "(), made just now" * made, "input": f"{input}: {', '.join(shapes)}"}
    if "target" in given:
        task["target"] = _loaded("target", given["target"])
    if "reference" in given:
        facts["reference"] = reference = given["reference"]
        array = reference.endswith(".npy")
        task["reference"] = _loaded("reference", reference) if array else _named(reference)
    return task, facts


def _named(name: str) -> Any:
    """What ``module:name`` names, imported with the current directory in the path."""
    module, _, path = name.partition(":")
    if not module or not path or module.endswith(".py"):
        raise ValueError(
            f"expected MODULE:NAME, as in mymodule:model, got {name!r}; --reference takes an .npy "
            "file as well, and several arrays as a dictionary in a module"
        )
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found = importlib.import_module(module)
    except Exception as error:
        hint = "; is it in this directory?" if isinstance(error, ModuleNotFoundError) else ""
        kind = type(error).__name__
        raise ValueError(f"{name!r} cannot be imported: {kind}: {error}{hint}") from error
    try:
        return attrgetter(path)(found)
    except AttributeError as error:
        near = difflib.get_close_matches(error.name or path, dir(error.obj), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name!r}: {module} has no {error.name!r}{hint}") from None


def _loaded(option: str, name: str) -> Any:
    """The array of an .npy file as a tensor, or those of an .npz file by their names."""
    try:
        with open(name, "rb") as file:
            content = np.load(file, allow_pickle=False)
            if isinstance(content, np.ndarray):
                return torch.from_numpy(content)
            return {key: torch.from_numpy(content[key]) for key in content.files}
    except Exception as error:  # a broken header fails in NumPy's parser, in many ways
        reason = error if isinstance(error, OSError) else "it is no .npy or .npz file of numbers"
        raise ValueError(f"--{option} {name!r} cannot be read: {reason}") from None


def _candidates(
    arguments: argparse.Namespace, devices: list[torch.device]
) -> tuple[list[Candidate], list[str]]:
    """The candidates, and what was left out and why."""
    dtypes = [DTYPES.get(name) for name in dict.fromkeys(arguments.dtype or [""])]
    every = "all" in arguments.candidates
    chosen, skipped = [], []
    for name in KINDS if every else dict.fromkeys(arguments.candidates):
        try:
            chosen.extend(choose([name], devices, dtypes))
        except (MissingExtraError, ValueError) as error:
            if not every:
                raise
            skipped.append(f"{error}.")
    return chosen, skipped


class _Console(Console):
    def __init__(self) -> None:  # a file or a pipe has no width of its own
        super().__init__(highlight=False, width=None if sys.stdout.isatty() else 120)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would exit with the status of a disagreement


def _page(arguments: argparse.Namespace, group: Processes) -> int:
    if group.rank:
        return AGREES  # the first process prints it; all end as it does
    agrees = page.show(page.compute(_devices(arguments.device)[0]), _Console())
    return AGREES if agrees else DISAGREES


def _show(facts: dict[str, str], comparison: Comparison, skipped: Sequence[str]) -> None:
    console = _Console()
    for name, fact in {**facts, **comparison.environment}.items():
        console.print(f"{name + ':':<26}{plain(fact)}", markup=False)
    first, few = comparison.rows[0], comparison.output[:5]
    shown = few.astype(np.float32) if first.dtype != "float64" else few
    values = np.array2string(shown, max_line_width=100, threshold=50)
    heading = f"first outputs of {first.candidate} on {first.device} in {first.dtype}:"
    console.print(f"\n{heading}\n{values}\n", markup=False)
    for reason in skipped:
        console.print(f"Skipped: {reason}", markup=False, soft_wrap=True)
    show(comparison, console)


def _files(given: dict[str, Any]) -> dict[str, str]:
    """The file that each option writes. Nothing is written twice, and nothing that is read."""
    read = [name for name in ("golden", *_OWN) if name in given]
    places = {os.path.realpath(given[name]): f"--{name}" for name in read}
    places["-"] = "standard output"
    files = {name: given[name] for name in ("save_golden", *_REPORTS) if name in given}
    for name, path in files.items():
        option = f"--{name.replace('_', '-')}"
        place = path if path == "-" else os.path.realpath(path)
        if path == "-" and name in _REPORTS:
            continue
        if place in places:
            raise ValueError(
                "each report and golden file needs a name of its own: "
                f"{option} {path!r} is {places[place]} as well"
            )
        check_writable(option, path)
        places[place] = option
    if "plot" in files:
        plot.kind_of(files["plot"])  # before the work, not after it
    return files


def _compare(arguments: argparse.Namespace, group: Processes) -> int:
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    own = "model" in given
    for option in _BOOK if own else _OWN:
        if option in given:
            fit = f"the book's network; {arguments.model} is another"
            fit = fit if own else "a model of your own: name it, as mymodule:model"
            raise ValueError(f"--{option} is for {fit}")
    devices = _devices(arguments.device)
    files = {} if group.rank else _files(given)
    with shown() as update:
        update(description="making the model and its input")
        task, facts = _own(given) if own else _spiral(given)
        candidates, skipped = _candidates(arguments, devices)
        whole = task["input"]
        if arguments.golden is None and arguments.save_golden is None:  # these are of the whole
            task["input"] = in_batches(whole, group, update)
        shared = task["input"] is not whole
        if group.rank and not shared:
            return AGREES  # the first process judges it; all end as it does
        comparison = compare(
            **task,
            candidates=candidates,
            golden_file=arguments.golden,
            backward=arguments.backward,
            controls=not arguments.no_controls,
            progress=lambda step: update(description=plain(step)),
            group=group.group if shared else None,
        )
    if not group.rank:
        _report(comparison, files, facts, skipped)
    return AGREES if comparison.ok else DISAGREES


def _report(
    comparison: Comparison, files: dict[str, str], facts: dict[str, str], skipped: Sequence[str]
) -> None:
    # Files first: what is printed may go to a reader who stops reading.
    failures, printed = [], []
    for option, name in files.items():
        try:
            if option == "save_golden":
                comparison.save_golden(name)
            elif name == "-":
                printed.append(_REPORTS[option](comparison, name).decode())
            else:
                write_whole(name, _REPORTS[option](comparison, name))
        except Exception as error:  # raised below: what was judged is printed first
            failures.append(error)
    print("".join(printed), end="")
    if not printed:
        _show(facts, comparison, skipped)
    if failures:
        raise failures[0]


def _run(argv: Sequence[str] | None, group: Processes) -> tuple[int, str]:
    """The exit status, and a line where something went wrong."""
    arguments = None
    try:
        arguments = _parser().parse_args(argv)
        status: int = arguments.run(arguments, group) or AGREES
        sys.stdout.flush()
        group.meet()
        return status, ""
    except SystemExit as error:
        if arguments is None:  # --help and --version
            raise
        return USAGE, f"the model's own code stopped with sys.exit({error.code!r})"
    except MissingExtraError as error:
        return MISSING, str(error)
    except Exception as error:
        if arguments and arguments.debug:
            traceback.print_exc()
        if isinstance(error, OSError):  # Python must not write, and fail, once more when it exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # the reader has stopped reading
            return 128 + signal.SIGPIPE, ""
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        ours = str(frame.f_globals.get("__package__")).startswith("torchnnfs")
        # What a machine or a library says of the input, and what our own checks say.
        known = isinstance(error, MemoryError | OSError | RuntimeError)
        if known or (ours and isinstance(error, TypeError | ValueError)):
            return USAGE, str(error)
        advice = "an error in the model's code, or one of ours to report; --debug shows where"
        return FAULT, f"{type(error).__name__}: {error} ({advice})"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    before: dict[signal.Signals, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():  # others may set no handlers
            before = handle(stop)
        with processes() as group:
            status, message = group.agreed(*_run(argv, group))
            if before and group.size > 1:  # once one has ended, torchrun sends this to the others
                before[signal.SIGTERM] = signal.SIG_IGN
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except (RuntimeError, ValueError) as error:  # the processes do not come together
        status, message = USAGE, str(error)
    except KeyboardInterrupt as error:
        number = signal.Signals(*error.args or [signal.SIGINT])
        status, message = 128 + number, WORDS[number]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if message:
        print(plain(f"torchnnfs: {' '.join(message.split())}"), file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
