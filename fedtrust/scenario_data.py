"""What a scenario is asked once its data are there: sizes, the task, whether model, loss, behaviours and probes fit it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import nn

from fedtrust.data.base import FederatedData
from fedtrust.data.build import build
from fedtrust.engine.devices import Devices
from fedtrust.errors import InputError
from fedtrust.fits import RunFacts, misfit
from fedtrust.models.build import build as build_model
from fedtrust.privacy.accounts import ClientAccount, worst
from fedtrust.privacy.build import advice, drowned
from fedtrust.privacy.build import build as mechanism_of
from fedtrust.privacy.summary import participations
from fedtrust.registry import REGISTRY
from fedtrust.scenario import Ref, Scenario
from fedtrust.scenario_checks import behaviours
from fedtrust.scenario_fits import facts_of, marked, must_fit
from fedtrust.server import assumed_count

#: So many bytes of samples may be copied about to try every partition with every seed; beyond it the first seed has to do.
_TRIAL_BYTES = 8e9


def check_data(scenario: Scenario) -> list[str]:
    """Ask everything that needs the data; see `fedtrust.scenario.check`."""
    facts: list[str] = []
    first: FederatedData | None = None
    for label, partition, seed in _trials(scenario):
        data = _spread(scenario, label, partition, seed)
        if first is None:
            first = data
            facts.append(_describe(scenario, data))
            module = _fits(scenario, data, facts)
            facts += _devices(scenario, data, module)
            parameters = sum(p.numel() for p in module.parameters())
            facts += _private(scenario, parameters) + _promised(scenario, facts_of(scenario, data, module))
            facts += _protected(scenario, data, parameters)
            samples = data.x.numel() * data.x.element_size()
        sizes = [len(part) for part in data.parts]
        facts.append(f"partition '{label or partition.name}', seed {seed}: {min(sizes)} to {max(sizes)} samples a client")
        if samples * len(facts) > _TRIAL_BYTES and seed != scenario.seed:
            break
    axes = scenario.axes()
    cells = math.prod(len(axis) for axis in axes.values())
    clients = scenario.clients
    facts.append(f"{cells} run{'s' if cells > 1 else ''} of {scenario.rounds} rounds, {clients.cohort} of {clients.count} clients a round")
    return facts


def _trials(scenario: Scenario) -> Iterator[tuple[str, Ref, int]]:
    """Yield (label in the sweep, partition, seed), every partition with the first seed before the other seeds."""
    axes = scenario.axes()
    swept = scenario.sweep is not None and bool(scenario.sweep.partitions)
    for seed in axes["seeds"]:
        for label, partition in axes["partitions"].items():
            yield (label if swept else "", partition, seed)


def _spread(scenario: Scenario, label: str, partition: Ref, seed: int) -> FederatedData:
    data, skew = scenario.data, scenario.data.feature_skew
    strategies = scenario.axes()["strategies"].values()
    root = max(strategy.root_samples for strategy in strategies)
    try:
        return build(
            data.source.name,
            data.source.params,
            partition.name,
            partition.params,
            None if skew is None else (skew.name, skew.params),
            scenario.clients.count,
            seed,
            root,
        )
    except InputError as error:
        raise InputError(error.message, _place(error.where, label)) from None


def _place(where: str, label: str) -> str:
    """Return the scenario's own key for a place that the data's builder names."""
    for theirs, ours in (
        ("data.skew", "data.feature_skew"),
        ("data.root_samples", "strategy.root_samples"),
        ("data.partition", f"sweep.partitions.{label}" if label else "data.partition"),
    ):
        if where.startswith(theirs):
            return ours + where.removeprefix(theirs)
    return where


def _describe(scenario: Scenario, data: FederatedData) -> str:
    shape = "×".join(map(str, data.task.shape))
    counted = {"classification": f"{data.task.classes} classes", "characters": f"{data.task.classes} different characters"}
    what = counted.get(data.task.kind, data.task.kind)
    return f"source '{scenario.data.source.name}': {len(data.x)} training and {len(data.x_test)} test samples of {shape}, {what}"


def _devices(scenario: Scenario, data: FederatedData, module: nn.Module) -> list[str]:
    """Say what the clients' devices make of the run, where the scenario gives them any."""
    system, recipe = scenario.clients.system, scenario.clients.train
    if system is None:
        return []
    samples = [len(part) for part in data.parts]
    batch_size = min(recipe.batch_size, max(samples))  # as in a run
    parameters = sum(p.numel() for p in module.parameters())
    made = Devices(system, seed=scenario.seed, samples=samples, batch_size=batch_size, epochs=recipe.epochs, parameters=parameters)
    return [made.describe()]


