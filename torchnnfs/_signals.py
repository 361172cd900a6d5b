"""A signal ends the command line with one line and no traceback, from the first import on."""

import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


def leave(number: int, frame: FrameType | None) -> NoReturn:
    """Leave at once, for code that is being imported could swallow an exception."""
    os.write(2, f"torchnnfs: {WORDS[signal.Signals(number)]}\n".encode())
    os._exit(128 + number)


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """Unwind, so that files that are being written are removed."""
    raise KeyboardInterrupt(number)


def handle(handler: Callable[[int, FrameType | None], NoReturn]) -> dict[signal.Signals, Any]:
    """Set a handler for both signals, unless the parent ignores one; what was set before."""
    return {
        each: signal.signal(each, handler)
        for each in WORDS
        if signal.getsignal(each) is not signal.SIG_IGN
    }


_program = os.path.basename((sys.argv or [""])[0])
if _program == "torchnnfs" or (_program == "-m" and "torchnnfs" in sys.orig_argv):
    handle(leave)
