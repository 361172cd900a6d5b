"""The verdict in pictures: the points, errors over their bounds, and errors in ULP."""

import importlib.util
import io
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from typing import Any

import numpy as np

from torchnnfs.testing.candidates import MissingExtraError
from torchnnfs.testing.judge import Row
from torchnnfs.testing.measure import ULP_EDGES
from torchnnfs.testing.outcome import Outcome, plain

#: Okabe and Ito's colours, which every kind of sight tells apart; the last for all further classes.
_COLOURS, _MARKERS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#8A8A8A"), "o^sDX"
_FINE, _BAD = "#0072B2", "#D55E00"
_MOST_POINTS, _MOST_ROWS = 1500, 48
_OFF = ("axes.spines.top", "axes.spines.right", "legend.frameon", "text.parse_math")
#: The scale of errors over bounds; what lies beyond is drawn at its ends.
_SCALE = {1e-3: "≤ 0.001", 0.01: "0.01", 0.1: "0.1", 1: "1", 10: "10", 100: "100", 1e3: "≥ 1000"}


@contextmanager
def own_numpy() -> Iterator[None]:
    """NumPy's own functions for the length of a block, whenever ``nnfs.init()`` replaced them."""
    replaced = {name: getattr(np, name) for name in ("dot", "eye", "zeros")}
    try:
        for name, function in replaced.items():
            while function.__module__ == "nnfs.core":
                # nnfs's functions hold the one that they call, some at the end of a list.
                held = function.__closure__[-1].cell_contents
                function = held[-1] if isinstance(held, list) else held
            setattr(np, name, function)
        yield
    finally:
        vars(np).update(replaced)


@contextmanager
def _drawing() -> Iterator[None]:
    """One look whatever the settings of the process, which stay as they are."""
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("plots need matplotlib: pip install 'torchnnfs[plot]'")
    with own_numpy(), warnings.catch_warnings():
        from matplotlib import style

        look: dict[Any, Any] = {"font.size": 8, "axes.titlesize": 8, "axes.titlelocation": "left"}
        look |= dict.fromkeys(_OFF, False) | {"figure.titleweight": "bold", "svg.fonttype": "none"}
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a name in another script
        with style.context(look, after_reset=True):
            yield


@_drawing()
def figure(outcome: Outcome, *names: str) -> Any:
    """The `panels` of these names, or all of them, one above the other; it needs matplotlib."""
    from matplotlib.figure import Figure

    tall = {name: tall for name, tall in panels(outcome).items() if name in names or not names}
    whole = Figure(figsize=(4.5, sum(tall.values())), layout="constrained")
    parts = whole.subfigures(len(tall), 1, height_ratios=list(tall.values()), squeeze=False).flat
    for name, part in zip(tall, parts, strict=True):
        {"points": _points, "bounds": _bounds, "ulps": _ulps}[name](part, outcome)
    facts = plain(", ".join(f"{name} {fact}" for name, fact in outcome.environment.items()))
    caption = textwrap.fill(f"{facts}. Drawn on {date.today()}.", 95)
    part.supxlabel(caption, size=6, x=0.02, ha="left")
    return whole


@_drawing()
def render(outcome: Outcome, kind: str, *names: str) -> bytes:
    """`figure` as a "png" or "svg" file."""
    buffer = io.BytesIO()
    figure(outcome, *names).savefig(buffer, format=kind, dpi=200)
    return buffer.getvalue()


def panels(outcome: Outcome) -> dict[str, float]:
    """The panels that there are for this outcome, in order, and their heights in inches."""
    x, y = outcome.input, outcome.output
    plane = x.ndim == y.ndim == 2 and x.shape[1] == 2 and len(x) == len(y)
    heights = {"points": 5.0} if plane and np.isfinite(y).all(-1).any() else {}
    bounds, ulps = 1.3 + 0.2 * len(_lines(outcome)), 0.9 + 1.2 * len(outcome.by_candidate)
    return {**heights, "bounds": bounds, "ulps": ulps}


@_drawing()
def kind_of(path: str) -> str:
    """The kind of picture that a file's name asks for, .png or .svg; it needs matplotlib."""
    if not path.lower().endswith((".png", ".svg")):
        raise ValueError(f"pictures are .png or .svg files, got {path!r}")
    return path.lower()[-3:]


