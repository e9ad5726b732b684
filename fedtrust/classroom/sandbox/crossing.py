"""What of a run crosses into a sandbox, and under which names: plain data and tensors, only what the role may see.

Clients go by pseudonyms that are drawn once a game, and their rows are shuffled anew every round, so that neither a number nor a place says
who somebody is; what comes back is put back in the host's order. The scenario's seed does not cross: each call gets a number of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from fedtrust.client import View
from fedtrust.data.base import Task
from fedtrust.engine import seeds
from fedtrust.layout import Layout
from fedtrust.probes.base import ProbeContext
from fedtrust.scenario import Scenario
from fedtrust.server import AggContext

Plain = dict[str, Any]
Tensors = dict[str, Tensor]


def setting(task: Task, layout: Layout, model: tuple[str, Mapping[str, Any]], loss: tuple[str, Mapping[str, Any]]) -> Plain:
    """Return what everybody knows of the protocol as plain data: task, layout of [d], model and loss by name and parameters."""
    return {
        "task": {**dataclasses.asdict(task), "people": []},
        "layout": {"names": list(layout.names), "shapes": [list(s) for s in layout.shapes]},
        "model": {"name": model[0], "params": dict(model[1])},
        "loss": {"name": loss[0], "params": dict(loss[1])},
    }


def setting_of(scenario: Scenario, task: Task, layout: Layout) -> Plain:
    """Return the setting of a resolved scenario."""
    loss = scenario.clients.train.loss
    if loss is None:
        raise ValueError("the scenario was not resolved")
    return setting(task, layout, (scenario.model.name, scenario.model.params), (loss.name, loss.params))


class Names:
    """The clients' names and places in one game.

    Args:
        number: what they are drawn from; a game's own.
        population: how many clients there are.
    """

    def __init__(self, number: int, population: int) -> None:
        self._number = number
        self._to = [int(i) for i in seeds.stream(number, "sandbox/names").permutation(population)]

    def of(self, client: int) -> int:
        """Return a client's pseudonym, from 0 on."""
        return self._to[client]

    def order(self, count: int, round_number: int, what: str) -> Tensor:
        """Return in which order `count` rows cross in a round, int64 [count]."""
        return torch.from_numpy(seeds.stream(self._number, f"sandbox/order/{what}", round_number).permutation(count))


def back(rows: Tensor, order: Tensor) -> Tensor:
    """Return rows that crossed in an order in the host's."""
    result = torch.empty_like(rows)
    result[order] = rows
    return result


def draw(rng: Generator | None) -> int:
    """Return a number for one call's randomness, drawn from the call's own generator."""
    return 0 if rng is None else int(torch.randint(2**62, (1,), generator=rng))


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """Return tensors by names that tell where they belong."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


def of_view(view: View, names: Names) -> tuple[Plain, Tensors, Tensor]:
    """Return a client's or coalition's view as plain data and tensors, and the order in which the members cross [k]."""
    order = names.order(len(view.coalition), view.round, f"members/{view.client}")
    tensors: Tensors = {"params": view.params, **prefixed("memory", view.memory), **prefixed("server", view.server)}
    if view.shared is not None:
        tensors |= prefixed("shared", view.shared)
    if view.targets is not None:
        tensors |= {"targets.x": view.targets[0], "targets.y": view.targets[1]}
    if view.data is not None:
        x, y = view.data()
        tensors |= {"data.x": x.cpu(), "data.y": y.cpu()}
    if view.others is not None:
        tensors["others"] = view.others[names.order(len(view.others), view.round, "others")]
    plain: Plain = {
        "round": view.round,
        "client": None if view.client is None else names.of(view.client),
        "coalition": [names.of(view.coalition[i]) for i in order.tolist()],
        "rank": view.rank,
        "recruits": view.recruits,
        "cohort": view.cohort,
        "shared": view.shared is not None,
        "defence": view.defence is not None,
        "random": draw(view.rng),
    }
    return plain, tensors, order


def of_context(updates: Tensor, ctx: AggContext, names: Names) -> tuple[Plain, Tensors, Tensor]:
    """Return the updates [n, d] and the context of a server's rule as plain data and tensors, and the order in which the rows cross [n]."""
    order = names.order(len(updates), ctx.round, "rows")
    tensors: Tensors = {"updates": updates[order], "params": ctx.params, "weights": ctx.weights[order], **prefixed("state", ctx.state)}
    if ctx.root is not None:
        tensors |= {"root.x": ctx.root[0], "root.y": ctx.root[1]}
    plain: Plain = {
        "round": ctx.round,
        "rounds": ctx.rounds,
        "asked": ctx.asked,
        "bound": ctx.bound,
        "assumed_malicious": ctx.assumed_malicious,
        "clients": [names.of(ctx.clients[i]) for i in order.tolist()] if ctx.clients else [],
        "random": draw(ctx.rng),
    }
    return plain, tensors, order


def of_probe(ctx: ProbeContext, names: Names) -> tuple[Plain, Tensors]:
    """Return what an observer sees as plain data and tensors; the teacher's fields (test, data, truth, member, history) never cross."""
    tensors: Tensors = {}
    rows: Sequence[int] = ()
    if ctx.clients:
        rows = names.order(len(ctx.clients), ctx.round, "rows").tolist()
    for name, value in (("updates", ctx.updates), ("trust", ctx.trust)):
        if value is not None:
            tensors[name] = value[list(rows)] if len(rows) == len(value) else value
    if ctx.params is not None:
        tensors["params"] = ctx.params
    for name, pair in (("candidates", ctx.candidates), ("population", ctx.population)):
        if pair is not None:
            tensors |= {f"{name}.x": pair[0], f"{name}.y": pair[1]}
    if ctx.sent is not None:
        tensors |= {f"sent.{names.of(client)}": value for client, value in ctx.sent.items()}
    plain: Plain = {
        "round": ctx.round,
        "final": ctx.final,
        "clients": [names.of(ctx.clients[i]) for i in rows],
        "examples": None if ctx.examples is None else {str(names.of(c)): int(n) for c, n in ctx.examples.items()},
        "model": ctx.model is not None,
        "answers": ctx.answers,
        "queries": ctx.queries,
        "recipe": None if ctx.recipe is None else dataclasses.asdict(ctx.recipe),
        "random": draw(ctx.rng),
    }
    return plain, tensors
