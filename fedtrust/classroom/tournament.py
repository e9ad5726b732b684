"""A tournament: every attack against every defence, the house's among them, cell by cell into one folder that can be gone on with.

The folder holds `exercise.toml`, `tournament.json` (what is played: phase, seeds, who handed in what), `submissions/` (copies),
`cells.jsonl` (a line a cell, appended once it is played) and `status.json`. A cell's result depends on its labels and seed alone, so the
leaderboard of a tournament that was killed and gone on with is that of one that was not. What a submission does wrong is an outcome of its
cell; what the host does wrong (a full disk, a sandbox that does not come up) ends the tournament, which can be resumed.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fedtrust import memory
from fedtrust.classroom.cells import Planned, Table
from fedtrust.classroom.exercise import Exercise
from fedtrust.classroom.folder import CELLS, About, labels, load, mend, outcomes, record
from fedtrust.classroom.hall import BLOCK, SANDBOX, Crew, Hall, Opener
from fedtrust.classroom.judging import judge
from fedtrust.classroom.scoring import Board, Field, Outcome
from fedtrust.classroom.submissions import Submission
from fedtrust.engine import threads, workers
from fedtrust.engine.workers import Executor
from fedtrust.errors import RunError, said
from fedtrust.interrupt import stoppable
from fedtrust.matrix import Gate, side_by_side
from fedtrust.runs import RunDirectory


class Progress(Protocol):
    """Is told how a tournament goes; calls come from one thread at a time."""

    def began(self, cells: int, done: int) -> None:
        """Say how many cells there are, and how many of them were played before."""

    def played(self, cell: Planned, outcome: Outcome, left: int) -> None:
        """Pass on a cell that is done."""


class Silent:
    """Says nothing."""

    def began(self, cells: int, done: int) -> None:
        """Ignore it."""

    def played(self, cell: Planned, outcome: Outcome, left: int) -> None:
        """Ignore it."""


def plan(who: Field, partitions: Sequence[str], seeds: int, needed: set[str] | None = None) -> list[list[Planned]]:
    """Return the cells in rows, one a job: an attack against at most `BLOCK` handed-in defences, on all partitions and seeds.

    The house's defences need no sandbox, and come with the first block.

    Args:
        who: who takes part.
        partitions: their labels.
        seeds: how many.
        needed: only what it takes to score these entries: their own cells, those without an attack, and those against plain FedAvg.
    """
    handed = [name for name, house in who.defences.items() if not house]
    first = [name for name in who.defences if name not in handed[BLOCK:]] or ["-"]
    blocks = [first, *(handed[start : start + BLOCK] for start in range(BLOCK, len(handed), BLOCK))]
    attacks: list[str | None] = [*([None] if who.side == "attack" else []), *who.attacks]
    rows = []
    for block in blocks:
        for attack in attacks:
            row = [
                Planned(attack, defence, partition, seed)
                for defence in block
                if needed is None or attack is None or attack in needed or defence in needed or defence == who.reference
                for partition in partitions
                for seed in range(seeds)
            ]
            rows.append(row)
    return [row for row in rows if row]


@dataclass(frozen=True)
class Result:
    """How a tournament ended: `finished` or `interrupted`, and how many cells of how many are played."""

    status: str
    directory: Path
    done: int
    cells: int


def run(out: Path, open_: Opener, *, count: int | None = None, tell: Progress | None = None) -> Result:
    """Play what is left of the tournament in a folder.

    Args:
        out: made by `create`.
        open_: brings submissions up.
        count: how many cells are played side by side; by default one a core, as far as there is memory for the sandboxes.
        tell: is told how it goes.

    Raises:
        InputError: it is no tournament, or another process plays it.
        RunError: the host failed; it can be gone on with.
    """
    about, directory = load(out), RunDirectory(out)
    table = Table(about.exercise, about.seeds, hidden=about.phase != "public")
    with ExitStack() as stack:
        stack.enter_context(stoppable())
        stack.enter_context(directory.lock())
        stack.enter_context(threads.using(threads.SERVER))
        mend(out)
        known = {o.key for o in outcomes(out)}
        rows = plan(about.field(), table.partitions, len(about.seeds))
        cells = sum(map(len, rows))
        left = [[c for c in row if c not in known] for row in rows]
        session = _Session(about, table, open_, directory, tell or Silent(), cells, len(known))
        directory.status("running")
        try:
            session.play([row for row in left if row], count or at_once(about))
        except KeyboardInterrupt:
            with contextlib.suppress(RunError):
                directory.status("interrupted", "interrupted; go on with --resume")
            return Result("interrupted", out, session.done, cells)
        except Exception as error:
            with contextlib.suppress(RunError):
                directory.status("failed", said(error))
            raise
        directory.status("finished")
    return Result("finished", out, session.done, cells)


def at_once(about: About) -> int:
    """Return how many cells to play side by side if nobody says: one a core, as far as there is memory for the sandboxes of each."""
    defences = sum(one.side == "defence" for one in about.submissions)
    each = (min(BLOCK, defences) + 2) * SANDBOX
    free = memory.free()
    return threads.cores() if free is None else max(1, min(threads.cores(), free // (2 * each)))


class _Session:
    """The threads, crews and the executor of a tournament that is being played."""

    def __init__(self, about: About, table: Table, open_: Opener, directory: RunDirectory, tell: Progress, cells: int, done: int) -> None:
        self._hall, self._directory, self._tell = Hall(about, table, open_), directory, tell
        self._gate, self._lock = Gate(), threading.Lock()
        self._crews: dict[int, Crew] = {}
        self._cells, self.done = cells, done
        self._deadline = about.exercise.matrix(about.seeds[:1]).engine.deadline

    def play(self, rows: Sequence[Sequence[Planned]], width: int) -> None:
        """Play the rows, `width` at once."""
        self._tell.began(self._cells, self.done)
        if not rows:
            return
        executor = workers.make("local", width, None, self._deadline, 1)

        def halt() -> None:
            self._gate.shut()
            executor.close()

        with self._taken_down(executor):
            side_by_side(len(rows), min(width, len(rows)), lambda place: self._row(rows[place], executor), lambda _, __: None, halt)

    @contextlib.contextmanager
    def _taken_down(self, executor: Executor) -> Iterator[None]:
        try:
            yield
        finally:
            executor.close()
            with self._lock:
                crews = list(self._crews.values())
            for crew in crews:
                with contextlib.suppress(Exception):  # a thread that was interrupted may be at it
                    crew.close()

    def _row(self, row: Sequence[Planned], executor: Executor) -> None:
        crew = self._crew()
        for cell in row:
            outcome = self._hall.play(cell, crew, executor)
            with self._lock:
                with self._gate.writing():
                    self._directory.append(CELLS, [record(outcome)])
                self.done += 1
                self._tell.played(cell, outcome, self._cells - self.done)

    def _crew(self) -> Crew:
        me = threading.get_ident()
        with self._lock:
            if me not in self._crews:
                self._crews[me] = self._hall.crew()
            return self._crews[me]


def board(about: About, found: Sequence[Outcome]) -> Board:
    """Judge what was played."""
    return judge(about.field(), found, about.exercise.scoring.rules())


def tried(
    exercise: Exercise, one: Submission, open_: Opener, seeds: Sequence[int], tell: Progress | None = None
) -> tuple[About, list[Outcome]]:
    """Play one submission against the house on public seeds, as a tournament would, and keep nothing.

    Args:
        exercise: the exercise.
        one: the submission, where it lies.
        open_: brings it up.
        seeds: some of the public ones.
        tell: is told how it goes.
    """
    about = About(exercise, "public", "", list(seeds), "", [one])
    table = Table(exercise, about.seeds, hidden=False)
    hall, name = Hall(about, table, open_), labels(exercise, [one])[one.student, one.side]
    rows = plan(about.field(), table.partitions, len(about.seeds), {name})
    cells = [cell for row in rows for cell in row]
    listener, found = tell or Silent(), []
    listener.began(len(cells), 0)
    crew, executor = hall.crew(), workers.make("local", 1, None, 600.0, 1)
    try:
        for number, cell in enumerate(cells, 1):
            found.append(hall.play(cell, crew, executor))
            listener.played(cell, found[-1], len(cells) - number)
    finally:
        crew.close()
        executor.close()
    return about, found
