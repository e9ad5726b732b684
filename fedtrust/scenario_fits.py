"""Whether the components of a scenario can work with its task and its model: asked before anything runs, of every cell of a matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from torch import nn

from fedtrust.data.base import FederatedData
from fedtrust.errors import InputError
from fedtrust.fits import RunFacts, misfit
from fedtrust.layout import Layout
from fedtrust.models.architecture import Architecture
from fedtrust.probes.membership_game import own_samples, size_of
from fedtrust.registry import REGISTRY, Entry, Kind
from fedtrust.repairs import RepairFacts, refusal
from fedtrust.scenario import Cell, Ref, Scenario
from fedtrust.scenario_parts import StrategySpec
from fedtrust.sending import Recipe

Lookup = Callable[[Kind, str], Entry]


class Misfit(NamedTuple):
    """A component that cannot work in a scenario.

    Attributes:
        place: its dotted key.
        reason: why not, whole.
        axis, label: which cells of a matrix it spoils: those with this own label on this axis; "" for all.
    """

    place: str
    reason: str
    axis: Literal["", "attackers", "strategies"] = ""
    label: str = ""


class _Part(NamedTuple):
    """A component of a scenario, where it stands, and which cells have it."""

    kind: Kind
    ref: Ref
    place: str
    axis: Literal["", "attackers", "strategies"] = ""
    label: str = ""


def facts_of(scenario: Scenario, data: FederatedData, module: nn.Module) -> RunFacts:
    """Return what is known of a run once its data and its model are there; without any component's parameters."""
    train, layout = scenario.clients.train, Layout.of(module)
    batch_size = min(train.batch_size, max(len(part) for part in data.parts))
    loss = train.loss.name if train.loss is not None else ""
    server = scenario.malicious_server
    count = scenario.clients.count
    most = max(sum(group.size(count) for group in groups) for groups in scenario.axes()["attackers"].values())
    fewest = sum(sorted(len(part) for part in data.parts)[: max(count - most, 0)])  # whoever attacks owns no member
    return RunFacts(
        params={},
        task=data.task,
        layout=layout,
        model=Architecture(module, layout),
        recipe=Recipe(train.optimiser, train.lr, batch_size, train.epochs, loss, dict(train.optimiser_params)),
        rounds=scenario.rounds,
        per_round=scenario.clients.cohort,
        sender="" if server is None else server.sender,
        sender_params=None if server is None else server.params,
        sends=(1, scenario.rounds) if server is None or server.rounds is None else server.rounds,
        properties=frozenset(what for skew in data.skews for what in skew.properties),
        own=own_samples(data),
        candidates=2 * size_of(data, fewest),
        queries=scenario.release.queries,
    )


def must_fit(scenario: Scenario, data: FederatedData, module: nn.Module, entry: Lookup = REGISTRY.get) -> dict[tuple[str, str], str]:
    """Refuse components that cannot work with the task or the model.

    Args:
        scenario: resolved.
        data: its data.
        module: its model.
        entry: finds a component.

    Returns:
        For a matrix that skips cells that cannot be: (axis, own label) → why such cells are not played.

    Raises:
        InputError: placed at the component.
    """
    skips = scenario.sweep is not None and scenario.sweep.infeasible == "skip"
    skipped: dict[tuple[str, str], str] = {}
    for found in misfits(scenario, facts_of(scenario, data, module), entry):
        if not (skips and found.axis):
            raise InputError(found.reason, found.place)
        skipped.setdefault((found.axis, found.label), found.reason)
    return skipped


def marked(cells: list[Cell], skipped: Mapping[tuple[str, str], str]) -> list[Cell]:
    """Return the cells of a matrix, those that cannot be with the reason.

    Raises:
        InputError: none is left.
    """
    done = []
    for cell in cells:
        own = {"attackers": str(cell.labels.get("attack", cell.labels["attackers"])), "strategies": str(cell.labels["strategies"])}
        reason = next((skipped[axis, label] for axis, label in own.items() if (axis, label) in skipped), "")
        done.append(cell._replace(refused=cell.refused or reason))
    if all(cell.refused for cell in done):
        raise InputError(f"every cell would be refused; the last because {done[-1].refused}", "sweep")
    return done


