"""Chapter 4's page as the book prints it, and why other computations print other digits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

from torchnnfs import book
from torchnnfs.modules import classifier
from torchnnfs.spiral import spiral
from torchnnfs.testing.layers.dense import dense
from torchnnfs.testing.layers.pointwise import relu
from torchnnfs.testing.layers.softmax import softmax
from torchnnfs.testing.precision import Array

#: What the book prints at the end of chapter 4.
PAGE = """\
[[0.33333334 0.33333334 0.33333334]
 [0.33333316 0.3333332  0.33333364]
 [0.33333287 0.3333329  0.33333418]
 [0.3333326  0.33333263 0.33333477]
 [0.33333233 0.3333324  0.33333528]]"""

_REASONS = {
    "dense 1": "its dot product accumulates in float32, the book's in float64 (nnfs.init())",
    "exp": "its float32 exp is not correctly rounded",
    "softmax": "it sums or divides in another way",
}


@dataclass(frozen=True)
class Printed:
    """One computation of the forward pass.

    Attributes:
        title: who computes.
        steps: the result after each step, for all 300 rows.
    """

    title: str
    steps: dict[str, Array]

    @property
    def text(self) -> str:
        """The first five probabilities as NumPy prints them."""
        return np.array2string(self.steps["softmax"][:5])

    def reason(self, right: Printed) -> str:
        """Where the bits first differ from `right`, and why."""
        for step, values in self.steps.items():
            differ = np.count_nonzero(values != right.steps[step])
            if differ:
                why = _REASONS.get(step, "of a difference in arithmetic")
                return (
                    f"{self.title}: {differ} of {values.size} numbers differ after {step}, "
                    f"because {why}."
                )
        return f"{self.title}: no bit differs in all {len(values)} rows."


def compute(device: torch.device) -> list[Printed]:
    """The page by the book's dialect on `device`, by NumPy, and by float32 torch on `device`."""
    stream = np.random.RandomState(0)
    points, _ = spiral(100, 3, generator=stream, device=device)
    model = classifier(2, 3, 3, generator=stream, device=device)
    dialect = book.from_torch(model)
    assert isinstance(dialect, nn.Sequential)
    first, second = (
        partial(dense, weight=layer.weights.T, bias=layer.biases)
        for layer in dialect
        if isinstance(layer, book.Layer_Dense)
    )
    with torch.no_grad():
        return [
            Printed(
                f"torchnnfs.book on {device}",
                _steps(dialect, points, lambda x: book.exp((x - x.amax(-1, True)).double())),
            ),
            Printed(
                f"NumPy {np.__version__}",
                _steps(
                    [first, relu, second, softmax],
                    points.cpu().numpy(),
                    lambda x: np.exp(x - x.max(-1, keepdims=True)),
                ),
            ),
            Printed(
                f"torch {torch.__version__} in float32 on {device}",
                _steps(model, points, lambda x: (x - x.amax(-1, True)).exp()),
            ),
        ]


def _steps(layers: Iterable[Any], x: Any, exp: Callable[[Any], Any]) -> dict[str, Array]:
    """The result after each layer, and of exp within the last."""
    results: dict[str, Any] = {}
    for name, layer in zip(("dense 1", "ReLU", "dense 2", "softmax"), layers, strict=True):
        if name == "softmax":
            results["exp"] = exp(x)
        results[name] = x = layer(x)
    return {name: _float32(result) for name, result in results.items()}


def _float32(result: Any) -> Array:
    array = result.cpu().numpy() if isinstance(result, torch.Tensor) else result
    return array.astype(np.float32)


def show(computed: list[Printed], console: Console) -> bool:
    """Print the page and its rivals side by side; whether the first is what the book prints."""
    ours, *rivals = computed
    marks = [_marks(each.text) for each in computed]
    marked = [any(lines) for lines in zip(*marks, strict=True)]
    blocks = [_block(each, carets, marked) for each, carets in zip(computed, marks, strict=True)]
    if console.width >= 120:
        grid = Table(box=None, padding=(0, 3, 0, 0), show_header=False)
        for _ in blocks:
            grid.add_column(no_wrap=True, overflow="ignore")
        grid.add_row(*blocks)
        console.print(grid, crop=False)
    else:
        console.print(*blocks, sep="\n")
    right = ours.text == PAGE
    console.print(
        f"{ours.title} prints what the book prints, digit for digit."
        if right
        else f"{ours.title} does not print what the book prints.",
        soft_wrap=True,
    )
    for rival in rivals:
        console.print(rival.reason(ours), soft_wrap=True)
    return right


def _marks(text: str) -> list[str]:
    """A line for each row, with a caret under each character that is not the book's."""
    return [
        "".join(" ^"[a != b] for a, b in zip_longest(line, right, fillvalue=" ")).rstrip()
        for line, right in zip(text.splitlines(), PAGE.splitlines(), strict=True)
    ]


def _block(computed: Printed, marks: list[str], marked: list[bool]) -> Text:
    """The five rows, each with its carets below where any of the blocks has some."""
    block = Text(f"{computed.title}\n", style="bold")
    for line, carets, below in zip(computed.text.splitlines(), marks, marked, strict=True):
        block.append(f"{line}\n", style="not bold")
        if below:
            block.append(f"{carets}\n", style="not bold red")
    return block
