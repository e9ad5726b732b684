"""The server's strategy with a privacy mechanism in it: clip, mean, noise, and then whatever steps the scenario asks for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from torch import Tensor

from fedtrust.engine import flower
from fedtrust.engine.world import World
from fedtrust.errors import RunError
from fedtrust.privacy.mechanisms import PLACE, Mechanism
from fedtrust.server import Pipeline, Stage, State
from fedtrust.strategy import FedTrustStrategy

Malice = Callable[[Tensor, int, tuple[int, ...]], dict[int, Tensor]]


class PrivateStrategy(FedTrustStrategy):
    """A pipeline whose mean is released through a privacy mechanism.

    The mechanism's clip comes after the scenario's filters, each of which treats a row by itself, and goes where the updates are made: the
    sum is added up there. Nothing of a round leaves the server but the noised mean; the scenario's steps work on it.

    Attributes:
        mechanism: what protects the clients.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        mechanism: Mechanism,
        world: World,
        assumed_malicious: float,
        rounds: int = 0,
        malice: Malice | None = None,
    ) -> None:
        """Make the strategy; see `FedTrustStrategy` for the other arguments.

        Args:
            pipeline: filters that treat every row by itself, an aggregator in which all rows count the same, and steps.
            mechanism: what protects the clients.
            world: the run.
            assumed_malicious: the share (or number) of updates that the defender assumes malicious.
            rounds: how many rounds are planned.
            malice: what a malicious server sends.
        """
        super().__init__(pipeline, world, assumed_malicious, rounds, malice)
        self.mechanism, self._whole = mechanism, pipeline
        self._set_clip()

    @property
    def aggregator(self) -> Stage:
        """The rule that takes the mean of the clipped rows."""
        return self._whole.aggregator

    @property
    def ledger(self) -> State:
        """The mechanism's state: its ledger and the next bound."""
        return self.states.get(PLACE, {})

    def _set_clip(self) -> None:
        """Put the clip of the next round behind the filters; what comes after the mean is done after the noise."""
        clip = self.mechanism.stage(self.ledger)
        self._pipeline = replace(self._whole, filters=[*self._whole.filters, clip], steps=[])

    def load(self, states: Mapping[str, Mapping[str, Any]]) -> None:
        """Take the components' states and the privacy ledger from a checkpoint.

        Raises:
            InputError: the ledger is another mechanism's.
        """
        super().load(states)
        self.mechanism.check(self.ledger)
        self._set_clip()

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Ask the cohort that the mechanism drew; it may be empty."""
        if list(grid.get_node_ids()):
            return super().configure_train(server_round, arrays, config, grid)
        self._params, self.sent = flower.to_flat(arrays, self._layout), {}
        return []

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Release the noised mean of the clipped updates, and make a new model of it; without a single reply, too.

        Raises:
            RunError: a component failed, an update came from a client that was not drawn, or the round was released before.
        """
        if self._params is None:
            return None, None
        messages = sorted(replies, key=flower.sender)
        clients = tuple(flower.sender(m) for m in messages)
        self.mechanism.belongs(server_round, clients)
        total, factor, seconds = torch.zeros(self._layout.size), torch.zeros(0), {}
        trust, shown = None, None
        if messages:
            super().aggregate_train(server_round, messages)
            if self.outcome is None:
                raise RunError("the pipeline made nothing of the updates")
            total = self.outcome.delta * len(messages)
            trust, seconds, shown = self.outcome.trust, self.outcome.seconds, self.outcome.shown
            factor = torch.ones(len(messages)) if trust is None else trust
        began = time.perf_counter()
        released = self.mechanism.release(total, factor, server_round, self.ledger)
        seconds = {**seconds, PLACE: time.perf_counter() - began}
        weights = torch.tensor([float(self._registered[c]) for c in clients])
        ctx = self._context(server_round, self._params, weights, clients, asked=len(self.sent))
        done = self._whole.finish(released.mean, trust, ctx, self.states, self._rngs(server_round))
        self.outcome = done._replace(states={**done.states, PLACE: released.state}, seconds=seconds | done.seconds, shown=shown)
        self.states = self.outcome.states
        self._set_clip()
        return flower.FlatRecord(self._params + self.outcome.delta, self._layout), MetricRecord()

    def preview(self, server_round: int, params: Tensor) -> Callable[..., Tensor]:
        """Return the server's rule of this round without its noise, which nobody else knows; see `FedTrustStrategy.preview`."""
        clipped = super().preview(server_round, params)

        def defence(updates: Tensor, clients: Sequence[int] = ()) -> Tensor:
            mean = clipped(updates, clients) * len(updates) / self.mechanism.sampler.per_round
            _, ctx = self._guessed(server_round, params, updates, clients)
            return self._whole.finish(mean, None, ctx, self.states, self._rngs(server_round)).delta

        return defence
