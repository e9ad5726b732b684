"""What a scenario is asked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic

from fedtrust import plugins, scenario_private
from fedtrust.client import KNOWLEDGE, Knowledge
from fedtrust.errors import InputError
from fedtrust.registry import REGISTRY, Entry, Kind, dotted
from fedtrust.repairs import RepairFacts, refusal
from fedtrust.scenario import (
    AttackerSpec,
    ClientsSpec,
    DataSpec,
    MaliciousServerSpec,
    Origin,
    Ref,
    ReleaseSpec,
    Scenario,
    StrategySpec,
    TrainSpec,
)
from fedtrust.scenario_toml import value
from fedtrust.server import PipelineFacts, assumed_count


def translated(error: pydantic.ValidationError) -> InputError:
    """Return the first finding of a pydantic error as one line in a user's words."""
    found = error.errors(include_url=False)
    # an unknown key is usually why a required one is missing
    first = next((f for f in found if f["type"] == "unknown_key"), found[0])
    location = [part for part in first["loc"] if part != "[key]"]
    if first["type"] == "unknown_key":
        return InputError(first["msg"], dotted([*location, first["ctx"]["key"]]))
    message = first["msg"].removeprefix("Input ")
    if first["type"] == "missing":
        message = "is required and not set"
    elif (
        first["type"] in ("int_type", "float_type", "string_type", "bool_type", "int_from_float", "literal_error", "list_type", "dict_type")
        or "than" in message
    ):
        message = f"{message} (got {_shown(first['input'])})"
    return InputError(message, dotted(location))


def _shown(given: Any) -> str:
    text = repr(given)
    return text if len(text) <= 60 else f"{text[:57]}…"


def resolve(scenario: Scenario, origin: Origin) -> Scenario:
    """Return the scenario with every component looked up and every parameter written out.

    Raises:
        InputError: placed at the dotted key.
    """
    from fedtrust import scenario_cells

    data = _data(scenario.data, origin)
    clients = _clients(scenario.clients, data, origin)
    updates: dict[str, Any] = {
        "data": data,
        "model": checked_ref(scenario.model, "model", "model", origin),
        "clients": clients,
        "attackers": checked_attackers(scenario.attackers, "attackers", scenario, origin),
        "strategy": checked_strategy(scenario.strategy, "strategy", clients, origin, works=scenario_cells.base_works(scenario.sweep)),
        "probes": _probes(scenario, data, origin),
        "malicious_server": _server(scenario, origin),
        "release": _release(scenario, origin),
    }
    for key, place in (("behaviour", "clients.behaviour"), ("loss", "clients.train.loss")):
        if getattr(scenario.strategy, key) is not None and scenario.sweep is None:
            raise InputError(f"is for the strategies of a sweep; here set {place}", f"strategy.{key}")
    resolved = scenario.model_copy(update=updates)
    done = scenario_cells.resolve(resolved, origin)
    scenario_private.must_mean(done)
    return done


def _entry(kind: Kind, name: str, where: str, origin: Origin) -> Entry:
    try:
        if plugins.is_plugin(name):
            return plugins.load_plugin(kind, name, origin.folder, origin.allow_plugins)
        if name.startswith("flwr:"):
            raise InputError(f"'{name}': Flower's strategies can be an aggregator only")
        return REGISTRY.get(kind, name)
    except InputError as error:
        # a plugin that fails says where in its own file
        raise (InputError(str(error), where) if error.where else error.at(where)) from None


