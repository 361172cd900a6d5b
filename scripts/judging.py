"""How long judging takes, in passes of the book's NumPy over the same rows."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from peers import arrays, numpy_forward

from torchnnfs import classifier, compare, spiral


def seconds(work: Callable[[], object]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=10_000, help="on each of three arms")
    parser.add_argument("--rounds", type=int, default=40, help="default: 40")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    stream = np.random.RandomState(0)
    points, _ = spiral(asked.samples, 3, generator=stream)
    model = classifier(2, 3, 3, generator=stream)
    layers, x = arrays(model), points.numpy()

    def book() -> object:
        return numpy_forward(layers, x)

    def judge() -> object:
        return compare(model, points, candidates=["eager", "numpy"], controls=False)

    judge(), book()
    ratios, passes = [], []
    for done in range(asked.rounds):  # in turn, so that both meet the same machine
        passes.append(statistics.median(seconds(book) for _ in range(5)))
        ratios.append(seconds(judge) / passes[-1])
        print(f"\r{done + 1} of {asked.rounds}", end="", file=sys.stderr, flush=True)
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(
        f"\n{len(x)} rows: judging eager and numpy takes {middle:.1f} times the book's pass "
        f"(quartiles {low:.1f} and {high:.1f}), which takes {statistics.median(passes):.2g} s"
    )
    if asked.json:
        found = {
            "command": " ".join(["scripts/judging.py", *sys.argv[1:]]),
            "date": datetime.now(UTC).date().isoformat(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "threads": 1,
            "rows": len(x),
            "seconds of a pass": statistics.median(passes),
            "passes": {"median": middle, "quartiles": [low, high], "rounds": asked.rounds},
        }
        asked.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
