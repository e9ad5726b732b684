"""The work that every contender of the bench does: FedAvg, all clients each round, 4000 MNIST digits split evenly, one epoch, batch 10."""

from __future__ import annotations

from typing import Any

from fedtrust.scenario import parse
from fedtrust.setup import Setup, build


def recipe(clients: int, model: str, path: str = "auto") -> Setup:
    """Return the run with so many clients."""
    document: dict[str, Any] = {
        "title": "bench",
        "rounds": 1,
        "data": {"source": "mnist5k"},
        "model": model,
        "clients": {"count": clients, "train": {"lr": 0.05, "batch_size": 10}},
        "strategy": {"aggregator": "weighted-mean"},
        "engine": {"path": path},
    }
    return build(parse(document))
