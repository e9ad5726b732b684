"""What the tests of client behaviours share: a task, a model and a view made by hand."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtrust.client import Behaviour, Predict, View
from fedtrust.data.base import Task
from fedtrust.layout import Layout
from fedtrust.registry import REGISTRY

IMAGES = Task("classification", (1, 6, 6), 10, 0.0, 1.0)
COLOURS = Task("classification", (3, 8, 8), 5, 0.0, 1.0)
TABLE = Task("classification", (30,), 2)
NUMBERS = Task("regression", (8,), 1)
MODULE = nn.Linear(4, 3)
LAYOUT = Layout.of(MODULE)


def view(task: Task = IMAGES, *, seed: int = 0, params: Tensor | None = None, **given: Any) -> View:
    """What a client knows in a round."""
    return View(
        params=torch.zeros(LAYOUT.size) if params is None else params,
        round=1,
        task=task,
        layout=LAYOUT,
        model=lambda flat, x: x,
        criterion=F.cross_entropy,
        memory={},
        server={},
        rng=torch.Generator().manual_seed(seed),
        **given,
    )


def make(name: str, **params: Any) -> Behaviour:
    """The registered behaviour with these parameters."""
    made = REGISTRY.make("behaviour", name, params)
    assert isinstance(made, Behaviour)
    return made


def samples(task: Task, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Samples below 0.9 in every pixel, so that a bright trigger is seen, and labels of every class in turn."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, *task.shape, generator=generator) * 0.9, torch.arange(n) % task.classes


def linear(weight: Tensor) -> Predict:
    """The local model x ↦ W x + b with the parameters `weight` [d]."""

    def call(parameters: Any, x: Tensor) -> Tensor:
        return F.linear(x, parameters["weight"], parameters["bias"])

    return Predict(call, LAYOUT.unflatten(weight), LAYOUT)
