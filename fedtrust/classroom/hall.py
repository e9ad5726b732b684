"""Where cells are played: who of a cell was handed in is brought up and seated, and what goes wrong with him is an outcome."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Protocol

from fedtrust.classroom.cells import Planned, Seat, Table
from fedtrust.classroom.exercise import Exercise
from fedtrust.classroom.folder import About, labels
from fedtrust.classroom.sandbox.faults import SubmissionFault
from fedtrust.classroom.scoring import Fault, Outcome, Side
from fedtrust.classroom.submissions import Submission
from fedtrust.engine.workers import Executor
from fedtrust.interrupt import Stopped

#: Defences whose sandboxes stay up side by side in one thread, while attack after attack meets them.
BLOCK = 10
#: Bytes that a sandbox takes of its own (Python and torch, not what it shares with others).
SANDBOX = 300 * 2**20


class Player(Protocol):
    """A submission that is ready to play: one process in the sandbox, for as many games as there are."""

    def seat(self) -> Seat:
        """Return its place in a new game; nothing is left of earlier ones."""

    def close(self) -> None:
        """Leave no process behind."""


#: Brings a submission up. A `SubmissionFault` says that it cannot be; any other error is the host's.
Opener = Callable[[Submission, Exercise], Player]


class Crew:
    """The submissions that one thread has up: as many as it needs side by side, the one unused for longest makes room."""

    def __init__(self, open_: Opener, exercise: Exercise, most: int = BLOCK + 2) -> None:
        self._open, self._exercise, self._most = open_, exercise, most
        self._up: OrderedDict[tuple[str, Side], Player] = OrderedDict()
        self._lock, self._closed = threading.Lock(), False

    def seat(self, one: Submission) -> Seat:
        """Return a submission's place in a new game.

        Raises:
            Stopped: the crew was sent home in the meantime.
        """
        key = one.student, one.side
        with self._lock:
            if self._closed:
                raise Stopped
            if key not in self._up:
                while len(self._up) >= self._most:
                    self._up.popitem(last=False)[1].close()
                self._up[key] = self._open(one, self._exercise)
            self._up.move_to_end(key)
            return self._up[key].seat()

    def close(self) -> None:
        """Take everybody down, whatever they are at; nobody comes up again."""
        with self._lock:
            self._closed = True
            while self._up:
                self._up.popitem()[1].close()


class Hall:
    """Plays cells: finds out who of a cell was handed in, seats him, and makes an outcome of whatever goes wrong with him."""

    def __init__(self, about: About, table: Table, open_: Opener) -> None:
        self._about, self._table, self._open = about, table, open_
        names = labels(about.exercise, about.submissions)
        self._attacks = {names[s.student, s.side]: s for s in about.submissions if s.side != "defence"}
        self._defences = {names[s.student, s.side]: s for s in about.submissions if s.side == "defence"}
        # What can never be played need not be tried again in every cell.
        self._useless: dict[tuple[str, Side], Fault] = {
            (s.student, s.side): Fault(s.side, "unusable", s.problem) for s in about.submissions if s.problem
        }

    def crew(self) -> Crew:
        """Return a new crew, for a thread of its own."""
        return Crew(self._open, self._about.exercise)

    def play(self, cell: Planned, crew: Crew, executor: Executor) -> Outcome:
        """Play a cell.

        Raises:
            RunError: the host failed.
        """
        seats: dict[str, Seat] = {}
        handed = {"attack": self._attacks.get(str(cell.attack)), "defence": self._defences.get(cell.defence)}
        for one in handed.values():
            if one is not None and (one.student, one.side) in self._useless:
                return Outcome(*cell, fault=self._useless[one.student, one.side])
        try:
            outcome = self._played(cell, crew, executor, handed, seats)
        finally:
            for seat in seats.values():
                seat.leave()
        if outcome.fault is not None and outcome.fault.kind in ("unusable", "unsupported"):  # it will be in every other game
            one = handed["defence" if outcome.fault.side == "defence" else "attack"]
            if one is not None:
                self._useless[one.student, one.side] = outcome.fault
        return outcome

    def _played(
        self, cell: Planned, crew: Crew, executor: Executor, handed: Mapping[str, Submission | None], seats: dict[str, Seat]
    ) -> Outcome:
        """Seat who was handed in, into `seats`, and play; one that cannot be brought into the game is a fault of the cell."""
        coming: Submission | None = None
        try:
            for role, one in handed.items():
                if one is not None:
                    coming = one
                    seats[role] = crew.seat(one)
            return self._table.play(cell, executor, seats.get("attack"), seats.get("defence"))
        except SubmissionFault as fault:
            failed = next((role for role, seat in seats.items() if seat.fault is not None), None)
            who = coming if failed is None else handed[failed]
            return Outcome(*cell, fault=Fault("attack" if who is None else who.side, fault.kind, fault.sentence))
