"""What the tests of gradient inversion share: a model, clients that train as the engine does, and what a curious server sees of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fedtrust.data.base import Task
from fedtrust.engine.prepare import local_steps
from fedtrust.layout import Layout
from fedtrust.models.architecture import Architecture
from fedtrust.models.build import build
from fedtrust.probes.base import ProbeContext
from fedtrust.registry import REGISTRY
from fedtrust.sending import Recipe
from tests.probes.probe_kit import context

DIGITS = Task("classification", (1, 8, 8), 10, 0.0, 1.0)
TABLE = Task("classification", (30,), 2)


def recipe(optimiser: str = "sgd", lr: float = 0.1, batch_size: int = 1, epochs: int = 1, **params: Any) -> Recipe:
    return Recipe(optimiser, lr, batch_size, epochs, "cross-entropy", params)


def samples(task: Task, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, *task.shape, generator=generator) if task.image else torch.randn(n, *task.shape, generator=generator)
    return x, torch.randint(task.classes, (n,), generator=generator)


def trained(module: torch.nn.Module, layout: Layout, start: Tensor, how: Recipe, x: Tensor, y: Tensor) -> Tensor:
    """Return the update [d] of a client that takes its samples in their order, pass after pass; plain PyTorch."""
    with torch.no_grad():
        for name, value in layout.unflatten(start).items():
            module.get_parameter(name).copy_(value)
    steps = local_steps(len(x), how.batch_size, how.epochs)
    search = REGISTRY.make("optimiser", how.optimiser, how.params).torch(module.parameters(), how.lr)
    for batch in (torch.arange(steps * how.batch_size) % len(x)).view(steps, how.batch_size):
        search.zero_grad()
        F.cross_entropy(module(x[batch]), y[batch]).backward()
        search.step()
    return layout.vector(module) - start


class Play:
    """A server, some clients and their updates; `start` changes the model that is sent."""

    def __init__(
        self,
        model: str,
        task: Task,
        data: list[tuple[Tensor, Tensor]],
        how: Recipe,
        start: Tensor | None = None,
        seed: int = 0,
        **params: Any,
    ) -> None:
        module = build(model, params, task, seed)
        self.layout = Layout.of(module)
        self.model = Architecture(module, self.layout)
        self.start = self.layout.vector(module) if start is None else start
        self.task, self.how, self.data = task, how, data
        self.updates = torch.stack([trained(build(model, params, task, seed), self.layout, self.start, how, x, y) for x, y in data])

    def seen(self, **given: Any) -> ProbeContext:
        """What the curious server has."""
        clients = tuple(range(len(self.data)))
        base: dict[str, Any] = {
            "round": 1,
            "task": self.task,
            "params": self.start,
            "model": self.model,
            "layout": self.layout,
            "recipe": self.how,
            "clients": clients,
            "updates": self.updates,
            "sent": dict.fromkeys(clients, self.start),
            "examples": {c: len(x) for c, (x, _) in enumerate(self.data)},
        }
        return context(**(base | given))
