"""Who is told how a run goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Listener(Protocol):
    """Follows a run or a matrix; every call comes from the thread that plays it."""

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
