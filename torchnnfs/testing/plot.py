"""The verdict in pictures: the points, errors over their bounds, and errors in ULP."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from torchnnfs.testing.candidates import MissingExtraError
from torchnnfs.testing.judge import Row
from torchnnfs.testing.measure import ULP_EDGES
from torchnnfs.testing.outcome import Outcome

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


KINDS = ("png", "svg")
_MOST_POINTS, _MOST_ROWS = 1500, 48
_FINE, _BAD, _GREY = "#0072B2", "#D55E00", "#8A8A8A"
#: Okabe and Ito's colours, which every kind of sight tells apart; the last for all other classes.
_CLASSES = [(_FINE, "o"), ("#E69F00", "^"), ("#009E73", "s"), ("#CC79A7", "D"), ("#000000", "v")]
_CLASSES += [(_GREY, "X")]


def figure(outcome: Outcome, *names: str) -> Figure:
    """The `panels` of these names, or all that there are, one above the other.

    Raises:
        MissingExtraError: without matplotlib.
    """
    with _style():
        from matplotlib.figure import Figure

        heights = panels(outcome)
        tall = [heights[name] for name in names or heights]
        # Every place is given in inches: matplotlib's own layout varies in the last digits.
        whole = Figure(figsize=(4.0, sum(tall)))
        parts = whole.subfigures(len(tall), 1, height_ratios=tall, hspace=0, squeeze=False).flat
        for name, part in zip(names or heights, parts, strict=True):
            {"points": _points, "bounds": _bounds, "ulps": _ulps}[name](part, outcome)
    return whole


def render(outcome: Outcome, kind: str, *names: str) -> bytes:
    """`figure` as a "png" or "svg" file; the same outcome gives the same file.

    Raises:
        MissingExtraError: without matplotlib.
        ValueError: another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"plots are .png or .svg files, got {kind!r}")
    plain = {"Date": None, "Creator": None, "Format": None, "Type": None} if kind == "svg" else None
    buffer = io.BytesIO()
    with _style():
        figure(outcome, *names).savefig(buffer, format=kind, dpi=200, metadata=plain)
    return buffer.getvalue()


def panels(outcome: Outcome) -> dict[str, float]:
    """The panels that there are for this outcome, in order, and their heights in inches.

    "points", where the input is points in the plane; "bounds"; and "ulps".
    """
    x, y = outcome.input, outcome.output
    plane = x.ndim == y.ndim == 2 and x.shape[1] == 2 and len(x) == len(y)
    heights = {"points": 4.4} if plane and np.isfinite(y).all(-1).any() else {}
    bounds, ulps = 0.95 + 0.2 * len(_lines(outcome)), 0.9 + 0.6 * len(outcome.by_candidate)
    return {**heights, "bounds": bounds, "ulps": ulps}


def kind_of(path: str) -> str:
    """The kind of picture that a file's name asks for.

    Raises:
        ValueError: neither ``.png`` nor ``.svg``.
    """
    kind = path.lower().rpartition(".")[2]
    if kind not in KINDS:
        raise ValueError(f"pictures are .png or .svg files, got {path!r}")
    return kind


@contextmanager
def _style() -> Iterator[None]:
    """One look whatever the settings of the process, which stay as they are."""
    try:
        import matplotlib
    except ImportError:
        raise MissingExtraError("plots need matplotlib: pip install 'torchnnfs[plot]'") from None
    with matplotlib.rc_context(), warnings.catch_warnings():
        # Names may be in a script that matplotlib's own font lacks; who shows an SVG has others.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        matplotlib.rcdefaults()
        style: dict[Any, Any] = {f"axes.spines.{side}": False for side in ("top", "right", "left")}
        style |= {"font.size": 8, "ytick.major.size": 0, "ytick.major.pad": 7}
        style |= {"svg.fonttype": "none", "svg.hashsalt": "torchnnfs", "text.parse_math": False}
        matplotlib.rcParams.update(style)
        yield


