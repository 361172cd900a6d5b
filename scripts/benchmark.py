"""Time our modules beside torch's own, in one run, and write the ratios down.

    .venv/bin/python scripts/benchmark.py --json results/dense.json

Every round times each peer once, in an order that changes, so what disturbs the machine disturbs
all of them. What is reported is the median over the rounds, with the quartiles, and the median of
the ratio within a round.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from torchnnfs import Dense, ReLU, Softmax
from torchnnfs.testing.environment import describe

Peers = dict[str, Callable[[Tensor], Tensor]]


def pairs() -> dict[str, Peers]:
    """Our layers and torch's own, with the same parameters."""
    linear = nn.Linear(2, 3)
    dense = Dense(2, 3)
    dense.load_state_dict(linear.state_dict())
    return {
        "dense 2 -> 3": {"torch.nn.Linear": linear, "torchnnfs.Dense": dense},
        "relu": {"torch.nn.ReLU": nn.ReLU(), "torchnnfs.ReLU": ReLU()},
        "softmax": {"torch.nn.Softmax": nn.Softmax(-1), "torchnnfs.Softmax": Softmax()},
    }


def seconds(call: Callable[[Tensor], Tensor], input: Tensor, number: int) -> float:
    start = time.perf_counter()
    for _ in range(number):
        call(input)
    return (time.perf_counter() - start) / number


def measure(peers: Peers, input: Tensor, rounds: int, title: str) -> dict[str, dict]:
    """Median and quartiles in microseconds, and the ratio to the first peer round by round."""
    order = list(peers)
    shuffle = random.Random(0).shuffle
    once = max(seconds(call, input, 100) for call in peers.values())
    number = max(1, round(2e-3 / once))
    times: dict[str, list[float]] = {name: [] for name in peers}
    with torch.no_grad():
        for _ in track(range(rounds), description=title, transient=True):
            shuffle(order)
            for name in order:
                times[name].append(seconds(peers[name], input, number))
    first = times[next(iter(peers))]
    result = {}
    for name, taken in times.items():
        low, middle, high = statistics.quantiles(taken, n=4)
        ratios = statistics.quantiles([a / b for a, b in zip(taken, first, strict=True)], n=4)
        result[name] = {
            "microseconds": round(middle * 1e6, 3),
            "quartiles": [round(low * 1e6, 3), round(high * 1e6, 3)],
            "ratio": round(ratios[1], 4),
            "ratio_quartiles": [round(ratios[0], 4), round(ratios[2], 4)],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    arguments = parser.parse_args()

    table = Table(title=f"batch {arguments.batch}, {arguments.rounds} rounds")
    for heading in ("case", "peer", "median us", "quartiles", "ratio", "quartiles of the ratio"):
        table.add_column(heading, no_wrap=True)
    results = {}
    for case, peers in pairs().items():
        width = 2 if case.startswith("dense") else 3
        input = torch.randn(arguments.batch, width)
        results[case] = measure(peers, input, arguments.rounds, case)
        for peer, row in results[case].items():
            low, high = row["quartiles"]
            ratio_low, ratio_high = row["ratio_quartiles"]
            table.add_row(
                case,
                peer,
                f"{row['microseconds']:.2f}",
                f"{low:.2f} to {high:.2f}",
                f"{row['ratio']:.3f}",
                f"{ratio_low:.3f} to {ratio_high:.3f}",
            )
    Console(width=None if Console().is_terminal else 120).print(table)
    if arguments.json:
        document = {
            "command": " ".join(["scripts/benchmark.py", *sys.argv[1:]]),
            "date": datetime.now(UTC).date().isoformat(),
            "environment": describe(["cpu"]),
            "batch": arguments.batch,
            "results": results,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