def misfits(scenario: Scenario, facts: RunFacts, entry: Lookup = REGISTRY.get) -> Iterator[Misfit]:
    """Yield every component that cannot work with the task or the model."""
    for part in _parts(scenario):
        made = entry(part.kind, part.ref.name)
        reason = _wrong_task(made, facts, scenario.data.source.name)
        if reason is None:
            own = _own_reason(made, part, dataclasses.replace(facts, params=made.check(part.ref.params)), scenario)
            reason = None if own is None else f"'{made.name}' cannot work here: {own}"
        if reason is not None:
            yield Misfit(part.place, reason, part.axis, part.label)


def _parts(scenario: Scenario) -> Iterator[_Part]:
    sweep = scenario.sweep
    for i, ref in enumerate(scenario.probes):
        yield _Part("probe", ref, f"probes[{i}]")
    for i, ref in enumerate(scenario.release.defences):
        yield _Part("answer", ref, f"release.defences[{i}]")
    if scenario.malicious_server is not None:
        server = scenario.malicious_server
        yield _Part("sender", Ref(name=server.sender, params=server.params), "malicious_server.sender")
    yield _Part("behaviour", scenario.clients.behaviour, "clients.behaviour")
    for i, group in enumerate(scenario.attackers):
        yield _Part("behaviour", Ref(name=group.behaviour, params=group.params), f"attackers[{i}].behaviour")
    for label, groups in (sweep.attackers if sweep is not None else {}).items():
        for i, group in enumerate(groups):
            ref = Ref(name=group.behaviour, params=group.params)
            yield _Part("behaviour", ref, f"sweep.attackers.{label}[{i}].behaviour", "attackers", label)
    if sweep is None or not sweep.strategies:
        yield from _rules(scenario.strategy, "strategy")
    for label, strategy in (sweep.strategies if sweep is not None else {}).items():
        for part in _rules(strategy, f"sweep.strategies.{label}"):
            yield part._replace(axis="strategies", label=label)


def _rules(strategy: StrategySpec, where: str) -> Iterator[_Part]:
    if strategy.behaviour is not None:
        yield _Part("behaviour", strategy.behaviour, f"{where}.behaviour")
    for i, ref in enumerate(strategy.filters):
        yield _Part("filter", ref, f"{where}.filters[{i}]")
    if not strategy.aggregator.name.startswith("flwr:"):
        yield _Part("aggregator", strategy.aggregator, f"{where}.aggregator")
    for i, ref in enumerate(strategy.steps):
        yield _Part("step", ref, f"{where}.steps[{i}]")
    for i, ref in enumerate(strategy.repairs):
        yield _Part("repair", ref, f"{where}.repairs[{i}]")


def _wrong_task(made: Entry, facts: RunFacts, source: str) -> str | None:
    """Return why a component that declares its tasks is not for this one."""
    wanted = made.meta.get("task")
    suited = (wanted,) if isinstance(wanted, str) else wanted
    if suited is None or facts.task.kind in suited:
        return None
    does = "measures a" if made.kind == "probe" else "is for"
    return f"'{made.name}' {does} {' or '.join(suited)}; '{source}' is {facts.task.called}"


def _own_reason(made: Entry, part: _Part, facts: RunFacts, scenario: Scenario) -> str | None:
    """Return what a component itself says against the run."""
    reason: Any = None
    try:
        if made.kind == "behaviour":
            reason = made.make(part.ref.params).check(facts.task)
        elif made.kind == "repair":
            labels = scenario.sweep.strategies if scenario.sweep is not None else {}
            strategy = labels[part.label] if part.axis else scenario.strategy
            reason = refusal(made.meta.get("needs"), RepairFacts(facts.params, strategy.root_samples, facts.task, facts.layout))
    except (Exception, SystemExit) as error:  # a student's hook may raise anything
        raise InputError(f"`check` of {made.kind} '{made.name}' fails: {type(error).__name__}: {error}", part.place) from error
    try:
        return reason or misfit(made.meta.get("fits"), facts)
    except ValueError as error:
        raise InputError(f"{made.kind} '{made.name}': {error}", part.place) from error
