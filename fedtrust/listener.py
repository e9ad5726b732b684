"""Who is told how a run goes."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Listener(Protocol):
    """Follows a run or a matrix.

    The cells of a matrix run side by side, each in a thread of its own: their calls alternate, but there is never more than one at a time.
    A KeyboardInterrupt that a call raises ends the run as Ctrl-C does.
    """

    def matrix_started(self, cells: Sequence[str], rounds: int) -> None:
        """Say which cells there are (one for a single run) and how many rounds each has."""

    def cell_started(self, name: str, labels: Mapping[str, Any], rounds: int, done_rounds: int) -> None:
        """Say that a cell begins, or goes on after `done_rounds`."""

    def round_done(self, name: str, record: Mapping[str, Any]) -> None:
        """Pass on the line of `rounds.jsonl`."""

    def cell_done(self, name: str, summary: Mapping[str, Any]) -> None:
        """Pass on a cell's summary."""

    def finished(self, summary: Mapping[str, Any]) -> None:
        """Pass on the summary of the whole."""

    def note(self, text: str) -> None:
        """Say something that the user should know."""


class SilentListener:
    """Listens and says nothing."""

    def matrix_started(self, cells: Sequence[str], rounds: int) -> None:
        """Ignore it."""

    def cell_started(self, name: str, labels: Mapping[str, Any], rounds: int, done_rounds: int) -> None:
        """Ignore it."""

    def round_done(self, name: str, record: Mapping[str, Any]) -> None:
        """Ignore it."""

    def cell_done(self, name: str, summary: Mapping[str, Any]) -> None:
        """Ignore it."""

    def finished(self, summary: Mapping[str, Any]) -> None:
        """Ignore it."""

    def note(self, text: str) -> None:
        """Ignore it."""


class OneAtATime:
    """Passes everything on to another listener, from one thread at a time."""

    def __init__(self, listener: Listener) -> None:
        self._listener, self._lock = listener, threading.RLock()

    def matrix_started(self, cells: Sequence[str], rounds: int) -> None:
        """See `Listener`."""
        with self._lock:
            self._listener.matrix_started(cells, rounds)

    def cell_started(self, name: str, labels: Mapping[str, Any], rounds: int, done_rounds: int) -> None:
        """See `Listener`."""
        with self._lock:
            self._listener.cell_started(name, labels, rounds, done_rounds)

    def round_done(self, name: str, record: Mapping[str, Any]) -> None:
        """See `Listener`."""
        with self._lock:
            self._listener.round_done(name, record)

    def cell_done(self, name: str, summary: Mapping[str, Any]) -> None:
        """See `Listener`."""
        with self._lock:
            self._listener.cell_done(name, summary)

    def finished(self, summary: Mapping[str, Any]) -> None:
        """See `Listener`."""
        with self._lock:
            self._listener.finished(summary)

    def note(self, text: str) -> None:
        """See `Listener`."""
        with self._lock:
            self._listener.note(text)
