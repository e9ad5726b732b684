"""Ctrl-C, SIGTERM and SIGHUP end a run the same way: at once, with the last checkpoint in place."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

#: Ctrl-C, what ends a job, and what a terminal that is closed sends.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
#: Seconds that a run gets to leave; a second Ctrl-C in this time would only keep it from saying how it stands.
_PATIENCE = 5.0


class Stopped(BaseException):
    """Raised in a training thread whose executor has closed or given it up."""


class _Interrupt:
    """Raises KeyboardInterrupt, but not again while the run is already on its way out."""

    def __init__(self) -> None:
        self._last = -_PATIENCE

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._last >= _PATIENCE:
            self._last = now
            raise KeyboardInterrupt


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into one KeyboardInterrupt while the block runs (in the main thread: no other gets signals).

    A signal that somebody else handles, or that the process was told to ignore, as SIGHUP under nohup, is left alone. `os._exit` means
    SystemExit in the meantime, see `_stays`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {how: signal.getsignal(how) for how in _SIGNALS}
    caught = [how for how, handler in before.items() if handler in (signal.SIG_DFL, signal.default_int_handler)]
    interrupt = _Interrupt()
    for how in caught:
        signal.signal(how, interrupt)
    try:
        with _stays():
            yield
    finally:
        for how in caught:
            signal.signal(how, before[how])


@contextlib.contextmanager
def _stays() -> Iterator[None]:
    """Make `os._exit` raise SystemExit in this process while the block runs; in a child that is forked meanwhile it ends that child.

    Behaviours, rules and probes run in this process. `os._exit(0)` in one of them would end the run then and there, with exit code 0 and
    without a word.
    """
    leave, here = os._exit, os.getpid()

    def stay(status: int) -> NoReturn:
        if os.getpid() != here:
            leave(status)
        raise SystemExit(status)

    os._exit = stay
    try:
        yield
    finally:
        os._exit = leave
