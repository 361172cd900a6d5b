"""Chapter 4's page as the book prints it, and why other computations print other digits."""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

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
    "dense 1": "it adds up in float32, where the book adds up in float64 (by nnfs.init())",
    "exp": "its float32 exp is an approximation, which is not correctly rounded",
    "softmax": "it sums or divides in another way",
}

#: The result after each step, in order, for all 300 rows.
Steps = dict[str, Array]


def compute(device: torch.device) -> dict[str, Steps]:
    """The forward pass by the book's dialect, by NumPy, and by float32 torch, by their names."""
    stream = np.random.RandomState(0)
    points, _ = spiral(100, 3, generator=stream, device=device)
    model = classifier(2, 3, 3, generator=stream, device=device)
    dialect: Any = book.from_torch(model)
    first, second = (partial(dense, weight=e.weights.T, bias=e.biases) for e in dialect[::2])
    plain, array = [first, relu, second, softmax], points.cpu().numpy()
    with torch.no_grad():
        return {
            f"torchnnfs.book on {device}": _steps(dialect, points, lambda x: book.exp(x.double())),
            f"NumPy {np.__version__}": _steps(plain, array, lambda x: np.exp(x.numpy())),
            f"torch {torch.__version__} in float32 on {device}": _steps(model, points, torch.exp),
        }


def _steps(layers: Iterable[Any], x: Any, exp: Callable[[Tensor], Any]) -> Steps:
    """The result after each layer, and of exp within the last."""
    results: dict[str, Any] = {}
    for name, layer in zip(("dense 1", "ReLU", "dense 2", "softmax"), layers, strict=True):
        if name == "softmax":
            logits = torch.as_tensor(x)
            results["exp"] = exp(logits - logits.amax(-1, True))
        results[name] = x = layer(x)
    return {step: torch.as_tensor(each).cpu().float().numpy() for step, each in results.items()}


def show(computed: dict[str, Steps], console: Console) -> bool:
    """Print the page and its rivals, each digit that is not the book's marked; is it the book's?"""
    texts = {title: np.array2string(steps["softmax"][:5]) for title, steps in computed.items()}
    for title, text in texts.items():
        console.print(Text(title, style="bold"), soft_wrap=True)
        for line, book_line in zip(text.splitlines(), PAGE.splitlines(), strict=True):
            pairs = zip_longest(line, book_line, fillvalue=" ")
            carets = "".join(" ^"[given != printed] for given, printed in pairs).rstrip()
            marks = [Text(carets, style="red")] * bool(carets)
            console.print(line, *marks, sep="\n", soft_wrap=True)
        console.print()
    (title, ours), *rivals = computed.items()
    right = texts[title] == PAGE
    if set(texts.values()) != {PAGE}:
        console.print("^ marks a digit that is not the book's.", soft_wrap=True)
    words = "prints what the book prints, digit for digit" if right else "prints other digits"
    console.print(f"{title} {words}.", soft_wrap=True)
    for rival, steps in rivals:
        said = f"no bit differs in all {len(ours['softmax'])} rows"
        for step, values in steps.items():
            if differ := np.count_nonzero(values != ours[step]):
                why = _REASONS.get(step, "of a difference in arithmetic")
                where = f"{differ} of the {values.size} numbers in all {len(values)} rows"
                said = f"{where} differ after {step}, because {why}"
                break
        console.print(f"{rival}: {said}.", soft_wrap=True)
    return right
