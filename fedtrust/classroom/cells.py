"""One cell of a tournament: a run of the exercise's scenario in which what was handed in stands for a registered component.

Everything that is handed in is met as a `Seat`: the place of one submission in one game. What it stands for is decided elsewhere (a
proxy of a process in the sandbox); here it is a behaviour, a rule or an auditor like any other, that may turn out to have failed.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pydantic
import torch
from torch import Tensor

from fedtrust.classroom.exercise import SUBMISSION, Exercise
from fedtrust.classroom.scoring import Fault, Outcome, Side
from fedtrust.client import Behaviour
from fedtrust.engine import seeds, threads
from fedtrust.engine.workers import Executor
from fedtrust.errors import RunError
from fedtrust.game import Game
from fedtrust.layout import Layout
from fedtrust.probes import membership_game, scores_images
from fedtrust.probes.base import Artefact, Probe, ProbeContext
from fedtrust.registry import REGISTRY, Entry
from fedtrust.runs import Checkpoint, RunDirectory
from fedtrust.scenario import Cell, Ref, Scenario
from fedtrust.server import Pipeline, Rule, Stage
from fedtrust.setup import BoundProbe, Setup, build, rival_goals
from fedtrust.shared import Library
from fedtrust.strategy import FedTrustStrategy

#: What an auditor is granted beside its queries: simulated knowledge, as in the registered probes.
_GRANTS: dict[str, dict[str, Any]] = {
    "membership": {"role": "user", "when": "end", "asks": "membership", "population": True},
    "stealing": {"role": "user", "when": "end", "population": True, "architecture": True},
    "reconstruction": {"role": "curious-server", "when": "end"},
    "evasion": {"role": "teacher", "when": "end"},
}
#: What a measure is without any skill; `fidelity` and `accuracy` have the share of the commonest class, `recovered` what `_unseeing` says.
_CHANCE = {"auc": 0.5, "tpr-at-1pct": 0.01, "evaded": 0.0}


class Planned(NamedTuple):
    """A cell that is to be played: labels, and the place of its seed in the phase's list."""

    attack: str | None
    defence: str
    partition: str
    seed: int


class Seat(Protocol):
    """One submission in one game.

    Attributes:
        fault: what went wrong with it in this game, (kind, sentence); `None` if nothing did.
        costs: what it has used in this game, by unit.
    """

    @property
    def fault(self) -> tuple[str, str] | None: ...  # noqa: D102
    @property
    def costs(self) -> Mapping[str, float]: ...  # noqa: D102

    def behaviour(self, setup: Setup) -> Behaviour:
        """Return it as clients of this run."""

    def rule(self, setup: Setup) -> Rule:
        """Return it as an aggregator."""

    def auditor(self, setup: Setup) -> Probe:
        """Return it as somebody who looks at the finished model."""

    def leave(self) -> None:
        """End its part in the game."""


