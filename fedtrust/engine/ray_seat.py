"""A worker's seat on the cluster: the actor that sits there now, and the thread of this process that looks after it.

Each actor is watched by a thread of its own, so that one that hangs, dies or waits for room holds up nobody else.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from fedtrust.engine.cohort import Trained
from fedtrust.engine.pool import Done, Failed, LostError, Piece, Round
from fedtrust.engine.ray_actor import Hello, StaleError, pack_chunk, unpack, versions
from fedtrust.errors import RunError
from fedtrust.interrupt import Stopped

if TYPE_CHECKING:
    from fedtrust.engine.ray_workers import RayExecutor, RayJob, RayRound

#: Seconds between two looks at whether everything is to end; a result that comes in is noticed at once.
_SLICE = 0.5
#: Seconds that a worker gets to take over a run, whatever the deadline for training.
_OPENING = 120.0


class LateError(Exception):
    """Ray gave no answer in time."""


class Handed(NamedTuple):
    """Pieces of a round that the worker was handed in one call, and the references to what will come of it, or why nothing will."""

    turn: RayRound
    pieces: list[Piece]
    call: list[Any] | Failed


@dataclass(eq=False)
class Part:
    """A partial sum in the object store of another node, and a worker there that can add to it."""

    ref: Any
    actor: Any
    node: str


#: A partial sum: here, or elsewhere.
Sum = Tensor | Part


def get(ray: Any, pool: Any, ref: Any, seconds: float | None) -> Any:
    """Return what a reference, or each of a list, stands for.

    Raises:
        LateError: it took longer than `seconds`.
        Stopped: the pool has closed.
        ray.exceptions.RayError: it will never come.
    """
    end = None if seconds is None else time.monotonic() + seconds
    while not pool.closed:
        left = _SLICE if end is None else end - time.monotonic()
        try:
            return ray.get(ref, timeout=max(0.0, min(_SLICE, left)))
        except ray.exceptions.GetTimeoutError:
            if left <= 0:
                raise LateError from None
    raise Stopped


class Seat:
    """A place for one worker.

    Attributes:
        hello: who sits there; `None` while nobody does.
        down: since when nobody does, by `time.monotonic`.
        why: what became of the last one.
        failures: how many in a row died before they could work.
        mismatch: set if the node runs other versions than this process, and would give other bits.
    """

    def __init__(self, executor: RayExecutor, number: int) -> None:
        self._executor, self._ray, self._pool = executor, executor.ray, executor.pool
        self.actor: Any = None
        self.hello: Hello | None = None
        self.down, self.why, self.failures, self.mismatch = time.monotonic(), "no room for it", 0, ""
        self.opened: set[int] = set()
        self._sent: dict[int, tuple[int, Any]] = {}  # the model that the worker was sent last, and its number, by job
        self._models = itertools.count()
        self._handed: deque[Handed] = deque()
        self.thread = threading.Thread(target=self._live, name=f"fedtrust-ray-{number}", daemon=True)
        self.thread.start()

    def _live(self) -> None:
        with contextlib.suppress(Stopped):
            while self._up() and (self._handed or self._fetch()):
                self._ahead()
                handed = self._handed.popleft()
                for piece, outcome in zip(handed.pieces, self._outcomes(handed), strict=True):
                    handed.turn.done.put((piece, outcome))
                    del piece, outcome  # what a round holds is not kept alive by an idle thread
                del handed
                if self.hello is None:  # nobody was there any more to begin with what came next: it is put back as it was
                    while self._handed:
                        turn, pieces, _ = self._handed.popleft()
                        for piece in pieces:
                            turn.done.put((piece, Failed("its worker was gone before it began", again=True, counts=False)))

    def _fetch(self) -> bool:
        """Wait for work and hand it to the worker; return whether there is any."""
        work = self._pool.take(self._pick)
        if work is None:
            return False
        turn, pieces = cast("RayRound", work[0]), work[1]
        call = self._begin(turn, pieces) if self._open(turn.owner) else Failed("no worker could take over the run", True, False)
        self._handed.append(Handed(turn, pieces, call))
        return True

    def _ahead(self) -> None:
        """Hand a busy worker its next pieces, so that it need not wait for this process in between; idle workers come first."""
        if len(self._handed) > 1 or self.hello is None:
            return
        work = self._pool.more(self._executor.workers, lambda turn: self._pick(turn) if turn.owner.number in self.opened else None)
        if work is not None:
            turn, pieces = cast("RayRound", work[0]), work[1]
            self._handed.append(Handed(turn, pieces, self._begin(turn, pieces)))

    def _pick(self, turn: Round[Any]) -> list[Piece]:
        """Take pieces of a round that are near, and of the same model."""
        models, homes = cast("RayRound", turn).models, cast("RayRound", turn).homes
        node = self.hello.node if self.hello else None
        return turn.block(self._executor.workers, lambda number, first: homes[number] in ("", node) and models[number] is models[first])

    def _up(self) -> bool:
        """Get a worker onto the seat, however long it takes; return whether one sits there."""
        while not self._pool.closed and self.hello is None:
            try:
                self.actor = self._executor.new_actor()
                hello: Hello = self._get(self.actor.hello.remote(), None)
            except Exception as error:  # whatever keeps it from coming up: the seat must not be lost
                self.failures += 1
                self.drop(said(error))
                self._pool.pause(min(5.0, 0.1 * 2**self.failures))
                continue
            if hello.versions != versions():
                self.mismatch = f"node {hello.node[:8]} runs fedtrust {hello.versions[0]} and torch {hello.versions[1]}"
                self.drop(self.mismatch)
                return False
            self.hello, self.failures = hello, 0
        return not self._pool.closed

    def drop(self, why: str) -> None:
        """Give up the worker; another one will take its place."""
        self.down, self.why, self.hello = time.monotonic(), why, None
        self.opened.clear()
        self._sent.clear()
        actor, self.actor = self.actor, None
        if actor is not None:
            with contextlib.suppress(Exception):  # it may be dead already
                self._ray.kill(actor)

    def forget(self, job: int) -> None:
        """Let the worker drop a run."""
        self._sent.pop(job, None)
        actor = self.actor
        if job in self.opened and actor is not None and not self._pool.closed:
            self.opened.discard(job)
            actor.forget.remote(job)

    def _get(self, ref: Any, seconds: float | None) -> Any:
        return get(self._ray, self._pool, ref, seconds)

    def _begin(self, turn: RayRound, pieces: list[Piece]) -> list[Any] | Failed:
        """Hand the worker pieces; return the references to what will come of them."""
        job, model = turn.owner.number, turn.models[pieces[0].number]
        try:
            call = self.actor.train.options(num_returns=3)
            count, sent = self._sent.get(job, (-1, None))
            known = sent is model  # calls arrive in order; to hand over a reference costs as much as all the rest
            count = count if known else next(self._models)
            refs = call.remote(job, count, None if known else model, [pack_chunk(piece.chunk) for piece in pieces])
            self._sent[job] = count, model
            return list(refs)
        except Stopped:
            raise
        except self._ray.exceptions.RayError as error:
            self.drop(said(error))
            return Failed(f"the worker failed ({said(error)})", again=True)
        except BaseException as error:  # for instance a behaviour that cannot be pickled
            return Failed(f"could not be handed to a worker: {said(error.__cause__ or error)}", again=False)

    def _outcomes(self, handed: Handed) -> Sequence[Done[Sum] | Failed]:
        """Wait for what comes of pieces; where that fails, nobody knows on which of several: each is put back, to go by itself."""
        found = self._outcome(handed)
        if not isinstance(found, Failed):
            return found
        self._sent.pop(handed.turn.owner.number, None)  # who knows whether it arrived
        if len(handed.pieces) > 1 and not found.run:
            found = found._replace(again=True, counts=False)
            for piece in handed.pieces:
                piece.single = True
        return [found] * len(handed.pieces)

    def _outcome(self, handed: Handed) -> list[Done[Sum]] | Failed:
        """Wait for what comes of pieces, and say why if nothing does."""
        if isinstance(handed.call, Failed):
            return handed.call
        errors = self._ray.exceptions
        try:
            return self._collect(handed, handed.call)
        except LateError:
            self.drop("it was late")
            return Failed(f"no answer within {self._executor.deadline:g} s", again=False)
        except errors.RayTaskError as error:  # its code failed; the worker lives
            if isinstance(error.cause, RunError):  # what clients raise is caught where they train: this is the server's rule
                return Failed(str(error.cause), again=False, run=True)
            if isinstance(error.cause, StaleError):
                return Failed("its worker had another model", again=True, counts=False)
            return Failed(f"the worker failed ({said(error)})", again=False)
        except errors.RayError as error:
            self.drop(said(error))
            return Failed(f"the worker failed ({said(error)})", again=True)
        except Stopped:
            raise
        except BaseException as error:  # for instance a behaviour that cannot be pickled
            return Failed(f"could not be handed to a worker: {said(error.__cause__ or error)}", again=False)

    def _open(self, job: RayJob) -> bool:
        """Hand the worker a run's world, if it has not got it yet; return whether it has."""
        if job.number in self.opened:
            return True
        try:
            self._get(self.actor.open.remote(job.number, job.world, job.names, *job.samples), _OPENING)
        except (LateError, self._ray.exceptions.RayError) as error:
            job.refused.append(said(error))
            self.drop(said(error))
            return False
        self.opened.add(job.number)
        job.refused.clear()
        return True

    def _collect(self, handed: Handed, call: list[Any]) -> list[Done[Sum]]:
        node = self.hello.node if self.hello else ""
        # A sum that lies elsewhere stays there, but for that of a single client, which is added to its chunk's here.
        first = handed.pieces[0]
        stays = first.chunk.sums is not None and first.place is None and node != self._executor.node
        for piece in handed.pieces:
            piece.started = time.monotonic()  # whatever the worker did before is done
        head, updates, total = call
        (heads, summed), blocks, *here = self._get([head, updates] if stays else call, self._executor.deadline)
        handed.turn.seconds += [seconds for _, seconds in heads]
        found = [Done[Sum](_trained(packed, block), None, None) for (packed, _), block in zip(heads, blocks, strict=True)]
        added = None if not summed else Part(total, self.actor, node) if stays else torch.from_numpy(np.array(here[0]))
        found[0] = found[0]._replace(total=added, level=len(found).bit_length() - 1)
        return found


