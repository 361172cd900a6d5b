"""What a comparison found: all that a report is made of."""

from dataclasses import dataclass, field

from torchnnfs.testing.controls import Control
from torchnnfs.testing.judge import DIFFERS, Row
from torchnnfs.testing.precision import Array

#: What is not judged where the bounds are as large as the numbers.
BLIND = "the output, which rounding may change by more than its size"


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a comparison found."""

    rows: tuple[Row, ...]  # one for each candidate and call of a layer, in order
    unjudged: tuple[str, ...]  # labels of modules with their own forward and without a reference
    controls: tuple[Control, ...]  # what became of deliberately broken copies of the model
    environment: dict[str, str]  # versions, devices and settings that the numbers depend on
    notes: tuple[str, ...]  # what a reader has to know beside the rows
    input: Array = field(repr=False)  # the model's; the first array of several
    output: Array = field(repr=False)  # of the first candidate; the first array of several

    @property
    def ok(self) -> bool:
        """Whether every row is: what was judged agrees; see `unjudged`."""
        return all(row.ok for row in self.rows)

    @property
    def proves_little(self) -> bool:
        """Whether the controls say so: one passed as correct, or none could be told apart."""
        outcomes = [control.outcome for control in self.controls]
        return bool(outcomes) and ("passed" in outcomes or "rejected" not in outcomes)

    @property
    def first_divergence(self) -> Row | None:
        """The first row that differs, in order of candidates and layers."""
        return next((row for row in self.rows if row.state == DIFFERS), None)

    @property
    def by_candidate(self) -> dict[str, list[Row]]:
        """The rows of each candidate, by its name, device and dtype."""
        grouped: dict[str, list[Row]] = {}
        for row in self.rows:
            name = plain(f"{row.candidate} on {row.device} in {row.dtype}")
            grouped.setdefault(name, []).append(row)
        return grouped


def plain(text: str) -> str:
    """One line that commands no terminal: characters that are not printable are escaped."""
    shown = (char if char.isprintable() else ascii(char)[1:-1] for char in text)
    return "".join(shown)