class _Quiet(RunDirectory):
    """Keeps a run's records for as long as it is played: a cell is short, and played again if it is interrupted."""

    def __init__(self) -> None:
        super().__init__(Path())
        self._kept: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)

    def append(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        self._kept[name] += [dict(record) for record in records]

    def records(self, name: str) -> list[dict[str, Any]]:
        return self._kept[name]

    def restore(self) -> None:
        return None

    def save(self, checkpoint: Checkpoint) -> None: ...

    def save_model(self, params: Tensor, layout: Layout) -> str:
        return ""

    def save_artefact(self, name: str, artefact: Artefact) -> None: ...


class Table:
    """The cells of one phase of an exercise, and how each is played."""

    def __init__(self, exercise: Exercise, seeds: Sequence[int], *, hidden: bool) -> None:
        """Lay out the cells.

        Args:
            exercise: the exercise.
            seeds: the phase's seeds.
            hidden: whether its hidden partitions are played.

        Raises:
            InputError: the house cannot play them.
        """
        self.exercise, self.seeds = exercise, list(seeds)
        scenario = exercise.matrix(self.seeds, hidden=hidden)
        self.partitions = list(scenario.axes()["partitions"])
        audited = exercise.sides[0] == "audit"
        self._scenarios = {_key(cell): _drawn(cell.scenario) if audited else cell.scenario for cell in scenario.cells()}
        self._attacks = {label: attack.groups for label, attack in scenario.attacks().items() if attack.groups and label != SUBMISSION}
        self._building, self._library = threading.Lock(), Library()

    def scenario(self, cell: Planned, *, attack: bool, defence: bool) -> Scenario:
        """Return the scenario of a cell; `attack`, `defence`: whether these are handed in, and another one keeps their place."""
        seed = self.seeds[cell.seed]
        if self.exercise.sides[0] in ("audit", "evasion"):
            model = cell.defence if self.exercise.models else None
            return next(
                s for (_, d, p, number), s in self._scenarios.items() if (p, number) == (cell.partition, seed) and model in (None, d)
            )
        row = "none" if cell.attack is None else SUBMISSION if attack else cell.attack
        return self._scenarios[row, SUBMISSION if defence else cell.defence, cell.partition, seed]

    def play(self, cell: Planned, executor: Executor, attack: Seat | None = None, defence: Seat | None = None) -> Outcome:
        """Play a cell.

        Args:
            cell: which.
            executor: trains the clients.
            attack: what is handed in as the attack, audit or evasion; `None`: it is the house's, or nobody attacks.
            defence: what is handed in as the defence; `None`: it is the house's.
        """
        with self._building:
            lent = self._library.lend(build(self.scenario(cell, attack=attack is not None, defence=defence is not None)))
        setup = self._seated(lent.setup, cell, attack, defence)
        game = Game(setup, _Quiet(), executor)
        side: Side = "attack" if self.exercise.sides[0] in ("attack", "defence") else self.exercise.sides[0]
        seats = [(name, seat) for name, seat in ((side, attack), ("defence", defence)) if seat is not None]
        try:
            rounds, fault, note = self._rounds(game, seats)
            base = self._base(game, cell) if not (fault or note) else {}
        finally:
            game.job.close()
            for _, seat in seats:
                seat.leave()
        last = rounds[-1] if rounds else {}
        measure, chance = self._measure(last, setup, fault, note)
        return Outcome(
            *cell,
            accuracy=last.get("accuracy"),
            worst=last.get("client-accuracy/worst"),
            success=self._success(rounds),
            base=base,
            floor=_floor(setup),
            measure=measure,
            chance=chance,
            fault=fault,
            note=note,
            costs={name: {unit: float(n) for unit, n in seat.costs.items()} for name, seat in seats},
        )

    def _rounds(self, game: Game, seats: Sequence[tuple[str, Seat]]) -> tuple[list[Mapping[str, float]], Fault | None, str]:
        """Play the rounds; stop where a submission fails, or where the model is worth nothing any more, and say so."""
        found: list[Mapping[str, float]] = []

        def failed() -> Fault | None:
            return next((Fault(name, *seat.fault) for name, seat in seats if seat.fault is not None), None)

        try:
            with threads.using(threads.SERVER):
                for record in game.rounds():
                    found.append(record["metrics"])
                    fault = failed() or _refused(game, record, seats)
                    if fault is not None:
                        return found, fault, ""
        except RunError as error:
            return found, failed(), str(error)
        return found, failed(), ""

    def _seated(self, setup: Setup, cell: Planned, attack: Seat | None, defence: Seat | None) -> Setup:
        """Return the parts of the run with what is handed in in its place."""
        exercise = self.exercise
        if exercise.sides[0] in ("audit", "evasion"):
            return self._watched(setup, cell, attack)
        if attack is not None:
            behaviour = attack.behaviour(setup)
            groups = tuple(dataclasses.replace(g, name="submission", behaviour=behaviour) for g in setup.roster.groups)
            setup = dataclasses.replace(setup, roster=dataclasses.replace(setup.roster, groups=groups), goals=())
        if exercise.goal is not None and cell.attack is not None:
            setup = dataclasses.replace(setup, goals=rival_goals(exercise.goal_spec(), setup))
        if defence is not None:
            spec = setup.scenario.strategy
            pipeline = Pipeline([], Stage("aggregator", "submission", defence.rule(setup)), [], setup.scenario.engine.deadline)
            strategy = FedTrustStrategy(pipeline, setup.world, spec.assumed_malicious, setup.scenario.rounds)
            setup = dataclasses.replace(setup, strategy=strategy)
        return setup

    def _watched(self, setup: Setup, cell: Planned, seat: Seat | None) -> Setup:
        """Return the parts of the run with the auditor among its probes."""
        game = setup.game
        if game is None:
            malicious = setup.roster.malicious()
            honest = [c for c in range(setup.roster.count) if c not in malicious]
            game = membership_game.draw(setup.world.data, honest, setup.scenario.seed)
        if seat is None:
            ref: Ref = self.exercise.house.audits[str(cell.attack)]
            entry = REGISTRY.get("probe", ref.name)
            bound = BoundProbe(entry, entry.make(ref.params))
        else:
            meta = _GRANTS[self.exercise.game or "evasion"]
            bound = BoundProbe(Entry("probe", "submission", seat.auditor, pydantic.create_model("nothing"), meta), seat.auditor(setup))
        # What the scenario's own probes guess is not the auditor's.
        own = [probe for probe in setup.probes if probe.entry.name in ("accuracy", "client-accuracy")]
        if self.exercise.measure == "recovered":
            meta = {"role": "teacher", "when": "end"}
            own.append(BoundProbe(Entry("probe", "unseeing", _unseeing, pydantic.create_model("nothing"), meta), _unseeing))
        return dataclasses.replace(setup, game=game, probes=(*own, bound))

    def _measure(self, last: Mapping[str, float], setup: Setup, fault: Fault | None, note: str) -> tuple[float | None, float]:
        """Return what an auditor reached, and what it would without any skill."""
        name = self.exercise.measure
        if self.exercise.sides[0] not in ("audit", "evasion"):
            return None, 0.0
        chance = last.get("unseeing", 0.0) if name == "recovered" else _CHANCE.get(name, _floor(setup) or 0.0)
        if fault is not None or note:
            return None, chance
        own = [value for key, value in last.items() if key == name or key.endswith(f"/{name}")]
        own = own if name != "accuracy" else [value for key, value in last.items() if key.endswith("/accuracy")]
        return (max(own) if own else None), chance

    def _success(self, rounds: Sequence[Mapping[str, float]]) -> float | None:
        """Return the success of a goal as the exercise measures it: after the last round, or over the rounds since the attack ended."""
        if not rounds:
            return None
        if self.exercise.measure != "lasting-success" or self.exercise.attackers is None or self.exercise.attackers.rounds is None:
            return rounds[-1].get("attack-success")
        since = [r["attack-success"] for r in rounds[self.exercise.attackers.rounds[1] + 1 :] if "attack-success" in r]
        return sum(since) / len(since) if since else None

    def _base(self, game: Game, cell: Planned) -> dict[str, float]:
        """Return, for a model that nobody attacked, how often it does what attackers of other cells want, by their label."""
        if cell.attack is not None or self.exercise.sides[0] not in ("attack", "defence"):
            return {}
        wanted = {"": self.exercise.goal_spec()} if self.exercise.goal is not None else self._attacks
        found = {label: game.success(groups) for label, groups in wanted.items()}
        return {label: value for label, value in found.items() if value is not None}


def _refused(game: Game, record: Mapping[str, Any], seats: Sequence[tuple[str, Seat]]) -> Fault | None:
    """Return what the protocol refused of an attack that was handed in: its clients' replies were dropped."""
    if not any(name == "attack" for name, _ in seats):
        return None
    mine = game.setup.roster.malicious()
    why = next((reason for client, reason in record.get("faults", {}).items() if int(client) in mine), None)
    return None if why is None else Fault("attack", "reply", f"the server dropped what it sent: {why}")


def _drawn(scenario: Scenario) -> Scenario:
    """Return the scenario with its samples drawn by its seed, where its source can: who knows a data set by heart shall not know them."""
    source = scenario.data.source
    if "draw" not in REGISTRY.get("source", source.name).schema.model_fields or source.params.get("draw"):
        return scenario
    drawn = source.model_copy(update={"params": {**source.params, "draw": seeds.key(scenario.seed, "exercise/draw") & (2**31 - 1)}})
    return scenario.model_copy(update={"data": scenario.data.model_copy(update={"source": drawn})})


def _unseeing(ctx: ProbeContext) -> Mapping[str, float]:
    """Return what is recovered by somebody who knows other samples of the kind and saw no update."""
    return {"unseeing": scores_images.blind(ctx)}


def _key(cell: Cell) -> tuple[str, str, str, int]:
    labels = cell.labels
    return labels["attackers"], labels["strategies"], labels["partitions"], labels["seed"]


def _floor(setup: Setup) -> float | None:
    """Return what a model scores that always says the commonest class."""
    data = setup.world.data
    if data.task.kind != "classification" or not len(data.y_test):
        return None
    counts = torch.bincount(data.y_test, minlength=data.task.classes)
    return float(counts.max()) / len(data.y_test)
