"""The trials of an audit: the very code that a run uses, on data made so that one record or one client does the most that it can.

Everybody but the canary has a gradient, or an update, of zero; the canary's is as long as one likes and points where the adversary looks,
in equal parts over several layers. Nobody can be told apart more easily, so that what a sound mechanism lets out comes close to what it
claims (the gradient canaries of Nasr et al., IEEE S&P 2021). The adversary sees every update of a client or every release of a server.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ConfigRecord
from torch import Tensor, nn

from fedtrust import views
from fedtrust.client import Behaviour
from fedtrust.data.base import FederatedData, Task
from fedtrust.engine import flower, seeds
from fedtrust.engine.cohort import Chunk, ClientTask, train
from fedtrust.engine.partial import partial
from fedtrust.engine.world import World
from fedtrust.errors import RunError
from fedtrust.models.optimisers import Sgd
from fedtrust.privacy.audit import Floats, Observations
from fedtrust.privacy.mechanisms import Mechanism
from fedtrust.privacy.server import PrivateStrategy
from fedtrust.server import Pipeline, Stage

#: Over how many layers a canary is spread.
LAYERS = 4
#: How many times the clip a canary is long.
_LONG = 100.0
#: A learning rate so small that no step changes what the next one sees.
_STEP = 1e-6
#: The batch of clients that only make noise.
_BATCH = 4
#: Clients that are trained in one block.
_BLOCK = 256
#: The samples a canary client registers, and the others: a weight that is applied in the wrong place is felt.
_HEAVY, _LIGHT = 1000, 10
#: Of the clients without an update so many reply at most; the others cost time and change nothing.
_COMPANY = 3

Coins = npt.NDArray[np.bool_]


class Spread(nn.Module):
    """Some linear layers on the same features [b, m], added up: every layer has the same gradient."""

    def __init__(self, features: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(features, 1, bias=False) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of the layers [b, 1]."""
        return torch.stack([layer(x) for layer in self.layers]).sum(dim=0)


def _squared(output: Tensor, y: Tensor) -> Tensor:
    return (output.squeeze(1) - y).square().mean()


def world_of(
    features: int, layers: int, parts: Sequence[npt.NDArray[np.int64]], strength: float, batch: int, epochs: int, seed: int
) -> World:
    """Return a world in which row 0 of the data has no gradient, and row 1 + j one of length ≥ `strength`, along feature j only."""
    x = torch.cat([torch.zeros(1, features), torch.eye(features)])
    y = torch.cat([torch.zeros(1), torch.full((features,), -strength)])
    data = FederatedData(Task("regression", (features,), 1), x, y, list(parts), x[:1], y[:1])
    return World(data, Spread(features, layers), _squared, Sgd(), _STEP, batch, epochs, seed, path="vmap")


def _along(rows: Tensor, features: int, layers: int) -> Floats:
    """Return how far rows [n, layers * features] went along each feature's canary [n, features], in units of the canary's length."""
    found: Floats = rows.double().reshape(len(rows), layers, features).sum(dim=1).div(layers**0.5).numpy()
    return found


# Records


def _trained(world: World, behaviour: Behaviour, rounds: int, steps: int) -> Tensor:
    """Return every round's sum of step gradients of every client of the world, [clients, rounds, d]."""
    clients, start = range(len(world.data.parts)), torch.zeros(world.layout.size)
    found = torch.zeros(len(clients), rounds, world.layout.size)
    for number in range(1, rounds + 1):
        for first in range(0, len(clients), _BLOCK):
            tasks = tuple(ClientTask(c, behaviour, {}, steps=steps) for c in clients[first : first + _BLOCK])
            result = train(world, Chunk(number, start, {}, tasks))
            if result.faults:
                client = min(result.faults)
                raise RunError(f"the audited clients could not be trained: {result.faults[client]}")
            found[torch.tensor(result.clients), number - 1] = result.updates / -_STEP
    return found


