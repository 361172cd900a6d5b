"""What the command line does with a long input: batches, processes, a progress line."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch import Tensor

from torchnnfs.testing.judge import rows_in
from torchnnfs.testing.models import convert, leaves

#: Rows that are judged at a time: with more of them memory does not grow.
ROWS = 30_000


def in_batches(
    input: Any, group: dist.ProcessGroup | None, done: Callable[[int], object] = lambda rows: None
) -> Any:
    """The input in batches, where it is long or several processes share it.

    It stays whole where its arrays have other lengths: then they have no common rows. `done` is
    called with the number of rows of each batch behind it.
    """
    lengths = {len(each) if each.ndim else 1 for each in leaves(input).values()}
    rows = rows_in(input)
    size = min(ROWS, -(-rows // (group.size() if group else 1)))
    if len(lengths) > 1 or size >= rows:
        return input

    def batch(start: int) -> Any:
        return convert(input, Tensor, lambda tensor: tensor[start : start + size])

    def batches() -> Iterator[Any]:
        for start in range(0, rows, size):
            yield batch(start)
            done(min(size, rows - start))

    return batches()


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.completed:,.0f} of {task.total:,.0f} rows, {task.speed or 0:,.0f}/s")


@contextmanager
def shown(input: Any) -> Iterator[tuple[Callable[[str], object], Callable[[int], object]]]:
    """A line on a terminal with the step, the rows, their rate and the time left.

    Gives two functions: one takes the words for a step, one the number of rows that are done.
    """
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), _Rate(), TimeRemainingColumn()
    hidden = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=rows_in(input))
        yield (
            lambda words: bar.update(task, description=words),
            lambda rows: bar.advance(task, rows),
        )


@contextmanager
def processes() -> Iterator[dist.ProcessGroup | None]:
    """The processes of torchrun, where it started several."""
    # Some clusters set WORLD_SIZE alone; torchrun says as well where the processes meet.
    if "MASTER_ADDR" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        yield None
        return
    # Imported after the group is made it would keep the group, and its threads, to the end.
    import_module("torch.distributed.nn")
    dist.init_process_group("gloo")
    try:
        yield dist.group.WORLD
        dist.barrier()  # torchrun ends all processes when the first of them exits with 1
    finally:
        dist.destroy_process_group()
