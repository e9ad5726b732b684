"""Seconds a round of the same client work: fedtrust's three paths against each other and against Flower's own engine.

    python -m bench.rounds [--clients 40 100] [--model cnn] [--rounds 5] [--no-flower] [--json FILE]

fedtrust's contenders are interleaved round by round; Flower's engine, which cannot be stepped, runs before them in the same call. The
figures are medians; only their ratios mean anything on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord

from bench.work import recipe
from fedtrust.engine import flower, threads
from fedtrust.engine.grid import CohortGrid
from fedtrust.engine.validate import validate
from fedtrust.engine.workers import LocalExecutor

PATHS = ("loop", "vmap", "fused")


class Contender:
    """One path of the engine, ready to play rounds."""

    def __init__(self, clients: int, model: str, path: str, workers: int) -> None:
        self.setup = recipe(clients, model, path)
        self.executor = LocalExecutor(workers)
        self.executor.open(self.setup.world)
        self.grid = CohortGrid(self.setup.world, self.setup.roster, self.executor, stock=False)
        self.params, self.number, self.times = self.setup.params, 0, []  # type: ignore[var-annotated]

    def round(self) -> None:
        """Play a whole round: configure, train, validate, aggregate."""
        self.number += 1
        world, strategy = self.setup.world, self.setup.strategy
        began = time.perf_counter()
        ids = range(self.setup.roster.count)
        self.grid.begin(self.number, list(ids))
        messages = strategy.configure_train(self.number, flower.FlatRecord(self.params, world.layout), ConfigRecord(), self.grid)
        valid = validate(self.grid.send_and_receive(messages), {c: world.examples(c) for c in ids}, world.layout)
        arrays, _ = strategy.aggregate_train(self.number, valid.messages)
        self.params = flower.to_flat(arrays, world.layout)
        self.times.append(time.perf_counter() - began)


def measure(clients: int, model: str, rounds: int, with_flower: bool) -> list[dict[str, Any]]:
    """Return one row a contender."""
    rows = []
    reference = None
    if with_flower:
        from bench import flower_app

        reference = statistics.median(flower_app.run(clients, model, rounds))
        rows.append({"contender": "Flower's engine", "clients": clients, "seconds": reference})
    contenders = {f"fedtrust {path}, {threads.cores()} threads": Contender(clients, model, path, threads.cores()) for path in PATHS}
    contenders["fedtrust loop, 1 thread"] = Contender(clients, model, "loop", 1)
    for _ in range(rounds + 1):
        for contender in contenders.values():
            contender.round()
    for name, contender in contenders.items():
        rows.append({"contender": name, "clients": clients, "seconds": statistics.median(contender.times[1:])})
        contender.executor.close()
    loop = rows[-1]["seconds"]
    for row in rows:
        row["against_flower"] = None if reference is None else reference / row["seconds"]  # type: ignore[operator]
        row["against_loop"] = loop / row["seconds"]  # type: ignore[operator]
    return rows


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[40, 100])
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-flower", action="store_true")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    rows = [row for n in asked.clients for row in measure(n, asked.model, asked.rounds, not asked.no_flower)]
    print(f"{'contender':32} {'clients':>8} {'s/round':>9} {'× Flower':>9} {'× loop':>8}")
    for row in rows:
        faster = "–" if row["against_flower"] is None else f"{row['against_flower']:.1f}"
        print(f"{row['contender']:32} {row['clients']:8d} {row['seconds']:9.3f} {faster:>9} {row['against_loop']:8.2f}")
    if asked.json:
        machine = {"platform": platform.platform(), "cores": threads.cores(), "torch": torch.__version__, "model": asked.model}
        asked.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