def _points(part: Any, outcome: Outcome) -> None:
    axes, last = part.subplots(), len(_COLOURS) - 1
    finite = np.flatnonzero(np.isfinite(outcome.output).all(-1))
    drawn = np.random.default_rng(0).permutation(finite)[:_MOST_POINTS]
    (x, y), output = outcome.input[drawn].T, outcome.output[drawn]
    given, confidence = np.minimum(output.argmax(-1), last), output.max(-1)
    low, high = confidence.min(), confidence.max()
    strength = 0.25 + 0.75 * (confidence - low) / (high - low or 1)
    for number in range(min(output.shape[1], last + 1)):
        colour, marker, own = _COLOURS[number], _MARKERS[number], given == number
        axes.scatter(x[own], y[own], s=12, c=[(colour, a) for a in strength[own]], marker=marker)
        name = f"class {number}{' and up' if number == last else ''}: {own.sum():,} points"
        axes.scatter([], [], s=12, c=colour, marker=marker, label=name)
    axes.set(aspect="equal", adjustable="datalim", xlabel="first input", ylabel="second input")
    who = f"{next(iter(outcome.by_candidate))}, {len(drawn):,} of {len(outcome.input):,} points"
    who += f"\nlargest output: {low:.8g} (faint) to {high:.8g} (strong)"
    axes.legend(loc="upper left", bbox_to_anchor=(-0.05, -0.14), title=who, alignment="left")
    part.suptitle("The class that each point is given")


def _lines(outcome: Outcome) -> list[Row | str]:
    """The largest rows in their order, each candidate's behind its name."""
    largest = sorted(outcome.rows, key=lambda row: row.bound_ratio, reverse=True)[:_MOST_ROWS]
    lines: list[Row | str] = []
    for name, rows in outcome.by_candidate.items():
        lines += [name, *(row for row in rows if row in largest)]
    return lines


def _bounds(part: Any, outcome: Outcome) -> None:
    axes, lines = part.subplots(subplot_kw={"frameon": False}), _lines(outcome)
    rows = {y: line for y, line in enumerate(lines) if isinstance(line, Row)}
    low, *_, high = _SCALE
    axes.axvspan(1, high, color=_BAD, alpha=0.12, lw=0)
    axes.axvline(1, color="black")
    for y, line in enumerate(lines):
        if isinstance(line, str):
            where = ("subfigure fraction", "data")
            axes.annotate(line, (0.07, y), xycoords=where, va="center").set_in_layout(False)
        else:
            marker, colour = ("o", _FINE) if line.ok else ("X", _BAD)
            axes.plot(np.clip(line.bound_ratio, low, high), y, marker, c=colour, clip_on=False)
    axes.grid(axis="y", alpha=0.4)
    axes.set(xscale="log", xlim=(low, high), ylim=(len(lines) - 0.4, -0.6), ylabel="layer")
    axes.set_xlabel("error / bound, on a logarithmic scale; up to 1 is rounding", loc="right")
    axes.set_xticks(list(_SCALE), list(_SCALE.values()))
    axes.set_yticks(list(rows), [_short(row.label) for row in rows.values()])
    part.suptitle(f"Errors over their bounds, the largest {len(rows)} of {len(outcome.rows):,}")


def _ulps(part: Any, outcome: Outcome) -> None:
    edges = ["0", *(f"≤ {edge:g}" for edge in ULP_EDGES[1:-1]), f"> {ULP_EDGES[-2]:g}"]
    grid = part.subplots(len(outcome.by_candidate), sharex=True, sharey=True, squeeze=False).flat
    for axes, (name, rows) in zip(grid, outcome.by_candidate.items(), strict=True):
        row = [row for row in rows if not row.gradient][-1]
        shares = np.array(row.ulps) / max(1, sum(row.ulps))
        bars = axes.bar(edges, shares, color=_FINE if row.ok else _BAD)
        axes.bar_label(bars, [f"{share:.2g}" if share else "" for share in shares])
        axes.set(title=f"{name}, {_short(row.label)}", ylim=(0, 1.15), ylabel="share")
    axes.set_xlabel("error in ULP (units in the last place); each bin twice as wide")
    part.suptitle("Errors of the last layer's elements")


def _short(name: str) -> str:
    """A name that fits the picture and, whatever is in it, a file of XML."""
    name = plain(name)
    return name if len(name) <= 20 else f"{name[:6]}…{name[-13:]}"
