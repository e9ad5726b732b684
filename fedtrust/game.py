"""One run being played, round by round: configure → send → validate → aggregate → probe → record → checkpoint."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from flwr.app import ConfigRecord
from torch import Tensor

from fedtrust import records, repairs
from fedtrust.engine import flower, seeds, threads, workers
from fedtrust.engine.cohort import Chunk, own_training
from fedtrust.engine.devices import Devices, Plan
from fedtrust.engine.grid import CohortGrid
from fedtrust.engine.roster import cohort
from fedtrust.engine.survey import Poll
from fedtrust.engine.validate import Valid, validate
from fedtrust.errors import FedTrustError, InputError, RunError, TooFewError, said
from fedtrust.measuring import Looked, Measuring
from fedtrust.privacy.server import PrivateStrategy
from fedtrust.probes.base import share
from fedtrust.runs import CLIENTS, ROUNDS, Checkpoint, RunDirectory
from fedtrust.scenario import AttackerSpec
from fedtrust.setup import BoundRepair, Setup, rival_goals
from fedtrust.strategy import FedTrustStrategy


class Game:
    """One run being played."""

    def __init__(self, setup: Setup, directory: RunDirectory, executor: workers.Executor) -> None:
        self.setup, self._directory = setup, directory
        saved = directory.restore()
        self._measuring = Measuring(setup, directory, executor)
        self.job = executor.open(setup.world)
        self._deadline = setup.scenario.engine.deadline
        self._grid = CohortGrid(setup.world, setup.roster, self.job, stock=setup.stock, deadline=self._deadline)
        self.round, self._params = 0, setup.params
        system = setup.scenario.clients.system
        self._devices = None if system is None else Devices.of(system, setup.world)
        self._clock = 0.0  # virtual seconds since the start
        self._history: list[dict[str, float]] = []  # what was measured so far, by round
        self._fresh = True
        if saved is not None:
            try:
                self._take(saved)
            except BaseException:
                self.job.close()
                raise

    def _take(self, saved: Checkpoint) -> None:
        name = self.setup.scenario.strategy.aggregator.name
        if self.setup.stock and saved.round > 0 and not flower.resumable(name.removeprefix("flwr:")):
            raise InputError(f"cannot be resumed: {name} keeps state between rounds that is not ours to save", str(self._directory.path))
        if saved.params.shape != self._params.shape:
            raise InputError("the checkpoint belongs to another model", str(self._directory.path))
        self.round, self._params, self._fresh = saved.round, saved.params, False
        self._grid.memories = saved.memories
        self._history = [record["metrics"] for record in self._directory.records(ROUNDS)]
        if self._devices is not None:  # the records were cut back to the checkpoint
            self._clock = float(self._directory.records(ROUNDS)[-1].get("clock", 0.0))
        if isinstance(self.setup.strategy, FedTrustStrategy):
            self.setup.strategy.load(saved.states)

    def rounds(self) -> Any:
        """Play the rounds that are left and yield each record once it is safe on the disk."""
        if self._fresh:
            with threads.using(threads.SERVER):
                metrics = self._measure(Valid((), [], {}), None, self._params, final=False)
            clock = {"clock": 0.0} if self._devices is not None and self._devices.timed else {}
            yield self._commit({"round": 0, "counted": True, "metrics": metrics, **clock}, [])
        while self.round < self.setup.scenario.rounds:
            self.round += 1
            yield self._commit(*self._play_round())
        while self.round < self._last:
            self.round += 1
            yield self._commit(self._play_repair(self.setup.repairs[self.round - self.setup.scenario.rounds - 1]), [])

    @property
    def _last(self) -> int:
        """The number of the last record: the repairs are counted on from the last round."""
        return self.setup.scenario.rounds + len(self.setup.repairs)

    def _commit(self, record: dict[str, Any], clients: list[dict[str, Any]]) -> dict[str, Any]:
        self._history.append(record["metrics"])
        self._directory.append(ROUNDS, [record])
        self._directory.append(CLIENTS, clients)
        strategy = self.setup.strategy
        states = {p: dict(s) for p, s in strategy.states.items()} if isinstance(strategy, FedTrustStrategy) else {}
        self._directory.save(Checkpoint(self.round, self._params, states, self._grid.memories))
        return record

    def _play_round(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        setup, number = self.setup, self.round
        plan = self._plan()
        asked = plan.asked
        strategy = setup.strategy
        defence = strategy.preview(number, self._params) if isinstance(strategy, FedTrustStrategy) else None
        sums = strategy.sums if isinstance(strategy, FedTrustStrategy) else None
        self._grid.begin(number, asked, defence, plan, sums, watched=self._measuring.watched)
        times = [time.perf_counter()]
        arrays = flower.FlatRecord(self._params, setup.world.layout)
        try:
            first = arrays.fill() if setup.stock else arrays
            wanted = asked or isinstance(strategy, PrivateStrategy)  # an empty Poisson cohort releases noise
            messages = list(strategy.configure_train(number, first, ConfigRecord(), self._grid)) if wanted else []
        except Exception as error:  # a stock strategy may raise anything
            raise RunError(f"the strategy failed in round {number}: {said(error)}") from error
        with threads.using(threads.SERVER):  # coalitions compute here; training sets its own number of threads
            replies = self._grid.send_and_receive(messages)
        valid = validate(replies, {c: setup.world.examples(c) for c in asked}, setup.world.layout)
        times.append(time.perf_counter())
        quorum = self._quorum(plan)
        with threads.using(threads.SERVER):
            before = self._params
            why = self._aggregate(valid, quorum, plan)
            times.append(time.perf_counter())
            outcome = strategy.outcome if isinstance(strategy, FedTrustStrategy) and not why else None
            trust, shown = (None, None) if outcome is None else (outcome.trust, outcome.shown)
            metrics = self._measure(valid, trust, before, final=number == self._last, shown=shown)
            metrics |= {} if outcome is None else outcome.numbers
        times.append(time.perf_counter())
        rows = records.client_rows(setup, number, asked, valid, self._grid.losses, trust)
        record = records.round_record(
            number, asked, valid, quorum, why, metrics, rows, float((self._params - before).double().norm()), times
        )
        if isinstance(strategy, FedTrustStrategy) and strategy.outcome and not why:
            record["seconds"] |= {place: round(cost, 4) for place, cost in strategy.outcome.seconds.items()}
        if isinstance(strategy, PrivateStrategy):
            spent = strategy.mechanism.spent(strategy.ledger)
            record["epsilon"] = spent if math.isfinite(spent) else None
        self._clock = plan.after(self._clock)
        return record | plan.round_fields(self._clock), [row | plan.client_fields(row["client"]) for row in rows]

    def _play_repair(self, bound: BoundRepair) -> dict[str, Any]:
        """Let the server repair the model."""
        times, before, why = [time.perf_counter()], self._params, ""
        poll = self._poll()
        found = repairs.Repaired(before)
        with threads.using(threads.SERVER):
            try:
                found = repairs.run(bound.entry.name, bound.call, self._repair_context(bound.entry.name, poll), self._deadline, poll.waited)
            except TooFewError as error:
                why = str(error)
            self._params = found.value
            times.append(time.perf_counter())
            numbers = {f"{bound.entry.name}/{key}": value for key, value in found.numbers.items()}
            metrics = self._measuring.keep(bound.entry.name, {**found.artefacts, **numbers})
            metrics |= self._measure(Valid((), [], {}), None, before, final=self.round == self._last)
        times.append(time.perf_counter())
        clock = {"clock": self._clock} if self._devices is not None and self._devices.timed else {}
        asked = {"surveyed": poll.asked, "faults": {str(c): reason for c, reason in sorted(poll.faults.items())}} if poll.asked else {}
        delta = float((self._params - before).double().norm())
        return records.repair_record(self.round, bound.entry.name, why, metrics, delta, times) | asked | clock

    def _poll(self) -> Poll:
        """Return the clients whom a repair may ask: a cohort as in a round; who acted in the last round answers as one who acts."""
        plan = self._plan()
        self._grid.begin(self.setup.scenario.rounds, plan.asked, plan=plan)
        tasks = [self._grid.task(client) for client in plan.asked]
        chunk = Chunk(self.round, self._params, {}, (), cohort=len(plan.asked))
        return Poll(self.setup.world, tasks, plan.absent, chunk, self._quorum(plan), self._deadline)

    def _repair_context(self, name: str, poll: Poll) -> repairs.RepairContext:
        world = self.setup.world
        return repairs.RepairContext(
            params=self._params,
            layout=world.layout,
            task=world.data.task,
            model=world.model,
            criterion=world.criterion,
            root=world.data.root,
            train=own_training(world, self._params, self.round),
            survey=poll,
            rng=seeds.torch_stream(world.seed, f"repair/{name}", self.round),
        )

    def _quorum(self, plan: Plan) -> int:
        return max(1, math.ceil(self.setup.scenario.clients.quorum * plan.wanted - 1e-9))

    def _plan(self) -> Plan:
        """Return who is asked this round, and what becomes of them."""
        setup, wanted = self.setup, self.setup.scenario.clients.cohort
        if isinstance(setup.strategy, PrivateStrategy):  # who takes part is a part of the guarantee
            drawn = setup.strategy.mechanism.cohort(self.round)
            return Plan(drawn, wanted=len(drawn))
        if self._devices is not None:
            return self._devices.plan(self.round, wanted, self._clock, setup.roster.malicious(self.round))
        return Plan(cohort(setup.roster.count, wanted, setup.world.seed, self.round), wanted=wanted)

    def _aggregate(self, valid: Valid, quorum: int, plan: Plan) -> str:
        """Apply the strategy; return why the round does not count, or nothing."""
        asked = len(plan.asked)
        # A private mechanism releases every round, whoever replied: to keep one back would say who did not.
        released = isinstance(self.setup.strategy, PrivateStrategy)
        if not asked and not released:
            return "nobody could be reached"
        few = f"{len(valid.clients)} valid replies of {asked}, quorum {quorum}" if asked and len(valid.clients) < quorum else ""
        if few and not released:
            return few
        strategy, layout = self.setup.strategy, self.setup.world.layout
        try:
            with flower.cheap_collection():
                whole = functools.partial(strategy.aggregate_train, self.round, valid.messages)
                # Our own pipeline minds the clock of each of its components, and names the one that is late.
                arrays, _ = whole() if isinstance(strategy, FedTrustStrategy) else threads.within(self._deadline, whole)
        except Exception as error:  # a stock strategy may raise anything
            reason = str(error) if isinstance(error, FedTrustError) else f"the strategy failed: {said(error)}"
            if isinstance(error.__cause__, TooFewError) and len(valid.clients) < self.setup.scenario.clients.cohort:
                return f"{len(valid.clients)} valid replies of {asked} are too few: {reason}"
            raise RunError(reason) from error
        if arrays is None:
            return "the strategy made no new model of the replies"
        params = flower.to_flat(arrays, layout)
        if not bool(torch.isfinite(params).all()):
            raise RunError(f"the strategy made a model that is not finite in round {self.round}")
        self._params = params.detach().clone()
        return f"{few}; released all the same" if few else ""

    def _measure(self, valid: Valid, trust: Tensor | None, before: Tensor, *, final: bool, shown: Tensor | None = None) -> dict[str, float]:
        """Measure the model; `before` is the one that the round began with, `shown` what a server sees from which the rows are hidden."""
        strategy = self.setup.strategy
        # Without a reply (a repair, an empty round) what was sent is an earlier round's affair.
        sent = strategy.sent if isinstance(strategy, FedTrustStrategy) and valid.messages else {}
        sent = sent or dict.fromkeys(valid.clients, before)
        hides = isinstance(strategy, FedTrustStrategy) and strategy.hides
        history = tuple(self._history)
        looked = Looked(self.round, final, self._params, before, valid, trust, sent, self._grid.memories, history, hides, shown)
        return self._measuring.probe(looked)

    def success(self, attackers: Sequence[AttackerSpec]) -> float | None:
        """Return how often the final model does what these adversaries want, who took no part; `None` if they want nothing of that kind."""
        with threads.using(threads.SERVER):
            goals = rival_goals(attackers, self.setup)
            return max((share(self._measuring.world.predict(self._params, g.x).argmax(1) == g.y) for g in goals), default=None)

    def finish(self) -> tuple[str, Tensor]:
        """Write the final model and return its SHA-256, and the model."""
        return self._directory.save_model(self._params, self.setup.world.layout), self._params
