"""The round loop: configure → send → validate → aggregate → probe → record; and the loop over a matrix's cells."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord
from torch import Tensor

from fedtrust import records, views
from fedtrust.engine import flower, seeds, threads, workers
from fedtrust.engine.grid import CohortGrid
from fedtrust.engine.roster import cohort
from fedtrust.engine.validate import Valid, validate
from fedtrust.errors import FedTrustError, InputError, RunError, TooFewError
from fedtrust.interrupt import stoppable
from fedtrust.listener import Listener, SilentListener
from fedtrust.probes.base import Artefact, ProbeContext, Truth
from fedtrust.runs import CLIENTS, ROUNDS, Checkpoint, RunDirectory, read_json, write_atomic
from fedtrust.scenario import Cell, Scenario
from fedtrust.scenario_io import load_run
from fedtrust.setup import Setup, build
from fedtrust.strategy import FedTrustStrategy


@dataclass(frozen=True)
class Result:
    """How a run or a matrix ended.

    Attributes:
        status: `finished`, `failed` or `interrupted`.
        directory: where it lies.
        summary: what `summary.json` holds.
        why: for `failed` and `interrupted`: the reason.
    """

    status: str
    directory: Path
    summary: dict[str, Any]
    why: str = ""


def run(
    scenario: Scenario,
    out: Path,
    *,
    engine: str = "auto",
    workers: int | None = None,
    ray_address: str | None = None,
    listener: Listener | None = None,
) -> Result:
    """Play a scenario, one run or its whole matrix, into the new folder `out`.

    Args:
        scenario: what to play.
        out: a folder that does not exist yet, or is empty.
        engine: `auto`, `local` or `ray`; changes no bit of the result.
        workers: how many threads or Ray workers; by default one a core, or one a GPU.
        ray_address: a running Ray cluster.
        listener: is told how it goes.

    Raises:
        InputError: the scenario cannot be played, or the folder is taken; nothing was run.
    """
    if scenario.sweep is None:
        build(scenario)  # what cannot be meant is refused before anything is written
    directory = RunDirectory.create(out)
    write_atomic(out / "scenario.toml", scenario.resolved_toml().encode())
    records.keep_plugins(out)
    return _play(scenario, directory, engine, workers, ray_address, listener or SilentListener())


def resume(
    path: Path,
    *,
    engine: str = "auto",
    workers: int | None = None,
    ray_address: str | None = None,
    listener: Listener | None = None,
    allow_plugins: Sequence[str] = (),
) -> Result:
    """Go on where a run or a matrix stopped; the result has the same bits as if it had not.

    Raises:
        InputError: it is not a run directory, is finished, is damaged, or cannot be resumed.
    """
    if not (path / "scenario.toml").is_file():
        raise InputError("not a run directory: scenario.toml is missing", str(path))
    # Killed in its first moments a run has no status yet: then it starts from the beginning.
    status = read_json(path / "status.json")["status"] if (path / "status.json").exists() else "running"
    if status == "finished":
        raise InputError("this run is finished; there is nothing to resume", str(path))
    environment = read_json(path / "environment.json") if (path / "environment.json").exists() else {}
    scenario = load_run(path, allow_plugins, environment.get("data_root"))
    return _play(scenario, RunDirectory(path), engine, workers, ray_address, listener or SilentListener())


def _play(scenario: Scenario, directory: RunDirectory, engine: str, count: int | None, address: str | None, listener: Listener) -> Result:
    """Bring up the executor, play every cell that is not done, and write how it ended, whatever happens."""
    began = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(stoppable())
        stack.enter_context(directory.lock())
        try:
            name, reason = workers.pick(engine, scenario.clients.cohort, address)
            executor = workers.make(name, count, address, scenario.engine.deadline, scenario.engine.retries)
            stack.callback(executor.close)
            directory.status("running")
            records.write_environment(directory, scenario, executor.describe(), reason)
            session = _Session(executor, listener)
            summary = session.matrix(scenario, directory) if scenario.sweep else session.single(scenario, directory)
        except KeyboardInterrupt:
            return _ended("interrupted", "interrupted; go on with --resume", directory)
        except FedTrustError as error:
            _ended("failed", str(error), directory)
            raise
        except Exception as error:
            _ended("failed", _said(error), directory)
            raise
    summary["seconds"] = round(time.perf_counter() - began, 2)
    records.write_summary(directory, summary)
    status, why = str(summary["status"]), str(summary.get("why", ""))
    directory.status(status, why)
    listener.finished(summary)
    return Result(status, directory.path, summary, why)


def _ended(status: str, why: str, directory: RunDirectory) -> Result:
    directory.status(status, why)
    return Result(status, directory.path, {}, why)


def _said(error: Exception) -> str:
    """Return an error that nobody foresaw in one line."""
    return str(error) if isinstance(error, FedTrustError) else f"{type(error).__name__}: {' '.join(str(error).split())}"


class _Session:
    """One executor and one listener, for as many runs as there are cells."""

    def __init__(self, executor: workers.Executor, listener: Listener) -> None:
        self._executor, self._listener = executor, listener

    def single(self, scenario: Scenario, directory: RunDirectory) -> dict[str, Any]:
        """Play one run and return its summary."""
        cell = scenario.cells()[0]
        self._listener.matrix_started([cell.name], scenario.rounds)
        return self._cell(cell, directory)

    def matrix(self, scenario: Scenario, directory: RunDirectory) -> dict[str, Any]:
        """Play the cells of a matrix; one that fails is marked and the rest goes on."""
        cells = scenario.cells()
        self._listener.matrix_started([c.name for c in cells], scenario.rounds)
        results = []
        for cell in cells:
            results.append((cell, self._cell_of_matrix(cell, directory.path / "cells" / cell.name)))
            records.write_summary(directory, records.matrix_summary(scenario, results, len(cells)))
        return records.matrix_summary(scenario, results, len(cells))

    def _cell_of_matrix(self, cell: Cell, path: Path) -> dict[str, Any]:
        done = path / "summary.json"
        if done.exists() and read_json(path / "status.json")["status"] == "finished":
            summary: dict[str, Any] = read_json(done)
            self._listener.cell_done(cell.name, summary)
            return summary
        path.mkdir(parents=True, exist_ok=True)
        directory = RunDirectory(path)
        try:
            write_atomic(path / "scenario.toml", cell.scenario.resolved_toml().encode())
            directory.status("running")
            records.write_environment(directory, cell.scenario, self._executor.describe(), "as the matrix")
            summary = self._cell(cell, directory)
        except Exception as error:  # whatever it was, it is this cell's: the others go on
            summary = {"status": "failed", "why": _said(error), "metrics": {}, "seconds": 0.0}
            self._listener.note(f"{cell.name} failed: {summary['why']}")
            self._listener.cell_done(cell.name, summary)
        records.write_summary(directory, summary)
        directory.status(summary["status"], summary.get("why", ""))
        return summary

    def _cell(self, cell: Cell, directory: RunDirectory) -> dict[str, Any]:
        began = time.perf_counter()
        game = _Game(build(cell.scenario), directory, self._executor)
        self._listener.cell_started(cell.name, cell.labels, cell.scenario.rounds, game.round)
        for record in game.rounds():
            self._listener.round_done(cell.name, record)
        summary = records.run_summary(game.setup, directory, game.finish(), time.perf_counter() - began, self._executor.describe())
        self._listener.cell_done(cell.name, summary)
        return summary


class _Game:
    """One run being played."""

    def __init__(self, setup: Setup, directory: RunDirectory, executor: workers.Executor) -> None:
        self.setup, self._directory = setup, directory
        executor.open(setup.world)
        self._grid = CohortGrid(setup.world, setup.roster, executor, stock=setup.stock)
        self.round, self._params = 0, setup.params
        self._fresh = True
        saved = directory.restore()
        if saved is not None:
            self._take(saved)

    def _take(self, saved: Checkpoint) -> None:
        name = self.setup.scenario.strategy.aggregator.name
        if self.setup.stock and saved.round > 0 and not flower.resumable(name.removeprefix("flwr:")):
            raise InputError(f"cannot be resumed: {name} keeps state between rounds that is not ours to save", str(self._directory.path))
        if saved.params.shape != self._params.shape:
            raise InputError("the checkpoint belongs to another model", str(self._directory.path))
        self.round, self._params, self._fresh = saved.round, saved.params, False
        self._grid.memories = saved.memories
        if isinstance(self.setup.strategy, FedTrustStrategy):
            self.setup.strategy.load(saved.states)

    def rounds(self) -> Any:
        """Play the rounds that are left and yield each record once it is safe on the disk."""
        if self._fresh:
            with threads.using(threads.SERVER):
                metrics = self._probe(Valid((), [], {}), None, self._params, final=False)
            yield self._commit({"round": 0, "counted": True, "metrics": metrics}, [])
        while self.round < self.setup.scenario.rounds:
            self.round += 1
            yield self._commit(*self._play_round())

    def _commit(self, record: dict[str, Any], clients: list[dict[str, Any]]) -> dict[str, Any]:
        self._directory.append(ROUNDS, [record])
        self._directory.append(CLIENTS, clients)
        strategy = self.setup.strategy
        states = {p: dict(s) for p, s in strategy.states.items()} if isinstance(strategy, FedTrustStrategy) else {}
        self._directory.save(Checkpoint(self.round, self._params, states, self._grid.memories))
        return record

    def _play_round(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        setup, number = self.setup, self.round
        asked = cohort(setup.roster.count, setup.scenario.clients.cohort, setup.world.seed, number)
        strategy = setup.strategy
        defence = strategy.preview(number, self._params) if isinstance(strategy, FedTrustStrategy) else None
        self._grid.begin(number, asked, defence)
        times = [time.perf_counter()]
        arrays = flower.FlatRecord(self._params, setup.world.layout)
        try:
            messages = list(strategy.configure_train(number, arrays.fill() if setup.stock else arrays, ConfigRecord(), self._grid))
        except Exception as error:  # a stock strategy may raise anything
            raise RunError(f"the strategy failed in round {number}: {_said(error)}") from error
        with threads.using(threads.SERVER):  # coalitions compute here; training sets its own number of threads
            replies = self._grid.send_and_receive(messages)
        valid = validate(replies, {c: setup.world.examples(c) for c in asked}, setup.world.layout)
        times.append(time.perf_counter())
        quorum = max(1, math.ceil(setup.scenario.clients.quorum * len(asked) - 1e-9))
        with threads.using(threads.SERVER):
            before = self._params
            why = self._aggregate(valid, quorum, len(asked))
            times.append(time.perf_counter())
            trust = strategy.outcome.trust if isinstance(strategy, FedTrustStrategy) and strategy.outcome and not why else None
            metrics = self._probe(valid, trust, before, final=number == setup.scenario.rounds)
        times.append(time.perf_counter())
        rows = records.client_rows(setup, number, asked, valid, self._grid.losses, trust)
        record = records.round_record(
            number, asked, valid, quorum, why, metrics, rows, float((self._params - before).double().norm()), times
        )
        if isinstance(strategy, FedTrustStrategy) and strategy.outcome and not why:
            record["seconds"] |= {place: round(cost, 4) for place, cost in strategy.outcome.seconds.items()}
        return record, rows

    def _aggregate(self, valid: Valid, quorum: int, asked: int) -> str:
        """Apply the strategy; return why the round does not count, or nothing."""
        if len(valid.clients) < quorum:
            return f"{len(valid.clients)} valid replies of {asked}, quorum {quorum}"
        strategy, layout = self.setup.strategy, self.setup.world.layout
        try:
            with flower.cheap_collection():
                arrays, _ = strategy.aggregate_train(self.round, valid.messages)
        except Exception as error:  # a stock strategy may raise anything
            reason = str(error) if isinstance(error, FedTrustError) else f"the strategy failed: {_said(error)}"
            if isinstance(error.__cause__, TooFewError) and len(valid.clients) < asked:
                return f"{len(valid.clients)} valid replies of {asked} are too few: {reason}"
            raise RunError(reason) from error
        if arrays is None:
            return "the strategy made no new model of the replies"
        params = flower.to_flat(arrays, layout)
        if not bool(torch.isfinite(params).all()):
            raise RunError(f"the strategy made a model that is not finite in round {self.round}")
        self._params = params.detach().clone()
        return ""

    def _probe(self, valid: Valid, trust: Tensor | None, before: Tensor, *, final: bool) -> dict[str, float]:
        """Measure the model; `before` is the one that the clients were sent."""
        metrics: dict[str, float] = {}
        context = self._probe_context(valid, trust, before, final=final)
        stamps = self._stamps()
        for bound in self.setup.probes:
            rng = seeds.torch_stream(self.setup.world.seed, f"probe/{bound.entry.name}", self.round)
            full = dataclasses.replace(context, rng=rng, params=self._params.clone())  # a probe that writes on it harms nobody
            if bound.entry.meta.get("when") == "end" and not final:
                continue
            try:
                found = self._keep(bound.entry.name, bound.call(views.probe_view(str(bound.entry.meta["role"]), full)))
                twice = sorted(metrics.keys() & found.keys())
                if twice:
                    raise ValueError(f"metric '{twice[0]}' is measured by another probe already")
                if stamps != self._stamps():
                    raise ValueError("it changed the test samples or the clients' data in place")
                metrics |= found
            except (Exception, SystemExit) as error:  # a student's probe may raise anything
                raise RunError(f"probe '{bound.entry.name}' failed in round {self.round}: {type(error).__name__}: {error}") from error
        return metrics

    def _stamps(self) -> tuple[int, ...]:
        """Return the version counters of what probes are shown and must not write on."""
        data = self.setup.world.data
        return tuple(t._version for t in (data.x_test, data.y_test, data.x, data.y))

    def _keep(self, name: str, found: Mapping[str, float | Artefact]) -> dict[str, float]:
        for key, value in found.items():
            if isinstance(value, Artefact):
                self._directory.save_artefact(f"{name}.{key}", value)
        numbers = {k: float(v) for k, v in found.items() if not isinstance(v, Artefact)}
        # A model that has diverged may have no finite loss, and JSON no other number: such a metric is absent from its round.
        return {k: v for k, v in numbers.items() if math.isfinite(v)}

    def _probe_context(self, valid: Valid, trust: Tensor | None, before: Tensor, *, final: bool) -> ProbeContext:
        world, params = self.setup.world, self._params
        on_test: list[Tensor] = []  # what the model says to the test samples, asked for by most probes

        def query(x: Tensor) -> Tensor:
            if x is not world.data.x_test:
                return world.predict(params, x)
            if not on_test:
                on_test.append(world.predict(params, x))
            return on_test[0].clone()

        return ProbeContext(
            round=self.round,
            final=final,
            task=world.data.task,
            query=query,
            rng=seeds.torch_stream(world.seed, "probe", self.round),
            criterion=world.criterion,
            params=params,
            model=world.model,
            clients=valid.clients,
            updates=self._updates(valid, before),
            trust=trust,
            test=(world.data.x_test, world.data.y_test),
            data=world.data,
            truth=Truth(frozenset(self.setup.roster.malicious(self.round)), self.setup.goals),
        )

    def _updates(self, valid: Valid, before: Tensor) -> Tensor | None:
        """Return what the protocol showed the server; only gathered when a probe looks at it."""
        observers = [p for p in self.setup.probes if p.entry.meta.get("role") == "curious-server" or p.entry.meta.get("updates")]
        if not observers or not valid.messages:
            return None
        found = [next(iter(m.content.array_records.values())) for m in valid.messages]
        layout = self.setup.world.layout
        return torch.stack(
            [r.delta if isinstance(r, flower.FlatRecord) and r.delta is not None else flower.to_flat(r, layout) - before for r in found]
        )

    def finish(self) -> tuple[str, Tensor]:
        """Write the final model and return its SHA-256, and the model."""
        return self._directory.save_model(self._params, self.setup.world.layout), self._params
