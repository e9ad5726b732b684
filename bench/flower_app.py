"""The bench's client work as a Flower app, written as well as Flower allows: an importable module, one thread an actor, data kept.

    python -m bench.flower_app --model cnn --clients 100 --rounds 7 [--samples N] [--save FILE]

One JSON object a round goes to standard output: its seconds, from one `configure_train` to the next.
"""

from __future__ import annotations

import argparse
import functools
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn

from bench.contender import channel, say
from bench.work import LR, Work, batches, recipe, save
from fedtrust.engine.world import World

client_app = ClientApp()


@functools.lru_cache(maxsize=1)
def _world(model: str, clients: int, samples: int) -> World:
    torch.set_num_threads(1)
    return recipe(Work(model, clients, samples or None)).world


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """One local epoch of plain SGD on the client's own batches."""
    config = message.content["config"]
    world = _world(str(config["model"]), int(config["clients"]), int(config["samples"]))  # type: ignore[arg-type]
    client = int(context.node_config["partition-id"])
    x, y = world.data.client(client)
    module = world.module
    module.load_state_dict(message.content["arrays"].to_torch_state_dict())  # type: ignore[union-attr]
    optimiser = torch.optim.SGD(module.parameters(), lr=LR)
    for batch in batches(world, int(config["server-round"]), client):  # type: ignore[arg-type]
        optimiser.zero_grad()
        nn.functional.cross_entropy(module(x[batch]), y[batch]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    metrics = MetricRecord({"num-examples": len(x), "train_loss": 0.0})
    return Message(RecordDict({"arrays": ArrayRecord(module.state_dict()), "metrics": metrics}), reply_to=message)


class Clocked(FedAvg):
    """FedAvg that calls when a round begins."""

    def __init__(self, begins: Callable[[], None], clients: int) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
        self._begins = begins

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Note the time and go on."""
        self._begins()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average; a round in which a client failed is no measurement."""
        answers = list(replies)
        good = sum(not answer.has_error() for answer in answers)
        if good < self.min_train_nodes:
            raise RuntimeError(f"{good} of {self.min_train_nodes} Flower clients trained in round {server_round}")
        return super().aggregate_train(server_round, answers)


def run(work: Work, rounds: int, told: Callable[[float], None]) -> torch.Tensor:
    """Run FedAvg in Flower's simulation engine, tell the seconds of each round, and return the model [d]."""
    began: list[float] = []
    result: list[torch.Tensor] = []
    server_app = ServerApp()

    def begins() -> None:
        now = time.perf_counter()
        if began:
            told(now - began[-1])
        began.append(time.perf_counter())

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        world = recipe(work).world
        config = ConfigRecord({"clients": work.clients, "model": work.model, "samples": work.samples or 0})
        arrays = ArrayRecord(world.module.state_dict())
        done = Clocked(begins, work.clients).start(grid, arrays, num_rounds=rounds, train_config=config)
        begins()
        result.append(world.layout.flatten(done.arrays.to_torch_state_dict()))

    backend: Any = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_simulation(server_app, client_app, num_supernodes=work.clients, backend_config=backend)
    return result[0]


def main() -> None:
    """Run and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cnn")
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--samples", type=int)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save")
    asked = parser.parse_args()
    answers = channel()
    # What is defined in `__main__` is pickled into every task; the actors shall import it once instead.
    from bench import flower_app

    work = Work(asked.model, asked.clients, asked.samples)
    params = flower_app.run(work, asked.rounds, lambda seconds: say(answers, seconds=seconds))
    if asked.save:
        save(params, asked.save)


if __name__ == "__main__":
    main()
