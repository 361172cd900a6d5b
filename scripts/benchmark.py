"""Time the chapter's forward pass in everything at hand, in one run, and write the ratios down.

    .venv/bin/python scripts/benchmark.py --json results/speed.json --plot docs/speed.png

Every round times each peer once, in an order that changes, so what disturbs the machine disturbs
all of them. Before each there is a pause, and calls that do not count. What is reported is the
median over the rounds with the quartiles, and the median of the ratio within a round. Peers whose
package is missing are left out and named.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from peers import BOOK, COPY, Call, is_here, peers, training_peers

from torchnnfs import Dense, ReLU, Softmax, kernel
from torchnnfs.testing.environment import describe

#: What is ours in each table; the first is what all others are divided by.
OURS = {
    "forward": ("fused", "fused, out="),
    "training": ("fused.cross_entropy", "fused"),
    "layers": (),
}
#: Where half of the rounds give ratios as far apart as this part of their median, none is believed.
BUSY = 1.0
#: Seconds before each peer without work: OpenBLAS's threads, which NumPy uses, wait for more work
#: about 30 ms long, and take the processors from whoever comes next.
PAUSE = 0.05
#: Seconds of calls that do not count: behind a pause the threads of OpenMP may start on one
#: processor, and the system takes 4 ms to tell them apart.
WARM = 0.01


def seconds(call: Call, number: int, device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(number):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / number


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """What a call needs at most, above what was there; None where the system does not tell."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not os.access(reset, os.W_OK):
        return None

    def read() -> int:
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    reset.write_text("5")
    before = read()
    call()
    return read() - before


