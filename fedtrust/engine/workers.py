"""Who computes: this process (`local`) or Ray workers (`ray`). Neither choice changes a bit of the result."""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from fedtrust.engine import threads
from fedtrust.engine.chunks import Cut, cpu_cut, gpu_cut
from fedtrust.engine.cohort import STOP, Chunk, train
from fedtrust.engine.pool import Done, Failed, Piece, Pool, Ran, Round
from fedtrust.engine.world import World
from fedtrust.errors import InputError, RunError

__all__ = ["Executor", "Job", "LocalExecutor", "Ran", "make", "pick"]


class Job(Protocol):
    """A run's place on the workers."""

    def run(self, chunks: Sequence[Chunk]) -> Ran:
        """Train the chunks, in any order; a chunk or client that could not be trained comes back with faults.

        Raises:
            RunError: there is no worker left and none comes up.
            Stopped: the job or the executor was closed in the meantime.
        """

    def cut(self) -> Cut:
        """Return how a round's clients are best cut into chunks for these workers."""

    def close(self) -> None:
        """Forget the run's world."""


class Executor(Protocol):
    """Workers that any number of runs share; several jobs may be open at once, and `run` from different threads side by side.

    Attributes:
        workers: how many chunks can be trained at once.
    """

    workers: int

    def describe(self) -> str:
        """Return what computes, in words for the report."""

    def open(self, world: World) -> Job:
        """Take over a run: every worker gets its data and architecture once."""

    def close(self) -> None:
        """Leave no thread or process behind."""


#: Seconds that a training thread gets to finish its step when the executor closes.
_PATIENCE = 3.0


class _Hand:
    """A daemon thread that trains; one that hangs can be left to itself and does not keep the process alive."""

    def __init__(self, work: Callable[[_Hand], None], number: int) -> None:
        self.stop, self.number = threading.Event(), number
        self.thread = threading.Thread(target=work, args=(self,), name=f"fedtrust-{number}", daemon=True)
        self.thread.start()