def _checked(entry: Entry, params: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        checked = entry.check(params)
        entry.make(checked)  # a class may have more to say than its fields' types
        value(checked)
    except InputError as error:
        raise error.at(where) from None
    except TypeError as error:
        raise InputError(f"a parameter of '{entry.name}' cannot be written to a file: {error}", where) from None
    return checked


def checked_ref(ref: Ref, kind: Kind, where: str, origin: Origin) -> Ref:
    """Return a component with every parameter written out."""
    entry = _entry(kind, ref.name, where, origin)
    return Ref(name=ref.name, params=_checked(entry, ref.params, where))


def _data(data: DataSpec, origin: Origin) -> DataSpec:
    entry = _entry("source", data.source.name, "data.source", origin)
    for key in ("root", "download"):
        if key in data.source.params:
            raise InputError(f"is written beside `source`, as data.{key}", f"data.source.{key}")
    params = dict(data.source.params)
    takes = entry.schema.model_fields
    if data.root is not None and "root" not in takes:
        raise InputError(f"source '{entry.name}' comes with its data and takes no root", "data.root")
    if data.download and "download" not in takes:
        raise InputError(f"source '{entry.name}' fetches nothing", "data.download")
    if "root" in takes:
        root = _root(data.root, origin)
        params |= {} if root is None else {"root": root}
    if "download" in takes:
        params["download"] = data.download
    skew = data.feature_skew
    return data.model_copy(
        update={
            "source": Ref(name=data.source.name, params=_checked(entry, params, "data.source")),
            "partition": checked_ref(data.partition, "partition", "data.partition", origin),
            "feature_skew": None if skew is None else checked_ref(skew, "feature-skew", "data.feature_skew", origin),
        }
    )


def _root(root: str | None, origin: Origin) -> str | None:
    """Return the folder of the data files as an absolute path; a scenario's own word must not lead out of its folder."""
    if root is not None:
        try:
            inside = (origin.folder / root).resolve()
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"is not a path ({error})", "data.root") from None
        if Path(root).is_absolute() or not inside.is_relative_to(origin.folder):
            raise InputError(f"'{root}' leaves the scenario's folder; name a folder elsewhere by --data-root or FEDTRUST_DATA", "data.root")
    if origin.data_root:
        return str(Path(origin.data_root).expanduser().resolve())
    return None if root is None else str(inside)


def _clients(clients: ClientsSpec, data: DataSpec, origin: Origin) -> ClientsSpec:
    if clients.cohort > clients.count:
        raise InputError(f"should be at most clients.count = {clients.count} (got {clients.cohort})", "clients.per_round")
    if clients.system is not None and clients.system.over_select > 0 and clients.cohort == clients.count:
        raise InputError("a round takes every client already; set clients.per_round below clients.count", "clients.system.over_select")
    behaviour = _honest(clients.behaviour, "clients.behaviour", origin)
    return clients.model_copy(update={"behaviour": behaviour, "train": _train(clients.train, data, origin)})


def _honest(given: Ref, where: str, origin: Origin) -> Ref:
    entry = _entry("behaviour", given.name, where, origin)
    if entry.meta.get("role") != "honest":
        raise InputError(f"'{entry.name}' is malicious; it belongs to [[attackers]]", where)
    return Ref(name=given.name, params=_checked(entry, given.params, where))


def _train(train: TrainSpec, data: DataSpec, origin: Origin) -> TrainSpec:
    entry = _entry("optimiser", train.optimiser, "clients.train.optimiser", origin)
    params = _checked(entry, train.optimiser_params, "clients.train")
    loss = train.loss or Ref(name="mse" if _task(data, origin) == "regression" else "cross-entropy")
    return train.model_copy(update={"optimiser_params": params, "loss": checked_ref(loss, "loss", "clients.train.loss", origin)})


def _task(data: DataSpec, origin: Origin) -> str:
    """Return the kind of task; data in outside files are not read for it."""
    entry = _entry("source", data.source.name, "data.source", origin)
    if "task" in entry.meta or "root" in entry.schema.model_fields:
        return str(entry.meta.get("task", "classification"))
    from fedtrust.data.build import load

    return load(data.source.name, data.source.params).task.kind


