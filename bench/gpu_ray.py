"""Clients a second of the whole engine on Ray, one worker a GPU: scenario, grid, messages, aggregation, probes, records and all.

    python -m bench.gpu_ray [--workers N] [--ray-address HOST:PORT] [--models cnn cnn-large resnet18] [--clients 100 1000 4000]
                            [--precision float32|bfloat16] [--samples 40] [--rounds 3] [--json FILE]

FedAvg with every client each round, batch 10, one epoch, digits of MNIST. The seconds are from one round's record to the next; the first
round is left out. Exit 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from bench import machine
from bench.nets import NETS
from bench.options import Options, natural


def scenario(model: str, clients: int, asked: argparse.Namespace) -> dict[str, Any]:
    """Return the scenario as a document."""
    copies = -(-clients * asked.samples // 4000)
    return {
        "title": "bench: Ray and GPUs",
        "rounds": asked.rounds + 1,
        "data": {"source": {"name": "bench-tiles", "copies": copies}},
        "model": model,
        "clients": {"count": clients, "train": {"lr": 0.05, "batch_size": 10}},
        "strategy": {"aggregator": "weighted-mean"},
        "engine": {"precision": asked.precision},
    }


def measure(model: str, clients: int, asked: argparse.Namespace) -> dict[str, Any]:
    """Play the scenario and return the figures of one line."""
    import bench.tiles  # noqa: F401  # registers the source
    from fedtrust.listener import SilentListener
    from fedtrust.runner import run
    from fedtrust.scenario import parse

    ends: list[float] = []
    records: list[dict[str, Any]] = []

    class Clock(SilentListener):
        def round_done(self, name: str, record: Mapping[str, Any]) -> None:
            ends.append(time.perf_counter())
            records.append(dict(record))

    with tempfile.TemporaryDirectory() as folder:
        result = run(
            parse(scenario(model, clients, asked)),
            Path(folder) / "run",
            engine="ray",
            workers=asked.workers,
            ray_address=asked.ray_address,
            listener=Clock(),
        )
        if result.status != "finished":
            raise RuntimeError(f"{result.status}: {result.why}")
        computed = str(json.loads((result.directory / "environment.json").read_text()).get("engine", ""))
    times = [end - begin for begin, end in itertools.pairwise(ends[1:])]  # record 0 is the start, round 1 is cold
    return {
        "model": model,
        "clients": clients,
        "precision": asked.precision,
        "engine": computed,
        "seconds": statistics.median(times),
        "times": times,
        "train_seconds": statistics.median(record["seconds"]["train"] for record in records[2:]),
        "clients_per_second": clients / statistics.median(times),
    }


def main() -> None:
    """Measure and print one table."""
    parser = Options("bench.gpu_ray", __doc__)
    parser.add_argument("--workers", type=natural, help="Ray workers (default: one a GPU)")
    parser.add_argument("--ray-address", help="a running Ray cluster")
    parser.add_argument("--models", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--clients", type=natural, nargs="+", default=[100, 1000, 4000])
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--samples", type=natural, default=40, help="samples a client, rounded up to whole copies of 4000 digits")
    parser.add_argument("--rounds", type=natural, default=3, help="timed rounds (default: 3)")
    asked = parser.read()
    if not torch.cuda.is_available() and not asked.ray_address:
        parser.error(f"there is no GPU here (torch {torch.__version__}); give the cluster's --ray-address, or see bench.gpu --device cpu")
    print(f"{'model':10} {'clients':>8} {'s/round':>9} {'training':>9} {'clients/s':>10}  engine")
    rows = []
    for model in asked.models:
        for clients in asked.clients:
            row = measure(model, clients, asked)
            rows.append(row)
            cells = [f"{model:10}", f"{clients:8d}", f"{row['seconds']:9.3f}", f"{row['train_seconds']:9.3f}"]
            print(*cells, f"{row['clients_per_second']:10.1f}  {row['engine']}", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps({"machine": machine.facts(), "rows": rows}, indent=1) + "\n")
    sys.exit(0)


if __name__ == "__main__":
    main()
