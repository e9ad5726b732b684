"""What the tests of probes share: a model whose answers are written down, and the context of a round."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fedtrust.data.base import FederatedData, Task
from fedtrust.probes.base import Goal, ProbeContext, Truth
from fedtrust.registry import REGISTRY

#: Samples are single numbers and the model says `class = the number, rounded`.
TASK = Task("classification", (1,), 3)


def says(x: Tensor) -> Tensor:
    """Give each sample the class that its (first) number is closest to; outputs [n, 3]."""
    return -(x.flatten(1)[:, :1] - torch.arange(3.0)).abs()


def numbers(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]


def federated(test_x: Tensor, test_y: list[int], labels: list[list[int]], task: Task = TASK, **given: Any) -> FederatedData:
    """Clients with these labels (their samples do not matter)."""
    y = torch.tensor([label for part in labels for label in part])
    starts = np.cumsum([0, *(len(part) for part in labels)])
    parts = [np.arange(a, b, dtype=np.int64) for a, b in itertools.pairwise(starts)]
    return FederatedData(task, torch.zeros(len(y), *task.shape), y, parts, test_x, torch.tensor(test_y), **given)


def context(**given: Any) -> ProbeContext:
    """The context of a round with what is given, the rest as a user would have it."""
    base: dict[str, Any] = {
        "round": 4,
        "final": False,
        "task": TASK,
        "query": says,
        "rng": torch.Generator().manual_seed(0),
        "criterion": F.cross_entropy,
    }
    return ProbeContext(**(base | given))


def truth(*malicious: int, goals: tuple[Goal, ...] = ()) -> Truth:
    return Truth(frozenset(malicious), goals)


def measure(name: str, ctx: ProbeContext, **params: Any) -> dict[str, Any]:
    """What the registered probe says."""
    return dict(REGISTRY.make("probe", name, params)(ctx))
