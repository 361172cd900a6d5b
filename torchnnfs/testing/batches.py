"""What the command line does with a long input: batches for its processes, a progress line."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import itemgetter
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from torchnnfs.testing.processes import Processes
from torchnnfs.testing.values import convert, leaves

#: Rows that are judged at a time: with more of them memory does not grow.
ROWS = 30_000


def in_batches(input: Any, group: Processes, update: Callable[..., object]) -> Any:
    """The input in batches, where it is long or several processes share it.

    It stays whole where its arrays have other lengths: then they have no common rows. `update` is
    what `shown` gives.
    """
    rows, *others = {len(each) if each.ndim else 1 for each in leaves(input).values()} or {1}
    size = min(ROWS, -(-rows // group.size))
    if others or size >= rows:
        return input

    def batches() -> Iterator[Any]:
        for start in range(0, rows, size):
            yield convert(input, Tensor, itemgetter(slice(start, start + size)))
            update(completed=min(start + size, rows), total=rows)
            group.check()
        group.meet()  # behind it, what processes do together may take a minute and no more

    return batches()


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        rows = f"{task.completed:,.0f} of {task.total:,.0f} rows" if task.total else ""
        return Text(f"{rows}, {task.speed:,.0f}/s" if task.speed else rows)


@contextmanager
def shown() -> Iterator[Callable[..., object]]:
    """A line on a terminal with the step, the rows, their rate and the time left.

    Gives a function of the step's `description`, or of the rows `completed` and in `total`.
    """
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), _Rate(), TimeRemainingColumn()
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        yield partial(bar.update, bar.add_task("", total=None))
