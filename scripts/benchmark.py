"""Time the chapter's forward pass in everything at hand, in one run, and write the ratios down.

    .venv/bin/python scripts/benchmark.py --json results/speed.json --plot docs/speed.png

Every round times each peer once, in an order that changes, so what disturbs the machine disturbs
all of them; before each a pause and a call that does not count. What is reported is the median over
the rounds with the quartiles, and the median of the ratio within a round. Peers whose package is
missing are left out and named.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

from torchnnfs import Dense, ReLU, Softmax, book_numpy, classifier, fuse, fused, to_torch
from torchnnfs.testing.environment import describe

Call = Callable[[], Any]
OURS = ("fused", "fused, out=")
BOOK = "book's NumPy"


def arrays(model: nn.Module) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weights and biases as the book stores them."""
    dense = [layer for layer in model if isinstance(layer, nn.Linear)]
    return [
        (
            np.ascontiguousarray(each.weight.detach().cpu().numpy().T),
            each.bias.detach().cpu().numpy(),
        )
        for each in dense
    ]


def numpy_forward(layers: list, x: np.ndarray, dot: Callable = np.dot) -> np.ndarray:
    *hidden, last = layers
    for weights, biases in hidden:
        x = np.maximum(0, dot(x, weights) + biases)
    x = dot(x, last[0]) + last[1]
    powers = np.exp(x - np.max(x, axis=1, keepdims=True))
    return powers / np.sum(powers, axis=1, keepdims=True)


def numba_forward(widths: list[int]) -> Callable[..., np.ndarray]:
    """By hand: all layers of a sample in one loop, widths as constants, samples in parallel."""
    import numba

    zero = np.float32(0)
    inputs, classes, layers = widths[0], widths[-1], len(widths) - 1
    second, hidden = widths[1], widths[-2]

    def forward(x, w1, b1, w2, b2, w3, b3):
        output = np.empty((x.shape[0], classes), np.float32)
        for s in numba.prange(x.shape[0]):
            h, g = np.empty(second, np.float32), np.empty(hidden, np.float32)
            for j in range(second):
                total = b1[j]
                for i in range(inputs):
                    total += x[s, i] * w1[i, j]
                h[j] = max(total, zero)
            if layers == 3:
                for j in range(hidden):
                    total = b2[j]
                    for i in range(second):
                        total += h[i] * w2[i, j]
                    g[j] = max(total, zero)
            else:
                for j in range(second):
                    g[j] = h[j]
            y = np.empty(classes, np.float32)
            top = np.float32(-np.inf)
            for j in range(classes):
                total = b3[j]
                for i in range(hidden):
                    total += g[i] * w3[i, j]
                y[j] = total
                top = max(top, total)
            scale = zero
            for j in range(classes):
                y[j] = math.exp(y[j] - top)
                scale += y[j]
            for j in range(classes):
                output[s, j] = y[j] / scale
        return output

    return numba.njit(fastmath=True, parallel=True)(forward)


def on_cpu(model: nn.Sequential, widths: list[int], input: Tensor) -> Iterator[tuple[str, Call]]:
    """The peers that compute on a CPU alone; one that fails to import is passed over."""
    x, layers = input.numpy(), arrays(model)
    with book_numpy():
        book_dot = np.dot
    yield BOOK, lambda: numpy_forward(layers, x, book_dot)
    yield "NumPy float32", lambda: numpy_forward(layers, x)
    if is_here("onnxruntime", "onnxscript"):
        yield "ONNX Runtime", onnx_session(model, input)
    if is_here("jax"):
        import jax

        def forward(x, layers):
            for weights, biases in layers[:-1]:
                x = jax.nn.relu(x @ weights + biases)
            return jax.nn.softmax(x @ layers[-1][0] + layers[-1][1], -1)

        compiled, given = jax.jit(forward), jax.device_put((x, layers))
        yield "JAX", lambda: compiled(*given).block_until_ready()
    if is_here("numba") and len(widths) in (3, 4):
        run = numba_forward(widths)
        first, last = layers[0], layers[-1]
        middle = layers[1] if len(widths) == 4 else first
        flat = [*first, *middle, *last]
        yield "numba", lambda: run(x, *flat)


def is_here(*packages: str) -> bool:
    try:
        for package in packages:
            version(package)
    except PackageNotFoundError:
        return False
    return True


