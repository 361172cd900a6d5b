"""The verdict for people: a table and sentences, on a terminal or as Markdown."""

import io
import re
from collections.abc import Iterator

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from torchnnfs.testing.estimate import ROUNDING
from torchnnfs.testing.judge import EXCESS_LIMIT, MODEL, Row
from torchnnfs.testing.outcome import BLIND, Outcome, plain

#: What the columns of the table mean.
LEGEND = (
    "Each row is compared with an exact result: NumPy in float64, the reference, or the same code\n"
    'in float64 ("own float64 run"). max ULP: the largest error in units in the\n'
    "last place; 0.5 at most is correctly rounded. bits equal: the share that is.\n"
    "isolated: the largest error over its bound, each layer on the input it got; chained: the\n"
    "same from the first input on. Up to 1, rounding explains the error. excess: the mean error\n"
    f"of a dense layer over that of plain sums; up to {EXCESS_LIMIT:g} is rounding."
)

#: The columns of the table; the first four and the last hold words.
WORDS = ("candidate", "device", "dtype", "layer", "verdict")
_NUMBERS = ("max |error|", "max ULP", "bits equal", "isolated", "chained", "excess")
HEADINGS = (*WORDS[:-1], *_NUMBERS, WORDS[-1])


def cells(row: Row) -> list[str]:
    """A row in words, under `HEADINGS`: what text, Markdown and HTML print."""
    # The model is held against a reference in perhaps another dtype: units mean nothing there.
    units = row.candidate != MODEL
    errors = (
        f"{row.max_abs:.1e}" if row.max_abs else "0",
        number(row.max_ulp) if units else "",
        f"{row.bit_equal:.1%}" if units else "",
        *map(number, (row.isolated_ratio, row.chained_ratio, row.excess)),
    )
    state = row.state if row.basis == ROUNDING else f"{row.state} ({row.basis})"
    return [*map(plain, (row.candidate, row.device, row.dtype, row.label, *errors, state))]


def number(value: float | None) -> str:
    """Two digits, or the order of magnitude; nothing for None."""
    if value is None:
        return ""
    return f"{value:.2f}" if value < 1e3 else f"{value:.0e}".replace("e+", "e")


def verdict(outcome: Outcome) -> str:
    """The outcome in one sentence, or two."""
    if (wrong := outcome.first_divergence) is not None:
        return plain(f"DISAGREES: {_where(wrong, 'is the first to differ')}: {wrong.reason}.")
    if (wrong := next((row for row in outcome.rows if not row.ok), None)) is not None:
        return plain(f"NOT JUDGED: {_where(wrong)}: {wrong.reason}.")
    row = max(outcome.rows, key=lambda row: row.bound_ratio)
    names = ", ".join(dict.fromkeys(f"{row.candidate} in {row.dtype}" for row in outcome.rows))
    within = (
        f"of {names} is within what rounding explains; the largest error is "
        f"{row.bound_ratio:.2f} of its bound ({_where(row)})."
    )
    if outcome.unjudged:
        no_help = all(each.startswith("the gradient") or each == BLIND for each in outcome.unjudged)
        hint = "" if no_help else " Give a reference for the output."
        return plain(
            f"AGREES AS FAR AS JUDGED: what was judged {within} {unjudged(outcome)}: a wrong "
            f"formula there is not noticed.{hint}"
        )
    uncalled = any(note.startswith("Never called") for note in outcome.notes)
    return plain(f"AGREES: every layer{' that was called' * uncalled} {within}")


def unjudged(outcome: Outcome) -> str:
    """What nothing independent judged."""
    return f"Nothing independent judged {', '.join(outcome.unjudged)}"


def _where(row: Row, what: str = "") -> str:
    where = f"{row.candidate} on {row.device} in {row.dtype}"
    if row.layer.startswith("(output)"):
        return f"{where}, the output of {row.kind} {what and 'differs'}".strip()
    return f"{where}, layer {row.label} {what}".strip()


def headline(outcome: Outcome) -> tuple[str, str]:
    """The kind of verdict ("good", "doubt", "bad"), and the verdict in a few words."""
    words = verdict(outcome).partition(":")[0].capitalize()
    if outcome.ok and outcome.proves_little and not outcome.unjudged:
        words += ", but this run proves little"
    return "bad" if not outcome.ok else "good" if words == "Agrees" else "doubt", words


