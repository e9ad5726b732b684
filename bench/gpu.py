"""Clients a second on a GPU, with torch and NumPy alone: no flwr, no Ray, no pydantic, nothing installed but torch.

    python -m bench.gpu [--device cuda|cpu] [--models cnn cnn-large resnet18] [--clients 100 1000 4000] [--precision float32 bfloat16]
                        [--samples 40] [--rounds 3] [--json FILE]

Synthetic images, one epoch of SGD, batch 10. A round is what a worker of the engine does: chunks through `fedtrust.engine.cohort.train`,
the updates added up where they are made. How many clients are trained in one block is found out first: what a client needs is measured,
a block may take 70 % of the memory that is free, and of the sizes that fit the fastest is taken. The loop that everything is compared
with is one model, `torch.optim.SGD`, a client after the other, float32, on the same device; it is played for a few clients only, because
its rate does not depend on their number. The share is that of the device's measured matrix rate in the same precision (float32: no TF32).
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import machine
from bench.nets import NETS
from bench.options import Options, natural
from fedtrust.client import Behaviour
from fedtrust.data.base import FederatedData, Task
from fedtrust.engine import seeds
from fedtrust.engine.cohort import Chunk, ClientTask, choose_path, train
from fedtrust.engine.partial import Sums
from fedtrust.engine.prepare import schedule
from fedtrust.engine.world import World

LR, BATCH = 0.05, 10
#: The share of the free memory that a block of clients may take.
SHARE = 0.7
SIZES = (10, 25, 50, 100, 200, 400, 1000)
#: Clients of the loop: its rate is the same whatever their number.
LOOP_CLIENTS = 20


@dataclass(frozen=True)
class Plain:
    """Plain SGD as a client optimiser, as `fedtrust.models.optimisers.Sgd` without momentum, which needs pydantic."""

    def init(self, params: Tensor) -> dict[str, Tensor]:
        """There is no state."""
        return {}

    def step(self, params: Tensor, grads: Tensor, state: dict[str, Tensor], t: int, lr: float) -> None:
        """Take a step in place."""
        params.add_(grads, alpha=-lr)

    def torch(self, parameters: Any, lr: float) -> torch.optim.Optimizer:
        """Return PyTorch's."""
        return torch.optim.SGD(parameters, lr)


def make_world(model: str, clients: int, samples: int, precision: str, device: str) -> World:
    """Return a world of synthetic images in which every client has so many."""
    rng = seeds.torch_stream(0, "bench")
    count = clients * samples
    x = torch.rand(count, 1, 28, 28, generator=rng)
    y = torch.randint(0, 10, (count,), generator=rng)
    parts = list(np.arange(count, dtype=np.int64).reshape(clients, samples))
    data = FederatedData(Task("classification", (1, 28, 28), 10, 0.0, 1.0), x, y, parts, x[:10], y[:10])
    module = NETS[model]()
    with torch.no_grad():
        for parameter in module.parameters():  # PyTorch drew them from its global generator
            bound = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.uniform_(-bound, bound, generator=rng)
    world = World(data, module, F.cross_entropy, Plain(), LR, min(BATCH, samples), 1, 0, precision=precision)  # type: ignore[arg-type]
    return world.on(device)


def chunks(world: World, params: Tensor, clients: int, size: int, *, rows: bool = False) -> Iterator[Chunk]:
    """Yield a round's chunks; their updates are added up on the device unless the `rows` are wanted."""
    tasks = [ClientTask(client, Behaviour(), {}) for client in range(clients)]
    for first in range(0, clients, size):
        yield Chunk(1, params, {}, tuple(tasks[first : first + size]), None if rows else Sums(), rows)


def play(world: World, params: Tensor, clients: int, size: int) -> Tensor:
    """Train a round and return the mean update [d]."""
    total = torch.zeros_like(params)
    for chunk in chunks(world, params, clients, size):
        trained = train(world, chunk)
        if trained.faults or trained.total is None:
            raise RuntimeError(next(iter(trained.faults.values()), "no sum came back"))
        total += trained.total
    return total / clients


def loop(world: World, params: Tensor, clients: int) -> Tensor:
    """Train clients one at a time, as one would write it by hand; return the mean update [d]."""
    first = params.to(world.device)
    total, start = torch.zeros_like(first), world.layout.unflatten(first)
    for client in range(clients):
        world.module.load_state_dict(start)
        optimiser = torch.optim.SGD(world.module.parameters(), LR)
        rows = torch.from_numpy(world.data.parts[client]).to(world.device)
        x, y = world.data.x[rows], world.data.y[rows]
        rng = seeds.stream(world.seed, "batches", 1, client)
        for batch in torch.from_numpy(schedule(len(x), world.batch_size, world.epochs, rng)).to(world.device):
            optimiser.zero_grad()
            F.cross_entropy(world.module(x[batch]), y[batch]).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
        total += world.layout.vector(world.module) - first
    world.module.load_state_dict(start)
    return (total / clients).cpu()


def free_memory(device: str) -> int:
    """Return the bytes that can still be taken on the device, torch's own cache given back first."""
    if not device.startswith("cuda"):
        return machine.available_memory()
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])


def needed(world: World, params: Tensor, device: str) -> float:
    """Return what one more client in a block takes, in bytes: the difference between blocks of eight and of four."""

    def peak(size: int) -> int:
        torch.cuda.reset_peak_memory_stats(device)
        play(world, params, size, size)
        return int(torch.cuda.max_memory_allocated(device))

    play(world, params, 8, 8)  # workspaces of the libraries come with the first call
    return max(1.0, (peak(8) - peak(4)) / 4)


