"""From a scenario to the parts of a run: world, roster, strategy, probes, threat cards."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from flwr.serverapp.strategy import Strategy

from fedtrust import plugins
from fedtrust.client import Behaviour, ClientMemory, capabilities, overrides
from fedtrust.data.base import FederatedData
from fedtrust.data.build import build as build_data
from fedtrust.engine import flower, seeds
from fedtrust.engine.roster import Group, Roster, recruit, recruits
from fedtrust.engine.world import World
from fedtrust.errors import InputError
from fedtrust.models.build import build as build_model
from fedtrust.privacy.build import build as mechanism_of
from fedtrust.privacy.server import Malice, PrivateStrategy
from fedtrust.privacy.summary import calibrated
from fedtrust.probes.base import Goal, Probe
from fedtrust.probes.membership_game import MembershipGame, draw
from fedtrust.registry import REGISTRY, Entry, Kind
from fedtrust.release import Release
from fedtrust.repairs import Repair
from fedtrust.scenario import AttackerSpec, Ref, Scenario
from fedtrust.scenario_fits import facts_of, must_fit
from fedtrust.sending import MaliciousServer, Recipe, SendContext
from fedtrust.server import Pipeline, Stage, assumed_count
from fedtrust.strategy import FedTrustStrategy
from fedtrust.views import simulated

STOCK = "flwr:"


@dataclass(frozen=True)
class BoundProbe:
    """A probe of the scenario with its parameters bound."""

    entry: Entry
    call: Probe


@dataclass(frozen=True)
class BoundRepair:
    """A repair of the scenario with its parameters bound."""

    entry: Entry
    call: Repair


@dataclass(frozen=True)
class Setup:
    """The parts of one run.

    Attributes:
        scenario: what was asked for.
        world: data, architecture and recipe; what workers hold.
        params: the initial global model [d].
        roster: who does what.
        strategy: the Flower strategy that runs the server.
        stock: whether it is one of Flower's own.
        probes: what is measured.
        goals: what the adversaries want, on test samples.
        repairs: what the server does to the model after the last round.
        recipe: how clients train; public.
        game: the candidates of membership inference, where somebody asks for them.
        release: on what terms the model is released.
    """

    scenario: Scenario
    world: World
    params: torch.Tensor
    roster: Roster
    strategy: Strategy
    stock: bool
    probes: tuple[BoundProbe, ...]
    goals: tuple[Goal, ...]
    repairs: tuple[BoundRepair, ...] = ()
    recipe: Recipe | None = None
    game: MembershipGame | None = None
    release: Release = field(default_factory=Release)


def entry_of(kind: Kind, name: str, scenario: Scenario) -> Entry:
    """Return a component's registry entry; a plugin's, if the scenario was loaded with leave to run it."""
    if plugins.is_plugin(name):
        if scenario.origin is None:
            raise InputError(f"plugin '{name}' can be used only from a scenario file")
        return plugins.load_plugin(kind, name, scenario.origin.folder, scenario.origin.allow_plugins)
    return REGISTRY.get(kind, name)


def _entry(scenario: Scenario, kind: Kind, name: str) -> Entry:
    return entry_of(kind, name, scenario)


def make(kind: Kind, ref: Ref, scenario: Scenario) -> Any:
    """Return the component of a reference with its parameters bound."""
    return entry_of(kind, ref.name, scenario).make(ref.params)


def unfit(scenario: Scenario) -> dict[tuple[str, str], str]:
    """Return which cells of a matrix cannot be with its model: (axis, own label) → why.

    Raises:
        InputError: something does not fit together in any of them.
    """
    data = _data(scenario)
    world, _ = _world(scenario, data)
    return must_fit(scenario, data, world.module, functools.partial(_entry, scenario))


def build(scenario: Scenario) -> Setup:
    """Return the parts of the run that a scenario (without sweep) describes.

    Raises:
        InputError: something does not fit together; nothing has been run.
    """
    data = _data(scenario)
    world, params = _world(scenario, data)
    roster = calibrated(_roster(scenario), world, scenario.rounds)
    must_fit(scenario, data, world.module, functools.partial(_entry, scenario))
    roster = _aimed(roster, data, scenario)
    name = scenario.strategy.aggregator.name
    stock = name.startswith(STOCK)
    probes = tuple(BoundProbe(entry_of("probe", ref.name, scenario), make("probe", ref, scenario)) for ref in scenario.probes)
    recipe, game = facts_of(scenario, data, world.module).recipe, _game(scenario, roster, data, probes)
    malice = _malice(scenario, world, recipe, game)
    strategy = _stock(scenario) if stock else _own(scenario, world, malice)
    repairs = _repairs(scenario)
    return Setup(scenario, world, params, roster, strategy, stock, probes, _goals(roster, data), repairs, recipe, game, _release(scenario))


def _own(scenario: Scenario, world: World, malice: Malice | None) -> FedTrustStrategy:
    """Return our own strategy: a pipeline, with a privacy mechanism in it where the scenario has one."""
    pipeline, spec, clients = _pipeline(scenario), scenario.strategy, scenario.clients
    if spec.privacy is None:
        return FedTrustStrategy(pipeline, world, spec.assumed_malicious, scenario.rounds, malice)
    try:
        mechanism = mechanism_of(spec.privacy, clients.count, clients.cohort, scenario.rounds, scenario.seed)
    except InputError as error:
        raise InputError(error.message, f"strategy.{error.where}") from None
    return PrivateStrategy(pipeline, mechanism, world, spec.assumed_malicious, scenario.rounds, malice)


def _release(scenario: Scenario) -> Release:
    spec = scenario.release
    return Release(spec.answers, spec.queries, {ref.name: make("answer", ref, scenario) for ref in spec.defences})


def _game(scenario: Scenario, roster: Roster, data: FederatedData, probes: Sequence[BoundProbe]) -> MembershipGame | None:
    """Draw the candidates of membership inference, if a probe or a sender asks for them or for a population."""
    metas = [probe.entry.meta for probe in probes]
    if scenario.malicious_server is not None:
        metas.append(entry_of("sender", scenario.malicious_server.sender, scenario).meta)
    if not any(simulated(meta) for meta in metas):
        return None
    malicious = roster.malicious()
    return draw(data, [c for c in range(roster.count) if c not in malicious], scenario.seed)


def _malice(scenario: Scenario, world: World, recipe: Recipe, game: MembershipGame | None) -> Malice | None:
    """Return what a malicious server sends, or `None` for an honest one."""
    spec = scenario.malicious_server
    if spec is None:
        return None
    entry = entry_of("sender", spec.sender, scenario)
    server = MaliciousServer(spec.sender, entry.make(spec.params), spec.rounds or (1, scenario.rounds))
    grants = simulated(entry.meta)

    def malice(params: torch.Tensor, number: int, clients: tuple[int, ...]) -> dict[int, torch.Tensor]:
        context = SendContext(
            round=number,
            clients=clients,
            examples={c: world.examples(c) for c in clients},
            layout=world.layout,
            task=world.data.task,
            model=world.model,
            criterion=world.criterion,
            recipe=recipe,
            rng=seeds.torch_stream(scenario.seed, "sender", number),
            root=world.data.root,
            candidates=(game.x.clone(), game.y.clone()) if game is not None and "candidates" in grants else None,
            population=_clones(game.population) if game is not None and "population" in grants else None,
        )
        return server.models(params, context)

    return malice


def _clones(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return pair[0].clone(), pair[1].clone()


def _repairs(scenario: Scenario) -> tuple[BoundRepair, ...]:
    return tuple(BoundRepair(entry_of("repair", ref.name, scenario), make("repair", ref, scenario)) for ref in scenario.strategy.repairs)


def _data(scenario: Scenario) -> FederatedData:
    skew = scenario.data.feature_skew
    return build_data(
        scenario.data.source.name,
        scenario.data.source.params,
        scenario.data.partition.name,
        scenario.data.partition.params,
        None if skew is None else (skew.name, skew.params),
        clients=scenario.clients.count,
        seed=scenario.seed,
        root_samples=scenario.strategy.root_samples,
    )


def _world(scenario: Scenario, data: FederatedData) -> tuple[World, torch.Tensor]:
    recipe = scenario.clients.train
    if recipe.loss is None:
        raise ValueError("the scenario was not resolved")
    module = build_model(scenario.model.name, scenario.model.params, data.task, scenario.seed)
    world = World(
        data=data,
        module=module,
        criterion=make("loss", recipe.loss, scenario),
        optimiser=make("optimiser", Ref(name=recipe.optimiser, params=recipe.optimiser_params), scenario),
        lr=recipe.lr,
        # A batch larger than the largest client would only be padded with further passes over the same samples.
        batch_size=min(recipe.batch_size, max(len(part) for part in data.parts)),
        epochs=recipe.epochs,
        seed=scenario.seed,
        path=scenario.engine.path,
        precision=scenario.engine.precision,
    )
    return world, world.layout.vector(module)


def _roster(scenario: Scenario) -> Roster:
    count = scenario.clients.count
    wanted = [a.ids if a.ids is not None else recruits(count, a.share, a.count) for a in scenario.attackers]
    groups = []
    for spec, members in zip(scenario.attackers, recruit(count, wanted, scenario.seed), strict=True):
        behaviour: Behaviour = entry_of("behaviour", spec.behaviour, scenario).make(spec.params)
        rounds = spec.rounds or (1, scenario.rounds)
        groups.append(Group(spec.behaviour, behaviour, spec.knowledge or behaviour.needs_knowledge, members, rounds))
    return Roster(count, make("behaviour", scenario.clients.behaviour, scenario), tuple(groups))


def _pipeline(scenario: Scenario) -> Pipeline:
    spec = scenario.strategy
    return Pipeline(
        [_stage("filter", f"filters[{i}]", ref, scenario) for i, ref in enumerate(spec.filters)],
        _stage("aggregator", "aggregator", spec.aggregator, scenario),
        [_stage("step", f"steps[{i}]", ref, scenario) for i, ref in enumerate(spec.steps)],
        scenario.engine.deadline,
    )


def _stage(kind: Kind, place: str, ref: Ref, scenario: Scenario) -> Stage:
    meta = entry_of(kind, ref.name, scenario).meta
    rowwise = meta.get("rowwise")
    alone = rowwise is not None and bool(rowwise(ref.params))
    tell = meta.get("guarantee")
    guarantee = None if tell is None else functools.partial(tell, ref.params)
    return Stage(place, ref.name, make(kind, ref, scenario), meta.get("linear"), alone, bool(meta.get("hides")), guarantee)


def _stock(scenario: Scenario) -> Strategy:
    ref = scenario.strategy.aggregator
    assumed = assumed_count(scenario.strategy.assumed_malicious, scenario.clients.cohort)
    return flower.stock_strategy(ref.name.removeprefix(STOCK), ref.params, assumed)


def _aimed(roster: Roster, data: FederatedData, scenario: Scenario) -> Roster:
    """Return the roster in which those who work on the very samples that they want misjudged know them."""
    groups = []
    for group in roster.groups:
        if entry_of("behaviour", group.name, scenario).meta.get("targets"):
            goal = _goal(group, data)
            if goal is None:
                raise InputError(f"'{group.name}' finds nothing among the test samples that it would want misjudged", "attackers")
            group = replace(group, targets=(goal.x, goal.y))
        groups.append(group)
    return replace(roster, groups=tuple(groups))


def _goals(roster: Roster, data: FederatedData) -> tuple[Goal, ...]:
    found = (_goal(group, data) for group in roster.groups)
    return tuple(goal for goal in found if goal is not None)


def rival_goals(attackers: Sequence[AttackerSpec], setup: Setup) -> tuple[Goal, ...]:
    """Return what these adversaries would want of a run in which they take no part: how much of it a clean model does by itself.

    Args:
        attackers: of another cell of the same matrix.
        setup: of the run without them.
    """
    behaviours = [(spec.behaviour, entry_of("behaviour", spec.behaviour, setup.scenario).make(spec.params)) for spec in attackers]
    nobody = tuple(Group(name, behaviour, behaviour.needs_knowledge, (), (1, 1)) for name, behaviour in behaviours)
    try:
        return _goals(Roster(setup.roster.count, setup.roster.honest, nobody), setup.world.data)
    except InputError:  # the cell in which they attack says what is wrong
        return ()


def goals_now(setup: Setup, memories: Mapping[str, ClientMemory]) -> tuple[Goal, ...]:
    """Return what the adversaries want this round: what they wanted from the start, unless they learn what they want.

    Args:
        setup: the run.
        memories: what each coalition remembers, by its place in the roster.
    """
    if not any(overrides(group.behaviour, "goal_now") for group in setup.roster.groups):
        return setup.goals
    found = (_goal(group, setup.world.data, memories.get(str(place))) for place, group in enumerate(setup.roster.groups))
    return tuple(goal for goal in found if goal is not None)


def _goal(group: Group, data: FederatedData, memory: ClientMemory | None = None) -> Goal | None:
    """Return what an adversary wants of the test samples, given what its coalition remembers; `None` without such a goal."""
    try:  # copies: a goal that stamps its trigger in place must not change what everybody is measured on
        x, y = data.x_test.clone(), data.y_test.clone()
        if memory is None:
            wanted = group.behaviour.goal(x, y, data.task)
        else:
            wanted = group.behaviour.goal_now(x, y, data.task, {name: value.clone() for name, value in memory.items()})
        if wanted is None:
            return None
        x, y = wanted
        if len(x) != len(y) or x.shape[1:] != data.x_test.shape[1:]:
            raise ValueError(f"returned x {list(x.shape)} and y {list(y.shape)}")
    except (Exception, SystemExit) as error:  # a student's hook may raise anything
        raise InputError(f"`goal` of behaviour '{group.name}' fails: {type(error).__name__}: {error}", "attackers") from error
    clean = data.x_test if len(x) == len(data.x_test) else x
    if clean is data.x_test:  # being right is no success: keep the samples whose wanted label is not the true one
        counts = y != data.y_test
        x, y, clean = x[counts], y[counts], clean[counts]
    return Goal(group.name, x, y, clean) if len(x) else None


def threat_cards(setup: Setup) -> list[dict[str, Any]]:
    """Return role, knowledge, capability and budget of every adversary, derived from the components."""
    cards: list[dict[str, Any]] = []
    system = setup.scenario.clients.system
    always = system is not None and system.attackers_always_available
    for spec, group in zip(setup.scenario.attackers, setup.roster.groups, strict=True):
        entry = entry_of("behaviour", spec.behaviour, setup.scenario)
        bad = not group.behaviour.protects
        role = ("malicious client" if group.knowledge == "own" else "colluding malicious clients") if bad else "client that protects itself"
        cards.append(
            {
                "behaviour": group.name,
                "paper": str(entry.meta.get("paper", "")),
                "summary": entry.summary,
                "role": role,
                "malicious": bad,
                "knowledge": group.knowledge,
                "capability": [*capabilities(type(group.behaviour)), *(["availability"] if always else [])],
                "clients": list(group.members),
                "share": len(group.members) / setup.roster.count,
                "rounds": list(group.rounds),
                "goal": next((_wanted(goal) for goal in setup.goals if goal.name == group.name), ""),
                "params": plain(spec.params),
            }
        )
    return cards


def _wanted(goal: Goal) -> str:
    """Return a goal in words, read off the inputs and labels it consists of."""
    changed = goal.x.shape != goal.clean.shape or not torch.equal(goal.x, goal.clean)
    what = "triggered inputs" if changed else "clean samples"
    labels = sorted(set(goal.y.tolist()))
    return f"{what} go to class {labels[0]}" if len(labels) == 1 else f"{what} go to the attacker's wrong classes"


def plain(params: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters as a record may hold them."""
    return {k: v if isinstance(v, str | int | float | bool | list) else str(v) for k, v in params.items() if v is not None}
