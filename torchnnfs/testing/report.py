"""The verdict for people: a table and a sentence."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from torchnnfs.testing.comparison import Comparison, Row


CAPTION = (
    "Candidates: eager is torch as it is, numpy the book's NumPy (float32, after nnfs.init()).\n"
    "The reference is NumPy in float64. bits equal: share of elements that are its correctly\n"
    "rounded results. isolated: largest error over its bound, each layer on the input it really\n"
    "got. chained: the same from the first input on. Up to 1, rounding explains the error;\n"
    "near 0 a result may be off by many ULP (units in the last place) and still be right."
)


def table(comparison: Comparison) -> Table:
    """One line for each candidate and layer."""
    grid = Table(caption=CAPTION, caption_justify="left")
    for heading in ("candidate", "device", "dtype", "layer"):
        grid.add_column(heading, no_wrap=True)
    for heading in ("max |error|", "max ULP", "bits equal", "isolated", "chained"):
        grid.add_column(heading, justify="right", no_wrap=True)
    grid.add_column("verdict", no_wrap=True)
    before: tuple[str, str, str] | None = None
    for row in comparison.rows:
        now = (row.candidate, row.device, row.dtype)
        if before not in (None, now):
            grid.add_section()
        grid.add_row(
            *(now if now != before else ("", "", "")),
            label(row),
            f"{row.max_abs:.1e}",
            f"{row.max_ulp:.2f}" if row.max_ulp < 1e4 else f"{row.max_ulp:.0e}",
            f"{row.bit_equal:.1%}",
            _ratio(row.isolated_ratio),
            "" if row.chained_ratio is None else _ratio(row.chained_ratio),
            "[green]ok[/]" if row.ok else "[bold red]differs[/]",
        )
        before = now
    return grid


def label(row: Row) -> str:
    """The layer as the table names it: its path and its type."""
    return f"{row.layer} {row.kind}".strip()


def _ratio(ratio: float) -> str:
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


def show(comparison: Comparison, console: Console) -> None:
    """Print the table, what it leaves out, and the verdict."""
    console.print(table(comparison))
    for note in comparison.notes:
        console.print(note, markup=False, soft_wrap=True)
    console.print(verdict(comparison), markup=False, soft_wrap=True)


def as_text(comparison: Comparison) -> str:
    """What `show` prints, as plain text."""
    buffer = io.StringIO()
    show(comparison, Console(file=buffer, width=120, color_system=None))
    return buffer.getvalue().rstrip()