def checked_attackers(groups: list[AttackerSpec], where: str, scenario: Scenario, origin: Origin) -> list[AttackerSpec]:
    """Return groups of attackers with every component looked up, if there are clients enough for them."""
    done = [_attacker(group, f"{where}[{i}]", scenario, origin) for i, group in enumerate(groups)]
    count = scenario.clients.count
    seen: dict[int, int] = {}
    for index, group in enumerate(done):
        for client in group.ids or []:
            if client >= count:
                raise InputError(f"there is no client {client} (ids run from 0 to {count - 1})", f"{where}[{index}].ids")
            if client in seen:
                twice = "twice" if seen[client] == index else f"in {where}[{seen[client]}] too"
                raise InputError(f"client {client} stands there {twice}", f"{where}[{index}].ids")
            seen[client] = index
    total, share = sum(g.size(count) for g in done), sum(g.share or 0.0 for g in done)
    if share >= 1:
        raise InputError(f"the shares add up to {share:g}; nobody would be honest", where)
    if total > count:
        raise InputError(f"{total} attackers are wanted, but there are {count} clients", where)
    return done


def _attacker(group: AttackerSpec, where: str, scenario: Scenario, origin: Origin) -> AttackerSpec:
    entry = _entry("behaviour", group.behaviour, f"{where}.behaviour", origin)
    if entry.meta.get("role") == "honest":
        raise InputError(f"'{entry.name}' is honest; it can be clients.behaviour", f"{where}.behaviour")
    params = _checked(entry, group.params, f"{where}.params")
    if not group.size(scenario.clients.count):
        raise InputError(f"{group.share:g} of {scenario.clients.count} clients is nobody", f"{where}.share")
    needed: Knowledge = entry.meta.get("knowledge", "own")
    knowledge = group.knowledge or needed
    if KNOWLEDGE.index(knowledge) < KNOWLEDGE.index(needed):
        enough = ", ".join(KNOWLEDGE[KNOWLEDGE.index(needed) :])
        raise InputError(f"'{entry.name}' needs more than '{knowledge}' (enough: {enough})", f"{where}.knowledge")
    if entry.meta.get("spread") and knowledge == "coalition" and group.size(scenario.clients.count) < 2:
        raise InputError(
            f"a single '{entry.name}' sees no update but its own, so no spread to hide in, and would send it unchanged; "
            "let there be two, or grant knowledge = 'omniscient'",
            where,
        )
    if group.rounds is not None and not 1 <= group.rounds[0] <= group.rounds[1] <= scenario.rounds:
        raise InputError(
            f"should be [first, last] with 1 <= first <= last <= {scenario.rounds} (got {list(group.rounds)})", f"{where}.rounds"
        )
    return group.model_copy(update={"params": params, "knowledge": knowledge})


def checked_strategy(strategy: StrategySpec, where: str, clients: ClientsSpec, origin: Origin, *, works: bool = True) -> StrategySpec:
    """Return a strategy with every component looked up; unless `works` is off it must be able to work as it stands, too."""
    if isinstance(strategy.assumed_malicious, int) and strategy.assumed_malicious > clients.cohort:
        raise InputError(
            f"assumes {strategy.assumed_malicious} of {clients.cohort} clients a round malicious", f"{where}.assumed_malicious"
        )
    updates: dict[str, Any] = {"repairs": _repairs(strategy, where, origin)}
    if strategy.behaviour is not None:
        updates["behaviour"] = _honest(strategy.behaviour, f"{where}.behaviour", origin)
    if strategy.loss is not None:
        updates["loss"] = checked_ref(strategy.loss, "loss", f"{where}.loss", origin)
    strategy = strategy.model_copy(update=updates)
    filters = [checked_ref(r, "filter", f"{where}.filters[{i}]", origin) for i, r in enumerate(strategy.filters)]
    steps = [checked_ref(r, "step", f"{where}.steps[{i}]", origin) for i, r in enumerate(strategy.steps)]
    if strategy.aggregator.name.startswith("flwr:"):
        if works:
            must_work(strategy, where, clients)
        return strategy
    aggregator = checked_ref(strategy.aggregator, "aggregator", f"{where}.aggregator", origin)
    done = strategy.model_copy(update={"filters": filters, "aggregator": aggregator, "steps": steps})
    if works:
        must_work(done, where, clients)
    return done