def _trained(head: Any, block: Any) -> Trained:
    """Return the result of a chunk from what came; the updates are a copy, for the object store's are read-only."""
    result: Trained = unpack(head)
    return result if block is None else result._replace(updates=torch.from_numpy(np.array(block)))


def add(executor: RayExecutor, left: Sum, right: Sum) -> Sum:
    """Return a sum: made where both parts lie, or here.

    Raises:
        LostError: a part is gone with its node.
    """
    if isinstance(left, Part) and isinstance(right, Part) and left.node == right.node:
        call = left.actor.add.options(concurrency_group="sums")
        return Part(call.remote(left.ref, right.ref), left.actor, left.node)
    one, two = fetch(executor, left), fetch(executor, right)
    return one.add_(two)


def fetch(executor: RayExecutor, part: Sum) -> Tensor:
    """Return a partial sum as a tensor of this process.

    Raises:
        LostError: it is gone with its node.
    """
    if isinstance(part, Tensor):
        return part
    try:
        return torch.from_numpy(np.array(get(executor.ray, executor.pool, part.ref, executor.deadline)))
    except (LateError, executor.ray.exceptions.RayError):
        raise LostError(part) from None


def said(error: BaseException) -> str:
    """Return an error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A remote traceback ends with the error itself.
    text = lines[-1] if lines and lines[0].startswith(("\x1b[36m", "ray::")) else " ".join(lines)
    return f"{type(error).__name__}: {text}"[:240]
