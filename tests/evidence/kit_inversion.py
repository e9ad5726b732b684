"""One round of clients with a few digits each, a curious server, and what it gets out of their updates; three seeds."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from fedtrust.runner import run
from fedtrust.scenario import parse

SEEDS = (1, 2, 3)


def found(
    attack: str,
    model: str | tuple[tuple[str, Any], ...] = "lenet",
    source: str = "mnist5k",
    samples: int = 1,
    batch_size: int | None = None,
    epochs: int = 1,
    clients: int = 4,
    honest: tuple[tuple[str, Any], ...] = (("name", "honest"),),
    filters: tuple[str, ...] = (),
    **params: Any,
) -> Mapping[str, float]:
    """Return the medians over the seeds of what an attack scores on the first round of `clients` clients with `samples` samples each.

    Every score is itself a median over the clients' samples, but for shares. The batch is all of a client's samples unless said otherwise.
    """
    return _found(attack, model, source, samples, batch_size or samples, epochs, clients, honest, filters, tuple(sorted(params.items())))


@functools.cache
def _found(
    attack: str,
    model: Any,
    source: str,
    samples: int,
    batch_size: int,
    epochs: int,
    clients: int,
    honest: tuple[tuple[str, Any], ...],
    filters: tuple[str, ...],
    params: tuple[tuple[str, Any], ...],
) -> Mapping[str, float]:
    count = max(10, clients)
    document = {
        "title": "evidence",
        "rounds": 1,
        "data": {"source": {"name": source, "limit": count * samples}, "partition": "iid"},
        "model": model if isinstance(model, str) else dict(model),
        "clients": {
            "count": count,
            "per_round": clients,
            "behaviour": dict(honest),
            "train": {"lr": 0.1, "batch_size": batch_size, "epochs": epochs},
        },
        "strategy": {"filters": list(filters)},
        "probes": [{"name": attack, "clients": clients, **dict(params)}],
    }
    runs = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            summary = run(parse({**document, "seed": seed}), Path(folder) / "run", engine="local").summary
        assert summary["status"] == "finished", json.dumps(summary, indent=1)
        runs.append(summary["metrics"])
    return {name.partition("/")[2]: median(one[name] for one in runs) for name in runs[0]}
