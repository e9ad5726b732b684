"""Who computes: this process (`local`) or Ray workers (`ray`). Neither choice changes a bit of the result."""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Protocol

import torch

from fedtrust.engine import threads
from fedtrust.engine.cohort import STOP, Chunk, Trained, train
from fedtrust.engine.world import World
from fedtrust.errors import InputError, RunError

#: Stands for the model in a chunk on its way to a worker; the model itself crosses once a round.
_NO_PARAMS = torch.zeros(0)


class Executor(Protocol):
    """Trains chunks, in any order, on any number of workers."""

    def describe(self) -> str:
        """Return what computes, in words for the report."""

    def open(self, world: World) -> None:
        """Take over a run: hand its data and architecture to every worker once."""

    def run(self, chunks: Sequence[Chunk]) -> list[Trained]:
        """Train the chunks; the results are in the order of the chunks. A chunk that could not be trained comes back with faults."""

    def close(self) -> None:
        """Leave no thread or process behind."""


#: Seconds that a training thread gets to finish its step when the executor closes.
_PATIENCE = 3.0


class _Crew:
    """Daemon threads that train chunks from a queue; a crew that hangs can be given up and does not keep the process alive."""

    def __init__(self, workers: int) -> None:
        self.stop = threading.Event()
        self._jobs: queue.SimpleQueue[tuple[Future[Trained], World, Chunk] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name=f"fedtrust-{i}", daemon=True) for i in range(workers)]
        for thread in self._threads:
            thread.start()

    def submit(self, world: World, chunk: Chunk) -> Future[Trained]:
        """Queue a chunk."""
        future: Future[Trained] = Future()
        self._jobs.put((future, world, chunk))
        return future

    def _work(self) -> None:
        torch.set_num_threads(1)
        STOP.event = self.stop
        while (job := self._jobs.get()) is not None and not self.stop.is_set():
            future, world, chunk = job
            try:
                future.set_result(train(world, chunk))
            except BaseException as error:  # handed to whoever waits
                future.set_exception(error)

    def dismiss(self, patience: float) -> None:
        """Tell every thread to stop before its next step, and wait so many seconds for it in all."""
        self.stop.set()
        for _ in self._threads:
            self._jobs.put(None)
        end = time.monotonic() + patience
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))


class LocalExecutor:
    """Workers are threads of this process; tensor operations release Python's lock.

    A chunk that is not done within the deadline is given up with its thread, and its clients are dropped by name.
    """

    def __init__(self, workers: int | None = None, deadline: float = 600.0) -> None:
        threads.keep_memory()
        self.workers = workers or (1 if torch.cuda.is_available() else threads.cores())
        self._deadline = deadline
        self._crew = _Crew(self.workers)
        self._world: World | None = None

    def describe(self) -> str:
        """Return what computes, in words for the report."""
        return f"local, {self.workers} thread{'s' if self.workers > 1 else ''}"

    def open(self, world: World) -> None:
        """Take over a run."""
        self._world = world.on("cuda" if torch.cuda.is_available() else "cpu")

    def run(self, chunks: Sequence[Chunk]) -> list[Trained]:
        """Train the chunks in the given order of starts and results."""
        world = self._world
        if world is None:
            raise RuntimeError("open() first")
        with threads.using(1):
            futures = [self._crew.submit(world, chunk) for chunk in chunks]
            pending = set(futures)
            while pending:
                done, pending = wait(pending, timeout=self._deadline, return_when=FIRST_COMPLETED)
                if not done:
                    self._give_up()
                    break
            lost = f"no answer within {self._deadline:g} s"
            return [f.result() if f.done() else _lost(chunk, lost) for f, chunk in zip(futures, chunks, strict=True)]

    def _give_up(self) -> None:
        """Leave threads that hang to themselves and go on with new ones."""
        self._crew.dismiss(0.0)
        self._crew = _Crew(self.workers)

    def close(self) -> None:
        """Leave no thread behind; one that is still training stops before its next step."""
        self._crew.dismiss(_PATIENCE)


