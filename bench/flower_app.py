"""The bench's client work as a Flower app, written as well as Flower allows: an importable module, one thread an actor, data kept."""

from __future__ import annotations

import functools
import itertools
import time
import warnings
from collections.abc import Iterable

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import nn

from bench.work import recipe
from fedtrust.engine import seeds
from fedtrust.engine.cohort import schedule

client_app, server_app = ClientApp(), ServerApp()
TIMES: list[float] = []


@functools.lru_cache(maxsize=1)
def _world(clients: int, model: str) -> object:
    torch.set_num_threads(1)
    return recipe(clients, model).world


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """One local epoch of plain SGD on the client's own batches."""
    config = message.content["config"]
    world = _world(int(config["clients"]), str(config["model"]))  # type: ignore[call-overload]
    client = int(context.node_config["partition-id"])
    x, y = world.data.client(client)  # type: ignore[attr-defined]
    module: nn.Module = world.module  # type: ignore[attr-defined]
    module.load_state_dict(message.content["arrays"].to_torch_state_dict())  # type: ignore[union-attr]
    optimiser = torch.optim.SGD(module.parameters(), lr=0.05)
    rng = seeds.stream(0, "batches", int(config["server-round"]), client)  # type: ignore[call-overload]
    for batch in torch.from_numpy(schedule(len(x), 10, 1, rng)):
        optimiser.zero_grad()
        nn.functional.cross_entropy(module(x[batch]), y[batch]).backward()
        optimiser.step()
    metrics = MetricRecord({"num-examples": len(x), "train_loss": 0.0})
    return Message(RecordDict({"arrays": ArrayRecord(module.state_dict()), "metrics": metrics}), reply_to=message)


class Clocked(FedAvg):
    """FedAvg that notes when each round begins."""

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Note the time and go on."""
        TIMES.append(time.perf_counter())
        return super().configure_train(server_round, arrays, config, grid)


def run(clients: int, model: str, rounds: int) -> list[float]:
    """Run FedAvg in Flower's simulation engine and return seconds a round (the first, cold one left out)."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        arrays = ArrayRecord(recipe(clients, model).world.module.state_dict())
        strategy = Clocked(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
        config = ConfigRecord({"clients": clients, "model": model})
        strategy.start(grid, arrays, num_rounds=rounds + 1, train_config=config)
        TIMES.append(time.perf_counter())

    TIMES.clear()
    backend = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_simulation(app, client_app, num_supernodes=clients, backend_config=backend)
    return [end - begin for begin, end in itertools.pairwise(TIMES[1:])]
