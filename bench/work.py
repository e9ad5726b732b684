"""The work that every contender does, and the only place in bench/ that knows the engine's internals.

FedAvg, every client each round, one epoch of plain SGD, batch 10: 4000 MNIST digits split evenly, or so many digits a client.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import ConfigRecord
from torch import Tensor, nn

from bench import machine
from fedtrust.client import Behaviour
from fedtrust.engine import flower, seeds, threads, workers
from fedtrust.engine.cohort import Chunk, choose_path, train
from fedtrust.engine.grid import CohortGrid
from fedtrust.engine.prepare import schedule
from fedtrust.engine.validate import validate
from fedtrust.engine.world import World
from fedtrust.errors import RunError
from fedtrust.scenario import parse
from fedtrust.setup import Setup, build
from fedtrust.strategy import FedTrustStrategy

LR, BATCH = 0.05, 10
#: Models of the bench that are not a registered one as it is.
MODELS: dict[str, Any] = {"resnet18-large-stem": {"name": "resnet18", "params": {"stem": "large"}}}


class Work(NamedTuple):
    """What is to be done: the model, how many clients, and how many samples each has (`None`: 4000 in all)."""

    model: str
    clients: int
    samples: int | None = None


class Way(NamedTuple):
    """How fedtrust does it: the path of training, the engine, its workers, the server's rule, what is multiplied in."""

    path: str = "auto"
    engine: str = "local"
    workers: int = 1
    aggregator: str = "weighted-mean"
    precision: str = "float32"


def recipe(work: Work, way: Way | None = None) -> Setup:
    """Return the run that does this work."""
    way = way or Way()
    limit = {} if work.samples is None else {"limit": work.clients * work.samples}
    document: dict[str, Any] = {
        "title": "bench",
        "rounds": 1,
        "data": {"source": {"name": "mnist5k", **limit}},
        "model": MODELS.get(work.model, work.model),
        "clients": {"count": work.clients, "train": {"lr": LR, "batch_size": BATCH}},
        "strategy": {"aggregator": way.aggregator},
        "engine": {"path": way.path, "precision": way.precision},
    }
    return build(parse(document))


def batches(world: World, round_number: int, client: int) -> Tensor:
    """Return which of its samples a client trains on in each local step [steps, batch]: every contender takes the same."""
    rng = seeds.stream(world.seed, "batches", round_number, client)
    return torch.from_numpy(schedule(world.examples(client), world.batch_size, world.epochs, rng))


def round_flops(world: World) -> int:
    """Return the floating-point operations of a round's training; see `bench.machine.step_flops`."""
    steps = sum(len(batches(world, 1, client)) for client in range(len(world.data.parts)))
    return steps * machine.step_flops(world.module, world.data.x[: world.batch_size])


def path_of(world: World) -> str:
    """Return the path on which honest clients are trained."""
    return choose_path(world, Behaviour())


class _Tap:
    """A job that notes which chunks passed and how long they took."""

    def __init__(self, job: Any) -> None:
        self._job = job
        self.chunks: list[Chunk] = []
        self.seconds = 0.0

    def run(self, chunks: Sequence[Chunk]) -> Any:
        """Pass the chunks on."""
        began = time.perf_counter()
        result = self._job.run(chunks)
        self.seconds = time.perf_counter() - began
        self.chunks = list(chunks)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._job, name)


