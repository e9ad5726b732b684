"""How the chunks of several runs share the workers, and what becomes of a chunk whose worker is late or dies.

A chunk whose worker died is tried again as it is: whoever was shot from outside gives the same bits the second time. A chunk that keeps
killing its worker, is late, or whose code fails is trained client by client, so that only those who are to blame are dropped, by name.
Chunks that were handed over together and failed are first handed over again one by one, which counts against nobody.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from fedtrust.engine.cohort import Chunk, Trained
from fedtrust.engine.partial import Partial
from fedtrust.engine.sums import Tree
from fedtrust.errors import RunError
from fedtrust.interrupt import Stopped

T = TypeVar("T")
P = TypeVar("P")
#: How often the partial sums of a round may be lost before it is given up.
_REDO = 20


class Ran(NamedTuple):
    """What a round of training gave.

    Attributes:
        results: one a chunk, in the order of the chunks; a chunk (or client) that could not be trained has faults.
        total: the chunks' `Trained.total` [d], added up by a fixed binary tree over the chunks' numbers; `None` if no chunk had one.
    """

    results: list[Trained]
    total: Tensor | None


class Done(NamedTuple, Generic[T]):
    """A worker's result: what it trained, without the sum, and the sum wherever it lies.

    Attributes:
        trained: the result of a chunk.
        total: the sum.
        level: it is that of 2^level chunks from this one on; `None`: this one's is in another's.
    """

    trained: Trained
    total: T | None
    level: int | None = 0


class Failed(NamedTuple):
    """Why a worker gave no result.

    Attributes:
        why: for the clients' record.
        again: whether the same clients may do better on another worker.
        counts: whether they may have had to do with it at all; if not, they are put back as if nothing had been.
        run: whether no client is to blame but the run itself, a part of the server's rule that works on the workers: the run ends.
    """

    why: str
    again: bool
    counts: bool = True
    run: bool = False


class LostError(Exception):
    """Partial sums are gone with the machine that held them.

    Args:
        parts: the partial sums.
    """

    def __init__(self, *parts: object) -> None:
        super().__init__(f"{len(parts)} partial sums are lost")
        self.parts = parts


@dataclass(eq=False)
class Piece:
    """Clients to be trained together: a chunk, or one client of a chunk that failed.

    Attributes:
        number: the chunk's number.
        chunk: the chunk, or what is left of it.
        place: the client's place in the chunk when it is trained alone.
        tries: how often a worker has failed on it.
        started: when a worker began, by `time.monotonic`.
        single: whether it is to be handed to a worker by itself: it failed together with others.
    """

    number: int
    chunk: Chunk
    place: int | None = None
    tries: int = 0
    started: float | None = None
    single: bool = False

    @property
    def untried(self) -> bool:
        """Whether nothing has failed on it yet."""
        return self.place is None and not self.tries and not self.single


class Round(Generic[T]):
    """The chunks of one call of `Job.run`: which wait, which are at work, and what came of them.

    Attributes:
        most: how many chunks a worker may be handed at once.
    """

    most = 1

    def __init__(
        self, chunks: Sequence[Chunk], retries: int, add: Callable[[T, T], T], fetch: Callable[[T], Tensor], owner: Any = None
    ) -> None:
        """Line up the chunks.

        Args:
            chunks: what is to be trained.
            retries: how often a chunk is tried again after its worker died.
            add: adds two partial sums; may raise `LostError`.
            fetch: returns a partial sum as a tensor of this process; may raise `LostError`.
            owner: the job.
        """
        self.chunks, self.owner = chunks, owner
        self.done: queue.SimpleQueue[tuple[Piece, Done[T] | Failed] | None] = queue.SimpleQueue()
        self.running: set[Piece] = set()
        self.total: Tensor | None = None
        self.more = False  # whether pieces wait that idle workers have not been told of
        self._retries, self._add, self._fetch = retries, add, fetch
        self._waiting = deque(Piece(number, chunk) for number, chunk in enumerate(chunks))
        self._lock = threading.Lock()  # hands take pieces while the run's thread settles others
        self._results: list[Trained | None] = [None] * len(chunks)
        self._alone: dict[int, dict[int, Done[T]]] = {}
        self._left, self._redone = len(chunks), 0
        self._tree: Tree[T] = Tree(len(chunks), add)

    def waiting(self) -> int:
        """Return how many pieces nobody works on."""
        return len(self._waiting)

    def take(self) -> Piece | None:
        """Return a piece that nobody works on, if there is one."""
        found = self.block(1, lambda number, first: True)
        return found[0] if found else None

    def block(self, workers: int, fits: Callable[[int, int], bool]) -> list[Piece]:
        """Return pieces that nobody works on, to be handed over together; none if there are none.

        They are a whole block of the tree that adds up, so that one sum comes of them, and no more than leaves the other `workers` their
        share, nor than `most`.

        Args:
            workers: how many share the round.
            fits: (a chunk's number, another's) → whether the one goes with the other; with itself: whether the caller is the right one.
        """
        with self._lock:
            if not self._waiting:
                return []
            start = next((i for i, piece in enumerate(self._waiting) if fits(piece.number, piece.number)), 0)
            line = list(itertools.islice(self._waiting, start, start + self._share(workers)))
            first, count = line[0], 1
            while 2 * count <= len(line) and first.number % (2 * count) == 0 and _neighbours(line[: 2 * count], fits):
                count *= 2
            found = line[:count]
            for piece in found:
                self._waiting.remove(piece)
                piece.started = None
            self.running.update(found)
            return found

    def _share(self, workers: int) -> int:
        return min(self.most, -(-len(self._waiting) // (workers + 1)))

    def settle(self, piece: Piece, outcome: Done[T] | Failed) -> None:
        """Take note of what came of a piece.

        Raises:
            RunError: it failed, and not because of its clients.
        """
        with self._lock:
            self.running.discard(piece)
        if isinstance(outcome, Failed):
            if outcome.run:
                raise RunError(outcome.why)
            if not outcome.counts:
                self._first(piece)
                return
            piece.tries += 1
            alone = len(piece.chunk.tasks) == 1
            if outcome.again and piece.place is None and piece.tries <= self._retries:
                self._first(piece)
                return
            if not alone:
                self._separate(piece)
                return
            outcome = Done(lost(piece.chunk, outcome.why), None)
        if piece.place is None:
            self._finish(piece.number, outcome)
            return
        parts = self._alone[piece.number]
        parts[piece.place] = outcome
        if len(parts) == len(self.chunks[piece.number].tasks):
            self._finish(piece.number, self._together(self._alone.pop(piece.number)))

    def _first(self, *pieces: Piece) -> None:
        with self._lock:
            self._waiting.extendleft(reversed(pieces))
            self.more = True

    def _separate(self, piece: Piece) -> None:
        self._alone[piece.number] = {}
        self._first(*(Piece(piece.number, piece.chunk._replace(tasks=(t,)), place) for place, t in enumerate(piece.chunk.tasks)))

    def _together(self, parts: dict[int, Done[T]]) -> Done[T]:
        """Return the result of a chunk whose clients were trained one by one."""
        found = [parts[place].trained for place in range(len(parts))]
        rows = [t for t in found if t.clients]
        first = rows[0] if rows else found[0]
        sums: Tree[T] = Tree(len(parts), self._add)
        for place in range(len(parts)):
            sums.put(place, parts[place].total)
        together = first._replace(
            clients=tuple(c for t in rows for c in t.clients),
            updates=torch.cat([t.updates for t in rows]) if rows else first.updates,
            losses=torch.cat([t.losses for t in rows]) if rows else first.losses,
            memories=tuple(m for t in rows for m in t.memories),
            norms=_joined([t.norms for t in rows]),
            partial=_partial(rows),
            faults={client: why for t in found for client, why in t.faults.items()},
        )
        return Done(together, sums.result())

    def _finish(self, number: int, done: Done[T]) -> None:
        self._results[number] = done.trained
        self._left -= 1
        try:
            if done.level is not None:
                self._tree.put(number, done.total, done.level)
        except LostError as error:
            self._redo(error.parts)

    def _redo(self, parts: Sequence[object]) -> None:
        """Train again what lost partial sums were made of."""
        numbers = self._tree.discard(lambda part: any(part is gone for gone in parts))
        self._left += len(numbers)
        self._redone += 1
        if self._redone > _REDO:
            raise RunError("partial sums were lost again and again")
        self._first(*(Piece(number, self.chunks[number]) for number in numbers))

    def complete(self) -> bool:
        """Return whether everything is in; then `total` is the sum."""
        if self._left:
            return False
        total = self._tree.result()
        if total is not None and self.total is None:
            try:
                self.total = self._fetch(total)
            except LostError as error:
                self._redo(error.parts)
                return False
        return True

    def results(self) -> list[Trained]:
        """Return the results in the order of the chunks."""
        return [result for result in self._results if result is not None]


class Pool:
    """Rounds that want workers, and workers that want work; every round gets its turn."""

    def __init__(self) -> None:
        self.closed = False
        self._rounds: deque[Round[Any]] = deque()
        self._changed = threading.Condition()

    def take(self, pick: Callable[[Round[Any]], P | None]) -> tuple[Round[Any], P] | None:
        """Return a round that has work, and what `pick` takes of it; waits for one, and returns `None` when the pool closes."""
        with self._changed:
            while not self.closed:
                if work := self._next(pick):
                    return work
                self._changed.wait()
            return None

    def _next(self, pick: Callable[[Round[Any]], P | None]) -> tuple[Round[Any], P] | None:
        for _ in range(len(self._rounds)):
            turn = self._rounds[0]
            self._rounds.rotate(-1)
            if found := pick(turn):
                return turn, found
        return None

    def more(self, keep: int, pick: Callable[[Round[Any]], P | None]) -> tuple[Round[Any], P] | None:
        """Return further work for a worker that is busy, or `None` if no more than `keep` pieces wait: those are for idle workers.

        Args:
            keep: how many are left to others.
            pick: takes what the worker can do without further ado.
        """
        with self._changed:
            if self.closed or sum(turn.waiting() for turn in self._rounds) <= keep:
                return None
            return next(((turn, found) for turn in self._rounds if (found := pick(turn))), None)

    def run(self, turn: Round[Any], tend: Callable[[], float]) -> Ran:
        """See a round through.

        Args:
            turn: the round.
            tend: looks after the workers; returns in how many seconds it wants to be called again at the latest.

        Raises:
            Stopped: the pool or the job was closed.
            RunError: a part of the server's rule failed on a worker.
        """
        with self._changed:
            if self.closed:
                raise Stopped
            self._rounds.append(turn)
            self._changed.notify_all()
        try:
            while True:
                patience = tend()
                if turn.complete():
                    break
                if turn.more:
                    turn.more = False
                    self.wake()
                try:
                    event = turn.done.get(timeout=max(0.0, patience))
                except queue.Empty:
                    continue
                if event is None:
                    raise Stopped
                turn.settle(*event)
        finally:
            with self._changed:
                self._rounds.remove(turn)
        return Ran(turn.results(), turn.total)

    def pause(self, seconds: float) -> None:
        """Wait, but not longer than until the pool closes."""
        end = time.monotonic() + seconds
        with self._changed:
            while not self.closed and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)

    def wake(self) -> None:
        """Let waiting workers look for work."""
        with self._changed:
            self._changed.notify_all()

    def stop(self, owner: object) -> None:
        """Call off the rounds of a job."""
        with self._changed:
            for turn in self._rounds:
                if turn.owner is owner:
                    turn.done.put(None)

    def close(self) -> None:
        """Call off every round and send the workers home."""
        with self._changed:
            self.closed = True
            for turn in self._rounds:
                turn.done.put(None)
            self._changed.notify_all()


def _neighbours(line: Sequence[Piece], fits: Callable[[int, int], bool]) -> bool:
    """Return whether pieces are of chunks one after the other that go together, and nothing has failed on any."""
    first = line[0].number
    return all(piece.untried and piece.number == first + i and fits(piece.number, first) for i, piece in enumerate(line))


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found) if found and len(found) == len(parts) else None


def _partial(rows: Sequence[Trained]) -> Partial | None:
    """Return what is known of a sum whose rows were made one by one: each row's trust, the loosest bound."""
    parts = [t.partial for t in rows if t.partial is not None]
    if not parts:
        return None
    bounds = [part.bound for part in parts if part.bound is not None]
    return Partial(_joined([part.trust for part in parts]), max(bounds) if len(bounds) == len(parts) else None)


def lost(chunk: Chunk, reason: str) -> Trained:
    """Return the result of a chunk nobody of which could be trained."""
    return Trained((), torch.zeros(0, 0), torch.zeros(0), (), {task.client: reason for task in chunk.tasks})