def _axes(part: SubFigure, title: str, left: float, bottom: float, top: float) -> Axes:
    """Axes at these distances, in inches, from the edges of a panel with that title."""
    width, height = part.bbox.width / part.dpi, part.bbox.height / part.dpi
    part.text(0.1 / width, 1 - 0.1 / height, title, weight="bold", size=10, va="top")
    shares = (1 - (left + 0.25) / width, (height - bottom - top) / height)
    return part.add_axes((left / width, bottom / height, *shares))


def _points(part: SubFigure, outcome: Outcome) -> None:
    from matplotlib.colors import to_rgb

    given, confidence = outcome.output.argmax(-1), outcome.output.max(-1)
    shown = np.flatnonzero(np.isfinite(outcome.output).all(-1))
    low, high = float(confidence[shown].min()), float(confidence[shown].max())
    classes, counts = np.unique(given[shown], return_counts=True)
    if len(classes) > len(_CLASSES):
        frequent = np.sort(classes[np.argsort(-counts, kind="stable")][: len(_CLASSES) - 1])
        given[~np.isin(given, frequent)] = -1
        classes = np.append(frequent, -1)
    if len(shown) > _MOST_POINTS:
        shown = np.random.default_rng(0).choice(shown, _MOST_POINTS, replace=False)
    keys = 0.16 * len(classes)
    axes = _axes(part, "Class and confidence at the input points", 0.65, 0.9 + keys, 0.55)
    scale = _axes(part, "", 0.65, 0.5, 3.9 - keys)
    who = next(iter(outcome.by_candidate))
    part.text(0.025, 0.91, f"{who}, {len(shown):,} of {len(given):,} points")
    for place, number in enumerate(classes):
        colour, marker = _CLASSES[place if number >= 0 else -1]
        ramp = 1 - np.linspace(0.3, 1, 256)[:, None] * (1 - np.array(to_rgb(colour)))
        own = shown[given[shown] == number]
        shade = (255 * (confidence[own] - low) / (high - low or 1)).astype(int)
        x, y = outcome.input[own].T
        axes.scatter(x, y, s=12, c=ramp[shade], marker=marker)
        scale.imshow(ramp[None], extent=(0, 1, place + 0.5, place - 0.5), aspect="auto")
    axes.set_aspect("equal", "datalim")
    axes.locator_params(nbins=5)
    names = [f"class {number}" if number >= 0 else "others" for number in classes]
    scale.set_ylim(len(classes) - 0.5, -0.5)
    scale.set_yticks(range(len(classes)), names)
    # Digits enough to tell the ends apart: an untrained network is hardly surer than chance.
    size, spread = max(abs(low), abs(high)), high - low
    digits = 2 + math.ceil(math.log10(max(10, size / spread if spread else 0)))
    scale.set_xticks([0, 1], [f"{low:.{digits}g}", f"{high:.{digits}g}"])
    scale.get_xticklabels()[0].set_horizontalalignment("left")
    scale.get_xticklabels()[1].set_horizontalalignment("right")
    scale.set_xlabel(f"largest output of each point; the shades span {spread:.2g}")


def _lines(outcome: Outcome) -> list[Row | str]:
    """The largest rows in their order, each candidate's behind its name."""
    largest = sorted(outcome.rows, key=_ratio, reverse=True)[:_MOST_ROWS]
    lines: list[Row | str] = []
    for name, rows in outcome.by_candidate.items():
        kept = [row for row in rows if row in largest]
        lines += [name, *kept] if kept else []
    return lines


def _ratio(row: Row) -> float:
    return math.inf if math.isnan(row.bound_ratio) else row.bound_ratio


