"""fedtrust's own Flower strategy: a pipeline of filters, one aggregator and steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedtrust.engine import flower, seeds
from fedtrust.engine.cohort import own_training
from fedtrust.engine.partial import Sums, through
from fedtrust.engine.world import World
from fedtrust.errors import RunError
from fedtrust.server import AggContext, Outcome, Pipeline, Stage, State, assumed_count


class FedTrustStrategy(Strategy):
    """A Flower strategy made of a pipeline.

    Attributes:
        states: what the components carry from round to round, by place (saved in the checkpoint).
        outcome: what the pipeline made of the last round; `None` before the first.
        sent: client → the model that it was sent this round [d].
    """

    def __init__(
        self,
        pipeline: Pipeline,
        world: World,
        assumed_malicious: float,
        rounds: int = 0,
        malice: Callable[[Tensor, int, tuple[int, ...]], dict[int, Tensor]] | None = None,
    ) -> None:
        """Make the strategy.

        Args:
            pipeline: what is done with the updates.
            world: the run; the strategy uses only what a server knows: architecture, recipe, registered sample counts, its own root set.
            assumed_malicious: the share (or, as an int, the number) of updates that the defender assumes malicious.
            rounds: how many rounds are planned; 0: the components are not told.
            malice: what a malicious server sends: from the true model [d], the round and whom it asks to client → model [d].
        """
        self._pipeline = pipeline
        self._assumed = assumed_malicious
        self._layout, self._task = world.layout, world.data.task
        self._model, self._criterion, self._root = world.model, world.criterion, world.data.root
        self._registered = {client: world.examples(client) for client in range(len(world.data.parts))}
        self._seed, self._world, self._rounds = world.seed, world, rounds
        self._params: Tensor | None = None
        self._malice = malice
        self.states: dict[str, State] = {}
        self.outcome: Outcome | None = None
        self.sent: dict[int, Tensor] = {}

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Ask every client that can be reached to train the global model."""
        self._params = flower.to_flat(arrays, self._layout)
        config["server-round"] = server_round
        asked = tuple(grid.get_node_ids())
        self.sent = dict.fromkeys(asked, self._params) if self._malice is None else self._malice(self._params, server_round, asked)
        records: dict[int, RecordDict] = {}  # by model: messages that carry the same share one content
        for model in self.sent.values():
            if id(model) not in records:
                record = arrays if model is self._params else flower.FlatRecord(model, self._layout)
                records[id(model)] = RecordDict({flower.ARRAYS: record, flower.CONFIG: config})
        return [flower.Instruction(records[id(self.sent[client])], client) for client in asked]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Run the pipeline over the replies, one row a client, sorted by client.

        Raises:
            RunError: a component failed or returned what it must not.
        """
        messages = sorted(replies, key=flower.sender)
        if self._params is None or not messages:
            return None, None
        clients = tuple(flower.sender(m) for m in messages)
        weights = torch.tensor([float(self._registered[c]) for c in clients])
        ctx = self._context(server_round, self._params, weights, clients, asked=len(self.sent))
        added = next((m.added for m in messages if isinstance(m, flower.CohortReply) and m.added is not None), None)
        if added is None:
            updates = torch.stack([self.update(m) for m in messages])
            self.outcome = self._pipeline(updates, ctx, self.states, self._rngs(server_round))
        else:
            self.outcome = self._add_up(messages, added, ctx)
        self.states = self.outcome.states
        return flower.FlatRecord(self._params + self.outcome.delta, self._layout), MetricRecord()

    def update(self, message: Message) -> Tensor:
        """Return the update [d] in a valid reply, relative to what its client was sent."""
        return flower.update(message, self.sent[flower.sender(message)], self._layout)

    @property
    def noised(self) -> list[Stage]:
        """The filters whose noise gives privacy of its own."""
        return [stage for stage in self._pipeline.filters if stage.guarantee is not None]

    @property
    def guarantees(self) -> list[dict[str, Any]]:
        """What privacy the filters' own noise has given so far, as plain data."""
        asked = ((stage, stage.guarantee) for stage in self._pipeline.filters)
        told = (tell(self.states.get(stage.place, {}), self._layout.size) for stage, tell in asked if tell is not None)
        return [dict(one) for one in told if one is not None]

    @property
    def hides(self) -> bool:
        """Whether the server sees no single client's update."""
        return self._pipeline.hides

    @property
    def sums(self) -> Sums | None:
        """How clients' updates can be added up where they are made; `None` if the rule needs to see each."""
        linear = self._pipeline.linear
        return None if linear is None else Sums(tuple(self._pipeline.filters), linear == "examples")

    def _add_up(self, messages: Sequence[Message], added: flower.Added, ctx: AggContext) -> Outcome:
        """Finish a round most of which was added up where it was made; the others' updates join in here, in the order of the clients."""
        sums, began = self.sums, time.perf_counter()
        single = [m for m in messages if not isinstance(m, flower.CohortReply) or m.added is None]
        if sums is None or {flower.sender(m) for m in messages} - {flower.sender(m) for m in single} != added.clients:
            raise RunError("updates were added up that did not become valid replies")
        share = sums.weights([self._registered[c] for c in ctx.clients])
        total, trust, bound = added.total, dict(added.trust or {}), added.bound
        if single:
            own = tuple(flower.sender(m) for m in single)
            rows = torch.stack([self.update(m) for m in single])
            here = self._context(ctx.round, ctx.params, sums.weights([self._registered[c] for c in own]), ())
            rows, found, bound = through(sums.filters, rows, here)
            total = total + here.weights @ rows
            trust |= {} if found is None else dict(zip(own, found.tolist(), strict=True))
        spread = torch.tensor([trust.get(c, 1.0) for c in ctx.clients]) if trust else None
        outcome = self._pipeline.finish(total / share.sum(), spread, replace(ctx, bound=bound), self.states, self._rngs(ctx.round))
        return outcome._replace(seconds={"aggregator": time.perf_counter() - began - sum(outcome.seconds.values())} | outcome.seconds)

    def _rngs(self, server_round: int) -> Callable[[str], torch.Generator]:
        return lambda place: self._rng(place, server_round)

    def preview(self, server_round: int, params: Tensor) -> Callable[..., Tensor]:
        """Return the server's rule of this round, for an attacker who is granted it: `(updates [n, d], clients) -> delta [d]`.

        It uses what the rule carries from the rounds before and does not change it. `clients` says whose updates these are, in the
        order of the rows: they then come before the rule as the server sorts and weighs them. Without, they are nobody's, and count as
        one sample each.
        """

        def defence(updates: Tensor, clients: Sequence[int] = ()) -> Tensor:
            rows, ctx = self._guessed(server_round, params, updates, clients)
            return self._pipeline(rows, ctx, self.states, self._rngs(server_round)).delta

        return defence

    def _guessed(self, server_round: int, params: Tensor, updates: Tensor, clients: Sequence[int]) -> tuple[Tensor, AggContext]:
        """Return the rows of a preview as the server would have them, and its context."""
        if not clients:
            return updates.clone(), self._context(server_round, params, torch.ones(len(updates)), (), asked=len(updates), private="guessed")
        order = sorted(range(len(clients)), key=lambda row: clients[row])
        named = tuple(clients[row] for row in order)
        weights = torch.tensor([float(self._registered[c]) for c in named])
        asked = max(len(self.sent), len(named))
        return updates[order].clone(), self._context(server_round, params, weights, named, asked=asked, private="guessed")

    def _context(
        self, server_round: int, params: Tensor, weights: Tensor, clients: tuple[int, ...], *, asked: int = 0, private: str = "private"
    ) -> AggContext:
        def private_stream(purpose: str, *counters: int) -> np.random.Generator:
            return seeds.stream(self._seed, f"{private}/{purpose}", server_round, *counters)

        return AggContext(
            params=params,
            weights=weights,
            clients=clients,
            round=server_round,
            assumed_malicious=assumed_count(self._assumed, len(weights)),
            layout=self._layout,
            task=self._task,
            model=self._model,
            criterion=self._criterion,
            root=self._root,
            rng=self._rng("", server_round),
            train=own_training(self._world, params, server_round),
            rounds=self._rounds,
            asked=asked,
            private=private_stream,
        )

    def _rng(self, place: str, server_round: int) -> torch.Generator:
        return seeds.torch_stream(self._seed, f"server/{place}", server_round)

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Ask nobody: measuring is the probes' work."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return nothing: measuring is the probes' work."""
        return None

    def summary(self) -> None:
        """Log nothing: the threat card and the resolved scenario say it all."""

    def load(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Take the components' states from a checkpoint."""
        self.states = {place: dict(state) for place, state in states.items()}