def best_size(world: World, params: Tensor, clients: int, device: str) -> tuple[int, int]:
    """Return the fastest number of clients a block, and the largest that was allowed."""
    if clients <= 8:
        return clients, clients
    # A CPU's limit is its caches, not its memory.
    most = max(1, int(SHARE * free_memory(device) / needed(world, params, device))) if device.startswith("cuda") else 50
    most = min(most, clients)
    sizes = [size for size in SIZES if size < most]
    sizes += [most] if most <= SIZES[-1] else []
    rates = {}
    for size in sizes:
        play(world, params, size, size)
        once = functools.partial(play, world, params, size, size)
        rates[size] = size / min(machine.seconds(once, device) for _ in range(2))
    return max(rates, key=lambda size: rates[size]), most


def measure(model: str, clients: int, asked: argparse.Namespace, precision: str) -> dict[str, Any]:
    """Return the figures of one line of the table."""
    device = asked.device
    world = make_world(model, clients, asked.samples, precision, device)
    params = world.layout.vector(world.module).cpu()
    few = min(clients, LOOP_CLIENTS)
    alone = loop(world, params, few)
    together = play(world, params, few, few)
    difference = float((alone - together).abs().max() / alone.abs().max())
    loop_rate = few / min(machine.seconds(lambda: loop(world, params, few), device) for _ in range(2))
    size, most = best_size(world, params, clients, device)
    play(world, params, clients, size)
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    times = [machine.seconds(lambda: play(world, params, clients, size), device) for _ in range(asked.rounds)]
    seconds = statistics.median(times)
    steps = -(-asked.samples // world.batch_size) * clients
    flops = steps * machine.step_flops(world.module, world.data.x[: world.batch_size])
    return {
        "model": model,
        "parameters": world.layout.size,
        "precision": precision,
        "path": choose_path(world, Behaviour()),
        "clients": clients,
        "block": size,
        "largest_block": most,
        "seconds": seconds,
        "times": times,
        "clients_per_second": clients / seconds,
        "against_loop": clients / seconds / loop_rate,
        "loop_clients_per_second": loop_rate,
        "share_of_matrix_rate": flops / seconds / asked.rates[precision],
        "peak_mib": torch.cuda.max_memory_allocated(device) / machine.MIB if device.startswith("cuda") else None,
        "difference": difference,
    }


def line(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    peak = "–" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    cells = [f"{row['model']:10}", f"{row['precision']:9}", f"{row['path']:6}", f"{row['clients']:8d}", f"{row['block']:6d}"]
    cells += [f"{row['seconds']:9.3f}", f"{row['clients_per_second']:10.1f}", f"{row['against_loop']:7.1f}"]
    return " ".join([*cells, f"{row['share_of_matrix_rate']:7.1%}", f"{peak:>9}", f"{row['difference']:10.0e}"])


def main() -> None:
    """Measure and print one table."""
    asked = _arguments()
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    size = 8192 if asked.device.startswith("cuda") else 1024
    asked.rates = {name: machine.matrix_rate(asked.device, dtype=kinds[name], size=size) for name in asked.precision}
    name = torch.cuda.get_device_name(asked.device) if asked.device.startswith("cuda") else machine.facts()["processor"]
    rates = ", ".join(f"{key} {rate / 1e12:.2f} TFLOP/s" for key, rate in asked.rates.items())
    print(f"{name}, torch {torch.__version__}; matrix rate {rates}; {asked.samples} samples a client, medians of {asked.rounds} rounds")
    print(
        f"{'model':10} {'precision':9} {'path':6} {'clients':>8} {'block':>6} {'s/round':>9} {'clients/s':>10} {'× loop':>7} "
        f"{'share':>7} {'peak MiB':>9} {'difference':>10}"
    )
    rows, failed = [], []
    for model in asked.models:
        for precision in asked.precision:
            for clients in asked.clients:
                try:
                    rows.append(measure(model, clients, asked, precision))
                    print(line(rows[-1]), flush=True)
                except (RuntimeError, torch.OutOfMemoryError) as error:
                    failed.append(f"{model}, {precision}, {clients} clients: {' '.join(str(error).split())[:200]}")
                    print(f"FAILED {failed[-1]}", flush=True)
    if asked.json:
        document = {"device": name, "machine": machine.facts(), "matrix_rate": asked.rates, "samples": asked.samples}
        asked.json.write_text(json.dumps(document | {"rows": rows, "failed": failed}, indent=1) + "\n")
    sys.exit(1 if failed else 0)


def _arguments() -> argparse.Namespace:
    parser = Options("bench.gpu", __doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", choices=list(NETS), default=list(NETS))
    parser.add_argument("--clients", type=natural, nargs="+", default=[100, 1000, 4000])
    parser.add_argument("--precision", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--samples", type=natural, default=40, help="samples a client (default: 40)")
    parser.add_argument("--rounds", type=natural, default=3, help="timed rounds (default: 3)")
    asked = parser.read()
    if asked.device != "cpu" and not (asked.device.startswith("cuda") and torch.cuda.is_available()):
        parser.error(f"--device: there is no {asked.device} here (torch {torch.__version__}); cpu works everywhere, for a try")
    return asked


if __name__ == "__main__":
    main()
