"""The host's side of a sandbox: starts its process, and ends it with everything in it; what is said during a game is `game`'s.

A `Sandbox` holds one submission and plays one game of it at a time; Python and torch are loaded once, a game costs a fork.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping
from typing import Any

from fedtrust.classroom.sandbox import backends, channel, places
from fedtrust.classroom.sandbox.game import ENDING, Game, Report
from fedtrust.classroom.sandbox.limits import Limits
from fedtrust.classroom.sandbox.waiting import Wait
from fedtrust.errors import RunError

_CHUNK = 1 << 16


class Sandbox:
    """One submission's sandbox, started when it is first needed.

    Args:
        backend: a backend's name, or `auto`.
        limits: what a game may use.
        filtered: whether the system-call filter holds; only a test of the backend by itself goes without.

    Raises:
        RunError: no backend works here; says what to install.
    """

    def __init__(self, backend: str = "auto", limits: Limits | None = None, *, filtered: bool = True) -> None:
        self.limits = limits or Limits()
        self.backend = backends.pick(backend)
        if not filtered and self.backend.settings()["landlock"]:
            raise RunError("Landlock without the system-call filter keeps nobody in")
        self._filtered = filtered
        self._process: subprocess.Popen[bytes] | None = None
        self._ours: dict[str, int] = {}
        self._owner = os.getpid()
        self._current: Game | None = None
        self.facts: dict[str, Any] = {}
        #: What the last game cost, also one whose submission could not be loaded.
        self.report = Report()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()

    @property
    def running(self) -> bool:
        """Whether its process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it, if it does not run.

        Raises:
            RunError: it does not come up, which is no submission's fault.
        """
        if self.running:
            return
        self.close()
        pairs = {"orders": os.pipe(), "inward": os.pipe(), "events": os.pipe(), "outward": os.pipe(), "printed": os.pipe()}
        theirs = {name: pair[0 if name in ("orders", "inward") else 1] for name, pair in pairs.items()}
        self._ours = {name: pair[1 if name in ("orders", "inward") else 0] for name, pair in pairs.items()}
        try:
            inside = {name: theirs[name] for name in ("orders", "inward", "events", "outward")}
            command = backends.launcher(self.backend, self.limits, fds=inside, filtered=self._filtered)
            self._process = subprocess.Popen(  # noqa: S603  # our own command
                command,
                stdin=subprocess.DEVNULL,
                stdout=theirs["printed"],
                stderr=theirs["printed"],
                pass_fds=tuple(inside.values()),
                env=places.environment(),
                cwd="/",
                start_new_session=True,
            )
        finally:
            for fd in theirs.values():
                os.close(fd)
        self._owner = os.getpid()
        for fd in self._ours.values():
            os.set_blocking(fd, False)
        waiting = Wait(self._ours, time.monotonic() + self.limits.start_seconds, self.limits.output)
        event = waiting.for_event("ready")
        if event is None:
            self.close()
            raise RunError(f"the sandbox ({self.backend.name}) does not come up: {waiting.output.decode(errors='replace').strip()[-300:]}")
        self.facts = event

    def game(self, source: str, file: str, role: str, *, params: Mapping[str, Any] | None = None, setting: Any = None) -> Game:
        """Start a game: a fresh process that loads the submission. There is one at a time: the one before is over now.

        Args:
            source: the submission's text.
            file: its name, for its author.
            role: `attack`, `defence`, `audit` or `evasion`.
            params: values for the parameters that it declares.
            setting: what is learnt and how, as plain data (see `fedtrust.classroom.sandbox.crossing`).

        Raises:
            SubmissionFault: it cannot be loaded. The game is over.
            RunError: the sandbox does not come up.
        """
        if self._current is not None:
            self._current.end()
        self.start()
        game = self._current = Game(self, self._ours)
        self.report = game.report
        game.load({"source": source, "file": file, "role": role, "params": dict(params or {}), "setting": setting})
        return game

    def order(self, data: Mapping[str, Any]) -> None:
        """Tell its supervisor something: to begin a game, or to end it."""
        # An order is far smaller than a pipe, and its reader never sees a submission.
        with contextlib.suppress(BrokenPipeError, BlockingIOError):
            os.write(self._ours["orders"], channel.pack(data))

    def close(self) -> None:
        """End it and everything in it; does not return before that is done."""
        process, self._process = self._process, None
        if self._current is not None:
            self._current.over = True  # its pipes are closed: their numbers may soon be another's
            self._current = None
        if process is not None and self._owner == os.getpid():
            _kill(process)
            until = time.monotonic() + ENDING
            for name in ("events", "outward", "printed"):
                with contextlib.suppress(OSError):
                    _drained(self._ours[name], until)
        for fd in self._ours.values():
            with contextlib.suppress(OSError):
                os.close(fd)
        self._ours = {}


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a sandbox's first process and its group; the kernel takes the rest with them (die-with-parent, the process namespace)."""
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.wait()


def _drained(fd: int, until: float) -> None:
    """Wait until every process that could write to the pipe is gone."""
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        while time.monotonic() < until:
            if selector.select(max(0.0, until - time.monotonic())) and not os.read(fd, _CHUNK):
                return
