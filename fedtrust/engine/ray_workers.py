"""Ray workers: processes on this machine or on a cluster, one a core or one a GPU."""

from __future__ import annotations

import functools
import hashlib
import itertools
import threading
import time
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fedtrust.engine import threads
from fedtrust.engine.chunks import Cut, cpu_cut, gpu_cut
from fedtrust.engine.cohort import Chunk
from fedtrust.engine.pool import Pool, Ran, Round
from fedtrust.engine.ray_actor import Worker, bare, pack_model
from fedtrust.engine.ray_seat import Seat, Sum, add, fetch
from fedtrust.engine.ray_start import ALONG, import_ray, room, start
from fedtrust.engine.world import World
from fedtrust.errors import RunError

#: Seconds without any worker after which a run gives up.
PATIENCE = 60.0
#: How many workers in a row may die before they can work, on every seat.
_FAILURES = 5
#: How many workers in a row may fail to take over a run.
_REFUSALS = 3
#: Seconds of training that a worker is handed at once: every call costs Ray a millisecond or two of somebody's processor.
_HANDFUL = 0.1
#: Seconds that the threads which look after workers get to end.
_GOODBYE = 1.0


class RayRound(Round[Sum]):
    """A round on Ray workers.

    Attributes:
        models: for each chunk what its clients are sent, or a reference to that in the object store.
        homes: for each chunk the node that should rather train it, so that neighbours are added there; empty where it does not matter.
        seconds: how long workers took for a chunk.
    """

    models: list[Any]
    homes: list[str]
    seconds: list[float]


class _Shelf:
    """Samples in the object store, once for each content, as long as a job uses them."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._lock = threading.Lock()
        self._held: dict[str, tuple[Any, int]] = {}
        self._known: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}

    def take(self, tensor: Tensor) -> tuple[str, Any]:
        """Return the name of a tensor's content and the reference to it."""
        with self._lock:
            name = self._name(tensor)
            ref, count = self._held.get(name) or (self._ray.put(tensor.cpu().numpy()), 0)
            self._held[name] = ref, count + 1
            return name, ref

    def _name(self, tensor: Tensor) -> str:
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1] == tensor._version:
            return known[2]
        self._known = {key: entry for key, entry in self._known.items() if entry[0]() is not None}
        values = np.ascontiguousarray(tensor.cpu().numpy())
        digest = hashlib.blake2b(f"{values.dtype}{values.shape}".encode(), digest_size=16)
        digest.update(values.reshape(-1).view(np.uint8).data)
        self._known[id(tensor)] = weakref.ref(tensor), tensor._version, digest.hexdigest()
        return digest.hexdigest()

    def give_back(self, name: str) -> None:
        """Let go of a content; the last one to do so frees it."""
        with self._lock:
            ref, count = self._held.pop(name)
            if count > 1:
                self._held[name] = ref, count - 1


class RayJob:
    """A run on Ray workers; each of them fetches its world when it first trains for it.

    Attributes:
        number: its name among the workers.
        names, samples: what its samples hold, and where they lie in the object store.
        world: the rest of its world there.
        refused: why workers could not take it over, since one last could.
        pace: seconds that the slowest chunk of the last round took.
    """

    def __init__(self, executor: RayExecutor, number: int, world: World) -> None:
        self._executor, self.number = executor, number
        empty, samples = bare(world)
        taken = [executor.shelf.take(tensor) for tensor in samples]
        self.names, self.samples = tuple(name for name, _ in taken), [ref for _, ref in taken]
        self.world = executor.ray.put(empty)
        self.refused: list[str] = []
        self.pace = _HANDFUL
        self._open = True
        self._sized = world
        self._cut: Cut | None = None if executor.gpus else cpu_cut(world)

    def cut(self) -> Cut:
        """Return how clients are best cut into chunks; with GPUs that is known when the first worker is up."""
        if self._cut is None:
            free = self._executor.free_on_gpu()
            self._cut = gpu_cut(self._sized, free, self._executor.workers) if free else cpu_cut(self._sized)
        return self._cut

    def run(self, chunks: Sequence[Chunk]) -> Ran:
        """Train the chunks on whichever workers are free."""
        return self._executor.train(self, chunks)

    def close(self) -> None:
        """Call off what is at work; the workers forget the world."""
        if self._open:
            self._open = False
            self._executor.forget(self)