def _bounds(part: SubFigure, outcome: Outcome) -> None:
    lines = _lines(outcome)
    rows = {y: line for y, line in enumerate(lines) if not isinstance(line, str)}
    ratios = [_ratio(row) for row in rows.values()]
    names = [_short(row.label) for row in rows.values()]
    title = "Largest error over its bound, by layer"
    if len(rows) < len(outcome.rows):
        title = f"Largest errors over bounds, {len(rows)} of {len(outcome.rows):,}"
    axes = _axes(part, title, 0.25 + max(map(_width, names)), 0.5, 0.4)
    # Whole decades, at most four to either side; what lies beyond is drawn at the edge.
    decades = [math.log10(min(max(ratio, 1e-4), 1e4)) for ratio in ratios if ratio]
    low = min([-1, *map(math.floor, decades)]) - (0 in ratios)
    high = max([1, *map(math.ceil, decades)])
    for y, line in enumerate(lines):
        if isinstance(line, str):
            where = ("figure fraction", "data")
            axes.annotate(line, (0.025, y), None, where, va="center", weight="bold")
            continue
        axes.axhline(y, color="#DDDDDD", lw=0.6, zorder=0)
        axes.fill_betweenx((y - 0.5, y + 0.5), 1, 10.0**high, color=_BAD, alpha=0.12, lw=0)
        axes.vlines(1, y - 0.5, y + 0.5, "black", lw=1.2)
        x = min(max(_ratio(line), 10.0**low), 10.0**high)
        marker, colour = ("o", _FINE) if line.ok else ("X", _BAD)
        axes.plot(x, y, marker, color=colour, mfc=colour if _ratio(line) else "w", clip_on=False)
    axes.set(xscale="log", xlim=(10.0**low, 10.0**high), ylim=(len(lines) - 0.4, -0.6))
    axes.set_yticks(list(rows), names)
    step = 1 if high - low < 5 else 2
    inner = [k for k in range(low + step, high - step + 1) if k % step == 0]
    ticks = {k: f"{10.0**k:g}" for k in (low, *inner, 0, high)}
    if min(ratios) < 10.0**low:
        ticks[low] = "<0.0001" if min(ratios) else "0"
    if max(ratios) > 10.0**high:
        ticks[high] = ">10000"
    axes.minorticks_off()
    axes.set_xticks([10.0**k for k in ticks], list(ticks.values()))
    axes.set_xlabel("error / bound: up to 1, rounding explains it", loc="right")


def _ulps(part: SubFigure, outcome: Outcome) -> None:
    axes = _axes(part, "Errors at the last layer, in ULP", 0.1, 0.5, 0.4)
    for y, (name, rows) in enumerate(outcome.by_candidate.items()):
        row = [row for row in rows if not row.gradient][-1]
        scope = "whole network" if row.isolated_ratio is None else "last layer alone"
        axes.text(-0.5, y - 0.72, f"{name}, {scope}", weight="bold")
        shares = np.array(row.ulps) / max(1, sum(row.ulps))
        # A layer alone may be right on an input that already was wrong.
        fine = row.isolated_ratio <= 1 if row.isolated_ratio is not None else row.ok
        axes.bar(range(len(shares)), -0.45 * shares, bottom=y, color=_FINE if fine else _BAD)
        axes.axhline(y, color=_GREY, lw=0.6)
        for x, share in enumerate(shares):
            text = f"{share:.0%}" if share >= 0.1 else f"{share:.1%}" if share >= 1e-3 else "<0.1%"
            axes.text(x, y - 0.45 * share - 0.03, text if share else "", ha="center", size=7)
    names = ["0", *(f"≤ {edge:g}" for edge in ULP_EDGES[1:-1]), f"> {ULP_EDGES[-2]:g}"]
    axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(y, -0.95), yticks=[])
    axes.set_xticks(range(len(names)), names)
    axes.set_xlabel("units in the last place, and the share of the outputs")


def _short(name: str) -> str:
    """A name that fits the picture and, whatever is in it, a file of XML."""
    name = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in name)
    cuts = [name, *(f"{name[:half]}…{name[-half:]}" for half in range(24, 1, -1))]
    return next((cut for cut in cuts if len(cut) < 50 and _width(cut) <= 1.6), "…")


def _width(text: str) -> float:
    """The width of a label in inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    return text_to_path.get_text_width_height_descent(text, FontProperties(size=8), False)[0] / 72
