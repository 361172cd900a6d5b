"""The command line: `torchnnfs compare` and `torchnnfs page`."""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn
from zipfile import BadZipFile

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from torchnnfs.modules import classifier
from torchnnfs.spiral import spiral
from torchnnfs.testing import html, plot
from torchnnfs.testing.batches import in_batches, processes, shown
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
from torchnnfs.testing.models import leaves
from torchnnfs.testing.page import compute as compute_page
from torchnnfs.testing.page import show as show_page
from torchnnfs.testing.report import show
from torchnnfs.version import __version__

AGREES, DISAGREES, USAGE, MISSING, FAULT = 0, 1, 2, 3, 70

#: What is judged where nothing else is asked for: nothing that loads a compiler or an exporter.
_QUICK = ("eager", "numpy")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        typo = re.search(r"(?:invalid choice: '|unrecognized arguments: )([^\s']+)", message)
        if typo:
            known = [*self._option_string_actions, *KINDS, *DTYPES]
            for action in self._actions:
                if isinstance(action, argparse._SubParsersAction):
                    known += action.choices
                    for command in action.choices.values():
                        known += command._option_string_actions
            near = difflib.get_close_matches(typo[1], known, 1)
            message += f"; did you mean {near[0]}?" if near else ""
        self.exit(USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _number(least: int, most: int | None = None) -> Callable[[str], int]:
    def int_(text: str) -> int:
        number = int(text)
        if number < least or (most is not None and number > most):
            wanted = f"at least {least}" if most is None else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {number}")
        return number

    int_.__name__ = "int"  # argparse prints it: "invalid int value"
    return int_


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="torchnnfs",
        description="Neural Networks from Scratch, chapter 4, in PyTorch, proven equal to NumPy.",
    )
    parser.add_argument("--version", action="version", version=f"torchnnfs {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    command = commands.add_parser(
        "compare",
        help="judge a model in torch against NumPy, layer by layer",
        description="Judge every layer of a model against NumPy in float64: the book's spiral "
        "forward pass, or a model of your own. "
        "Exit status: 0 agrees, 1 disagrees, 2 wrong usage, 3 a package is missing, 70 an error in "
        "the model's code or in ours.",
    )
    add = command.add_argument
    add("model", nargs="?", metavar="MODULE:MODEL", help="a model of your own, or what makes it")
    own = command.add_argument_group("for a model of your own")
    own.add_argument("--input", metavar="FILE", help=".npy: its input; .npz: keyword arguments")
    own.add_argument("--reference", metavar="MODULE:NAME", help="what to compare with; or a .npy")
    own.add_argument("--target", metavar="FILE.npy", help="the classes, for --backward")
    book = command.add_argument_group("for the book's network")
    book.add_argument("--samples", type=_number(1), help="points on each spiral arm (100)")
    book.add_argument("--classes", type=_number(1), help="spiral arms, at most 256 (3)")
    book.add_argument("--hidden", type=_number(1), nargs="+", help="neurons of hidden layers (3)")
    book.add_argument("--seed", type=_number(0, 2**32 - 1), help="of data and weights (0)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto (all of this machine)")
    add("--dtype", nargs="+", choices=DTYPES, help="what torch computes in (the model's own)")
    names = f"{', '.join(KINDS)}, or all ({' '.join(_QUICK)})"
    add("--candidates", nargs="+", choices=[*KINDS, "all"], metavar="NAME", help=names)
    add("--backward", action="store_true", help="judge the gradients of torch eager as well")
    add("--no-controls", action="store_true", help="do not try deliberately broken copies")
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
    )
    page.add_argument("--device", default="cpu", help="where torch computes: cpu, cuda, ... (cpu)")
    for each in (command, page):
        each.add_argument("--debug", action="store_true", help="show where an error comes from")
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


@dataclass(frozen=True)
class _Task:
    """What is judged, and what to say of it."""

    model: nn.Module
    input: Any
    target: Tensor | None
    reference: Any
    facts: dict[str, str]


