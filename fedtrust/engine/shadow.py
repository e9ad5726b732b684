"""Models that an observer trains for itself, all at once, through the engine that trains clients."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fedtrust.client import Behaviour
from fedtrust.data.base import FederatedData
from fedtrust.engine import seeds
from fedtrust.engine.chunks import chunks_of
from fedtrust.engine.cohort import Chunk, ClientTask
from fedtrust.engine.workers import Executor
from fedtrust.engine.world import World
from fedtrust.models.build import initialise


class Shadow(Protocol):
    """Trains models of one's own."""

    def __call__(self, sets: Sequence[tuple[Tensor, Tensor]], start: Tensor | None = None, epochs: int | None = None) -> Tensor:
        """Return the parameters [k, d] of k models, the i-th trained on `sets[i]` (x [b, *shape], y [b]) as a client trains.

        Args:
            sets: what each is trained on.
            start: the model they all start from [d]; by default a fresh one.
            epochs: passes over the data; by default the clients'.

        Raises:
            RuntimeError: one of them could not be trained.
        """


def shadows(executor: Executor, world: World, round_number: int, purpose: str) -> Shadow:
    """Return a trainer of shadow models; every call of it in a round draws other batches and another fresh model."""
    counter = itertools.count()

    def train(sets: Sequence[tuple[Tensor, Tensor]], start: Tensor | None = None, epochs: int | None = None) -> Tensor:
        seed = seeds.key(world.seed, f"shadow/{purpose}", round_number, next(counter)) & (2**63 - 1)
        own = _world(world, sets, seed, epochs)
        if start is None:
            initialise(own.module, seeds.torch_stream(seed, "init"))
            start = own.layout.vector(own.module)
        return _trained(executor, own, start.detach().float().cpu())

    return train


def _world(world: World, sets: Sequence[tuple[Tensor, Tensor]], seed: int, epochs: int | None) -> World:
    if not sets or any(len(x) == 0 or len(x) != len(y) for x, y in sets):
        raise ValueError("a shadow model needs samples, and a label for each")
    sizes = [len(x) for x, _ in sets]
    offsets = np.cumsum([0, *sizes])
    data = FederatedData(
        task=world.data.task,
        x=torch.cat([x for x, _ in sets]).cpu(),
        y=torch.cat([y for _, y in sets]).cpu(),
        parts=[np.arange(a, b, dtype=np.int64) for a, b in itertools.pairwise(offsets.tolist())],
        x_test=world.data.x_test[:0],
        y_test=world.data.y_test[:0],
    )
    return dataclasses.replace(
        world,
        data=data,
        module=copy.deepcopy(world.module),
        seed=seed,
        epochs=epochs or world.epochs,
        batch_size=min(world.batch_size, max(sizes)),
    )


def _trained(executor: Executor, world: World, start: Tensor) -> Tensor:
    tasks = [ClientTask(i, Behaviour(), {}) for i in range(len(world.data.parts))]
    job = executor.open(world)
    try:
        cuts = chunks_of([world.examples(t.client) for t in tasks], len(tasks), job.cut())
        chunks = [Chunk(1, start, {}, tuple(tasks[i] for i in positions), cohort=len(tasks)) for positions in cuts]
        results = job.run(chunks).results
    finally:
        job.close()
    faults = {client: why for result in results for client, why in result.faults.items()}
    if faults:
        raise RuntimeError(f"shadow model {min(faults)} could not be trained: {faults[min(faults)]}")
    models = torch.empty(len(tasks), world.layout.size)
    for result in results:
        models[list(result.clients)] = start + result.updates
    return models
