"""The verdict for people: a table and sentences, on a terminal or as Markdown."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from torchnnfs.testing.comparison import Comparison, Row

#: What the columns of the table mean.
LEGEND = (
    "The reference is NumPy in float64. bits equal: share of elements that are its result,\n"
    "correctly rounded. isolated: largest error over its bound, each layer on the input it got;\n"
    "chained: the same from the first input on. Up to 1, rounding explains the error; near 0 a\n"
    "result may be many ULP (units in the last place) off and still be right. Candidate numpy\n"
    "is the book's NumPy, in float32 after nnfs.init()."
)


_LEFT = ("candidate", "device", "dtype", "layer", "verdict")
_HEADINGS = (*_LEFT[:4], "max |error|", "max ULP", "bits equal", "isolated", "chained", "verdict")


def _cells(row: Row) -> list[str]:
    """A row in words, under `_HEADINGS`."""
    said = "ok" if row.ok else "differs"
    return [
        row.candidate,
        row.device,
        row.dtype,
        label(row),
        f"{row.max_abs:.1e}",
        f"{row.max_ulp:.2f}" if row.max_ulp < 1e4 else f"{row.max_ulp:.0e}",
        f"{row.bit_equal:.1%}",
        _ratio(row.isolated_ratio),
        _ratio(row.chained_ratio),
        said if row.basis == "rounding" else f"{said} (bound: {row.basis})",
    ]


def table(comparison: Comparison) -> Table:
    """One line for each candidate and layer."""
    grid = Table()
    for heading in _HEADINGS:
        justify: Literal["left", "right"] = "left" if heading in _LEFT else "right"
        grid.add_column(heading, justify=justify, no_wrap=True)
    before: list[str] = []
    for row in comparison.rows:
        cells = _cells(row)
        now = cells[:3]
        if before and now != before:
            grid.add_section()
        shown = [*(now if now != before else [""] * 3), *cells[3:]]
        style = "green" if row.ok else "bold red"
        grid.add_row(*map(Text, shown[:-1]), Text(shown[-1], style=style))
        before = now
    return grid


def label(row: Row) -> str:
    """The layer as the table names it: its path and its type."""
    return f"{row.layer} {row.kind}".strip()


def _ratio(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio:.2f}" if ratio < 1e3 else f"{ratio:.0e}"


def verdict(comparison: Comparison) -> str:
    """The outcome in one sentence."""
    row = comparison.first_divergence
    if row is None:
        row = max(comparison.rows, key=lambda row: row.bound_ratio)
        names = dict.fromkeys(f"{row.candidate} in {row.dtype}" for row in comparison.rows)
        return (
            f"AGREES: every layer of {', '.join(names)} is within what rounding explains; the "
            f"largest error is {row.bound_ratio:.2f} of it ({_where(row)})."
        )
    return (
        f"DISAGREES: {_where(row)} is the first to differ: {row.worst.value:.9g} at "
        f"{list(row.worst.index)} where NumPy gives {row.worst.expected:.9g}, "
        f"{_ratio(row.bound_ratio)} times what rounding explains."
    )


def _where(row: Row) -> str:
    return f"{row.candidate} on {row.device} in {row.dtype}, layer {label(row)}"


def remarks(comparison: Comparison) -> list[str]:
    """What stands between the table and the verdict: accuracy, controls, notes."""
    return [*_accuracy(comparison), *_controls(comparison), *comparison.notes]


def _accuracy(comparison: Comparison) -> list[str]:
    """Who is closer to float64, from the first input to the last layer, in each dtype."""
    last: dict[str, dict[str, Row]] = {}
    for row in comparison.rows:
        if row.chained_ulp is not None:
            last.setdefault(row.dtype, {})[f"{row.candidate} on {row.device}"] = row
    return [
        f"Closest to float64 at the end, in {dtype}: "
        + ", ".join(
            f"{name} ({row.chained_ulp:.2f} ULP, {_ratio(row.chained_ratio)} of the bound)"
            for name, row in sorted(rows.items(), key=lambda each: each[1].chained_ulp or 0.0)
        )
        + "."
        for dtype, rows in last.items()
        if len(rows) > 1
    ]


def _controls(comparison: Comparison) -> list[str]:
    if not comparison.controls:
        return []
    by_outcome: dict[str, list[str]] = {}
    for control in comparison.controls:
        by_outcome.setdefault(control.outcome, []).append(f"{control.name} ({control.reason})")
    rejected, total = len(by_outcome.get("rejected", [])), len(comparison.controls)
    lines = [f"Controls: {rejected} of {total} deliberately broken twins of this network rejected."]
    if "indistinguishable" in by_outcome:
        lines.append(f"Indistinguishable here: {'; '.join(by_outcome['indistinguishable'])}.")
    if "passed" in by_outcome:
        lines.append(
            "THIS RUN PROVES LITTLE: broken twins passed as correct: "
            f"{'; '.join(by_outcome['passed'])}."
        )
    elif comparison.proves_little:
        lines.append("THIS RUN PROVES LITTLE: no broken twin could be told from the network.")
    return lines


def show(comparison: Comparison, console: Console) -> None:
    """Print the table, what it leaves out, and the verdict."""
    # Numbers that are cut off are of no use: on a narrow terminal the lines run over.
    grid = table(comparison)
    natural = Measurement.get(console, console.options.update(width=500), grid).maximum
    width, console.width = console.width, max(console.width, natural)
    console.print(grid)
    console.width = width
    console.print(f"{LEGEND}\n", style="dim", soft_wrap=True)
    for remark in remarks(comparison):
        console.print(remark, markup=False, soft_wrap=True)
    style = "bold green" if comparison.ok else "bold red"
    console.print(verdict(comparison), style=style, markup=False, soft_wrap=True)


def as_text(comparison: Comparison) -> str:
    """What `show` prints, as plain text."""
    buffer = io.StringIO()
    show(comparison, Console(file=buffer, width=120, color_system=None))
    return buffer.getvalue().rstrip()


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|")


def as_markdown(comparison: Comparison) -> str:
    """The verdict first, then the table and the rest, as for a pull request."""
    rules = [":--" if heading in _LEFT else "--:" for heading in _HEADINGS]
    lines = [_HEADINGS, rules, *(_cells(row) for row in comparison.rows)]
    facts = ", ".join(f"{name} {fact}" for name, fact in comparison.environment.items())
    return "\n\n".join(
        [
            f"**{verdict(comparison)}**",
            "\n".join(f"| {' | '.join(map(_escaped, line))} |" for line in lines),
            *(f"- {remark}" for remark in remarks(comparison)),
            f"<sub>{facts}</sub>\n",
        ]
    )