def remarks(outcome: Outcome) -> list[str]:
    """What stands between the table and the verdict: accuracy, controls, notes."""
    lines = [*_accuracy(outcome), *_controls(outcome), *outcome.notes]
    if outcome.unjudged and not outcome.ok:  # else the verdict says it
        lines.append(f"{unjudged(outcome)}.")
    return [*map(plain, lines)]


def _accuracy(outcome: Outcome) -> Iterator[str]:
    """Who is closer to float64, from the first input to the last layer, in each dtype."""
    last: dict[str, dict[str, tuple[float, str]]] = {}
    for row in outcome.rows:
        if row.chained_ulp is not None:
            name, ratio = f"{row.candidate} on {row.device}", number(row.chained_ratio)
            words = f"{name} ({number(row.chained_ulp)} ULP, {ratio} of the bound)"
            last.setdefault(row.dtype, {})[name] = row.chained_ulp, words
    for dtype, found in last.items():
        if len(found) > 1:
            ranked = [words for _, words in sorted(found.values(), key=lambda each: each[0])]
            yield f"Closest to float64 at the end, in {dtype}: {', '.join(ranked)}."


def _controls(outcome: Outcome) -> Iterator[str]:
    said: dict[str, list[str]] = {"rejected": [], "indistinguishable": [], "passed": []}
    for control in outcome.controls:
        said[control.outcome].append(f"{control.name} ({control.reason})")
    if outcome.controls:
        words = f"{len(said['rejected'])} of {len(outcome.controls)} deliberately broken copies"
        words += " of the model rejected, each by the formula of its layer."
        if outcome.unjudged:
            words += f" They break layers with a formula, not {', '.join(outcome.unjudged)}."
        yield f"Controls: {words}"
    if said["indistinguishable"]:
        yield f"Indistinguishable here: {'; '.join(said['indistinguishable'])}."
    if outcome.proves_little:
        passed = f"broken copies passed as correct: {'; '.join(said['passed'])}."
        none = "no broken copy could be told from the model."
        yield f"THIS RUN PROVES LITTLE: {passed if said['passed'] else none}"


def show(outcome: Outcome, console: Console) -> None:
    """Print the table, one line for each candidate and layer, what it leaves out, the verdict."""
    grid = Table()
    for heading in HEADINGS:
        grid.add_column(heading, justify="left" if heading in WORDS else "right", no_wrap=True)
    for rows in outcome.by_candidate.values():
        grid.add_section()
        for row in rows:
            *words, state = cells(row)
            words[:3] = words[:3] if row is rows[0] else [""] * 3
            grid.add_row(*map(Text, words), Text(state, style="green" if row.ok else "bold red"))
    # Numbers that are cut off are of no use: on a narrow terminal the lines run over.
    natural = Measurement.get(console, console.options.update(width=500), grid).maximum
    width, console.width = console.width, max(console.width, natural)
    console.print(grid)
    console.width = width
    console.print(f"{LEGEND}\n", style="dim", soft_wrap=True)
    for remark in remarks(outcome):
        console.print(remark, markup=False, soft_wrap=True)
    style = {"good": "bold green", "doubt": "bold yellow", "bad": "bold red"}[headline(outcome)[0]]
    console.print(verdict(outcome), style=style, markup=False, soft_wrap=True)


def as_text(outcome: Outcome) -> str:
    """What `show` prints, as plain text."""
    buffer = io.StringIO()
    show(outcome, Console(file=buffer, width=120, color_system=None))
    return buffer.getvalue().rstrip()


def as_markdown(outcome: Outcome) -> str:
    """The verdict first, then the table and the rest, as for a pull request."""
    rules = [":--" if heading in WORDS else "--:" for heading in HEADINGS]
    lines = [map(_literal, HEADINGS), rules, *(map(_literal, cells(row)) for row in outcome.rows)]
    facts = ", ".join(f"{name} {fact}" for name, fact in outcome.environment.items())
    return "\n\n".join(
        [
            f"**{_literal(verdict(outcome))}**",
            "\n".join(f"| {' | '.join(line)} |" for line in lines),
            *(f"- {_literal(remark)}" for remark in remarks(outcome)),
            f"<sub>{_literal(plain(facts))}</sub>\n",
        ]
    )


def _literal(text: str) -> str:
    """Text that Markdown shows as it is: no table, emphasis, code, link or element of HTML."""
    return re.sub(r"[\\`*<|]|\](?=[(\[])|(?<!\w)_|_(?!\w)", r"\\\g<0>", text)
