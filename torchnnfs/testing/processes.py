"""The processes that torchrun started: they wait for each other, and notice when one stops."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from importlib import import_module

import torch
import torch.distributed as dist

#: A process that says nothing for so long has stopped; how long all may take for what they share.
SILENCE, TOGETHER = timedelta(seconds=15), timedelta(seconds=60)

_FAILED, _END = -1, sys.maxsize
_ELSEWHERE = "another process has failed"


class Processes:
    """One process, or several. A thread of each says several times a second how far it is.

    So a process may work on a batch for hours, and one that was killed or halted is found out.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.rank, self.size = (group.rank(), group.size()) if group else (0, 1)
        self._mine = self._least = 0  # to how many meetings this process, and all, have come
        self._lost = ""
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        stage = torch.tensor(0)
        try:
            beats = dist.new_group(timeout=SILENCE) if self.group else None
            while self.group and _FAILED < self._least < _END:
                dist.all_reduce(stage.fill_(self._mine), dist.ReduceOp.MIN, beats)
                self._least = int(stage)
                time.sleep(0.05)
        except RuntimeError as error:
            self._lost = stopped(self.size, error)

    def check(self) -> None:
        """Go on only while all others do; a RuntimeError where one has failed or stopped."""
        if self._lost or self._least == _FAILED:
            raise RuntimeError(self._lost or _ELSEWHERE)

    def meet(self) -> None:
        """Wait until all others are here, however long they work; raises as `check` does."""
        self._mine += 1
        while self.group and self._least < self._mine:
            self.check()
            time.sleep(0.02)

    def leave(self, stage: int = _FAILED) -> None:
        """Tell the others, whose threads end with this one's."""
        self._mine = stage
        self._thread.join()

    def agreed(self, status: int, message: str) -> tuple[int, str]:
        """The exit status of all, and the message that this process has to print."""
        self.leave(_FAILED if message else _END)
        if self.group is None or self._lost:
            return status, message
        ends = [(status, message)] * self.size
        try:
            dist.all_gather_object(ends, (status, message))
        except RuntimeError:  # nobody else may be left to speak
            return status, message
        failed = [end for end in ends if end[1] and _ELSEWHERE not in end[1]]
        status, message = (failed or ends)[0]
        return status, "" if self.rank else message


def stopped(size: int, error: RuntimeError) -> str:
    """That processes have lost each other, in one line."""
    words = " ".join(str(error).split())[:200]
    return f"compare expects {size} processes to the end, but one of them has stopped: {words}"


@contextmanager
def processes() -> Iterator[Processes]:
    """The processes of torchrun, where it started several."""
    # Some clusters set WORLD_SIZE alone; torchrun says as well where the processes meet.
    if "MASTER_ADDR" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        yield Processes(None)
        return
    # Imported after the group is made it would keep the group, and its threads, to the end.
    import_module("torch.distributed.nn")
    dist.init_process_group("gloo", timeout=TOGETHER)
    together = Processes(dist.group.WORLD)
    try:
        together.meet()  # all are connected
        yield together
    finally:
        together.leave()
        dist.destroy_process_group()
