"""Judge random networks that are right: whoever is called wrong here is a false alarm.

    .venv/bin/python scripts/campaign.py --json results/campaign.json
    .venv/bin/python scripts/campaign.py --excess
    .venv/bin/python scripts/campaign.py --table

For each number there is a chain of dense layers. Every fourth one is judged once more with its
layers computed in another order or precision. For every fourth number there is a network of other
layers, for every 40th one with a forward of its own, judged with and without a reference in NumPy.
Eager torch is judged in every dtype, the slower candidates on every 500th chain. Network i of a
seed is always the same: --only i judges it alone and prints its tables.

A bound that is never nearly reached would prove nothing, so there is the median of what dense
layers reach of theirs, each on the input it got. In float64 torch and NumPy often round to the same
bits, so there the layers are also measured against sums in extended precision.

--excess measures dense layers from 1 to 4 096 inputs wide, right and wrong ones. --table breaks the
chapter's network, and prints what tolerances and the judge say of each broken copy.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import (
    OWN,
    RIGHT,
    WRONG,
    OtherDense,
    network,
    other_layers,
    other_way,
    own_forward,
)
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from torchnnfs import Dense, classifier, compare, spiral
from torchnnfs.testing import Candidate, Comparison
from torchnnfs.testing.candidates import DTYPES, choose, single
from torchnnfs.testing.controls import AT_THE_END
from torchnnfs.testing.environment import describe
from torchnnfs.testing.layers.dense import dense_bound
from torchnnfs.testing.models import arguments_of, layer_of
from torchnnfs.testing.precision import PRECISIONS
from torchnnfs.testing.values import to_numpy

SLOW = ("compiled", "exported", "onnx", "jax")
SLOW_EVERY, OWN_EVERY = 500, 40
CPU = torch.device("cpu")


@dataclass
class Tally:
    """What became of one kind of network in one dtype; overflow: a result there is not finite."""

    networks: int = 0
    disagree: int = 0
    overflow: int = 0
    largest: float = 0.0
    excess: float = 0.0
    dense: list[float] = field(default_factory=list)
    extended: list[float] = field(default_factory=list)

    def add(self, comparison: Comparison) -> None:
        """Count a comparison with one candidate alone."""
        rows = comparison.rows
        self.networks += 1
        self.disagree += not comparison.ok
        finite = np.isfinite(comparison.output).all()
        self.overflow += not finite or any(row.unbounded for row in rows)
        self.largest = max(self.largest, *(row.bound_ratio for row in rows))
        self.excess = max(self.excess, *(row.excess or 0.0 for row in rows))
        shown = [row.isolated_ratio for row in rows if row.excess is not None]
        self.dense += [ratio for ratio in shown if ratio is not None]

    def as_dict(self) -> dict[str, Any]:
        """The columns of the table."""
        return {
            "networks": self.networks,
            "disagree": self.disagree,
            "overflow": self.overflow,
            "largest ratio": round(self.largest, 4) if np.isfinite(self.largest) else "Infinity",
            "largest excess": round(self.excess, 4) if self.excess else None,
            "median, dense": round(statistics.median(self.dense), 4) if self.dense else None,
            "extended": round(statistics.median(self.extended), 4) if self.extended else None,
        }


#: By the kind of network, the candidate and the dtype.
Tallies = dict[tuple[str, str, str], Tally]


@dataclass(frozen=True)
class Alarm:
    """A network that is right and was called wrong."""

    network: int
    kind: str
    comparison: Comparison


def with_reference(
    kind: str, model: nn.Module, points: Tensor, candidate: Candidate, double: bool
) -> Comparison:
    """Against NumPy on the parameters as the dtype stores them, in float64 or the input's."""
    stored = copy.deepcopy(model).to(candidate.dtype).double()
    parameters = {name: to_numpy(each) for name, each in stored.named_parameters()}

    def reference(x: np.ndarray) -> Any:
        step = np.float64 if double else x.dtype
        given = {name: each.astype(step) for name, each in parameters.items()}
        return OWN[kind][1](given, x.astype(step))

    return compare(stored, points, reference=reference, candidates=[candidate], controls=False)


def judge(model: nn.Module, points: Tensor, names: Sequence[str]) -> dict[Candidate, Comparison]:
    """Each candidate in each of its dtypes, by itself."""
    return {
        candidate: compare(model, points, candidates=[candidate], controls=False)
        for candidate in choose(names, [CPU], list(DTYPES.values()))
    }