class RayExecutor:
    """Workers are Ray actors: one a core without a GPU, one a GPU where there are any; on a cluster with `address`.

    A dead worker is replaced and its chunk tried again; after `retries` further deaths, or past the deadline, the chunk's clients are
    dropped by name.
    """

    def __init__(self, workers: int | None = None, address: str | None = None, deadline: float = 600.0, retries: int = 1) -> None:
        self._ray = _import_ray()
        self._deadline, self._retries = deadline, retries
        self._started = not self._ray.is_initialized()
        if self._started:
            self._start(workers, address)
        resources = self._ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        self.workers = workers or (gpus or max(1, cpus))
        if self.workers > cpus:
            raise InputError(f"the Ray cluster has {cpus} CPUs (got {self.workers} workers)", "--workers")
        # More workers than GPUs share them.
        self._options = {"num_cpus": 1.0} | ({"num_gpus": min(1.0, gpus / self.workers)} if gpus else {})
        self._actors: list[Any] = []
        self._world_ref: Any = None

    def _start(self, workers: int | None, address: str | None) -> None:
        settings: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False, "include_dashboard": False}
        if address:
            _reachable(address)
            settings = {"address": address, "logging_level": "ERROR", "log_to_driver": False}
        else:
            settings |= {"num_cpus": max(workers or 1, threads.cores()), "object_store_memory": 512 * 1024**2}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Ray warns about its own dependencies
                self._ray.init(**settings)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise InputError(
                f"Ray did not start: {' '.join(str(error).split())[:200]}", "--ray-address" if address else "--engine ray"
            ) from None

    def describe(self) -> str:
        """Return what computes, in words for the report."""
        return f"ray, {self.workers} worker{'s' if self.workers > 1 else ''}"

    def open(self, world: World) -> None:
        """Take over a run: the data and the architecture go to the object store once, every worker fetches them once."""
        _register_plugins(self._ray)
        self._world_ref = self._ray.put(world)
        if not self._actors:
            self._actors = [self._new_actor() for _ in range(self.workers)]
        ready = [actor.open.remote(self._world_ref) for actor in self._actors]
        try:
            self._ray.get(ready, timeout=self._deadline)
        except self._ray.exceptions.RayError as error:
            raise RunError(f"the Ray workers did not come up: {type(error).__name__}") from None

    def _new_actor(self) -> Any:
        return self._ray.remote(_Worker).options(**self._options).remote()

    def run(self, chunks: Sequence[Chunk]) -> list[Trained]:
        """Train the chunks on whichever worker is free; the model crosses to the object store once."""
        shared: dict[int, Any] = {}
        results: list[Trained | None] = [None] * len(chunks)
        tries = [0] * len(chunks)
        waiting = list(range(len(chunks)))
        free = list(range(len(self._actors)))
        running: dict[Any, tuple[int, int, float]] = {}
        while waiting or running:
            while waiting and free:
                number, worker = waiting.pop(0), free.pop(0)
                chunk = chunks[number]
                if id(chunk.params) not in shared:
                    shared[id(chunk.params)] = self._ray.put(chunk.params.numpy())
                call = self._actors[worker].train.remote(shared[id(chunk.params)], chunk._replace(params=_NO_PARAMS))
                running[call] = (number, worker, time.monotonic() + self._deadline)
            first = min(end for _, _, end in running.values())
            done, _ = self._ray.wait(list(running), num_returns=1, timeout=max(0.0, first - time.monotonic()))
            for future in done or [f for f, (_, _, end) in running.items() if end <= time.monotonic()]:
                number, worker, _ = running.pop(future)
                outcome = self._collect(future, late=not done)
                if isinstance(outcome, Trained):
                    results[number] = outcome
                else:
                    self._replace(worker)
                    tries[number] += 1
                    if tries[number] <= self._retries and done:
                        waiting.insert(0, number)
                    else:
                        results[number] = _lost(chunks[number], outcome)
                free.append(worker)
        return [r for r in results if r is not None]

    def _collect(self, future: Any, *, late: bool) -> Trained | str:
        if late:
            return f"no answer within {self._deadline:g} s"
        try:
            clients, updates, losses, memories, faults = self._ray.get(future)
        except self._ray.exceptions.RayError as error:
            return f"the worker failed ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        return Trained(clients, torch.from_numpy(updates.copy()), torch.from_numpy(losses.copy()), memories, faults)

    def _replace(self, worker: int) -> None:
        self._ray.kill(self._actors[worker])
        self._actors[worker] = self._new_actor()
        self._actors[worker].open.remote(self._world_ref)

    def close(self) -> None:
        """Leave no process behind."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []
        if self._started:
            self._ray.shutdown()


def _reachable(address: str) -> None:
    """Refuse a cluster that nobody answers for: Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # `auto` and the like are Ray's to understand
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"nothing answers at {address}: {error}", "--ray-address") from None


class _Worker:
    """The actor's class: holds the world, trains chunks."""

    def __init__(self) -> None:
        threads.keep_memory()
        torch.set_num_threads(1)
        self._world: World | None = None

    def open(self, world: World) -> None:
        """Take over a run."""
        self._world = world.on("cuda" if torch.cuda.is_available() else "cpu")

    def pid(self) -> int:
        """Return this worker's process id."""
        return os.getpid()

    def train(self, params: Any, chunk: Chunk) -> tuple[Any, ...]:
        """Train a chunk; tensors travel as arrays, which Ray shares without a copy."""
        if self._world is None:
            raise RuntimeError("open() first")
        result = train(self._world, chunk._replace(params=torch.from_numpy(params.copy())))
        return result.clients, result.updates.numpy(), result.losses.numpy(), result.memories, result.faults


def _lost(chunk: Chunk, reason: str) -> Trained:
    return Trained((), torch.zeros(0, 0), torch.zeros(0), (), {task.client: reason for task in chunk.tasks})


def _import_ray() -> Any:
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray
            import ray.exceptions
    except ImportError as error:
        raise InputError(f"Ray cannot be imported: {error}", "--engine ray") from None
    return ray


def _register_plugins(ray: Any) -> None:
    """Let plugin modules, loaded from loose files, travel to the workers by value."""
    from fedtrust import plugins

    for module in plugins.loaded_modules():
        ray.cloudpickle.register_pickle_by_value(module)


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
        return RayExecutor(workers, address, deadline, retries)
    raise InputError(f"unknown engine '{engine}' (allowed: auto, local, ray)", "--engine")


def chunks_of(sizes: Iterable[int], count: int) -> list[list[int]]:
    """Cut `count` clients into chunks, longest schedules first; depends on nothing but the round's clients.

    Args:
        sizes: per client the number of local samples.
        count: how many clients there are.

    Returns:
        Positions of the clients, chunk by chunk. About eight chunks, of 4 to 25 clients: small enough to keep several workers busy, large
        enough to be worth batching; 25 models of the 54k-parameter CNN fill a core's cache.
    """
    order = sorted(range(count), key=lambda i, s=list(sizes): (-s[i], i))  # type: ignore[misc]
    size = min(25, max(4, -(-count // 8)))
    return [order[i : i + size] for i in range(0, count, size)]