def record_trials(behaviour: Behaviour, samples: int, batch: int, rounds: int, steps: int, trials: int, seed: int) -> Observations:
    """Let clients train, in half of the trials with a canary among their records.

    Args:
        behaviour: what they do; it has the hook `per_sample`.
        samples: how many records each has.
        batch: the expected batch.
        rounds: how many rounds they are asked in.
        steps: local steps a round.
        trials: how many of each kind.
        seed: of everything that is drawn.
    """
    nobody, canary = np.zeros(samples, dtype=np.int64), np.zeros(samples, dtype=np.int64)
    canary[-1] = 1
    made = behaviour.per_sample(samples, batch)
    strength = _LONG * (1.0 if made is None else made.clip)
    world = world_of(1, LAYERS, [nobody] * trials + [canary] * trials, strength, batch, -(-steps * batch // samples), seed)
    sums = _trained(world, behaviour, rounds, steps)
    seen = _along(sums.reshape(-1, LAYERS), 1, LAYERS).reshape(2 * trials, rounds)
    return Observations(seen[:trials], seen[trials:])


def record_one_run(behaviour: Behaviour, canaries: int, batch: int, rounds: int, steps: int, seed: int) -> tuple[Floats, Coins]:
    """Let one client train once, with as many canaries among its records as coins fell on heads; see `record_trials`.

    Returns:
        How much of each canary was seen [m], and the coins [m].
    """
    coins = seeds.stream(seed, "audit/coins").random(canaries) < 0.5
    made = behaviour.per_sample(canaries, batch)
    part = np.where(coins, np.arange(1, canaries + 1), 0)
    world = world_of(canaries, 1, [part], _LONG * (1.0 if made is None else made.clip), batch, -(-steps * batch // canaries), seed)
    sums = _trained(world, behaviour, rounds, steps)[0].sum(dim=0, keepdim=True)
    return _along(sums, canaries, 1)[0], coins


def record_noise(behaviour: Behaviour, seed: int) -> Tensor:
    """Return the noise of clients without any gradient [releases, d]: two clients, two rounds, two seeds, and the second of two steps.

    It is that on the sum of a batch, before it is divided by the expected batch.
    """
    found = []
    for own in (seed, seed + 1):
        world = world_of(400, LAYERS, [np.zeros(_BATCH, dtype=np.int64)] * 2, 1.0, _BATCH, 2, own)
        one, two = (_trained(world, behaviour, 2, steps) for steps in (1, 2))
        found += [one, two - one]
    return _BATCH * torch.cat([part.reshape(-1, 400 * LAYERS) for part in found])


# Clients that noise their own update


def local_trials(behaviour: Behaviour, rounds: int, trials: int, clip: float, seed: int) -> Observations:
    """Let a client noise an update that points one way or, in half of the trials, the other way; see `record_trials`."""
    update = torch.full((1, LAYERS), _LONG * clip / LAYERS**0.5)
    world = world_of(1, LAYERS, [np.zeros(1, dtype=np.int64)], 1.0, 1, 1, seed)
    sent = [
        _crafted(world, behaviour, sign * update, number, kind * trials + trial)
        for kind, sign in enumerate((-1, 1))
        for trial in range(trials)
        for number in range(1, rounds + 1)
    ]
    seen = _along(torch.stack(sent), 1, LAYERS).reshape(2, trials, rounds)
    return Observations(seen[0], seen[1])


def local_noise(behaviour: Behaviour, seed: int) -> Tensor:
    """Return what clients send whose update is zero [releases, d]: two clients, two rounds, two seeds."""
    worlds = [world_of(400, LAYERS, [np.zeros(1, dtype=np.int64)], 1.0, 1, 1, own) for own in (seed, seed + 1)]
    nothing = torch.zeros(1, 400 * LAYERS)
    rows = [_crafted(world, behaviour, nothing, number, client) for world in worlds for number in (1, 2) for client in (0, 1)]
    return torch.stack(rows)


def _crafted(world: World, behaviour: Behaviour, update: Tensor, number: int, client: int) -> Tensor:
    start, task = torch.zeros(world.layout.size), ClientTask(client, behaviour, {})
    view = views.crafting_view(world, number, start, {}, [task], "own", {}, start[None, :0], None, 1)
    return behaviour.craft(update.clone(), view)[0]


# The server


class Reached:
    """Stands for a grid in which the cohort can be reached."""

    def __init__(self) -> None:
        self.clients: list[int] = []

    def get_node_ids(self) -> Iterable[int]:
        """Return the clients."""
        return list(self.clients)


class Server:
    """A private strategy that is sent whatever one likes.

    Attributes:
        mechanism: the one under audit, with a seed of its own.
    """

    def __init__(self, world: World, mechanism: Mechanism, aggregator: Stage, seed: int, summed: bool) -> None:
        """Bring it up.

        Args:
            world: as `federation` makes it.
            mechanism: the mechanism.
            aggregator: the run's.
            seed: what the mechanism and its sampler draw from.
            summed: whether updates are added up as workers do, or come one by one.
        """
        flower.enter()
        self.mechanism = replace(mechanism, seed=seed, sampler=replace(mechanism.sampler, seed=seed))
        self._world = world
        self._strategy = PrivateStrategy(Pipeline([], aggregator, []), self.mechanism, self._world, 0.0, self.mechanism.rounds)
        self._grid, self._summed = Reached(), summed

    def round(self, number: int, updates: dict[int, Tensor]) -> tuple[Tensor, float]:
        """Play a round.

        Args:
            number: from 1.
            updates: client → what it sends [d], if it is drawn; some others send zero.

        Returns:
            The release [d] × the expected cohort, and the bound on a client's update.
        """
        size = self._world.layout.size
        bound = self.mechanism.bound(self._strategy.ledger)
        start = torch.zeros(size)
        drawn = self.mechanism.cohort(number)
        company = [c for c in drawn if c not in updates][:_COMPANY]
        here = sorted([*company, *(c for c in drawn if c in updates)])
        self._grid.clients = drawn
        record = flower.FlatRecord(start, self._world.layout)
        orders = self._strategy.configure_train(number, record, ConfigRecord(), self._grid)  # type: ignore[arg-type]
        by_client = {order.client: order for order in orders if isinstance(order, flower.Instruction)}
        rows = torch.stack([updates.get(c, start) for c in here]) if here else torch.zeros(0, size)
        added = self._added(number, start, here, rows) if self._summed and here else None
        replies = [
            flower.CohortReply(
                by_client[c], start, self._world.layout, None if added else rows[i], self._world.examples(c), 0.0, None, added
            )
            for i, c in enumerate(here)
        ]
        arrays, _ = self._strategy.aggregate_train(number, replies)
        if arrays is None:
            raise RunError("the audited server made no new model")
        return flower.to_flat(arrays, self._world.layout) * self.mechanism.sampler.per_round, bound

    def _added(self, number: int, start: Tensor, here: Sequence[int], rows: Tensor) -> flower.Added:
        sums = self._strategy.sums
        if sums is None:
            raise RunError("the audited server wants to see each update")
        total, told = partial(self._world, sums, number, start, here, rows)
        trust = None if told.trust is None else dict(zip(here, told.trust.tolist(), strict=True))
        return flower.Added(total, frozenset(here), trust, told.bound)


def federation(mechanism: Mechanism, features: int, layers: int) -> World:
    """Return a world with the mechanism's clients, the first of which has registered many more samples than the others."""
    parts = [np.zeros(_LIGHT, dtype=np.int64)] * mechanism.sampler.count
    parts[0] = np.zeros(_HEAVY, dtype=np.int64)
    return world_of(features, layers, parts, 1.0, _LIGHT, 1, 0)


def server_trials(mechanism: Mechanism, aggregator: Stage, rounds: int, trials: int, seed: int, *, summed: bool) -> Observations:
    """Let a server run, in half of the trials with a canary among its clients; where clients are replaced, with its opposite in the others.

    Args:
        mechanism: the mechanism.
        aggregator: the run's.
        rounds: how many rounds are seen.
        trials: how many of each kind.
        seed: of everything that is drawn.
        summed: whether updates are added up where they are made, as a run does, or come one by one.
    """
    canary = torch.full((LAYERS,), _LONG * mechanism.clip.first / LAYERS**0.5)
    absent = -canary if mechanism.sampler.reach == 2 else torch.zeros(LAYERS)
    seen = np.zeros((2, trials, rounds))
    world = federation(mechanism, 1, LAYERS)
    for kind, update in enumerate((absent, canary)):
        for trial in range(trials):
            server = Server(world, mechanism, aggregator, seeds.key(seed, "audit/trial", kind, trial) >> 65, summed)
            released = [server.round(number, {0: update}) for number in range(1, rounds + 1)]
            seen[kind, trial] = [_along(total[None], 1, LAYERS)[0, 0] / bound for total, bound in released]
    return Observations(seen[0], seen[1])


def server_one_run(mechanism: Mechanism, aggregator: Stage, canaries: int, rounds: int, seed: int) -> tuple[Floats, Coins]:
    """Let a server run once, with a canary client for every coin that fell on heads (on tails its opposite, where clients are replaced).

    Returns:
        How much of each canary was seen [m], and the coins [m].
    """
    coins = seeds.stream(seed, "audit/coins").random(canaries) < 0.5
    long = _LONG * mechanism.clip.first
    tails = -long if mechanism.sampler.reach == 2 else 0.0
    server = Server(federation(mechanism, canaries, 1), mechanism, aggregator, seed, True)
    rows = torch.diag(torch.from_numpy(np.where(coins, long, tails)).float())
    updates = {c: rows[c] for c in range(canaries) if bool(rows[c].any())}
    values = np.zeros(canaries)
    for number in range(1, rounds + 1):
        total, bound = server.round(number, updates)
        values += _along(total[None], canaries, 1)[0] / bound
    return values, coins


def server_noise(mechanism: Mechanism, aggregator: Stage, rounds: int, seed: int) -> Tensor:
    """Return what a server releases while nobody has anything to say [releases, d], for two seeds."""
    found, world = [], federation(mechanism, 400, LAYERS)
    for own in (seed, seed + 1):
        server = Server(world, mechanism, aggregator, own, True)
        found += [server.round(number, {})[0] for number in range(1, rounds + 1)]
    return torch.stack(found)
