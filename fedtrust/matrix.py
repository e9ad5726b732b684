"""The cells of a matrix side by side: a few threads drive rounds, and the chunks of all of them go to the same workers.

A cell's bits do not depend on what runs beside it: all it draws comes from its own streams, all it computes runs on a number of threads
that is set for its own thread, and what cells share (the samples) nobody writes on.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from fedtrust import memory, records
from fedtrust.engine import threads
from fedtrust.errors import InputError, RunError, said
from fedtrust.interrupt import Stopped
from fedtrust.layout import Layout
from fedtrust.listener import Listener
from fedtrust.probes.base import Artefact
from fedtrust.runs import Checkpoint, RunDirectory, read_json, read_status, write_atomic, write_json
from fedtrust.scenario import Cell, Scenario
from fedtrust.scenario_fits import marked
from fedtrust.setup import build, unfit

T = TypeVar("T")

#: More cells at once than this only wait for each other: the rounds of all of them are driven by one process.
MOST = 64
#: What cells side by side may use of the memory that is free.
_SHARE = 0.5
#: Seconds that the cells get to come to their next step when the matrix is interrupted.
_PATIENCE = 0.5
#: Seconds between two writings of the summary while the matrix is played; each lists every cell.
_EVERY = 5.0


def at_once(cells: Sequence[Cell], workers: int, *, local: bool) -> int:
    """Return how many of these cells to play side by side if nobody says: enough to keep the workers busy, as far as there is memory.

    Args:
        cells: what is left to play.
        workers: how many train; with a cell for each they are all busy even if no cell has more than one chunk a round.
        local: whether they share this machine's cores with the servers. Elsewhere, half as many cells more keep workers busy while the
            servers of others aggregate and measure.
    """
    wanted = max(1, min(len(cells), MOST, workers if local else workers + (workers + 1) // 2))
    free = memory.free()
    if wanted == 1 or free is None:
        return wanted
    needs = 1
    for cell in {c.labels["strategies"]: c for c in reversed(cells)}.values():
        with contextlib.suppress(Exception):  # what is wrong with a cell it will say itself
            needs = max(needs, memory.server(build(cell.scenario), cell.scenario.clients.cohort))
    return max(1, min(wanted, int(_SHARE * free) // needs))


def feasible(scenario: Scenario) -> list[Cell]:
    """Return the cells of a matrix, those that are not played with the reason: their strategy, or something in them and the model.

    Raises:
        InputError: none is left.
    """
    cells = scenario.cells()
    if scenario.sweep is None or scenario.sweep.infeasible != "skip":
        return cells
    try:
        skipped = unfit(scenario)
    except InputError:  # it is in every cell, and each will say so
        skipped = {}
    return marked(cells, skipped)


class Gate:
    """What cells write goes through here; once it is shut, nothing of theirs changes on the disk any more."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._shut = False

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Let a cell write.

        Raises:
            Stopped: the gate is shut.
        """
        with self._changed:
            if self._shut:
                raise Stopped
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def shut(self) -> None:
        """Let nobody in any more, and wait for those who are inside: a write is a matter of milliseconds, or the disk hangs."""
        with self._changed:
            self._shut = True
            self._changed.wait_for(lambda: not self._inside, _PATIENCE)


class CellDirectory(RunDirectory):
    """A cell's folder, behind its matrix's gate.

    Attributes:
        guard: asked before a round is recorded; raises if what the cell computed with is no longer what it should be.
    """

    def __init__(self, path: Path, gate: Gate) -> None:
        super().__init__(path)
        self._gate = gate
        self.guard: Callable[[], None] = lambda: None

    def append(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        """See `RunDirectory`."""
        self.guard()
        with self._gate.writing():
            super().append(name, records)

    def save(self, checkpoint: Checkpoint) -> None:
        """See `RunDirectory`."""
        self.guard()
        with self._gate.writing():
            super().save(checkpoint)

    def save_model(self, params: Tensor, layout: Layout) -> str:
        """See `RunDirectory`."""
        with self._gate.writing():
            return super().save_model(params, layout)

    def save_artefact(self, name: str, artefact: Artefact) -> None:
        """See `RunDirectory`."""
        with self._gate.writing():
            super().save_artefact(name, artefact)

    def status(self, status: str, why: str = "") -> None:
        """See `RunDirectory`."""
        with self._gate.writing():
            super().status(status, why)


class Matrix:
    """A matrix being played into its folder."""

    def __init__(
        self, scenario: Scenario, directory: RunDirectory, engine: str, tell: Listener, play: Callable[[Cell, RunDirectory], dict[str, Any]]
    ) -> None:
        """Look which cells are done already, and tell of them.

        Args:
            scenario: with its sweep.
            directory: the matrix's folder.
            engine: what computes, in words for the cells' records.
            tell: is told how it goes.
            play: plays a cell into its folder and returns its summary.
        """
        self._scenario, self._directory, self._engine, self._tell, self._play = scenario, directory, engine, tell, play
        self._cells = feasible(scenario)
        played = [cell.name for cell in self._cells if not cell.refused]
        self._gate = Gate()
        self._running: set[str] = set()
        self._written = -_EVERY
        tell.matrix_started(played, scenario.rounds)
        if len(played) < len(self._cells):
            first = next(cell for cell in self._cells if cell.refused)
            tell.note(f"{len(self._cells) - len(played)} of {len(self._cells)} cells are refused (first: {first.name}: {first.refused})")
        self._results = [self._done(cell) for cell in self._cells]
        self.left = [cell for cell, result in zip(self._cells, self._results, strict=True) if result is None]

    def summary(self) -> dict[str, Any]:
        """Return what is known so far, in the order of the file whatever finished first."""
        return records.matrix_summary(self._scenario, self._results)

    def play(self, width: int, stop: Callable[[], None]) -> None:
        """Play the cells that are left, `width` at once; one that fails is marked and the rest goes on.

        Args:
            width: how many at once.
            stop: called when the matrix is interrupted: makes training stop before its next step.
        """
        left = [number for number, result in enumerate(self._results) if result is None]

        def took(place: int, result: records.CellResult) -> None:
            self._results[left[place]] = result
            if time.monotonic() - self._written >= _EVERY:
                self._write()
                self._written = time.monotonic()

        def halt() -> None:
            self._gate.shut()
            stop()

        try:
            side_by_side(len(left), width, lambda place: self._one(self._cells[left[place]]), took, halt)
        except BaseException:
            self._interrupted()
            raise

    def _interrupted(self) -> None:
        """Leave the folders in a state that says what happened; the gate is shut, so nobody else writes."""
        for name in sorted(self._running):
            with contextlib.suppress(RunError):
                RunDirectory(self._folder(name)).status("interrupted", "the matrix was interrupted")
        self._write()

    def _write(self) -> None:
        """Write the summary so far; if that fails now, it is tried again later."""
        with contextlib.suppress(RunError):
            records.write_summary(self._directory, self.summary())

    def _folder(self, name: str) -> Path:
        return self._directory.path / "cells" / name

    def _done(self, cell: Cell) -> records.CellResult | None:
        """Return the result of a cell that is refused, or was played to its end before.

        What cannot be read is played again from its checkpoint.
        """
        if cell.refused:
            return records.cell_result(cell, {"status": "refused", "why": cell.refused, "metrics": {}, "seconds": 0.0})
        path = self._folder(cell.name)
        try:
            if read_status(path) != "finished":
                return None
            summary = read_json(path / "summary.json")
            result = records.cell_result(cell, summary)
        except (InputError, KeyError, TypeError):
            return None
        self._tell.cell_done(cell.name, summary)
        return result

    def _one(self, cell: Cell) -> records.CellResult:
        """Play a cell in one of the threads, and leave its result in its folder."""
        began = time.perf_counter()
        directory = CellDirectory(self._folder(cell.name), self._gate)
        self._running.add(cell.name)
        try:
            with self._gate.writing():
                directory.path.mkdir(parents=True, exist_ok=True)
                write_atomic(directory.path / "scenario.toml", cell.scenario.resolved_toml().encode())
                records.write_environment(directory, cell.scenario, self._engine, "as the matrix")
            directory.status("running")
            summary = self._close(directory, self._play(cell, directory))
        except KeyboardInterrupt:
            self._gate.shut()  # at once, so that no other cell goes on in the meantime
            raise
        except (Exception, SystemExit) as error:  # whatever it was, it is this cell's: the others go on
            summary = _failed(error, began)
            with contextlib.suppress(RunError, OSError):  # a full disk cannot even say so
                self._close(directory, summary)
        self._running.discard(cell.name)
        self._tell.cell_done(cell.name, summary)
        return records.cell_result(cell, summary)

    def _close(self, directory: RunDirectory, summary: dict[str, Any]) -> dict[str, Any]:
        with self._gate.writing():
            records.write_summary(directory, summary)
            write_json(directory.path / "status.json", {"status": summary["status"], "why": summary.get("why", "")})
        return summary


def _failed(error: BaseException, began: float) -> dict[str, Any]:
    return {"status": "failed", "why": said(error), "metrics": {}, "seconds": round(time.perf_counter() - began, 2)}


class _News(NamedTuple):
    """What a thread reports: a job that is done, or that it is over itself, and why (`None`: nothing is left to do)."""

    number: int
    result: Any = None
    end: BaseException | None = None
    over: bool = False


def side_by_side(count: int, width: int, play: Callable[[int], T], took: Callable[[int, T], None], stop: Callable[[], None]) -> None:
    """Call `play(i)` for every i below `count` on `width` threads, begun in this order; `took(i, result)` in the caller's, as they end.

    Args:
        count: how many.
        width: how many threads.
        play: whatever it raises ends the whole.
        took: is told of each result, in the order in which they come.
        stop: called before an exception leaves here, a KeyboardInterrupt for instance: must make every `play` that runs come to an end.
    """
    left: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(count):
        left.put(number)
    news: queue.SimpleQueue[_News] = queue.SimpleQueue()
    drivers = [threading.Thread(target=_drive, args=(left, news, play), name=f"fedtrust-cell-{i}", daemon=True) for i in range(width)]
    try:
        for driver in drivers:
            driver.start()
        going, stopped = width, False
        while going:
            heard = news.get()
            if heard.end is not None and not isinstance(heard.end, Stopped):
                raise heard.end
            if heard.over:
                going -= 1
                stopped = stopped or heard.end is not None  # by another thread, whose reason is on its way
            else:
                took(heard.number, heard.result)
        if stopped:
            raise RunError("the workers were stopped before every cell was played")
    except BaseException:
        while True:  # nobody begins another
            try:
                left.get_nowait()
            except queue.Empty:
                break
        stop()
        _join(drivers, _PATIENCE)
        while not news.empty():  # what came to its end in the meantime counts
            heard = news.get()
            if not heard.over:
                took(heard.number, heard.result)
        raise
    _join(drivers, _PATIENCE)


def _drive(left: queue.SimpleQueue[int], news: queue.SimpleQueue[_News], play: Callable[[int], Any]) -> None:
    threads.fix(threads.SERVER)
    try:
        while True:
            try:
                number = left.get_nowait()
            except queue.Empty:
                break
            news.put(_News(number, play(number)))
    except BaseException as error:  # handed to whoever waits
        news.put(_News(-1, end=error, over=True))
    else:
        news.put(_News(-1, over=True))


def _join(drivers: Iterable[threading.Thread], patience: float) -> None:
    end = time.monotonic() + patience
    for driver in drivers:
        if driver.ident is not None:
            driver.join(max(0.0, end - time.monotonic()))