class RayExecutor:
    """Workers are Ray actors: one a core without a GPU, one a GPU where there are any; spread over a cluster with `address`.

    A dead worker is replaced while the others go on, and its chunk tried again, up to `retries` times; then its clients are trained one
    by one. So are those who are late, on a new worker. Whoever then fails alone is dropped by name. If no worker can be placed any more,
    the run ends with a `RunError`.

    Attributes:
        workers: how many there are.
        ray: the module.
        pool: where rounds meet workers.
        node: the node of this process.
        shelf: the samples in the object store.
    """

    def __init__(self, workers: int | None = None, address: str | None = None, deadline: float = 600.0, retries: int = 1) -> None:
        self.ray = import_ray()
        self.deadline, self._retries, self.patience = deadline, retries, PATIENCE
        self._started = not self.ray.is_initialized()
        if self._started:
            start(self.ray, workers, address)
        try:
            self._room = room(self.ray.nodes(), workers)
        except BaseException:
            if self._started:
                self.ray.shutdown()
            raise
        self.workers = self._room.workers
        self._along = ALONG if self._started and not address else 0
        self.node: str = self.ray.get_runtime_context().get_node_id()
        self.pool, self.shelf = Pool(), _Shelf(self.ray)
        self._numbers, self._rounds = itertools.count(), itertools.count(1)
        self._class = self.ray.remote(concurrency_groups={"sums": 1})(Worker).options(**self._room.options)
        self.seats = [Seat(self, number) for number in range(self.workers)]

    def describe(self) -> str:
        """Return what computes, in words for the report."""
        where = f" on {self._room.nodes} nodes" if self._room.nodes > 1 else ""
        gpus = f", {self._room.gpus} GPU{'s' if self._room.gpus > 1 else ''}" if self._room.gpus else ""
        return f"ray, {self.workers} worker{'s' if self.workers > 1 else ''}{where}{gpus}"

    @property
    def gpus(self) -> int:
        """How many GPUs Ray knows of; a simulated cluster may have some that torch does not see."""
        return self._room.gpus

    def free_on_gpu(self) -> int:
        """Return the bytes that are free on a worker's share of its GPU, 0 without one; waits for the first worker."""
        end = time.monotonic() + self.patience
        while time.monotonic() < end:
            hello = next((seat.hello for seat in self.seats if seat.hello is not None), None)
            if hello is not None:
                return int(hello.free * float(self._room.options.get("num_gpus", 1.0)))
            time.sleep(0.05)
        return 0

    def new_actor(self) -> Any:
        """Ask Ray for a worker; it comes when there is room for it."""
        return self._class.remote()

    def open(self, world: World) -> RayJob:
        """Take over a run: its samples go to the object store, unless the same ones are there already."""
        self._register_plugins()
        return RayJob(self, next(self._numbers), world)

    def _register_plugins(self) -> None:
        """Let plugin modules, loaded from loose files, travel to the workers by value."""
        from fedtrust import plugins

        for module in plugins.loaded_modules():
            self.ray.cloudpickle.register_pickle_by_value(module)

    def train(self, job: RayJob, chunks: Sequence[Chunk]) -> Ran:
        """Train a job's chunks; a model is made ready to travel once."""
        turn = RayRound(chunks, self._retries, functools.partial(add, self), functools.partial(fetch, self), job)
        sent: dict[tuple[int, ...], Any] = {}
        turn.models = []
        for chunk in chunks:
            key = (id(chunk.params), *(id(value) for value in chunk.server.values()))
            if key not in sent:
                sent[key] = self._parcel(chunk)
            turn.models.append(sent[key])
        turn.homes, turn.seconds, turn.most = self._homes(len(chunks)), [], max(1, int(_HANDFUL / job.pace))
        with threads.using(1):  # a second thread would wait for the next addition by spinning, on a core that a worker wants
            ran = self.pool.run(turn, functools.partial(self._tend, job))
        job.pace = max([1e-6, *turn.seconds])
        if next(self._rounds) % threads.TIDY == 0:
            threads.give_back()
        return ran

    def _parcel(self, chunk: Chunk) -> Any:
        """Return what the clients of a chunk are sent, or a reference to it: by way of the object store it takes milliseconds longer."""
        size = sum(value.numel() * value.element_size() for value in (chunk.params, *chunk.server.values()))
        return pack_model(chunk) if size <= self._along else self.ray.put(pack_model(chunk))

    def _homes(self, count: int) -> list[str]:
        """Give each node a block of neighbouring chunks, as large as its share of the workers."""
        nodes = sorted(seat.hello.node for seat in self.seats if seat.hello is not None)
        if len(set(nodes)) < 2:
            return [""] * count
        return [nodes[number * len(nodes) // count] for number in range(count)]

    def _tend(self, job: RayJob) -> float:
        """Go on as long as there is a worker that can do the job, or one may come up."""
        if len(job.refused) >= _REFUSALS:
            raise RunError(f"the Ray workers cannot take over the run: {job.refused[-1]}")
        wrong = next((seat.mismatch for seat in self.seats if seat.mismatch), "")
        if wrong:
            raise RunError(f"other versions would give other results: {wrong}")
        if any(seat.hello is not None for seat in self.seats):
            return 1.0
        last = max(self.seats, key=lambda seat: seat.down)
        if min(seat.failures for seat in self.seats) >= _FAILURES:
            raise RunError(f"the Ray workers do not come up: {last.why}")
        if time.monotonic() - last.down > self.patience:
            asked = ", ".join(f"{self._room.options[k]:g} {k[4:-1].upper()}" for k in ("num_cpus", "num_gpus") if k in self._room.options)
            raise RunError(f"no Ray worker could be placed for {self.patience:g} s (each needs {asked}); the last one: {last.why}")
        return 1.0

    def forget(self, job: RayJob) -> None:
        """Let the workers drop a job."""
        self.pool.stop(job)
        for seat in self.seats:
            seat.forget(job.number)
        for name in job.names:
            self.shelf.give_back(name)

    def close(self) -> None:
        """Leave no process behind."""
        if self.pool.closed:
            return
        self.pool.close()
        for seat in self.seats:
            seat.drop("closed")
        end = time.monotonic() + _GOODBYE
        for seat in self.seats:
            seat.thread.join(max(0.0, end - time.monotonic()))
        if self._started:
            self.ray.shutdown()