class Player:
    """A scenario's rounds on one engine and path, as `fedtrust run` plays them, without probes and records."""

    def __init__(self, work: Work, way: Way) -> None:
        self.setup = recipe(work, way)
        self.world = self.setup.world
        self._executor = workers.make(way.engine, way.workers, None, 3600.0, 0)
        self._tap = _Tap(self._executor.open(self.world))
        self._grid = CohortGrid(self.world, self.setup.roster, self._tap, stock=self.setup.stock)
        self._count, self._number = way.workers, 0
        self.params = self.setup.params

    def round(self) -> dict[str, float]:
        """Play a whole round: configure, train, validate, aggregate. Return its seconds, and those in which the workers had it."""
        self._number += 1
        strategy, layout, number = self.setup.strategy, self.world.layout, self._number
        began = time.perf_counter()
        ids = range(self.setup.roster.count)
        sums = strategy.sums if isinstance(strategy, FedTrustStrategy) else None
        self._grid.begin(number, list(ids), sums=sums)
        record = flower.FlatRecord(self.params, layout)
        messages = strategy.configure_train(number, record.fill() if self.setup.stock else record, ConfigRecord(), self._grid)
        with threads.using(threads.SERVER):
            valid = validate(self._grid.send_and_receive(messages), {c: self.world.examples(c) for c in ids}, layout)
            if valid.faults:
                raise RunError(f"clients failed: {dict(list(valid.faults.items())[:3])}")
            with flower.cheap_collection():
                arrays, _ = strategy.aggregate_train(number, valid.messages)
        assert arrays is not None
        self.params = flower.to_flat(arrays, layout)
        return {"seconds": time.perf_counter() - began, "workers": self._tap.seconds}

    def pure(self) -> dict[str, float]:
        """Train the last round's chunks again on as many threads, with no grid, no messages, no workers and no aggregation."""
        world = self.world.on("cuda" if torch.cuda.is_available() else "cpu")
        with threads.using(1), ThreadPoolExecutor(self._count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            began = time.perf_counter()
            for result in pool.map(lambda chunk: train(world, chunk), self._tap.chunks):
                if result.faults:
                    raise RunError(f"clients failed: {dict(list(result.faults.items())[:3])}")
            return {"seconds": time.perf_counter() - began}

    def close(self) -> None:
        """Leave nothing behind."""
        self._executor.close()


class PureLoop:
    """What anybody would write by hand: one model, `torch.optim.SGD`, a client after the other, on one thread."""

    def __init__(self, work: Work) -> None:
        torch.set_num_threads(1)
        self.world = recipe(work).world
        self._model: nn.Module = self.world.module
        self._clients = [self.world.data.client(i) for i in range(work.clients)]
        self._number = 0

    def round(self) -> dict[str, float]:
        """Train everybody and take the weighted mean; return the seconds."""
        self._number += 1
        began = time.perf_counter()
        start = {name: value.clone() for name, value in self._model.state_dict().items()}
        mean = {name: torch.zeros_like(value) for name, value in start.items()}
        total = sum(len(y) for _, y in self._clients)
        for client, (x, y) in enumerate(self._clients):
            self._model.load_state_dict(start)
            optimiser = torch.optim.SGD(self._model.parameters(), lr=LR)
            for batch in batches(self.world, self._number, client):
                optimiser.zero_grad()
                nn.functional.cross_entropy(self._model(x[batch]), y[batch]).backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            for name, value in self._model.state_dict().items():
                mean[name].add_(value, alpha=len(y) / total)
        self._model.load_state_dict(mean)
        return {"seconds": time.perf_counter() - began}

    @property
    def params(self) -> Tensor:
        """The global model [d]."""
        return self.world.layout.vector(self._model)

    def close(self) -> None:
        """Nothing is left behind anyway."""


def save(params: Tensor, path: str) -> None:
    """Write a model's parameters [d], so that the contenders' can be compared."""
    np.save(path, params.numpy())


def export(work: Work, rounds: int, path: str) -> None:
    """Write the work, the batches of so many rounds included, for a contender that has torch but not fedtrust."""
    world = recipe(work).world
    clients = range(work.clients)
    torch.save(
        {
            "module": world.module,
            "x": world.data.x,
            "y": world.data.y,
            "parts": [torch.from_numpy(part) for part in world.data.parts],
            "batches": [[batches(world, number, client) for client in clients] for number in range(1, rounds + 1)],
            "lr": world.lr,
            "batch": world.batch_size,
        },
        path,
    )