def _private(scenario: Scenario, parameters: int) -> list[str]:
    """Say what privacy costs, where a strategy of the scenario promises any."""
    facts: list[str] = []
    swept = scenario.sweep is not None and bool(scenario.sweep.strategies)
    clients = scenario.clients
    for label, strategy in scenario.axes()["strategies"].items():
        if strategy.privacy is None:
            continue
        try:
            made = mechanism_of(strategy.privacy, clients.count, clients.cohort, scenario.rounds, scenario.seed)
        except InputError as error:
            where = f"sweep.strategies.{label}" if swept else "strategy"
            raise InputError(error.message, f"{where}.{error.where}") from None
        facts += [f"'{label}': {line}" if swept else line for line in advice(made, parameters)]
    return facts


def _promised(scenario: Scenario, run: RunFacts) -> list[str]:
    """Say what privacy the noise of filters will give, where a strategy of the scenario has any."""
    found: list[str] = []
    swept = scenario.sweep is not None and bool(scenario.sweep.strategies)
    for label, strategy in scenario.axes()["strategies"].items():
        assumed = assumed_count(strategy.assumed_malicious, run.per_round)
        for ref in strategy.filters:
            entry = REGISTRY.get("filter", ref.name)
            own = dataclasses.replace(run, params=entry.check(ref.params))
            if "promise" in entry.meta and misfit(entry.meta.get("fits"), own) is None:  # else its cells are refused
                found += [f"'{label}': {line}" if swept else line for line in entry.meta["promise"](own, assumed)]
    return found


def _protected(scenario: Scenario, data: FederatedData, parameters: int) -> list[str]:
    """Say what clients pay that protect themselves, if they are asked in every round."""
    recipe, facts = scenario.clients.train, list[str]()
    sizes = [len(part) for part in data.parts]
    parts = participations(sizes, min(recipe.batch_size, max(sizes)), recipe.epochs, dict.fromkeys(range(len(sizes)), scenario.rounds))
    for place, name, params in behaviours(scenario):
        account = REGISTRY.make("behaviour", name, params)
        if not isinstance(account, ClientAccount):
            continue
        try:
            most = worst(account.calibrated(parts), parts)
        except ValueError as error:
            raise InputError(str(error), f"{place}.epsilon") from None
        if most is None:
            continue
        spent = most.spent
        facts.append(
            f"privacy: {name} at {place}, of one {spent.unit}; σ = {spent.noise_multiplier:.4g}, ε = {spent.epsilon:.4g} "
            f"at δ = {spent.delta:g} for client {most.client} if it is asked in each of {scenario.rounds} rounds ({spent.relation})"
        )
        warning = drowned(spent, parameters, scenario.clients.cohort) if spent.unit == "client" else None
        facts += [] if warning is None else [f"warning: {warning}"]
    return facts


def _fits(scenario: Scenario, data: FederatedData, facts: list[str]) -> nn.Module:
    """Ask model, loss and every component whether they suit the task and each other; return the model."""
    task = data.task
    for place, loss in _losses(scenario):
        tasks = REGISTRY.get("loss", loss.name).meta.get("tasks")
        if tasks is not None and task.kind not in tasks:
            raise InputError(f"'{loss.name}' is for {' and '.join(tasks)}; '{scenario.data.source.name}' is {task.called}", place)
    module = _module(scenario, data)
    facts.append(f"model '{scenario.model.name}': {sum(p.numel() for p in module.parameters()):,} parameters")
    skipped = must_fit(scenario, data, module)
    if scenario.sweep is not None and scenario.sweep.infeasible == "skip":
        refused = [cell for cell in marked(scenario.cells(), skipped) if cell.refused]
        facts += [f"{len(refused)} of its runs will be refused; the first, {refused[0].name}: {refused[0].refused}"] if refused else []
    return module


def _losses(scenario: Scenario) -> list[tuple[str, Ref]]:
    """Return (place, loss) of every loss that clients minimise in the scenario and its sweep."""
    swept = scenario.sweep.strategies if scenario.sweep is not None else {}
    own = [(f"sweep.strategies.{label}.loss", strategy.loss) for label, strategy in swept.items() if strategy.loss is not None]
    return [("clients.train.loss", scenario.clients.train.loss or Ref(name="cross-entropy")), *own]


def _module(scenario: Scenario, data: FederatedData) -> nn.Module:
    """Return the model after trying it, and every loss, on two samples."""
    name, task = scenario.model.name, data.task
    try:
        module = build_model(name, scenario.model.params, task, scenario.seed)
        with torch.no_grad():
            output = module(data.x[:2])
    except InputError as error:
        raise error.at("model") from None
    except (RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"'{name}' does not take samples of shape {list(task.shape)}: {error}", "model") from None
    wanted = [len(data.x[:2]), *(task.shape if task.kind == "characters" else ()), task.classes]
    if list(output.shape) != wanted:
        raise InputError(f"'{name}' returns {list(output.shape)} for two samples, not {wanted}", "model")
    for place, loss in _losses(scenario):
        try:
            value = REGISTRY.make("loss", loss.name, loss.params)(output, data.y[:2])
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise InputError(f"'{loss.name}' fails on the model's output: {error}", place) from None
        if value.dim() != 0:
            raise InputError(f"'{loss.name}' returns {list(value.shape)}, not a scalar", place)
    return module
