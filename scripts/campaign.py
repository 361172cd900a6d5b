"""Judge random networks that are right: whoever is called wrong here is a false alarm.

    .venv/bin/python scripts/campaign.py --json results/campaign.json
    .venv/bin/python scripts/campaign.py --table

Eager torch is judged on every network in every dtype, the slower candidates on every 40th.
Network i of a seed is always the same: --only i judges it alone and prints its tables.

A bound that is never nearly reached would prove nothing, so there is the median of what dense
layers reach of theirs, each on the input it got. In float64 torch and NumPy often round to the same
bits, so there the layers are also measured against sums in extended precision.

--table breaks the chapter's network instead, and prints what tolerances and the judge say of each
broken twin.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torchnnfs.testing.bounds import PRECISIONS, dense

from torchnnfs import Dense, ReLU, Softmax, classifier, compare, spiral
from torchnnfs.testing import Candidate, Comparison
from torchnnfs.testing.candidates import DTYPES, KINDS, choose
from torchnnfs.testing.controls import BREAKS
from torchnnfs.testing.environment import describe
from torchnnfs.testing.report import label

SLOW = ("compiled", "exported", "onnx", "jax")
EVERY = 40


@dataclass
class Tally:
    """What became of one candidate in one dtype; overflow: a result there is not finite."""

    networks: int = 0
    disagree: int = 0
    overflow: int = 0
    largest: float = 0.0
    dense: list[float] = field(default_factory=list)
    extended: list[float] = field(default_factory=list)

    def add(self, comparison: Comparison) -> None:
        """Count a comparison with this candidate alone."""
        rows = comparison.rows
        self.networks += 1
        self.disagree += not comparison.ok
        finite = np.isfinite(comparison.output).all()
        self.overflow += not finite or any(row.unbounded for row in rows)
        self.largest = max(self.largest, *(row.bound_ratio for row in rows))
        shown = [row.isolated_ratio for row in rows if row.kind == "Dense"]
        self.dense += [ratio for ratio in shown if ratio is not None]

    def as_dict(self) -> dict[str, Any]:
        """The columns of the table."""
        return {
            "networks": self.networks,
            "disagree": self.disagree,
            "overflow": self.overflow,
            "largest ratio": round(self.largest, 4) if np.isfinite(self.largest) else "Infinity",
            "median, dense": round(statistics.median(self.dense), 4) if self.dense else None,
            "extended": round(statistics.median(self.extended), 4) if self.extended else None,
        }


Tallies = dict[tuple[str, str], Tally]


def network(seed: int, index: int) -> tuple[nn.Sequential, Tensor]:
    """Network `index` of `seed` and its input, in float64; each candidate rounds them itself."""
    stream = np.random.RandomState([seed, index])
    widths = stream.randint(1, 65, size=stream.randint(2, 6))
    layers: list[nn.Module] = []
    for n_inputs, n_neurons in itertools.pairwise(widths.tolist()):
        weights = stream.randn(n_inputs, n_neurons) * 10 ** stream.uniform(-3, 1)
        layers += [Dense.from_numpy(weights, stream.randn(n_neurons)), ReLU()]
    # A softmax may hide what is wrong in large numbers: some networks end without one.
    layers[-1:] = [Softmax()] if stream.rand() < 0.75 else []
    points = stream.randn(stream.randint(1, 401), widths[0]) * 10 ** stream.uniform(-2, 2)
    return nn.Sequential(*layers), torch.from_numpy(points)


def judge(model: nn.Module, points: Tensor, names: Sequence[str]) -> dict[Candidate, Comparison]:
    """Each candidate in each of its dtypes, by itself."""
    told = {}
    for candidate in choose(names, [torch.device("cpu")], list(DTYPES.values())):
        if candidate.name == "compiled":
            torch._dynamo.reset()  # torch compiles the same code only so many times
        told[candidate] = compare(model, points, candidates=[candidate], controls=False)
    return told


def extended_ratios(model: nn.Module, points: Tensor) -> list[float]:
    """What each dense layer reaches of its bound in float64, against more exact sums."""
    if np.finfo(np.longdouble).nmant <= 52:  # not every machine has such a type
        return []
    ratios = []
    for call in KINDS["eager"].run(model, points).calls:
        if call.kind == "Dense":
            layer: Any = model.get_submodule(call.path)
            w, b = layer.weight.detach().numpy().T, layer.bias.detach().numpy()
            exact = call.input.astype(np.longdouble) @ w.astype(np.longdouble) + b
            bound = dense(call.input, np.zeros_like(call.input), PRECISIONS["float64"], w, b)
            ratios.append(float(np.max(np.abs(call.output - exact) / bound)))
    return ratios


def campaign(
    indices: Iterable[int], seed: int, slow: Sequence[str] = ()
) -> tuple[Tallies, list[tuple[int, Comparison]]]:
    """A tally for each candidate and dtype, and every comparison that is a false alarm."""
    tallies: Tallies = {}
    alarms = []
    for index in indices:
        model, points = network(seed, index)
        names = ["eager", *(slow if index % EVERY == 0 else ())]
        for candidate, comparison in judge(model, points, names).items():
            tally = tallies.setdefault((candidate.name, candidate.dtype_name), Tally())
            tally.add(comparison)
            if not comparison.ok:
                alarms.append((index, comparison))
        tallies["eager", "float64"].extended += extended_ratios(model, points)
    return tallies, alarms


def summary(tallies: Tallies) -> Table:
    grid = Table("candidate", "dtype")
    for heading in Tally().as_dict():
        grid.add_column(heading, justify="right", no_wrap=True)
    for key, tally in tallies.items():
        entries = tally.as_dict().values()
        grid.add_row(*key, *("" if entry is None else str(entry) for entry in entries))
    return grid


def tolerance_rows() -> list[str]:
    """A Markdown row for each broken twin of the chapter's network: what is said of it."""
    stream = np.random.RandomState(0)
    points, _ = spiral(generator=stream)
    model = classifier(2, 3, 3, generator=stream)
    rows = []
    for control in compare(model, points, candidates=["eager"]).controls:
        twin = copy.deepcopy(model)
        BREAKS[control.name](twin, points)
        with torch.no_grad():
            right, wrong = model(points), twin(points)
        try:
            torch.testing.assert_close(wrong, right)
            close = "passes"
        except AssertionError:
            close = "caught"
        near = "passes" if np.allclose(wrong.numpy(), right.numpy(), atol=1e-4) else "caught"
        first = compare(twin, points, reference=model, controls=False).first_divergence
        # What this input cannot show in the whole network, the judge shows with one layer.
        layer, size = ("alone", "") if first is None else (label(first), f"{first.bound_ratio:.0e}")
        says = [control.name, close, near, control.outcome, layer, size.replace("e+", "e")]
        rows.append(f"| {' | '.join(says)} |")
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="I", help="network I alone, with its tables")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--table", action="store_true", help="what tolerances let through")
    arguments = parser.parse_args(argv)
    if arguments.table:
        print(*tolerance_rows(), sep="\n")
        return 0
    if arguments.only is not None:
        told = judge(*network(arguments.seed, arguments.only), ["eager", *SLOW]).values()
        print(*told, sep="\n\n")
        return 0 if all(comparison.ok for comparison in told) else 1
    steps = track(range(arguments.networks), "judging", console=Console(stderr=True))
    tallies, alarms = campaign(steps, arguments.seed, SLOW)
    for index, comparison in alarms:
        print(f"network {index} is right and was called wrong:\n{comparison}\n")
    Console(width=None if Console().is_terminal else 120).print(summary(tallies))
    if arguments.json:
        document = {
            "command": " ".join(["scripts/campaign.py", *(sys.argv[1:] if argv is None else argv)]),
            "date": datetime.now(UTC).date().isoformat(),
            "environment": describe(["cpu"]),
            "results": [
                {"candidate": name, "dtype": dtype, **tally.as_dict()}
                for (name, dtype), tally in tallies.items()
            ],
            "false alarms": [
                {"network": index, "candidate": row.candidate, "dtype": row.dtype}
                | {"layer": label(row), "ratio": str(row.bound_ratio)}
                for index, comparison in alarms
                if (row := comparison.first_divergence)
            ],
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 1 if alarms else 0


if __name__ == "__main__":
    sys.exit(main())