def must_work(strategy: StrategySpec, where: str, clients: ClientsSpec) -> None:
    """Refuse a strategy that cannot work with so many clients and what it assumes of them.

    Raises:
        InputError: placed at the component.
    """
    if strategy.privacy is not None:
        scenario_private.must_work(strategy, where, clients)
    if strategy.aggregator.name.startswith("flwr:"):
        _stock(strategy, where, clients)
    else:
        _needs(strategy, where, clients)


def _repairs(strategy: StrategySpec, where: str, origin: Origin) -> list[Ref]:
    """Check the repairs as far as that goes without the data; the rest is asked once the model is there."""
    done: list[Ref] = []
    for index, given in enumerate(strategy.repairs):
        place = f"{where}.repairs[{index}]"
        if given.name in [other.name for other in done]:
            raise InputError(f"'{given.name}' stands there twice", place)
        entry = _entry("repair", given.name, place, origin)
        done.append(Ref(name=given.name, params=_checked(entry, given.params, place)))
        reason = refusal(entry.meta.get("needs"), RepairFacts(done[-1].params, strategy.root_samples))
        if reason:
            raise InputError(f"'{entry.name}' cannot work here: {reason}", place)
    return done


def _stock(strategy: StrategySpec, where: str, clients: ClientsSpec) -> None:
    """Check a stock Flower strategy, which runs alone."""
    from fedtrust.engine.flower import stock_strategy

    name, params = strategy.aggregator.name.removeprefix("flwr:"), strategy.aggregator.params
    for part in ("filters", "steps"):
        if getattr(strategy, part):
            raise InputError(f"a stock Flower strategy runs alone; leave {part} empty", f"{where}.{part}")
    try:
        stock_strategy(name, params, assumed_count(strategy.assumed_malicious, clients.cohort))
    except InputError as error:
        raise error.at(f"{where}.aggregator") from None


def _needs(strategy: StrategySpec, where: str, clients: ClientsSpec) -> None:
    """Ask every component of a pipeline whether it can work in it."""
    stages: list[tuple[Kind, str, Ref]] = [("filter", f"{where}.filters[{i}]", r) for i, r in enumerate(strategy.filters)]
    stages.append(("aggregator", f"{where}.aggregator", strategy.aggregator))
    stages += [("step", f"{where}.steps[{i}]", r) for i, r in enumerate(strategy.steps)]
    entries = [REGISTRY.get(kind, ref.name) for kind, _, ref in stages]
    bounds = entries[len(strategy.filters) - 1].meta.get("bounds") if strategy.filters else None
    bounded = bounds is not None and bool(bounds(strategy.filters[-1].params))
    n, f = clients.cohort, assumed_count(strategy.assumed_malicious, clients.cohort)
    alone = [entry.meta.get("rowwise") for entry in entries[: len(strategy.filters)]]
    rowwise = tuple(said is not None and bool(said(ref.params)) for said, ref in zip(alone, strategy.filters, strict=True))
    for (_, place, ref), entry in zip(stages, entries, strict=True):
        facts = PipelineFacts(
            n=n,
            f=min(f, n),
            params=ref.params,
            filters=tuple(r.name for r in strategy.filters),
            aggregator=strategy.aggregator.name,
            steps=tuple(r.name for r in strategy.steps),
            bounded=bounded,
            root_samples=strategy.root_samples,
            rowwise=rowwise,
        )
        asked, rows = entry.meta.get("needs"), entry.meta.get("rows")
        reason = asked(facts) if asked is not None else None
        if reason:
            raise InputError(f"'{entry.name}' cannot work here: {reason}", place)
        if rows is not None:
            n = rows(facts)