def extended_ratios(model: nn.Module, points: Tensor) -> list[float]:
    """What each dense layer reaches of its bound in float64, against more exact sums."""
    if np.finfo(np.longdouble).nmant <= 52:  # not every machine has such a type
        return []
    ratios = []
    for call in Candidate("eager", CPU, torch.float64).run(model, points).calls:
        if call.kind == "Dense":
            layer: Any = model.get_submodule(call.path)
            w, b = to_numpy(layer.weight), to_numpy(layer.bias)
            exact = call.input.astype(np.longdouble) @ w.T.astype(np.longdouble) + b
            none = np.zeros_like(call.input)
            bound = dense_bound(call.input, none, PRECISIONS["float64"], w, b)
            ratios.append(float(np.max(np.abs(call.output - exact) / bound)))
    return ratios


def judged(
    index: int, seed: int, slow: Sequence[str] = ()
) -> Iterator[tuple[str, Candidate, Comparison]]:
    """Every comparison of network `index`: its kind, the candidate, the outcome."""
    model, points = network(seed, index)
    for candidate, comparison in judge(model, points, ["eager"]).items():
        yield "dense chain", candidate, comparison
    if index % SLOW_EVERY == 0 and slow:
        for candidate, comparison in judge(model, points, slow).items():
            yield "dense chain", candidate, comparison
    if index % 4 == 1:
        way = list(RIGHT)[index // 4 % len(RIGHT)]
        for candidate, comparison in judge(other_way(model, RIGHT[way]), points, ["eager"]).items():
            yield way, candidate, comparison
    if index % 4 == 3:
        for candidate, comparison in judge(*other_layers(seed, index), ["eager"]).items():
            yield "other layers", candidate, comparison
    if index % OWN_EVERY == 0:
        kind, own, batch = own_forward(seed, index)
        for candidate, comparison in judge(own, batch, ["eager"]).items():
            yield kind, candidate, comparison
            for words, double in (("NumPy", False), ("NumPy in float64", True)):
                again = with_reference(kind, own, batch, candidate, double)
                yield f"{kind}, reference {words}", candidate, again


def campaign(
    indices: Iterable[int], seed: int, slow: Sequence[str] = ()
) -> tuple[Tallies, list[Alarm]]:
    """A tally for each kind, candidate and dtype, and every comparison that is a false alarm."""
    tallies: Tallies = {}
    alarms = []
    for index in indices:
        for kind, candidate, comparison in judged(index, seed, slow):
            key = (kind, candidate.name, str(candidate.dtype).removeprefix("torch."))
            tallies.setdefault(key, Tally()).add(comparison)
            if not comparison.ok:
                alarms.append(Alarm(index, kind, comparison))
        tallies["dense chain", "eager", "float64"].extended += extended_ratios(
            *network(seed, index)
        )
    return tallies, alarms


def summary(tallies: Tallies) -> Table:
    grid = Table("kind", "candidate", "dtype")
    for heading in Tally().as_dict():
        grid.add_column(heading, justify="right")
    for key, tally in tallies.items():
        entries = tally.as_dict().values()
        grid.add_row(*key, *("" if entry is None else str(entry) for entry in entries))
    return grid


WIDTHS = (1, 4, 16, 64, 256, 1024, 4096)
#: From a stream and a shape to numbers.
DATA: dict[str, Callable[[np.random.RandomState, tuple[int, ...]], np.ndarray]] = {
    "normal": lambda stream, shape: stream.randn(*shape),
    "positive": lambda stream, shape: np.abs(stream.randn(*shape)),
    "heavy-tailed": lambda stream, shape: stream.standard_t(2, shape),
}


def excesses(widths: Iterable[int]) -> list[dict[str, Any]]:
    """For each width the largest excess of what is right, and the smallest of what is wrong.

    Dense layers of eight outputs on a hundred rows; wrong ones in float32 alone.
    """
    found = []
    for width in widths:
        right = dict.fromkeys(DTYPES, 0.0)
        wrong = dict.fromkeys(WRONG, np.inf)
        ratio = np.inf
        for draw in DATA.values():
            stream = np.random.RandomState(0)
            layer = Dense.from_numpy(draw(stream, (width, 8)), draw(stream, (8,)))
            points = torch.from_numpy(draw(stream, (100, width)))
            for compute in (F.linear, *RIGHT.values()):
                told = judge(nn.Sequential(OtherDense(layer, compute)), points, ["eager"])
                for comparison in told.values():
                    (row,) = comparison.rows
                    right[row.dtype] = max(right[row.dtype], row.excess or 0.0)
            for name, compute in WRONG.items():
                single_ = [Candidate("eager", CPU, torch.float32)]
                model = nn.Sequential(OtherDense(layer, compute))
                (row,) = compare(model, points, candidates=single_, controls=False).rows
                wrong[name] = min(wrong[name], row.excess or 0.0)
                if name == "TF32":
                    ratio = min(ratio, row.bound_ratio)
        rounded = {name: float(f"{value:.3g}") for name, value in {**right, **wrong}.items()}
        found.append({"width": width, **rounded, "ratio of TF32": float(f"{ratio:.2g}")})
    return found


def markdown(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def excess_table(found: Sequence[dict[str, Any]]) -> str:
    headings = ["width", *(f"right, {dtype}" for dtype in DTYPES), *WRONG, "ratio of TF32"]
    return markdown(headings, [list(entry.values()) for entry in found])


def broken(model: nn.Module, path: str, name: str) -> nn.Module:
    """A copy of the chapter's network that is wrong in the layer at `path` as a control is."""
    twin = copy.deepcopy(model)
    module = twin.get_submodule(path)
    layer = layer_of(module)
    assert layer is not None
    arguments = {key: single(value) for key, value in arguments_of(module).items()}

    def replace(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = single(to_numpy(args[0]))
        if name in AT_THE_END:
            wrong = AT_THE_END[name](layer.forward(x, **arguments))
        else:
            wrong = layer.controls[name](x, **arguments)
        return torch.from_numpy(np.array(wrong)).to(output.dtype)

    module.register_forward_hook(replace)
    return twin


def tolerance_rows() -> list[list[str]]:
    """For each broken copy of the chapter's network: what is said of it."""
    stream = np.random.RandomState(0)
    points, _ = spiral(generator=stream)
    model = classifier(2, 3, 3, generator=stream)
    rows = []
    for control in compare(model, points, candidates=["eager"]).controls:
        twin = broken(model, control.layer, control.name)
        with torch.no_grad():
            right, wrong = model(points), twin(points)
        try:
            torch.testing.assert_close(wrong, right)
            close = "passes"
        except AssertionError:
            close = "caught"
        near = "passes" if np.allclose(wrong.numpy(), right.numpy(), atol=1e-4) else "caught"
        told = compare(twin, points, reference=model, candidates=["eager"], controls=False)
        first = told.first_divergence
        # What this input cannot show in the whole network, the judge shows with one layer.
        layer, size = ("alone", "") if first is None else (first.label, f"{first.bound_ratio:.0e}")
        says = [control.name, close, near, control.outcome, layer, size.replace("e+", "e")]
        rows.append(says)
    return rows


HEADINGS = ("broken copy", "assert_close", "allclose", "judge", "layer", "over bound")


def record(tallies: Tallies, alarms: Sequence[Alarm], argv: Sequence[str]) -> dict[str, Any]:
    """All that was found, and where, when and how."""
    return {
        "command": " ".join(["scripts/campaign.py", *argv]),
        "date": datetime.now(UTC).date().isoformat(),
        "environment": describe(["cpu"]),
        "results": [
            {"kind": kind, "candidate": name, "dtype": dtype, **tally.as_dict()}
            for (kind, name, dtype), tally in tallies.items()
        ],
        "excess": excesses(WIDTHS),
        "false alarms": [
            {"network": alarm.network, "kind": alarm.kind, "candidate": row.candidate}
            | {"dtype": row.dtype, "layer": row.label, "basis": row.basis, "reason": row.reason}
            for alarm in alarms
            if (row := next((row for row in alarm.comparison.rows if not row.ok), None))
        ],
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="I", help="network I alone, with its tables")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    parser.add_argument("--excess", action="store_true", help="dense layers, right and wrong")
    parser.add_argument("--table", action="store_true", help="what tolerances let through")
    arguments = parser.parse_args(argv)
    if arguments.table:
        print(markdown(HEADINGS, tolerance_rows()))
        return 0
    if arguments.excess:
        print(excess_table(excesses(WIDTHS)))
        return 0
    if arguments.only is not None:
        told = list(judged(arguments.only, arguments.seed, SLOW))
        for kind, _, comparison in told:
            print(f"{kind}:\n{comparison}\n")
        return 0 if all(comparison.ok for *_, comparison in told) else 1
    steps = track(range(arguments.networks), "judging", console=Console(stderr=True))
    tallies, alarms = campaign(steps, arguments.seed, SLOW)
    for alarm in alarms:
        print(f"network {alarm.network} ({alarm.kind}) is right and was called wrong:")
        print(f"{alarm.comparison}\n")
    Console(width=None if Console().is_terminal else 140).print(summary(tallies))
    if arguments.json:
        document = record(tallies, alarms, sys.argv[1:] if argv is None else argv)
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 1 if alarms else 0


if __name__ == "__main__":
    sys.exit(main())