def _spiral(arguments: argparse.Namespace) -> _Task:
    """The book's network on its data. Data first, then the network, as the book draws them."""
    for option in ("input", "reference", "target"):
        if getattr(arguments, option) is not None:
            raise ValueError(f"--{option} is for a model of your own: name it, as mymodule:model")
    samples, classes = arguments.samples or 100, arguments.classes or 3
    widths, rows = (2, *(arguments.hidden or [3]), classes), samples * classes
    stream = np.random.RandomState(arguments.seed or 0)
    points, target = spiral(samples, classes, generator=stream, device="cpu")
    model = classifier(*widths, generator=stream, device="cpu")
    seed = f"{arguments.seed or 0}, of numpy.random.RandomState: data first, then the layers"
    facts = {
        "network": f"{' -> '.join(map(str, widths))}: Dense, ReLU, ..., Dense, Softmax",
        "data": f"spiral, {samples} samples x {classes} classes = {rows} rows",
        "seed": seed,
    }
    return _Task(model, points, target, None, facts)


def _own(arguments: argparse.Namespace) -> _Task:
    """A model of the user's, from a module that Python can import here."""
    for option in ("samples", "classes", "hidden", "seed"):
        if getattr(arguments, option) is not None:
            raise ValueError(f"--{option} is for the book's network; {arguments.model} is another")
    if arguments.input is None:
        raise ValueError(f"{arguments.model} needs its input: --input FILE.npy")
    model = _named(arguments.model)
    if not isinstance(model, nn.Module) and callable(model):
        model = model()
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{arguments.model} is expected to be a torch.nn.Module or to make one, got "
            f"{type(model).__name__}"
        )
    input = _loaded("--input", arguments.input)
    target = None if arguments.target is None else _loaded("--target", arguments.target)
    reference = arguments.reference
    if reference is not None:
        array = reference.endswith(".npy")
        reference = _loaded("--reference", reference) if array else _named(reference)
    shapes = ", ".join(f"{tuple(each.shape)} {each.dtype}" for each in leaves(input).values())
    facts = {"model": arguments.model, "input": f"{arguments.input}: {shapes}"}
    if arguments.reference is not None:
        facts["reference"] = arguments.reference
    return _Task(model, input, target, reference, facts)