def _server(scenario: Scenario, origin: Origin) -> MaliciousServerSpec | None:
    """Return the malicious server with its parameters written out."""
    spec = scenario.malicious_server
    if spec is None:
        return None
    swept = scenario.sweep.strategies.values() if scenario.sweep is not None else ()
    if any(strategy.aggregator.name.startswith("flwr:") for strategy in (scenario.strategy, *swept)):
        raise InputError("a stock Flower strategy sends what it wants to; use a pipeline of fedtrust's own", "malicious_server")
    if spec.rounds is not None and not 1 <= spec.rounds[0] <= spec.rounds[1] <= scenario.rounds:
        raise InputError(
            f"should be [first, last] with 1 <= first <= last <= {scenario.rounds} (got {list(spec.rounds)})", "malicious_server.rounds"
        )
    entry = _entry("sender", spec.sender, "malicious_server.sender", origin)
    return spec.model_copy(update={"params": _checked(entry, spec.params, "malicious_server.params")})


def _release(scenario: Scenario, origin: Origin) -> ReleaseSpec:
    """Return the terms of the release with every parameter written out, if its defences have something to work on."""
    spec = scenario.release
    done: list[Ref] = []
    for index, given in enumerate(spec.defences):
        place = f"release.defences[{index}]"
        if spec.answers == "logits":
            raise InputError(f"'{given.name}' works on probabilities; set release.answers to 'probabilities' or 'label'", place)
        if given.name in [other.name for other in done]:
            raise InputError(f"'{given.name}' stands there twice", place)
        if spec.answers == "label" and _entry("answer", given.name, place, origin).meta.get("label") is False:
            raise InputError(f"'{given.name}' would do nothing: users are told the label alone", place)
        done.append(checked_ref(given, "answer", place, origin))
    for index, probe in enumerate(scenario.probes):
        asked = probe.params.get("queries")
        most = max(asked, default=0) if isinstance(asked, list) else asked
        if spec.queries is not None and isinstance(most, int) and most > spec.queries:
            raise InputError(f"a user may ask {spec.queries} (release.queries), not {most}", f"probes[{index}].queries")
    return spec.model_copy(update={"defences": done})


def _probes(scenario: Scenario, data: DataSpec, origin: Origin) -> list[Ref]:
    probes = scenario.probes
    if not probes:
        sweeps = scenario.sweep.attackers.values() if scenario.sweep is not None else ()
        attacked = bool(scenario.attackers) or any(sweeps)
        kind = _task(data, origin)
        probes = [Ref(name="loss" if kind == "regression" else "accuracy")]
        probes += [Ref(name="attack-success")] if attacked and kind == "classification" else []
    names = [probe.name for probe in probes]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise InputError(f"'{name}' stands there twice", f"probes[{index}]")
    done = [checked_ref(probe, "probe", f"probes[{i}]", origin) for i, probe in enumerate(probes)]
    for index, ref in enumerate(done):
        once = _entry("probe", ref.name, f"probes[{index}]", origin).meta.get("once")
        number = ref.params.get("at_round")
        if once and isinstance(number, int) and number > scenario.rounds:
            raise InputError(
                f"should be at most `rounds`, {scenario.rounds} (got {number}): it would never act", f"probes[{index}].at_round"
            )
    return done


def behaviours(scenario: Scenario) -> Sequence[tuple[str, str, dict[str, Any]]]:
    """Return (place, name, parameters) of every behaviour in the scenario and its sweep."""
    groups = [(f"attackers[{i}]", g) for i, g in enumerate(scenario.attackers)]
    for label, entry in (scenario.sweep.attackers if scenario.sweep is not None else {}).items():
        groups += [(f"sweep.attackers.{label}[{i}]", g) for i, g in enumerate(entry)]
    honest = [("clients.behaviour", scenario.clients.behaviour)]
    for label, strategy in (scenario.sweep.strategies if scenario.sweep is not None else {}).items():
        honest += [] if strategy.behaviour is None else [(f"sweep.strategies.{label}.behaviour", strategy.behaviour)]
    attackers = [(f"{place}.behaviour", group.behaviour, group.params) for place, group in groups]
    return [*((place, ref.name, ref.params) for place, ref in honest), *attackers]