def spread(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return low, middle, high


def measure(calls: dict[str, Call], rounds: int, device: torch.device) -> list[dict]:
    """Each peer's time, and how many times the first peer's that is, round by round."""
    order = list(calls)
    once = {name: min(seconds(call, 1, device) for _ in range(3)) for name, call in calls.items()}
    number = {name: max(1, min(1000, round(3e-3 / taken))) for name, taken in once.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            time.sleep(PAUSE)
            start = time.perf_counter()
            while time.perf_counter() < start + WARM:
                seconds(calls[name], 1, device)
            times[name].append(seconds(calls[name], number[name], device))
    first = next(iter(calls))
    rows = []
    for name, taken in times.items():
        low, middle, high = spread(taken)
        ratios = spread([a / b for a, b in zip(taken, times[first], strict=True)])
        rows.append(
            {
                "peer": name,
                "microseconds": middle * 1e6,
                "quartiles": [low * 1e6, high * 1e6],
                "ratio": ratios[1],
                "ratio_quartiles": [ratios[0], ratios[2]],
            }
        )
    return rows


def unrest(rows: list[dict]) -> float:
    """How far apart the quartiles of the middle peer's ratio are, as a part of its median."""
    return statistics.median(
        (row["ratio_quartiles"][1] - row["ratio_quartiles"][0]) / row["ratio"] for row in rows[1:]
    )


def layer_pairs() -> dict[str, dict[str, nn.Module]]:
    """Our layers and torch's own, with the same parameters."""
    linear = nn.Linear(2, 3)
    dense = Dense(2, 3)
    dense.load_state_dict(linear.state_dict())
    return {
        "dense 2 -> 3": {"torch.nn.Linear": linear, "torchnnfs.Dense": dense},
        "relu": {"torch.nn.ReLU": nn.ReLU(), "torchnnfs.ReLU": ReLU()},
        "softmax": {"torch.nn.Softmax": nn.Softmax(-1), "torchnnfs.Softmax": Softmax()},
    }


def cases(arguments: argparse.Namespace) -> Iterator[tuple[str, str, int, int, dict[str, Call]]]:
    """Table, title, samples, bytes that must be moved, and the peers."""
    if arguments.layers:
        for title, modules in layer_pairs().items():
            width = 2 if title.startswith("dense") else 3
            input = torch.randn(300, width)
            calls = {name: (lambda m=m, x=input: m(x)) for name, m in modules.items()}
            yield "layers", title, 300, 4 * 300 * (width + 3), calls
        return
    for kind, make in (("forward", peers), ("training", training_peers)):
        for network in arguments.networks if kind in arguments.tables else ():
            widths = [int(width) for width in network.split("-")]
            for samples in arguments.samples:
                torch.manual_seed(1)
                input = torch.randn(samples, widths[0], device=arguments.device)
                moved = 4 * samples * (widths[0] + widths[-1])
                with torch.set_grad_enabled(kind == "training"):
                    calls = make(widths, input, arguments.peers)
                yield kind, " -> ".join(map(str, widths)), samples, moved, calls


def run(arguments: argparse.Namespace) -> Iterator[dict]:
    device = torch.device(arguments.device)
    for kind, title, samples, moved, calls in cases(arguments):
        rounds = arguments.rounds or max(7, min(40, 1_500_000 // max(samples, 1)))
        with torch.set_grad_enabled(kind == "training"):
            tries = [measure(calls, rounds, device)]
            while unrest(tries[-1]) > BUSY and len(tries) < 3:  # the rush may be over
                tries.append(measure(calls, rounds, device))
            rows = min(tries, key=unrest)
            for row in rows:
                row["samples_per_second"] = samples / row["microseconds"] * 1e6
                row["bytes_per_second"] = moved / row["microseconds"] * 1e6
                if samples >= 1_000_000:
                    row["peak_bytes"] = peak_bytes(calls[row["peer"]], device)
        case = {"table": kind, "network": title, "samples": samples, "rounds": rounds}
        yield {**case, "tries": len(tries), "bytes": moved, "unrest": unrest(rows), "peers": rows}


def best_other(result: dict) -> tuple[str, float] | None:
    """The fastest of all but ours and the copy, and how many times as long as ours it takes."""
    times = {row["peer"]: row["ratio"] for row in result["peers"]}
    ours = OURS[result["table"]]
    others = [name for name in times if name not in (*ours, COPY)]
    if not ours or ours[0] not in times or not others:
        return None
    best = min(others, key=times.__getitem__)
    return best, times[best]


def verdict(result: dict) -> str:
    if result["unrest"] > BUSY:
        return (
            f"The machine is too busy: half of the ratios differ by {result['unrest']:.0%} or more."
            " No ratio of this can be believed; run it again when nothing else runs."
        )
    best, times = best_other(result), {row["peer"]: row["ratio"] for row in result["peers"]}
    if best is None:
        return ""
    first = OURS[result["table"]][0]
    line = f"{first} is {digits(best[1])} times as fast as {best[0]}, the best of the others"
    books = [name for name in times if name.startswith(BOOK)]
    return line + "".join(f"; {digits(times[name])} times as fast as the {name}" for name in books)


def summary(results: list[dict], kind: str) -> str:
    """One table of the record, in Markdown, as docs/speed.md has it."""
    first, second = OURS[kind]
    lines = [
        f"| network | samples | {first}, µs | best of the others | times as fast as it "
        f"| the same of `{second}` | times as fast as the book's NumPy |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        if result["table"] != kind:
            continue
        rows = {row["peer"]: row for row in result["peers"]}
        best = best_other(result)
        assert best is not None
        book = next(row["ratio"] for name, row in rows.items() if name.startswith(BOOK))
        ratios = [best[1], best[1] / rows[second]["ratio"], book]
        busy = result["unrest"] > BUSY
        shown = [
            result["network"].replace("->", "→"),
            f"{result['samples']:,}".replace(",", " "),
            digits(rows[first]["microseconds"]),
            best[0],
            *("too busy" if busy else digits(ratio) for ratio in ratios),
        ]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def filled(text: str, results: list[dict]) -> str:
    """A document with the tables of the record between its marks."""
    for kind in ("forward", "training"):
        before, mark, rest = text.partition(f"<!-- {kind} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        text = f"{before}{mark}{summary(results, kind)}\n{end}{after}"
    return text


def table(result: dict) -> Table:
    shown = Table(
        title=f"{result['table']}: {result['network']}, {result['samples']:,} samples, "
        f"{result['rounds']} rounds",
        title_justify="left",
        caption=verdict(result),
        caption_justify="left",
    )
    headings = ["peer", "µs", "quartiles", "ratio", "quartiles", "samples/s", "GB/s", "peak MB"]
    for heading in headings:
        shown.add_column(heading, no_wrap=True, justify="left" if heading == "peer" else "right")
    for row in sorted(result["peers"], key=lambda row: row["microseconds"]):
        peak = row.get("peak_bytes")
        shown.add_row(
            row["peer"],
            digits(row["microseconds"]),
            " - ".join(map(digits, row["quartiles"])),
            digits(row["ratio"]),
            " - ".join(map(digits, row["ratio_quartiles"])),
            f"{row['samples_per_second']:.3g}",
            digits(row["bytes_per_second"] / 1e9),
            "" if peak is None else f"{peak / 1e6:,.0f}",
        )
    return shown


def digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def plot(results: list[dict], path: Path, caption: str) -> None:
    """How long a forward pass takes over the number of samples, one picture a network."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    results = [result for result in results if best_other(result) and result["table"] == "forward"]
    if not results:
        return
    networks = list(dict.fromkeys(result["network"] for result in results))
    figure, axes = pyplot.subplots(
        1, len(networks), figsize=(4 * len(networks), 4.5), sharey=True, squeeze=False
    )
    lines: dict[str, list[tuple[int, float]]]
    for axis, network in zip(axes[0], networks, strict=True):
        lines = {"the book's NumPy": [], "torch eager": [], "best of the others": [], "fused": []}
        for result in results:
            if result["network"] != network:
                continue
            times = {row["peer"]: row["microseconds"] for row in result["peers"]}
            best = best_other(result)[0]
            book = next((name for name in times if name.startswith(BOOK)), None)
            shown = [book, "torch eager", best, OURS["forward"][0]]
            for line, name in zip(lines.values(), shown, strict=True):
                if name in times:
                    line.append((result["samples"], times[name]))
        for (label, line), colour in zip(lines.items(), ("C1", "C0", "0.45", "k"), strict=True):
            x, y = zip(*line, strict=True) if line else ((), ())
            wide = 3 if label == "fused" else 1.8
            axis.loglog(x, y, "o-", label=label, color=colour, linewidth=wide, markersize=5)
        axis.set_title(network.replace("->", "→"))
        axis.set_xlabel("samples in a batch")
        axis.grid(True, which="major", alpha=0.3)
    axes[0][0].set_ylabel("microseconds a call, median")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(f"Forward pass, less is faster; both axes are logarithmic. {caption}", size=10)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=110)


def environment(device: str) -> dict[str, str]:
    """What `compare` says of a run, the processor, and the peers' versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    packages = ("onnxruntime", "jax", "numba")
    return {
        **describe([device]),
        "processor": f"{model or platform.processor()}, {os.cpu_count()} cores",
        "system": platform.platform(terse=True),
        **{package: version(package) for package in packages if is_here(package)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, nargs="+", metavar="N")
    parser.add_argument(
        "--networks", nargs="+", default=["2-3-3", "2-16-3", "2-64-3", "2-64-64-3"], metavar="W-W-W"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--peers", nargs="+", metavar="NAME", help="only these of torch's and ours")
    parser.add_argument("--rounds", type=int, help="default: by the number of samples, 7 to 40")
    parser.add_argument("--tables", nargs="+", choices=["forward", "training"], metavar="TABLE")
    parser.add_argument("--widest", type=int, help="take kernels up to this width, and always")
    parser.add_argument("--layers", action="store_true", help="our layers beside torch's instead")
    parser.add_argument("--again", action="store_true", help="measure nothing, read --json instead")
    parser.add_argument("--docs", type=Path, metavar="FILE", help="put the tables there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them there")
    arguments = parser.parse_args()
    if arguments.rounds is not None and arguments.rounds < 2:
        parser.error("--rounds: quartiles need at least 2")
    if arguments.samples is None:
        arguments.samples = [1, 300, 30_000, 3_000_000]
        arguments.samples += [100_000_000] if arguments.device != "cpu" else []
    arguments.tables = arguments.tables or ["forward", "training"]
    if arguments.widest:
        kernel.WIDEST = arguments.widest
        kernel.HEAVY = sys.maxsize
    for path in (arguments.json, arguments.plot):
        if path is not None and not path.parent.is_dir():
            parser.error(f"there is no directory {str(path.parent)!r}")
    warnings.simplefilter("ignore")

    packages = {"numba": ("numba",), "JAX": ("jax",), "ONNX Runtime": ("onnxruntime", "onnxscript")}
    absent = [name for name, needed in packages.items() if not is_here(*needed)]
    if absent and arguments.device == "cpu" and not (arguments.layers or arguments.peers):
        print(
            f"Left out: {', '.join(absent)}. To install all peers: "
            ".venv/bin/pip install -c constraints.txt --group benchmark",
            file=sys.stderr,
        )
    console = Console(width=None if Console().is_terminal else 120)
    document: dict = {
        "command": " ".join(["scripts/benchmark.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "environment": environment(arguments.device),
        "results": [],
    }
    if arguments.again:
        document = json.loads(arguments.json.read_text())
    results: list[dict] = document["results"]
    for result in () if arguments.again else run(arguments):
        results.append(result)
        console.print(table(result))
        if arguments.json:
            partial = arguments.json.with_suffix(".partial")
            partial.write_text(json.dumps(document, indent=2) + "\n")
            partial.replace(arguments.json)  # so that the file is whole at any time
    if arguments.plot:
        machine, date = document["environment"]["processor"], document["date"]
        plot(results, arguments.plot, f"{machine}, {date}")
    if arguments.docs:
        arguments.docs.write_text(filled(arguments.docs.read_text(), results))


if __name__ == "__main__":
    main()