def _named(name: str) -> Any:
    """What ``module:name`` names, imported with the current directory in the path."""
    module, _, path = name.partition(":")
    if not module or not path or module.endswith(".py"):
        raise ValueError(f"expected MODULE:NAME, as in mymodule:model, got {name!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"{name!r}: {error}; is it in this directory?") from None
    except Exception as error:
        raise ValueError(f"{name!r} cannot be imported: {type(error).__name__}: {error}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{name!r}: {module} has no {part!r}{hint}")
        found = getattr(found, part)
    return found


def _loaded(option: str, name: str) -> Any:
    """The array of an .npy file as a tensor, or those of an .npz file by their names."""
    try:
        with open(name, "rb") as file:
            content = np.load(file, allow_pickle=False)
            if isinstance(content, np.ndarray):
                return torch.from_numpy(content)
            return {key: torch.from_numpy(content[key]) for key in content.files}
    except (OSError, ValueError, TypeError, EOFError, BadZipFile) as error:
        reason = (
            str(error) if isinstance(error, OSError) else "it is no .npy or .npz file of numbers"
        )
        raise ValueError(f"{option} {name!r} cannot be read: {reason}") from None


def _candidates(
    arguments: argparse.Namespace, devices: list[torch.device]
) -> tuple[list[Candidate], list[str]]:
    """The candidates, and what was left out and why."""
    names = arguments.candidates or list(_QUICK)
    dtypes: list[torch.dtype | None] = [
        DTYPES[name] for name in dict.fromkeys(arguments.dtype or [])
    ]
    dtypes = dtypes or [None]
    if "all" not in names:
        return choose(names, devices, dtypes), []
    chosen: list[Candidate] = []
    skipped: list[str] = []
    for name in KINDS:
        try:
            chosen += choose([name], devices, dtypes)
        except (MissingExtraError, ValueError) as error:
            skipped.append(f"{error}.")
    return chosen, skipped


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


def _show(task: _Task, comparison: Comparison, skipped: Sequence[str]) -> None:
    console = _console()
    for name, fact in {**task.facts, **comparison.environment}.items():
        console.print(f"{name + ':':<26}{fact}", markup=False)
    first, few = comparison.rows[0], comparison.output[:5]
    shown = few.astype(np.float32) if first.dtype != "float64" else few
    values = np.array2string(shown, max_line_width=100, threshold=50)
    heading = f"first outputs of {first.candidate} on {first.device} in {first.dtype}:"
    console.print(f"\n{heading}\n{values}\n", markup=False)
    for reason in skipped:
        console.print(f"Skipped: {reason}", markup=False, soft_wrap=True)
    show(comparison, console)


def _compare(arguments: argparse.Namespace) -> int:
    devices = _devices(arguments.device)
    render: dict[str, Callable[[Comparison], bytes]] = {
        "json": lambda comparison: f"{comparison.to_json()}\n".encode(),
        "markdown": lambda comparison: comparison.to_markdown().encode(),
        "html": lambda comparison: html.page(comparison).encode(),
        "plot": lambda comparison: plot.render(comparison, plot.kind_of(arguments.plot)),
    }
    files = {option: vars(arguments)[option] for option in render}
    files = {option: name for option, name in files.items() if name is not None}
    if "plot" in files:
        plot.kind_of(arguments.plot)  # before the work, not after it
    written = {**files, "save-golden": arguments.save_golden}
    written = {option: name for option, name in written.items() if name not in ("-", None)}
    if arguments.save_golden == "-" or len({*written.values()}) < len(written):
        raise ValueError("each report and golden file needs a name of its own")
    for option, name in written.items():
        check_writable(f"--{option}", name)
    task = _spiral(arguments) if arguments.model is None else _own(arguments)
    candidates, skipped = _candidates(arguments, devices)
    # Golden files and gradients are of the whole.
    whole = arguments.backward or bool(arguments.golden or arguments.save_golden)
    with processes() as group:
        with shown(task.input) as (say, done):
            comparison = compare(
                task.model,
                task.input if whole else in_batches(task.input, group, done),
                reference=task.reference,
                candidates=candidates,
                golden_file=arguments.golden,
                backward=arguments.backward,
                target=task.target,
                controls=not arguments.no_controls,
                progress=say,
                group=group,
            )
        if group is None or group.rank() == 0:
            _report(arguments, task, comparison, skipped, files, render)
    return AGREES if comparison.ok else DISAGREES


def _report(
    arguments: argparse.Namespace,
    task: _Task,
    comparison: Comparison,
    skipped: Sequence[str],
    files: dict[str, str],
    render: dict[str, Callable[[Comparison], bytes]],
) -> None:
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
        _show(task, comparison, skipped)
    if failure is not None:
        raise failure


def _close_stdout() -> None:
    """Keep Python from writing, and failing, once more when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
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
    except SystemExit as error:
        status, message = USAGE, f"the model's own code stopped with sys.exit({error.code!r})"
    except (MemoryError, OSError, RuntimeError, TypeError, ValueError) as error:
        if arguments.debug:
            raise
        status, message = USAGE, " ".join(str(error).split())
        if isinstance(error, OSError):
            _close_stdout()
    except Exception as error:
        if arguments.debug:
            raise
        status, message = FAULT, f"{type(error).__name__}: {error}"
        message += " (an error in the model's code, or one of ours to report; --debug shows where)"
    print(f"torchnnfs {arguments.command}: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