class _LocalJob:
    """A run on this process' threads."""

    def __init__(self, executor: LocalExecutor, world: World) -> None:
        self._executor, self.world = executor, world
        on_gpu = world.device.startswith("cuda")
        self._cut = gpu_cut(world, torch.cuda.mem_get_info()[0] // executor.workers, executor.workers) if on_gpu else cpu_cut(world)

    def cut(self) -> Cut:
        """Return how clients are best cut into chunks."""
        return self._cut

    def run(self, chunks: Sequence[Chunk]) -> Ran:
        """Train the chunks."""
        return self._executor.train(self, chunks)

    def close(self) -> None:
        """Call off what is at work."""
        self._executor.pool.stop(self)
        threads.give_back()


class LocalExecutor:
    """Workers are threads of this process; tensor operations release Python's lock.

    Clients that are not done within the deadline, counted from when a thread began with them, are given up with that thread, and a new
    one takes its place.
    """

    def __init__(self, workers: int | None = None, deadline: float = 600.0) -> None:
        threads.keep_memory()
        self.workers = workers or (1 if torch.cuda.is_available() else threads.cores())
        self.pool = Pool()
        self._deadline, self._rounds = deadline, itertools.count(1)
        self._lock = threading.Lock()
        self._at_work: dict[Piece, _Hand] = {}
        self._copies: dict[int, tuple[weakref.ref[Tensor], weakref.ref[Tensor]]] = {}
        self._hands = [_Hand(self._work, i) for i in range(self.workers)]

    def describe(self) -> str:
        """Return what computes, in words for the report."""
        return f"local, {self.workers} thread{'s' if self.workers > 1 else ''}"

    def open(self, world: World) -> _LocalJob:
        """Take over a run."""
        if not torch.cuda.is_available():
            return _LocalJob(self, world.on("cpu"))
        data = replace(world.data, x=self._copy(world.data.x, "cuda"), y=self._copy(world.data.y, "cuda"))
        return _LocalJob(self, replace(world, data=data).on("cuda"))

    def _copy(self, tensor: Tensor, device: str) -> Tensor:
        """Return samples on a device; jobs with the same samples share the copy, as long as any of them is open."""
        with self._lock:
            source, copy = self._copies.get(id(tensor), (None, None))
            found = copy() if copy is not None and source is not None and source() is tensor else None
            if found is None:
                found = tensor.to(device)
                self._copies[id(tensor)] = weakref.ref(tensor), weakref.ref(found)
            return found

    def train(self, job: _LocalJob, chunks: Sequence[Chunk]) -> Ran:
        """Train a job's chunks."""
        turn: Round[Tensor] = Round(chunks, 0, torch.Tensor.add_, lambda total: total, job)
        with threads.using(1):
            ran = self.pool.run(turn, lambda: self._tend(turn))
        if next(self._rounds) % threads.TIDY == 0:
            threads.give_back()
        return ran

    def _tend(self, turn: Round[Tensor]) -> float:
        """Give up those who are late; return when the next one would be."""
        now = time.monotonic()
        first = now + self._deadline
        for piece in list(turn.running):
            if piece.started is None:
                continue
            if piece.started + self._deadline > now:
                first = min(first, piece.started + self._deadline)
            elif self._give_up(piece):
                turn.settle(piece, Failed(f"no answer within {self._deadline:g} s", again=False))
        return first - now

    def _give_up(self, piece: Piece) -> bool:
        """Leave the thread that works on a piece to itself, and start another one; return whether it was still at it."""
        with self._lock:
            hand = self._at_work.pop(piece, None)
            if hand is None:
                return False
            hand.stop.set()
            self._hands[self._hands.index(hand)] = _Hand(self._work, hand.number)
            return True

    def _work(self, hand: _Hand) -> None:
        threads.fix(1)
        threads.stay(hand.number, self.workers)
        STOP.event = hand.stop
        while (work := self.pool.take(Round.take)) is not None:
            turn, piece = work
            with self._lock:
                piece.started = time.monotonic()
                self._at_work[piece] = hand
            outcome = _outcome(turn.owner.world, piece.chunk)
            with self._lock:
                if self._at_work.pop(piece, None) is None:
                    return  # given up in the meantime
            turn.done.put((piece, outcome))
            del turn, piece, work, outcome  # what a round holds is not kept alive by an idle thread

    def close(self) -> None:
        """Leave no thread behind; one that is still training stops before its next step."""
        self.pool.close()
        with self._lock:
            hands = list(self._hands)
        for hand in hands:
            hand.stop.set()
        end = time.monotonic() + _PATIENCE
        for hand in hands:
            hand.thread.join(max(0.0, end - time.monotonic()))


def _outcome(world: World, chunk: Chunk) -> Done[Tensor] | Failed:
    try:
        trained = train(world, chunk)
    except RunError as error:  # what clients raise is caught where they train: this is the server's rule
        return Failed(str(error), again=False, run=True)
    except BaseException as error:  # whatever it is, it must not take the thread with it
        return Failed(f"training: {type(error).__name__}: {' '.join(str(error).split())}"[:300], again=False)
    return Done(trained._replace(total=None), trained.total)


def pick(engine: str, clients: int, address: str | None) -> tuple[str, str]:
    """Return the engine (`local` or `ray`) that `auto` means here, and why."""
    if engine != "auto":
        return engine, "asked for"
    if address:
        return "ray", "a Ray address was given"
    gpus = torch.cuda.device_count()
    if gpus > 1:
        return "ray", f"{gpus} GPUs: one worker each"
    if threads.cores() > 8 and clients >= 64:
        return "ray", f"{threads.cores()} cores and {clients} clients a round: processes scale further than threads"
    return "local", f"{gpus or 'no'} GPU, {threads.cores()} cores: threads of this process start at once and share the data"


def make(engine: str, workers: int | None, address: str | None, deadline: float, retries: int) -> Executor:
    """Return the executor for an engine's name."""
    if workers is not None and workers < 1:
        raise InputError(f"needs at least one worker (got {workers})", "--workers")
    if address and engine != "ray":
        raise InputError(f"goes with --engine ray, not with {engine}", "--ray-address")
    if engine == "local":
        return LocalExecutor(workers, deadline)
    if engine == "ray":
        from fedtrust.engine.ray_workers import RayExecutor

        return RayExecutor(workers, address, deadline, retries)
    raise InputError(f"unknown engine '{engine}' (allowed: auto, local, ray)", "--engine")