def onnx_session(model: nn.Module, input: Tensor) -> Call:
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    program = torch.onnx.export(
        model,
        (input[:2],),
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
    )
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    given = {session.get_inputs()[0].name: input.numpy()}
    return lambda: session.run(None, given)


def graph(model: nn.Module, input: Tensor) -> Call:
    """Eager torch as a CUDA graph, which replays kernels without the calls."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(input)
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        model(input)
    return captured.replay


def peers(widths: list[int], input: Tensor, wanted: list[str] | None) -> dict[str, Call]:
    """Everything that computes the same network on the same input, compiled and warm."""
    torch.manual_seed(0)
    ours = classifier(*widths, device=input.device)
    eager = to_torch(ours)
    torch._dynamo.reset()
    faster = torch.compile(eager, dynamic=False)
    tuned = torch.compile(to_torch(ours), dynamic=False, mode="max-autotune-no-cudagraphs")
    one_pass = fuse(ours)
    out = torch.empty(*input.shape[:-1], widths[-1], device=input.device)
    source = torch.empty((input.numel() + out.numel()) // 2, device=input.device).normal_()
    target = torch.empty_like(source)
    found: dict[str, Call] = {
        "fused": lambda: one_pass(input),
        "fused, out=": lambda: one_pass(input, out=out),
        "torch eager": lambda: eager(input),
        "torch.compile": lambda: faster(input),
        "torch.compile max-autotune": lambda: tuned(input),
    }
    if wanted:
        found = {name: found[name] for name in found if name in wanted}
    elif input.is_cuda:
        found["CUDA graph of eager"] = graph(eager, input)
    else:
        found.update(on_cpu(eager, widths, input))
    expected = eager(input[:1000]).cpu().numpy()
    for name, call in found.items():
        given = call()
        if given is not None:  # a graph gives nothing back
            first = (given[0] if isinstance(given, list) else given)[:1000]
            got = first.cpu().numpy() if isinstance(first, Tensor) else np.asarray(first)
            if not np.allclose(got, expected, rtol=1e-4, atol=1e-6):  # the same network at all?
                raise SystemExit(f"{name} computes something else")
    found["copy of as many bytes"] = lambda: target.copy_(source)
    return found


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


def measure(calls: dict[str, Call], rounds: int, device: torch.device, step: Call) -> list[dict]:
    """Each peer's time, and how many times the first peer's that is, round by round."""
    order = list(calls)
    once = {name: min(seconds(call, 1, device) for _ in range(3)) for name, call in calls.items()}
    number = {name: max(1, min(1000, round(3e-3 / taken))) for name, taken in once.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            time.sleep(0.005)  # until the threads of the one before no longer wait for work
            calls[name]()
            times[name].append(seconds(calls[name], number[name], device))
        step()
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


def cases(arguments: argparse.Namespace) -> Iterator[tuple[str, int, int, dict[str, Call]]]:
    """Title, samples, bytes that must be moved, and the peers."""
    if arguments.layers:
        for title, modules in layer_pairs().items():
            width = 2 if title.startswith("dense") else 3
            input = torch.randn(300, width)
            calls = {name: (lambda m=m, x=input: m(x)) for name, m in modules.items()}
            yield title, 300, 4 * 300 * (width + 3), calls
        return
    for network in arguments.networks:
        widths = [int(width) for width in network.split("-")]
        for samples in arguments.samples:
            torch.manual_seed(1)
            input = torch.randn(samples, widths[0], device=arguments.device)
            yield (
                " -> ".join(map(str, widths)),
                samples,
                4 * samples * (widths[0] + widths[-1]),
                peers(widths, input, arguments.peers),
            )


def run(arguments: argparse.Namespace) -> list[dict]:
    device = torch.device(arguments.device)
    results = []
    steps = 3 if arguments.layers else len(arguments.networks) * len(arguments.samples)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("compiling", total=steps)
        for title, samples, moved, calls in cases(arguments):
            rounds = arguments.rounds or max(7, min(100, 1_500_000 // max(samples, 1)))
            progress.update(bar, description=f"{title}, {samples:,} samples")
            done = progress.tasks[0].completed
            advance = 1 / rounds
            rows = measure(calls, rounds, device, lambda a=advance: progress.advance(bar, a))
            for row in rows:
                per_second = samples / row["microseconds"] * 1e6
                row |= {
                    "samples_per_second": per_second,
                    "bytes_per_second": moved / row["microseconds"] * 1e6,
                }
                if samples >= 1_000_000:
                    row["peak_bytes"] = peak_bytes(calls[row["peer"]], device)
            case = {"network": title, "samples": samples, "rounds": rounds, "bytes": moved}
            results.append({**case, "peers": rows})
            progress.update(bar, completed=done + 1, description="compiling")
    return results


def best_other(result: dict) -> tuple[str, float] | None:
    """The fastest of all but ours and the copy, and how many times as long as ours it takes."""
    times = {row["peer"]: row["ratio"] for row in result["peers"]}
    others = [name for name in times if name not in OURS and "copy" not in name]
    if OURS[0] not in times or not others:
        return None
    best = min(others, key=times.__getitem__)
    return best, times[best]


def verdict(result: dict) -> str:
    best, times = best_other(result), {row["peer"]: row["ratio"] for row in result["peers"]}
    if best is None:
        return ""
    line = f"fused is {digits(best[1])} times as fast as {best[0]}, the best of the others"
    return line + (f"; {digits(times[BOOK])} times as fast as the {BOOK}" if BOOK in times else "")


def summary(results: list[dict]) -> str:
    """The verdicts as a table in Markdown."""
    lines = [
        "| network | samples | fused, µs | best of the others | times as fast as it "
        "| the same with `out=` | times as fast as the book's NumPy |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        rows = {row["peer"]: row for row in result["peers"]}
        best = best_other(result)
        assert best is not None
        shown = [
            result["network"].replace("->", "→"),
            f"{result['samples']:,}".replace(",", " "),
            digits(rows["fused"]["microseconds"]),
            best[0],
            digits(best[1]),
            digits(best[1] / rows["fused, out="]["ratio"]),
            digits(rows[BOOK]["ratio"]),
        ]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def table(result: dict) -> Table:
    shown = Table(
        title=f"{result['network']}, {result['samples']:,} samples, {result['rounds']} rounds",
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


def plot(results: list[dict], path: Path) -> None:
    """Samples per second over the number of samples, one picture a network."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    networks = list(dict.fromkeys(result["network"] for result in results))
    figure, axes = pyplot.subplots(
        1, len(networks), figsize=(4 * len(networks), 4.5), sharey=True, squeeze=False
    )
    names = [row["peer"] for row in results[0]["peers"] if "copy" not in row["peer"]]
    for axis, network in zip(axes[0], networks, strict=True):
        here = [result for result in results if result["network"] == network]
        for index, name in enumerate(names):
            found = [
                (result["samples"], row["samples_per_second"])
                for result in here
                for row in result["peers"]
                if row["peer"] == name
            ]
            ours = name in OURS
            axis.loglog(
                *zip(*found, strict=True),
                "o-",
                label=name,
                color="black" if ours else f"C{index}",
                linestyle="--" if name == OURS[1] else "-",
                linewidth=2.5 if ours else 1.2,
                markersize=4,
            )
        axis.set_title(network.replace("->", "→"))
        axis.set_xlabel("samples in a batch")
        axis.grid(True, which="major", alpha=0.3)
    axes[0][0].set_ylabel("samples per second")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
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
    parser.add_argument("--rounds", type=int, help="default: by the number of samples, 7 to 100")
    parser.add_argument("--widest", type=int, help="take kernels up to this width, and always")
    parser.add_argument("--layers", action="store_true", help="our layers beside torch's instead")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them there")
    arguments = parser.parse_args()
    if arguments.rounds is not None and arguments.rounds < 2:
        parser.error("--rounds: quartiles need at least 2")
    if arguments.samples is None:
        arguments.samples = [1, 300, 30_000, 3_000_000]
        arguments.samples += [100_000_000] if arguments.device != "cpu" else []
    if arguments.widest:
        fused._WIDEST, fused._HEAVY = arguments.widest, sys.maxsize
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
    with torch.no_grad():
        results = run(arguments)
    if arguments.json:
        document = {
            "command": " ".join(["scripts/benchmark.py", *sys.argv[1:]]),
            "date": datetime.now(UTC).date().isoformat(),
            "environment": environment(arguments.device),
            "results": results,
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    if arguments.plot:
        plot(results, arguments.plot)
    console = Console(width=None if Console().is_terminal else 120)
    for result in results:
        console.print(table(result))


if __name__ == "__main__":
    main()
